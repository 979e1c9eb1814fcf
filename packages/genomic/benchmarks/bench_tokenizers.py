"""Tokenisation on one core against the tokenizers of Hugging Face, on the same windows and to the same ids.

    python packages/genomic/benchmarks/bench_tokenizers.py                       # print the tables
    python packages/genomic/benchmarks/bench_tokenizers.py --fasta genome.fa     # real windows as well
    python packages/genomic/benchmarks/bench_tokenizers.py --write               # and append to RESULTS.md

Peers: `tokenizers` (Rust) with the same rule, called with the plain pipeline (no normalisation, no character
offsets asked for) and through transformers' fast tokenizer; and transformers' `EsmTokenizer`, the Python
class that NTv2 is published with (it gets fewer windows, since it is slow). Ours also gives the character →
k-mer map, which theirs do not. Ids are compared before anything is timed. All run on one thread; time is CPU
time, the median of interleaved repeats, because wall time on a shared machine measures the neighbours.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread, as ours
os.environ["RAYON_NUM_THREADS"] = "1"

import numpy as np
import tokenizers
import torch
import transformers
from numpy.typing import NDArray
from tokenizers import Tokenizer, normalizers
from transformers import EsmTokenizer, PreTrainedTokenizerFast

from stillhouse.genomic.tokenizers import CharacterTokenizer, KmerTokenizer

RESULTS = Path(__file__).parent / "RESULTS.md"


def random_windows(count: int, length: int, n_share: float, seed: int = 0) -> NDArray[np.uint8]:
    rng = np.random.default_rng(seed)
    shares = [(1 - n_share) / 4] * 4 + [n_share]
    return np.frombuffer(b"ACGTN", np.uint8)[rng.choice(5, size=(count, length), p=shares)]


def fasta_windows(path: Path, count: int, length: int) -> NDArray[np.uint8]:
    lines = path.read_bytes().split(b"\n")
    letters = np.frombuffer(b"".join(line.strip() for line in lines if not line.startswith(b">")), np.uint8)
    letters = letters[: min(count, len(letters) // length) * length]
    plain = CharacterTokenizer()  # to A, C, G, T, N: the peers' plain pipeline knows no other letters
    return plain.decode(plain.encode(letters.reshape(-1, length)))


def measure(tasks: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    spent: dict[str, list[float]] = {name: [] for name in tasks}
    for turn in range(rounds + 1):
        for name, task in tasks.items():
            start = time.process_time()
            task()
            if turn:  # the first round warms up
                spent[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in spent.items()}


def compare(what: str, windows: NDArray[np.uint8], rounds: int, slow_share: int) -> str:
    texts = [row.tobytes().decode() for row in windows]
    few = texts[: max(1, len(texts) // slow_share)]
    kmers, characters = KmerTokenizer(), CharacterTokenizer()
    fast, fast_characters = kmers.to_huggingface(), characters.to_huggingface()
    plain = _without_normalisation(fast)
    plain_characters = _without_normalisation(fast_characters)
    with tempfile.TemporaryDirectory() as folder:
        kmers.save_pretrained(folder)
        esm = EsmTokenizer(str(Path(folder) / "vocab.txt"), eos_token=None)

    tokens = kmers.encode(windows)
    ours = [row[:n].tolist() for row, n in zip(tokens.ids, tokens.lengths.tolist(), strict=True)]
    rust = plain.encode_batch_fast(texts, add_special_tokens=False)
    assert [e.ids for e in rust] == ours, "ids differ from tokenizers"
    assert fast(texts[:64], add_special_tokens=False)["input_ids"] == ours[:64], (
        "ids differ from transformers"
    )
    assert esm(few, add_special_tokens=False)["input_ids"] == ours[: len(few)], "ids differ from EsmTokenizer"
    letters = characters.encode(windows).tolist()
    rust = plain_characters.encode_batch_fast(texts, add_special_tokens=False)
    assert [e.ids for e in rust] == letters, "ids of characters differ from tokenizers"

    megabytes = windows.size / 1e6
    times = measure(
        {
            "6-mer · ours, ids and map": lambda: kmers.encode(windows),
            "6-mer · tokenizers (Rust)": lambda: plain.encode_batch_fast(texts, add_special_tokens=False),
            "6-mer · transformers, fast": lambda: fast(texts, add_special_tokens=False)["input_ids"],
            "6-mer · transformers, EsmTokenizer": lambda: esm(few, add_special_tokens=False)["input_ids"],
            "characters · ours": lambda: characters.encode(windows),
            "characters · tokenizers (Rust)": lambda: plain_characters.encode_batch_fast(
                texts, add_special_tokens=False
            ),
        },
        rounds,
    )
    share = (windows == ord("N")).mean()
    lines = [
        f"{what}: {len(windows)} windows of {windows.shape[1]} bp, N {share:.2%}",
        "",
        "| tokenizer | MB/s | ours is faster by |",
        "|---|---|---|",
    ]
    speed = {
        name: (sum(map(len, few)) / 1e6 if "Esm" in name else megabytes) / seconds
        for name, seconds in times.items()
    }
    for name, rate in speed.items():
        own = speed["characters · ours" if name.startswith("char") else "6-mer · ours, ids and map"]
        ratio = "" if "ours" in name else f"{own / rate:.0f}×" if own / rate >= 10 else f"{own / rate:.1f}×"
        lines.append(f"| {name} | {rate:.1f} | {ratio} |")
    return "\n".join(lines) + "\n"


def _without_normalisation(fast: PreTrainedTokenizerFast) -> Tokenizer:
    plain = Tokenizer.from_str(fast.backend_tokenizer.to_str())
    plain.normalizer = normalizers.Sequence([])
    return plain


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fasta", type=Path, help="real windows from this file, beside the simulated ones")
    parser.add_argument("--windows", type=int, default=2048)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--slow-share", type=int, default=32, help="EsmTokenizer gets one window in so many")
    parser.add_argument("--write", action="store_true", help=f"append the tables to {RESULTS.name}")
    options = parser.parse_args()
    torch.set_num_threads(1)
    parts = [
        compare(
            "Random letters",
            random_windows(options.windows, options.length, n_share),
            options.rounds,
            options.slow_share,
        )
        for n_share in (0.0, 0.002, 0.05)
    ]
    if options.fasta:
        windows = fasta_windows(options.fasta, options.windows, options.length)
        parts.append(compare(options.fasta.name, windows, options.rounds, options.slow_share))
    command = "python packages/genomic/benchmarks/bench_tokenizers.py"
    command += f" --fasta {options.fasta.name}" if options.fasta else ""
    versions = f"numpy {np.__version__}, tokenizers {tokenizers.__version__}, transformers "
    versions += f"{transformers.__version__}, {platform.machine()}, 1 thread"
    text = f"## Tokenisation\n\n`{command}` ({versions}; CPU time, median of {options.rounds})\n\n"
    text += "\n".join(parts)
    print(text)
    if options.write:
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write("\n" + text)


if __name__ == "__main__":
    main()
