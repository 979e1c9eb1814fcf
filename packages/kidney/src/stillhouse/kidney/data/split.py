"""Cut a collection into train, validation, test and unlabelled parts.

The stone literature splits *patches* at random, so that patches of one stone lie in train and test; scores
then say how well a stone is recognised again, not how well its type is. The default here keeps stones
apart. Both protocols are offered, so that the gap can be reported.
"""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from stillhouse.core.errors import DataError

from .items import UNLABELLED, Collection, Item
from .layout import NO_STONES

_CANDIDATES = 64


class LeakageWarning(UserWarning):
    """A split may show the same stone in train and test."""


def split_collection(
    collection: Collection,
    *,
    by: Literal["stone", "patch", "given"] = "stone",
    test: float = 0.2,
    validation: float = 0.0,
    shots: int | None = None,
    seed: int = 0,
) -> dict[str, Collection]:
    """Cut a collection into parts.

    Args:
        collection: what to cut.
        by: `stone` keeps all images of a stone in one part, stratified by class; where stones are unknown
            it can only cut by patch, warns and says so in the notes. `patch` is the protocol of the stone
            papers and warns. `given` takes the split that the data set comes with.
        test: share of the stones (or images) of each class for the test part, 0 to below 1; at least one of
            each class where it is not 0 and the class has two. Ignored with `given`.
        validation: the same for the validation part. With `given` it is taken from the train part, and only
            where the data set has no validation part of its own.
        shots: labelled images for each class that stay in the train part, from different stones and views
            where possible; the rest of the train part becomes `unlabelled` with its labels removed. None
            keeps all labels.
        seed: the same seed gives the same parts.

    Returns:
        dict: `train` and `test` always, `validation` where asked for or given, `unlabelled` where `shots`
            is given or the collection has images without a label. All have the classes and views of
            the collection, `split_level` and notes. Items keep the order of the collection.

    Raises:
        DataError: a class that is too small to cut, or a given split without a train or a test part.
        ValueError: an argument out of range.

    Warns:
        LeakageWarning: where the same stone may be, or is, in train and test.

    Example:
        >>> from stillhouse.kidney.data import SimulateConfig, simulate
        >>> parts = split_collection(simulate(SimulateConfig(stones_per_class=5)), shots=2)
        >>> sorted(parts), len(parts["train"]), set(parts["unlabelled"].labels)
        (['test', 'train', 'unlabelled'], 12, {''})
        >>> set(parts["train"].stones) & set(parts["test"].stones)
        set()
    """
    _check(by, test, validation, shots)
    _check_sizes(collection, by, test, validation)
    rng = np.random.default_rng(seed)
    notes: list[str] = []
    level: str = by
    if by == "given":
        assigned = _given(collection, validation, rng, notes)
    else:
        if by == "stone" and not collection.stone_known:
            level = "patch"
            _warn(
                f"{collection.name}: {NO_STONES}; give a stone_pattern or a table with a stone column",
                notes,
                [],
            )
        elif by == "patch":
            _warn(
                f"{collection.name}: the split is patch-level, as in the stone papers: the same stone may "
                "be in train and test, so that scores are too good; by='stone' keeps them apart",
                notes,
                [],
            )
        labelled = [n for n, item in enumerate(collection.items) if item.label != UNLABELLED]
        assigned = _assign(collection, labelled, level == "stone", test, validation, rng, notes)
        reserved = {collection.items[n].stone for n, part in assigned.items() if part != "train"}
        for n, item in enumerate(collection.items):
            if item.label == UNLABELLED and not (level == "stone" and item.stone in reserved):
                assigned[n] = "unlabelled"
    if shots is not None:
        _hide(collection, assigned, shots, rng, notes)
    return _parts(
        collection,
        assigned,
        level,
        notes,
        always=("validation",) * (validation > 0) + ("unlabelled",) * (shots is not None),
    )


def _check(by: str, test: float, validation: float, shots: int | None) -> None:
    if by not in ("stone", "patch", "given"):
        raise ValueError(f"by: {by!r} is unknown; allowed are 'stone', 'patch' and 'given'")
    for name, share in (("test", test), ("validation", validation)):
        if not 0 <= share < 1:
            raise ValueError(f"{name}: {share} must be at least 0 and below 1")
    if by != "given" and test + validation >= 1:
        raise ValueError(
            f"test + validation: {test} + {validation} leaves nothing to train on; make them smaller"
        )
    if shots is not None and shots < 1:
        raise ValueError(f"shots: {shots} must be at least 1, or None for all labels")


def _check_sizes(collection: Collection, by: str, test: float, validation: float) -> None:
    counts = Counter(collection.labels)
    for label in collection.classes:
        if counts[label] == 0:
            raise DataError(
                f"{collection.name}: class {label!r} has no image; add some or take the class out"
            )
        if counts[label] == 1 and (by == "given" or test > 0 or validation > 0):
            raise DataError(
                f"{collection.name}: class {label!r} has one image, which cannot be in train and in test; "
                "add images or take the class out"
            )


def _assign(
    collection: Collection,
    indices: Sequence[int],
    by_stone: bool,
    test: float,
    validation: float,
    rng: np.random.Generator,
    notes: list[str],
) -> dict[int, str]:
    """Give each of the items a part, whole groups at a time, class by class."""
    groups: dict[object, list[int]] = defaultdict(list)
    for n in indices:
        groups[collection.items[n].stone if by_stone else n].append(n)
    strata: dict[str, list[list[int]]] = defaultdict(list)
    for members in groups.values():
        # A stone of mixed composition goes whole, with the class that most of its images show.
        label = Counter(collection.items[n].label for n in members).most_common(1)[0][0]
        strata[label].append(members)
    assigned: dict[int, str] = {}
    unit = "stone" if by_stone else "image"
    for label in collection.classes:
        stratum = strata.get(label, [])
        wanted = {"test": test, "validation": validation}
        numbers = _numbers(len(stratum), wanted)
        for part, share in wanted.items():
            if share > 0 and numbers[part] == 0:
                notes.append(
                    f"class {label!r} has {len(stratum)} {unit}{'' if len(stratum) == 1 else 's'}: none is "
                    f"left for the {part} part, which says nothing about this class"
                )
        for part, chosen in _choose(collection, stratum, numbers, wanted, rng).items():
            for member in chosen:
                assigned.update((n, part) for n in stratum[member])
    return assigned


def _numbers(groups: int, wanted: Mapping[str, float]) -> dict[str, int]:
    """How many groups each part gets: its share, at least one where possible, and one kept for training."""
    numbers = {part: (max(1, round(share * groups)) if share > 0 else 0) for part, share in wanted.items()}
    for part in ("validation", "test"):
        while groups - sum(numbers.values()) < 1 and numbers[part] > (1 if part == "test" else 0):
            numbers[part] -= 1
    if groups <= 1:
        numbers["test"] = 0
    return numbers


def _choose(
    collection: Collection,
    stratum: Sequence[Sequence[int]],
    numbers: Mapping[str, int],
    wanted: Mapping[str, float],
    rng: np.random.Generator,
) -> dict[str, list[int]]:
    """Of some random cuts take the one with most views in each part, then the one closest to the shares."""
    sizes = np.array([len(members) for members in stratum], dtype=np.float64)
    names = sorted({collection.items[n].view for members in stratum for n in members})
    views = np.array(
        [[any(collection.items[n].view == v for n in members) for v in names] for members in stratum]
    )
    best: tuple[tuple[int, float], dict[str, list[int]]] | None = None
    for _ in range(_CANDIDATES if len(stratum) > 1 else 1):
        order = rng.permutation(len(stratum))
        first, second = numbers["test"], numbers["test"] + numbers["validation"]
        cut = {
            "test": order[:first].tolist(),
            "validation": order[first:second].tolist(),
            "train": order[second:].tolist(),
        }
        missing = sum(int((~views[chosen].any(axis=0)).sum()) for chosen in cut.values() if chosen)
        error = sum(abs(sizes[cut[part]].sum() / sizes.sum() - share) for part, share in wanted.items())
        if best is None or (missing, error) < best[0]:
            best = ((missing, float(error)), cut)
    assert best is not None
    return best[1]


def _given(
    collection: Collection, validation: float, rng: np.random.Generator, notes: list[str]
) -> dict[int, str]:
    without = [item.title for item in collection.items if item.split is None]
    if without:
        raise DataError(
            f"{collection.name}: {len(without)} images have no split, first {without[0]}; sort them into "
            "train and test folders or fill the split column, or choose another split than 'given'"
        )
    assigned = {n: str(item.split) for n, item in enumerate(collection.items)}
    for n, item in enumerate(collection.items):
        if item.label == UNLABELLED and assigned[n] == "train":
            assigned[n] = "unlabelled"
    for part in ("train", "test"):
        if part not in assigned.values():
            raise DataError(
                f"{collection.name}: the given split has no {part} part; add one, or choose another split "
                f"than 'given'"
            )
    if validation > 0 and "validation" not in assigned.values():
        train = [n for n, part in assigned.items() if part == "train"]
        assigned.update(_assign(collection, train, collection.stone_known, 0.0, validation, rng, notes))
    if not collection.stone_known:
        notes.append(
            "the split is the one the data set comes with; without stone ids it counts as patch-level: the "
            "same stone may be in train and test"
        )
        return assigned
    parts: dict[str, set[str]] = defaultdict(set)
    for n, part in assigned.items():
        parts[part].add(collection.items[n].stone)
    seen = parts["train"] | parts["unlabelled"]
    shared = sorted(seen & (parts["test"] | parts["validation"]))
    if shared:
        _warn(
            f"{collection.name}: the given split shows {len(shared)} stones both in training and in test or "
            "validation",
            notes,
            shared,
        )
    return assigned


def _hide(
    collection: Collection, assigned: dict[int, str], shots: int, rng: np.random.Generator, notes: list[str]
) -> None:
    """Leave `shots` labelled images of each class in train, from as many stones and views as possible."""
    for label in collection.classes:
        pool = [n for n, part in assigned.items() if part == "train" and collection.items[n].label == label]
        if len(pool) < shots:
            notes.append(
                f"class {label!r} has {len(pool)} labelled images for training, fewer than {shots} shots"
            )
        pool = [pool[n] for n in rng.permutation(len(pool))]
        stones: Counter[str] = Counter()
        views: Counter[str] = Counter()
        kept: set[int] = set()
        for _ in range(min(shots, len(pool))):
            # The stone used least comes first, then the view used least, then the random order.
            n = min(
                (n for n in pool if n not in kept),
                key=lambda n: (stones[collection.items[n].stone], views[collection.items[n].view]),
            )
            kept.add(n)
            stones[collection.items[n].stone] += 1
            views[collection.items[n].view] += 1
        assigned.update((n, "unlabelled") for n in pool if n not in kept)


def _parts(
    collection: Collection,
    assigned: Mapping[int, str],
    level: str,
    notes: Iterable[str],
    *,
    always: Iterable[str],
) -> dict[str, Collection]:
    members: dict[str, list[Item]] = {part: [] for part in ("train", "test", *always)}
    for n in sorted(assigned):
        item = replace(collection.items[n], split=assigned[n])
        if assigned[n] == "unlabelled":
            item = replace(item, label=UNLABELLED)
        members.setdefault(assigned[n], []).append(item)
    return {
        part: replace(
            collection.with_items(items, notes=notes, name=f"{collection.name} ({part})"), split_level=level
        )
        for part, items in members.items()
    }


def _warn(message: str, notes: list[str], names: Sequence[str]) -> None:
    text = message + (f": {', '.join(names[:5])}{', …' if len(names) > 5 else ''}" if names else "")
    notes.append(text)
    warnings.warn(text, LeakageWarning, stacklevel=4)
