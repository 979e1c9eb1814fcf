"""Names that folders and tables use for views and splits, and what all readers do alike."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from stillhouse.core.errors import ConfigError, DataError

from .items import UNLABELLED, Collection, Item, Progress, validate

VIEW_NAMES: Mapping[str, str] = {
    "sur": "surface",
    "surface": "surface",
    "sec": "section",
    "section": "section",
    "mix": "mixed",
    "mixed": "mixed",
}
"""Folder names of views, in small letters, and what they are called here."""

SPLIT_NAMES: Mapping[str, str] = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "unlabelled": "unlabelled",
    "unlabeled": "unlabelled",
}
"""Folder names and table entries of splits, in small letters, and what they are called here."""

NO_STONES = (
    "no stone ids are known: images of one stone cannot be kept together, so that any split is patch-level "
    "and may show the same stone in train and test"
)


def finish(
    items: Sequence[Item],
    classes: Sequence[str] | None,
    known: bool,
    name: str,
    notes: Iterable[str],
    source: str,
    check: bool,
    progress: Progress | None,
) -> Collection:
    """Make the collection of a reader: check class names, note doubtful ids, decode every image if asked."""
    found = sorted({item.label for item in items} - {UNLABELLED})
    if classes is not None:
        missing = sorted(set(classes) - set(found))
        strange = sorted(set(found) - set(classes))
        if missing or strange:
            raise DataError(
                f"{source}: has the classes {', '.join(found)}; asked for {', '.join(classes)}. "
                "Name exactly the classes that are there"
            )
    views = sorted({item.view for item in items}, key=lambda view: (view != "surface", view))
    extra = []
    labels: defaultdict[str, set[str]] = defaultdict(set)
    for item in items:
        labels[item.stone].add(item.label)
    shared = sum(len(found_labels - {UNLABELLED}) > 1 for found_labels in labels.values())
    if known and shared:
        extra.append(
            f"{shared} stone ids occur in more than one class and are kept whole when splitting; if ids "
            "start anew in each class, put the class into the id"
        )
    collection = Collection(
        items=tuple(items),
        classes=tuple(classes) if classes is not None else tuple(found),
        views=tuple(views),
        stone_known=known,
        name=name,
        notes=(*notes, *extra),
    )
    if check:
        validate(collection, progress=progress)
    return collection


def check_folder(root: str | Path) -> Path:
    """Return `root` as a path, or raise a DataError where it is no folder."""
    root = Path(root)
    if not root.is_dir():
        problem = "is a file, not a folder" if root.exists() else "does not exist"
        raise DataError(f"{root}: {problem}; give the folder that holds the class folders")
    return root


def compile_pattern(pattern: str | None) -> re.Pattern[str] | None:
    """Compile the pattern of stone ids, or raise a ConfigError that names it."""
    if pattern is None:
        return None
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            f"stone_pattern: {pattern!r} is no regular expression ({error}); mend it"
        ) from error


def stone_of(root: Path, relative: str, pattern: re.Pattern[str] | None) -> str:
    """The id of the stone in `relative`, a path with `/`; the path itself where there is no pattern."""
    if pattern is None:
        return relative
    match = pattern.search(relative)
    stone = "" if match is None else "-".join(g or "" for g in match.groups()) or match[0]
    if not stone:
        raise DataError(
            f"{root / relative}: the stone pattern {pattern.pattern!r} finds no id in {relative!r}; mend "
            "the pattern or rename the file"
        )
    return stone
