"""What a set of stone images is: `Item`, one image and what is known of it; `Collection`, a set of them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from .images import load_image

Progress = Callable[[int, int], None]
"""Called as `progress(done, total)` while images are read."""

UNLABELLED = ""
"""The label of an image whose class is unknown or hidden."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One image of a stone.

    Args:
        path: the image file, or None where `array` holds the pixels.
        label: class name; the empty string where it is unknown or hidden.
        view: which side was photographed, such as `surface` or `section`.
        stone: id of the physical stone. Where it is unknown (`Collection.stone_known` is False) each image
            has an id of its own.
        split: `train`, `validation`, `test` or `unlabelled` where the data set says so, else None.
        array: the pixels, uint8 [H, W, 3], of an image that is in no file.
        name: what to call the image in a report; the path where left out.
    """

    path: Path | None
    label: str
    view: str
    stone: str
    split: str | None = None
    array: np.ndarray | None = field(default=None, repr=False, compare=False)
    name: str = ""

    def __post_init__(self) -> None:
        if self.path is None and self.array is None:
            raise ValueError("Item: both path and array are None; give the file or the pixels")
        if self.array is not None and (
            self.array.dtype != np.uint8 or self.array.ndim != 3 or self.array.shape[2] != 3
        ):
            raise ValueError(
                f"Item: array is {self.array.dtype} {self.array.shape}; it must be uint8 [H, W, 3]"
            )

    @property
    def title(self) -> str:
        """The name for people: `name`, or the path where there is none."""
        return self.name or str(self.path)

    def load(self) -> np.ndarray:
        """Return the pixels, uint8 [H, W, 3].

        Raises:
            DataError: the file cannot be read as an 8-bit image.
        """
        if self.array is not None:
            return self.array
        assert self.path is not None
        return load_image(self.path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Collection:
    """An ordered set of images with their classes and views.

    Args:
        items: the images.
        classes: names of the classes, in the order of the label numbers. Class names are data: any will do.
        views: names of the views.
        stone_known: whether `Item.stone` is the id of a physical stone. False where the data set does not
            tell, and then no split of it may claim to keep stones apart.
        name: what to call the set.
        notes: sentences that a report has to repeat, for example "no stone ids: the split is patch-level".
        split_level: how the collection was cut out of a larger one: `stone`, `patch`, `given`, or empty
            where it was not.

    Example:
        >>> pixels = np.zeros((4, 4, 3), np.uint8)
        >>> items = tuple(
        ...     Item(path=None, array=pixels, label=c, view="surface", stone=f"{c}{i}")
        ...     for c in "AB"
        ...     for i in (1, 2)
        ... )
        >>> collection = Collection(
        ...     items=items, classes=("A", "B"), views=("surface",), stone_known=True, name="tiny"
        ... )
        >>> len(collection), len(collection.filter(labels=("A",)))
        (4, 2)
        >>> print(collection.summary())
        tiny: 4 images, 4 stones, 2 classes, 1 view
          A: 2 (surface 2), 2 stones
          B: 2 (surface 2), 2 stones
    """

    items: tuple[Item, ...]
    classes: tuple[str, ...]
    views: tuple[str, ...]
    stone_known: bool
    name: str
    notes: tuple[str, ...] = ()
    split_level: str = ""

    def __post_init__(self) -> None:
        if len(set(self.classes)) != len(self.classes):
            raise ValueError(f"Collection: classes {self.classes} has a name twice")
        strange = sorted({item.label for item in self.items} - set(self.classes) - {UNLABELLED})
        if strange:
            raise ValueError(
                f"Collection: items have labels {strange} that are not in classes {self.classes}"
            )

    def __len__(self) -> int:
        return len(self.items)

    @property
    def labels(self) -> tuple[str, ...]:
        """The label of each item."""
        return tuple(item.label for item in self.items)

    @property
    def stones(self) -> tuple[str, ...]:
        """The ids of the stones, each once, in order of appearance."""
        return tuple(dict.fromkeys(item.stone for item in self.items))

    def filter(
        self,
        *,
        view: str | Iterable[str] | None = None,
        labels: Iterable[str] | None = None,
        stones: Iterable[str] | None = None,
    ) -> Collection:
        """Return the items of the named views, classes and stones; None keeps all of a kind.

        `classes` shrinks to `labels` (in the old order) and `views` to `view`; unlabelled items stay only
        where `labels` is None or names the empty string.

        Raises:
            ValueError: a name that the collection does not have.
        """
        wanted_views = None if view is None else {view} if isinstance(view, str) else set(view)
        wanted_labels = None if labels is None else set(labels)
        wanted_stones = None if stones is None else set(stones)
        _known("view", wanted_views, self.views)
        _known("labels", wanted_labels, (*self.classes, UNLABELLED))
        _known("stones", wanted_stones, self.stones)
        items = tuple(
            item
            for item in self.items
            if (wanted_views is None or item.view in wanted_views)
            and (wanted_labels is None or item.label in wanted_labels)
            and (wanted_stones is None or item.stone in wanted_stones)
        )
        return replace(
            self,
            items=items,
            classes=tuple(c for c in self.classes if wanted_labels is None or c in wanted_labels),
            views=tuple(v for v in self.views if wanted_views is None or v in wanted_views),
        )

    def with_items(self, items: Iterable[Item], *, notes: Iterable[str] = (), name: str = "") -> Collection:
        """Return `items` as a collection with the same classes and views; `notes` are added to the old."""
        return replace(self, items=tuple(items), notes=_unique((*self.notes, *notes)), name=name or self.name)

    def counts(self) -> dict[str, dict[str, int]]:
        """Return class → view → number of images, for every class and view, zeros included."""
        found = Counter((item.label, item.view) for item in self.items)
        return {label: {view: found[label, view] for view in self.views} for label in self.classes}

    def summary(self) -> str:
        """Return the counts and the notes as text, one class a line."""
        stones: dict[str, set[str]] = defaultdict(set)
        for item in self.items:
            stones[item.label].add(item.stone)
        total = len({item.stone for item in self.items})
        known = f", {_plural(total, 'stone')}" if self.stone_known else ", stones unknown"
        heading = (
            f"{self.name}: {_plural(len(self), 'image')}{known}, "
            f"{_plural(len(self.classes), 'class', 'classes')}, {_plural(len(self.views), 'view')}"
        )
        lines = [heading]
        for label, views in self.counts().items():
            parts = ", ".join(f"{view} {count}" for view, count in views.items())
            tail = f", {_plural(len(stones[label]), 'stone')}" if self.stone_known else ""
            lines.append(f"  {label}: {sum(views.values())} ({parts}){tail}")
        hidden = sum(item.label == UNLABELLED for item in self.items)
        if hidden:
            lines.append(f"  without a label: {hidden}")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def validate(collection: Collection, *, progress: Progress | None = None) -> None:
    """Open and decode every image once, so that a broken one is found before anything is written.

    Raises:
        DataError: the first image that cannot be used, with what to do.
    """
    for done, item in enumerate(collection.items, start=1):
        item.load()
        if progress is not None:
            progress(done, len(collection.items))


def _known(argument: str, wanted: set[str] | None, allowed: Iterable[str]) -> None:
    missing = sorted((wanted or set()) - set(allowed))
    if missing:
        names = ", ".join(list(dict.fromkeys(allowed))[:20])
        raise ValueError(f"{argument}: {missing} not in this collection; it has {names}")


def _plural(count: int, one: str, many: str = "") -> str:
    return f"{count} {one if count == 1 else many or one + 's'}"


def _unique(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(values))
