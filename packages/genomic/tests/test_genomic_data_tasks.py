"""Tasks, decoys and groups; simulated genomes; windows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from Bio.Seq import Seq
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.core.errors import DataError
from stillhouse.core.train import SeededLoader
from stillhouse.genomic.data import (
    Fasta,
    Genome,
    Interval,
    PositionWeightMatrix,
    Sequences,
    SimulateConfig,
    WeightArrayModel,
    WindowDataset,
    copy_groups,
    genome_lengths,
    genome_records,
    introns,
    iterate_windows,
    known_tiles,
    promoters,
    read_genome,
    regions,
    reverse_complement,
    shuffle_columns,
    shuffle_dinucleotides,
    simulate_genome,
    species,
    splice_sites,
    tile,
    transcripts,
    write_fasta,
    write_gff3,
)

Put = Callable[..., Path]


@pytest.fixture
def put(tmp_path: Path) -> Put:
    def write(content: bytes | str, name: str = "x.txt") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.fixture(scope="module")
def genome() -> Genome:
    return simulate_genome(SimulateConfig(records=5, seed=1))


@pytest.fixture(scope="module")
def small() -> Genome:
    return simulate_genome(SimulateConfig(records=2, record_length=20_000, seed=2))


# The simulator


def test_the_same_seed_gives_the_same_bytes() -> None:
    small = SimulateConfig(records=2, record_length=6_000, seed=3)
    one, two = simulate_genome(small), simulate_genome(small)
    more = simulate_genome(SimulateConfig(records=3, record_length=6_000, seed=3))
    for name, letters in one.records.items():
        assert letters.tobytes() == two.records[name].tobytes() == more.records[name].tobytes()
    assert one.features == two.features == tuple(f for f in more.features if f.record != "sim3")
    other = simulate_genome(SimulateConfig(records=2, record_length=6_000, seed=4))
    assert other.records["sim1"].tobytes() != one.records["sim1"].tobytes()


def test_simulated_genes_are_genes(genome: Genome) -> None:
    """Each CDS, spliced from its lines, is an open reading frame by Biopython's translation."""
    spliced: dict[str, list[bytes]] = {}
    for feature in genome.features:
        if feature.type == "CDS":
            if not spliced.get(feature.id):
                assert feature.phase == 0
            else:
                assert feature.phase == -sum(map(len, spliced[feature.id])) % 3
            spliced.setdefault(feature.id, []).append(genome.fetch(feature.interval).tobytes())
    assert len(spliced) > 60
    for parts in spliced.values():
        protein = str(Seq(b"".join(parts)).translate())
        assert protein.startswith("M")
        assert protein.endswith("*")
        assert protein.count("*") == 1
    strands = Counter(f.strand for f in genome.features if f.type == "gene")
    assert min(strands.values()) > 10


def test_simulated_introns_promoters_and_gaps(genome: Genome) -> None:
    gaps = introns(genome)
    assert len(gaps) > 100
    branches = 0
    for gap in gaps:
        letters = genome.fetch(gap).tobytes()
        assert (letters[:2], letters[-2:]) == (b"GT", b"AG")
        branches += b"CTAAC" in letters[-45:-15]
    assert branches > 0.3 * len(gaps)
    boxes = [f for f in genome.features if f.type == "TATA_box"]
    genes = [f for f in genome.features if f.type == "gene"]
    assert all(genome.fetch(box.interval).tobytes().startswith(b"TATA") for box in boxes)
    assert 0.3 < len(boxes) / len(genes) < 0.7
    starts = {(g.record, g.start if g.strand == "+" else g.end) for g in genes}
    for box in boxes:  # 31 letters before the start of transcription
        at = box.start + 31 if box.strand == "+" else box.end - 31
        assert (box.record, at) in starts
    for left, right in pairwise(sorted(genes, key=lambda g: (g.record, g.start))):
        assert left.record != right.record or left.end <= right.start
    unknown = sum(int((letters == ord("N")).sum()) for letters in genome.records.values())
    assert unknown == 5 * 120  # the share asked for


def test_codon_use_is_uneven(genome: Genome) -> None:
    counts: Counter[bytes] = Counter()
    coding: dict[str, bytes] = {}
    for feature in genome.features:
        if feature.type == "CDS":
            coding[feature.id] = coding.get(feature.id, b"") + genome.fetch(feature.interval).tobytes()
    for letters in coding.values():
        counts.update(letters[i : i + 3] for i in range(3, len(letters) - 3, 3))
    leucine = sorted(counts[codon] for codon in (b"CTA", b"CTC", b"CTG", b"CTT", b"TTA", b"TTG"))
    assert leucine[-1] > 2 * leucine[0]
    assert len(counts) == 61


def test_simulated_genome_as_files_comes_back(genome: Genome, tmp_path: Path) -> None:
    write_fasta(tmp_path / "simulated.fa", genome_records(genome))
    write_gff3(tmp_path / "simulated.gff3", genome.features)
    back = read_genome(tmp_path / "simulated.fa", tmp_path / "simulated.gff3")
    assert back.name == genome.name
    assert {n: x.tobytes() for n, x in back.records.items()} == {
        n: x.tobytes() for n, x in genome.records.items()
    }
    assert back.features == genome.features
    assert Fasta(tmp_path / "simulated.fa").lengths == genome.lengths


def test_simulate_config_says_what_is_wrong() -> None:
    for name, value in (("records", 0), ("gc", 0.9), ("unknown", -0.1), ("seed", -1), ("intron_length", 10)):
        with pytest.raises(ValueError, match=name):
            SimulateConfig(**{name: value})


# Splice sites


def halves(items: Sequences, seed: int) -> np.ndarray:
    """A grouped split: True for the test half."""
    groups = np.array(items.groups)
    names = np.random.default_rng(seed).permutation(np.unique(groups))
    return np.isin(groups, names[: len(names) // 2])


def accuracy(model: type, items: Sequences, seed: int, core: int = 42) -> float:
    at = items.sequences.shape[1] // 2
    x, y, test = items.sequences[:, at - core // 2 : at + core // 2], items.labels, halves(items, seed)
    fitted = model(x[~test & (y == 1)], x[~test & (y == 0)])
    return float(((fitted.score(x[test]) > 0) == y[test]).mean())


@pytest.mark.parametrize("kind", ["donor", "acceptor"])
@pytest.mark.parametrize("decoys", ["random", "easy", "matched", "hard"])
def test_sites_and_decoys_have_the_motif_in_its_place(small: Genome, kind: str, decoys: str) -> None:
    genome = small
    items = splice_sites(genome, kind, length=101, decoys=decoys, seed=5)  # type: ignore[arg-type]
    assert items.classes == ("decoy", kind)
    assert Counter(items.labels.tolist()) == {0: len(items) // 2, 1: len(items) // 2}
    at = 50 if kind == "donor" else 48
    assert set(map(bytes, items.sequences[:, at : at + 2])) == {b"GT" if kind == "donor" else b"AG"}
    assert not (items.sequences == ord("N")).any()
    again = splice_sites(genome, kind, length=101, decoys=decoys, seed=5)  # type: ignore[arg-type]
    assert again.sequences.tobytes() == items.sequences.tobytes()
    assert again.groups == items.groups


def test_true_sites_are_the_ends_of_introns(genome: Genome) -> None:
    windows = {
        bytes(genome.fetch(Interval(g.record, g.start - 20, g.start + 20)))
        for g in introns(genome)
        if g.strand == "+"
    } | {
        bytes(genome.fetch(Interval(g.record, g.end - 20, g.end + 20, "-")))
        for g in introns(genome)
        if g.strand == "-"
    }
    items = splice_sites(genome, "donor", length=40, decoys="easy")
    true = {bytes(row) for row in items.sequences[items.labels == 1]}
    assert true <= windows
    assert len(true) > 0.95 * len(windows)
    assert not {bytes(row) for row in items.sequences[items.labels == 0]} & windows


def test_hard_decoys_put_a_weight_matrix_at_chance_and_a_first_order_model_above(genome: Genome) -> None:
    for kind in ("donor", "acceptor"):
        items = splice_sites(genome, kind, length=120, decoys="hard", seed=0)  # type: ignore[arg-type]
        scores = {
            m: [accuracy(m, items, s) for s in range(5)] for m in (PositionWeightMatrix, WeightArrayModel)
        }
        assert scores[PositionWeightMatrix] == [0.5] * 5
        assert min(scores[WeightArrayModel]) > 0.54
        assert np.mean(scores[WeightArrayModel]) > 0.57
        easy = splice_sites(genome, kind, length=120, decoys="easy", seed=0)  # type: ignore[arg-type]
        assert accuracy(PositionWeightMatrix, easy, 0) > 0.85


def test_hard_decoys_have_the_columns_of_the_sites_in_every_group(genome: Genome) -> None:
    items = splice_sites(genome, "donor", length=80, decoys="hard", core=30)
    groups = np.array(items.groups)
    sizes = Counter(groups[items.labels == 1].tolist())
    assert min(sizes.values()) >= 16
    changed = 0
    for group in sizes:
        true = items.sequences[(groups == group) & (items.labels == 1)]
        false = items.sequences[(groups == group) & (items.labels == 0)]
        assert np.array_equal(np.sort(true, 0), np.sort(false, 0))
        assert np.array_equal(true[:, :25], false[:, :25])  # flanks are kept, row by row
        assert np.array_equal(true[:, 55:], false[:, 55:])
        changed += int((true != false).any(1).sum())
    assert changed > 0.95 * len(items) / 2


def test_windows_of_different_groups_share_no_base(small: Genome) -> None:
    """The letters of each window stand within the block that its group names."""
    genome = small
    length, block = 64, 2_000
    for task in (
        splice_sites(genome, "donor", length=length, decoys="easy", block=block),
        regions(genome, length=length, core=32, block=block),
        species(
            [genome, simulate_genome(SimulateConfig(name="b", records=1, record_length=9_000))],
            length=length,
            block=block,
        ),
    ):
        for row, group in zip(task.sequences, task.groups, strict=True):
            name, _, start = group.rpartition(":")
            letters = genome.records.get(name.rpartition("/")[2])
            if letters is None or not name.startswith("simulated/"):
                continue
            text = letters[int(start) : int(start) + block].tobytes()
            assert row.tobytes() in text or reverse_complement(row).tobytes() in text


def test_tasks_that_cannot_be() -> None:
    bare = Genome("bare", {"one": np.frombuffer(b"ACGT" * 50, np.uint8)})
    with pytest.raises(DataError, match="bare: 0 usable canonical donor sites, 10 needed"):
        splice_sites(bare, "donor", length=20)
    with pytest.raises(DataError, match="usable windows in exon"):
        regions(bare, length=20, core=4)
    with pytest.raises(ValueError, match="two or more"):
        species([bare])
    with pytest.raises(ValueError, match="kind"):
        splice_sites(bare, "branch")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="decoys"):
        splice_sites(bare, decoys="n4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="block"):
        splice_sites(bare, length=100, block=150)
    with pytest.raises(ValueError, match="core"):
        regions(bare, length=20, core=30)


# Regions, species, promoters


def test_regions_show_what_they_say(genome: Genome) -> None:
    items = regions(genome, length=120, core=40, seed=2)
    assert items.classes == ("exon", "intron", "intergenic")
    counts = Counter(items.labels.tolist())
    assert len(set(counts.values())) == 1
    assert counts[0] > 100
    middles = items.sequences[:, 40:80]
    exons, gaps = [], []
    for lines in transcripts(genome).values():
        exons += [genome.fetch(line.interval).tobytes() for line in lines]
    for gap in introns(genome):
        gaps.append(genome.fetch(gap).tobytes())
    for places, label in ((exons, 0), (gaps, 1)):
        text = b"|".join(places)  # on the strand of the gene
        assert all(bytes(row) in text for row in middles[items.labels == label])
    inside = b"|".join(exons + gaps)
    for row in middles[items.labels == 2][:50]:
        assert bytes(row) not in inside


def test_species_are_balanced_and_named() -> None:
    genomes = [
        simulate_genome(SimulateConfig(name=n, records=r, gc=g)) for n, r, g in (("a", 1, 0.3), ("b", 2, 0.6))
    ]
    items = species(genomes, length=500)
    assert items.classes == ("a", "b")
    assert len(set(Counter(items.labels.tolist()).values())) == 1
    assert {group.split("/")[0] for group in items.groups} == {"a", "b"}
    gc = np.isin(items.sequences, np.frombuffer(b"CG", np.uint8)).mean(1)
    assert gc[items.labels == 1].mean() > gc[items.labels == 0].mean() + 0.1
    assert len(species(genomes, length=500, limit=7)) == 14


def pairs(letters: np.ndarray) -> Counter[bytes]:
    text = letters.tobytes()
    return Counter(text[i : i + 2] for i in range(len(text) - 1))


@settings(deadline=None)
@given(st.text("ACGTN", max_size=60), st.integers(0, 99))
def test_dinucleotide_shuffle_keeps_every_pair(text: str, seed: int) -> None:
    letters = np.frombuffer(text.encode(), np.uint8)
    shuffled = shuffle_dinucleotides(letters, np.random.default_rng(seed))
    assert pairs(shuffled) == pairs(letters)
    assert len(shuffled) == len(letters)


def test_dinucleotide_shuffle_is_uniform_over_its_sequences() -> None:
    """All Eulerian paths of a small sequence, by brute force, come about equally often."""
    from itertools import permutations

    text = b"AACACA"
    letters = np.frombuffer(text, np.uint8)
    possible = {bytes(p) for p in permutations(text) if pairs(np.array(p, np.uint8)) == pairs(letters)}
    rng = np.random.default_rng(0)
    counts = Counter(shuffle_dinucleotides(letters, rng).tobytes() for _ in range(3_000))
    assert set(counts) == possible
    assert len(possible) > 2
    expected = 3_000 / len(possible)
    assert sum((n - expected) ** 2 / expected for n in counts.values()) < 20  # χ² with few degrees of freedom


def test_column_shuffle() -> None:
    rng = np.random.default_rng(0)
    aligned = rng.integers(65, 91, (50, 9)).astype(np.uint8)
    shuffled = shuffle_columns(aligned, rng)
    assert np.array_equal(np.sort(aligned, 0), np.sort(shuffled, 0))
    assert not np.array_equal(aligned, shuffled)


def test_promoters_from_lines_and_fasta(put: Put, genome: Genome) -> None:
    rng = np.random.default_rng(0)
    rows = [rng.choice(np.frombuffer(b"ACGT", np.uint8), 80).tobytes().decode() for _ in range(20)]
    rows[1] = rows[0][5:] + "ACGTA"  # a neighbour of the first
    text = "\n".join([*rows, rows[2]]) + "\n"  # and an exact copy
    items = promoters(put(text, "tata.txt"))
    assert items.classes == ("control", "promoter")
    assert Counter(items.labels.tolist()) == {0: 20, 1: 20}
    assert items.groups[0] == items.groups[1]
    assert items.groups[:20] == items.groups[20:]
    assert len(set(items.groups)) == 19
    for true, control in zip(items.sequences[:20], items.sequences[20:], strict=True):
        assert pairs(true) == pairs(control)
        assert true.tobytes() != control.tobytes()
    fasta = put("".join(f">p{i}\n{row}\n" for i, row in enumerate(rows)), "tata.fa")
    assert promoters(fasta).sequences.tobytes() == items.sequences.tobytes()
    other = promoters(fasta, "genomic", genome=genome)
    controls = other.sequences[other.labels == 0]
    text_of = b"|".join(letters.tobytes() for letters in genome.records.values())
    assert all(c.tobytes() in text_of or reverse_complement(c).tobytes() in text_of for c in controls)
    with pytest.raises(ValueError, match="genome is needed"):
        promoters(fasta, "genomic")
    with pytest.raises(DataError, match=r"line 2: .*'E'"):
        promoters(put("ACGT\nACGE\n", "bad.txt"))


def test_copy_groups_are_transitive() -> None:
    rng = np.random.default_rng(0)
    long = rng.choice(np.frombuffer(b"ACGT", np.uint8), 120).tobytes()
    other = rng.choice(np.frombuffer(b"ACGT", np.uint8), 60).tobytes()
    groups = copy_groups([long[:60], other, long[50:], long[20:90], b"N" * 60, b"N" * 60], word=32)
    assert groups[0] == groups[2] == groups[3]
    assert len(set(groups)) == 4


# Windows


def test_windows_are_places_of_the_genome_and_a_function_of_the_seed(genome: Genome) -> None:
    tiles = known_tiles([genome], tile(genome.lengths, 1_000), max_unknown=0.1)
    data = WindowDataset([genome], tiles, 100, reverse_complement=0.5)
    turned = 0
    for seed in range(200):
        window = data[(seed % len(data), seed)]
        assert window.dtype == np.uint8
        assert window.shape == (100,)
        assert np.array_equal(window, data[(seed % len(data), seed)])
        place = tiles[seed % len(data)]
        text = genome.records[place.record][place.start : place.end].tobytes()
        plain, other = window.tobytes() in text, reverse_complement(window).tobytes() in text
        assert plain or other
        turned += other
    assert 70 < turned < 130
    starts = {data[(0, seed)].tobytes() for seed in range(30)}
    assert len(starts) > 20  # places within the tile differ


@pytest.mark.parametrize("workers", [0, 2])
def test_windows_through_the_loader_resume_exactly(genome: Genome, workers: int) -> None:
    data = WindowDataset([genome], tile(genome.lengths, 512), 256)
    loader = SeededLoader(data, batch_size=8, seed=7, workers=workers)
    batches = iter(loader)
    seen = [next(batches) for _ in range(4)]
    state = loader.state_dict()
    ahead = [next(batches) for _ in range(2)]
    resumed = SeededLoader(data, batch_size=8, seed=7)
    resumed.load_state_dict(state)
    again = iter(resumed)
    for batch in ahead:
        assert torch.equal(batch, next(again))
    assert seen[0].shape == (8, 256)
    assert seen[0].dtype == torch.uint8


def test_windows_from_disk_equal_windows_from_memory(genome: Genome, tmp_path: Path) -> None:
    write_fasta(tmp_path / "g.fa", genome_records(genome))
    tiles = tile(genome.lengths, 700)
    disk = WindowDataset(Fasta(tmp_path / "g.fa"), tiles, 512)
    memory = WindowDataset([genome], tiles, 512)
    for i in range(0, len(tiles), 7):
        assert np.array_equal(disk[(i, i)], memory[(i, i)])


def test_short_tiles_are_padded_and_several_genomes_are_told_apart() -> None:
    one = Genome("a", {"chr": np.frombuffer(b"AAAAAAAAAA", np.uint8)})
    two = Genome("b", {"chr": np.frombuffer(b"CCCCCC", np.uint8), "only": np.frombuffer(b"GGGG", np.uint8)})
    assert genome_lengths([one, two]) == {"a/chr": 10, "b/chr": 6, "b/only": 4}
    assert genome_lengths([one]) == {"chr": 10}
    tiles = [Interval("a/chr", 0, 5), Interval("b/chr", 0, 6), Interval("only", 0, 4, "-")]
    data = WindowDataset([one, two], tiles, 6, reverse_complement=0)
    assert [data[(i, 0)].tobytes() for i in range(3)] == [b"AAAAAN", b"CCCCCC", b"CCCCNN"]
    turned = WindowDataset([one, two], tiles, 6, reverse_complement=1)
    assert [turned[(i, 0)].tobytes() for i in range(3)] == [b"TTTTTN", b"GGGGGG", b"GGGGNN"]
    with pytest.raises(ValueError, match="lies on no record"):
        WindowDataset([one, two], [Interval("chr", 0, 5)], 6)  # which of the two?
    with pytest.raises(ValueError, match="ends past its record"):
        WindowDataset([one], [Interval("chr", 0, 11)], 6)
    with pytest.raises(ValueError, match="tiles is empty"):
        WindowDataset([one], [], 6)
    with pytest.raises(ValueError, match="reverse_complement is 2"):
        WindowDataset([one], tiles[:1], 6, reverse_complement=2)


def test_windows_of_unknown_letters_are_drawn_anew() -> None:
    letters = np.full(1_000, ord("N"), np.uint8)
    letters[600:] = ord("A")
    genome = Genome("gap", {"one": letters})
    data = WindowDataset([genome], [Interval("one", 0, 1_000)], 50, reverse_complement=0)
    unknown = [(data[(0, seed)] == ord("N")).mean() > 0.5 for seed in range(200)]
    assert np.mean(unknown) < 0.1  # 59 % of all places are mostly N
    tiles = tile(genome.lengths, 100)
    assert [t.start for t in known_tiles([genome], tiles)] == [600, 700, 800, 900]


def test_iterating_windows_gives_each_place_once(genome: Genome) -> None:
    places = [*tile(genome.lengths, 300, remainder=True), Interval("sim1", 5, 105, "-")]
    found: list[tuple[Interval, bytes]] = []
    for held, windows in iterate_windows([genome], places, 300, batch=64):
        assert windows.shape == (len(held), 300)
        found += zip(held, map(bytes, windows), strict=True)
    assert [place for place, _ in found] == places
    for place, text in found:
        assert text == genome.fetch(place).tobytes().ljust(300, b"N")
    with pytest.raises(ValueError, match="a window holds 50"):
        next(iterate_windows([genome], places, 50))
