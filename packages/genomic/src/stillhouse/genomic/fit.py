"""From a configuration to trained networks: teacher and student.

Each function is one step of `run.train`; a study over seeds calls them in its own order. The data come from
`stillhouse.genomic.corpus`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from stillhouse.core.config import to_dict
from stillhouse.core.errors import ConfigError, DataError
from stillhouse.core.train import Distiller, OptimConfig, SeededLoader, TrainConfig, Trainer

from .config import GenomicConfig
from .corpus import Corpus
from .distiller import HadDistiller, LogitDistiller
from .student import Encoder, MaskedDecoder, RcEquivariant, build_student
from .teacher import (
    HuggingFaceTeacher,
    KmerTeacher,
    KmerTransformer,
    MaskedLanguageDistiller,
    RandomTeacher,
    ShuffledTeacher,
    Teacher,
    load_teacher,
)
from .tokenizers import KmerTokenizer

Facts = dict[str, Any]


def fit_teacher(
    config: GenomicConfig,
    corpus: Corpus,
    *,
    seed: int,
    out: Path | None,
    quiet: bool | None = None,
) -> tuple[Teacher, Facts]:
    """Train the k-mer teacher on the training tiles, or read the one that the configuration names.

    Args:
        config: `teacher`, `data`, `train`.
        corpus: training tiles.
        seed: of weights, batches and masks.
        out: folder of checkpoints and log; None writes nothing.
        quiet: no progress bar.

    Returns:
        The frozen teacher and facts of its training: "steps", "seconds", "loss".

    Raises:
        DataError: `teacher.source` cannot be used.
    """
    settings = config.teacher
    if settings.source is not None:
        return read_teacher(config), {"steps": 0, "seconds": 0.0, "loss": None}
    torch.manual_seed(seed)
    network = KmerTransformer(settings.network())
    distiller = MaskedLanguageDistiller(network, ratio=settings.ratio, seed=seed)
    loader = SeededLoader(
        corpus.training(length=settings.length),
        batch_size=settings.batch,
        seed=seed,
        workers=config.data.workers,
    )
    optim = OptimConfig(
        name="adamw",
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        betas=(0.9, 0.98),
        schedule="cosine",
        warmup_steps=round(settings.warmup * settings.steps),
        min_lr_ratio=0.05,
    )
    train = replace(config.train, steps=settings.steps, seed=seed, ema=None, clip_norm=1.0)
    facts = _fit(train, distiller, loader, optim, out=out, quiet=quiet)
    return KmerTeacher(network.eval(), name="6-mer Transformer trained here"), facts


def read_teacher(config: GenomicConfig) -> Teacher:
    """The teacher that `teacher.source` names: an artefact of an earlier run, or a Hugging Face model.

    Raises:
        ConfigError: no source.
        DataError: it cannot be read.
    """
    settings = config.teacher
    if settings.source is None:
        raise ConfigError("teacher.source is None; give a folder, or the name of a model")
    folder = Path(settings.source)
    for candidate in (folder, folder / "teacher"):
        if (candidate / "artifact.json").is_file():
            return load_teacher(candidate)
    if os.path.sep in settings.source and not folder.exists() and settings.source.startswith((".", "/", "~")):
        raise DataError(f"teacher.source: {folder} is not there")
    return HuggingFaceTeacher.from_pretrained(settings.source, trust_remote_code=settings.trust_remote_code)


def control(config: GenomicConfig, teacher: Teacher, *, seed: int) -> Teacher:
    """The teacher, or the control that `distill.teacher` asks for."""
    if config.distill.teacher == "random":
        return RandomTeacher(teacher, seed=seed + 1)
    if config.distill.teacher == "shuffled":
        return ShuffledTeacher(teacher, seed=seed)
    return teacher


def new_student(config: GenomicConfig, seed: int) -> Encoder | RcEquivariant:
    """An untrained student."""
    torch.manual_seed(seed)
    return build_student(config.model)


def new_decoder(config: GenomicConfig, encoder: Encoder | RcEquivariant, seed: int) -> MaskedDecoder:
    """An untrained decoder for it."""
    torch.manual_seed(seed + 1)
    settings = config.distill
    return MaskedDecoder(
        encoder.width, settings.decoder_depth, settings.decoder_heads, inner=settings.decoder_width
    )


def distiller_of(
    config: GenomicConfig,
    encoder: Encoder | RcEquivariant,
    decoder: MaskedDecoder | None,
    teacher: Teacher | None,
    *,
    seed: int,
) -> HadDistiller | LogitDistiller:
    """The distiller of a method.

    Raises:
        ValueError: a method that needs a teacher has none.
    """
    settings = config.distill
    if settings.needs_teacher and teacher is None:
        raise ValueError(f"distill.method {settings.method!r} needs a teacher")
    if settings.method == "logit_kd":
        assert teacher is not None  # just seen
        return LogitDistiller(encoder, control(config, teacher, seed=seed), settings, seed=seed)
    masks = KmerTokenizer(config.teacher.k) if teacher is None else teacher.tokenizer
    asked = control(config, teacher, seed=seed) if teacher is not None and settings.aligns else None
    return HadDistiller(encoder, decoder, asked, settings, kmers=masks, seed=seed)


def fit_student(
    config: GenomicConfig,
    corpus: Corpus,
    teacher: Teacher | None,
    *,
    seed: int,
    out: Path | None,
    quiet: bool | None = None,
) -> tuple[Encoder | RcEquivariant, MaskedDecoder | None, Facts]:
    """Train a student by `distill.method`; "none" returns it as it was born.

    Args:
        config: `model`, `distill`, `optim`, `train`.
        corpus: training tiles.
        teacher: needed by the methods that ask one; the others only take its tokenizer for their groups.
        seed: of weights, batches and masks.
        out: folder of checkpoints and log; None writes nothing.
        quiet: no progress bar.

    Returns:
        Encoder and decoder in evaluation mode (no decoder where the method has none), and facts.
    """
    settings = config.distill
    encoder = new_student(config, seed)
    if settings.method == "none":
        return encoder.eval(), None, {"steps": 0, "seconds": 0.0, "loss": None}
    decoder = new_decoder(config, encoder, seed) if settings.reconstructs else None
    distiller = distiller_of(config, encoder, decoder, teacher, seed=seed)
    loader = SeededLoader(
        corpus.training(), batch_size=settings.batch, seed=seed, workers=config.data.workers
    )
    train = replace(config.train, seed=seed)
    facts = _fit(train, distiller, loader, config.optim, out=out, quiet=quiet)
    return encoder.eval(), None if decoder is None else decoder.eval(), facts


def _fit(
    train: TrainConfig,
    distiller: Distiller,
    loader: SeededLoader,
    optim: OptimConfig,
    *,
    out: Path | None,
    quiet: bool | None,
) -> Facts:
    if train.strategy == "fsdp2":
        raise ConfigError("train.strategy is 'fsdp2'; these networks are small: use 'ddp' (or 'auto')")
    result = Trainer(train, out=out, quiet=quiet).fit(distiller, loader, optim)
    rows = [row for row in result.history if "total" in row]
    last: Mapping[str, Any] = rows[-1] if rows else {}
    return {
        "steps": result.step,
        "seconds": result.seconds,
        "loss": last.get("total"),
        "terms": dict(last.get("terms", {})),
        "train": to_dict(train),
    }
