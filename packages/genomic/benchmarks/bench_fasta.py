"""Random access to FASTA against pyfaidx, on the same places of the same file.

    python packages/genomic/benchmarks/bench_fasta.py                       # 64 MB of random letters
    python packages/genomic/benchmarks/bench_fasta.py --fasta genome.fa     # a file of yours
    python packages/genomic/benchmarks/bench_fasta.py --write               # and append to RESULTS.md

pyfaidx is called twice: as a user calls it for speed, `as_raw=True, sequence_always_upper=True` (a Python
string), and with the conversion to uint8 that a network needs and ours includes. Ours also checks every
letter and maps lower case, U and ambiguity letters. Results are compared base by base before the timing.
Rounds are interleaved; the time is CPU time, the median of the rounds, with the ratio of each round's pair.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyfaidx
from Bio import bgzf

from stillhouse.genomic.data import Fasta, Interval

RESULTS = Path(__file__).parent / "RESULTS.md"


def random_fasta(path: Path, records: int, length: int, width: int = 60, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    with open(path, "wb") as file:
        for number in range(records):
            letters = np.frombuffer(b"ACGTacgtN", np.uint8)[rng.integers(0, 9, length)]
            file.write(f">record{number}\n".encode())
            for start in range(0, length, width):
                file.write(letters[start : start + width].tobytes() + b"\n")
    return path


def places(fasta: Fasta, count: int, size: int, seed: int) -> list[Interval]:
    rng = np.random.default_rng(seed)
    names = [name for name in fasta.names if fasta.length(name) >= size]
    weights = np.array([fasta.length(name) for name in names], float)
    chosen = rng.choice(len(names), count, p=weights / weights.sum())
    starts = [int(rng.integers(fasta.length(names[i]) - size + 1)) for i in chosen]
    return [Interval(names[i], start, start + size) for i, start in zip(chosen, starts, strict=True)]


def timed(task: Callable[[], object]) -> float:
    start = time.process_time()
    task()
    return time.process_time() - start


def compare(path: Path, size: int, count: int, rounds: int) -> dict[str, float]:
    ours = Fasta(path)
    theirs = pyfaidx.Fasta(str(path), as_raw=True, sequence_always_upper=True)
    todo = places(ours, count, size, seed=size)

    def run_ours() -> list[np.ndarray]:
        return [ours.fetch(p.record, p.start, p.end) for p in todo]

    def run_text() -> list[str]:
        return [theirs[p.record][p.start : p.end] for p in todo]

    def run_bytes() -> list[np.ndarray]:
        return [np.frombuffer(theirs[p.record][p.start : p.end].encode(), np.uint8) for p in todo]

    for a, b in zip(run_ours(), run_bytes(), strict=True):
        assert np.array_equal(a, b), "the readers disagree"
    tasks = {"ours": run_ours, "text": run_text, "bytes": run_bytes}
    spent: dict[str, list[float]] = {name: [] for name in tasks}
    for turn in range(rounds):
        for name in list(tasks)[:: 1 if turn % 2 else -1]:
            spent[name].append(timed(tasks[name]))
    ratios = sorted(b / a for a, b in zip(spent["ours"], spent["bytes"], strict=True))
    result = {name: statistics.median(times) / count * 1e6 for name, times in spent.items()}
    result.update(ratio=statistics.median(ratios), low=ratios[0], high=ratios[-1])
    theirs.close()
    ours.close()
    return result


def index_times(path: Path, rounds: int) -> tuple[float, float]:
    index = path.with_name(path.name + ".fai")
    spent: dict[str, list[float]] = {"ours": [], "pyfaidx": []}
    lengths: dict[str, dict[str, int]] = {}
    for _ in range(rounds):
        index.unlink(missing_ok=True)
        spent["ours"].append(timed(lambda: lengths.update(ours=dict(Fasta(path).lengths))))

        def build() -> None:
            with pyfaidx.Fasta(str(path)) as fasta:
                lengths["pyfaidx"] = {name: len(fasta[name]) for name in fasta.keys()}  # noqa: SIM118

        spent["pyfaidx"].append(timed(build))
    assert lengths["ours"] == lengths["pyfaidx"], "the indices disagree"
    return statistics.median(spent["ours"]), statistics.median(spent["pyfaidx"])


def table(path: Path, title: str, count: int, rounds: int) -> list[str]:
    lines = [
        f"**{title}**, {path.stat().st_size / 1e6:.1f} MB, {count:,} fetches a round, {rounds} rounds",
        "",
        "| bases a fetch | ours, µs | pyfaidx text, µs | pyfaidx + uint8, µs | pyfaidx + uint8 / ours |",
        "|---|---|---|---|---|",
    ]
    for size in (100, 512, 4_096, 65_536):
        r = compare(path, size, count if size < 65_536 else max(1, count // 10), rounds)
        lines.append(
            f"| {size:,} | {r['ours']:.1f} | {r['text']:.1f} | {r['bytes']:.1f} | "
            f"{r['ratio']:.1f} ({r['low']:.1f} … {r['high']:.1f}) |"
        )
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--fasta", type=Path, help="a plain FASTA file with letters A C G T N only")
    parser.add_argument("--megabytes", type=int, default=64, help="size of the random file")
    parser.add_argument("--count", type=int, default=2_000, help="fetches a round")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--write", action="store_true", help="append the table to RESULTS.md")
    args = parser.parse_args()
    command = "python packages/genomic/benchmarks/bench_fasta.py"
    with tempfile.TemporaryDirectory() as folder:
        if args.fasta:
            path = Path(shutil.copy(args.fasta, Path(folder) / args.fasta.name))  # pyfaidx writes an index
            command += f" --fasta {args.fasta.name}"
        else:
            path = random_fasta(Path(folder) / "random.fa", 4, args.megabytes * 250_000)
        lines = ["## FASTA", "", f"`{command}`", ""]
        lines.append(
            f"pyfaidx {pyfaidx.__version__}, Python {platform.python_version()}, numpy {np.__version__}, "
            f"{platform.machine()}, one core; median CPU time; ratios with their range over rounds."
        )
        ours, theirs = index_times(path, 3)
        lines += ["", *table(path, "plain", args.count, args.rounds)]
        lines += [
            f"Index of the plain file: {ours:.2f} s, pyfaidx {theirs:.2f} s ({theirs / ours:.1f} ×).",
            "",
        ]
        if path.stat().st_size < 1e8:
            packed = path.with_name(path.name + ".bgz")
            with open(path, "rb") as source, bgzf.BgzfWriter(str(packed), "wb", compresslevel=1) as target:
                shutil.copyfileobj(source, target)
            path.with_name(path.name + ".fai").unlink(missing_ok=True)
            lines += table(packed, "bgzf", args.count, min(args.rounds, 5))
    text = "\n".join(lines)
    print(text)
    if args.write:
        with open(RESULTS, "a", encoding="utf-8") as file:
            file.write(("\n" if RESULTS.exists() and RESULTS.stat().st_size else "") + text)


if __name__ == "__main__":
    main()
