"""The gated delta rule in chunks, against the recurrence and against softmax attention.

    python packages/genomic/benchmarks/bench_gdn.py             # tables to the terminal
    python packages/genomic/benchmarks/bench_gdn.py --write     # and into RESULTS.md beside this file

Forward and backward pass of one sequence, float32. Operators: heads of the 1.1 M student (d = 128: 2 heads,
d_k = 48, d_v = 96), attention with 2 heads of 64. Layers: projections, convolutions and gates included.
Chunked and recurrent outputs and gradients are checked against float64 before anything is timed, attention
against its formula. Timings are interleaved (one run of each, then again); seconds are process time. Memory
is the rise of the peak resident set (VmHWM, Linux) over one pass, in a fresh process for each cell.
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from stillhouse.genomic.student import BiGatedDeltaNet, gated_delta_chunked, gated_delta_recurrent, preset
from stillhouse.genomic.student._layers import SelfAttention

HEADS, KEYS, VALUES, WIDTH = 2, 48, 96, 128
CHUNKED, TWICE, BOTH = "chunked, one direction", "chunked, two calls", "chunked, both directions in one call"
RECURRENT, SDPA, PLAIN = "recurrent, one direction", "attention, SDPA", "attention, matrix in memory"
GDN_LAYER, ATTENTION_LAYER = "Bi-GDN layer", "attention layer (SDPA)"
OPERATORS = (CHUNKED, BOTH, TWICE, RECURRENT, SDPA, PLAIN)
LAYERS = (GDN_LAYER, ATTENTION_LAYER)
LONGEST = {RECURRENT: 4096, PLAIN: 4096}  # beyond these a pass takes too long, or too much memory
TITLE = "## Gated delta rule"


def draw(length: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    x = {
        "q": F.normalize(normal(1, length, HEADS, KEYS), dim=-1) * KEYS**-0.5,
        "k": F.normalize(normal(1, length, HEADS, KEYS), dim=-1),
        "v": normal(1, length, HEADS, VALUES),
        "log_alpha": -0.1 * torch.rand(1, length, HEADS, generator=g),
        "beta": torch.rand(1, length, HEADS, generator=g),
    }
    return {name: t.requires_grad_() for name, t in x.items()}


def task(name: str, length: int) -> Callable[[], None]:
    """One forward and backward pass."""
    torch.manual_seed(0)
    if name in LAYERS:
        config = preset("gdn_1m")
        layer = BiGatedDeltaNet(config) if name == GDN_LAYER else SelfAttention(WIDTH, config.attention_heads)
        x = torch.randn(1, length, WIDTH, requires_grad=True)
        return lambda: layer(x).sum().backward()
    if name in (SDPA, PLAIN):
        q, k, v = (torch.randn(1, HEADS, length, WIDTH // HEADS, requires_grad=True) for _ in range(3))
        form = F.scaled_dot_product_attention if name == SDPA else plain_attention
        return lambda: form(q, k, v).sum().backward()
    inputs = list(draw(length).values())
    if name == RECURRENT:
        return lambda: gated_delta_recurrent(*inputs)[0].sum().backward()
    if name == CHUNKED:
        return lambda: gated_delta_chunked(*inputs)[0].sum().backward()

    def both() -> None:
        o, _ = gated_delta_chunked(*(torch.cat([t, t.flip(1)]) for t in inputs))
        one, two = o.chunk(2)
        (one + two.flip(1)).sum().backward()

    def twice() -> None:
        one, _ = gated_delta_chunked(*inputs)
        two, _ = gated_delta_chunked(*(t.flip(1) for t in inputs))
        (one + two.flip(1)).sum().backward()

    return both if name == BOTH else twice


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v


def check(length: int = 700) -> str:
    """Compare with float64; stop where results differ."""
    x = draw(length)
    wide = [t.detach().double().requires_grad_() for t in x.values()]
    exact, _ = gated_delta_recurrent(*wide)
    weight = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1))
    wanted = [exact.detach(), *torch.autograd.grad((exact * weight).sum(), wide)]
    errors = {}
    for name, form in (("chunked", gated_delta_chunked), ("recurrent", gated_delta_recurrent)):
        o, _ = form(*x.values())
        found = [o, *torch.autograd.grad((o * weight).sum(), list(x.values()))]
        pairs = zip(found, wanted, strict=True)
        errors[name] = max(float((a.detach().double() - b).norm() / b.norm()) for a, b in pairs)
    q, k, v = (torch.randn(1, HEADS, length, 64) for _ in range(3))
    one, two = F.scaled_dot_product_attention(q, k, v), plain_attention(q, k, v)
    errors["attention"] = float((one - two).norm() / two.norm())
    if not max(errors.values()) < 1e-4:
        raise SystemExit(f"results differ ({errors}): this would compare different work")
    return ", ".join(f"{name} {error:.0e}" for name, error in errors.items())


def timings(names: tuple[str, ...], length: int, repeats: int) -> dict[str, list[float]]:
    runs = {name: task(name, length) for name in names if length <= LONGEST.get(name, length)}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):  # the first is not counted
        for name, run in runs.items():
            start = time.process_time()
            run()
            if repeat:
                times[name].append(time.process_time() - start)
    return times


def high_water() -> int:
    """Peak resident set of this process in KiB; unlike ru_maxrss it starts afresh after exec."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1])
    raise SystemExit("no VmHWM in /proc/self/status: memory is measured on Linux only")


def memory(name: str, length: int) -> float:
    command = [sys.executable, __file__, "--memory", name, str(length)]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(out.split()[-1]) / 1024


def child(name: str, length: int) -> None:
    task(name, 64)()  # load what is loaded lazily
    run = task(name, length)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    before = high_water()
    run()
    print(high_water() - before)


def exponent(values: dict[int, float]) -> str:
    """Least-squares slope of log(value) over log(L), from L = 2048 up: 1 linear, 2 quadratic."""
    points = [(math.log(n), math.log(v)) for n, v in values.items() if n >= 2048]
    if len(points) < 2:
        return "–"
    mean_x, mean_y = (statistics.mean(p[i] for p in points) for i in (0, 1))
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)
    return f"{slope:.2f}"


def table(names: tuple[str, ...], lengths: list[int], repeats: int) -> str:
    seconds: dict[str, dict[int, float]] = {name: {} for name in names}
    space: dict[str, dict[int, float]] = {name: {} for name in names}
    for length in lengths:
        for name, found in timings(names, length, repeats).items():
            seconds[name][length] = statistics.median(found)
            space[name][length] = memory(name, length)
            print(f"{length} {name}: {seconds[name][length]:.3f} s", file=sys.stderr, flush=True)
    head = "| | " + " | ".join(f"L = {length}" for length in lengths) + " | growth |"
    rule = "|---" * (len(lengths) + 2) + "|"
    parts = []
    base = names[0]
    for title, values, form in (
        ("milliseconds, and in units of the first row", seconds, "{:.0f}"),
        ("MiB of extra memory, and in units of the first row", space, "{:.0f}"),
    ):
        rows = []
        for name in names:
            cells = []
            for length in lengths:
                if length not in values[name]:
                    cells.append("–")
                    continue
                value, unit = values[name][length], values[base][length]
                shown = form.format(value * 1000 if values is seconds else value)
                cells.append(f"{shown} (×{value / unit:.2f})")
            rows.append(f"| {name} | " + " | ".join(cells) + f" | {exponent(values[name])} |")
        parts.append("\n".join([f"{title}:", "", head, rule, *rows]))
    return "\n\n".join(parts)


def write(text: str) -> Path:
    """Replace this benchmark's section of RESULTS.md beside this file."""
    path = Path(__file__).with_name("RESULTS.md")
    old = path.read_text() if path.exists() else "# Measured results\n"
    start = old.find(TITLE)
    if start >= 0:
        end = old.find("\n## ", start + 1)
        old = old[:start].rstrip() + "\n" + (old[end:] if end >= 0 else "")
    path.write_text(f"{old.rstrip()}\n\n{TITLE}\n\n{text}\n")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="put the tables into RESULTS.md")
    parser.add_argument("--memory", nargs=2, metavar=("NAME", "LENGTH"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.memory:
        child(given.memory[0], int(given.memory[1]))
        return
    command = " ".join(["python packages/genomic/benchmarks/bench_gdn.py", *sys.argv[1:]])
    setting = (
        f"One sequence, forward + backward, float32, {given.threads} thread(s), {platform.machine()} CPU, "
        f"torch {torch.__version__}, chunk 32; median of {given.repeats} interleaved runs. Growth: exponent "
        "of L from 2048 up. Largest relative errors, of outputs and gradients, against float64 (attention: "
        f"against its formula): {check()}."
    )
    operators = "### Operators\n\n" + table(OPERATORS, given.lengths, given.repeats)
    layers = "### Layers, d = 128\n\n" + table(LAYERS, given.lengths, given.repeats)
    text = "\n\n".join([f"`{command}`", setting, operators, layers])
    print(text)
    if given.write:
        print(write(text))


if __name__ == "__main__":
    main()
