"""From a configuration to trained networks: read and cut the data, train teacher, student and baselines.

Each function is one step of `run.train`; a study over seeds calls them in its own order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from stillhouse.core.config import to_dict
from stillhouse.core.errors import ConfigError, DataError
from stillhouse.core.run import world_size
from stillhouse.core.train import Distiller, FitResult, OptimConfig, SeededLoader, TrainConfig, Trainer

from .config import KidneyConfig
from .data import (
    Augment,
    Collection,
    LeakageReport,
    PatchDataset,
    SimulateConfig,
    check_leakage,
    collate,
    read_collection,
    read_kth_tips,
    simulate,
    split_collection,
)
from .data.window import WindowAugment
from .distiller import Classifier, ClassifierDistiller, GuidedDistiller
from .sampling import EpisodeSampler, GuidedSampler, Layout
from .student import Student, StudentConfig, Trunk, build_student, load_imagenet_weights
from .teacher import Gemini, GeminiDistiller

Progress = Callable[[int, int], None]
Engine = Callable[[Distiller, SeededLoader, OptimConfig, TrainConfig, Path | None, bool | None], FitResult]


def with_trainer(
    distiller: Distiller,
    loader: SeededLoader,
    optim: OptimConfig,
    train: TrainConfig,
    out: Path | None,
    quiet: bool | None,
) -> FitResult:
    """Train with the core's `Trainer`: the engine of every step here unless another one is given.

    Raises:
        ConfigError: the strategy is fsdp2. Sharded networks cannot be scored by one process, and these fit
            into any GPU many times over.
    """
    if train.strategy == "fsdp2":
        raise ConfigError("train.strategy is 'fsdp2'; these networks are small: use 'ddp' (or 'auto')")
    return Trainer(train, out=out, quiet=quiet).fit(distiller, loader, optim)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """Images cut into parts, checked.

    Attributes:
        collection: all images of the classes that are trained on.
        train: labelled training images.
        pool: training images without labels; may be empty.
        validation: known images of other stones, or None.
        test: test images.
        new: images of the classes that are held out of training, or None.
        leakage: what the leakage check found between training and test images.
        simulated: whether the images are simulated.
    """

    collection: Collection
    train: Collection
    pool: Collection
    validation: Collection | None
    test: Collection
    new: Collection | None
    leakage: LeakageReport
    simulated: bool

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the label numbers."""
        return self.collection.classes

    @property
    def training(self) -> Collection:
        """Labelled images followed by those without labels: what samplers index."""
        return self.train.with_items((*self.train.items, *self.pool.items))


def read_images(config: KidneyConfig, *, progress: Progress | None = None) -> Collection:
    """Read (and decode once) or simulate the images that a configuration names.

    Raises:
        DataError: a file or folder that cannot be used.
    """
    data = config.data
    if data.path is None:
        settings = SimulateConfig(
            stones_per_class=data.stones_per_class,
            patches_per_fragment=data.patches_per_fragment,
            patch_size=data.image_size,
            seed=data.simulate_seed,
        )
        found = simulate(settings, progress=progress)
    elif data.layout == "kth_tips":
        found = read_kth_tips(Path(data.path), progress=progress)
    else:
        found = read_collection(Path(data.path), stone_pattern=data.stone_pattern, progress=progress)
    if data.views:
        strange = sorted(set(data.views) - set(found.views))
        if strange:
            raise DataError(
                f"data.views: {found.name} has no view {strange[0]!r}; it has {', '.join(found.views)}"
            )
        found = found.filter(view=data.views)
    return found


def prepare(config: KidneyConfig, *, seed: int, progress: Progress | None = None) -> Prepared:
    """Read the images, hold new classes out, cut the rest, check for leakage.

    Args:
        config: `data` and `evaluate` are used.
        seed: of the split.
        progress: called as `progress(done, total)` while images are read.

    Raises:
        DataError: files that cannot be used, classes too small to cut, or held-out classes that are not
            there.
    """
    data = config.data
    found = read_images(config, progress=progress)
    strange = sorted(set(data.new_classes) - set(found.classes))
    if strange:
        raise DataError(
            f"data.new_classes: {found.name} has no class {strange[0]!r}; it has {', '.join(found.classes)}"
        )
    known = tuple(c for c in found.classes if c not in data.new_classes)
    if len(known) < 2:
        remedy = "hold out fewer in data.new_classes" if data.new_classes else "add images of another"
        left = ", ".join(known) or "no class"
        raise DataError(f"{found.name}: {left} is all there is to train on, it takes 2 classes; {remedy}")
    new = found.filter(labels=data.new_classes) if data.new_classes else None
    kept = [*known, *([""] if "" in found.labels else [])]
    collection = found.filter(labels=kept)
    parts = split_collection(
        collection, by=data.split, test=data.test, validation=data.validation, shots=data.shots, seed=seed
    )
    pool = parts.get("unlabelled", collection.with_items(()))
    seen = parts["train"].with_items((*parts["train"].items, *pool.items))
    return Prepared(
        collection=collection,
        train=parts["train"],
        pool=pool if data.pool else collection.with_items(()),
        validation=parts.get("validation")
        if parts.get("validation") is not None and len(parts["validation"])
        else None,
        test=parts["test"],
        new=new,
        leakage=check_leakage(seen, parts["test"]),
        simulated=data.path is None,
    )


def dataset_of(config: KidneyConfig, collection: Collection, classes: Sequence[str]) -> PatchDataset:
    """The training data set of a collection."""
    data = config.data
    augment: Augment | WindowAugment | None = None
    if data.augment == "stones":
        augment = Augment()
    elif data.augment == "window":
        augment = WindowAugment(scale=data.window)
    return PatchDataset(
        collection, classes, size=data.image_size, augment=augment, zoom=data.zoom if data.zoom > 1 else None
    )


def fit_teacher(
    config: KidneyConfig,
    data: Prepared,
    *,
    seed: int,
    out: Path | None,
    quiet: bool | None = None,
    engine: Engine = with_trainer,
) -> tuple[Gemini, dict[str, Any]]:
    """Train GEMINI episodically and return it in evaluation mode, with the facts of its training.

    Args:
        config: `model`, `teacher`, `train`.
        data: the parts.
        seed: of weights, episodes and augmentation.
        out: folder of checkpoints and log; None writes nothing.
        quiet: no progress bar.
        engine: what trains.
    """
    settings = config.teacher
    training = data.training
    dataset = dataset_of(config, training, data.classes)
    pool = min(settings.pool, len(training))
    layout = Layout(len(data.classes), settings.shots + settings.queries, settings.shots, pool)
    network = new_teacher(config, seed)
    sampler = EpisodeSampler(
        dataset.labels[: len(data.train)],
        layout,
        pool=len(data.pool),
        seed=seed,
        length=min(100, settings.steps),
        replicas=_replicas(config.train),
    )
    distiller = GeminiDistiller(
        network, settings, layout, num_classes=len(data.classes), labels=dataset.labels
    )
    own = replace(
        config,
        train=replace(config.train, steps=settings.steps),
        optim=replace(config.optim, lr=settings.lr),
    )
    facts = _fit(own, distiller, dataset, sampler, seed=seed, out=out, quiet=quiet, engine=engine)
    return network.eval(), facts


def fit_student(
    config: KidneyConfig,
    data: Prepared,
    teacher: Gemini | None,
    *,
    seed: int,
    out: Path | None,
    quiet: bool | None = None,
    engine: Engine = with_trainer,
) -> tuple[Student, dict[str, Any]]:
    """Train a student under a teacher, or without one (`distill.method = "none"`, which never sees the pool).

    Args:
        config: `model`, `distill`, `optim`, `train`.
        data: the parts.
        teacher: frozen; None without distillation.
        seed: of weights, batches and augmentation.
        out: folder of checkpoints and log; None writes nothing.
        quiet: no progress bar.
        engine: what trains.
    """
    settings = config.distill
    guided = settings.method in ("hypothesis", "rkd") and len(data.pool) > 0
    training = data.training if guided else data.train
    dataset = dataset_of(config, training, data.classes)
    pool = min(settings.pool, len(data.pool)) if guided else 0
    ways = settings.classes_per_batch or len(data.classes)
    layout = Layout(min(ways, len(data.classes)), settings.per_class, 0, pool)
    student = new_student(config, seed)
    distiller = GuidedDistiller(
        student, teacher, settings, layout, num_classes=len(data.classes), teacher_tau=config.teacher.tau
    )
    sampler = GuidedSampler(
        dataset.labels[: len(data.train)],
        layout,
        pool=len(data.pool) if guided else 0,
        seed=seed,
        length=min(100, config.train.steps),
        replicas=_replicas(config.train),
    )
    facts = _fit(config, distiller, dataset, sampler, seed=seed, out=out, quiet=quiet, engine=engine)
    return student.eval(), facts


def fit_classifier(
    config: KidneyConfig,
    data: Prepared,
    *,
    seed: int,
    out: Path | None,
    quiet: bool | None = None,
    engine: Engine = with_trainer,
) -> tuple[Classifier, dict[str, Any]]:
    """Train the cross-entropy baseline on the same labelled images, batches and steps."""
    dataset = dataset_of(config, data.train, data.classes)
    layout = Layout(len(data.classes), config.distill.per_class, 0, 0)
    network = Classifier(new_student(config, seed), len(data.classes))
    distiller = ClassifierDistiller(network, smoothing=config.distill.classifier_smoothing)
    sampler = GuidedSampler(
        dataset.labels,
        layout,
        pool=0,
        seed=seed,
        length=min(100, config.train.steps),
        replicas=_replicas(config.train),
    )
    facts = _fit(config, distiller, dataset, sampler, seed=seed, out=out, quiet=quiet, engine=engine)
    return network.eval(), facts


def new_teacher(config: KidneyConfig, seed: int) -> Gemini:
    """An untrained GEMINI, its trunks with ImageNet weights where the configuration says so."""
    torch.manual_seed(seed)
    network = Gemini(config.model, config.teacher.branches)
    if config.model.teacher_from_weights and config.model.weights is not None:
        for trunk in network.trunks:
            load_imagenet_weights(cast(Trunk, trunk), config.model.weights)
    return network


def new_student(config: KidneyConfig, seed: int) -> Student:
    """An untrained student, with ImageNet weights where the configuration names a file."""
    model = config.model
    torch.manual_seed(seed)
    student = build_student(
        StudentConfig(
            backbone=model.backbone,
            width=model.width,
            dim=model.dim,
            image_size=config.data.image_size,
            stem=model.stem,
        )
    )
    if model.weights is not None:
        load_imagenet_weights(student.trunk, model.weights)
    return student


def _fit(
    config: KidneyConfig,
    distiller: Distiller,
    dataset: PatchDataset,
    sampler: EpisodeSampler | GuidedSampler,
    *,
    seed: int,
    out: Path | None,
    quiet: bool | None,
    engine: Engine,
) -> dict[str, Any]:
    """Train a distiller by the configuration's steps and learning rate; returns facts of the training."""
    train = replace(config.train, seed=seed)
    workers = config.evaluate.workers
    loader = SeededLoader(dataset, batch_sampler=sampler, seed=seed, workers=workers, collate=collate)
    result = engine(distiller, loader, config.optim, train, out, quiet)
    rows = [row for row in result.history if "total" in row]
    last: Mapping[str, Any] = rows[-1] if rows else {}
    return {
        "steps": result.step,
        "seconds": result.seconds,
        "loss": last.get("total"),
        "terms": dict(last.get("terms", {})),
        "train": to_dict(train),
    }


def _replicas(train: TrainConfig) -> int:
    """Processes that share a batch: the launcher's number, else the devices asked for."""
    devices = train.devices if isinstance(train.devices, int) else 1
    return max(world_size(), devices * train.nodes)
