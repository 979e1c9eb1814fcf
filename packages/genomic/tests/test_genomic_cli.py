from __future__ import annotations

import csv
import gzip
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from stillhouse.core.config import load_config
from stillhouse.core.errors import DataError
from stillhouse.genomic.cli import main
from stillhouse.genomic.config import GenomicConfig
from stillhouse.genomic.corpus import read_corpus
from stillhouse.genomic.student import MaskedDecoder, StudentConfig, build_student
from stillhouse.genomic.student.store import save_student
from stillhouse.genomic.tokenizers import CharacterTokenizer

VERBS = (
    *("pretrain", "finetune", "predict", "evaluate", "embed", "score-variants", "report", "tasks"),
    *("simulate", "demo"),
)
HEADER = "##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n"
GENE = "ACGTTGCATGCCGATTACGGATCCTAGCTAGGCTTAACGGTACCATTGACCATGCGTACGATCGGATATCCGA"


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Small networks on a busy machine: more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished student of random weights, in the folder of a run."""
    torch.manual_seed(0)
    encoder = build_student(StudentConfig(kind="cnn", width=16, conv_layers=1, attention_heads=2))
    folder = tmp_path_factory.mktemp("run") / "student"
    save_student(folder, encoder, MaskedDecoder(width=16, heads=2), CharacterTokenizer())
    return folder


@pytest.fixture
def fasta(tmp_path: Path) -> Path:
    path = tmp_path / "genome.fa"
    path.write_text(f">chr1 first\n{GENE}\n{GENE.lower()}\n>chr2\n{GENE[:40]}\n")
    return path


def call(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def fails(capsys: pytest.CaptureFixture[str], code: int, *arguments: object) -> str:
    """Run, check the code, and return the one line on the standard error."""
    capsys.readouterr()
    assert call(*arguments) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    if code == 1:
        assert captured.err.count("\n") == 1, captured.err
        assert captured.err.startswith("error: ")
    assert "Traceback" not in captured.err
    return " ".join(captured.err.split())


def listing(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


# ---- help and usage


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom stillhouse.genomic.cli import main\ncode = main(['--help'])\n"
        "heavy = {'torch', 'transformers', 'sklearn', 'numpy', 'pyarrow', 'Bio'} & set(sys.modules)\n"
        "assert not heavy, heavy\nsys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for verb in VERBS:
        assert verb in done.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(verb, "--help") == 0
    assert "Usage" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("embed", "{student}", "{fasta}"), "--out"),
        (("embed", "{student}", "{fasta}", "--out", "e.csv"), "must end in"),
        (("embed", "{student}", "{fasta}", "--out", "e.parquet", "--overlap", "2000"), "--overlap 2000"),
        (("embed", "{student}", "{fasta}", "--out", "e.parquet", "--pool", "max"), "--pool max"),
        (("embed", "nowhere", "{fasta}", "--out", "e.parquet"), "nowhere: no such folder"),
        (("score-variants", "{student}", "a.vcf"), "FASTA"),
        (("score-variants", "{student}", "a.vcf", "{fasta}", "--out", "s.csv"), "must end in"),
        (
            ("score-variants", "{student}", "a.vcf", "{fasta}", "--out", "s.tsv", "--group", "400"),
            "--group 400",
        ),
        (
            ("score-variants", "{student}", "a.vcf", "{fasta}", "--out", "s.tsv", "--strands", "x"),
            "--strands x",
        ),
        (("finetune", "{student}", "{fasta}", "--preset", "nbt"), "--preset nbt"),
        (("finetune", "{student}", "{fasta}", "--preset", "ntb"), "needs --kind"),
        (("finetune", "{student}", "{fasta}", "--kind", "promotor"), "promotor"),
        (("pretrain",), "--fasta"),
        (("pretrain", "--fasta", "nowhere.fa"), "nowhere.fa: no such file"),
        (
            ("pretrain", "--fasta", "{fasta}", "--annotation", "{fasta}", "--annotation", "{fasta}"),
            "2 times for 1",
        ),
        (("tasks", "--fasta", "{fasta}", "--task", "exons"), "--task exons"),
        (("tasks", "--fasta", "{fasta}", "--decoys", "soft"), "soft"),
        (("simulate", "--kilobases", "1"), "--kilobases"),
        (("nonsense",), "nonsense"),
    ],
)
def test_wrong_usage_is_two_and_writes_nothing(
    arguments: tuple[str, ...],
    message: str,
    student: Path,
    fasta: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    before = listing(tmp_path)
    filled = [one.format(student=student, fasta=fasta) for one in arguments]
    assert message in fails(capsys, 2, *filled)
    assert listing(tmp_path) == before


def test_what_is_no_student_is_one_line(
    student: Path, fasta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty, torn = tmp_path / "empty", tmp_path / "torn"
    empty.mkdir()
    shutil.copytree(student, torn)
    (torn / "model.safetensors").write_bytes(b"x")
    for folder in (empty, torn):
        assert str(folder) in fails(capsys, 1, "embed", folder, fasta, "--out", tmp_path / "e.parquet")
    assert not (tmp_path / "e.parquet").exists()


# ---- bad sequences: each is one line, by a stated rule, and nothing is half-written


BAD_FASTA = {
    "protein": (b">a\n" + b"MKLVEEPFQHINS" * 5000 + b"\n", "protein.fa"),
    "duplicate": (b">a\nACGT\n>a\nACGT\n", "'a'"),
    "empty record": (b">a\nACGT\n>b\n>c\nACGT\n", "'b'"),
    "no header": (b"ACGT\n", "begin"),
    "empty file": (b"", "fa"),
    "truncated gz": (gzip.compress(b">a\n" + b"ACGT" * 20000 + b"\n")[:-30], "fa"),
    "binary": (bytes(range(256)), "fa"),
}


@pytest.mark.parametrize("kind", BAD_FASTA)
@pytest.mark.parametrize("verb", ["embed", "score-variants", "pretrain", "tasks"])
def test_bad_sequences_are_one_line(
    kind: str, verb: str, student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, named = BAD_FASTA[kind]
    path = tmp_path / f"{kind.replace(' ', '-')}.fa{'.gz' if 'gz' in kind else ''}"
    path.write_bytes(content)
    vcf = tmp_path / "v.vcf"
    vcf.write_text(HEADER + "a\t2\t.\tC\tT\t.\t.\t.\n")
    out = tmp_path / "new" / ("out" if verb in ("pretrain", "tasks") else "out.parquet")
    before = listing(tmp_path)
    arguments: dict[str, list[object]] = {
        "embed": ["embed", student, path],
        "score-variants": ["score-variants", student, vcf, path],
        "pretrain": ["pretrain", "--fasta", path],
        "tasks": ["tasks", "--fasta", path, "--fasta", path],
    }
    said = fails(capsys, 1, *arguments[verb], "--out", out)
    assert path.name in said
    assert named in said
    assert listing(tmp_path) - before <= {f"{path.name}.fai", f"{path.name}.gzi"}


def test_lower_case_iupac_and_crlf_are_read(
    student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, odd = tmp_path / "plain.fa", tmp_path / "odd.fa"
    plain.write_text(f">a\n{GENE}NNACGT\n")
    odd.write_bytes(f">a\r\n{GENE.lower()}RYacgu\r\n".encode())
    rows = []
    for path in (plain, odd):
        out = path.with_suffix(".parquet")
        assert call("embed", student, path, "--out", out, "--json") == 0
        assert json.loads(capsys.readouterr().out)["windows"] == 1
        rows.append(pq.read_table(out).to_pylist()[0]["embedding"])
    np.testing.assert_array_equal(rows[0], rows[1])


def test_a_bed_past_the_end_is_one_line(
    student: Path, fasta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bed = tmp_path / "a.bed"
    for line, named in (
        ("chr1\t0\t5000\n", "chr1"),
        ("chr9\t0\t10\n", "chr9"),
        ("chr1\t30\t20\n", "line 1"),
        ("chr1\tx\t20\n", "line 1"),
    ):
        bed.write_text(line)
        said = fails(capsys, 1, "embed", student, fasta, "--bed", bed, "--out", tmp_path / "e.parquet")
        assert "a.bed" in said
        assert named in said
        said = fails(capsys, 1, "pretrain", "--fasta", fasta, "--bed", bed, "--out", tmp_path / "run")
        assert named in said
    assert not (tmp_path / "e.parquet").exists()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("bases", "more", "remedy"),
    [
        (200, (), "give at least 60,000 bp"),
        (9_000, (), "set data.block to 4000 and data.validation to 0"),
        (13_000, (), "set data.block to 4000"),
        (9_000, ("data.block=4000", "data.validation=0"), ""),
        (13_000, ("data.block=4000",), ""),
        (904, ("data.block=60000",), "give at least 180,000 bp"),
    ],
)
@pytest.mark.parametrize("both", [False, True])
def test_a_genome_too_short_to_cut_is_named_with_a_remedy_that_helps(
    bases: int, more: tuple[str, ...], remedy: str, both: bool, tmp_path: Path
) -> None:
    paths = [tmp_path / "short.fa", tmp_path / "long.fa"]
    for path, size in zip(paths, (bases, 200_000), strict=True):
        path.write_text(f">a\n{'ACGTTGCA' * (size // 8)}\n")
    files = json.dumps([str(path) for path in paths[: 1 + both]])
    config = load_config(GenomicConfig, {}, overrides=[f"data.fasta={files}", "data.length=256", *more])
    if not remedy:
        corpus = read_corpus(config)
        assert len(corpus.training()) > 0
        return
    with pytest.raises(DataError) as caught:
        read_corpus(config)
    message = str(caught.value)
    assert message.startswith(f"{paths[0]}: {bases:,} bp in 1 record are too few")
    assert message.count("\n") == 0
    assert remedy in message
    assert ("leave it out" in message) == (both and "at least" in remedy)


@pytest.mark.parametrize("verb", ["pretrain", "train"])
def test_too_short_a_genome_is_one_line(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "short.fa"
    path.write_text(f">a\n{GENE}\n")
    given = (
        ["--fasta", path] if verb == "pretrain" else ["--set", f'data.fasta=["{path}"]', "--config", "demo"]
    )
    said = fails(capsys, 1, verb, *given, "--out", tmp_path / "run")
    assert f"short.fa: {len(GENE)} bp in 1 record are too few" in said
    assert listing(tmp_path) <= {"short.fa", "short.fa.fai"}


# ---- the verbs at work


def test_embed_for_people_and_as_json(
    student: Path, fasta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "e.safetensors"
    assert call("embed", student.parent, fasta, "--out", out, "--length", 50, "--overlap", 10) == 0
    assert "kb/s" in capsys.readouterr().out
    assert call("embed", student, fasta, "--out", out, "--pool", "none", "--conjoin", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["windows"], result["bases"], result["width"]) == (2, 2 * len(GENE) + 40, 16)


def test_variants_are_scored(
    student: Path, fasta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vcf, out = tmp_path / "v.vcf", tmp_path / "s.tsv"
    other = "A" if GENE[20] != "A" else "C"
    vcf.write_text(HEADER + f"chr1\t21\trs1\t{GENE[20]}\t{other},{GENE[20]}T\t.\t.\t.\n")
    arguments = ("score-variants", student, vcf, fasta, "--out", out, "--window", 32)
    assert call(*arguments, "--json") == 0
    assert json.loads(capsys.readouterr().out)["skipped"] == {"indel": 1}
    with out.open() as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert [row["status"] for row in rows] == ["scored", "indel"]
    mean = (float(rows[0]["score_forward"]) + float(rows[0]["score_reverse"])) / 2
    assert float(rows[0]["score"]) == pytest.approx(mean, abs=1e-4)
    out.unlink()
    vcf.write_text(
        HEADER + f"chr1\t21\trs1\t{other}\t{GENE[20]}\t.\t.\t.\nchr1\t22\t.\t{GENE[21]}\tN\t.\t.\t.\n"
    )
    said = fails(capsys, 1, *arguments)
    assert "line 3" in said
    assert "--skip-mismatches" in said
    assert not out.exists()
    assert call(*arguments, "--skip-mismatches") == 0
    assert "1 mismatch" in capsys.readouterr().out


@pytest.fixture(scope="module")
def genomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Two simulated genomes as files."""
    from stillhouse.genomic.write import write_simulated

    made: dict[str, list[str]] = write_simulated(tmp_path_factory.mktemp("genomes"), seed=1, kilobases=100)
    return made


def test_simulate_writes_genomes_and_their_annotation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("simulate", "--out", tmp_path / "sim", "--seed", 1, "--kilobases", 40, "--json") == 0
    made = json.loads(capsys.readouterr().out)
    assert len(made["fasta"]) == len(made["annotation"]) == 2
    assert Path(made["fasta"][0]).read_text().startswith(">")


def test_annotated_genomes_become_tasks_and_a_classifier(
    student: Path, genomes: dict[str, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files: list[object] = []
    for fasta, annotation in zip(genomes["fasta"], genomes["annotation"], strict=True):
        files += ["--fasta", fasta, "--annotation", annotation]
    arguments = ("tasks", *files, "--length", 64, "--limit", 60)
    assert call(*arguments, "--out", tmp_path / "tasks", "--json") == 0
    rows = {row["task"]: row for row in json.loads(capsys.readouterr().out)["tasks"]}
    assert {"donor", "acceptor", "regions", "species"} <= {name.split()[0].rstrip(",") for name in rows}
    for row in rows.values():
        with open(row["file"], newline="") as file:
            lines = list(csv.DictReader(file))
        assert {len(line["sequence"]) for line in lines} == {64}
        parts = {
            part: {line["group"] for line in lines if line["split"] == part} for part in ("train", "test")
        }
        assert parts["train"]
        assert parts["test"]
        assert not parts["train"] & parts["test"]
    first = next(iter(rows.values()))["file"]
    arguments = ("finetune", student, first, "--epochs", 1, "--seeds", 1, "--out", tmp_path / "ft")
    assert call(*arguments, "--device", "cpu", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["metric"] == "mcc (plain)"
    assert Path(result["report"]).is_file()
    arguments = ("predict", tmp_path / "ft", first, genomes["fasta"][0], "--window", 200)
    assert call(*arguments, "--out", tmp_path / "p.parquet", "--device", "cpu", "--json") == 0
    done = json.loads(capsys.readouterr().out)
    assert done["sequences"] == pq.read_table(tmp_path / "p.parquet").num_rows > 500
    assert sum(done["counts"].values()) + done["unknown"] == done["sequences"]


@pytest.mark.parametrize("task", ["donor", "species"])
def test_a_task_that_the_files_do_not_allow_is_one_line(
    task: str, genomes: dict[str, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    said = fails(capsys, 1, "tasks", "--fasta", genomes["fasta"][0], "--task", task, "--out", out)
    assert task in said
    assert not out.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"sequence,label\n",
        b"sequence\nACGT\n",
        b"sequence,label\nMKLV,a\n",
        b"a,b\n1,2\n",
        b"\xff\xfe\x00",
    ],
)
def test_bad_tables_are_one_line(
    content: bytes, student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(content)
    before = listing(tmp_path)
    said = fails(capsys, 1, "finetune", student, path, "--out", tmp_path / "ft")
    assert "t.csv" in said
    assert listing(tmp_path) == before
