"""Labelled tables and the two benchmarks as files."""

from __future__ import annotations

import gzip
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from stillhouse.core.errors import DataError
from stillhouse.genomic.data import (
    NT_ORIGINAL,
    NT_REVISED,
    Fasta,
    Sequences,
    pack,
    read_genomic_benchmark,
    read_labelled,
    read_nt_benchmark,
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


def test_sequences_check_their_shapes() -> None:
    good = pack("t", [b"ACGT", b"AC"], [1, 0], ("a", "b"), ["g", "h"], ["train", "test"])
    assert good.part("test").sequences.tobytes() == b"ACNN"
    assert good.subset([1, 0]).labels.tolist() == [0, 1]
    assert good.subset(np.array([False, True])).groups == ("h",)
    with pytest.raises(ValueError, match="parts"):
        good.part("validation")
    parts = (good.sequences, good.lengths, good.labels)
    for wrong, words in (
        ((parts[0][0], *parts[1:], ("a", "b"), ("g", "h")), "uint8"),
        ((*parts[:2], parts[2] + 1, ("a", "b"), ("g", "h")), "2 classes"),
        ((*parts, ("a", "b"), ("g",)), "groups has 1"),
        ((parts[0], parts[1] + 9, parts[2], ("a", "b"), ("g", "h")), "lengths"),
    ):
        with pytest.raises(ValueError, match=words):
            Sequences("t", *wrong)


def test_labelled_tables(put: Put, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [("acgt", "10", "g1", "train"), ("NNRY", "9", "g1", "val"), ("TTTTT", "10", "g2", "test")]
    head = "Seq,Label,gene,part"
    text = "\r\n".join([head, *(",".join(row) for row in rows)]) + "\r\n"
    pq.write_table(
        pa.table({k: [r[i] for r in rows] for i, k in enumerate(head.split(","))}), tmp_path / "t.parquet"
    )
    for path in (
        put(text, "t.csv"),
        put(text.replace(",", "\t"), "t.tsv"),
        put(gzip.compress(text.encode()), "t.csv.gz"),
        tmp_path / "t.parquet",
    ):
        items = read_labelled(path, group="gene", split="part")
        assert items.name == "t"
        assert items.classes == ("9", "10")  # numbers by their value
        assert items.labels.tolist() == [1, 0, 1]
        assert items.sequences.tobytes() == b"ACGTNNNNNNTTTTT"
        assert items.groups == ("g1", "g1", "g2")
        assert items.split == ("train", "validation", "test")
        assert read_labelled(path).groups == ("sequence 0", "sequence 1", "sequence 2")
    fasta = put(">a|yes\nACGT\n>b x label=no\nAC\n>c|yes\nACGT\n", "t.fa")
    items = read_labelled(fasta, classes=["yes", "no"])
    assert items.labels.tolist() == [0, 1, 0]
    assert items.groups == ("sequence 0", "sequence 1", "sequence 0")  # equal sequences belong together
    words = put("sequence\tlabel\nACG CGT GTT\t1\n", "dnabert.tsv")
    assert read_labelled(words).sequences.tobytes() == b"ACGTT"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sequence,label\n", "holds no sequence"),
        ("a,b\nACGT,1\n", "no column 'sequence' or 'seq'"),
        ("sequence,b\nACGT,1\n", "name it with label="),
        ("sequence,label\nACGT\n", "line 2: 1 columns, the header has 2"),
        ("sequence,label\nACGE,1\n", "line 2: letters: 'E' is no nucleotide"),
        ("sequence,label\n,1\n", "line 2: the sequence is empty"),
        ("sequence,label\nACG GGG,1\n", "holds spaces"),
        (">a\nACGT\n", "record 'a' has no label"),
        (b"PAR1\x00\x00", "damaged Parquet"),
        (b"\x00\x01", "zero byte"),
    ],
)
def test_labelled_refused_in_one_line(put: Put, text: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        read_labelled(put(text))


def test_labels_outside_the_classes(put: Put) -> None:
    path = put("sequence,label,s\nACGT,2,train\n")
    with pytest.raises(DataError, match="label '2' is not among the classes"):
        read_labelled(path, classes=["0", "1"])
    with pytest.raises(DataError, match="split '2' must be"):
        read_labelled(path, split="label")


# Benchmarks


def test_intervals_become_sequences_by_hand(put: Put, tmp_path: Path) -> None:
    """Rows as Genomic Benchmarks ships them, on a genome that is read off by eye."""
    #            0         1         2
    #            0123456789012345678901234
    put(">1\nAACCGGTTACGTACGTTTGACATGA\n>chr2\nGGGGG\n", "mini.fa")
    rows = {
        "train/positive": "0,chr1,2,6,+\n1,chr1,2,6,-\n",  # CCGG, its own reverse complement
        "train/negative": "0,chr1,16,22,+\n1,chr1,16,22,-\n2,2,0,3,-\n",  # TTGACA → TGTCAA; GGG → CCC
        "test/positive": "0,1,20,25,-\n",  # CATGA → TCATG
        "test/negative": "0,chr1,0,1,+\n",
    }
    for name, text in rows.items():
        put(gzip.compress(b"id,region,start,end,strand\n" + text.encode()), f"set/{name}.csv.gz")
    reference = Fasta(tmp_path / "mini.fa")
    items = read_genomic_benchmark(tmp_path / "set", reference)
    texts = [row[:n].tobytes() for row, n in zip(items.sequences, items.lengths, strict=True)]
    assert texts == [b"TTGACA", b"TGTCAA", b"CCC", b"CCGG", b"CCGG", b"A", b"TCATG"]
    assert items.classes == ("negative", "positive")  # by name, not by the file system
    assert items.labels.tolist() == [0, 0, 0, 1, 1, 0, 1]
    assert items.split == ("train",) * 5 + ("test",) * 2
    assert items.groups[0] == items.groups[1] == items.groups[6]  # 16-22 and 20-25 overlap, across the parts
    assert items.groups[3] != items.groups[5]
    test = read_genomic_benchmark(tmp_path / "set", reference, "test")
    assert len(test) == 2
    for text, words in (
        ("0,chr1,20,26,+", "line 2: 1:20-26 ends past the end of its record, 25 bp"),
        ("0,chr9,0,1,+", "line 2: no record 'chr9'"),
        ("0,chr1,5,5,+", "line 2: end is 5"),
        ("0,chr1,x,5,+", "line 2: invalid literal"),
        ("0,chr1,1,5", "line 2: 4 columns"),
    ):
        put(f"id,region,start,end,strand\n{text}\n", "set/test/positive.csv")
        (tmp_path / "set/test/positive.csv.gz").unlink(missing_ok=True)
        with pytest.raises(DataError, match=words):
            read_genomic_benchmark(tmp_path / "set", reference, "test")
    put("chr1\t0\t5\n", "set/test/positive.csv")
    with pytest.raises(DataError, match="the header is"):
        read_genomic_benchmark(tmp_path / "set", reference, "test")
    (tmp_path / "set/test/positive.csv").unlink()
    with pytest.raises(DataError, match="1 class files"):
        read_genomic_benchmark(tmp_path / "set", reference, "test")
    with pytest.raises(DataError, match="no such folder"):
        read_genomic_benchmark(tmp_path / "none", reference, "test")


def test_nt_benchmark_files(put: Put, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    put(">a|1\nACGT\n>b|0\nGGGG\n", "H3/train.fna")
    put(">a|0\nTTTT\n", "H3/test.fna")
    items = read_nt_benchmark(tmp_path / "H3", revised=False)
    assert (items.name, items.classes, items.labels.tolist()) == ("H3", ("0", "1"), [1, 0, 0])
    assert items.split == ("train", "train", "test")
    rows = {"sequence": ["AC", "GG", "TT"], "name": ["x"] * 3, "label": [2, 0, 1]}
    tasks = ["enhancers_types", "H2AFZ", "enhancers_types"]
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table({**rows, "task": tasks}), tmp_path / "data" / "train-00000-of-00001.parquet")
    one = read_nt_benchmark(tmp_path / "data", task="enhancers_types", revised=True)
    assert (one.labels.tolist(), one.classes, one.split) == ([2, 1], ("0", "1", "2"), ("train", "train"))
    with pytest.raises(DataError, match="no rows of the task 'promoter_all'"):
        read_nt_benchmark(tmp_path / "data", task="promoter_all", revised=True)
    with pytest.raises(DataError, match="no task 'H4' in the revised set"):
        read_nt_benchmark(tmp_path / "data", task="H4", revised=True)
    with pytest.raises(DataError, match=r"no files train… and test…"):
        read_nt_benchmark(tmp_path)
    put("sequence,label\nAC,7\n", "H4/train.csv")
    with pytest.raises(DataError, match="label '7' is not among"):
        read_nt_benchmark(tmp_path / "H4", revised=False)


def test_nt_tables() -> None:
    from stillhouse.genomic.metrics import metric

    assert len(NT_ORIGINAL) == len(NT_REVISED) == 18
    assert Counter(task.kind for task in NT_ORIGINAL.values()) == {
        "histone": 10,
        "enhancer": 2,
        "promoter": 3,
        "splice": 2,
        "splice_all": 1,
    }
    shared = set(NT_ORIGINAL) & set(NT_REVISED)
    assert {"H3K4me1", "promoter_tata"} <= shared
    assert "H2AFZ" not in NT_ORIGINAL
    assert callable(metric)
