"""Sinkhorn losses against POT and geomloss, forward + backward from the logits, on the same problems.

    python shared/benchmarks/bench_sinkhorn.py             # print the table
    python shared/benchmarks/bench_sinkhorn.py --write     # and append it to shared/benchmarks/RESULTS.md

G problems of B samples each and V classes, ε = 0.1, temperature 2, one thread, float32. Two comparisons, each
checked for equal values and gradients before timing:

- plain ⟨P, C⟩: ours on all G at once, POT problem by problem (its solver takes one cost matrix), both with 20
  iterations. Value and gradient must agree.
- debiased divergence: ours with 20 iterations, geomloss (tensorized, batched, ε-scaling 0.5, its default, and
  0.9; its gradient is that of the optimum, not of the iterations). They stop at different points.

Errors are relative to 200 iterations in float64, and bounded before anything is timed.
Time is CPU time, the median of interleaved repeats, because wall time on a shared machine measures the
neighbours.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import geomloss
import ot
import torch
from torch import Tensor

from stillhouse.core.losses import sinkhorn_loss

EPS, TEMPERATURE, ITERS = 0.1, 2.0, 20
RESULTS = Path(__file__).parent / "RESULTS.md"
Loss = Callable[[Tensor, Tensor], Tensor]


def l1_cost(x: Tensor, y: Tensor) -> Tensor:
    return torch.cdist(x, y, p=1)


def ours(student: Tensor, teacher: Tensor) -> Tensor:
    return sinkhorn_loss(student, teacher)


def ours_debiased(student: Tensor, teacher: Tensor) -> Tensor:
    return sinkhorn_loss(student, teacher, debias=True)


def pot(student: Tensor, teacher: Tensor) -> Tensor:
    values = []
    for z_s, z_t in zip(student, teacher, strict=True):
        cost = l1_cost((z_s / TEMPERATURE).softmax(-1), (z_t / TEMPERATURE).softmax(-1))
        weights = cost.new_full((len(cost),), 1 / len(cost))
        plan = ot.sinkhorn(
            weights,
            weights,
            cost.mT,  # POT's half-steps run the other way round
            reg=EPS,
            method="sinkhorn_log",
            numItermax=ITERS,
            stopThr=0.0,
            warn=False,
        )
        values.append((plan.mT * cost).sum())
    return torch.stack(values).mean()


def geomloss_debiased(scaling: float) -> Loss:
    loss = geomloss.SamplesLoss(
        "sinkhorn", p=1, blur=EPS, scaling=scaling, debias=True, cost=l1_cost, backend="tensorized"
    )

    def value(student: Tensor, teacher: Tensor) -> Tensor:
        x, y = (student / TEMPERATURE).softmax(-1), (teacher / TEMPERATURE).softmax(-1)
        return loss(x, y).mean()

    return value


def inputs(problems: int, samples: int, classes: int) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    student, teacher = 3 * torch.randn(2, problems, samples, classes, generator=rng)
    return student.requires_grad_(), teacher


def step(loss: Loss, student: Tensor, teacher: Tensor) -> tuple[float, Tensor]:
    value = loss(student, teacher)
    (gradient,) = torch.autograd.grad(value, student)
    return value.item(), gradient


def converged(student: Tensor, teacher: Tensor, *, debias: bool) -> tuple[float, Tensor]:
    """Value and gradient after 200 iterations in float64, problem by problem to bound the memory."""

    def loss(z_s: Tensor, z_t: Tensor) -> Tensor:
        return sinkhorn_loss(z_s, z_t, iters=200, debias=debias)

    parts = [
        step(loss, z_s.detach().double().requires_grad_(), z_t.double())
        for z_s, z_t in zip(student, teacher, strict=True)
    ]
    value = sum(value for value, _ in parts) / len(parts)
    return value, torch.stack([gradient for _, gradient in parts]) / len(parts)


def relative(result: tuple[float, Tensor], reference: tuple[float, Tensor]) -> tuple[float, float]:
    gap = (result[1] - reference[1]).norm() / reference[1].norm()
    return abs(result[0] / reference[0] - 1), gap.item()


def timed(losses: dict[str, Loss], student: Tensor, teacher: Tensor, repeats: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in losses}
    for _ in range(repeats):
        for name, loss in losses.items():
            start = time.process_time()
            step(loss, student, teacher)
            times[name].append(1000 * (time.process_time() - start))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problems", type=int, default=8)
    parser.add_argument("--samples", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--classes", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--write", action="store_true", help="append the table to RESULTS.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    plain: dict[str, Loss] = {"POT": pot, "ours": ours}
    debiased: dict[str, Loss] = {
        "geomloss": geomloss_debiased(0.5),
        "geomloss, scaling 0.9": geomloss_debiased(0.9),
        "ours": ours_debiased,
    }
    lines = [
        "| loss | G × B × V | variant | CPU ms (median) | spread | time ratio | value error "
        "| gradient error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kind, losses in (("⟨P, C⟩", plain), ("debiased", debiased)):
        for samples in arguments.samples:
            student, teacher = inputs(arguments.problems, samples, arguments.classes)
            reference = converged(student, teacher, debias=kind == "debiased")
            error = {}
            for name, loss in losses.items():
                error[name] = relative(step(loss, student, teacher), reference)
                if error[name][0] > 1e-2 or error[name][1] > 0.2:
                    raise SystemExit(f"{name} is off at B={samples}: {error[name]}")
            if kind != "debiased":
                gap = relative(step(ours, student, teacher), step(pot, student, teacher))
                if gap[0] > 1e-5 or gap[1] > 1e-4:
                    raise SystemExit(f"ours differs from POT at B={samples}: {gap}")
            times = timed(losses, student, teacher, arguments.repeats)
            first = statistics.median(next(iter(times.values())))
            for name, values in times.items():
                median = statistics.median(values)
                lines.append(
                    f"| {kind} | {arguments.problems} × {samples} × {arguments.classes} | {name} | "
                    f"{median:.1f} | {min(values):.1f}–{max(values):.1f} | {median / first:.2f} | "
                    f"{error[name][0]:.1e} | {error[name][1]:.1e} |"
                )
    table = "\n".join(lines)
    print(table)
    if arguments.write:
        header = (
            "## Sinkhorn losses, forward + backward\n\n`python shared/benchmarks/bench_sinkhorn.py --write`, "
        )
        header += f"torch {torch.__version__}, POT {ot.__version__}, geomloss {geomloss.__version__}, "
        header += f"{platform.machine()} CPU, one thread, float32.\n\n"
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(f"\n{header}{table}\n")


if __name__ == "__main__":
    main()
