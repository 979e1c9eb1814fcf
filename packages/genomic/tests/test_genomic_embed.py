from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file

from stillhouse.core.errors import ConfigError, DataError
from stillhouse.genomic.distiller import view_of
from stillhouse.genomic.embed import embed_file, embed_windows, tiles_of
from stillhouse.genomic.heads import other_strand
from stillhouse.genomic.student import Encoder, StudentConfig, build_student
from stillhouse.genomic.teacher import KmerTeacher, KmerTransformer, KmerTransformerConfig
from stillhouse.genomic.tokenizers import CharacterTokenizer, KmerTokenizer


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Small networks on a busy machine: more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def student() -> Encoder:
    torch.manual_seed(0)
    return build_student(StudentConfig(kind="cnn", width=16, conv_layers=1, attention_heads=2)).eval()


@pytest.fixture(scope="module")
def teacher() -> KmerTeacher:
    torch.manual_seed(0)
    return KmerTeacher(KmerTransformer(KmerTransformerConfig(width=16, depth=1, heads=2, k=3)))


def letters(count: int, length: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.frombuffer(b"ACGT", np.uint8)[rng.integers(0, 4, (count, length))]


# ---- windows


def test_mean_is_the_mean_of_the_positions(student: Encoder) -> None:
    x = letters(3, 20)
    each = embed_windows(student, x, pool="none")
    assert each.shape == (3, 20, 16)
    np.testing.assert_allclose(embed_windows(student, x), each.mean(axis=1), atol=1e-5)
    np.testing.assert_allclose(
        embed_windows(student, x, pool="center", middle=4), each[:, 8:12].mean(axis=1), atol=1e-5
    )
    with torch.no_grad():
        direct = student(CharacterTokenizer().encode(x)).numpy()
    np.testing.assert_allclose(each, direct, atol=1e-5)


def test_teacher_tokens_are_spread_to_their_characters(teacher: KmerTeacher) -> None:
    x = np.frombuffer(b"ACGTANGTACG", np.uint8)[None]
    tokens = KmerTokenizer(3).encode(x)
    features = teacher.features(tokens)[0][0].numpy()
    assert tokens.sizes[0].tolist() == [3, 1, 1, 1, 3, 1, 1]  # N breaks the frame
    each = embed_windows(teacher, x, pool="none")[0]
    np.testing.assert_allclose(each, np.repeat(features, tokens.sizes[0].tolist(), axis=0), atol=1e-6)
    weights = tokens.sizes[0].numpy() / 11
    np.testing.assert_allclose(embed_windows(teacher, x)[0], weights @ features, atol=1e-6)


@pytest.mark.parametrize("which", ["student", "teacher"])
@pytest.mark.parametrize("pool", ["mean", "center", "none"])
def test_padding_and_batches_change_nothing(which: str, pool: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(which)
    lengths = [9, 14, 12]
    x = np.full((3, 17), ord("N"), np.uint8)
    for row, length in zip(x, lengths, strict=True):
        row[:length] = letters(1, length, seed=length)[0]
    together = embed_windows(model, x, lengths=lengths, pool=pool, batch=8)  # type: ignore[arg-type]
    for at, length in enumerate(lengths):
        alone = embed_windows(model, x[at : at + 1, :length], pool=pool)[0]  # type: ignore[arg-type]
        shown = together[at][:length] if pool == "none" else together[at]
        np.testing.assert_allclose(shown, alone, atol=1e-5)
        if pool == "none":
            assert (together[at][length:] == 0).all()


@pytest.mark.parametrize("pool", ["mean", "center", "none"])
def test_conjoined_embeddings_are_those_of_both_strands(student: Encoder, pool: str) -> None:
    lengths = [15, 11]
    x = letters(2, 15)
    x[1, 11:] = ord("N")
    turned = other_strand(x, lengths)
    first = embed_windows(student, x, lengths=lengths, pool=pool, conjoin=True, middle=5)  # type: ignore[arg-type]
    second = embed_windows(student, turned, lengths=lengths, pool=pool, conjoin=True, middle=5)  # type: ignore[arg-type]
    if pool == "none":
        for at, length in enumerate(lengths):
            np.testing.assert_allclose(first[at][:length], second[at][:length][::-1], atol=1e-5)
    else:
        np.testing.assert_allclose(first, second, atol=1e-5)
        assert not np.allclose(first, embed_windows(student, x, lengths=lengths, pool=pool), atol=1e-4)  # type: ignore[arg-type]


# ---- N at the ends: padding, as in pre-training


def in_n(x: np.ndarray, left: int, right: int) -> np.ndarray:
    return np.pad(x, ((0, 0), (left, right)), constant_values=ord("N"))


@pytest.mark.parametrize("kind", ["cnn", "gdn", "transformer"])
def test_n_at_either_end_changes_nothing(kind: str) -> None:
    torch.manual_seed(0)
    model = build_student(StudentConfig(kind=kind, width=16, gdn_layers=1, conv_layers=1, attention_heads=2))  # type: ignore[arg-type]
    x = letters(2, 14)
    x[:, 6] = ord("N")  # between nucleotides: a letter
    wide = in_n(x, 3, 5)
    for conjoin in (False, True):
        alone, each = (embed_windows(model, x, pool=p, conjoin=conjoin) for p in ("mean", "none"))  # type: ignore[arg-type]
        np.testing.assert_allclose(embed_windows(model, wide, conjoin=conjoin), alone, atol=1e-5)
        shown = embed_windows(model, wide, pool="none", conjoin=conjoin)
        np.testing.assert_allclose(shown[:, 3:17], each, atol=1e-5)
        assert (shown[:, :3] == 0).all()
        assert (shown[:, 17:] == 0).all()
        assert (shown[:, 9] != 0).any()


def test_the_centre_is_that_of_the_window(student: Encoder) -> None:
    x = letters(2, 20)
    wide = in_n(x[:, 4:], 4, 0)  # the window reaches over the beginning of its record
    each = embed_windows(student, wide, pool="none")
    np.testing.assert_allclose(
        embed_windows(student, wide, pool="center", middle=4), each[:, 8:12].mean(1), atol=1e-5
    )
    gone = in_n(x[:, 11:], 11, 0)  # of the middle four only one is there
    each = embed_windows(student, gone, pool="none")
    np.testing.assert_allclose(embed_windows(student, gone, pool="center", middle=4), each[:, 11], atol=1e-5)


def test_a_window_of_n_alone_is_zero(student: Encoder, teacher: KmerTeacher) -> None:
    x = np.concatenate([letters(1, 12), np.full((1, 12), ord("N"), np.uint8)])
    for model in (student, teacher):
        for pool in ("mean", "center", "none"):
            found = embed_windows(model, x, pool=pool, conjoin=True)  # type: ignore[arg-type]
            assert (found[1] == 0).all()
            np.testing.assert_allclose(
                found[0], embed_windows(model, x[:1], pool=pool, conjoin=True)[0], atol=1e-5  # type: ignore[arg-type]
            )  # fmt: skip


def test_a_teacher_pools_nucleotides_and_stops_at_the_last(teacher: KmerTeacher) -> None:
    x = letters(2, 12)
    np.testing.assert_allclose(embed_windows(teacher, in_n(x, 0, 4)), embed_windows(teacher, x), atol=1e-5)
    each = embed_windows(teacher, in_n(x, 3, 0), pool="none")
    assert (each[:, :3] == 0).all()
    np.testing.assert_allclose(embed_windows(teacher, in_n(x, 3, 0)), each[:, 3:].mean(1), atol=1e-5)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.text("ACGTN", min_size=9, max_size=9), min_size=1, max_size=4))
def test_the_rule_is_that_of_pre_training(rows: list[str]) -> None:
    """What a student is given when it embeds is what it is given when it is trained."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    class Spy(torch.nn.Module):
        width = 2

        def forward(self, ids: torch.Tensor, *, attend: torch.Tensor) -> torch.Tensor:
            seen.append((ids, attend))
            return torch.zeros(*ids.shape, 2)

    x = np.stack([np.frombuffer(row.encode(), np.uint8) for row in rows])
    embed_windows(Spy(), x)
    view = view_of(x, CharacterTokenizer(), KmerTokenizer(3))
    torch.testing.assert_close(seen[0][0], view.ids)
    torch.testing.assert_close(seen[0][1], view.attend)
    for row, real in zip(rows, view.attend.tolist(), strict=True):
        inner = row.strip("N")
        start = row.index(inner) if inner else 0
        assert real == [start <= at < start + len(inner) for at in range(9)]


def test_embedding_leaves_the_model_as_it_was(student: Encoder) -> None:
    student.train()
    seen: list[int] = []
    embed_windows(student, letters(5, 12), batch=2, progress=seen.append)
    assert student.training
    student.eval()
    assert seen == [2, 2, 1]
    assert embed_windows(student, letters(0, 12)).shape == (0, 16)


@pytest.mark.parametrize(
    "change",
    [
        {"windows": np.zeros((2, 3), np.int64)},
        {"windows": np.zeros(3, np.uint8)},
        {"lengths": [0, 5]},
        {"lengths": [5]},
        {"lengths": [5, 13]},
        {"pool": "max"},
        {"batch": 0},
    ],
)
def test_wrong_arguments_are_said(student: Encoder, change: dict) -> None:
    arguments = {"windows": letters(2, 12), **change}
    with pytest.raises(ValueError):
        embed_windows(student, arguments.pop("windows"), **arguments)


# ---- tiles


@given(st.integers(0, 500), st.integers(1, 64), st.integers(0, 63))
def test_tiles_cover_everything_once_but_the_overlap(length: int, window: int, overlap: int) -> None:
    overlap %= window
    tiles = tiles_of(length, window, overlap)
    covered = {at for start, end in tiles for at in range(start, end)}
    assert covered == set(range(length))
    for (start, end), (after, stop) in itertools.pairwise(tiles):
        assert end - after == overlap
        assert stop > end
        assert start < after
    assert all(end - start <= window for start, end in tiles)


def test_tiles_with_too_much_overlap_are_refused() -> None:
    with pytest.raises(ValueError, match="overlap"):
        tiles_of(10, 4, 4)


# ---- files


@pytest.fixture
def fasta(tmp_path: Path) -> Path:
    """Two records, 50 and 17 bases, with lower case, CRLF and an ambiguity letter."""
    first, second = (letters(1, n, seed=n)[0].tobytes().decode() for n in (50, 17))
    text = f">one described\r\n{first[:30]}\r\n{first[30:].lower()}\r\n>two\r\n{second[:-1]}R\r\n"
    path = tmp_path / "a.fa"
    path.write_bytes(text.encode())
    return path


def test_a_fasta_becomes_parquet(student: Encoder, fasta: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "e.parquet"
    done = embed_file(student, fasta, out, length=20, overlap=5, batch=3, model_name="m")
    table = pq.read_table(out)
    rows = table.to_pylist()
    assert [(row["record"], row["start"], row["end"]) for row in rows] == [
        ("one", 0, 20),
        ("one", 15, 35),
        ("one", 30, 50),
        ("two", 0, 17),
    ]
    text = "".join(line.strip() for line in fasta.read_text().splitlines()[1:3]).upper()
    expected = embed_windows(student, np.frombuffer(text[15:35].encode(), np.uint8)[None])[0]
    np.testing.assert_allclose(rows[1]["embedding"], expected, atol=1e-5)
    assert table.schema.metadata[b"stillhouse.model"] == b"m"
    assert (done.windows, done.bases, done.width) == (4, 77, 16)
    assert "kb/s" in done.summary()
    assert [path.name for path in out.parent.iterdir()] == ["e.parquet"]


@pytest.mark.parametrize("pool", ["mean", "none"])
def test_both_formats_hold_the_same(student: Encoder, fasta: Path, tmp_path: Path, pool: str) -> None:
    for suffix in ("parquet", "safetensors"):
        embed_file(student, fasta, tmp_path / f"e.{suffix}", length=20, pool=pool, batch=2)  # type: ignore[arg-type]
    rows = pq.read_table(tmp_path / "e.parquet").to_pylist()
    held = load_file(tmp_path / "e.safetensors")
    with safe_open(tmp_path / "e.safetensors", framework="numpy") as file:
        about = file.metadata()
    assert json.loads(about["records"]) == ["one", "two"]
    assert held["record"].tolist() == [0, 0, 0, 1]
    assert held["start"].tolist() == [row["start"] for row in rows]
    assert held["end"].tolist() == [row["end"] for row in rows]
    if pool == "mean":
        np.testing.assert_array_equal(
            held["embedding"], np.array([row["embedding"] for row in rows], np.float32)
        )
    else:
        assert held["offset"].tolist() == [0, 20, 40, 50, 67]
        for row, start, end in zip(rows, held["offset"][:-1], held["offset"][1:], strict=True):
            np.testing.assert_array_equal(
                held["embedding"][start:end], np.array(row["embedding"], np.float32)
            )


def test_intervals_are_read_on_their_strand(student: Encoder, fasta: Path, tmp_path: Path) -> None:
    bed = tmp_path / "a.bed"
    bed.write_text("one\t10\t40\tx\t0\t-\none\t10\t40\ty\t0\t+\n")
    embed_file(student, fasta, tmp_path / "e.parquet", bed=bed, length=20)
    rows = pq.read_table(tmp_path / "e.parquet").to_pylist()
    assert [(row["name"], row["start"], row["end"], row["strand"]) for row in rows] == [
        ("x", 20, 40, "-"),
        ("x", 10, 20, "-"),
        ("y", 10, 30, "+"),
        ("y", 30, 40, "+"),
    ]
    text = "".join(line.strip() for line in fasta.read_text().splitlines()[1:3]).upper()
    expected = embed_windows(student, other_strand(np.frombuffer(text[20:40].encode(), np.uint8)[None]))[0]
    np.testing.assert_allclose(rows[0]["embedding"], expected, atol=1e-5)


@pytest.mark.parametrize("suffix", ["parquet", "safetensors"])
def test_nothing_is_left_of_a_failure(student: Encoder, fasta: Path, tmp_path: Path, suffix: str) -> None:
    whole = gzip.compress(fasta.read_bytes() + b">three\n" + b"ACGT" * 5000 + b"\n")
    (tmp_path / "cut.fa.gz").write_bytes(whole[:-20])
    (tmp_path / "protein.fa").write_text(">p\nMKLVEEPFQ\n")
    (tmp_path / "empty.fa").write_text("")
    for name in ("cut.fa.gz", "protein.fa", "empty.fa", "missing.fa"):
        with pytest.raises(DataError):
            embed_file(student, tmp_path / name, tmp_path / "deep" / "er" / f"e.{suffix}", length=20, batch=1)
        assert not (tmp_path / "deep").exists()
    older = tmp_path / f"old.{suffix}"
    older.write_text("kept")
    with pytest.raises(DataError):
        embed_file(student, tmp_path / "protein.fa", older)
    assert older.read_text() == "kept"


def test_options_that_cannot_work(student: Encoder, fasta: Path, tmp_path: Path) -> None:
    for out, options, message in (
        ("e.csv", {}, "must end in"),
        ("e.parquet", {"length": 20, "overlap": 20}, "--overlap 20"),
        ("e.parquet", {"pool": "max"}, "--pool max"),
    ):
        with pytest.raises(ConfigError, match=message):
            embed_file(student, fasta, tmp_path / out, **options)  # type: ignore[arg-type]
    (tmp_path / "d.parquet").mkdir()
    with pytest.raises(DataError, match="is a folder"):
        embed_file(student, fasta, tmp_path / "d.parquet")
