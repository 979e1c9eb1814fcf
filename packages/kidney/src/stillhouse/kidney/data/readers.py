"""Folders and tables of stone images to a `Collection`.

Layouts that `read_folder` understands, by the names of the folders between the root and an image:

    <root>/<view>/<split>/<class>/image.png     views such as SUR, SEC and MIX; splits train, validation, test
    <root>/<view>/<class>/image.png             views such as surface and section
    <root>/<split>/<class>/image.png
    <root>/<class>/image.png
    <root>/<class>/<view>/image.png             only with a view name that is known, see `VIEW_NAMES`

Class names are data: whatever the folders are called. None of the layouts tells which images show the same
stone; give a `stone_pattern`, or use a table (`read_manifest`) with a stone column.
"""

from __future__ import annotations

import csv
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from stillhouse.core.errors import DataError

from .images import SUFFIXES
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

MANIFEST = "manifest.csv"
"""Name of the table that `read_collection` looks for in a folder."""

NO_STONES = (
    "no stone ids are known: images of one stone cannot be kept together, so that any split is patch-level "
    "and may show the same stone in train and test"
)

_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "path": ("path", "file", "image"),
    "label": ("class", "label"),
    "view": ("view",),
    "stone": ("stone", "stone_id", "group"),
    "split": ("split", "part"),
}
_KTH_NAME = re.compile(r"^\d+-scale_(\d+)_im_(\d+)_grey\.png$")


def read_folder(
    root: str | Path,
    *,
    stone_pattern: str | None = None,
    classes: Sequence[str] | None = None,
    check: bool = True,
    progress: Progress | None = None,
) -> Collection:
    """Read a folder of images whose class, view and split are folder names (layouts: top of this module).

    Where a folder of the union of the views (MIX) lies beside folders of single views, it is left out and a
    note says
    so: every image would come twice. Where it lies alone its view is `mixed`.

    Args:
        root: the folder.
        stone_pattern: regular expression searched in each path relative to the root (with `/`); its groups,
            joined by `-`, are the stone id, the whole match where it has none. Ids hold for the whole
            collection: where numbering starts anew in each class, put the class folder into a group.
                Example: `([^/]+)/stone_(\\d+)`.
        classes: names and order of the classes; the sorted folder names where left out.
        check: decode every image now, so that a broken one is found before anything is written.
        progress: called with (done, total) while images are decoded.

    Returns:
        Collection: items sorted by path. Without a pattern `stone_known` is False.

    Raises:
        DataError: no images, a layout that is not one of the above, an empty class folder, an image that
        cannot be
            read, a name that the pattern does not match.
    """
    root = _folder(root)
    match = _compile(stone_pattern)
    files = sorted(_image_files(root))
    if not files:
        raise DataError(
            f"{root}: holds no images ({', '.join(SUFFIXES)}); expected <class>/image.png, "
            "<view>/<class>/image.png or <view>/<split>/<class>/image.png"
        )
    items = []
    for relative in files:
        split, view, label = _place(root, relative)
        items.append(
            Item(
                path=root / relative,
                label=label,
                view=view,
                stone=_stone(root, relative, match),
                split=split,
                name=relative,
            )
        )
    notes = []
    singles = {item.view for item in items} & {"surface", "section"}
    mixed = [item for item in items if item.view == "mixed"]
    if singles and mixed:
        items = [item for item in items if item.view != "mixed"]
        notes.append(
            f"the folder of the mixed view ({len(mixed)} images) is left out: it repeats "
            f"{' and '.join(sorted(singles))}"
        )
    if match is None:
        notes.append(NO_STONES)
    return _finish(items, classes, match is not None, root.name, notes, str(root), check, progress)


def read_manifest(
    table: str | Path,
    root: str | Path | None = None,
    *,
    stone_pattern: str | None = None,
    classes: Sequence[str] | None = None,
    check: bool = True,
    progress: Progress | None = None,
) -> Collection:
    """Read a CSV table of images.

    Columns, in any order, separated by comma, semicolon or tab: `path` and `class`; `view`, `stone` and
    `split` where known. Other columns are ignored. A row with an empty class is an unlabelled image. Text
    is UTF-8.

    Args:
        table: the CSV file.
        root: folder that paths are relative to and must lie in; the table's own where left out.
        stone_pattern: where there is no stone column, as in `read_folder`.
        classes: names and order of the classes; sorted names where left out.
        check: decode every image now.
        progress: called with (done, total) while images are decoded.

    Returns:
        Collection: items in the order of the rows.

    Raises:
        DataError: a missing column; a row whose path is outside the root, missing or named twice, whose
        stone is
            empty while others have one, or whose split is unknown; the message names file, row and remedy.
    """
    table = Path(table)
    base = _folder(table.parent if root is None else root)
    match = _compile(stone_pattern)
    header, rows = _read_table(table)
    columns = _columns(table, header)
    seen: dict[str, int] = {}
    items = []
    for number, row in rows:
        cell = {key: row[index].strip() for key, index in columns.items()}
        where = f"{table}, row {number}"
        relative = _inside(where, cell["path"], base)
        if relative in seen:
            raise DataError(f"{where}: {relative} is already in row {seen[relative]}; take one of them out")
        seen[relative] = number
        if "stone" in cell and not cell["stone"]:
            raise DataError(
                f"{where}: the stone is empty; fill it in every row, or take the stone column out if unknown"
            )
        items.append(
            Item(
                path=base / relative,
                label=cell["label"],
                view=VIEW_NAMES.get(cell.get("view", "").lower(), cell.get("view", "")) or "image",
                stone=cell["stone"] if "stone" in cell else _stone(base, relative, match),
                split=_split(where, cell.get("split", "")),
                name=relative,
            )
        )
    if not items:
        raise DataError(f"{table}: has a header and no rows; add one row for each image")
    known = "stone" in columns or match is not None
    notes = () if known else (NO_STONES,)
    return _finish(items, classes, known, table.stem, notes, str(table), check, progress)


def read_collection(
    path: str | Path,
    *,
    stone_pattern: str | None = None,
    classes: Sequence[str] | None = None,
    check: bool = True,
    progress: Progress | None = None,
) -> Collection:
    """Read whatever `path` is: a CSV table, a folder with a `manifest.csv`, a KTH-TIPS folder, or a folder
    of images.

    Args and errors as in `read_folder` and `read_manifest`.
    """
    path = Path(path)
    if path.is_file():
        return read_manifest(
            path, stone_pattern=stone_pattern, classes=classes, check=check, progress=progress
        )
    root = _folder(path)
    if (root / MANIFEST).is_file():
        return read_manifest(
            root / MANIFEST, stone_pattern=stone_pattern, classes=classes, check=check, progress=progress
        )
    if stone_pattern is None and classes is None:
        names = [Path(name).name for name in _image_files(root)]
        if names and all(_KTH_NAME.match(name) for name in names):
            return read_kth_tips(root, check=check, progress=progress)
    return read_folder(root, stone_pattern=stone_pattern, classes=classes, check=check, progress=progress)


def read_kth_tips(
    root: str | Path,
    *,
    views: Mapping[str, Iterable[int]] | None = None,
    check: bool = True,
    progress: Progress | None = None,
) -> Collection:
    """Read the KTH-TIPS textures (grey, 200 × 200), a public stand-in for stones.

    Files are `<root>/<class>/NN-scale_S_im_I_grey.png`: 10 materials × 9 distances S × 9 images I (3 lights
    × 3 poses). The folder is the class, the distance the view, and class and I together the "stone", so
    that the nine distances of one light and pose stay on one side of a split. The set photographs **one
    physical sample of each material**: no split of it tests a new sample, and scores on it say how well
    pictures are recognised, not specimens.

    Args:
        root: the folder of the ten class folders.
        views: view name → scales, to bin the distances, for example `{"near": (1, 2, 3, 4), "far": (6, 7,
            8, 9)}`; scales in no bin are left out. Where left out each scale is a view, `scale_1` to
            `scale_9`.
        check: decode every image now.
        progress: called with (done, total) while images are decoded.

    Raises:
        DataError: no files of that name, or an image that cannot be read.
        ValueError: a scale in two bins.
    """
    root = _folder(root)
    names: dict[int, str] = {}
    for view, scales in (views or {}).items():
        for scale in scales:
            if scale in names:
                raise ValueError(
                    f"views: scale {scale} is in {names[scale]!r} and in {view!r}; give it to one"
                )
            names[scale] = view
    items = []
    for relative in sorted(_image_files(root)):
        folder, _, name = relative.rpartition("/")
        match = _KTH_NAME.match(name)
        if match is None or not folder or "/" in folder:
            continue
        scale, image = int(match[1]), int(match[2])
        if views is not None and scale not in names:
            continue
        items.append(
            Item(
                path=root / relative,
                label=folder,
                view=names.get(scale, f"scale_{scale}"),
                stone=f"{folder}/im_{image}",
                name=relative,
            )
        )
    if not items:
        raise DataError(
            f"{root}: holds no <class>/NN-scale_S_im_I_grey.png; give the folder of the class folders"
        )
    note = (
        "KTH-TIPS has one physical sample per class; groups are pictures of it (light and pose), not samples"
    )
    return _finish(items, None, True, "KTH-TIPS", (note,), str(root), check, progress)


def _finish(
    items: Sequence[Item],
    classes: Sequence[str] | None,
    known: bool,
    name: str,
    notes: Iterable[str],
    source: str,
    check: bool,
    progress: Progress | None,
) -> Collection:
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


def _folder(root: str | Path) -> Path:
    root = Path(root)
    if not root.is_dir():
        problem = "is a file, not a folder" if root.exists() else "does not exist"
        raise DataError(f"{root}: {problem}; give the folder that holds the class folders")
    return root


def _image_files(root: Path) -> Iterator[str]:
    """Paths of the images below `root`, relative, with `/`; hidden and archive rubbish left out."""
    for folder, below, files in os.walk(root):
        below[:] = sorted(name for name in below if not name.startswith((".", "__MACOSX")))
        relative = Path(folder).relative_to(root).as_posix()
        prefix = "" if relative == "." else relative + "/"
        images = [
            name for name in files if name.lower().endswith(SUFFIXES) and not name.startswith((".", "._"))
        ]
        if not below and not images and prefix:
            raise DataError(
                f"{Path(folder)}: holds no images ({', '.join(SUFFIXES)}); fill the folder or remove it"
            )
        yield from (prefix + name for name in images)


def _place(root: Path, relative: str) -> tuple[str | None, str, str]:
    """Split, view and class of an image, from the folders it lies in."""
    parts = relative.split("/")[:-1]
    splits = [part for part in parts if part.lower() in SPLIT_NAMES]
    rest = [part for part in parts if part.lower() not in SPLIT_NAMES]
    known = [part for part in rest if part.lower() in VIEW_NAMES]
    if len(rest) == 2 and len(splits) <= 1:
        # A folder with a known view name is the view wherever it stands; else the outer one is.
        view = known[0] if len(known) == 1 else rest[0]
        label = rest[1] if view == rest[0] else rest[0]
        split = SPLIT_NAMES[splits[0].lower()] if splits else None
        return split, VIEW_NAMES.get(view.lower(), view), label
    if len(rest) == 1 and len(splits) <= 1 and not known:
        return (SPLIT_NAMES[splits[0].lower()] if splits else None), "image", rest[0]
    raise DataError(
        f"{root / relative}: cannot tell its class and view from its folders; arrange the images as "
        "<class>/, <view>/<class>/, <split>/<class>/ or <view>/<split>/<class>/, or list them in a CSV table"
    )


def _compile(pattern: str | None) -> re.Pattern[str] | None:
    if pattern is None:
        return None
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"stone_pattern: {pattern!r} is no regular expression ({error}); mend it") from error


def _stone(root: Path, relative: str, pattern: re.Pattern[str] | None) -> str:
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


def _read_table(table: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Header and rows, with row numbers as a spreadsheet shows them."""
    try:
        text = table.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{table}: cannot be read ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{table}: is not UTF-8 text; save it as CSV UTF-8") from error
    first = text.partition("\n")[0]
    delimiter = max(",;\t", key=first.count)
    try:
        lines = list(csv.reader(text.splitlines(), delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise DataError(f"{table}: is no CSV table ({error}); save it as CSV UTF-8") from error
    if not lines or not any(cell.strip() for cell in lines[0]):
        raise DataError(f"{table}: is empty; its first line must be path,class,view,stone,split")
    rows = []
    for number, row in enumerate(lines[1:], start=2):
        if not any(cell.strip() for cell in row):
            continue
        if len(row) != len(lines[0]):
            raise DataError(
                f"{table}, row {number}: has {len(row)} cells, the header has {len(lines[0])}; mend the row"
            )
        rows.append((number, row))
    return [cell.strip().lower() for cell in lines[0]], rows


def _columns(table: Path, header: Sequence[str]) -> dict[str, int]:
    twice = [name for name, count in Counter(header).items() if count > 1 and name]
    if twice:
        raise DataError(f"{table}: has the column {twice[0]!r} twice; rename one")
    columns = {}
    for key, names in _COLUMNS.items():
        found = [name for name in names if name in header]
        if found:
            columns[key] = header.index(found[0])
        elif key in ("path", "label"):
            raise DataError(
                f"{table}: has no column {names[0]!r} (columns: {', '.join(header)}); the header must name "
                "path and class, and may name view, stone and split"
            )
    return columns


def _inside(where: str, path: str, base: Path) -> str:
    """Path relative to `base` with `/`; outside, missing or no file is an error."""
    if not path or "\0" in path:
        raise DataError(f"{where}: the path is empty; give the image's path relative to {base}")
    absolute = os.path.normpath(base.absolute() / path.replace("\\", "/"))
    relative = os.path.relpath(absolute, base.absolute())
    if relative == os.pardir or relative.startswith(os.pardir + os.sep) or os.path.isabs(relative):
        raise DataError(f"{where}: {path} lies outside {base}; move the image into it or give another root")
    if not os.path.isfile(absolute):
        raise DataError(f"{where}: there is no file {path} in {base}; mend the path or take the row out")
    return Path(relative).as_posix()


def _split(where: str, text: str) -> str | None:
    if not text:
        return None
    try:
        return SPLIT_NAMES[text.lower()]
    except KeyError:
        allowed = ", ".join(dict.fromkeys(SPLIT_NAMES.values()))
        raise DataError(f"{where}: unknown split {text!r}; allowed are {allowed}") from None
