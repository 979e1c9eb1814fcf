"""Linear probes of frozen models on the tasks of a corpus: the same windows, folds and penalties for all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from stillhouse.core.metrics import Interval

from .data import Sequences
from .embed import embed_windows
from .probe import ProbeResult, linear_probe, paired_difference
from .teacher import Teacher

KEY = "mcc"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeTask:
    """A task cut into a side to fit on and a side to score on.

    Attributes:
        name: for people, for example "donor, hard decoys".
        fit: windows of training blocks.
        score: windows of blocks that no network has seen.
        pool: how a model's features become one vector a window: "mean" or "center".
        middle: characters of that center.
        note: how the windows were chosen.
    """

    name: str
    fit: Sequences
    score: Sequences
    pool: str = "mean"
    middle: int = 6
    note: str = ""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self.fit.classes

    def windows(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Letters, lengths, labels and groups, fit windows first."""
        both = (self.fit, self.score)
        return (
            np.concatenate([part.sequences for part in both]),
            np.concatenate([part.lengths for part in both]),
            np.concatenate([part.labels for part in both]),
            np.array([f"{at}/{group}" for at, part in enumerate(both) for group in part.groups]),
        )


def probe(
    model: nn.Module | Teacher,
    task: ProbeTask,
    *,
    seed: int = 0,
    batch: int = 64,
    resamples: int = 1000,
    progress: Callable[[int], None] | None = None,
) -> ProbeResult:
    """Fit a linear probe on a model's features and score it.

    Args:
        model: an encoder or a teacher, frozen.
        task: where.
        seed: of folds and resampling.
        batch: windows embedded at once.
        resamples: of the interval, over whole groups.
        progress: called with the number of windows done since the last call.
    """
    windows, lengths, labels, groups = task.windows()
    features = embed_windows(
        model,
        windows,
        lengths=lengths,
        pool=task.pool,  # type: ignore[arg-type]
        batch=batch,
        middle=task.middle,
        progress=progress,
    )
    count = len(task.fit.labels)
    return linear_probe(
        features,
        labels,
        train=np.arange(count),
        test=np.arange(count, len(labels)),
        groups=groups,
        seed=seed,
        resamples=resamples,
    )


def score_table(
    found: Mapping[str, Mapping[str, ProbeResult]],
) -> dict[str, dict[str, dict[str, Any]]]:
    """Model → task → {"estimate", "low", "high", "accuracy", "auroc"}, for the report."""
    return {
        model: {
            task: {**_plain(result.mcc), "accuracy": _plain(result.accuracy), "auroc": _plain(result.auroc)}
            for task, result in scored.items()
        }
        for model, scored in found.items()
    }


def differences(
    found: Mapping[str, Mapping[str, ProbeResult]],
    mine: str,
    others: Sequence[str],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Paired differences of one model to others on every task, with intervals over groups."""
    return [
        {
            "difference": f"{mine} − {other}",
            "task": task,
            **_plain(paired_difference(result, found[other][task], key=KEY, resamples=resamples, seed=seed)),
        }
        for other in others
        if other in found
        for task, result in found[mine].items()
    ]


def _plain(found: Interval) -> dict[str, Any]:
    return {"estimate": found.estimate, "low": found.low, "high": found.high}
