"""Embedding throughput of students and teachers: the same windows, letters in, one vector a window out.

    python packages/genomic/benchmarks/bench_embedding.py                    # print the table
    python packages/genomic/benchmarks/bench_embedding.py --write            # and append to RESULTS.md
    python packages/genomic/benchmarks/bench_embedding.py --small            # without the 500M teacher

Weights are random: speed does not depend on them. The teachers are the 6-mer Transformer that the package
trains itself and networks of the sizes of NTv2-50M and NTv2-500M (RoPE, gated MLP, no biases; depths and
widths recalled, not read from the released configurations). Tokenisation is part of the work. All run on one
thread and are timed in turns; time is CPU time, the median of the rounds after the first, because wall time
on a shared machine measures the neighbours. Before anything is timed, embeddings of a batch and of its
windows one by one are compared, so that what is timed is right.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from stillhouse.genomic.embed import embed_windows
from stillhouse.genomic.student import build_student, preset
from stillhouse.genomic.teacher import KmerTeacher, KmerTransformer, KmerTransformerConfig

RESULTS = Path(__file__).parent / "RESULTS.md"
TEACHERS = {
    "own 6-mer teacher": KmerTransformerConfig(),
    "NTv2-50M-sized teacher": KmerTransformerConfig(
        width=512, depth=12, heads=16, mlp_ratio=6.0, composed=False
    ),
    "NTv2-500M-sized teacher": KmerTransformerConfig(
        width=1024, depth=29, heads=16, mlp_ratio=6.0, composed=False
    ),
}
STUDENTS = ("gdn_1m", "cnn_1m", "transformer_1m", "gdn_48")


def parameters(model: Any) -> int:
    network = model if isinstance(model, nn.Module) else model.network
    return sum(weight.numel() for weight in network.parameters())


def check(name: str, model: Any, windows: np.ndarray) -> None:
    """Raise where a batch and its windows one by one disagree."""
    together = embed_windows(model, windows[:2], batch=2)
    alone = embed_windows(model, windows[:2], batch=1)
    if not np.allclose(together, alone, atol=1e-4, rtol=1e-3):
        raise SystemExit(f"{name}: the batch changes the embedding by {np.abs(together - alone).max()}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="leave the largest teacher out")
    parser.add_argument("--write", action="store_true", help=f"append the table to {RESULTS.name}")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    windows = np.frombuffer(b"ACGT", np.uint8)[rng.integers(0, 4, (options.windows, options.length))]
    models: dict[str, Any] = {}
    for name, config in TEACHERS.items():
        if not (options.small and "500M" in name):
            models[name] = KmerTeacher(KmerTransformer(config))
    teachers = list(models)
    models.update({f"student {name}": build_student(preset(name)).eval() for name in STUDENTS})
    spent: dict[str, list[float]] = {name: [] for name in models}
    for name, model in models.items():
        check(name, model, windows)
    for turn in range(options.rounds + 1):
        for name, model in models.items():
            start = time.process_time()
            embed_windows(model, windows, batch=options.windows)
            if turn:  # the first round warms up
                spent[name].append(time.process_time() - start)
    rate = {name: windows.size / statistics.median(values) for name, values in spent.items()}
    largest = teachers[-1]
    heads = [
        "model",
        "parameters",
        "kb/s",
        *(f"× {name}" for name in teachers),
        f"parameters of {largest} over",
    ]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, model in models.items():
        ratios = " | ".join(f"{rate[name] / rate[teacher]:.3g}" for teacher in teachers)
        share = parameters(models[largest]) / parameters(model)
        lines.append(f"| {name} | {parameters(model):,} | {rate[name] / 1e3:.3g} | {ratios} | {share:.3g}× |")
    command = "python packages/genomic/benchmarks/bench_embedding.py" + (" --small" if options.small else "")
    text = (
        f"## Embedding\n\n`{command}` (torch {torch.__version__}, {platform.machine()}, 1 thread; "
        f"{options.windows} windows of {options.length} bp, CPU time, median of {options.rounds}; random "
        "weights)\n\n" + "\n".join(lines) + "\n"
    )
    print(text)
    if options.write:
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write("\n" + text)


if __name__ == "__main__":
    main()
