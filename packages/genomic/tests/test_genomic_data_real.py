"""Real genomes against what independent counts say of them, and the memory of a large file."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from Bio import SeqIO

from stillhouse.genomic.data import (
    Fasta,
    Genome,
    PositionWeightMatrix,
    Sequences,
    WeightArrayModel,
    check_disjoint,
    copy_groups,
    introns,
    promoters,
    read_fasta,
    read_genome,
    regions,
    species,
    splice_sites,
    split_records,
    tile,
)


@pytest.fixture(scope="module")
def folder() -> Path:
    root = os.environ.get("STILLHOUSE_TEST_DATA")
    if not root:
        pytest.skip("STILLHOUSE_TEST_DATA is not set")
    return Path(root) / "genomic"


@pytest.fixture(scope="module")
def worm(folder: Path) -> Genome:
    return read_genome(folder / "celegans_1pct.fa", folder / "celegans_1pct.gff3", "worm")


@pytest.fixture(scope="module")
def cress(folder: Path) -> Genome:
    return read_genome(folder / "athaliana_1pct.fa", folder / "athaliana_1pct.gff3", "cress")


@pytest.mark.real_data
def test_counts_of_the_worm(worm: Genome) -> None:
    assert len(worm.records) == 7
    assert sum(worm.lengths.values()) == 1_002_861
    assert not any((letters == ord("N")).any() for letters in worm.records.values())
    types = Counter(feature.type for feature in worm.features)
    assert (types["intron"], types["exon"], types["CDS"], types["gene"]) == (9_313, 2_658, 2_078, 260)
    sources = Counter(f.source for f in worm.features if f.type == "intron")
    assert sources == {"RNASeq_splice": 7_273, "WormBase": 2_040}


@pytest.mark.real_data
def test_counts_of_the_cress(cress: Genome) -> None:
    assert len(cress.records) == 7
    assert sum(cress.lengths.values()) == 1_196_674
    unknown = sum(int((letters == ord("N")).sum()) for letters in cress.records.values())
    assert unknown == 2_220 + 5  # five letters of the file are other ambiguity codes
    types = Counter(feature.type for feature in cress.features)
    assert (types["exon"], types["gene"]) == (2_650, 362)
    assert {f.source for f in cress.features if f.type == "intron"} == {"RNASeq_splice"}


@pytest.mark.real_data
def test_small_genomes(folder: Path) -> None:
    lengths = {
        "lambda_virus.fa": 48_502,
        "MT-human.fa": 16_569,
        "chr17.hg19.part.fa": 40_000,
        "sarscov2_ref.fasta": 29_903,
        "corynebacterium_NCTC11397.fna.gz": 2_463_666,
    }
    for name, length in lengths.items():
        (record,) = read_fasta(folder / name)
        assert len(record) == length
    phi = read_genome(folder / "NC_001422_phiX174.gbk")
    assert phi.lengths == {"NC_001422.1": 5_386}
    assert introns(phi) == []  # gene A runs over the origin; that is no intron
    assert sum(f.attributes.get("exception") == ("crosses_origin",) for f in phi.features) == 6
    chloroplast = read_genome(folder / "NC_000932_arabidopsis_chloroplast.gb")
    assert chloroplast.lengths == {"NC_000932.1": 154_478}
    assert any(f.attributes.get("exception") == ("trans_splicing",) for f in chloroplast.features)  # rps12
    virus = read_genome(folder / "sarscov2_ref.fasta", folder / "sarscov2_annotation.gff")
    assert len(virus.features) == 12
    spike = next(f for f in virus.features if f.attributes["gene_name"] == ("S",))
    assert virus.fetch(spike.interval)[:3].tobytes() == b"ATG"
    assert spike.interval in [
        f.interval.__class__("MN908947", f.start, f.end, f.strand)
        for f in read_genome(folder / "sarscov2_ref.gb").features
        if f.type == "gene"
    ]


@pytest.mark.real_data
@pytest.mark.oracle
def test_every_file_as_biopython_reads_it(folder: Path) -> None:
    for name in (
        "celegans_1pct.fa",
        "athaliana_1pct.fa",
        "lambda_virus.fa",
        "MT-orang.fa",
        "sarscov2_ref.fasta",
    ):
        with open(folder / name) as file:
            expected = {r.id: str(r.seq).upper() for r in SeqIO.parse(file, "fasta")}
        fasta = Fasta(folder / name)
        for record in read_fasta(folder / name):
            text = record.sequence.tobytes().decode()
            theirs = expected[record.name]
            assert len(text) == len(theirs)
            assert all(a == b or (a == "N" and b in "RYSWKMBDHV") for a, b in zip(text, theirs, strict=True))
            assert fasta.fetch(record.name, 0, len(record)).tobytes() == record.sequence.tobytes()


@pytest.mark.real_data
def test_introns_computed_from_exons_are_those_of_wormbase(worm: Genome) -> None:
    """WormBase also lists its introns: they are the gaps between its exons, but for two cut off."""
    listed = {
        (f.record, f.start, f.end, f.strand)
        for f in worm.features
        if f.type == "intron" and f.source == "WormBase"
    }
    ours = {(gap.record, gap.start, gap.end, gap.strand): gap.name for gap in introns(worm)}
    missing = listed - set(ours)
    assert len(listed) == 864
    assert len(missing) == 2
    exons = {(f.record, f.start) for f in worm.features if f.type == "exon"}
    assert not any(
        (record, end) in exons for record, _, end, _ in missing
    )  # the exon after it is not in the file
    kinds = {f.id: f.type for f in worm.features if f.id}
    assert {kinds[ours[place]] for place in set(ours) - listed} == {"ncRNA", "nc_primary_transcript"}


@pytest.mark.real_data
def test_real_introns_are_canonical(worm: Genome, cress: Genome) -> None:
    for genome, known in ((worm, 867), (cress, 1_537)):
        gaps = introns(genome)
        assert len(gaps) == known
        ends = [genome.fetch(gap).tobytes() for gap in gaps]
        assert sum(e[:2] == b"GT" and e[-2:] == b"AG" for e in ends) > 0.97 * known


def accuracy(model: type, items: Sequences, seed: int) -> float:
    at = items.sequences.shape[1] // 2
    groups = np.array(items.groups)
    names = np.random.default_rng(seed).permutation(np.unique(groups))
    test = np.isin(groups, names[: len(names) // 3])
    x, y = items.sequences[:, at - 21 : at + 21], items.labels
    fitted = model(x[~test & (y == 1)], x[~test & (y == 0)])
    return float(((fitted.score(x[test]) > 0) == y[test]).mean())


@pytest.mark.real_data
def test_decoys_of_real_genomes_from_easy_to_hard(worm: Genome, cress: Genome) -> None:
    for genome in (worm, cress):
        for kind in ("donor", "acceptor"):
            items = {d: splice_sites(genome, kind, length=128, decoys=d) for d in ("easy", "hard")}  # type: ignore[arg-type]
            assert len(items["hard"]) > 1_500
            for seed in range(3):
                assert accuracy(PositionWeightMatrix, items["easy"], seed) > 0.85
                assert accuracy(PositionWeightMatrix, items["hard"], seed) == 0.5  # by construction
                assert accuracy(WeightArrayModel, items["hard"], seed) > 0.62


@pytest.mark.real_data
def test_tasks_of_real_genomes(worm: Genome, cress: Genome, folder: Path) -> None:
    items = regions(worm, length=256)
    assert len(items) > 5_000
    assert len(set(items.groups)) > 80
    both = species([worm, cress], length=256)
    assert len(both) > 7_000
    true = promoters(folder / "hs_pos_TATA_300bp.txt")
    assert len(true) == 2 * 2_929
    assert set(true.lengths.tolist()) == {300}
    assert len(set(true.groups)) < 2_929  # alternative starts of one gene share words


@pytest.mark.real_data
def test_mitochondria_of_two_apes_are_one_group(folder: Path) -> None:
    """Homologous windows of man and orang-utan share words: a split by file would leak."""
    apes = [next(read_fasta(folder / f"MT-{name}.fa")).sequence.tobytes() for name in ("human", "orang")]
    assert len(set(copy_groups(apes, word=32))) == 1


@pytest.mark.real_data
def test_splits_of_real_genomes(worm: Genome, folder: Path) -> None:
    parts = split_records(worm.lengths)
    check_disjoint({name: tile(regions, 1_024) for name, regions in parts.items()})
    (record,) = read_fasta(folder / "corynebacterium_NCTC11397.fna.gz")
    blocks = split_records({record.name: len(record)}, by="block", guard=1_024)
    check_disjoint({name: tile(regions, 1_024) for name, regions in blocks.items()}, gap=1_024)
    assert sum(map(len, blocks["test"])) > 0.05 * len(record)


_MEASURE = """
import resource, sys, threading, time
def now():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
from stillhouse.genomic.data import Fasta, iterate_windows, known_tiles, read_fasta, tile
from stillhouse.genomic.tokenizers import CharacterTokenizer, KmerTokenizer
import torch
torch.set_num_threads(1)
start = now()
peak, running = [start], [True]
def watch():
    while running[0]:
        peak[0] = max(peak[0], now())
        time.sleep(0.005)
thread = threading.Thread(target=watch)
thread.start()
kmers, characters = KmerTokenizer(6), CharacterTokenizer()
fasta = Fasta(sys.argv[1])
bases = tokens = 0
for places, windows in iterate_windows(fasta, tile(fasta.lengths, 1024), 1024, batch=64):
    tokens += int(kmers.encode(windows).lengths.sum())
    bases += characters.encode(windows).numel()
tokenised = peak[0]
streamed = sum(len(record) for record in read_fasta(sys.argv[1]))
running[0] = False
thread.join()
print(bases, tokens, streamed, start, tokenised, peak[0])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc/self/statm")
def test_a_hundred_megabytes_stay_below_300_resident(tmp_path: Path) -> None:
    """Tile and tokenise 100 MB of FASTA: at most 300 MB resident, the imports of torch included.

    Streaming holds a record at a time (10 MB here), never the file.
    """
    rng = np.random.default_rng(0)
    path = tmp_path / "big.fa"
    with open(path, "wb") as file:
        for number in range(10):
            letters = np.frombuffer(b"ACGT", np.uint8)[rng.integers(0, 4, 10_000_000)]
            lines = np.full((len(letters) // 50, 51), ord("\n"), np.uint8)
            lines[:, :50] = letters.reshape(-1, 50)
            file.write(b">r%d\n" % number + lines.tobytes())
    assert path.stat().st_size > 100_000_000
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(path)], capture_output=True, text=True, check=True
    )
    bases, tokens, streamed, start, tokenised, peak = map(int, done.stdout.split())
    assert bases == 10 * (10_000_000 // 1024) * 1024
    assert tokens > bases // 6
    assert streamed == 100_000_000
    assert tokenised < 300e6, f"{tokenised / 1e6:.0f} MB, {start / 1e6:.0f} of them the imports"
    print(f"imports {start / 1e6:.0f} MB, tokenising {tokenised / 1e6:.0f}, streaming {peak / 1e6:.0f}")
    assert peak - start < 80e6, f"streaming added {(peak - start) / 1e6:.0f} MB"
