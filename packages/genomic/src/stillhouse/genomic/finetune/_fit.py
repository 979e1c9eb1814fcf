"""Train a classifier for each seed, keep its best epoch, score it on the test part."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.core.errors import DataError
from stillhouse.core.metrics import Interval
from stillhouse.core.train import Losses, OptimConfig, SeededLoader, Step, TrainConfig, Trainer

from ..heads import Classifier, Head, other_strand
from ..metrics import over_seeds, score
from ..tokenizers import CharacterTokenizer
from ._config import FinetuneConfig

if TYPE_CHECKING:
    from ..data import Sequences


@dataclass(frozen=True, slots=True)
class SeedResult:
    """One training.

    Attributes:
        seed: its seed.
        epoch: the epoch that was kept, from 1.
        validation: its score on the held-out tenth.
        history: the validation score of every epoch.
        scores: metric → interval over the groups of the test part (accuracy, mcc, auroc and the chosen one).
        probabilities: of the test part [N, C].
    """

    seed: int
    epoch: int
    validation: float
    history: tuple[float, ...]
    scores: Mapping[str, Interval]
    probabilities: npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class FinetuneResult:
    """All trainings.

    Attributes:
        metric: label of the chosen metric, with its convention.
        key: its key in `SeedResult.scores`.
        seeds: one result a seed.
        summary: metric key → `metrics.over_seeds`.
        classifier: of the seed with the best validation score, on the CPU.
        sizes: windows of "train", "validation" and "test".
    """

    metric: str
    key: str
    seeds: tuple[SeedResult, ...]
    summary: Mapping[str, Mapping[str, Any]]
    classifier: Classifier
    sizes: Mapping[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without weights and probabilities."""
        return {
            "metric": self.metric,
            "key": self.key,
            "sizes": dict(self.sizes),
            "summary": {key: dict(found) for key, found in self.summary.items()},
            "seeds": [
                {
                    "seed": found.seed,
                    "epoch": found.epoch,
                    "validation": found.validation,
                    "history": list(found.history),
                    "scores": {
                        key: {"estimate": value.estimate, "low": value.low, "high": value.high}
                        for key, value in found.scores.items()
                    },
                }
                for found in self.seeds
            ],
        }


def finetune(
    encoder: nn.Module | Callable[[int], nn.Module],
    train: Sequences,
    config: FinetuneConfig,
    *,
    test: Sequences,
    out: Path | None = None,
    quiet: bool | None = True,
    progress: Callable[[int], None] | None = None,
) -> FinetuneResult:
    """Fine-tune an encoder once for each seed and score it on the test part.

    Args:
        encoder: maps ids int64 [B, L] and `attend=` bool [B, L] to [B, L, d] and has `width`; it is copied
            and left as it is. Or a function from a seed to a fresh one, to train from scratch.
        train: labelled sequences; a tenth of them is held out by the seed.
        config: the protocol.
        test: what is scored.
        out: folder for the logs, `seed-0/log.jsonl` and so on; None keeps none.
        quiet: no progress bar of the trainer.
        progress: called with 1 after each seed.

    Returns:
        Scores of each seed and over the seeds.

    Raises:
        DataError: too few sequences, a class that the training part lacks, or classes that differ.
        ConfigError: a metric that does not fit the number of classes.
    """
    scorer = config.scorer()
    check_parts(train, test, scorer.key)
    results: list[SeedResult] = []
    best: tuple[float, Classifier] | None = None
    sizes: dict[str, int] = {}
    for seed in range(config.seed, config.seed + config.seeds):
        torch.manual_seed(seed)
        body = copy.deepcopy(encoder) if isinstance(encoder, nn.Module) else encoder(seed)
        head = Head(int(body.width), len(train.classes), config.pool, compat=config.compat)  # type: ignore[arg-type]
        classifier = Classifier(body, head, CharacterTokenizer())
        fit, held = _hold_out(train, config.validation, seed)
        sizes = {"train": len(fit), "validation": len(held), "test": len(test.labels)}
        kept, history = _train(
            classifier, train, fit, held, config, seed, None if out is None else out / f"seed-{seed}", quiet
        )
        probabilities = probabilities_of(classifier, test, conjoin=config.conjoin, batch=config.batch)
        keys = tuple(dict.fromkeys(("accuracy", "mcc", "auroc", scorer.key)))
        found = score(
            test.labels, probabilities, keys=keys, groups=groups_of(test), resamples=500, seed=config.seed
        )
        results.append(SeedResult(seed, kept + 1, history[kept], tuple(history), found, probabilities))
        if best is None or history[kept] > best[0]:
            best = history[kept], classifier.cpu()
        if progress is not None:
            progress(1)
    assert best is not None  # there is at least one seed
    summary = {
        key: over_seeds([found.scores[key].estimate for found in results]) for key in results[0].scores
    }
    return FinetuneResult(scorer.label, scorer.key, tuple(results), summary, best[1], sizes)


@torch.no_grad()
def probabilities_of(
    classifier: Classifier, data: Sequences, *, conjoin: bool = True, batch: int = 64
) -> npt.NDArray[np.float64]:
    """Class probabilities of sequences [N, C]; `conjoin` averages the logits of both strands."""
    was_training = classifier.training
    classifier.eval()
    call = classifier.conjoined if conjoin else classifier.forward
    parts = [
        call(data.sequences[at : at + batch], data.lengths[at : at + batch])
        .double()
        .softmax(-1)
        .cpu()
        .numpy()
        for at in range(0, len(data.labels), batch)
    ]
    classifier.train(was_training)
    return np.concatenate(parts)


# ---- parts


class _Distiller:
    """The contract of the trainer for plain supervised training."""

    def __init__(self, classifier: Classifier, *, freeze: bool) -> None:
        self.classifier = classifier
        if freeze:
            classifier.encoder.requires_grad_(False)

    def trainable(self) -> dict[str, nn.Module]:
        return {"classifier": self.classifier}

    def frozen(self) -> dict[str, nn.Module]:
        return {}

    def roles(self, step: int) -> Sequence[str]:
        return ("classifier",)

    def loss(self, role: str, batch: tuple[Tensor, Tensor, Tensor, Tensor], step: Step) -> Losses:
        ids, attend, inside, labels = batch
        loss = F.cross_entropy(self.classifier.logits(ids, attend, inside), labels)
        return Losses(loss, {"cross_entropy": loss})


class _Windows:
    """Training sequences, each strand with the same chance where augmented."""

    seeded = True

    def __init__(self, data: Sequences, rows: npt.NDArray[np.int64], *, augment: bool) -> None:
        self._data, self._rows, self._augment = data, rows, augment

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, key: tuple[int, int]) -> tuple[npt.NDArray[np.uint8], int, int]:
        index, seed = key
        row = int(self._rows[index])
        window, length = self._data.sequences[row], int(self._data.lengths[row])
        if self._augment and np.random.default_rng(seed).random() < 0.5:
            window = other_strand(window[None], [length])[0]
        return window, length, int(self._data.labels[row])


class _EnoughError(Exception):
    """Validation has not improved for long enough."""


def _train(
    classifier: Classifier,
    data: Sequences,
    fit: npt.NDArray[np.int64],
    held: npt.NDArray[np.int64],
    config: FinetuneConfig,
    seed: int,
    out: Path | None,
    quiet: bool | None,
) -> tuple[int, list[float]]:
    """Train, put the weights of the best epoch into the classifier, and return that epoch and the history."""
    batch = min(config.batch, len(fit))
    per_epoch = len(fit) // batch
    steps = per_epoch * config.epochs

    def collate(
        items: Sequence[tuple[npt.NDArray[np.uint8], int, int]],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        windows, lengths, labels = zip(*items, strict=True)
        return *classifier.prepare(np.stack(windows), np.array(lengths)), torch.tensor(labels)

    loader = SeededLoader(
        _Windows(data, fit, augment=config.augment), batch_size=batch, seed=seed, collate=collate
    )
    validation = data.subset(held)
    scorer = config.scorer()
    history: list[float] = []
    best: dict[str, Tensor] = {}

    def evaluate(_: Any, step: int) -> dict[str, float]:
        if len(history) == math.ceil(step / per_epoch):  # the end of the run, scored a moment ago
            return {"validation": history[-1]}
        p = probabilities_of(classifier, validation, conjoin=config.conjoin, batch=config.batch)
        value = scorer(validation.labels, p.argmax(axis=1), p)
        if not history or value > max(history):
            best.update({name: tensor.detach().clone() for name, tensor in classifier.state_dict().items()})
        history.append(value)
        waited = len(history) - 1 - history.index(max(history))
        if config.patience is not None and waited >= config.patience:
            raise _EnoughError
        return {"validation": value}

    settings = TrainConfig(
        steps=steps,
        clip_norm=config.clip,
        evaluate_every=per_epoch,
        log_every=max(1, per_epoch // 2),
        seed=seed,
        accelerator=config.accelerator,
    )
    optim = OptimConfig(
        lr=config.lr,
        weight_decay=config.weight_decay,
        warmup_steps=max(1, round(config.warmup * steps)) if config.warmup else 0,
        min_lr_ratio=config.min_lr_ratio,
    )
    trainer = Trainer(settings, out=out, quiet=quiet)
    with contextlib.suppress(_EnoughError):
        trainer.fit(
            _Distiller(classifier, freeze=config.freeze), loader, optim, evaluate=evaluate, resume=False
        )
    classifier.load_state_dict(best)
    return history.index(max(history)), history


def _hold_out(
    data: Sequences, share: float, seed: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Rows to train on and rows that choose the epoch: the data's own, else at random by the seed."""
    rows = np.arange(len(data.labels))
    if data.split is not None and "validation" in data.split:
        marks = np.asarray(data.split)
        return rows[marks == "train"], rows[marks == "validation"]
    order = np.random.default_rng(seed).permutation(rows)
    count = max(1, round(share * len(rows)))
    return np.sort(order[count:]), np.sort(order[:count])


def groups_of(data: Sequences) -> npt.NDArray[Any] | None:
    """Groups of the test part, None where they are not known or all one."""
    if len(data.groups) != len(data.labels) or len(set(data.groups)) < 2:
        return None
    return np.asarray(data.groups)


def check_parts(train: Sequences, test: Sequences, key: str) -> None:
    """Refuse parts that cannot be trained or scored on; `key` is that of the metric."""
    if tuple(train.classes) != tuple(test.classes):
        raise DataError(
            f"training and test part name different classes: {', '.join(train.classes)} and "
            f"{', '.join(test.classes)}; use the same labels"
        )
    if len(train.labels) < 10 or len(test.labels) < 2:
        raise DataError(
            f"{train.name}: {len(train.labels)} sequences to train on and {len(test.labels)} to test on; "
            "fine-tuning needs at least 10 and 2"
        )
    missing = [name for at, name in enumerate(train.classes) if not (train.labels == at).any()]
    if missing:
        raise DataError(f"{train.name}: the training part has no sequence of the class {missing[0]!r}")
    if key == "f1_binary" and len(train.classes) != 2:
        raise DataError(
            f"{train.name}: has {len(train.classes)} classes and the convention's metric is F1 of class 1 of "
            "two; name another kind of task or convention"
        )
