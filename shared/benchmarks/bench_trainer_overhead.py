"""The Trainer beside a bare PyTorch loop on the same steps, and importing the core beside importing torch.

    python shared/benchmarks/bench_trainer_overhead.py            # print both tables
    python shared/benchmarks/bench_trainer_overhead.py --write    # and append them to
    shared/benchmarks/RESULTS.md

One thread, float32, a small convolutional student under cross entropy + KL at batch 32. Both loops draw the
same batches from memory; blocks of steps of the two alternate (A B B A …) and each block's first steps are
not counted. CPU time, because wall time on a shared machine measures the neighbours. The weights after a
block are compared to the bit before anything is timed.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.core.train import Losses, OptimConfig, Step, TrainConfig, Trainer

RESULTS = Path(__file__).parent / "RESULTS.md"
WARM = 5
CLIP, DECAY = 1.0, 0.999


def network(width: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, 10),
    )


class Distillation:
    """Cross entropy + KL of a student under a frozen teacher."""

    def __init__(self, width: int) -> None:
        self.student, self.teacher = network(width, 1), network(width, 2).eval().requires_grad_(False)

    def trainable(self) -> Mapping[str, nn.Module]:
        return {"student": self.student}

    def frozen(self) -> Mapping[str, nn.Module]:
        return {"teacher": self.teacher}

    def roles(self, step: int) -> Sequence[str]:
        return ("student",)

    def terms(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.student(x)
        with torch.no_grad():
            target = self.teacher(x).softmax(-1)
        return F.cross_entropy(logits, y), F.kl_div(logits.log_softmax(-1), target, reduction="batchmean")

    def loss(self, role: str, batch: Any, step: Step) -> Losses:
        ce, kd = self.terms(*batch)
        return Losses(ce + kd, {"ce": ce, "kd": kd}, weights={"ce": 1.0, "kd": 1.0}, task="ce")


class Clock:
    """Batches, and the CPU time between the first counted step and the last."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches, self.milliseconds = batches, 0.0

    def __iter__(self) -> Iterator[Any]:
        begun = 0.0
        for number, batch in enumerate(self.batches):
            if number == WARM:
                begun = time.process_time()
            elif number == len(self.batches) - 1:
                self.milliseconds = 1000 * (time.process_time() - begun) / (number - WARM)
            yield batch


def bare(clock: Clock, width: int, full: bool) -> list[Tensor]:
    method, steps = Distillation(width), len(clock.batches)
    optimizer, scheduler = OptimConfig().build(method.student.parameters(), steps)
    parameters = list(method.student.parameters())
    mean = [p.detach().clone() for p in parameters]
    method.student.train()
    for x, y in clock:
        optimizer.zero_grad()
        ce, kd = method.terms(x, y)
        (ce + kd).backward()
        if full:
            nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        scheduler.step()
        if full:
            with torch.no_grad():
                torch._foreach_lerp_(mean, [p.detach() for p in parameters], 1 - DECAY)
    return mean if full else parameters


def trained(clock: Clock, width: int, full: bool) -> list[Tensor]:
    method = Distillation(width)
    settings: dict[str, Any] = {"clip_norm": CLIP, "ema": DECAY} if full else {}
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(steps=len(clock.batches), accelerator="cpu", threads=1, **settings)
        Trainer(config, out=Path(folder) if full else None, quiet=True).fit(method, clock, OptimConfig())
    return list(method.student.parameters())


def overhead(steps: int, repeats: int) -> str:
    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(32, 3, 32, 32, generator=generator), torch.randint(10, (32,), generator=generator))
        for _ in range(steps)
    ]
    lines = [
        "| step | bare ms | Trainer ms | overhead (median of pairs) | middle half of pairs |",
        "|---|---|---|---|---|",
    ]
    for width, full in ((32, False), (32, True), (2, False), (2, True)):
        pairs = zip(bare(Clock(batches), width, full), trained(Clock(batches), width, full), strict=True)
        if not all(torch.equal(a, b) for a, b in pairs):
            raise SystemExit("the Trainer's weights are not those of the bare loop: nothing to compare")
        times: dict[str, list[float]] = {"bare": [], "trained": []}
        for repeat in range(repeats):
            order = (("bare", bare), ("trained", trained))
            for name, loop in order if repeat % 2 == 0 else order[::-1]:
                clock = Clock(batches)
                loop(clock, width, full)
                times[name].append(clock.milliseconds)
        ratios = sorted(100 * (b / a - 1) for a, b in zip(times["bare"], times["trained"], strict=True))
        low, _, high = statistics.quantiles(ratios, n=4)
        name = "with clipping, EMA, log files" if full else "loss, backward, AdamW, schedule, log"
        lines.append(
            f"| {name}, width {width} | {statistics.median(times['bare']):.2f} "
            f"| {statistics.median(times['trained']):.2f} "
            f"| {statistics.median(ratios):+.1f} % | {low:+.1f} … {high:+.1f} % |"
        )
    return "\n".join(lines)


def imports(repeats: int) -> str:
    statements = ("import torch", "import torch, stillhouse.core", "import torch, stillhouse.core.train")
    seconds: dict[str, list[float]] = {statement: [] for statement in statements}
    for repeat in range(repeats + 1):
        for statement in statements:
            code = f"import time; {statement}; print(time.process_time())"
            command = [sys.executable, "-c", code]
            output = subprocess.run(command, check=True, capture_output=True, text=True)
            if repeat:  # the first round fills the disk cache
                seconds[statement].append(float(output.stdout))
    first = statistics.median(seconds[statements[0]])
    lines = ["| statement | CPU s (median) | spread | beside torch |", "|---|---|---|---|"]
    for statement, values in seconds.items():
        median = statistics.median(values)
        lines.append(
            f"| `{statement}` | {median:.2f} | {min(values):.2f}–{max(values):.2f} "
            f"| {median - first:+.2f} s |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=40, help="steps of a block")
    parser.add_argument("--repeats", type=int, default=21, help="blocks of each loop (≥ 5)")
    parser.add_argument("--write", action="store_true", help="append the tables to RESULTS.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    text = f"{overhead(arguments.steps, arguments.repeats)}\n\n{imports(7)}"
    print(text)
    if arguments.write:
        header = (
            "## Trainer beside a bare loop, imports beside torch\n\n"
            "`python shared/benchmarks/bench_trainer_overhead.py --write`, "
            f"torch {torch.__version__}, {platform.machine()} CPU, one thread, float32, batch 32; "
            f"{arguments.repeats} interleaved blocks of {arguments.steps} steps each, CPU time, "
            "weights bit-equal.\n\n"
        )
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(f"\n{header}{text}\n")


if __name__ == "__main__":
    main()
