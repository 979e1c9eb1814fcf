"""The verbs of the command line: train, evaluate, report, export."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from stillhouse.core.config import load_config, save_config, to_dict
from stillhouse.core.errors import ConfigError, DataError
from stillhouse.core.metrics import bootstrap_interval
from stillhouse.core.provenance import Licence, redact, timestamp
from stillhouse.core.run import Run, jsonable, rank

from .config import GenomicConfig
from .corpus import Corpus, probe_tasks, read_corpus
from .fit import fit_student, fit_teacher, new_student, read_teacher
from .scoring import ProbeTask, differences, probe, score_table

if TYPE_CHECKING:
    from .probe import ProbeResult
    from .report import ModelRow, TaskRow
    from .student import Encoder, MaskedDecoder, RcEquivariant
    from .teacher import Teacher

TEACHER, ALONE, RANDOM = "teacher", "reconstruction alone", "random weights"
STUDENTS = {
    "had": "HAD student",
    "distill_only": "student, alignment alone",
    "reconstruct_only": "student, reconstruction alone",
    "masked_only": "student, masked tokens aligned",
    "logit_kd": "student, logits alone",
    "none": "student, random weights",
}
HOW = {
    "had": "visible tokens aligned with the teacher, hidden ones reconstructed",
    "distill_only": "visible tokens aligned with the teacher",
    "reconstruct_only": "hidden tokens reconstructed",
    "masked_only": "hidden tokens aligned with the teacher and reconstructed",
    "logit_kd": "the teacher’s nucleotide distributions, nothing hidden",
    "none": "not trained",
}
_CONFIG, _ARTIFACT = "config.json", "student"
_LIBRARIES = ("stillhouse-genomic", "stillhouse-core", "torch", "transformers", "biopython")


def train(config: GenomicConfig, run: Run) -> dict[str, Any]:
    """Train or read the teacher, train the student and its baselines, probe them, write artefact and report.

    Data are read and cut before the first file is written. Under `torchrun` all processes train and the first
    one evaluates and writes. A run that was cut short goes on from its checkpoints when it is given the same
    `--out`.

    Args:
        config: the configuration.
        run: where to write, seed, device.

    Returns:
        `artifact`, `report`, `scores`: model → task → Matthews correlation, and the same as flat entries.

    Raises:
        DataError: sequences, annotation or teacher that cannot be used.
    """
    config = _on_device(config, run)
    with run.progress("Reading genomes"):
        corpus = read_corpus(config)
        tasks, left_out = probe_tasks(corpus, config.evaluate, seed=config.train.seed)
    notes = [*corpus.notes, *left_out]
    if config.teacher.source is not None:
        read_teacher(config)  # one that cannot be read is found before anything is written
    corpus.training()
    _say(run, corpus.summary())
    for note in notes:
        _say(run, f"  note: {note}")
    if rank() == 0:
        save_config(config, run.path(_CONFIG))
    models, facts, decoder = _fit_all(config, corpus, run)
    if rank() != 0:
        return {}
    return _finish(config, corpus, tasks, notes, run, models, facts, decoder)


def _fit_all(
    config: GenomicConfig, corpus: Corpus, run: Run
) -> tuple[dict[str, Any], dict[str, dict[str, Any]], MaskedDecoder | None]:
    """Train every row of the table."""
    models: dict[str, Any] = {}
    facts: dict[str, dict[str, Any]] = {}
    common: dict[str, Any] = {"seed": config.train.seed, "quiet": None if run.interactive else True}
    settings, student = config.teacher, STUDENTS[config.distill.method]
    _say(
        run,
        f"training the teacher: {settings.steps} steps"
        if settings.source is None
        else f"reading the teacher from {settings.source}",
    )
    models[TEACHER], facts[TEACHER] = fit_teacher(config, corpus, out=run.path("fit/teacher"), **common)
    if rank() == 0:
        _save_teacher(config, corpus, run, models[TEACHER])
    device = run.torch_device()
    models[TEACHER].network.to(device)
    _say(run, f"training the {student}: {config.train.steps} steps")
    models[student], decoder, facts[student] = fit_student(
        config, corpus, models[TEACHER], out=run.path("fit/student"), **common
    )
    if config.evaluate.baselines:
        if config.distill.method != "reconstruct_only":
            _say(run, f"training the baseline: {ALONE}")
            alone = replace(
                config, distill=replace(config.distill, method="reconstruct_only", teacher="trained")
            )
            models[ALONE], _, facts[ALONE] = fit_student(
                alone, corpus, models[TEACHER], out=run.path("fit/alone"), **common
            )
        if config.distill.method != "none":
            models[RANDOM], facts[RANDOM] = new_student(config, config.train.seed).eval(), {"seconds": 0.0}
    for name, model in models.items():
        if name != TEACHER:
            model.to(device)
    return models, facts, decoder


def _finish(
    config: GenomicConfig,
    corpus: Corpus,
    tasks: list[ProbeTask],
    notes: list[str],
    run: Run,
    models: dict[str, Any],
    facts: Mapping[str, Mapping[str, Any]],
    decoder: MaskedDecoder | None,
) -> dict[str, Any]:
    """Probe, save the student, write results and report."""
    from .report import GenomicResults, save_results, write_report

    begun = time.perf_counter()
    student = STUDENTS[config.distill.method]
    run.say("probing")
    found = probe_all(config, tasks, models, run)
    licences = _licences(corpus, models[TEACHER], config)
    scores = score_table(found)
    card = _card(config, corpus, models, scores, licences)
    artifact = _save_student(
        config, corpus, run, models[student], decoder, scores.get(student, {}), card, licences
    )
    profiles, profile_note = _profiles(config, corpus, models, student)
    results = GenomicResults(
        data=corpus.name,
        simulated=corpus.simulated,
        models=[_model_row(name, model, facts, config, student) for name, model in models.items()],
        tasks=[_task_row(task, next(iter(found.values()))[task.name]) for task in tasks],
        scores=scores,
        differences=differences(
            found, student, [name for name in models if name != student], resamples=config.evaluate.resamples
        ),
        profiles=profiles,
        profile_note=profile_note,
        throughput=_throughput(config, corpus, {name: models[name] for name in (TEACHER, student)}),
        embedding=_maps(config, tasks, models[student], student),
        consistency=_consistency(config, corpus, {name: models[name] for name in (TEACHER, student)}),
        logs={
            name: f"{folder}/log.jsonl"
            for name, folder in _folders(student).items()
            if (run.out / folder / "log.jsonl").is_file()
        },
        gradient_logs={student: "fit/student/log.jsonl"}
        if config.distill.gradient_every and (run.out / "fit/student/log.jsonl").is_file()
        else {},
        parts=corpus.counts(),
        notes=notes,
        licences=[{"what": one.what, "name": one.name, "licence": one.licence} for one in licences],
        card=card,
        timings={
            **{f"training: {name}": float(fact["seconds"]) for name, fact in facts.items()},
            "probing and scoring": time.perf_counter() - begun,
        },
        config=to_dict(config),
        command=_command(sys.argv),
        made=timestamp(),
        seed=config.train.seed,
        versions={name: version(name) for name in _LIBRARIES},
    )
    save_results(results, run.create())
    page = write_report(run.create(), results)
    flat = {
        f"{task} of the {name}": scores[name][task]["estimate"]
        for name in (TEACHER, student)
        for task in scores.get(name, {})
    }
    return {
        "artifact": str(artifact),
        "report": str(page),
        "scores": {
            name: {task: score["estimate"] for task, score in scored.items()}
            for name, scored in scores.items()
        },
        **flat,
    }


def probe_all(
    config: GenomicConfig, tasks: list[ProbeTask], models: Mapping[str, Any], run: Run
) -> dict[str, dict[str, ProbeResult]]:
    """Probe each model on each task."""
    total = len(models) * sum(len(task.fit.labels) + len(task.score.labels) for task in tasks)
    with run.progress("Probing", total=total) as bar:
        return {
            name: {
                task.name: probe(
                    model,
                    task,
                    seed=config.train.seed,
                    batch=config.evaluate.batch,
                    resamples=config.evaluate.resamples,
                    progress=bar.advance,
                )
                for task in tasks
            }
            for name, model in models.items()
        }


def evaluate(artifact: Path, data: Path | None, config: GenomicConfig, run: Run) -> dict[str, Any]:
    """Probe a finished student, or score a fine-tuned classifier.

    Args:
        artifact: the student's folder, or a run's; or a classifier's, or that of its fine-tuning.
        data: labelled sequences with columns `group` and `split` (CSV, TSV, Parquet), as `tasks` writes them;
            None takes the tasks of the run that made the student, cut from the genomes that `config` names. A
            classifier needs labels alone: it is scored on the rows of the split `test`, or on all where there
            is no split.
        config: says where the genomes are when `data` is None.
        run: where `evaluation.json` goes.

    Raises:
        DataError: data or artefact cannot be used.
    """
    from .finetune import evaluate_classifier, is_classifier
    from .student.store import load_student

    if is_classifier(artifact):
        return evaluate_classifier(artifact, data, run, batch=config.evaluate.batch)
    loaded = load_student(artifact, device=str(run.torch_device()))
    notes: list[str] = []
    if data is None:
        corpus = read_corpus(config)
        tasks, notes = probe_tasks(corpus, config.evaluate, seed=config.train.seed)
        if not tasks:
            raise DataError(f"{corpus.name}: no task can be cut from it ({'; '.join(notes)}); give --data")
    else:
        tasks = [_labelled_task(data, config)]
    for note in notes:
        run.say(f"note: {note}")
    found = probe_all(config, tasks, {"student": loaded.encoder}, run)
    scores = score_table(found)["student"]
    table = {"notes": notes, "metric": "mcc (plain)", "scores": scores}
    run.path("evaluation.json").write_text(
        json.dumps(jsonable(table), indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    return {"scores": scores, **{task: score["estimate"] for task, score in scores.items()}}


def report(folder: Path, run: Run) -> dict[str, Any]:
    """Build the report of a finished run again from its results."""
    from .report import write_report

    return {"report": str(write_report(folder, out=run.out))}


def export(artifact: Path, format: str, run: Run) -> dict[str, Any]:
    """Write a finished student as a plain model folder of Hugging Face and check it against the student.

    Raises:
        ConfigError: another format.
        DataError: the artefact cannot be read, or the export computes something else.
    """
    from .write import export_huggingface

    if format != "huggingface":
        raise ConfigError(f"--format {format}: allowed is huggingface")
    return export_huggingface(artifact, run.create())


# ---- parts of a run


def _folders(student: str) -> dict[str, str]:
    return {TEACHER: "fit/teacher", student: "fit/student", ALONE: "fit/alone"}


def _on_device(config: GenomicConfig, run: Run) -> GenomicConfig:
    """Put the command's device and seed into the configuration, which is saved."""
    device = run.torch_device() if run.device != "auto" else None
    if device is not None and device.index:
        raise ConfigError(
            f"--device {run.device}: training takes the first devices that are visible; set "
            f"CUDA_VISIBLE_DEVICES={device.index}"
        )
    accelerator = config.train.accelerator if device is None else device.type
    return replace(config, train=replace(config.train, seed=run.seed, accelerator=accelerator))


def _command(argv: list[str]) -> str:
    """The command line as one would type it again: without the folder of the program, secrets blanked."""
    program = Path(argv[0])
    name = "python -m stillhouse.genomic" if program.name == "__main__.py" else program.name
    return " ".join((name, *map(shlex.quote, redact(argv[1:]))))


def _say(run: Run, text: str) -> None:
    """Say a line once, however many processes train together."""
    if rank() == 0:
        run.say(text)


def parameters(model: Any) -> int:
    """Weights of an encoder or a teacher."""
    if isinstance(model, nn.Module):
        return sum(p.numel() for p in model.parameters())
    return int(model.parameters)


def _model_row(
    name: str, model: Any, facts: Mapping[str, Mapping[str, Any]], config: GenomicConfig, student: str
) -> ModelRow:
    from .report import ModelRow

    steps = facts[name].get("steps", 0)
    source = config.teacher.source
    given = f"from {source}" if source else f"masked 6-mers, {steps} steps; frozen afterwards"
    control = "" if config.distill.teacher == "trained" else f", {config.distill.teacher} teacher"
    notes = {
        TEACHER: given,
        student: f"{HOW[config.distill.method]}{control}; {steps} steps",
        ALONE: f"the same network, masks and {steps} steps, no teacher",
        RANDOM: "the same network before training",
    }
    roles = {TEACHER: "teacher", student: "student", ALONE: "ablation", RANDOM: "baseline"}
    return ModelRow(name=name, role=roles[name], parameters=parameters(model), note=notes[name])  # type: ignore[arg-type]


def _task_row(task: ProbeTask, result: ProbeResult) -> TaskRow:
    from .report import TaskRow

    return TaskRow(
        name=task.name,
        metric="MCC (plain)",
        classes=task.classes,
        train=result.train,
        test=result.test,
        groups=None if result.groups is None else len(np.unique(result.groups)),
        chance=0.0,
        note=task.note,
    )


def _licences(corpus: Corpus, teacher: Teacher, config: GenomicConfig) -> list[Licence]:
    from .teacher import licence_terms

    data = Licence(
        what="training data",
        name=corpus.name,
        licence="Apache-2.0" if corpus.simulated else "as its owner says",
    )
    if config.teacher.source is None:
        return [data]  # trained on the same data: no further terms
    return [licence_terms(teacher.licence, teacher.name), data]


def _card(
    config: GenomicConfig,
    corpus: Corpus,
    models: Mapping[str, Any],
    scores: Mapping[str, Mapping[str, Any]],
    licences: list[Licence],
) -> str:
    student = STUDENTS[config.distill.method]
    mine, teacher = parameters(models[student]), parameters(models[TEACHER])
    lines = ["# A student of DNA", ""]
    if corpus.simulated:
        lines += [
            "Trained on simulated genomes: for trying the software out; it knows nothing of organisms.",
            "",
        ]
    lines += [
        f"{config.model.kind} encoder of {mine:,} parameters, {models[student].width} channels a nucleotide, "
        f"{teacher / mine:.0f} times smaller than its teacher ({models[TEACHER].name}, {teacher:,} "
        f"parameters). Method: {config.distill.method}. Corpus: {corpus.name}, windows of "
        f"{config.data.length} bp.",
        "",
    ]
    if scores.get(student):
        lines += ["Linear probes on held-out blocks, Matthews correlation [95 % interval]:", ""]
        for task, score in scores[student].items():
            lines.append(f"- {task}: {score['estimate']:.3f} [{score['low']:.3f}, {score['high']:.3f}]")
        lines.append("")
    for licence in licences:
        if licence.commercial is False:
            lines += [f"**{licence.name}: {licence.licence}.** {licence.terms}", ""]
    return "\n".join(lines)


def _provenance(corpus: Corpus, seed: int) -> dict[str, Any]:
    return {
        "dataset": {"name": corpus.name, "parts": corpus.counts(), "simulated": corpus.simulated},
        "seed": seed,
    }


def _save_teacher(config: GenomicConfig, corpus: Corpus, run: Run, teacher: Any) -> None:
    from .teacher import KmerTeacher, save_teacher

    if config.teacher.source is not None or not isinstance(teacher, KmerTeacher):
        return
    save_teacher(
        run.path("teacher"),
        teacher,
        config=to_dict(config),
        card=f"# A 6-mer teacher\n\nTrained on {corpus.name} by masked language modelling, "
        f"{config.teacher.steps} steps.\n",
        provenance=_provenance(corpus, config.train.seed),
    )


def _save_student(
    config: GenomicConfig,
    corpus: Corpus,
    run: Run,
    encoder: Encoder | RcEquivariant,
    decoder: MaskedDecoder | None,
    scores: Mapping[str, Any],
    card: str,
    licences: list[Licence],
) -> Path:
    from .student.store import save_student
    from .tokenizers import CharacterTokenizer

    artifact = save_student(
        run.path(_ARTIFACT),
        encoder,
        decoder,
        CharacterTokenizer(),
        card=card,
        licence="apache-2.0" if corpus.simulated else "unknown",
        licences=licences,
        training=to_dict(config),
        metrics=jsonable({"probes": scores}),
        provenance=_provenance(corpus, config.train.seed),
    )
    return artifact.folder


def config_of(folder: Path) -> GenomicConfig:
    """The configuration that a finished run was made with.

    Raises:
        DataError: the folder is no run.
    """
    path = Path(folder) / _CONFIG
    if not path.is_file():
        raise DataError(f"{path}: is missing; give the folder of a finished run")
    return load_config(GenomicConfig, path)


def _labelled_task(path: Path, config: GenomicConfig) -> ProbeTask:
    from .data import read_labelled

    items = read_labelled(path, group="group", split="split")
    parts = set(items.split or ())
    if not {"train", "test"} <= parts:
        raise DataError(
            f"{path}: has the parts {sorted(parts) or 'of no split'}; a probe needs a column `split` with "
            "train and test"
        )
    return ProbeTask(name=items.name, fit=items.part("train"), score=items.part("test"), pool="mean")


class _Reader(nn.Module):
    """A model as a module of one argument, the index of a window, for timing: tokens are made beforehand."""

    def __init__(self, model: Any, windows: np.ndarray) -> None:
        super().__init__()
        from .tokenizers import CharacterTokenizer

        self.model = model if isinstance(model, nn.Module) else model.network
        self._teacher = None if isinstance(model, nn.Module) else model
        device = next(self.model.parameters()).device
        if self._teacher is None:
            self._input = CharacterTokenizer().encode(windows).to(device)
        else:
            self._input = self._teacher.tokenizer.encode(windows).to(device)

    def forward(self, unused: Any) -> Any:
        return self.model(self._input) if self._teacher is None else self._teacher.features(self._input)


def _sample(corpus: Corpus, count: int, length: int) -> np.ndarray:
    """Some windows of held-out blocks, or of the training blocks where those are too short."""
    windows = corpus.training(length=length)
    return np.stack([windows[(index % len(windows), index)] for index in range(count)])


def _profiles(
    config: GenomicConfig, corpus: Corpus, models: Mapping[str, Any], student: str
) -> tuple[list[dict[str, Any]], str]:
    import torch

    from stillhouse.core.report import compare_profiles, profile_rows

    windows = _sample(corpus, 1, config.data.length)
    readers = {name: _Reader(models[name], windows) for name in (TEACHER, student)}
    found = compare_profiles(readers, torch.zeros(1, 1), baseline=TEACHER, runs=10, warmup=2)
    return profile_rows(found, what="window")


def _throughput(config: GenomicConfig, corpus: Corpus, models: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Bases a second of embedding, median of three rounds in turns."""
    from .embed import embed_windows

    windows = _sample(corpus, 32, config.data.length)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(4):
        for name, model in models.items():
            begun = time.perf_counter()
            embed_windows(model, windows, batch=32)
            if turn:  # the first one warms up
                seconds[name].append(time.perf_counter() - begun)
    return [
        {
            "model": name,
            "bases_per_second": windows.size / float(np.median(seconds[name])),
            "parameters": parameters(model),
        }
        for name, model in models.items()
    ]


def _maps(config: GenomicConfig, tasks: list[ProbeTask], model: Any, name: str) -> list[dict[str, Any]]:
    from .embed import embed_windows
    from .report import embedding_points

    shown = [task for task in tasks if len(task.classes) > 2 or task.name == "species"]
    return [
        embedding_points(
            embed_windows(
                model, task.score.sequences, lengths=task.score.lengths, batch=config.evaluate.batch
            ),
            task.score.labels,
            task.classes,
            title=f"{name}, {task.name}",
            seed=config.train.seed,
        )
        for task in shown
        if len(task.score) >= 5
    ]


def _consistency(
    config: GenomicConfig, corpus: Corpus, models: Mapping[str, Any]
) -> dict[str, dict[str, float]]:
    """Cosine between the embeddings of a window and of its reverse complement, centred."""
    from .data import reverse_complement
    from .embed import embed_windows

    windows = _sample(corpus, 64, config.evaluate.length)
    table = {}
    for name, model in models.items():
        one, two = (embed_windows(model, w) for w in (windows, reverse_complement(windows)))
        middle = np.concatenate([one, two]).mean(0)
        one, two = one - middle, two - middle
        norms = np.linalg.norm(one, axis=1) * np.linalg.norm(two, axis=1)
        cosine = (one * two).sum(1) / np.maximum(norms, 1e-12)
        got = bootstrap_interval(cosine, resamples=config.evaluate.resamples, seed=config.train.seed)
        table[name] = {"cosine": got.estimate, "low": got.low, "high": got.high}
    return table
