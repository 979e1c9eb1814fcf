"""Square patches from a fragment image and its mask, and the command that turns folders of them into a data
set.

The text of the stone papers asks for an overlap "of at least 20 pixels to avoid redundancy", which only
makes sense as **at most** 20 pixels: that is our reading, and what `max_overlap` bounds. Two patches of
side s whose corners differ by (dy, dx) overlap in a strip of s − max(|dy|, |dx|) pixels where that is
positive.
"""

from __future__ import annotations

import csv
import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image

from stillhouse.core.errors import DataError

from .images import SUFFIXES, load_mask
from .items import Collection, Item, Progress
from .manifest import MANIFEST, read_manifest
from .readers import read_collection


@dataclass(frozen=True, slots=True, kw_only=True)
class Patch:
    """A square cut out of an image.

    Args:
        image: the pixels, uint8 [size, size, 3].
        top: row of its upper edge in the image.
        left: column of its left edge.
    """

    image: np.ndarray = field(repr=False)
    top: int
    left: int


def extract_patches(
    image: np.ndarray, mask: np.ndarray, *, size: int = 256, max_overlap: int = 20
) -> list[Patch]:
    """Cut square patches that lie wholly inside the mask and overlap by at most `max_overlap` pixels.

    Patches stand in rows (or columns, whichever gives more) at free heights; within that family their
    number is the largest possible. The result follows from the mask alone.

    Args:
        image: uint8 [H, W, 3].
        mask: bool [H, W], True on the fragment.
        size: side of the patches in pixels.
        max_overlap: widest strip, in pixels, that two patches may share; 0 to size − 1.

    Returns:
        list: patches from top to bottom and left to right; empty where the fragment is too small for one.

    Raises:
        ValueError: an argument of the wrong type, shape or range, or a mask of another size than the image.

    Source: the patch pipeline of the endoscopic stone papers; "at most" is our reading (see the module's
    text).

    Example:
        >>> image, mask = np.zeros((100, 100, 3), np.uint8), np.zeros((100, 100), bool)
        >>> mask[10:90, 10:90] = True
        >>> [(p.top, p.left) for p in extract_patches(image, mask, size=45, max_overlap=10)]
        [(10, 10), (10, 45), (45, 10), (45, 45)]
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image: is {image.dtype} {image.shape}; it must be uint8 [H, W, 3]")
    if mask.dtype != np.bool_ or mask.shape != image.shape[:2]:
        raise ValueError(
            f"mask: is {mask.dtype} {mask.shape}; it must be bool {image.shape[:2]} like the image"
        )
    corners = patch_corners(mask, size=size, max_overlap=max_overlap)
    return [
        Patch(image=image[top : top + size, left : left + size].copy(), top=top, left=left)
        for top, left in corners
    ]


def patch_corners(mask: np.ndarray, *, size: int, max_overlap: int) -> list[tuple[int, int]]:
    """Upper left corners (top, left) of the patches that `extract_patches` cuts, sorted."""
    if size < 1:
        raise ValueError(f"size: {size} must be at least 1")
    if not 0 <= max_overlap < size:
        raise ValueError(f"max_overlap: {max_overlap} must be at least 0 and below size ({size})")
    if min(mask.shape) < size:
        return []
    total = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1), dtype=np.int64)
    total[1:, 1:] = mask.cumsum(0).cumsum(1)
    inside = total[size:, size:] - total[:-size, size:] - total[size:, :-size] + total[:-size, :-size]
    valid = inside == size * size
    step = size - max_overlap
    by_rows = _rows(valid, step)
    by_columns = [(top, left) for left, top in _rows(valid.T, step)]
    return sorted(by_columns if len(by_columns) > len(by_rows) else by_rows)


def _rows(valid: np.ndarray, step: int) -> list[tuple[int, int]]:
    """The largest set of positions that lie in rows at least `step` apart and in each row at least `step`
    apart.

    Within a row, going from left to right and taking each next position that fits is optimal; which rows to
    take is a dynamic programme: best(y) = max(best(y − 1), best(y − step) + count(y)).
    """
    height = valid.shape[0]
    counts = np.zeros(height, dtype=np.int64)
    for y in range(height):
        counts[y] = sum(1 for _ in _along(valid[y], step))
    best = np.zeros(height + 1, dtype=np.int64)
    for y in range(height):
        best[y + 1] = max(best[y], best[max(0, y + 1 - step)] + counts[y])
    chosen = []
    y = height
    while y > 0:
        if best[y] == best[y - 1]:
            y -= 1
            continue
        chosen.append(y - 1)
        y = max(0, y - step)
    return [(row, column) for row in chosen for column in _along(valid[row], step)]


def _along(row: np.ndarray, step: int) -> Iterator[int]:
    """Positions in a row, each the first that fits after the one before."""
    places = np.flatnonzero(row)
    at = 0
    while at < len(places):
        yield int(places[at])
        at = int(np.searchsorted(places, places[at] + step))


def balance(collection: Collection, *, per_class: int, seed: int = 0) -> Collection:
    """Keep at most `per_class` random images of each class and view.

    Args:
        collection: the images.
        per_class: most images of each class and view; the stone papers take 1,000.
        seed: the same seed keeps the same images.

    Returns:
        Collection: the kept items in their old order; a note names the classes and views that have fewer.
    """
    if per_class < 1:
        raise ValueError(f"per_class: {per_class} must be at least 1")
    rng = np.random.default_rng(seed)
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for n, item in enumerate(collection.items):
        groups[item.label, item.view].append(n)
    kept: list[int] = []
    notes = []
    for (label, view), members in sorted(groups.items()):
        if len(members) < per_class:
            notes.append(f"{label} {view}: {len(members)} images, fewer than {per_class}")
        kept += rng.permutation(members)[:per_class].tolist()
    return collection.with_items((collection.items[n] for n in sorted(kept)), notes=notes)


def extract_folder(
    images: str | Path,
    masks: str | Path,
    out: str | Path,
    *,
    size: int = 256,
    max_overlap: int = 20,
    per_class: int | None = None,
    stone_pattern: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Collection:
    """Cut the patches of a whole set of fragment images and write them with their table.

    The images are read as by `read_collection`. The mask of `<images>/a/b.png` is `<masks>/a/b.png`, with any
    image ending, or `b_mask` for `b`. The patches go to `<out>/<view>/<class>/<name>_<top>_<left>.png`, their
    table to `<out>/manifest.csv`. Everything is read and checked before anything is written, and `out`
    appears in one step when it is complete. Where stones are unknown the table has no stone column, only the
    `source` image of each patch; the pattern `.+` makes each image a stone of its own, which at least keeps
    its patches together.

    Args:
        images: folder or CSV table of fragment images.
        masks: folder of the masks.
        out: folder to make; must not exist or be empty.
        size: side of the patches in pixels.
        max_overlap: widest strip that two patches of an image may share, in pixels.
        per_class: most patches of each class and view; None keeps all.
        stone_pattern: how to find stone ids in file names, as in `read_folder`.
        seed: of the random choice for `per_class`.
        progress: called with (done, total) while the images are cut.

    Returns:
        Collection: what was written, as `read_manifest` reads it. Notes name images that are too small for
        a patch.

    Raises:
        DataError: an image or mask that cannot be used, a missing mask, a mask of another size, no patch at
            all, or an `out` that is not empty.
    """
    images, masks, out = Path(images), Path(masks), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out}: exists and is not empty; give another folder for the patches")
    if not masks.is_dir():
        raise DataError(f"{masks}: is not a folder; give the folder that holds the masks")
    collection = read_collection(images, stone_pattern=stone_pattern, check=False)
    patches: list[Item] = []
    small: list[str] = []
    for done, item in enumerate(collection.items, start=1):
        found = _places(item, _mask_file(masks, item.title), size, max_overlap)
        patches += found
        if not found:
            small.append(item.title)
        if progress is not None:
            progress(done, len(collection.items))
    if not patches:
        raise DataError(f"{images}: no fragment holds a patch of {size} × {size} pixels; give a smaller size")
    notes = [f"{len(small)} images are too small for a patch of {size}, first {small[0]}"] if small else []
    chosen = collection.with_items(patches, notes=notes)
    if per_class is not None:
        chosen = balance(chosen, per_class=per_class, seed=seed)
    _write(chosen, out, size)
    written = read_manifest(out / MANIFEST, check=False)
    return replace(written, notes=tuple(dict.fromkeys((*written.notes, *chosen.notes))))


def _places(item: Item, mask_file: Path, size: int, max_overlap: int) -> list[Item]:
    """One item for each patch of an image: the image's own, with the corner in its name and no pixels yet."""
    image, mask = item.load(), load_mask(mask_file)
    if mask.shape != image.shape[:2]:
        raise DataError(
            f"{mask_file}: is {mask.shape[1]} × {mask.shape[0]}, its image {item.title} is "
            f"{image.shape[1]} × {image.shape[0]}; draw the mask on the image at its own size"
        )
    corners = patch_corners(mask, size=size, max_overlap=max_overlap)
    return [replace(item, name=f"{item.title}\0{top}\0{left}") for top, left in corners]


def _mask_file(masks: Path, title: str) -> Path:
    stem = masks / Path(title).with_suffix("")
    for name in (stem.name, stem.name + "_mask"):
        for suffix in SUFFIXES:
            for ending in (suffix, suffix.upper()):
                candidate = stem.with_name(name + ending)
                if candidate.is_file():
                    return candidate
    raise DataError(
        f"{stem}.png: the mask of {title} is missing; draw it (white on the stone) or take the image out "
        f"of the set"
    )


def _write(collection: Collection, out: Path, size: int) -> None:
    """Write into a hidden folder beside `out` and rename it at the end."""
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        rows = []
        path, image = None, np.zeros((0, 0, 3), np.uint8)
        for item in collection.items:
            if item.path != path:  # patches of an image come one after the other: each is decoded once
                path, image = item.path, item.load()
            source, top, left = item.name.split("\0")
            stem = Path(source).with_suffix("").as_posix().replace("/", "_")
            relative = f"{_safe(item.view)}/{_safe(item.label)}/{stem}_{top}_{left}.png"
            if (work / relative).exists():
                raise DataError(
                    f"{source}: another image gives patches of the same name; rename one of the two"
                )
            (work / relative).parent.mkdir(parents=True, exist_ok=True)
            y, x = int(top), int(left)
            Image.fromarray(image[y : y + size, x : x + size]).save(work / relative)
            row = {"path": relative, "class": item.label, "view": item.view}
            if collection.stone_known:
                row["stone"] = item.stone
            rows.append(row | {"split": item.split or "", "source": source, "top": top, "left": left})
        with open(work / MANIFEST, "w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
        os.chmod(work, 0o755)
        if out.exists():
            out.rmdir()
        os.replace(work, out)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def _safe(name: str) -> str:
    """A folder name without separators."""
    return "".join(c if c.isalnum() or c in " ._-+*()" else "_" for c in name).strip(". ") or "unlabelled"
