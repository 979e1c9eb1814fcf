"""Fused linear divergence against the plain one: time, memory and accuracy, forward and backward.

    python shared/benchmarks/bench_fused_linear.py                 # table to the terminal
    python shared/benchmarks/bench_fused_linear.py --write         # and into shared/benchmarks/RESULTS.md

Every variant starts from the same hidden states and weights and ends with the gradients of the student's
hidden states and weight. Results are checked against float64 before anything is timed. Timings are
interleaved (one run of each variant, then again) in one process with a fixed number of threads; "CPU s" is
process time. Memory is the rise of the peak resident set (VmHWM, Linux) over one forward and backward pass,
in a fresh process per variant. Peers run where they are importable: torchdistill, liger-kernel, trl.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from stillhouse.core.losses import LinearHead, forward_kl, fused_linear_jsd, fused_linear_kl, generalized_jsd

BETA, TEMPERATURE = 0.3, 2.0
Inputs = tuple[
    Tensor, Tensor, Tensor, Tensor
]  # student hidden [N,H], weight [V,H], teacher hidden [N,H'], weight [V,H']
Variant = Callable[[Inputs], Tensor]


def make_inputs(rows: int, vocab: int, width: int, teacher_width: int) -> Inputs:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    student = draw(rows, width, scale=1.0).requires_grad_()
    weight = draw(vocab, width, scale=2.0 / width**0.5).requires_grad_()
    return (
        student,
        weight,
        draw(rows, teacher_width, scale=1.0),
        draw(vocab, teacher_width, scale=2.0 / teacher_width**0.5),
    )


def naive_kl(x: Inputs) -> Tensor:
    log_q = F.log_softmax(F.linear(x[0], x[1]) / TEMPERATURE, -1)
    with torch.no_grad():
        log_p = F.log_softmax(F.linear(x[2], x[3]) / TEMPERATURE, -1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def naive_jsd(x: Inputs) -> Tensor:
    log_q = F.log_softmax(F.linear(x[0], x[1]) / TEMPERATURE, -1)
    with torch.no_grad():
        log_p = F.log_softmax(F.linear(x[2], x[3]) / TEMPERATURE, -1)
    log_m = torch.logaddexp(log_p + math.log(BETA), log_q + math.log1p(-BETA))
    teacher = F.kl_div(log_m, log_p, reduction="batchmean", log_target=True)
    return BETA * teacher + (1 - BETA) * F.kl_div(log_m, log_q, reduction="batchmean", log_target=True)


def heads(x: Inputs) -> tuple[LinearHead, LinearHead]:
    return LinearHead(hidden=x[0], weight=x[1]), LinearHead(hidden=x[2], weight=x[3])


def fused_kl(x: Inputs, rows: int | None = None) -> Tensor:
    return fused_linear_kl(*heads(x), temperature=TEMPERATURE, scale_t2=False, chunk_rows=rows)


def fused_jsd(x: Inputs, rows: int | None = None) -> Tensor:
    return fused_linear_jsd(*heads(x), beta=BETA, temperature=TEMPERATURE, scale_t2=False, chunk_rows=rows)


def logits_kl(x: Inputs) -> Tensor:
    with torch.no_grad():
        teacher = F.linear(x[2], x[3])
    return forward_kl(F.linear(x[0], x[1]), teacher, temperature=TEMPERATURE, scale_t2=False)


def logits_jsd(x: Inputs) -> Tensor:
    with torch.no_grad():
        teacher = F.linear(x[2], x[3])
    return generalized_jsd(F.linear(x[0], x[1]), teacher, beta=BETA, temperature=TEMPERATURE, scale_t2=False)


def peer_torchdistill() -> Variant:
    from torchdistill.losses.mid_level import KDLoss

    loss = KDLoss("out", "output", "out", "output", TEMPERATURE, alpha=0)

    def run(x: Inputs) -> Tensor:
        with torch.no_grad():
            teacher = F.linear(x[2], x[3])
        result: Tensor = loss({"out": {"output": F.linear(x[0], x[1])}}, {"out": {"output": teacher}}, None)
        return result

    return run


def peer_liger(rows: int) -> Variant:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0,
        weight_soft_loss=1.0,
        beta=BETA,
        temperature=TEMPERATURE,
        compiled=False,
        chunk_size=rows,
    )

    def run(x: Inputs) -> Tensor:
        result: Tensor = loss(*x, torch.zeros(x[0].shape[0], dtype=torch.long))
        return result

    return run


def peer_trl() -> Variant:
    from trl.experimental.gkd import GKDTrainer

    def run(x: Inputs) -> Tensor:
        with torch.no_grad():
            teacher = F.linear(x[2], x[3])
        student = F.linear(x[0], x[1])
        result: Tensor = GKDTrainer.generalized_jsd_loss(
            student[None], teacher[None], beta=BETA, temperature=TEMPERATURE, reduction="batchmean"
        )
        return result / len(
            student
        )  # without labels its batchmean divides by the one sequence, not by its tokens

    return run


KL: dict[str, Callable[[], Variant]] = {
    "plain torch (`F.kl_div`)": lambda: naive_kl,
    "stillhouse `forward_kl` on logits": lambda: logits_kl,
    "stillhouse `fused_linear_kl`, default chunk": lambda: fused_kl,
    "stillhouse `fused_linear_kl`, 128 rows": lambda: lambda x: fused_kl(x, 128),
    "stillhouse `fused_linear_kl`, 64 rows": lambda: lambda x: fused_kl(x, 64),
    "torchdistill `KDLoss`": peer_torchdistill,
}
JSD: dict[str, Callable[[], Variant]] = {
    "plain torch JSD": lambda: naive_jsd,
    "stillhouse `generalized_jsd` on logits": lambda: logits_jsd,
    "stillhouse `fused_linear_jsd`, default chunk": lambda: fused_jsd,
    "stillhouse `fused_linear_jsd`, 64 rows": lambda: lambda x: fused_jsd(x, 64),
    "liger-kernel fused linear JSD, not compiled, 256 rows": lambda: peer_liger(256),
    "liger-kernel fused linear JSD, not compiled, 64 rows": lambda: peer_liger(64),
    "trl `generalized_jsd_loss`": peer_trl,
}
TOLERANCE = 1e-4
GROUPS = {"forward KL": KL, f"JSD, β = {BETA}": JSD}
PEERS = {"torchdistill": "torchdistill", "liger": "liger_kernel", "trl": "trl"}


def available(name: str) -> bool:
    return all(importlib.util.find_spec(module) for key, module in PEERS.items() if name.startswith(key))


def step(run: Variant, x: Inputs) -> float:
    x[0].grad = x[1].grad = None
    loss = run(x)
    loss.backward()
    return float(loss.detach())


def check(run: Variant, x: Inputs, reference: tuple[float, Tensor, Tensor]) -> tuple[float, float]:
    """Return the relative errors of the loss and of the head's gradient against float64; others stop it."""
    value, by_hidden, by_weight = reference
    loss = step(run, x)
    errors = [abs(loss - value) / abs(value)]
    for tensor, exact in ((x[0], by_hidden), (x[1], by_weight)):
        grad = tensor.grad.double() if tensor.grad is not None else torch.full_like(exact, torch.nan)
        errors.append(float((grad - exact).norm() / exact.norm()))
    if not max(errors) < TOLERANCE:
        raise SystemExit(f"results differ by {max(errors):.1e} relative: this would compare different work")
    return errors[0], max(errors[1:])


def reference_of(run: Variant, x: Inputs) -> tuple[float, Tensor, Tensor]:
    wide = tuple(t.detach().double() for t in x)
    total, by_hidden, by_weight = 0.0, [], torch.zeros_like(wide[1])
    for rows in torch.arange(x[0].shape[0]).split(64):
        part = (wide[0][rows].requires_grad_(), wide[1].clone().requires_grad_(), wide[2][rows], wide[3])
        loss = run(part) * (len(rows) / x[0].shape[0])
        loss.backward()
        total += float(loss.detach())
        by_hidden.append(part[0].grad)
        by_weight += part[1].grad
    return total, torch.cat(by_hidden), by_weight


def timings(runs: dict[str, Variant], x: Inputs, repeats: int) -> dict[str, list[float]]:
    for run in runs.values():
        step(run, x)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.process_time()
            step(run, x)
            times[name].append(time.process_time() - start)
    return times


def high_water() -> int:
    """Return the peak resident set of this process in KiB; unlike ru_maxrss it starts afresh after exec."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1])
    raise SystemExit("no VmHWM in /proc/self/status: memory is measured on Linux only")


def peak(args: argparse.Namespace) -> int:
    """Child process: print the rise of the peak resident set in KiB over one step of one variant."""
    run = GROUPS[args.memory[0]][args.memory[1]]()
    step(run, make_inputs(8, 64, args.width, args.teacher_width))  # load what is loaded lazily
    x = make_inputs(args.rows, args.vocab, args.width, args.teacher_width)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    before = high_water()
    step(run, x)
    print(high_water() - before)
    return 0


def memory(args: argparse.Namespace, group: str, name: str) -> float:
    command = [sys.executable, __file__, "--memory", group, name]
    for option in ("rows", "vocab", "width", "teacher_width", "threads"):
        command += [f"--{option.replace('_', '-')}", str(getattr(args, option))]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(out.split()[-1]) / 1024


def table(args: argparse.Namespace) -> str:
    x = make_inputs(args.rows, args.vocab, args.width, args.teacher_width)
    lines = [
        f"N = {args.rows}, V = {args.vocab}, H = {args.width} (student) / {args.teacher_width} (teacher), "
        f"float32, T = {TEMPERATURE}, {args.threads} thread(s), {platform.machine()} CPU, "
        f"torch {torch.__version__}, {args.repeats} interleaved repeats, forward + backward.",
        "",
    ]
    for module in ("torchdistill", "liger-kernel", "trl"):
        try:
            lines[0] += f" {module} {importlib.metadata.version(module)}."
        except importlib.metadata.PackageNotFoundError:
            lines[0] += f" {module}: not installed."
    for group, variants in GROUPS.items():
        runs = {name: make() for name, make in variants.items() if available(name)}
        exact = reference_of(next(iter(runs.values())), x)
        errors = {name: check(run, x, exact) for name, run in runs.items()}
        for name, (by_value, by_gradient) in errors.items():
            if name.startswith("stillhouse") and max(by_value, by_gradient) > 1e-5:
                raise SystemExit(
                    f"{name}: relative error {by_value:.1e} / {by_gradient:.1e}; nothing was timed"
                )
        times = timings(runs, x, args.repeats)
        peaks = {name: memory(args, group, name) for name in runs}
        base = next(iter(runs))
        lines += [
            f"**{group}**",
            "",
            "| variant | CPU s, median [min, max] | time ratio | extra MiB | memory ratio | loss error "
            "| gradient error |",
            "|---|---|---|---|---|---|---|",
        ]
        for name in runs:
            ratio = statistics.median(a / b for a, b in zip(times[name], times[base], strict=True))
            spread = f"{statistics.median(times[name]):.2f} [{min(times[name]):.2f}, {max(times[name]):.2f}]"
            space = f"{peaks[name]:.0f} | {peaks[name] / peaks[base]:.2f}"
            by_value, by_gradient = errors[name]
            lines.append(
                f"| {name} | {spread} | {ratio:.2f} | {space} | {by_value:.1e} | {by_gradient:.1e} |"
            )
        lines.append("")
    lines.append("Ratios are against the first line of each table; errors are relative to float64.")
    return "\n".join(lines) + "\n"


def write(text: str, command: str) -> Path:
    """Replace this benchmark's section of RESULTS.md beside this file."""
    path = Path(__file__).with_name("RESULTS.md")
    old = path.read_text() if path.exists() else "# Measured results\n"
    title = "## Fused linear divergence"
    start = old.find(title)
    if start >= 0:
        end = old.find("\n## ", start + 1)
        old = old[:start].rstrip() + "\n" + (old[end:] if end >= 0 else "")
    path.write_text(f"{old.rstrip()}\n\n{title}\n\n`{command}`\n\n{text}")
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--teacher-width", type=int, default=384)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="put the table into RESULTS.md beside this file")
    parser.add_argument("--json", action="store_true", help="print the text as one JSON string")
    parser.add_argument("--memory", nargs=2, metavar=("GROUP", "VARIANT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory:
        return peak(args)
    text = table(args)
    print(json.dumps(text) if args.json else text)
    if args.write:
        options = " ".join(a for a in sys.argv[1:] if a != "--write")
        print(
            write(
                text, f"python shared/benchmarks/bench_fused_linear.py {options} --write".replace("  ", " ")
            )
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
