"""RKD angle loss: blocks of vertices against the dense B³ form, forward + backward, time and peak memory.

    python shared/benchmarks/bench_relations.py            # print the table
    python shared/benchmarks/bench_relations.py --write    # and append it to shared/benchmarks/RESULTS.md

One thread, float32, D = 128. Time is CPU time, the median of interleaved repeats (A B C A B C …), because
wall time on a shared machine measures the neighbours. Peak memory is that of a fresh process per variant,
less the same process before the loss. Values and gradients are compared before anything is timed.
`torchdistill` is a peer where it is installed (`pip install --no-deps torchdistill`).
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from stillhouse.core.losses import rkd_angle

WIDTH = 128
RESULTS = Path(__file__).parent / "RESULTS.md"


def dense(student: Tensor, teacher: Tensor) -> Tensor:
    """The usual implementation: [B, B, D] differences, [B, B, B] cosines of both networks at once."""

    def cosines(x: Tensor) -> Tensor:
        units = F.normalize(x[None] - x[:, None], dim=-1)
        return torch.bmm(units, units.mT)

    return F.smooth_l1_loss(cosines(student), cosines(teacher).detach())


def torchdistill_loss() -> Callable[[Tensor, Tensor], Tensor] | None:
    try:
        from torchdistill.losses.mid_level import RKDLoss
    except ImportError:
        return None
    loss = RKDLoss("s", "t", 0, 1.0, "mean")
    return lambda student, teacher: loss({"s": {"output": student}}, {"t": {"output": teacher}})


def variants() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    peer = torchdistill_loss()
    return {
        "dense B³": dense,
        **({"torchdistill": peer} if peer else {}),
        "ours": rkd_angle,
        "ours, chunk=1": lambda student, teacher: rkd_angle(student, teacher, chunk=1),
    }


def inputs(items: int) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    return torch.randn(items, WIDTH, generator=rng, requires_grad=True), torch.randn(
        items, WIDTH, generator=rng
    )


def step(loss: Callable[[Tensor, Tensor], Tensor], items: int) -> tuple[float, Tensor]:
    student, teacher = inputs(items)
    value = loss(student, teacher)
    (gradient,) = torch.autograd.grad(value, student)
    return value.item(), gradient


def peak_megabytes(name: str, items: int) -> float:
    command = [sys.executable, __file__, "--measure", name, str(items)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure(name: str, items: int) -> None:
    torch.set_num_threads(1)
    loss = variants()[name]
    step(loss, 8)  # loads libraries
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the imports
    before = resident("VmRSS")
    step(loss, items)
    print(resident("VmHWM") - before)


def resident(field: str) -> float:
    """MiB of a memory field of this process (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise SystemExit(f"/proc/self/status has no {field}")


def check_equal(items: int, losses: dict[str, Callable[[Tensor, Tensor], Tensor]]) -> None:
    reference, reference_gradient = step(losses["dense B³"], items)
    for name, loss in losses.items():
        value, gradient = step(loss, items)
        error = (gradient - reference_gradient).norm() / reference_gradient.norm()
        if abs(value / reference - 1) > 1e-5 or error > 1e-4:
            raise SystemExit(
                f"{name} differs at B={items}: {value} against {reference}, gradient {error:.1e}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="append the table to RESULTS.md")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure[0], int(arguments.measure[1]))
        return
    torch.set_num_threads(1)
    losses = variants()
    lines = [
        "| B | variant | CPU ms (median) | spread | time ratio | peak MiB | memory ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for items in arguments.items:
        check_equal(items, losses)
        times: dict[str, list[float]] = {name: [] for name in losses}
        for _ in range(arguments.repeats):
            for name, loss in losses.items():
                start = time.process_time()
                step(loss, items)
                times[name].append(1000 * (time.process_time() - start))
        memory = {name: peak_megabytes(name, items) for name in losses}
        for name, values in times.items():
            median = statistics.median(values)
            ratio = median / statistics.median(times["dense B³"])
            share = memory[name] / memory["dense B³"]
            lines.append(
                f"| {items} | {name} | {median:.1f} | {min(values):.1f}–{max(values):.1f} | {ratio:.2f} | "
                f"{memory[name]:.1f} | {share:.2f} |"
            )
    table = "\n".join(lines)
    print(table)
    if arguments.write:
        header = "## RKD angle, forward + backward\n\n`python shared/benchmarks/bench_relations.py --write`, "
        header += f"torch {torch.__version__}, "
        if "torchdistill" in losses:
            header += f"torchdistill {version('torchdistill')}, "
        header += f"{platform.machine()} CPU, one thread, float32, D = {WIDTH}.\n\n"
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(f"\n{header}{table}\n")


if __name__ == "__main__":
    main()
