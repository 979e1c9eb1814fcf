"""Score trained networks on the test part: one table row each, in the words of `evaluate_embeddings`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import KidneyConfig
from .data import Collection
from .distiller import Classifier
from .metrics import calibration_scores, evaluate_embeddings, prototype_correct, share_interval
from .predict import embed

# What a classifier says is scored on its own answers; the rest of its row on its features.
_ANSWERS = ("accuracy", "macro_f1", "per_class", "confusion", "calibration", "lone")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """A network's row.

    Attributes:
        scores: of `evaluate_embeddings`, one query an image (its windows averaged).
        patches: accuracy {estimate, low, high} with each window of an image asked alone; the same as
            `scores["accuracy"]` where images have one window.
        correct: whether each test image was right, float [N].
        patches_correct: the same for each window [N · crops].
        query: test embeddings [N, d].
        gallery: embeddings of the labelled training images [M, d].
    """

    scores: dict[str, Any]
    patches: dict[str, Any]
    correct: Tensor
    patches_correct: Tensor
    query: Tensor
    gallery: Tensor


def labels_of(collection: Collection, classes: Sequence[str]) -> Tensor:
    """Class numbers of a collection [N]; −1 where an image has none of these classes."""
    numbers = {name: number for number, name in enumerate(classes)}
    return torch.tensor([numbers.get(label, -1) for label in collection.labels], dtype=torch.int64)


def embeddings_of(
    config: KidneyConfig, network: nn.Module, collection: Collection, *, fused: bool = True
) -> Tensor:
    """Embeddings of a collection as the configuration shows it: [N, d], or [N · crops, d] when not fused."""
    data = config.data
    return embed(
        network,
        collection,
        size=data.image_size,
        crops=data.crops,
        zoom=data.zoom if data.zoom > 1 else None,
        fuse_crops=fused,
    )


def score_embedding(
    config: KidneyConfig,
    network: nn.Module,
    train: Collection,
    test: Collection,
    classes: Sequence[str],
    *,
    tau: float,
) -> Scored:
    """Score a network that embeds: prototypes and neighbours are the labelled training images.

    Args:
        config: `data` and `evaluate`.
        network: images → embeddings of length 1.
        train: labelled training images.
        test: test images, of stones that `train` does not show.
        classes: names, in the order of label numbers.
        tau: temperature of its posterior.
    """
    gallery = embeddings_of(config, network, train)
    windows = embeddings_of(config, network, test, fused=False)
    query = F.normalize(windows.view(len(test), config.data.crops, -1).mean(dim=1), dim=1)
    labels, reference = labels_of(test, classes), labels_of(train, classes)
    return _scored(config, query, windows, labels, gallery, reference, train, test, classes, tau)


def score_classifier(
    config: KidneyConfig, network: Classifier, train: Collection, test: Collection, classes: Sequence[str]
) -> Scored:
    """Score the cross-entropy baseline: accuracy, recall and calibration by its softmax, retrieval by its
    features.

    An image's answer is the mean softmax of its windows.
    """
    features = _View(network.embed, network)
    kept = score_embedding(config, features, train, test, classes, tau=config.distill.tau)
    softmax = _View(lambda images: network(images).softmax(-1), network)
    windows = embeddings_of(config, softmax, test, fused=False)
    answers = windows.view(len(test), config.data.crops, -1).mean(dim=1)
    # The class whose corner of the simplex is nearest is the most probable one, so that the same code scores
    # it.
    corners = torch.eye(len(classes))
    labels = labels_of(test, classes)
    own = _scored(
        config, answers, windows, labels, corners, torch.arange(len(classes)), None, test, classes, 1.0
    )
    scores = {**kept.scores, **{name: own.scores[name] for name in _ANSWERS}}
    every = torch.arange(len(classes))
    scores["calibration"] = calibration_scores(answers.clamp_min(1e-12).log(), labels, every, 1.0)
    for part in ("per_view", "fused"):
        scores.pop(part, None)  # of the features; the classifier's own answers have none
    return Scored(
        scores=scores,
        patches=own.patches,
        correct=own.correct,
        patches_correct=own.patches_correct,
        query=kept.query,
        gallery=kept.gallery,
    )


class _View(nn.Module):
    """A network seen through one of its methods."""

    def __init__(self, function: Any, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self._function = function
        self.train(network.training)

    def forward(self, images: Tensor) -> Tensor:
        return self._function(images)


def _scored(
    config: KidneyConfig,
    query: Tensor,
    windows: Tensor,
    labels: Tensor,
    gallery: Tensor,
    reference: Tensor,
    train: Collection | None,
    test: Collection,
    classes: Sequence[str],
    tau: float,
) -> Scored:
    options = config.evaluate
    stones = [item.stone for item in test.items] if test.stone_known else None
    views: dict[str, Any] = (
        {}
        if train is None
        else {
            "views": [item.view for item in test.items],
            "gallery_views": [item.view for item in train.items],
            "gallery_groups": [item.stone for item in train.items] if train.stone_known else None,
        }
    )
    scores = evaluate_embeddings(
        query,
        labels,
        gallery,
        reference,
        classes=classes,
        groups=stones,
        fuse=options.fuse,
        k=options.neighbours,
        temperature=tau,
        resamples=options.resamples,
        **views,
    )
    crops = len(windows) // len(query)
    correct = torch.from_numpy(prototype_correct(query, labels, gallery, reference))
    alone = torch.from_numpy(prototype_correct(windows, labels.repeat_interleave(crops), gallery, reference))
    patches = share_interval(
        alone.numpy(),
        None if stones is None else np.repeat(np.asarray(stones, dtype=object), crops),
        level=0.95,
        resamples=options.resamples,
        seed=0,
    )
    return Scored(
        scores=scores, patches=patches, correct=correct, patches_correct=alone, query=query, gallery=gallery
    )
