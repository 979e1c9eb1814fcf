"""FASTA: what is accepted by rule, what is refused in one line, random access against independent readers."""

from __future__ import annotations

import gzip
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from Bio import SeqIO, bgzf
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.core.errors import DataError
from stillhouse.genomic.data import (
    Fasta,
    Record,
    normalise,
    read_fasta,
    reverse_complement,
    write_fasta,
)

Put = Callable[..., Path]


@pytest.fixture
def put(tmp_path: Path) -> Put:
    def write(content: bytes, name: str = "x.fa") -> Path:
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return write


def as_bgzf(path: Path, content: bytes) -> Path:
    with bgzf.BgzfWriter(str(path), "wb") as file:
        file.write(content)
    return path


def letters(path: Path) -> dict[str, bytes]:
    return {record.name: record.sequence.tobytes() for record in read_fasta(path)}


def drawn(rng: np.random.Generator, size: int, alphabet: bytes = b"ACGT") -> bytes:
    return rng.choice(np.frombuffer(alphabet, np.uint8), size).tobytes()


# Letters


def test_letters_are_brought_to_five() -> None:
    assert normalise(b"acgtuACGTU").tobytes() == b"ACGTTACGTT"
    assert normalise("NnRYSWKMBDHVrykm").tobytes() == b"N" * 16
    assert normalise(b"A C\r\nG\tT").tobytes() == b"ACGT"
    assert normalise(b"").tobytes() == b""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"ACE", "'E' is no nucleotide .is this protein"),
        (b"AC-", "gap"),
        (b"AC\x00", "byte 0"),
        (b"AC\xff", "byte 255"),
        (b"A1", "'1'"),
    ],
)
def test_what_is_no_nucleotide_is_named(text: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        normalise(text)


@given(st.binary(max_size=50).map(lambda b: bytes(b"ACGTN"[x % 5] for x in b)))
def test_reverse_complement_against_biopython(text: bytes) -> None:
    from Bio.Seq import Seq

    expected = bytes(Seq(text).reverse_complement())
    assert reverse_complement(text) == expected
    array = np.frombuffer(text, np.uint8)
    assert reverse_complement(array).tobytes() == expected
    assert reverse_complement(reverse_complement(text)) == text


def test_reverse_complement_of_batches() -> None:
    batch = np.frombuffer(b"AACGTN", np.uint8).reshape(1, 2, 3)
    assert reverse_complement(batch).tobytes() == b"GTTNAC"
    with pytest.raises(TypeError, match="uint8"):
        reverse_complement(batch.astype(np.int64))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no nucleotide"):
        reverse_complement(b"AXC")


# Streaming


@pytest.mark.parametrize(
    "content",
    [
        b">a one\nACGT\nACGT\n>b\nNN\n",
        b">a one\r\nACGT\r\nACGT\r\n>b\r\nNN\r\n",  # CRLF
        b"\xef\xbb\xbf>a one\nACGT\nACGT\n>b\nNN",  # byte order mark, no end of the last line
        b"\n\n>a one\n\nACG\nTACG T\n\n>b\nNN\n\n\n",  # blank lines, lines of any length, white space
        b">a one\nacgtacgt\n>b\nRY\n",  # lower case, ambiguity
        b">a\tone\nACGUACGU\n>b\nnn\n",
    ],
)
@pytest.mark.parametrize("packing", ["plain", "gzip", "bgzf"])
def test_accepted_by_rule(put: Put, content: bytes, packing: str) -> None:
    path = put(content if packing == "plain" else gzip.compress(content))  # by content, not by name
    if packing == "bgzf":
        as_bgzf(path, content)
    records = list(read_fasta(path))
    assert [(r.name, r.description) for r in records] == [("a", "one"), ("b", "")]
    assert [r.sequence.tobytes() for r in records] == [b"ACGTACGT", b"NN"]
    assert records[0].sequence.flags.writeable  # torch warns of arrays that are not


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "the file is empty"),
        (b"\n \n", "holds no record"),
        (b"ACGT\n>a\nAC\n", "line 1: the file begins with 'ACGT', not with '>'"),
        (b"\n\nACGT\n", "line 3"),
        (b">a\n>b\nAC\n", "line 1: the record 'a' has no sequence"),
        (b">a\nAC\n>b\n", "line 3: the record 'b' has no sequence"),
        (b">a\nAC\n>b\nAC\n>a x\nGG\n", "line 5: the name 'a' was used in line 1"),
        (b">\nAC\n", "line 1: the record has no name"),
        (b"> a\nAC\n", "line 1: the record has no name"),
        (b">a\nACGT\nMKVLLE\n", "line 3, record 'a': 'L' is no nucleotide .is this protein"),
        (b">a\nAC--GT\n", "line 2, record 'a': '-' is a gap"),
        (b">a\rACGT\r>b\rAC\r", "CR alone"),
        (b"\x00\x01\x02\x03" * 40, "no FASTA file"),
        (b">a\nAC\x00T\n", "line 2, record 'a': byte 0"),
        (b"BZh91AY", "bzip2"),
        (b"PK\x03\x04aaaa", "zip"),
        (b"@SRR1\nACGT\n+\nIIII\n", "begins with '@SRR1'"),
    ],
)
def test_refused_in_one_line(put: Put, content: bytes, words: str) -> None:
    path = put(content)
    with pytest.raises(DataError, match=words) as caught:
        list(read_fasta(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        list(read_fasta(tmp_path / "missing.fa"))
    with pytest.raises(DataError, match="is a folder"):
        Fasta(tmp_path)


def test_truncated_and_damaged_compression(put: Put, tmp_path: Path) -> None:
    text = b">a\n" + drawn(np.random.default_rng(0), 20_000) + b"\n"
    whole = gzip.compress(text)
    with pytest.raises(DataError, match="truncated"):
        list(read_fasta(put(whole[: len(whole) // 2], "cut.fa.gz")))
    with pytest.raises(DataError, match="damaged"):
        list(read_fasta(put(whole[:100] + b"\x00" * 50 + whole[150:], "bad.fa.gz")))
    packed = as_bgzf(tmp_path / "x.bgz", text).read_bytes()
    with pytest.raises(DataError, match="end marker"):
        list(read_fasta(put(packed[:-28], "cut.bgz")))
    with pytest.raises(DataError, match="end marker"):
        Fasta(put(packed[:-28], "cut.bgz"))


def test_blocks_break_anywhere(put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    content = b">one two\nACGTAC\nGT\n\n>b >c\nAAAA\n>d\nC\n"
    expected = {"one": b"ACGTACGT", "b": b"AAAA", "d": b"C"}
    path = put(content)
    for size in range(1, len(content) + 1):
        monkeypatch.setattr("stillhouse.genomic.data.fasta._BLOCK", size)
        assert letters(path) == expected
        monkeypatch.setattr("stillhouse.genomic.data._index._BLOCK", size)
    monkeypatch.undo()
    bad = put(b">one\nACGT\nAC!T\n", "bad.fa")
    for size in range(1, 16):
        monkeypatch.setattr("stillhouse.genomic.data.fasta._BLOCK", size)
        with pytest.raises(DataError, match=r"line 3, record 'one': '!'"):
            list(read_fasta(bad))


def test_huge_line(put: Put) -> None:
    size = 5_000_001
    path = put(b">a\n" + b"ACGTN" * (size // 5) + b"A\n>b\nCC\n")
    assert {r.name: len(r) for r in read_fasta(path)} == {"a": size, "b": 2}
    fasta = Fasta(path)
    assert fasta.lengths == {"a": size, "b": 2}
    assert fasta.fetch("a", size - 3, size).tobytes() == b"TNA"
    with pytest.raises(DataError, match="header of more than"):
        list(read_fasta(put(b">" + b"a" * 100_000, "head.fa")))


def test_write_and_read_back(tmp_path: Path) -> None:
    records = [Record("a", normalise(b"ACGTN" * 30), "some words"), Record("b", normalise(b"A"))]
    write_fasta(tmp_path / "x.fa", records, width=7)
    back = list(read_fasta(tmp_path / "x.fa"))
    assert [(r.name, r.description, r.sequence.tobytes()) for r in back] == [
        (r.name, r.description, r.sequence.tobytes()) for r in records
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["x.fa"]


# Random access


@pytest.mark.oracle
@pytest.mark.parametrize("packing", ["plain", "bgzf"])
def test_access_against_pyfaidx_and_biopython(tmp_path: Path, packing: str) -> None:
    pyfaidx = pytest.importorskip("pyfaidx")
    rng = np.random.default_rng(0)
    text = b""
    for name, size, width in (("a", 1, 60), ("b", 60, 60), ("c", 61, 60), ("d", 200_003, 71)):
        body = drawn(rng, size, b"ACGTacgtn")
        lines = [body[i : i + width] for i in range(0, size, width)]
        text += b">" + name.encode() + b" more\n" + b"\n".join(lines) + b"\n"
    path = tmp_path / "x.fa"
    path.write_bytes(text)
    ours = Fasta(as_bgzf(tmp_path / "x.fa.bgz", text) if packing == "bgzf" else path)
    assert ours.names == ("a", "b", "c", "d")
    with open(path) as file:
        whole = {record.id: str(record.seq).upper() for record in SeqIO.parse(file, "fasta")}
    assert {name: ours.fetch(name, 0, ours.length(name)).tobytes().decode() for name in ours} == whole
    with pyfaidx.Fasta(str(path), sequence_always_upper=True, as_raw=True) as theirs:
        for name in ours.names:
            for _ in range(50):
                start = int(rng.integers(ours.length(name)))
                end = min(ours.length(name), start + 1 + int(rng.integers(300)))
                expected = theirs[name][start:end]
                assert ours.fetch(name, start, end).tobytes().decode() == expected
                turned = reverse_complement(expected.encode())
                assert ours.fetch(name, start, end, "-").tobytes() == turned
    index = {
        line.split("\t")[0]: tuple(map(int, line.split("\t")[1:]))
        for line in (tmp_path / "x.fa.fai").read_text().splitlines()
    }
    entries = ours._entries.values()
    assert {e.name: (e.length, e.offset, e.bases, e.width) for e in entries} == index
    ours.close()


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    width=st.integers(1, 12),
    crlf=st.booleans(),
    ended=st.booleans(),
    block=st.integers(1, 30),
)
def test_access_is_the_stream_cut(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: list[int],
    width: int,
    crlf: bool,
    ended: bool,
    block: int,
) -> None:
    rng = np.random.default_rng(sum(sizes))
    end = b"\r\n" if crlf else b"\n"
    text = b""
    for number, size in enumerate(sizes):
        body = drawn(rng, size, b"ACGTN")
        lines = [body[i : i + width] for i in range(0, size, width)]
        text += b">r%d x" % number + end + end.join(lines) + end
    path = tmp_path_factory.mktemp("fasta") / "x.fa"
    path.write_bytes(text if ended else text.removesuffix(end))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stillhouse.genomic.data._index._BLOCK", block)
        fasta = Fasta(path)
    for record in read_fasta(path):
        for start in range(0, len(record), 3):
            for stop in range(start + 1, len(record) + 1, 5):
                piece = fasta.fetch(record.name, start, stop)
                assert piece.tobytes() == record.sequence[start:stop].tobytes()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b">a\nACGT\nAC\nACGT\n", "line 3: record 'a' has lines of unequal length"),
        (b">a\nAC\nACGT\n", "line 3: record 'a' has lines of unequal length"),
        (b">a\nACGT\n\nACGT\n", "line 3: record 'a' has lines of unequal length"),
        (b">a\n\nACGT\n", "unequal length"),
        (b">a\nACGT \nACGT \n", "line 2: white space"),
        (b">a\nACGT\n>b\n>c\nA\n", "line 3: the record 'b' has no sequence"),
        (b">a\nACGT\n>a\nA\n", "line 3: the name 'a' comes twice"),
        (b"ACGT\n>a\nA\n", "does not begin with '>'"),
        (b"\n\n", "holds no record"),
    ],
)
def test_what_no_index_can_point_into(put: Put, content: bytes, words: str) -> None:
    with pytest.raises(DataError, match=words):
        Fasta(put(content))


def test_blank_lines_at_the_end_are_fine(put: Put) -> None:
    assert Fasta(put(b">a\nACGT\nAC\n\n\n>b\nGG\n\n")).lengths == {"a": 6, "b": 2}


def test_plain_gzip_says_what_to_do(put: Put) -> None:
    path = put(gzip.compress(b">a\nACGT\n"), "x.fa.gz")
    with pytest.raises(DataError, match="repack it with bgzip"):
        Fasta(path)
    assert letters(path) == {"a": b"ACGT"}  # the stream reads it


def test_index_is_used_saved_and_held_against_the_file(put: Put) -> None:
    path = put(b">a x\nACGT\nAC\n>b\nGGGG\n")
    index = path.with_name("x.fa.fai")
    Fasta(path)
    assert not index.exists()
    Fasta(path, save_index=True)
    assert index.read_text() == "a\t6\t5\t4\t5\nb\t4\t16\t4\t5\n"
    assert Fasta(path).lengths == {"a": 6, "b": 4}
    for changed in (
        b">a x\nACGT\nAC\n>c\nGGGG\n",  # another name
        b">a x\nACGT\nACG\n>b\nGGGG\n",  # moved
        b">a x\nACGT\nAC\n>b\nGGGG\nGG\n",  # longer
        b">a x\nACGT\nAC\n>b\nGG\n",  # shorter
        b">a x\nACGT\nAC\n",
        b">a x\nACGT\nAC\n>b\nGGGG\n>c\nA\n",
    ):
        path.write_bytes(changed)
        with pytest.raises(DataError, match=r"does not fit .* delete the index"):
            Fasta(path)
    for nonsense in (
        "",
        "a\t6\n",
        "a\tx\ty\tz\tw\n",
        "a\t6\t5\t9\t5\n",
        "a\t6\t5\t4\t5\na\t6\t5\t4\t5\n",
        "\x00",
    ):
        index.write_text(nonsense)
        with pytest.raises(DataError, match="delete it"):
            Fasta(path)


def test_index_of_bgzf_and_its_blocks(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    body = drawn(rng, 300_000)
    text = b">a\n" + b"\n".join(body[i : i + 50] for i in range(0, len(body), 50)) + b"\n>b\nACGT\n"
    path = as_bgzf(tmp_path / "x.fa.gz", text)
    plain = Fasta(path, save_index=True)
    with open(path, "rb") as file:  # what bgzip -r writes: all blocks but the first
        blocks = [(raw, data) for raw, _, data, size in bgzf.BgzfBlocks(file) if size]
    pairs = np.array(blocks[1:], "<u8")
    gzi = tmp_path / "x.fa.gz.gzi"
    gzi.write_bytes(np.array([len(pairs)], "<u8").tobytes() + pairs.tobytes())
    indexed = Fasta(path)
    for start in (0, 65_000, 131_000, 299_900):
        expected = body[start : start + 100]
        assert plain.fetch("a", start, start + 100).tobytes() == expected
        assert indexed.fetch("a", start, start + 100).tobytes() == expected
    assert indexed.fetch("b", 0, 4).tobytes() == b"ACGT"
    gzi.write_bytes(b"nonsense")
    with pytest.raises(DataError, match="no bgzip index"):
        Fasta(path)


def test_fetch_says_what_is_wrong(put: Put) -> None:
    fasta = Fasta(put(b">a\nACGT\n>chr1\nAC!T\n"))
    with pytest.raises(DataError, match=r"no record 'b'; the sequences have 'a', 'chr1'"):
        fasta.fetch("b", 0, 1)
    with pytest.raises(DataError, match="prefix 'chr'"):
        fasta.fetch("1", 0, 1)
    for start, end in ((-1, 2), (2, 2), (3, 2), (0, 5)):
        with pytest.raises(ValueError, match="0 ≤ start < end ≤ 4"):
            fasta.fetch("a", start, end)
    with pytest.raises(ValueError, match="strand"):
        fasta.fetch("a", 0, 1, "*")
    with pytest.raises(DataError, match="record 'chr1', base 2: '!'"):
        fasta.fetch("chr1", 1, 4)


def test_fetched_letters_may_be_changed_and_the_object_travels(put: Put) -> None:
    fasta = Fasta(put(b">a\nACGT\n"))
    fasta.fetch("a", 0, 4)[:] = 0
    assert fasta.fetch("a", 0, 4).tobytes() == b"ACGT"
    assert pickle.loads(pickle.dumps(fasta)).fetch("a", 1, 3).tobytes() == b"CG"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_fork_does_not_disturb_the_parent(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    body = drawn(rng, 200_000)
    fasta = Fasta(as_bgzf(tmp_path / "x.bgz", b">a\n" + body + b"\n"))
    assert fasta.fetch("a", 0, 10).tobytes() == body[:10]
    child = os.fork()
    if child == 0:
        good = all(
            fasta.fetch("a", i, i + 50).tobytes() == body[i : i + 50] for i in range(0, 190_000, 9_000)
        )
        os._exit(0 if good else 1)
    good = all(fasta.fetch("a", i, i + 50).tobytes() == body[i : i + 50] for i in range(0, 190_000, 7_000))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert good
