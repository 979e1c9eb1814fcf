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

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from stillhouse.core.errors import DataError

from .images import SUFFIXES
from .items import Collection, Item, Progress
from .layout import NO_STONES, SPLIT_NAMES, VIEW_NAMES, check_folder, compile_pattern, finish, stone_of
from .manifest import MANIFEST, read_manifest

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
    note says so: every image would come twice. Where it lies alone its view is `mixed`.

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
            cannot be read, a name that the pattern does not match.
        ConfigError: the pattern is no regular expression.
    """
    root = check_folder(root)
    match = compile_pattern(stone_pattern)
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
                stone=stone_of(root, relative, match),
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
    return finish(items, classes, match is not None, root.name, notes, str(root), check, progress)


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
    root = check_folder(path)
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
    root = check_folder(root)
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
    return finish(items, None, True, "KTH-TIPS", (note,), str(root), check, progress)


def _image_files(root: Path) -> Iterator[str]:
    """Paths of the images below `root`, relative, with `/`; hidden and archive rubbish left out."""
    for folder, below, files in os.walk(root, onerror=_unreadable):
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


def _unreadable(error: OSError) -> None:
    """Stop at a folder that may not be listed: without this its class would be missing without a word."""
    raise DataError(
        f"{error.filename}: cannot be read ({error.strerror}); give this user the right to read it, or move "
        "it out of the set"
    ) from error


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
