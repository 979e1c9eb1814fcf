"""The verbs of the command line: train, evaluate, report, export."""

from __future__ import annotations

import json
import shlex
import sys
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from stillhouse.core.config import load_config, save_config, to_dict
from stillhouse.core.errors import ConfigError, DataError
from stillhouse.core.provenance import redact, timestamp
from stillhouse.core.run import Run, jsonable, rank

from .config import KidneyConfig
from .data import LeakageWarning
from .fit import (
    Engine,
    Prepared,
    fit_classifier,
    fit_student,
    fit_teacher,
    new_student,
    prepare,
    with_trainer,
)
from .scoring import Scored, embeddings_of, labels_of, score_classifier, score_embedding

if TYPE_CHECKING:
    from .gallery import Gallery
    from .report import ModelRow
    from .student import Student

TEACHER, STUDENT = "teacher GEMINI", "guided student"
UNGUIDED, CLASSIFIER = "student without distillation", "cross-entropy classifier"
_CONFIG, _ARTIFACT = "config.json", "student"
_LIBRARIES = ("stillhouse-kidney", "stillhouse-core", "torch", "monai", "pytorch-metric-learning")


def train(config: KidneyConfig, run: Run, *, engine: Engine = with_trainer) -> dict[str, Any]:
    """Train teacher, student and baselines, score them, write artefact and report.

    Everything in the data is checked before the first file is written. Under `torchrun` all processes train
    and the first one evaluates and writes. A run that was cut short goes on from its checkpoints when it is
    given the same `--out`.

    Args:
        config: the configuration.
        run: where to write, seed, device.
        engine: what trains; `stillhouse.kidney.mmengine_runner` has another one.

    Returns:
        `artifact`, `report`, and the accuracy of each row.

    Raises:
        DataError: images or ImageNet weights that cannot be used.
    """
    config = _on_device(config, run)
    with run.progress("Reading images") as bar, warnings.catch_warnings():
        warnings.simplefilter("ignore", LeakageWarning)  # its text is among the notes, which are said below
        data = prepare(config, seed=run.seed, progress=lambda done, total: bar.advance())
    new_student(config, run.seed)  # weights that do not fit are found before the teacher is trained
    _say(run, data.collection.summary())
    for note in dict.fromkeys((*data.train.notes, *data.test.notes, *_enlarged(config, data))):
        if note not in data.collection.notes:
            _say(run, f"  note: {note}")
    if rank() == 0:
        save_config(config, run.path(_CONFIG))
    networks, facts = _fit_all(config, data, run, engine)
    if rank() != 0:
        return {}
    return _finish(config, data, run, networks, facts)


def _fit_all(
    config: KidneyConfig, data: Prepared, run: Run, engine: Engine
) -> tuple[dict[str, nn.Module], dict[str, dict[str, Any]]]:
    """Train every row of the table."""
    networks: dict[str, nn.Module] = {}
    facts: dict[str, dict[str, Any]] = {}
    common: dict[str, Any] = {"seed": run.seed, "quiet": None if run.interactive else True, "engine": engine}
    _say(run, f"training the {TEACHER}: {config.teacher.steps} episodes")
    networks[TEACHER], facts[TEACHER] = teacher, _ = fit_teacher(
        config, data, out=run.path("teacher"), **common
    )
    _say(run, f"training the {STUDENT}: {config.train.steps} steps")
    networks[STUDENT], facts[STUDENT] = fit_student(config, data, teacher, out=run.path("guided"), **common)
    if config.evaluate.baselines:
        alone = replace(config, distill=replace(config.distill, method="none"))
        _say(run, "training the two baselines")
        networks[UNGUIDED], facts[UNGUIDED] = fit_student(
            alone, data, None, out=run.path("unguided"), **common
        )
        networks[CLASSIFIER], facts[CLASSIFIER] = fit_classifier(
            config, data, out=run.path("classifier"), **common
        )
    return networks, facts


def _finish(
    config: KidneyConfig,
    data: Prepared,
    run: Run,
    networks: Mapping[str, nn.Module],
    facts: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """Score, save the student, write results and report."""
    from .report import (
        KidneyResults,
        embedding_points,
        leakage_table,
        save_results,
        save_retrieval,
        write_report,
    )

    begun = time.perf_counter()
    run.say("scoring")
    rows = score_all(config, data, networks)
    student: Student = networks[STUDENT]  # type: ignore[assignment]
    gallery = build_gallery(config, data, student)
    provenance = _provenance(config, data, run)
    artifact = _save(config, data, run, student, gallery, rows[STUDENT], provenance)
    profiles, note = _profiles(config, networks)
    tests = {name: row for name, row in rows.items() if name != CLASSIFIER}
    stones = [item.stone for item in data.test.items] if data.test.stone_known else None
    results = KidneyResults(
        data="simulated stones" if data.simulated else data.collection.name,
        simulated=data.simulated,
        models=[_row(name, row, facts[name], config) for name, row in rows.items()],
        differences=_differences(rows, stones, config),
        new_class=_new_class(config, data, {name: networks[name] for name in tests}, rows),
        new_classes=config.data.new_classes,
        unknown=_unknown(config, data, {name: networks[name] for name in tests}, rows, gallery),
        calibration=asdict(gallery.calibration),
        gallery={name: list(count) for name, count in gallery.counts.items()},
        embedding=embedding_points(rows[STUDENT].query, labels_of(data.test, data.classes), gallery),
        retrieval=save_retrieval(data.test, rows[STUDENT].query, gallery, run.create()),
        profiles=profiles,
        profile_note=note,
        parts={name: part.counts() for name, part in _parts(data).items()},
        stones={name: len(part.stones) for name, part in _parts(data).items()}
        if data.test.stone_known
        else {},
        split=config.data.split,
        notes=_notes(config, data),
        leakage=leakage_table(data.leakage),
        log={name: f"{folder}/log.jsonl" for name, folder in _FOLDERS.items() if name in networks},
        timings={
            **{name: found["seconds"] for name, found in facts.items()},
            "scoring": time.perf_counter() - begun,
        },
        config=to_dict(config),
        command=_command(sys.argv),
        made=timestamp(),
        seed=run.seed,
        versions={name: version(name) for name in _LIBRARIES},
    )
    save_results(results, run.create())
    page = write_report(run.create(), results)
    return {
        "artifact": str(artifact),
        "report": str(page),
        "accuracy": {name: row.scores["accuracy"]["estimate"] for name, row in rows.items()},
        **{f"accuracy of the {name}": row.scores["accuracy"]["estimate"] for name, row in rows.items()},
    }


_FOLDERS = {TEACHER: "teacher", STUDENT: "guided", UNGUIDED: "unguided", CLASSIFIER: "classifier"}


def score_all(config: KidneyConfig, data: Prepared, networks: Mapping[str, nn.Module]) -> dict[str, Scored]:
    """Score each network on the test part, in the order given."""
    rows = {}
    for name, network in networks.items():
        if name == CLASSIFIER:
            rows[name] = score_classifier(config, network, data.train, data.test, data.classes)  # type: ignore[arg-type]
        else:
            tau = config.teacher.tau if name == TEACHER else config.distill.tau
            rows[name] = score_embedding(config, network, data.train, data.test, data.classes, tau=tau)
    return rows


def build_gallery(config: KidneyConfig, data: Prepared, student: Student) -> Gallery:
    """The labelled training images, calibrated on the validation part where there is one."""
    from .gallery import Gallery, HeldOut
    from .predict import thumbnails

    items = data.train.items
    held_out = None
    if data.validation is not None:
        kept = data.validation.filter(labels=data.classes)
        held_out = HeldOut(
            embeddings=embeddings_of(config, student, kept),
            labels=labels_of(kept, data.classes),
            stones=tuple(item.stone for item in kept.items),
            views=tuple(item.view for item in kept.items),
        )
    return Gallery.build(
        embeddings_of(config, student, data.train),
        labels_of(data.train, data.classes),
        classes=data.classes,
        stones=[item.stone for item in items] if data.train.stone_known else None,
        views=[item.view for item in items],
        names=[item.title for item in items],
        thumbnails=thumbnails(data.train),
        held_out=held_out,
        rate=config.evaluate.false_unknown,
    )


def evaluate(artifact: Path, data: Path | None, config: KidneyConfig, run: Run) -> dict[str, Any]:
    """Score a finished student against its gallery.

    Args:
        artifact: the student's folder, or a run's.
        data: labelled images to score on; None takes the test part of the run that made the student.
        config: says how to cut the images when `data` is None.
        run: where `evaluation.json` goes.

    Raises:
        DataError: images or artefact cannot be used, or no class of the images is in the gallery.
    """
    from .data import read_collection
    from .metrics import evaluate_embeddings
    from .predict import embed
    from .store import load_student

    student = load_student(artifact, device=str(run.torch_device()))
    if data is None:
        test = prepare(config, seed=config.train.seed).test
    else:
        test = read_collection(data, stone_pattern=config.data.stone_pattern)
    gallery = student.gallery
    known = [label for label in test.classes if label in gallery.classes]
    if not known:
        raise DataError(
            f"{test.name}: none of its classes ({', '.join(test.classes)}) is in the gallery "
            f"({', '.join(gallery.classes)}); rename the folders, or add the class with `gallery add`"
        )
    strange = {label: sum(test.counts()[label].values()) for label in test.classes if label not in known}
    notes = [*test.notes]
    if strange:
        counts = ", ".join(f"{label} ({count})" for label, count in strange.items())
        notes.append(f"images of classes that the gallery does not have are left out: {counts}")
    if "" in test.labels:
        notes.append(f"images without a label are left out: {test.labels.count('')}")
    for note in notes:
        run.say(f"note: {note}")
    test = test.filter(labels=known)
    network = student.network
    query = embed(network, test, size=network.config.image_size, crops=student.crops, zoom=student.zoom)
    scores = evaluate_embeddings(
        query,
        labels_of(test, gallery.classes),
        gallery.embeddings,
        gallery.labels,
        classes=gallery.classes,
        groups=[item.stone for item in test.items] if test.stone_known else None,
        views=[item.view for item in test.items],
        gallery_views=gallery.views,
        gallery_groups=gallery.stones if test.stone_known else None,
        fuse=config.evaluate.fuse,
        k=config.evaluate.neighbours,
        temperature=gallery.temperature,
        resamples=config.evaluate.resamples,
    )
    table = {"data": test.name, "notes": notes, "scores": scores}
    run.path("evaluation.json").write_text(
        json.dumps(jsonable(table), indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    return {"accuracy": scores["accuracy"]["estimate"], "items": scores["items"], "scores": scores}


def report(folder: Path, run: Run) -> dict[str, Any]:
    """Build the report of a finished run again from its results."""
    from .report import write_report

    return {"report": str(write_report(folder, out=run.out))}


def export(artifact: Path, format: str, run: Run) -> dict[str, Any]:
    """Export a finished student; the export is checked against it."""
    from .export import export_student
    from .store import load_student

    return export_student(load_student(artifact), format, run.out)


# ---- parts of a run


def _command(argv: list[str]) -> str:
    """The command line as one would type it again: without the folder of the program, secrets blanked."""
    program = Path(argv[0])
    name = "python -m stillhouse.kidney" if program.name == "__main__.py" else program.name
    return " ".join((name, *map(shlex.quote, redact(argv[1:]))))


def _on_device(config: KidneyConfig, run: Run) -> KidneyConfig:
    """Put the command's device and seed into the configuration, which is saved."""
    device = run.torch_device() if run.device != "auto" else None
    if device is not None and device.index:
        raise ConfigError(
            f"--device {run.device}: training takes the first devices that are visible; set "
            f"CUDA_VISIBLE_DEVICES={device.index}"
        )
    accelerator = config.train.accelerator if device is None else device.type
    return replace(config, train=replace(config.train, seed=run.seed, accelerator=accelerator))


def _parts(data: Prepared) -> dict[str, Any]:
    parts = {
        "train": data.train,
        "without labels": data.pool,
        "validation": data.validation,
        "test": data.test,
        "new classes": data.new,
    }
    return {name: part for name, part in parts.items() if part is not None and len(part)}


def _row(name: str, row: Scored, facts: Mapping[str, Any], config: KidneyConfig) -> ModelRow:
    from .report import ModelRow

    steps = f"{facts['steps']} steps"
    notes = {
        TEACHER: f"{len(config.teacher.branches)} branches, {facts['steps']} episodes; frozen afterwards",
        STUDENT: f"{config.distill.metric_loss} and {config.distill.method} distillation, {steps}",
        UNGUIDED: f"{config.distill.metric_loss} alone, {steps}, same batches of labelled images",
        CLASSIFIER: f"softmax on the same backbone, {steps}, same batches of labelled images",
    }
    roles = {TEACHER: "teacher", STUDENT: "student", UNGUIDED: "baseline", CLASSIFIER: "baseline"}
    return ModelRow(name=name, role=roles[name], scores=row.scores, note=notes[name])  # type: ignore[arg-type]


def _differences(
    rows: Mapping[str, Scored], stones: list[str] | None, config: KidneyConfig
) -> dict[str, dict[str, Any]]:
    from .metrics import accuracy_difference

    mine = rows[STUDENT].correct.numpy()
    return {
        f"{STUDENT} − {name}": accuracy_difference(
            mine, row.correct.numpy(), groups=stones, resamples=config.evaluate.resamples
        )
        for name, row in rows.items()
        if name != STUDENT
    }


def _new_class(
    config: KidneyConfig, data: Prepared, networks: Mapping[str, nn.Module], rows: Mapping[str, Scored]
) -> dict[str, dict[str, Any]]:
    """K-shot accuracy on the classes that nobody was trained on; empty where they are too few."""
    from .metrics import class_prototypes, kshot_new_class

    if data.new is None:
        return {}
    found = {}
    for name, network in networks.items():
        _, prototypes = class_prototypes(rows[name].gallery, labels_of(data.train, data.classes))
        found[name] = kshot_new_class(
            embeddings_of(config, network, data.new),
            labels_of(data.new, config.data.new_classes),
            shots=config.evaluate.new_class_shots,
            groups=[item.stone for item in data.new.items] if data.new.stone_known else None,
            known=prototypes,
            resamples=config.evaluate.resamples,
        )
    return found


def _unknown(
    config: KidneyConfig,
    data: Prepared,
    networks: Mapping[str, nn.Module],
    rows: Mapping[str, Scored],
    gallery: Gallery,
) -> dict[str, dict[str, Any]]:
    """How well the held-out classes are told from the known ones by distance."""
    from .metrics import class_prototypes, unknown_detection

    if data.new is None:
        return {}
    known_stones = [item.stone for item in data.test.items] if data.test.stone_known else None
    new_stones = [item.stone for item in data.new.items] if data.new.stone_known else None
    found = {}
    for name, network in networks.items():
        _, prototypes = class_prototypes(rows[name].gallery, labels_of(data.train, data.classes))
        found[name] = unknown_detection(
            rows[name].query,
            embeddings_of(config, network, data.new),
            prototypes,
            threshold=gallery.threshold if name == STUDENT else None,
            known_groups=known_stones,
            unknown_groups=new_stones,
        )
    return found


def _profiles(config: KidneyConfig, networks: Mapping[str, nn.Module]) -> tuple[list[dict[str, Any]], str]:
    from stillhouse.core.report import compare_profiles, profile_rows

    size = config.data.image_size
    device = next(networks[TEACHER].parameters()).device
    models = {name: networks[name] for name in (TEACHER, STUDENT)}
    found = compare_profiles(models, torch.zeros(1, 3, size, size, device=device), baseline=TEACHER, runs=20)
    return profile_rows(found, what="image")


def _notes(config: KidneyConfig, data: Prepared) -> list[str]:
    notes = list(dict.fromkeys((*data.train.notes, *data.test.notes, *_enlarged(config, data))))
    if len(data.pool):
        notes.append(
            f"teacher and guided student also saw {len(data.pool)} training images without their labels; "
            "the two baselines did not"
        )
    if data.leakage.duplicates:
        notes.append(f"leakage check: {data.leakage.summary()}")
    if config.distill.shuffle_teacher:
        notes.append("ablation: the teacher's answers were handed to the wrong images")
    return notes


def _enlarged(config: KidneyConfig, data: Prepared) -> list[str]:
    """A note where images are smaller than the network's input."""
    from PIL import Image

    side, small, total = round(config.data.image_size * config.data.zoom), [], 0
    for part in _parts(data).values():
        for item in part.items:
            total += 1
            if item.array is not None:
                shorter = min(item.array.shape[:2])
            else:
                with Image.open(item.path) as image:  # decoded before: it opens
                    shorter = min(image.size)
            if shorter < side:
                small.append(shorter)
    if not small:
        return []
    return [
        f"{len(small)} of {total} images are smaller than the {side} pixels they are shown at (the smallest "
        f"has {min(small)}) and were enlarged, which adds no detail"
    ]


def _say(run: Run, text: str) -> None:
    """Say a line once, however many processes train together."""
    if rank() == 0:
        run.say(text)


def _provenance(config: KidneyConfig, data: Prepared, run: Run) -> dict[str, Any]:
    licence = (
        {"what": "training data", "name": "simulated stones", "licence": "Apache-2.0"}
        if data.simulated
        else {"what": "training data", "name": data.collection.name, "licence": "as its owner says"}
    )
    return {
        "dataset": {"name": data.collection.name, "images": len(data.training), "split": config.data.split},
        "seed": run.seed,
        "licences": [licence],
    }


def _save(
    config: KidneyConfig,
    data: Prepared,
    run: Run,
    student: Student,
    gallery: Gallery,
    row: Scored,
    provenance: Mapping[str, Any],
) -> Path:
    from .store import save_student

    accuracy = row.scores["accuracy"]
    simulated = (
        "Trained on simulated stones: for trying the software out, never for patients.\n\n"
        if data.simulated
        else ""
    )
    card = (
        f"# Kidney-stone student\n\n{simulated}"
        f"{config.model.backbone} of width {config.model.width}, {config.model.dim} dimensions, "
        f"distilled from GEMINI ({config.distill.method}). Classes: {', '.join(data.classes)}.\n\n"
        f"Accuracy on {len(data.test)} test images (split by {config.data.split}): {accuracy['estimate']:.3f}"
        + (f" [{accuracy['low']:.3f}, {accuracy['high']:.3f}]" if accuracy["low"] is not None else "")
        + ".\n\nNot a medical device.\n"
    )
    artifact = save_student(
        run.path(_ARTIFACT),
        student.cpu() if next(student.parameters()).is_cpu else student,
        gallery,
        config=to_dict(config),
        metrics=jsonable({"accuracy": accuracy, "patches": row.patches}),
        card=card,
        crops=config.data.crops,
        zoom=config.data.zoom if config.data.zoom > 1 else None,
        provenance=provenance,
    )
    return artifact.folder


def config_of(folder: Path) -> KidneyConfig:
    """The configuration that a finished run was made with.

    Raises:
        DataError: the folder is no run.
    """
    path = Path(folder) / _CONFIG
    if not path.is_file():
        raise DataError(f"{path}: is missing; give the folder of a finished run")
    return load_config(KidneyConfig, path)
