"""BED, GFF3 and GenBank become zero-based half-open places; tiles and splits share no base."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.core.errors import DataError
from stillhouse.genomic.data import (
    Feature,
    Genome,
    Interval,
    check_disjoint,
    introns,
    overlap_groups,
    read_bed,
    read_genbank,
    read_genome,
    read_gff3,
    region_map,
    split_records,
    tile,
    transcripts,
    write_bed,
    write_gff3,
)
from stillhouse.genomic.data.genome import EXON, INTERGENIC, INTRON, MIXED

Put = Callable[..., Path]


@pytest.fixture
def put(tmp_path: Path) -> Put:
    def write(content: bytes | str, name: str = "x.txt") -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


# BED


def test_bed_rows(put: Put) -> None:
    text = (
        "# a comment\r\ntrack name=x\r\nbrowser position chr1\r\nchr1\t0\t4\r\n\r\n"
        "chr1\t2\t8\tpeak\t100\t-\textra\r\nchr2 1 3 name 0 .\r\n"
    )
    expected = [
        Interval("chr1", 0, 4),
        Interval("chr1", 2, 8, "-", "peak"),
        Interval("chr2", 1, 3, "+", "name"),
    ]
    assert read_bed(put(text)) == expected
    assert read_bed(put(gzip.compress(text.encode())), {"chr1": 8, "chr2": 3}) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("chr1\t0\n", "line 1: 2 columns"),
        ("chr1\t0\t4\nchr1\tx\t9\n", "line 2: start 'x'"),
        ("chr1\t-1\t4\n", "line 1: start is -1"),
        ("chr1\t4\t4\n", "line 1: end is 4; it must be greater"),
        ("chr1\t0\t4\tn\t0\t*\n", "line 1: strand is '\\*'"),
        ("chr1\t0\t9\n", "line 1: chr1:0-9 ends past the end of its record, 8 bp"),
        ("1\t0\t9\n", "line 1: no record '1'.*prefix 'chr'"),
        ("#\n", "holds no row"),
        ("", "empty"),
        (b"\xff\xfe\x00", "line 1"),
        (b"chr1\t0\t4\n\x00", "line 2: holds a zero byte"),
    ],
)
def test_bed_refused_in_one_line(put: Put, text: str, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        read_bed(put(text), {"chr1": 8})
    assert "\n" not in str(caught.value)


def test_bed_round_trip(tmp_path: Path) -> None:
    rows = [Interval("a", 0, 4, "-", "x"), Interval("b", 1, 2, "+", "y")]
    write_bed(tmp_path / "x.bed", rows)
    assert read_bed(tmp_path / "x.bed") == rows


# GFF3


def test_gff3_by_hand(put: Put) -> None:
    text = (
        "##gff-version 3\n##sequence-region chr1 1 100\n"
        "chr1\tme\tgene\t11\t40\t.\t-\t.\tID=g1;Name=a%2Cb;Note=x,y;\n"
        "chr1\t.\tmRNA\t11\t40\t1.5\t-\t.\tID=t1;Parent=g1\r\n###\n"
        "chr%201\tme\tCDS\t1\t1\t.\t?\t2\tParent=t1,t2\n##FASTA\n>chr1\nACGT\n"
    )
    gene, transcript, coding = read_gff3(put(text))
    assert (gene.start, gene.end, gene.strand, gene.id, gene.phase) == (10, 40, "-", "g1", None)
    assert gene.attributes == {"Name": ("a,b",), "Note": ("x", "y")}
    assert (transcript.source, transcript.score, transcript.parents) == ("", 1.5, ("g1",))
    assert (coding.record, len(coding), coding.strand, coding.phase) == ("chr 1", 1, ".", 2)
    assert coding.parents == ("t1", "t2")
    assert coding.interval.strand == "+"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("chr1\tx\tgene\t1\t10\t.\t+\t.\n", "line 1: 8 columns"),
        ("chr1 x gene 1 10 . + . ID=a\n", "line 1: 1 columns"),
        ("chr1\tx\tgene\t0\t10\t.\t+\t.\tID=a\n", "counts from 1"),
        ("chr1\tx\tgene\t9\t3\t.\t+\t.\tID=a\n", "0 ≤ start < end"),
        ("chr1\tx\tgene\ta\t3\t.\t+\t.\tID=a\n", "start 'a'"),
        ("chr1\tx\tCDS\t1\t3\t.\t+\t7\tID=a\n", "phase is 7"),
        ('chr1\tx\tgene\t1\t3\t.\t+\t.\tgene_id "a"; tag "b"\n', "this is GTF"),
        (">chr1\nACGT\n", "this is FASTA"),
        ("# nothing\n", "holds no feature"),
    ],
)
def test_gff3_refused_in_one_line(put: Put, text: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        list(read_gff3(put(text)))


def test_gff3_streams(put: Put) -> None:
    path = put("chr1\tx\tgene\t1\t3\t.\t+\t.\tID=a\nbroken\n")
    features = read_gff3(path)
    assert next(features).id == "a"  # the line after it was not looked at
    with pytest.raises(DataError, match="line 2"):
        next(features)


def test_gff3_round_trip(tmp_path: Path) -> None:
    features = [
        Feature(record="a b", type="exon", start=0, end=3, strand="-", parents=("t;1", "t=2")),
        Feature(
            record="a",
            type="CDS",
            start=5,
            end=9,
            phase=1,
            score=2.5,
            id="x,y",
            attributes={"Note": ("p%", "q")},
        ),
    ]
    write_gff3(tmp_path / "x.gff3", features)
    assert list(read_gff3(tmp_path / "x.gff3")) == features


# Gene models


def toy() -> Genome:
    """A gene on each strand: exons 10-20, 30-40 and, on minus, 60-70, 80-90; letters spell the motifs."""
    letters = np.frombuffer(b"A" * 100, np.uint8).copy()
    letters[20:22], letters[28:30] = list(b"GT"), list(b"AG")
    letters[70:72], letters[78:80] = list(b"CT"), list(b"AC")  # AG and GT on the other strand
    lines: list[Feature] = []
    for name, strand, places in (("p", "+", ((10, 20), (30, 40))), ("m", "-", ((60, 70), (80, 90)))):
        start, end = places[0][0], places[1][1]
        lines.append(Feature(record="one", type="gene", start=start, end=end, strand=strand, id=f"g{name}"))
        span = {"record": "one", "strand": strand}
        lines.append(Feature(**span, type="mRNA", start=start, end=end, id=f"t{name}", parents=(f"g{name}",)))
        lines += [Feature(**span, type="exon", start=a, end=b, parents=(f"t{name}",)) for a, b in places]
    lines.append(Feature(record="one", source="RNASeq", type="intron", start=45, end=55, strand="+"))
    return Genome("toy", {"one": letters}, tuple(lines))


def test_introns_are_the_gaps_between_exons() -> None:
    genome = toy()
    gaps = introns(genome)
    assert [(gap.start, gap.end, gap.strand, gap.name) for gap in gaps] == [
        (20, 30, "+", "tp"),
        (70, 80, "-", "tm"),
    ]
    for gap in gaps:
        assert genome.fetch(gap).tobytes()[:2] + genome.fetch(gap).tobytes()[-2:] == b"GTAG"
    assert {name: len(lines) for name, lines in transcripts(genome).items()} == {"tp": 2, "tm": 2}


def test_region_map_by_hand() -> None:
    codes = region_map(toy())["one"]
    expected = np.full(100, INTERGENIC)  # the RNA-seq junction at 45-55 is no gene model
    for start, end, code in ((10, 20, EXON), (20, 30, INTRON), (30, 40, EXON)):
        expected[start:end] = code
        expected[start + 50 : end + 50] = code
    assert codes.tolist() == expected.tolist()


def test_alternative_exons_are_mixed_and_pseudogenes_are_left_out() -> None:
    genome = toy()
    extra = (
        Feature(record="one", type="exon", start=24, end=27, strand="+", parents=("t2",)),
        Feature(record="one", type="exon", start=30, end=40, strand="+", parents=("t2",)),
        Feature(record="one", type="pseudogene", start=91, end=99, strand="+", id="ps"),
        Feature(record="one", type="exon", start=91, end=93, strand="+", parents=("ps",)),
        Feature(record="one", type="exon", start=96, end=99, strand="+", parents=("ps",)),
    )
    genome = Genome("toy", genome.records, genome.features + extra)
    codes = region_map(genome)["one"]
    assert set(codes[24:27]) == {MIXED}
    assert set(codes[20:24]) == set(codes[27:30]) == {INTRON}
    assert set(codes[91:99]) == {MIXED}
    assert not any(gap.start == 93 for gap in introns(genome))
    assert any(gap.start == 93 for gap in introns(genome, pseudogenes=True))


def test_genome_checks(put: Put) -> None:
    fasta = put(">one\nACGTACGT\n", "g.fa")
    inside = "one\t.\tgene\t1\t8\t.\t+\t.\tID=a\n"
    genome = read_genome(fasta, put(inside, "g.gff3"))
    assert (genome.name, genome.lengths, len(genome.features)) == ("g", {"one": 8}, 1)
    with pytest.raises(DataError, match="past the end of its record, 8 bp"):
        read_genome(fasta, put(inside.replace("8", "9"), "g.gff3"))
    circular = "one\t.\tregion\t1\t8\t.\t+\t.\tID=r;Is_circular=true\n" + inside.replace("8", "9")
    assert [f.id for f in read_genome(fasta, put(circular, "g.gff3")).features] == ["r"]
    with pytest.raises(DataError, match="no record 'two'"):
        read_genome(fasta, put(inside.replace("one", "two"), "g.gff3"))
    assert read_genome(fasta, put(inside.replace("one", "."), "g.gff3")).features[0].record == "one"
    with pytest.raises(ValueError, match="does not lie on a record"):
        genome.fetch(Interval("one", 4, 9))
    with pytest.raises(ValueError, match="records is empty"):
        Genome("none", {})
    with pytest.raises(ValueError, match="uint8"):
        Genome("bad", {"a": np.zeros(3)})  # type: ignore[dict-item]


# GenBank

GENBANK = """LOCUS       TOY                       40 bp    DNA     circular UNK 01-JAN-1980
DEFINITION  toy plasmid.
ACCESSION   TOY
VERSION     TOY.1
FEATURES             Location/Qualifiers
     source          1..40
     gene            complement(3..20)
                     /locus_tag="T1"
     CDS             complement(join(3..8,13..20))
                     /locus_tag="T1"
                     /codon_start=2
     CDS             join(36..40,1..2)
                     /locus_tag="T2"
     CDS             join(25..27,complement(29..31))
                     /locus_tag="T3"
ORIGIN
        1 acgtacgtac gtacgtacgt ncgtacgtac gtacgtacgy
//
"""


def test_genbank_by_hand(put: Put) -> None:
    for content, name in ((GENBANK.encode(), "t.gb"), (gzip.compress(GENBANK.encode()), "t.gbk.gz")):
        ((record, features),) = read_genbank(put(content, name))
        assert (record.name, record.description) == ("TOY.1", "toy plasmid")
        assert record.sequence.tobytes() == b"ACGTACGTACGTACGTACGTNCGTACGTACGTACGTACGN"
        places = [(f.type, f.start, f.end, f.strand, f.phase, f.parents != ()) for f in features]
        assert places[:3] == [
            ("gene", 2, 20, "-", None, False),
            (
                "CDS",
                12,
                20,
                "-",
                1,
                True,
            ),  # the first part on the strand; 8 letters, 1 skipped: phase 2 follows
            ("CDS", 2, 8, "-", 2, True),
        ]
        exceptions = [f.attributes.get("exception") for f in features if f.type == "CDS"]
        assert exceptions == [None, None, *[("crosses_origin",)] * 2, *[("trans_splicing",)] * 2]
        genome = read_genome(put(content, name))
        assert [(gap.start, gap.end, gap.strand) for gap in introns(genome)] == [(8, 12, "-")]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (GENBANK.replace("TOY.1", "TOY.1") * 2, "comes twice"),
        (GENBANK.split("ORIGIN")[0] + "ORIGIN\n//\n", "no sequence"),
        (GENBANK.replace("gtacgtacgy", "gtacgtacgj"), "'j' is no nucleotide|'J' is no nucleotide"),
        (">a\nACGT\n", "no GenBank record"),
        ("LOCUS", "GenBank"),
    ],
)
def test_genbank_refused(put: Put, text: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        read_genbank(put(text, "t.gb"))


# Tiles and splits


def test_tiles_by_hand() -> None:
    assert [(t.start, t.end) for t in tile({"a": 10}, 4, 2)] == [(0, 4), (2, 6), (4, 8), (6, 10)]
    assert [(t.start, t.end) for t in tile({"a": 11}, 4, 2, remainder=True)][-1] == (8, 11)
    assert [(t.start, t.end) for t in tile({"a": 10}, 3, 5, remainder=True)] == [(0, 3), (5, 8)]
    region = Interval("a", 5, 12, "-", "x")
    assert tile([region], 4, remainder=True) == [
        Interval("a", 5, 9, "-", "x"),
        Interval("a", 9, 12, "-", "x"),
    ]
    assert tile({"a": 3}, 4) == []
    with pytest.raises(ValueError, match="at least 1"):
        tile({"a": 3}, 0)


@given(st.integers(1, 200), st.integers(1, 40), st.integers(1, 40))
def test_tiles_with_remainder_cover_every_base(length: int, size: int, stride: int) -> None:
    stride = min(size, stride)
    covered = np.zeros(length, bool)
    for place in tile({"a": length}, size, stride, remainder=True):
        covered[place.start : place.end] = True
    assert covered.all()


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(1, 400), min_size=3, max_size=12),
    st.sampled_from([(0.1, 0.1), (0.3, 0.2), (0, 0.4), (0, 0)]),
    st.integers(0, 99),
)
def test_split_by_record_is_a_partition(sizes: list[int], shares: tuple[float, float], seed: int) -> None:
    lengths = {f"r{i}": size for i, size in enumerate(sizes)}
    parts = split_records(lengths, validation=shares[0], test=shares[1], seed=seed)
    found = [region for regions in parts.values() for region in regions]
    assert sorted((r.record, r.start, r.end) for r in found) == sorted((n, 0, s) for n, s in lengths.items())
    assert bool(parts["validation"]) == (shares[0] > 0)
    assert bool(parts["test"]) == (shares[1] > 0)
    assert parts["train"]
    assert parts == split_records(lengths, validation=shares[0], test=shares[1], seed=seed)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(900, 5_000), min_size=1, max_size=4), st.integers(0, 99), st.integers(0, 40))
def test_split_by_block_keeps_its_guard(sizes: list[int], seed: int, guard: int) -> None:
    lengths = {f"r{i}": size for i, size in enumerate(sizes)}
    parts = split_records(lengths, by="block", block=200, guard=guard, validation=0.2, test=0.2, seed=seed)
    check_disjoint(parts, gap=guard)
    total = sum(len(r) for regions in parts.values() for r in regions)
    borders = sum(len(regions) for regions in parts.values()) - len(lengths)
    assert total == sum(sizes) - guard * borders  # nothing else is left out
    for regions in parts.values():
        for region in regions:
            assert region.end <= lengths[region.record]


def test_shares_are_near() -> None:
    lengths = {f"r{i}": 10_000 + i for i in range(50)}
    parts = split_records(lengths, validation=0.2, test=0.1)
    total = sum(lengths.values())
    assert sum(map(len, parts["validation"])) / total == pytest.approx(0.2, abs=0.01)
    assert sum(map(len, parts["test"])) / total == pytest.approx(0.1, abs=0.01)
    tests = [{r.record for r in split_records(lengths, seed=seed)["test"]} for seed in range(20)]
    assert len(set.union(*tests)) > 25  # the seed decides, not the sizes
    worm = {"I": 150_724, "II": 152_794, "III": 137_838, "IV": 174_938, "V": 209_241, "X": 177_189, "M": 137}
    for seed in range(20):
        assert all(sum(map(len, r)) > 50_000 for r in split_records(worm, seed=seed).values())


def test_named_chromosomes() -> None:
    lengths = {"chr1": 10, "chr2": 10, "chr3": 10}
    parts = split_records(lengths, named={"test": ["chr2"], "validation": ["chr3"]})
    assert {part: [r.record for r in regions] for part, regions in parts.items()} == {
        "train": ["chr1"],
        "validation": ["chr3"],
        "test": ["chr2"],
    }
    with pytest.raises(DataError, match="no record 'chrX'"):
        split_records(lengths, named={"test": ["chrX"]})
    with pytest.raises(ValueError, match="has 'chr1' in"):
        split_records(lengths, named={"test": ["chr1"], "validation": ["chr1"]})
    with pytest.raises(ValueError, match="dev"):
        split_records(lengths, named={"dev": ["chr1"]})


def test_splits_that_cannot_be() -> None:
    with pytest.raises(DataError, match="2 pieces cannot be split into 3 parts"):
        split_records({"a": 5, "b": 5})
    with pytest.raises(ValueError, match="leave something"):
        split_records({"a": 5}, validation=0.5, test=0.5)
    with pytest.raises(ValueError, match="block > 2"):
        split_records({"a": 5}, by="block", block=10, guard=5)
    with pytest.raises(ValueError, match="'record' or 'block'"):
        split_records({"a": 5}, by="base")  # type: ignore[arg-type]


def test_check_disjoint_finds_what_hides_behind_a_long_interval() -> None:
    parts = {"train": [Interval("a", 0, 100), Interval("a", 10, 20)], "test": [Interval("a", 50, 60, "-")]}
    with pytest.raises(ValueError, match="train a:0-100 and test a:50-60 overlap"):
        check_disjoint(parts)
    near = {"train": [Interval("a", 0, 10)], "test": [Interval("a", 12, 20), Interval("b", 0, 10)]}
    check_disjoint(near, gap=2)
    with pytest.raises(ValueError, match="closer than 3 bp"):
        check_disjoint(near, gap=3)


def test_the_leak_of_the_common_loader() -> None:
    """Rows of 131,072 bp, split without overlap, overlap across splits once each is stretched to 2²⁰ bp.

    The hg38 loader that HyenaDNA, Caduceus and others share does this to its BED file: the rows are disjoint
    as they stand in the file, and what the model sees is not.
    """
    length = 40_000_000
    rng = np.random.default_rng(0)
    rows = tile({"chr1": length}, 131_072)
    names = rng.choice(["train", "validation", "test"], len(rows), p=[0.8, 0.1, 0.1])
    parts = {n: [row for row, name in zip(rows, names, strict=True) if name == n] for n in set(names)}
    check_disjoint(parts)  # as they stand in the file
    stretched = {part: [row.resized(1 << 20, length) for row in items] for part, items in parts.items()}
    with pytest.raises(ValueError, match="overlap"):
        check_disjoint(stretched)
    seen = np.zeros(length, bool)
    for row in stretched["train"]:
        seen[row.start : row.end] = True
    leaked = np.mean([seen[row.start : row.end].mean() for row in parts["test"]])
    assert leaked > 0.99  # nearly every base of the test rows is in a training row
    ours = split_records({"chr1": length}, by="block", block=1 << 21, guard=1 << 14)
    tiles = {part: tile(regions, 1 << 17) for part, regions in ours.items()}
    assert all(tiles.values())
    check_disjoint(tiles, gap=1 << 14)


def test_resized_stays_on_the_record() -> None:
    assert Interval("a", 0, 10).resized(20, 100).start == 0
    assert Interval("a", 95, 100).resized(20, 100).end == 100
    assert len(Interval("a", 40, 50).resized(5, 100)) == 5
    with pytest.raises(ValueError, match="size"):
        Interval("a", 0, 10).resized(101, 100)


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 60), st.integers(1, 12)), max_size=25))
def test_overlap_groups_against_brute_force(rows: list[tuple[str, int, int]]) -> None:
    places = [Interval(record, start, start + size) for record, start, size in rows]
    groups = overlap_groups(places)
    linked = np.array([[a.overlaps(b) for b in places] for a in places], bool).reshape(len(rows), len(rows))
    for _ in range(5):  # transitive closure by squaring
        linked = (linked.astype(int) @ linked.astype(int)) > 0
    same = np.array([[a == b for b in groups] for a in groups], bool).reshape(linked.shape)
    assert np.array_equal(same, linked)
