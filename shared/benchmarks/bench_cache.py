"""The teacher cache: bytes a row, writing and reading speed, and what storing costs in precision.

    python shared/benchmarks/bench_cache.py             # print the tables
    python shared/benchmarks/bench_cache.py --write     # and append them to shared/benchmarks/RESULTS.md

Sequences of 256 tokens (ragged) of a synthetic language-model head: logits of Zipf-like rows with noise,
around 20, V = 152 064 for the top-k caches; single rows of V = 1000 classes for the dense caches; vectors of
768 numbers for embeddings. What is written is drawn once and repeated, so that the disk and the encoding are
measured and not the teacher.

Reading is by shuffled ids from memory-mapped shards in the page cache, 16 sequences or 512 rows a lookup,
decoded to float32. The dense rows are compared with the plainest alternative, a `numpy.memmap` of float16
indexed by row number (it knows no ids, checks nothing and cannot be resumed); both must give the same
probabilities to 1e-3 before timing.

Writing includes encoding, SHA-256, fsync and rename. Rates are per CPU-second of this process, because wall
time on a shared machine measures the neighbours; the wall time of writing, which waits for the disk, is given
beside. KL is the divergence of the stored from the true distribution at T = 1 (for top-k: over the kept
tokens and the tail).
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stillhouse.core.cache import CacheSpec, TeacherCache
from stillhouse.core.losses.topk import SparseTeacher
from stillhouse.core.teacher import DenseSignal, EmbeddingSignal, TeacherSignal

RESULTS = Path(__file__).parent / "RESULTS.md"
LENGTH, VOCAB, CLASSES, WIDTH = 256, 152_064, 1000, 768


def head_logits(rows: int, vocab: int, seed: int = 0) -> Tensor:
    """Rows whose sorted probabilities fall like a power of the rank, at a level of about 20."""
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.arange(1, vocab + 1).log()
    steep = 1.5 + 1.5 * torch.rand(rows, 1, generator=generator)
    noise = 0.5 * torch.randn(rows, vocab, generator=generator)
    return 20.0 - steep * ranks + noise


def timed(work: Callable[[], object]) -> tuple[float, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def write(
    folder: Path, spec: CacheSpec, signal: TeacherSignal, batch: int, count: int
) -> tuple[float, float]:
    def work() -> None:
        with TeacherCache.create(folder, spec, shard_bytes=64 * 2**20) as writer:
            for start in range(0, count, batch):
                writer.add(list(range(start, start + batch)), signal)
            writer.finish()

    return timed(work)


def read(cache: TeacherCache, batch: int, rounds: int) -> list[float]:
    order = torch.randperm(len(cache), generator=torch.Generator().manual_seed(1))
    cache.lookup(order[:batch])
    times = []
    for number in range(rounds):
        start = (number * batch) % (len(cache) - batch + 1)
        ids = order[start : start + batch]
        times.append(timed(lambda ids=ids: cache.lookup(ids, layout="flat"))[0])  # type: ignore[misc]
    return times


def topk_error(logits: Tensor, signal: SparseTeacher) -> float:
    """KL(true ‖ stored) over the kept tokens and the tail, in float64."""
    log_p = torch.log_softmax(logits.double(), -1).gather(-1, signal.ids)
    tail = torch.log1p(-log_p.exp().sum(-1))
    log_q, log_q_tail = signal.log_probs(1.0)
    kept = (log_p.exp() * (log_p - log_q.double())).sum(-1)
    return float((kept + tail.exp() * (tail - log_q_tail.double())).mean())


def dense_error(logits: Tensor, stored: Tensor) -> float:
    log_p, log_q = torch.log_softmax(logits.double(), -1), torch.log_softmax(stored.double(), -1)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def thousands(rate: float) -> str:
    return f"{rate / 1e3:,.0f} k"


def row(
    name: str, cache: TeacherCache, cost: tuple[float, float], times: list[float], unit: int, error: str
) -> str:
    rows = cache.counts["rows"]
    per_lookup = statistics.median(times)
    quantiles = statistics.quantiles(times, n=10)
    return (
        f"| {name} | {cache.bytes / rows:.1f} | {thousands(rows / cost[0])} | {thousands(rows / cost[1])} "
        f"| {thousands(unit / per_lookup)} "
        f"| {thousands(unit / quantiles[-1])}–{thousands(unit / quantiles[0])} | {error} |"
    )


def topk_rows(folder: Path, sequences: int) -> list[str]:
    lines = []
    logits = head_logits(LENGTH, VOCAB)
    for k in (16, 64, 128):
        for dtype in ("float16", "float32"):
            spec = CacheSpec(
                kind="topk",
                teacher="synthetic",
                teacher_hash="0",
                vocab=VOCAB,
                k=k,
                temperatures=(1.0, 2.0),
                ragged=True,
                dtype=dtype,  # type: ignore[arg-type]
            )
            one = SparseTeacher.from_logits(logits, k=k, temperatures=(1.0, 2.0))
            batch = SparseTeacher(
                ids=one.ids.expand(16, -1, -1),
                logits=one.logits.expand(16, -1, -1),
                lse=None if one.lse is None else one.lse.expand(16, -1, -1),
                temperatures=(1.0, 2.0),
                vocab=VOCAB,
            )
            cost = write(folder / f"topk{k}{dtype}", spec, batch, 16, sequences)
            cache = TeacherCache.open(folder / f"topk{k}{dtype}", expect=spec)
            signal = cache.lookup([0], layout="flat").signal
            assert isinstance(signal, SparseTeacher)
            error = f"{topk_error(logits, signal):.1e}"
            times = read(cache, 16, 60)
            lines.append(row(f"top-{k} of {VOCAB:,}, 2 T, {dtype}", cache, cost, times, 16 * LENGTH, error))
    return lines


def dense_rows(folder: Path, count: int) -> list[str]:
    logits = head_logits(512, CLASSES)
    spec = CacheSpec(kind="dense", teacher="synthetic", teacher_hash="0", vocab=CLASSES)
    cost = write(folder / "dense", spec, DenseSignal(logits), 512, count)
    cache = TeacherCache.open(folder / "dense", expect=spec)
    plain_path = folder / "plain.bin"

    def write_plain() -> None:
        plain = np.memmap(plain_path, np.float16, "w+", shape=(count, CLASSES))
        for start in range(0, count, 512):
            plain[start : start + 512] = logits.numpy()
        plain.flush()

    plain_cost = timed(write_plain)
    plain = np.memmap(plain_path, np.float16, "r", shape=(count, CLASSES))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1)).numpy()

    def read_plain(ids: np.ndarray) -> Tensor:
        return torch.from_numpy(plain[ids]).float()

    ours = cache.lookup(order[:512]).signal.logits  # type: ignore[union-attr]
    torch.testing.assert_close(ours.softmax(-1), read_plain(order[:512]).softmax(-1), rtol=0, atol=1e-2)
    ours_times, plain_times = [], []
    for number in range(60):
        ids = order[(number * 512) % (count - 511) :][:512]
        ours_times.append(timed(lambda ids=ids: cache.lookup(ids, layout="flat"))[0])  # type: ignore[misc]
        plain_times.append(timed(lambda ids=ids: read_plain(ids))[0])  # type: ignore[misc]
    error = f"{dense_error(logits[order[:512] % 512], ours):.1e}"
    lines = [row(f"dense {CLASSES}, float16", cache, cost, ours_times, 512, error)]
    quantiles = statistics.quantiles(plain_times, n=10)
    lines.append(
        f"| dense {CLASSES}, numpy.memmap float16 | {2 * CLASSES:.1f} | {thousands(count / plain_cost[0])} "
        f"| {thousands(count / plain_cost[1])} | {thousands(512 / statistics.median(plain_times))} "
        f"| {thousands(512 / quantiles[-1])}–{thousands(512 / quantiles[0])} "
        f"| {dense_error(logits, logits.half().float()):.1e} |"
    )
    return lines


def embedding_rows(folder: Path, count: int) -> list[str]:
    lines = []
    values = torch.randn(512, WIDTH, generator=torch.Generator().manual_seed(0))
    for dtype in ("float16", "int8"):
        spec = CacheSpec(kind="embedding", teacher="synthetic", teacher_hash="0", dtype=dtype)  # type: ignore
        cost = write(folder / dtype, spec, EmbeddingSignal(values), 512, count)
        cache = TeacherCache.open(folder / dtype, expect=spec)
        stored = cache.lookup(torch.arange(512)).signal.values  # type: ignore[union-attr]
        cosine = torch.nn.functional.cosine_similarity(stored.double(), values.double())
        error = f"1 − cos {float((1 - cosine).mean()):.1e}"
        lines.append(row(f"embedding {WIDTH}, {dtype}", cache, cost, read(cache, 512, 60), 512, error))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sequences", type=int, default=1024, help=f"sequences of {LENGTH} tokens a top-k cache"
    )
    parser.add_argument("--rows", type=int, default=102_400, help="rows of a dense or embedding cache")
    parser.add_argument("--write", action="store_true", help="append the table to RESULTS.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        "| what a row holds | bytes a row | written a CPU-second | written a second (wall) "
        "| read a CPU-second | 10–90 % | KL to the teacher |",
        "|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        lines += topk_rows(Path(folder), arguments.sequences)
        lines += dense_rows(Path(folder), arguments.rows)
        lines += embedding_rows(Path(folder), arguments.rows)
    table = "\n".join(lines)
    print(table)
    if arguments.write:
        header = (
            "## Teacher cache\n\n"
            f"`python shared/benchmarks/bench_cache.py --write`, torch {torch.__version__}, "
            f"{platform.machine()} CPU, one thread; {arguments.sequences} sequences of {LENGTH} tokens and "
            f"{arguments.rows:,} rows, synthetic logits, page cache warm. A row is a token, a sample or a "
            "vector; sizes include keys, offsets and the index.\n\n"
        )
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(f"\n{header}{table}\n")


if __name__ == "__main__":
    main()
