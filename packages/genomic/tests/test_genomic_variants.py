from __future__ import annotations

import csv
import gzip
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from stillhouse.core.errors import ConfigError, DataError
from stillhouse.genomic.tokenizers import CharacterTokenizer
from stillhouse.genomic.variants import Site, read_vcf, score_file, score_variants, site_of

HEADER = "##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n"


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Small networks on a busy machine: more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Genome:
    """A reference in memory."""

    def __init__(self, **records: str) -> None:
        self._records = {name: np.frombuffer(text.encode(), np.uint8) for name, text in records.items()}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._records)

    def length(self, name: str) -> int:
        return len(self._records[name])

    def fetch(self, name: str, start: int, end: int) -> np.ndarray:
        assert 0 <= start <= end <= len(self._records[name])
        return self._records[name][start:end]


class Identity(nn.Module):
    """Features that are the ids, one-hot."""

    width = 16

    def forward(self, ids: Tensor, *, attend: Tensor | None = None) -> Tensor:
        return nn.functional.one_hot(ids, 16).double()


class NextLetter(nn.Module):
    """An oracle by hand: a masked letter is the visible letter to the right of the hidden group."""

    def __init__(self, bias: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)) -> None:
        super().__init__()
        self.register_buffer("bias", torch.tensor(bias, dtype=torch.float64))
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(self, features: Tensor, visible: Tensor, queries: Tensor) -> Tensor:
        self.calls.append((features, visible, queries))
        assert not (visible & queries).any()
        out = torch.zeros(*queries.shape, 4, dtype=torch.float64)
        for b in range(len(queries)):
            after = int(queries[b].nonzero().max()) + 1
            if after < queries.shape[1] and visible[b, after]:
                out[b] += 2.0 * features[b, after, 7:11]  # A C G T are ids 7…10
        return out + self.bias


@dataclass
class Model:
    encoder: nn.Module = field(default_factory=Identity)
    decoder: nn.Module | None = field(default_factory=NextLetter)
    tokenizer: CharacterTokenizer = field(default_factory=CharacterTokenizer)


def vcf(path: Path, *lines: str) -> Path:
    path.write_text(HEADER + "".join("\t".join(line.split()) + "\n" for line in lines))
    return path


# ---- against the oracle


def test_scores_are_those_of_the_oracle(tmp_path: Path) -> None:
    genome = Genome(chr1="A" * 43 + "G" + "C" * 56)  # 0-based 43 is G
    file = vcf(tmp_path / "a.vcf", "chr1 41 rs1 A C . . .")  # 0-based 40: hidden 38…43, next visible 44: C
    forward = next(iter(score_variants(Model(), file, genome, window=32, strands="forward")))
    log_sum = math.log(3 + math.exp(2))
    assert forward.log_alt == pytest.approx(2 - log_sum)
    assert forward.log_ref == pytest.approx(-log_sum)
    assert forward.score == pytest.approx(2.0)  # C follows, and ALT is C
    assert math.isnan(forward.reverse)
    both = next(iter(score_variants(Model(), file, genome, window=32)))
    # on the other strand T follows the hidden group, the complement of the A before it, and REF is T
    assert both.reverse == pytest.approx(-2.0)
    assert both.score == pytest.approx(0.0)


def test_the_alleles_are_hidden_and_nothing_else(tmp_path: Path) -> None:
    model = Model()
    rng = np.random.default_rng(0)
    text = "".join(rng.choice(list("ACGT"), 200))
    alt = "A" if text[100] != "A" else "C"
    list(
        score_variants(
            model, vcf(tmp_path / "a.vcf", f"x 101 . {text[100]} {alt}"), Genome(x=text), window=64
        )
    )
    for features, visible, queries in model.decoder.calls:  # type: ignore[union-attr]
        assert queries.sum() == 6
        assert visible.sum() == 58
        ids = features.argmax(dim=-1)
        assert (ids[queries] == CharacterTokenizer.mask_id).all()
        assert not (ids[visible] == CharacterTokenizer.mask_id).any()
    first, second = (call[2][0] for call in model.decoder.calls)  # type: ignore[union-attr]
    assert first.flip(0).equal(second)  # the same bases on the other strand


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.integers(0, 59))
def test_swapping_ref_and_alt_changes_the_sign(seed: int, position: int) -> None:
    """Also at the ends of the record, and although the reference itself has the other letter then."""
    rng = np.random.default_rng(seed)
    text = list(rng.choice(list("ACGT"), 60))
    ref = text[position]
    alt = str(rng.choice([letter for letter in "ACGT" if letter != ref]))
    torch.manual_seed(seed)
    model = Model(decoder=NextLetter(tuple(torch.randn(4).tolist())))  # type: ignore[arg-type]
    values = []
    for mine, theirs in ((ref, alt), (alt, ref)):
        text[position] = mine
        with tempfile.TemporaryDirectory() as folder:
            file = vcf(Path(folder) / "a.vcf", f"x {position + 1} . {mine} {theirs}")
            values.append(next(iter(score_variants(model, file, Genome(x="".join(text)), window=24))))
    assert values[0].score == pytest.approx(-values[1].score, abs=1e-12)
    assert values[0].log_ref == pytest.approx(values[1].log_alt, abs=1e-12)


def test_both_strands_of_the_same_variant_score_alike(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    text = "".join(rng.choice(list("ACGT"), 101))
    turn = str.maketrans("ACGT", "TGCA")
    other = text.translate(turn)[::-1]
    ref, alt = text[50], "ACGT"["ACGT".index(text[50]) - 1]
    model = Model(decoder=NextLetter((0.3, -0.2, 0.1, 0.9)))
    forward = vcf(tmp_path / "f.vcf", f"x 51 . {ref} {alt}")
    reverse = vcf(tmp_path / "r.vcf", f"x 51 . {ref.translate(turn)} {alt.translate(turn)}")
    # an odd group and an odd window lie the same way around the base on both strands
    first = next(iter(score_variants(model, forward, Genome(x=text), window=31, group=5)))
    second = next(iter(score_variants(model, reverse, Genome(x=other), window=31, group=5)))
    assert first.score == pytest.approx(second.score)
    assert first.forward == pytest.approx(second.reverse)


def test_several_bases_are_summed(tmp_path: Path) -> None:
    genome = Genome(x="ACGTACGTAC" * 10)
    rows = list(score_variants(Model(), vcf(tmp_path / "a.vcf", "x 51 . ACG TCA"), genome, window=40))
    row = rows[0]
    assert row.status == "scored"
    bias = Model(decoder=NextLetter((1.0, 0.0, 0.0, -1.0)))
    found = next(
        iter(
            score_variants(
                bias, vcf(tmp_path / "b.vcf", "x 51 . ACG TCA"), genome, window=40, strands="forward"
            )
        )
    )
    # only A→T and G→A differ: the next letter (2) tells T from A or not, the bias −1 − 1 and 1 − 0
    after = "ACGTACGTAC"[(50 - 1 + 6) % 10]
    bonus = {letter: 2.0 * (letter == after) for letter in "ACGT"}
    expected = (bonus["T"] - 1.0 - bonus["A"] - 1.0) + (bonus["A"] + 1.0 - bonus["G"])
    assert found.score == pytest.approx(expected)


# ---- places


@given(st.integers(1, 300), st.integers(0, 299), st.integers(16, 64), st.integers(1, 8), st.integers(1, 4))
def test_a_site_lies_in_its_record(length: int, position: int, window: int, group: int, size: int) -> None:
    position = position % length
    size = min(size, length - position)
    site = site_of(position, "A" * size, "C" * size, length=length, window=window, group=group)
    if size > group:
        assert site == "too long"
        return
    assert isinstance(site, Site)
    assert 0 <= site.start < site.end <= length
    assert site.end - site.start == min(window, length)
    low, high = site.hidden
    assert 0 <= low < high <= site.end - site.start
    assert high - low == min(group, length)
    assert [site.start + place for place in site.places] == list(range(position, position + size))
    assert all(low <= place < high for place in site.places)


@pytest.mark.parametrize(
    ("ref", "alt", "status"),
    [
        ("A", "AT", "indel"),
        ("AT", "A", "indel"),
        ("ATT", "AT", "indel"),
        ("A", "A", "same"),
        ("A", "N", "ambiguous"),
    ],
)
def test_what_is_not_scored(ref: str, alt: str, status: str) -> None:
    assert site_of(50, ref, alt, length=100, window=32, group=6) == status


# ---- files


def write(folder: Path, *lines: str, suffix: str = ".tsv", **options: object) -> list[dict[str, str]]:
    out = folder / f"scores{suffix}"
    score_file(Model(), vcf(folder / "v.vcf", *lines), Genome(x="ACGT" * 25), out, window=32, **options)  # type: ignore[arg-type]
    with out.open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def test_every_alternative_has_a_row_in_order(tmp_path: Path) -> None:
    rows = write(tmp_path, "x 10 a C G,T,CA,*", "x 20 b T <DEL>", "x 30 c CG CA", "x 31 d g a", batch=2)
    shown = [(row["POS"], row["ALT"], row["status"]) for row in rows]
    assert shown == [
        ("10", "G", "scored"),
        ("10", "T", "scored"),
        ("10", "CA", "indel"),
        ("10", "*", "symbolic"),
        ("20", "<DEL>", "symbolic"),
        ("30", "CA", "scored"),
        ("31", "A", "scored"),
    ]
    assert [row["score"] == "" for row in rows] == [False, False, True, True, True, False, False]
    assert rows[5]["score"] == rows[6]["score"]  # the same base, written with an anchor and without


def test_batches_do_not_change_scores(tmp_path: Path) -> None:
    lines = [f"x {at} . {'ACGT'[(at - 1) % 4]} {'ACGT'[at % 4]}" for at in range(1, 101, 3)]
    one, many = write(tmp_path, *lines, batch=1), write(tmp_path, *lines, batch=64)
    assert one == many


def test_parquet_has_the_same_numbers(tmp_path: Path) -> None:
    rows = write(tmp_path, "x 10 a C G,CA")
    out = tmp_path / "scores.parquet"
    done = score_file(Model(), tmp_path / "v.vcf", Genome(x="ACGT" * 25), out, window=32)
    table = pq.read_table(out).to_pylist()
    assert [row["status"] for row in table] == ["scored", "indel"]
    assert table[0]["score"] == pytest.approx(float(rows[0]["score"]), abs=1e-5)
    assert table[1]["score"] is None
    assert done.counts == {"scored": 1, "indel": 1}
    assert "1 indel" in done.summary()


def test_gz_and_crlf_are_read(tmp_path: Path) -> None:
    text = HEADER + "x\t10\t.\tc\tg\t.\t.\t.\n"
    (tmp_path / "a.vcf.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "b.vcf").write_bytes(text.replace("\n", "\r\n").encode())
    first, second = list(read_vcf(tmp_path / "a.vcf.gz")), list(read_vcf(tmp_path / "b.vcf"))
    assert first == second
    assert (first[0].position, first[0].ref, first[0].alts) == (9, "C", ("G",))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("x 10 . G A", "line 4: REF at x:10 is G and the reference has C"),
        ("x 100 . TA T", "past the end of x"),
        ("chrX 10 . C A", "'chrX' is not in the reference, which has x"),
    ],
)
def test_disagreement_is_one_line_or_skipped(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        write(tmp_path, "x 14 . C A", line)
    assert not list(tmp_path.glob("*scores*"))
    rows = write(tmp_path, "x 14 . C A", line, skip_mismatches=True)
    assert [row["status"] == "scored" for row in rows] == [True, False]


def test_a_vcf_of_another_genome_is_refused_even_then(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not one of its variants fits"):
        write(tmp_path, "x 10 . G A", "y 3 . A T", skip_mismatches=True)
    assert not list(tmp_path.glob("*scores*"))


def test_an_n_in_the_reference_disagrees_with_nothing(tmp_path: Path) -> None:
    genome = Genome(x="ACGT" * 8 + "N" + "ACGT" * 8)
    rows = list(
        score_variants(Model(), vcf(tmp_path / "a.vcf", "x 33 . A C", "x 34 . A C"), genome, window=32)
    )
    assert [row.status for row in rows] == ["scored", "scored"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no line #CHROM"),
        (b"x\t1\t.\tA\tC\n", "line 1 comes before #CHROM"),
        (HEADER.encode() + b"x\t1\t.\tA\n", "line 3 has 4 columns"),
        (HEADER.encode() + b"x\tone\t.\tA\tC\n", "POS 'one'"),
        (HEADER.encode() + b"x\t0\t.\tA\tC\n", "before the first base"),
        (HEADER.encode() + b"x\t1\t.\tR2\tC\n", "REF 'R2'"),
        (gzip.compress(HEADER.encode() * 300)[:-40], "damaged or cut off"),
        (b"\x1f\x8b\x00\x00", "damaged or cut off"),
        (HEADER.encode() + b"\xff\xfe\x00\n", "is not text"),
    ],
)
def test_damaged_files_are_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.vcf"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_vcf(path))


def test_missing_parts_are_said(tmp_path: Path) -> None:
    file = vcf(tmp_path / "a.vcf", "x 10 . C A")
    genome = Genome(x="ACGT" * 25)
    with pytest.raises(DataError, match="no such file"):
        list(read_vcf(tmp_path / "b.vcf"))
    with pytest.raises(DataError, match="without the decoder"):
        list(score_variants(Model(decoder=None), file, genome))
    with pytest.raises(ConfigError, match="--group 20"):
        list(score_variants(Model(), file, genome, window=32, group=20))
    with pytest.raises(ConfigError, match="must end in"):
        score_file(Model(), file, genome, tmp_path / "a.csv")  # type: ignore[arg-type]
