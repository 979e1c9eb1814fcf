"""The gallery: what the student compares an image with; adding a class changes nothing else."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..metrics import class_prototypes, euclidean, fuse_views, nearest, prototype_logits
from ..metrics._check import as_embeddings, as_labels
from ._calibrate import Calibration, calibrate

FEW = 5  # images below which a class's prototype is called weak


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """Known images that are neither references nor trained on; the threshold rests on them where they exist.

    Attributes:
        embeddings: [V, d].
        labels: indices into the gallery's classes [V].
        stones: stone of each [V].
        views: view of each [V].
    """

    embeddings: Tensor
    labels: Tensor
    stones: tuple[str, ...]
    views: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Matches:
    """What a gallery says of N embeddings.

    Attributes:
        nearest_class: index of the class with the nearest prototype [N].
        probabilities: softmax(−‖f − c_k‖²/τ) [N, C].
        distance: distance to the nearest prototype [N].
        unknown: whether that distance is past the threshold [N]; all False without a threshold.
        neighbours: rows of the nearest references, nearest first [N, k].
        neighbour_distances: their distances [N, k].
    """

    nearest_class: Tensor
    probabilities: Tensor
    distance: Tensor
    unknown: Tensor
    neighbours: Tensor
    neighbour_distances: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Gallery:
    """Labelled reference embeddings with their prototypes, threshold and temperature. Immutable: changes
    return a new one.

    Build one with `Gallery.build`, not with the constructor.

    Attributes:
        classes: class names, in the order of the prototypes; each has at least one reference.
        embeddings: references [M, d].
        labels: index into `classes` of each reference [M].
        stones: stone of each reference [M].
        views: view of each reference [M]; "" where there is none.
        names: file name of each reference [M].
        thumbnails: small pictures, uint8 [M, t, t, 3], or None.
        calibration: the unknown threshold and the temperature, and how far they can be trusted.
        held_out: images that the threshold was found on besides the references, or None.
        added: classes added after training.
        guessed: classes whose stones are not known: every image counts as a stone of its own.

    Example:
        >>> gallery = Gallery.build(torch.eye(2).repeat_interleave(2, 0), [0, 0, 1, 1], classes=("WW", "UA"),
        ...                         stones=("a", "b", "c", "d"))
        >>> gallery = gallery.add("CYS", torch.tensor([[-1.0, 0.0]]))
        >>> found = gallery.match(torch.tensor([[0.9, 0.1], [-1.0, 0.1]]), k=1)
        >>> [gallery.classes[i] for i in found.nearest_class]
        ['WW', 'CYS']
    """

    classes: tuple[str, ...]
    embeddings: Tensor
    labels: Tensor
    stones: tuple[str, ...]
    views: tuple[str, ...]
    names: tuple[str, ...]
    thumbnails: Tensor | None
    calibration: Calibration
    held_out: HeldOut | None
    added: tuple[str, ...]
    guessed: tuple[str, ...]

    # ---- build

    @classmethod
    def build(
        cls,
        embeddings: Tensor,
        labels: Tensor | Sequence[int],
        *,
        classes: Sequence[str],
        stones: Sequence[str] | None = None,
        views: Sequence[str] | None = None,
        names: Sequence[str] | None = None,
        thumbnails: Tensor | None = None,
        held_out: HeldOut | None = None,
        rate: float = 0.05,
    ) -> Gallery:
        """Make a gallery from labelled embeddings and calibrate it.

        Args:
            embeddings: [M, d], finite.
            labels: indices into `classes` [M].
            classes: distinct class names; each must have a reference.
            stones: stone of each reference; None: not known, every image counts as a stone of its own and the
                calibration says so.
            views: view of each reference.
            names: file name of each reference; default "image-<row>".
            thumbnails: uint8 [M, t, t, 3].
            held_out: known images that were not trained on, for the threshold; their class indices refer to
                `classes`.
            rate: share of known images that may be called unknown.

        Raises:
            ValueError: shapes, names or labels do not fit.
        """
        embeddings = as_embeddings("embeddings", embeddings)
        count = len(embeddings)
        label = as_labels("labels", labels, count)
        given = tuple(class_name(name) for name in classes)
        _check_distinct(given)
        empty = [name for i, name in enumerate(given) if not bool((label == i).any())]
        if empty or (count and int(label.max()) >= len(given)):
            raise ValueError(
                f"classes and labels do not fit: "
                f"{'no reference of ' + ', '.join(empty) if empty else 'labels exceed classes'}; "
                "give every class at least one image, and no others"
            )
        own = _names("names", names, count) or tuple(f"image-{i}" for i in range(count))
        known = _names("stones", stones, count)
        return cls(
            classes=given,
            embeddings=embeddings,
            labels=label,
            stones=known or tuple(f"{i}/{name}" for i, name in enumerate(own)),
            views=_names("views", views, count) or ("",) * count,
            names=own,
            thumbnails=_check_thumbnails(thumbnails, count),
            calibration=_UNSET,
            held_out=held_out,
            added=(),
            guessed=given if known is None else (),
        ).calibrate(rate=rate)

    def calibrate(self, *, rate: float | None = None, held_out: HeldOut | None = None) -> Gallery:
        """Find the unknown threshold and the temperature again.

        Each class uses its held-out images if it has any, else its references with each stone left out in
        turn: an image of a stone that is among the references is nearer than one of a new stone ever will be.
        References that were *trained on* stay nearer even so; prefer held-out images.

        Args:
            rate: share of known images that may be called unknown, in (0, 0.5]; None keeps the present one.
            held_out: replaces the held-out images; None keeps them.
        """
        other = self.held_out if held_out is None else held_out
        found = calibrate(
            self.embeddings,
            self.labels,
            np.asarray(self.stones, dtype=object),
            classes=self.classes,
            rate=self.calibration.rate if rate is None else rate,
            held_out=None
            if other is None
            else (other.embeddings, other.labels, np.asarray(other.stones, dtype=object)),
        )
        if self.guessed:
            who = ", ".join(self.guessed)
            note = f" Stones are not known for {who}: each image counts as one, which is optimistic."
            found = replace(found, statement=found.statement + note)
        return replace(self, calibration=found, held_out=other)

    def add(
        self,
        name: str,
        embeddings: Tensor,
        *,
        stones: Sequence[str] | None = None,
        views: Sequence[str] | None = None,
        names: Sequence[str] | None = None,
        thumbnails: Tensor | None = None,
        extend: bool = False,
    ) -> Gallery:
        """Add a class, or images to one, without training; the threshold is calibrated again.

        One image is enough to make a class known. A class with images of a single stone takes no part in the
        threshold, and one with fewer than five images has a weak prototype: `weak` lists those.

        Args:
            name: the class.
            embeddings: its images by the same student [n, d], n ≥ 1.
            stones: stone of each; None: not known.
            views: view of each.
            names: file name of each.
            thumbnails: uint8 [n, t, t, 3], of the gallery's size.
            extend: allow a class that the gallery has.

        Returns:
            The gallery with the class.

        Raises:
            ValueError: the class exists and `extend` is False, its name differs from another's by case alone,
                or shapes do not fit.
        """
        name = class_name(name)
        same = [have for have in self.classes if _fold(have) == _fold(name)]
        if same and same[0] != name:
            raise ValueError(
                f"the class {name!r} differs from {same[0]!r} by case alone; use {same[0]!r} or another name"
            )
        if same and not extend:
            raise ValueError(
                f"the class {name!r} is in the gallery already; pass extend=True to add images to it"
            )
        embeddings = as_embeddings("embeddings", embeddings).to(self.embeddings.dtype)
        count = len(embeddings)
        if count == 0 or embeddings.shape[1] != self.embeddings.shape[1]:
            raise ValueError(
                f"embeddings has the shape {tuple(embeddings.shape)}; give at least one of "
                f"{self.embeddings.shape[1]} dimensions"
            )
        own = _names("names", names, count) or tuple(f"{name}-{i}" for i in range(count))
        known = _names("stones", stones, count)
        new_stones = known or tuple(f"{name}/{len(self.names) + i}/{image}" for i, image in enumerate(own))
        pictures = _check_thumbnails(thumbnails, count)
        if self.thumbnails is not None:
            size = self.thumbnails.shape[1]
            blank = torch.full((count, size, size, 3), 127, dtype=torch.uint8)
            pictures = torch.cat([self.thumbnails, blank if pictures is None else pictures])
        else:
            pictures = None
        classes = self.classes if same else (*self.classes, name)
        guessed = {*self.guessed, name} if known is None else set(self.guessed)
        return replace(
            self,
            classes=classes,
            embeddings=torch.cat([self.embeddings, embeddings]),
            labels=torch.cat([self.labels, torch.full((count,), classes.index(name), dtype=torch.int64)]),
            stones=self.stones + new_stones,
            views=self.views + (_names("views", views, count) or ("",) * count),
            names=self.names + own,
            thumbnails=pictures,
            added=self.added if same else (*self.added, name),
            guessed=tuple(c for c in classes if c in guessed),
        ).calibrate()

    def fused(self, how: str = "max") -> Gallery:
        """The same gallery with one reference per stone, its views fused; for queries that are fused the same
        way.

        Args:
            how: "max", "mean" or "concat".

        Raises:
            ValueError: no stone is known, or only one view exists.
        """
        views = self.view_names
        if len(self.guessed) == len(self.classes):
            raise ValueError(
                "the gallery does not know which images are of one stone, so views cannot be fused"
            )
        if len(views) < 2:
            raise ValueError(f"the gallery has the views {list(views)}; fusing takes two")
        own = _pure(self.labels, self.stones)
        mine = fuse_views(
            self.embeddings[own],
            [self.stones[i] for i in own],
            [self.views[i] for i in own],
            how,
            all_views=views,
        )
        first = [own[rows[0]] for rows in mine.rows]
        lost = [name for i, name in enumerate(self.classes) if i not in set(self.labels[first].tolist())]
        if lost:
            raise ValueError(
                f"every stone of {', '.join(lost)} has images of two classes; such stones cannot be fused"
            )
        other = self.held_out
        if other is not None:
            rest = _pure(other.labels, other.stones)
            theirs = fuse_views(
                other.embeddings[rest],
                [other.stones[i] for i in rest],
                [other.views[i] for i in rest],
                how,
                all_views=views,
            )
            start = [rest[rows[0]] for rows in theirs.rows]
            other = HeldOut(
                embeddings=theirs.embeddings,
                labels=other.labels[start],
                stones=theirs.stones,
                views=("fused",) * len(start),
            )
        return replace(
            self,
            embeddings=mine.embeddings,
            labels=self.labels[first],
            stones=mine.stones,
            views=("fused",) * len(first),
            names=mine.stones,
            thumbnails=None if self.thumbnails is None else self.thumbnails[first],
            held_out=other,
        ).calibrate()

    # ---- use

    @property
    def prototypes(self) -> Tensor:
        """Mean reference of each class [C, d]."""
        return class_prototypes(self.embeddings, self.labels)[1]

    @property
    def threshold(self) -> float | None:
        """Distance past which an image is unknown."""
        return self.calibration.threshold

    @property
    def temperature(self) -> float:
        """τ of the class probabilities."""
        return self.calibration.temperature

    @property
    def view_names(self) -> tuple[str, ...]:
        """The views that occur, sorted."""
        return tuple(sorted(set(self.views)))

    @property
    def counts(self) -> dict[str, tuple[int, int]]:
        """Class → (images, stones)."""
        stones = np.asarray(self.stones, dtype=object)
        of = {name: (self.labels == i).numpy() for i, name in enumerate(self.classes)}
        return {name: (int(own.sum()), len(set(stones[own]))) for name, own in of.items()}

    @property
    def weak(self) -> tuple[str, ...]:
        """Classes with fewer than five reference images."""
        return tuple(name for name, (images, _) in self.counts.items() if images < FEW)

    def match(self, embeddings: Tensor, *, k: int = 3) -> Matches:
        """Compare embeddings with the gallery.

        Args:
            embeddings: by the same student [N, d].
            k: how many nearest references to name; fewer where the gallery is smaller.

        Raises:
            ValueError: the dimensions differ, or an embedding is not finite.
        """
        embeddings = as_embeddings("embeddings", embeddings).to(self.embeddings.dtype)
        prototypes = self.prototypes
        distances = euclidean(embeddings, prototypes)
        closest = distances.min(dim=1)
        near, rows = nearest(embeddings, self.embeddings, max(1, min(k, len(self.embeddings))))
        limit = float("inf") if self.threshold is None else self.threshold
        return Matches(
            nearest_class=closest.indices,
            probabilities=prototype_logits(embeddings, prototypes, self.temperature).softmax(dim=1),
            distance=closest.values,
            unknown=closest.values > limit,
            neighbours=rows,
            neighbour_distances=near,
        )


_UNSET = Calibration(
    threshold=None,
    rate=0.05,
    low=None,
    high=None,
    stones=0,
    images=0,
    left_out=(),
    temperature=1.0,
    statement="",
)


def class_name(name: str) -> str:
    """Return a class name in Unicode NFC without outer spaces.

    Raises:
        ValueError: it is empty, longer than 100 characters, holds a line break or control character, or is
            "unknown", which is what `identify` answers for images of no class.
    """
    clean = unicodedata.normalize("NFC", str(name)).strip()
    bad = [c for c in clean if unicodedata.category(c) in ("Cc", "Cs")]
    if not clean or len(clean) > 100 or bad:
        raise ValueError(f"class is {name!r}; a class name has 1 to 100 characters and no line break")
    if _fold(clean) == "unknown":
        raise ValueError(
            "class is 'unknown', which is the answer for images of no class; choose another name"
        )
    return clean


def _fold(name: str) -> str:
    return unicodedata.normalize("NFC", name).strip().casefold()


def _check_distinct(names: Sequence[str]) -> None:
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(_fold(name), name)
        if other is not name:
            raise ValueError(
                f"classes holds {other!r} and {name!r}, which differ at most by case; class names must be "
                f"distinct"
            )
    if not names:
        raise ValueError("classes is empty; a gallery needs at least one class")


def _pure(labels: Tensor, stones: Sequence[str]) -> list[int]:
    """Rows whose stone has images of one class only."""
    seen: dict[str, set[int]] = {}
    for stone, label in zip(stones, labels.tolist(), strict=True):
        seen.setdefault(stone, set()).add(label)
    return [row for row, stone in enumerate(stones) if len(seen[stone]) == 1]


def _names(argument: str, values: Sequence[str] | None, count: int) -> tuple[str, ...] | None:
    if values is None:
        return None
    names = tuple(str(value) for value in values)
    if len(names) != count:
        raise ValueError(
            f"{argument} must hold one name per embedding: {count} embeddings, {len(names)} names"
        )
    return names


def _check_thumbnails(thumbnails: Tensor | None, count: int) -> Tensor | None:
    if thumbnails is None:
        return None
    shape = tuple(thumbnails.shape)
    if (
        thumbnails.dtype != torch.uint8
        or len(shape) != 4
        or shape[0] != count
        or shape[1] != shape[2]
        or shape[3] != 3
    ):
        raise ValueError(f"thumbnails must be uint8 [{count}, t, t, 3], got {thumbnails.dtype} {shape}")
    return thumbnails
