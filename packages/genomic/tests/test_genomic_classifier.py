"""A fine-tuned classifier as an artefact, and what it predicts of files."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from stillhouse.core.errors import ConfigError, DataError
from stillhouse.core.provenance import Licence
from stillhouse.core.run import Run
from stillhouse.genomic.cli import main
from stillhouse.genomic.data import reverse_complement
from stillhouse.genomic.finetune import (
    FinetuneConfig,
    evaluate_classifier,
    finetune_student,
    is_classifier,
    load_classifier,
    save_classifier,
)
from stillhouse.genomic.heads import Classifier, Head
from stillhouse.genomic.predict import LONGEST, predict_files
from stillhouse.genomic.student import StudentConfig, build_student
from stillhouse.genomic.student.store import save_student
from stillhouse.genomic.tokenizers import CharacterTokenizer

CLASSES = ("exon", "intron", "inter genic")
CONFIG = FinetuneConfig(epochs=1, batch=8, seeds=1, accelerator="cpu", conjoin=False)
NTV2 = Licence(
    what="teacher weights",
    name="nucleotide-transformer-v2-500m",
    licence="CC-BY-NC-SA-4.0",
    terms="Non-commercial use only.",
    commercial=False,
)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Small networks on a busy machine: more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(**change: object) -> Classifier:
    torch.manual_seed(1)
    sizes: dict = {"kind": "cnn", "width": 16, "conv_layers": 1, "attention_heads": 2, **change}
    encoder = build_student(StudentConfig(**sizes))
    return Classifier(encoder, Head(encoder.width, 3, "center"), CharacterTokenizer()).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ft") / "classifier"
    save_classifier(folder, build(), CLASSES, CONFIG, length=64, licences=[NTV2])
    return folder


def letters(count: int, length: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.frombuffer(b"ACGT", np.uint8)[rng.integers(0, 4, (count, length))]


def text(row: np.ndarray) -> str:
    return row.tobytes().decode()


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def expected(model: Classifier, window: np.ndarray, *, conjoin: bool = False) -> np.ndarray:
    with torch.no_grad():
        logits = model.conjoined(window[None]) if conjoin else model(window[None])
    found: np.ndarray = logits.double().softmax(-1).numpy()[0]
    return found


# ---- the artefact


@pytest.mark.parametrize("change", [{}, {"kind": "gdn", "gdn_layers": 1}, {"rc_equivariant": True}])
@pytest.mark.parametrize("compat", ["none", "reference"])
def test_a_round_trip_predicts_the_same(change: dict, compat: str, tmp_path: Path) -> None:
    model = build(**change)
    model.head.compat = compat  # type: ignore[assignment]
    config = replace(CONFIG, convention="caduceus", kind="gb", conjoin=True)
    artifact = save_classifier(tmp_path / "c", model, CLASSES, config, length=40)
    loaded = load_classifier(tmp_path / "c")
    assert (loaded.classes, loaded.conjoin, loaded.length) == (CLASSES, True, 40)
    assert loaded.scorer.label == "accuracy (caduceus)"
    assert loaded.classifier.head.pool == "center"
    assert loaded.classifier.head.compat == compat
    assert loaded.artifact.digest == artifact.digest
    x, lengths = letters(5, 40), [40, 31, 40, 20, 7]
    for row, length in zip(x, lengths, strict=True):
        row[length:] = ord("N")
    with torch.no_grad():
        assert torch.equal(loaded.classifier(x, lengths), model(x, lengths))
    again = save_classifier(tmp_path / "d", loaded.classifier, loaded.classes, config, length=40)
    one, two = artifact.tensors(), again.tensors()
    assert set(one) == set(two)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_card_carries_the_terms(saved: Path) -> None:
    card = (saved / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlicense: cc-by-nc-sa-4.0\nlibrary_name: stillhouse-genomic\n")
    assert "**nucleotide-transformer-v2-500m: CC-BY-NC-SA-4.0.** Non-commercial use only." in card
    assert load_classifier(saved).artifact.provenance["licences"][0]["commercial"] is False


def test_classes_must_fit_the_head(tmp_path: Path) -> None:
    for classes in (("a", "b"), ("a", "b", "b")):
        with pytest.raises(ValueError, match="the head has 3"):
            save_classifier(tmp_path / "c", build(), classes, CONFIG, length=40)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("damage", ["weights", "config", "missing", "added", "kind"])
def test_a_tampered_folder_is_one_line(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out, fasta = tmp_path / "c", tmp_path / "new" / "p.tsv", tmp_path / "a.fa"
    fasta.write_text(">a\nACGTACGT\n")
    save_classifier(folder, build(), CLASSES, CONFIG, length=40)
    if damage == "weights":
        raw = bytearray((folder / "model.safetensors").read_bytes())
        raw[-1] ^= 1
        (folder / "model.safetensors").write_bytes(raw)
    elif damage == "config":
        path = folder / "config.json"
        path.write_text(path.read_text().replace("center", "middle"))
    elif damage == "missing":
        (folder / "metrics.json").unlink()
    elif damage == "added":
        (folder / "more.txt").write_text("x")
    else:
        encoder = build().encoder
        save_student(tmp_path / "student", encoder, None, CharacterTokenizer())  # type: ignore[arg-type]
        folder = tmp_path / "student"
    assert main(["predict", str(folder), str(fasta), "--out", str(out)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert str(folder) in said
    assert not out.parent.exists()


def test_settings_that_do_not_describe_the_weights_are_one_line(tmp_path: Path) -> None:
    model = build()
    model.head.pool = "max"  # type: ignore[assignment]
    save_classifier(tmp_path / "c", model, CLASSES, CONFIG, length=40)
    with pytest.raises(DataError, match=r"config\.json: does not describe the weights .*fine-tune again"):
        load_classifier(tmp_path / "c")


# ---- predictions


def test_every_kind_of_file_is_predicted_alike(saved: Path, tmp_path: Path) -> None:
    loaded = load_classifier(saved)
    x = letters(5, 30)
    fasta, table, tsv, parquet, bed, genome = (
        tmp_path / name for name in ("a.fa.gz", "b.csv", "c.tsv", "d.parquet", "e.bed", "genome.fa")
    )
    soft = "".join(f">s{i} x\n{text(row).lower()}\n" for i, row in enumerate(x))
    fasta.write_bytes(gzip.compress(soft.encode()))
    table.write_text("Name,sequence,label\n" + "".join(f"s{i},{text(row)},?\n" for i, row in enumerate(x)))
    tsv.write_bytes(("id\tseq\r\n" + "".join(f"s{i}\t{text(row)}\r\n" for i, row in enumerate(x))).encode())
    pq.write_table(pa.table({"dna": [text(row) for row in x]}), parquet)
    genome.write_text(">chr\n" + "".join(map(text, x)) + "\n")
    intervals = "".join(f"chr\t{30 * i}\t{30 * i + 30}\ts{i}\t0\t+\n" for i in range(5))
    bed.write_text(intervals + "chr\t0\t30\tr\t0\t-\n")
    out = tmp_path / "p.tsv"
    seen: list[int] = []
    done = predict_files(
        loaded, [fasta, table, tsv, parquet, bed], out, reference=genome, batch=4, progress=seen.append
    )
    assert done.sequences == sum(seen) == 26
    assert done.bases == 26 * 30
    assert sum(done.counts.values()) == 26
    found = rows(out)
    assert list(found[0]) == [
        *("file", "record", "name", "start", "end", "strand", "predicted"),
        *(f"p_{name}" for name in CLASSES),
    ]
    want = [expected(loaded.classifier, row) for row in x]
    want_all = [*want * 5, expected(loaded.classifier, reverse_complement(x[0]))]
    for row, p in zip(found, want_all, strict=True):
        np.testing.assert_allclose([float(row[f"p_{name}"]) for name in CLASSES], p, atol=2e-5)
        assert row["predicted"] == CLASSES[int(p.argmax())]
    assert [row["record"] for row in found[:20:5]] == ["s0", "s0", "s0", "1"]
    last = [found[-1][column] for column in ("record", "name", "end", "strand")]
    assert last == ["chr", "r", "30", "-"]


def test_conjoined_predictions_do_not_know_the_strand(saved: Path, tmp_path: Path) -> None:
    x = letters(1, 40)[0]
    (tmp_path / "a.fa").write_text(f">a\n{text(x)}\n>b\n{text(reverse_complement(x))}\n")
    loaded = load_classifier(saved)
    tables = {}
    for conjoin in (True, False):
        predict_files(loaded, [tmp_path / "a.fa"], tmp_path / "p.parquet", conjoin=conjoin)
        tables[conjoin] = pq.read_table(tmp_path / "p.parquet").to_pylist()
    values = {key: [[row[f"p_{c}"] for c in CLASSES] for row in table] for key, table in tables.items()}
    np.testing.assert_allclose(values[True][0], values[True][1], atol=1e-6)
    np.testing.assert_allclose(values[True][0], expected(loaded.classifier, x, conjoin=True), atol=1e-6)
    assert not np.allclose(values[False][0], values[False][1], atol=1e-4)


def test_windows_of_long_sequences_and_sequences_of_n(saved: Path, tmp_path: Path) -> None:
    loaded = load_classifier(saved)
    loaded.classifier.head.pool = "mean"
    x = letters(1, 100)[0]
    x[60:] = ord("N")
    (tmp_path / "a.fa").write_text(f">a\n{text(x)}\n")
    out = tmp_path / "p.tsv"
    done = predict_files(loaded, [tmp_path / "a.fa"], out, window=30, overlap=10)
    found = rows(out)
    assert [(row["start"], row["end"]) for row in found] == [
        ("0", "30"), ("20", "50"), ("40", "70"), ("60", "90"), ("80", "100")
    ]  # fmt: skip
    assert [bool(row["predicted"]) for row in found] == [True, True, True, False, False]
    assert found[-1]["p_exon"] == ""
    assert done.unknown == 2
    whole = expected(loaded.classifier, x[40:60])  # N at the end is padding
    np.testing.assert_allclose(float(found[2]["p_exon"]), whole[0], atol=2e-5)


BAD = {
    "protein.fa": b">a\nMKLVEEPFQ\n",
    "second.fa": b">a\nACGT\n>b\nMKLV\n",
    "empty.fa": b"",
    "cut.fa.gz": gzip.compress(b">a\n" + b"ACGT" * 9000)[:-20],
    "columns.csv": b"a,b\n1,2\n",
    "letters.csv": b"sequence\nACGT\nAC-T\n",
    "ragged.csv": b"sequence,label\nACGT,1\nACGT\n",
    "nothing.csv": b"sequence,label\n",
    "blank.csv": b"sequence,label\n,1\n",
    "kmers.csv": b"sequence,label\nACGTAC CGTACG,1\n",
    "torn.parquet": b"PAR1xxxx",
    "past.bed": b"chr\t0\t900\n",
    "long.fa": b">a\n" + b"ACGT" * (LONGEST // 4 + 1) + b"\n",
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("suffix", ["tsv", "parquet"])
def test_bad_input_is_one_line_and_nothing_is_written(
    name: str, suffix: str, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out, genome = tmp_path / name, tmp_path / "new" / f"p.{suffix}", tmp_path / "g.fa"
    path.write_bytes(BAD[name])
    genome.write_text(">chr\nACGTACGT\n")
    assert main(["predict", *map(str, (saved, path)), "--reference", str(genome), "--out", str(out)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert name in captured.err
    assert not out.parent.exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--out", "p.csv"), "must end in"),
        (("--out", "p.tsv", "--overlap", "3"), "needs --window"),
        (("--out", "p.tsv", "--window", "20", "--overlap", "20"), "less than --window"),
        (("--out", "a.tsv"), "one of the files to read"),
        ((), "--out"),
    ],
)
def test_wrong_options_are_two(
    more: tuple[str, ...], message: str, saved: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    Path("a.tsv").write_text("sequence\nACGT\n")
    assert main(["predict", str(saved), "a.tsv", *more]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.tsv"]
    Path("b.bed").write_text("chr\t0\t4\n")
    assert main(["predict", str(saved), "b.bed", "--out", "p.tsv"]) == 2
    assert "--reference" in capsys.readouterr().err
    assert main(["predict", "nowhere", "a.tsv", "--out", "p.tsv"]) == 2
    assert "nowhere" in capsys.readouterr().err


# ---- from fine-tuning to evaluation


def test_fine_tuning_leaves_a_classifier_that_scores_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    student = tmp_path / "student"
    encoder = build_student(StudentConfig(kind="cnn", width=16, conv_layers=1, attention_heads=2))
    save_student(student, encoder, None, CharacterTokenizer(), licences=[NTV2])
    x, labels = letters(60, 24), np.random.default_rng(1).integers(0, 2, 60)
    lines = [
        f"{text(row)},{'ab'[label]},{'train' if i < 40 else 'test'},g{i // 2}"
        for i, (row, label) in enumerate(zip(x, labels, strict=True))
    ]
    table = tmp_path / "t.csv"
    table.write_text("sequence,label,split,group\n" + "\n".join(lines) + "\n")
    run = Run(out=tmp_path / "ft", device="cpu", json=True)
    result = finetune_student(student, table, replace(CONFIG, conjoin=True, seeds=2), run)
    assert Path(result["artifact"]) == (tmp_path / "ft" / "classifier").resolve()
    assert is_classifier(tmp_path / "ft")
    assert not is_classifier(student)
    loaded = load_classifier(tmp_path / "ft")
    assert loaded.classes == ("a", "b")
    entries = loaded.artifact.provenance["licences"]
    assert [entry["what"] for entry in entries] == ["teacher weights", "labelled sequences"]
    assert "license: cc-by-nc-sa-4.0" in loaded.card
    kept = json.loads((tmp_path / "ft" / "finetune.json").read_text())
    best = max(kept["seeds"], key=lambda one: one["validation"])
    assert loaded.artifact.metrics["seed"] == best["seed"]

    scored = evaluate_classifier(tmp_path / "ft", table, Run(out=tmp_path / "e", device="cpu", json=True))
    assert scored["sequences"] == 20
    for key, value in best["scores"].items():
        assert scored["scores"][key] == pytest.approx(value)
    capsys.readouterr()
    call = ["evaluate", str(tmp_path / "ft"), "--data", str(table), "--out", str(tmp_path / "e2"), "--json"]
    assert main([*call, "--device", "cpu"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["scores"]["mcc"]["estimate"] == pytest.approx(best["scores"]["mcc"]["estimate"])
    assert json.loads((tmp_path / "e2" / "evaluation.json").read_text())["metric"] == "mcc (plain)"

    with pytest.raises(ConfigError, match="--data"):
        evaluate_classifier(tmp_path / "ft", None, Run(out=tmp_path / "e3"))
    table.write_text("sequence,label\nACGT,a\nACGT,c\n")
    with pytest.raises(DataError, match="'c' is not among the classes"):
        evaluate_classifier(tmp_path / "ft", table, Run(out=tmp_path / "e3"))
    assert not (tmp_path / "e3").exists()
