"""From a configuration to trained networks: read or simulate drives, train teacher and students.

Each function is one step of `run.train`; a study over seeds calls them in its own order.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stillhouse.core.config import to_dict
from stillhouse.core.errors import ConfigError, DataError
from stillhouse.core.train import Distiller, FitResult, OptimConfig, SeededLoader, Trainer

from .config import LidarConfig, Student
from .distiller import (
    RefineDistiller,
    ScoreConfig,
    ScoreDistiller,
    SinglePassConfig,
    SinglePassDistiller,
    TeacherDistiller,
    TeacherPreferenceDistiller,
)
from .io import ScanSource, read_sequence
from .networks import NetworkConfig, NoiseNet, PartialEncoder, RefineNet, SinglePassNet, memory_estimate
from .pairs import MapCache, PairConfig, PairDataset
from .process import LocalProcess, VPProcess

Progress = Callable[[int, int], None]
FEW_STEP = ("distillation_dpo", "vsd", "scorelidar")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """Drives, divided.

    Attributes:
        train: drives to train on.
        validation: drives for the curves; may be empty.
        test: drives that are scored.
        simulated: whether they are simulated.
        notes: what a reader of the report must know about them.
    """

    train: tuple[ScanSource, ...]
    validation: tuple[ScanSource, ...]
    test: tuple[ScanSource, ...]
    simulated: bool
    notes: tuple[str, ...] = ()

    def summary(self) -> str:
        """One line for people."""
        kind = "simulated drives" if self.simulated else "drives"
        counts = [f"{len(part)} {name}" for name, part in self._parts() if part]
        sweeps = sum(len(source) for _, part in self._parts() for source in part)
        return f"{kind}: {', '.join(counts)}; {sweeps} sweeps"

    def _parts(self) -> tuple[tuple[str, tuple[ScanSource, ...]], ...]:
        return (("to train on", self.train), ("for validation", self.validation), ("to test", self.test))


@dataclass(slots=True, kw_only=True)
class Teacher:
    """A trained teacher.

    Attributes:
        noise: the noise net.
        encoder: the partial encoder.
        process: the diffusion.
        refine: the refinement net, or None.
    """

    noise: NoiseNet
    encoder: PartialEncoder
    process: LocalProcess
    refine: RefineNet | None = None

    def networks(self) -> dict[str, nn.Module]:
        """Its networks by the names of the artefact."""
        found: dict[str, nn.Module] = {"noise": self.noise, "encoder": self.encoder}
        return found | ({} if self.refine is None else {"refine": self.refine})


def prepare(config: LidarConfig, *, progress: Progress | None = None) -> Prepared:
    """Find or simulate the drives that a configuration names.

    Raises:
        DataError: folders or files that cannot be used, or a named sequence that is not there.
    """
    data = config.data
    if data.path is None:
        return _simulate(config, progress)
    root = Path(data.path) / "sequences"
    if not root.is_dir():
        root = Path(data.path)
    found = (
        {folder.name: folder for folder in sorted(root.iterdir()) if _is_sequence(folder)}
        if root.is_dir()
        else {}
    )
    if not found:
        raise DataError(f"{root}: holds no sequences; give the folder with sequences/NN/velodyne/*.bin")
    for name in (*data.train, *data.validation, *data.test):
        if name not in found:
            raise DataError(f"{root}: has no sequence {name!r}; it has {', '.join(found)}")
    kept = {*data.validation, *data.test}
    names = data.train or tuple(name for name in found if name not in kept)
    if not names or not data.test:
        raise DataError(
            f"{root}: sequences to train on are {list(names)}, to test {list(data.test)}; name both in "
            "data.train and data.test"
        )
    sources = {name: read_sequence(found[name]) for name in (*names, *data.validation, *data.test)}
    for source in sources.values():
        if source.poses is None:
            raise DataError(f"{found[source.name]}: has no poses.txt; maps cannot be made without poses")
    without = [name for name, source in sources.items() if source.labels is None]
    notes = [f"no labels in {', '.join(without)}: moving objects stay in their maps"] if without else []
    return Prepared(
        train=tuple(sources[name] for name in names),
        validation=tuple(sources[name] for name in data.validation),
        test=tuple(sources[name] for name in data.test),
        simulated=False,
        notes=tuple(notes),
    )


def _is_sequence(folder: Path) -> bool:
    return folder.is_dir() and (folder / "velodyne").is_dir()


def _simulate(config: LidarConfig, progress: Progress | None) -> Prepared:
    from .simulate import SimulateConfig, simulate_sequence

    data = config.data
    total = data.streets + data.test_streets
    drives: list[ScanSource] = []
    for index in range(total):
        settings = SimulateConfig(
            seed=1000 * data.simulate_seed + index,
            scans=data.scans,
            rings=data.rings,
            azimuths=data.azimuths,
            map_rays=data.map_rays,
            map_range=data.max_range + 10.0,
        )
        drives.append(simulate_sequence(settings))
        if progress is not None:
            progress(index + 1, total)
    return Prepared(
        train=tuple(drives[: data.streets]),
        validation=(),
        test=tuple(drives[data.streets :]),
        simulated=True,
        notes=("the drives are simulated: the numbers say nothing about roads",),
    )


def pair_config(config: LidarConfig, *, augment: bool | None = None) -> PairConfig:
    """What a pair is made of, in the terms of `stillhouse.lidar.pairs`."""
    data = config.data
    return PairConfig(
        points=data.points,
        factor=data.factor,
        max_range=data.max_range,
        min_range=data.min_range,
        static=data.static,
        augment=data.augment if augment is None else augment,
    )


def map_cache(config: LidarConfig) -> MapCache:
    """Where maps come from."""
    data = config.data
    return MapCache(
        data.cache, voxel=data.map_voxel, min_range=data.min_range, static=data.static, icp=data.icp
    )


def training_set(config: LidarConfig, data: Prepared, *, progress: Progress | None = None) -> PairDataset:
    """The pairs that are trained on; makes the maps of the drives."""
    return PairDataset(data.train, pair_config(config), cache=map_cache(config), progress=progress)


def process_of(config: LidarConfig) -> LocalProcess:
    """The diffusion: variance preserving for the sampler "lidpm", local for the others."""
    teacher = config.teacher
    kind = VPProcess if config.evaluate.sampler == "lidpm" else LocalProcess
    return kind(teacher.beta_start, teacher.beta_end, teacher.timesteps)


def network_config(config: LidarConfig, channels: tuple[int, ...]) -> NetworkConfig:
    """Sizes of a network of given widths."""
    model = config.model
    return NetworkConfig(
        channels=channels,
        voxel=model.voxel,
        point_offsets=model.point_offsets,
        offsets=model.refine_factor,
        factor=config.data.factor,
    )


def new_teacher(config: LidarConfig, seed: int) -> Teacher:
    """An untrained teacher, its weights drawn from `seed`."""
    torch.manual_seed(seed)
    sizes = network_config(config, config.model.channels)
    widths = config.model.refine_channels
    return Teacher(
        noise=NoiseNet(sizes),
        encoder=PartialEncoder(sizes),
        process=process_of(config),
        refine=RefineNet(network_config(config, widths)) if widths else None,
    )


def new_single(config: LidarConfig, seed: int) -> SinglePassNet:
    """An untrained single-pass network."""
    torch.manual_seed(seed)
    return SinglePassNet(network_config(config, config.model.single_channels))


def memory_lines(config: LidarConfig) -> list[str]:
    """Estimates of memory for people, before anything is allocated."""
    data, batch = config.data, config.model.batch_size
    sizes = network_config(config, config.model.channels)
    lines = []
    for kind, points in (("noise", data.points * data.factor), ("encoder", data.points)):
        estimate = memory_estimate(
            sizes,
            points,
            batch=batch,
            kind=kind,  # type: ignore[arg-type]
            radius=data.max_range,
            value_bytes=2 if "16" in config.train.precision else 4,
        )
        lines.append(f"{kind} net, training on {batch} × {points:,} points: {estimate}")
    return lines


def fit_teacher(
    config: LidarConfig,
    dataset: PairDataset,
    *,
    seed: int,
    out: Path | None,
    quiet: bool | None = None,
) -> tuple[Teacher, dict[str, dict[str, Any]]]:
    """Train the teacher: noise net with encoder, then by preference and the refinement net where asked for.

    Args:
        config: `model`, `teacher`, `train`.
        dataset: the pairs.
        seed: of weights, batches and noise.
        out: folder of checkpoints and logs; None writes nothing.
        quiet: no progress bar.

    Returns:
        The teacher in evaluation mode; facts of each training by its name.
    """
    settings = config.teacher
    teacher = new_teacher(config, seed)
    facts = {}
    common: dict[str, Any] = {"dataset": dataset, "seed": seed, "quiet": quiet}
    distiller = TeacherDistiller(
        teacher.noise,
        teacher.encoder,
        teacher.process,
        moment=settings.moment_weight,
        drop_condition=settings.drop_condition,
    )
    facts["teacher"] = fit(
        config, distiller, steps=settings.steps, lr=settings.lr, out=_under(out, "noise"), **common
    )
    teacher.noise.eval()
    teacher.encoder.eval()
    if settings.preference_steps:
        tuner = TeacherPreferenceDistiller(
            teacher.noise, teacher.encoder, teacher.process, beta=settings.preference_beta
        )
        facts["teacher by preference"] = fit(
            config,
            tuner,
            steps=settings.preference_steps,
            lr=settings.preference_lr,
            out=_under(out, "preference"),
            **common,
        )
    if teacher.refine is not None and settings.refine_steps:
        facts["refinement"] = fit(
            config,
            RefineDistiller(teacher.refine),
            steps=settings.refine_steps,
            lr=settings.lr,
            out=_under(out, "refine"),
            **common,
        )
        teacher.refine.eval()
    return teacher, facts


def fit_few_step(
    config: LidarConfig,
    dataset: PairDataset,
    teacher: Teacher,
    method: Student,
    *,
    seed: int,
    out: Path | None,
    quiet: bool | None = None,
) -> tuple[NoiseNet, dict[str, Any]]:
    """Distil the teacher into a few-step copy of itself.

    Args:
        config: `distill`, `train`.
        dataset: the pairs.
        teacher: frozen.
        method: "distillation_dpo", "vsd" or "scorelidar".
        seed: of batches and noise.
        out: folder of checkpoints and logs; None writes nothing.
        quiet: no progress bar.
    """
    settings = config.distill
    student = trainable_copy(teacher.noise)
    score = ScoreConfig(
        method=method,  # type: ignore[arg-type]
        loser_weight=settings.loser_weight,
        anchor=settings.anchor,
        pair_weight=settings.pair_weight,
        pair_noise=settings.pair_noise,
        ratio=settings.critic_ratio,
        student_steps=settings.student_steps,
        sampler=config.evaluate.sampler if config.evaluate.sampler != "vp_reference" else "local",
        guidance=settings.score_guidance,
        times=(settings.times[0], settings.times[1]) if settings.times else None,
        scene=settings.scene,
        point=settings.point,
        data=settings.data_weight,
    )
    distiller = ScoreDistiller(student, teacher.noise, teacher.encoder, score, teacher.process)
    steps = settings.steps * settings.critic_ratio  # the student is updated in every critic_ratio-th step
    optim = {
        "student": replace(config.optim, lr=settings.lr),
        "critic": replace(config.optim, lr=settings.critic_lr),
    }
    facts = fit(config, distiller, dataset=dataset, steps=steps, optim=optim, seed=seed, out=out, quiet=quiet)
    return student.eval(), facts


def fit_single(
    config: LidarConfig,
    dataset: PairDataset,
    teacher: Teacher | None,
    *,
    seed: int,
    out: Path | None,
    quiet: bool | None = None,
) -> tuple[SinglePassNet, dict[str, Any]]:
    """Train the single-pass network, with a teacher's help or (None) without."""
    settings = config.distill
    student = new_single(config, seed)
    terms = SinglePassConfig(
        terms=settings.single_terms,  # type: ignore[arg-type]
        weight=settings.single_weight,
        guidance=settings.score_guidance,
    )
    distiller = SinglePassDistiller(
        student,
        None if teacher is None else teacher.noise,
        None if teacher is None else teacher.encoder,
        terms,
        LocalProcess() if teacher is None else teacher.process,
    )
    facts = fit(
        config,
        distiller,
        dataset=dataset,
        steps=settings.single_steps,
        lr=settings.single_lr,
        seed=seed,
        out=out,
        quiet=quiet,
    )
    return student.eval(), facts


def fit(
    config: LidarConfig,
    distiller: Distiller,
    *,
    dataset: PairDataset,
    steps: int,
    seed: int,
    out: Path | None,
    quiet: bool | None,
    lr: float | None = None,
    optim: Mapping[str, OptimConfig] | None = None,
) -> dict[str, Any]:
    """Train one distiller with the core's `Trainer`; returns facts of the training.

    Raises:
        ConfigError: fsdp2 is asked for; these networks fit into any GPU.
    """
    if config.train.strategy == "fsdp2":
        raise ConfigError("train.strategy is 'fsdp2'; these networks are small: use 'ddp' (or 'auto')")
    train = replace(config.train, steps=steps, seed=seed)
    loader = SeededLoader(dataset, batch_size=config.model.batch_size, seed=seed, workers=config.data.workers)
    settings = optim if optim is not None else replace(config.optim, lr=lr or config.optim.lr)
    result: FitResult = Trainer(train, out=out, quiet=quiet).fit(distiller, loader, settings)
    rows = [row for row in result.history if "total" in row]
    last: Mapping[str, Any] = rows[-1] if rows else {}
    return {
        "steps": result.step,
        "seconds": result.seconds,
        "loss": last.get("total"),
        "terms": dict(last.get("terms", {})),
        "train": to_dict(train),
    }


def trainable_copy(network: NoiseNet) -> NoiseNet:
    """A copy of a network that trains, also of a frozen one."""
    twin = copy.deepcopy(network)
    for part in twin.modules():
        part.__dict__.pop("train", None)
    return twin.requires_grad_(True).train()


def _under(out: Path | None, name: str) -> Path | None:
    return None if out is None else out / name
