"""The whole run: train, kill, resume, two processes, evaluate, export, report; and the method's own test."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stillhouse.core.config import load_config
from stillhouse.core.testing import run_ranks, run_script
from stillhouse.genomic.cli import main
from stillhouse.genomic.config import GenomicConfig
from stillhouse.genomic.corpus import intersection, probe_tasks, read_corpus, restrict, without_copies
from stillhouse.genomic.data import Feature, Genome, Interval, introns, pack, read_labelled
from stillhouse.genomic.distiller import view_of
from stillhouse.genomic.fit import fit_student, fit_teacher
from stillhouse.genomic.run import ALONE, RANDOM, STUDENTS, TEACHER, config_of
from stillhouse.genomic.student.store import load_student
from stillhouse.genomic.teacher import KmerTeacher, load_teacher
from stillhouse.genomic.tokenizers import CharacterTokenizer

STUDENT = STUDENTS["had"]
TINY: dict[str, Any] = {
    "data": {"simulate_kilobases": 40, "length": 96, "block": 4000, "test": 0.3, "validation": 0.0},
    "model": {"width": 16, "gdn_layers": 1, "mlp_ratio": 1.0},
    "teacher": {"width": 32, "depth": 2, "heads": 2, "steps": 6, "batch": 4},
    "distill": {"batch": 4, "gradient_every": 2},
    "train": {"steps": 6, "log_every": 2, "checkpoint_every": 2, "threads": 1},
    "evaluate": {"length": 64, "site_length": 48, "limit": 40, "resamples": 100},
}


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.json"
    path.write_text(json.dumps(TINY))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_file: Path) -> Path:
    """The folder of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    assert main(["train", "--config", str(tiny_file), "--out", str(out), "--seed", "3"]) == 0
    return out


# ---- what a run leaves behind


def test_a_run_leaves_a_student_results_and_a_page(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    assert [row["name"] for row in results["models"]] == [TEACHER, STUDENT, ALONE, RANDOM]
    assert [row["name"] for row in results["tasks"]] == [
        "donor, hard decoys",
        "acceptor, hard decoys",
        "regions",
        "species",
    ]
    assert set(results["scores"]) == {TEACHER, STUDENT, ALONE, RANDOM}
    page = (finished / "report.html").read_text()
    assert "simulated" in page
    loaded = load_student(finished)
    assert loaded.decoder is not None
    assert loaded.training["train"]["seed"] == 3
    assert config_of(finished).train.seed == 3
    assert "simulated" in loaded.card
    teacher = load_teacher(finished / "teacher")
    assert teacher.parameters == results["models"][0]["parameters"]


def test_the_log_holds_both_terms_and_their_gradient_norms(finished: Path) -> None:
    rows = [json.loads(line) for line in (finished / "fit/student/log.jsonl").read_text().splitlines()]
    named = {"align", "reconstruct", "gradient_align", "gradient_reconstruct"}
    assert all(named <= set(row["terms"]) for row in rows)
    assert all(row["terms"]["gradient_align"] > 0 for row in rows)


def test_no_weight_of_the_teacher_is_in_the_student(finished: Path) -> None:
    from stillhouse.core.train import latest_checkpoint, load_checkpoint

    checkpoint = latest_checkpoint(finished / "fit/student/checkpoints")
    assert checkpoint is not None
    state = load_checkpoint(checkpoint).parts["weights.student"]
    assert {name.split(".")[0] for name in state} == {"encoder", "decoder", "projectors"}
    saved = load_student(finished).artifact.tensors()
    assert {name.split(".")[0] for name in saved} == {"student", "decoder"}


def test_the_student_is_a_model_of_transformers(finished: Path) -> None:
    from transformers import AutoModel, AutoModelForMaskedLM

    import stillhouse.genomic.huggingface  # noqa: F401, registers the classes

    model = AutoModel.from_pretrained(finished / "student").eval()
    ids = torch.tensor([[7, 8, 9, 10, 7, 7]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).last_hidden_state, load_student(finished).encoder(ids))
    assert AutoModelForMaskedLM.from_pretrained(finished / "student")(ids).logits.shape == (1, 6, 16)


def test_evaluate_gives_the_scores_that_the_run_gave(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = json.loads((finished / "results.json").read_text())
    for folder, out in ((finished / "student", "a"), (finished, "b")):
        assert main(["evaluate", str(folder), "--out", str(tmp_path / out), "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        for task, score in results["scores"][STUDENT].items():
            assert told["scores"][task]["estimate"] == pytest.approx(score["estimate"], abs=1e-6)


def test_tasks_that_were_written_can_be_evaluated_on(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", "--kilobases", "60", "--out", str(tmp_path / "g")]) == 0
    genomes = [str(path) for path in sorted((tmp_path / "g").glob("*.fa"))]
    models = [str(Path(path).with_suffix(".gff3")) for path in genomes]
    options = [x for f, a in zip(genomes, models, strict=True) for x in ("--fasta", f, "--annotation", a)]
    arguments = ["tasks", *options, "--task", "regions", "--length", "64", "--limit", "60"]
    for format in ("csv", "tsv", "parquet"):
        out = tmp_path / format
        assert main([*arguments, "--format", format, "--out", str(out)]) == 0
        items = read_labelled(out / f"regions.{format}", group="group", split="split")
        assert set(items.split or ()) == {"train", "test"}
        assert set(items.classes) == {"exon", "intron", "intergenic"}
        train, test = items.part("train"), items.part("test")
        assert not set(train.groups) & set(test.groups)
    capsys.readouterr()
    data = str(tmp_path / "csv" / "regions.csv")
    assert main(["evaluate", str(finished), "--data", data, "--out", str(tmp_path / "e"), "--json"]) == 0
    assert "estimate" in next(iter(json.loads(capsys.readouterr().out)["scores"].values()))


def test_report_and_export_read_a_finished_run(finished: Path, tmp_path: Path) -> None:
    from transformers import AutoModel

    before = (finished / "report.html").read_bytes()
    assert main(["report", str(finished), "--out", str(tmp_path / "elsewhere")]) == 0
    assert (tmp_path / "elsewhere" / "report.html").read_bytes() == before
    out = tmp_path / "x"
    assert main(["export", str(finished), "--format", "huggingface", "--out", str(out)]) == 0
    assert not (out / "artifact.json").exists()
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    ids = torch.tensor([[7, 8, 9, 10]])
    with torch.no_grad():
        got = AutoModel.from_pretrained(out).eval()(ids).last_hidden_state
        torch.testing.assert_close(got, load_student(finished).encoder(ids))


# ---- what a run must survive


def test_killed_and_started_again_it_ends_with_the_same_weights(
    finished: Path, tiny_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    arguments = ["train", "--config", str(tiny_file), "--out", str(out), "--seed", "3"]
    at = np.random.default_rng().choice(["teacher", "student"])

    def far_enough() -> bool:
        return any((out / "fit" / at / "checkpoints").glob("step-*"))

    killed = run_script(["-m", "stillhouse.genomic", *arguments], kill_when=far_enough, timeout=300)
    assert killed.returncode == -9
    assert not (out / "report.html").exists()
    assert main(arguments) == 0
    one, two = (load_student(folder).artifact.tensors() for folder in (finished, out))
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


def _student_weights(replicas: int) -> dict[str, Any]:
    """Weights of a student after some steps, of each of two ranks or of one process with both parts."""
    torch.use_deterministic_algorithms(True)
    settings = {**TINY, "train": {"steps": 4, "devices": replicas, "threads": 1, "accelerator": "cpu"}}
    config = load_config(GenomicConfig, settings)
    corpus = read_corpus(config)
    torch.manual_seed(0)
    from stillhouse.genomic.teacher import KmerTransformer

    teacher = KmerTeacher(KmerTransformer(config.teacher.network()))
    encoder, decoder, _ = fit_student(config, corpus, teacher, seed=0, out=None, quiet=True)
    assert decoder is not None
    return {
        name: value.tolist()
        for part in (encoder, decoder)
        for name, value in part.named_parameters(prefix=type(part).__name__)
    }


@pytest.mark.slow
def test_two_processes_train_the_student_as_one_does() -> None:
    two = run_ranks(_student_weights, 2, 2, timeout=300)
    assert two[0] == two[1]
    one = _student_weights(1)
    assert one.keys() == two[0].keys()
    for name, value in one.items():
        np.testing.assert_allclose(np.array(value), np.array(two[0][name]), atol=2e-5, err_msg=name)


@pytest.mark.slow
def test_torchrun_trains_every_row_and_one_process_writes(tiny_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "two"
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    train = ["-m", "stillhouse.genomic", "train", "--config", str(tiny_file), "--out", str(out)]
    done = run_script([*command, *train, "--set", "train.accelerator=cpu"], timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((out / "results.json").read_text())
    assert [row["name"] for row in results["models"]] == [TEACHER, STUDENT, ALONE, RANDOM]
    assert done.stdout.count("report.html") == 1


@pytest.mark.parametrize("method", ["distill_only", "reconstruct_only", "masked_only", "logit_kd", "none"])
def test_every_method_trains_and_leaves_what_it_should(method: str) -> None:
    config = load_config(GenomicConfig, {**TINY, "distill": {"batch": 4, "method": method}})
    config = replace(config, train=replace(config.train, steps=2))
    corpus = read_corpus(config)
    torch.manual_seed(0)
    from stillhouse.genomic.teacher import KmerTransformer

    teacher = KmerTeacher(KmerTransformer(config.teacher.network()))
    encoder, decoder, facts = fit_student(config, corpus, teacher, seed=0, out=None, quiet=True)
    assert (decoder is not None) == config.distill.reconstructs
    assert facts["steps"] == (0 if method == "none" else 2)
    assert not encoder.training


def test_a_teacher_of_an_earlier_run_is_read_and_bad_sources_are_one_line(
    finished: Path, tmp_path: Path, tiny_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from stillhouse.genomic.fit import read_teacher

    config = load_config(GenomicConfig, {**TINY, "teacher": {"source": str(finished)}})
    teacher = read_teacher(config)
    assert teacher.parameters == load_teacher(finished / "teacher").parameters
    arguments = ["train", "--config", str(tiny_file), "--out", str(tmp_path / "no")]
    assert main([*arguments, "--set", f"teacher.source={tmp_path / 'nowhere'}"]) == 1
    assert "is not there" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
    assert main([*arguments, "--set", f'data.fasta=["{tmp_path / "nowhere.fa"}"]']) == 1
    assert "no such file" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_a_genome_without_annotation_trains_and_says_that_it_was_not_probed(
    tmp_path: Path, tiny_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    letters = bytes(rng.choice(list(b"ACGT"), 30_000).astype(np.uint8)).decode()
    (tmp_path / "one.fa").write_text(">one\n" + "\n".join(letters[i : i + 60] for i in range(0, 30_000, 60)))
    (tmp_path / "one.bed").write_text("one\t0\t20000\n")
    out = tmp_path / "run"
    arguments = ["pretrain", "--fasta", str(tmp_path / "one.fa"), "--bed", str(tmp_path / "one.bed")]
    assert main([*arguments, "--config", str(tiny_file), "--out", str(out), "--seed", "0"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "no task 'donor'" in said
    assert "of the training blocks that" in said
    results = json.loads((out / "results.json").read_text())
    assert results["tasks"] == []
    assert (out / "report.html").is_file()


# ---- the cut


def test_parts_share_no_base_and_no_window_of_a_task_reaches_over_them() -> None:
    config = load_config(GenomicConfig, {**TINY, "data": {**TINY["data"], "validation": 0.2}})
    corpus = read_corpus(config)
    seen: dict[str, dict[str, np.ndarray]] = {}
    for part, blocks in corpus.parts.items():
        for block in blocks:
            genome, record = block.record.split("/")
            length = next(g for g in corpus.genomes if g.name == genome).lengths[record]
            marks = seen.setdefault(part, {}).setdefault(block.record, np.zeros(length, bool))
            marks[block.start : block.end] = True
    for one, two in (("train", "test"), ("train", "validation"), ("validation", "test")):
        for record in set(seen[one]) & set(seen[two]):
            assert not (seen[one][record] & seen[two][record]).any()
    # Every pre-training window, found by its letters, lies in a training block.
    train = {bytes(g.records[r]) for g in corpus.cut("train") for r in g.records}
    windows = corpus.training()
    for index in range(0, len(windows), 7):
        letters = windows[(index, index)]
        strands = (letters.tobytes(), bytes(np.asarray(_turned(letters))))
        assert any(strand in block for block in train for strand in strands)
    tasks, left_out = probe_tasks(corpus, config.evaluate, seed=0, part="validation")
    assert not [text for text in left_out if "species" in text]
    for task in tasks:
        assert not set(task.fit.groups) & set(task.score.groups)


def _turned(letters: np.ndarray) -> np.ndarray:
    from stillhouse.genomic.data import reverse_complement

    return reverse_complement(letters)


def test_a_restricted_genome_keeps_what_lies_inside_and_makes_no_splice_site_at_its_end() -> None:
    exons = [(100, 200), (300, 400), (500, 600)]
    features = (
        Feature(record="r", type="mRNA", start=100, end=600, strand="+", id="t"),
        *(Feature(record="r", type="exon", start=a, end=b, strand="+", parents=("t",)) for a, b in exons),
    )
    genome = Genome("g", {"r": np.full(1000, ord("A"), np.uint8)}, features)
    cut = restrict(genome, [Interval("r", 0, 350), Interval("r", 350, 1000)])
    assert list(cut.records) == ["r:0-350", "r:350-1000"]
    assert [(str(gap), gap.name) for gap in introns(cut)] == [
        ("r:0-350:200-300", "t@0"),
        ("r:350-1000:50-150", "t@350"),
    ]
    assert sum(len(f) for f in cut.features if f.type == "exon") == 300


def test_windows_that_repeat_a_stretch_of_the_fitted_ones_are_not_scored() -> None:
    rng = np.random.default_rng(0)
    fit, score = (np.frombuffer(b"ACGT", np.uint8)[rng.integers(0, 4, (6, 90))].copy() for _ in range(2))
    fit[4, 54] = fit[4, 86] = ord("A")
    score[1, 10:42] = fit[4, 55:87]  # 32 letters
    score[2, 10:41] = fit[4, 55:86]  # one fewer, and other letters beside it
    score[2, 9] = score[2, 41] = ord("C")
    score[3, 20:80] = fit[0, 20:80] = ord("N")
    made = [pack("t", list(side), [0, 1] * 3, ("a", "b"), ["g"] * 6) for side in (fit, score)]
    kept = {row.tobytes() for row in without_copies(*made).sequences}
    assert kept == {row.tobytes() for row in score[[0, 2, 3, 4, 5]]}


def test_intersection_counts_every_base_once() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        edges = np.sort(rng.choice(100, 6, replace=False))
        blocks = [Interval("a", int(a), int(b)) for a, b in edges.reshape(3, 2)]
        wanted = [
            Interval("a", int(a), int(a + n))
            for a, n in zip(rng.integers(0, 90, 5), rng.integers(1, 20, 5), strict=True)
        ]
        inside = {i for block in blocks for i in range(block.start, block.end)}
        asked = {i for item in wanted for i in range(item.start, item.end)}
        got = [i for item in intersection(blocks, wanted) for i in range(item.start, item.end)]
        assert sorted(got) == sorted(inside & asked)


# ---- the method, on simulated genomes: what must come out in this order


def _explained(encoder: Any, teacher: KmerTeacher, windows: np.ndarray, fit: int) -> float:
    """Share of the variance of the teacher's features that a ridge regression on the student's explains, on
    windows that it was not fitted on."""
    view = view_of(windows, CharacterTokenizer(), teacher.tokenizer)
    with torch.no_grad():
        features = view.tokens.pool(encoder(view.ids, attend=view.attend))
    (targets,) = teacher.features(view.tokens)
    sides = []
    for rows in (slice(0, fit), slice(fit, None)):
        valid = view.tokens.valid[rows]
        sides.append((features[rows][valid].double(), targets[rows][valid].double()))
    (x, y), (x_new, y_new) = sides
    middle, center = x.mean(0), y.mean(0)
    gram = (x - middle).T @ (x - middle) + torch.eye(x.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(gram, (x - middle).T @ (y - center))
    left = (y_new - center - (x_new - middle) @ weights).square().sum()
    return 1 - float(left / (y_new - center).square().sum())


@pytest.mark.slow
def test_a_shuffled_teacher_loses_what_the_true_one_gives() -> None:
    """What a student's frozen features say linearly of the teacher's, on windows of held-out blocks, mean of
    three seeds: aligned with the true teacher it is above random weights by 0.03 or more, aligned with a
    teacher whose answers are given to other tokens it is not above them by even 0.01."""
    settings = {
        "data": {"simulate_kilobases": 120, "length": 120, "block": 5000, "test": 0.3, "validation": 0.0},
        "model": {"width": 32, "gdn_layers": 1, "mlp_ratio": 1.0},
        "teacher": {"width": 64, "depth": 2, "heads": 4, "steps": 200, "batch": 16, "lr": 2e-3},
        "distill": {"batch": 16, "method": "distill_only"},
        "optim": {"lr": 5e-3, "warmup_steps": 10, "min_lr_ratio": 0.05},
        "train": {"steps": 80, "clip_norm": 1.0, "threads": 1},
    }
    config = load_config(GenomicConfig, settings)
    corpus = read_corpus(config)
    teacher, _ = fit_teacher(config, corpus, seed=0, out=None, quiet=True)
    assert isinstance(teacher, KmerTeacher)
    windows = np.stack(
        [genome.records[name][:120] for genome in corpus.cut("test") for name in genome.records]
        + [
            genome.records[name][i : i + 120]
            for genome in corpus.cut("test")
            for name in genome.records
            for i in range(120, len(genome.records[name]) - 120, 360)
        ]
    )
    windows = windows[np.random.default_rng(0).permutation(len(windows))]
    found: dict[str, list[float]] = {"none": [], "trained": [], "shuffled": []}
    for seed in range(3):
        for kind, values in found.items():
            distill = (
                replace(config.distill, method="none")
                if kind == "none"
                else replace(config.distill, teacher=kind)  # type: ignore[arg-type]
            )
            own = replace(config, distill=distill)
            encoder, _, _ = fit_student(own, corpus, teacher, seed=seed, out=None, quiet=True)
            values.append(_explained(encoder, teacher, windows, fit=len(windows) // 2))
    means = {name: float(np.mean(values)) for name, values in found.items()}
    assert means["trained"] >= means["none"] + 0.03, found
    assert means["shuffled"] <= means["none"] + 0.01, found


@pytest.mark.real_data
def test_two_real_genomes_and_a_bacterium_are_cut_without_touching() -> None:
    folder = Path(os.environ["STILLHOUSE_TEST_DATA"]) / "genomic"
    names = ("celegans_1pct.fa", "athaliana_1pct.fa", "corynebacterium_NCTC11397.fna.gz")
    models = (str(folder / "celegans_1pct.gff3"), str(folder / "athaliana_1pct.gff3"), "-")
    config = load_config(GenomicConfig, "genomes_1pct", presets="stillhouse.genomic.configs")
    data = replace(config.data, fasta=tuple(str(folder / name) for name in names), annotation=models)
    config = replace(config, data=data)
    corpus = read_corpus(config)
    counts = corpus.counts()
    assert 4.3e6 < sum(part["bases"] for part in counts.values()) < 4.66e6  # what lies between parts is gone
    assert 0.2 < counts["test"]["bases"] / sum(part["bases"] for part in counts.values()) < 0.3
    tasks, left_out = probe_tasks(corpus, config.evaluate, seed=0)
    assert not left_out
    assert [task.name.split(",")[0] for task in tasks] == ["donor", "acceptor", "regions", "species"]
    for task in tasks:
        assert not set(task.fit.groups) & set(task.score.groups)
        assert not {row.tobytes() for row in task.fit.sequences} & {
            row.tobytes() for row in task.score.sequences
        }
    window = corpus.training()[(0, 0)]
    assert window.shape == (config.data.length,)
