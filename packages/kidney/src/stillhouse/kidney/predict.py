"""Identify stones: images in, one row of class, confidence, distance and nearest references out."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from stillhouse.core.errors import ConfigError, DataError

from .data import UNLABELLED, Collection, Item, PatchDataset, collate, resize_square
from .data.images import SUFFIXES
from .data.readers import VIEW_NAMES
from .gallery import Gallery, Matches
from .metrics import FUSIONS, fuse_views
from .store import FinishedStudent

if TYPE_CHECKING:
    from rich.table import Table

UNKNOWN = "unknown"
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbour:
    """A reference near the image.

    Attributes:
        name: its file name, or the stone where views are fused.
        label: its class.
        view: its view.
        stone: its stone.
        distance: Euclidean distance of the embeddings, 0 to 2 for normalised ones.
    """

    name: str
    label: str
    view: str
    stone: str
    distance: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Identification:
    """The answer for one image, or for one stone where views are fused.

    Attributes:
        name: the image, or the stone.
        images: the images that went into it.
        views: their views, each once.
        label: the class, or "unknown" where the distance is past the gallery's threshold.
        nearest_class: the class with the nearest prototype, also where the answer is "unknown".
        confidence: probability of `nearest_class` *among the gallery's classes*; it says nothing about other
            classes, that is what `distance` is for.
        distance: to the nearest prototype.
        threshold: past which the answer is "unknown"; None where the gallery has none.
        probabilities: class → probability, most probable first.
        neighbours: the nearest references.
    """

    name: str
    images: tuple[str, ...]
    views: tuple[str, ...]
    label: str
    nearest_class: str
    confidence: float
    distance: float
    threshold: float | None
    probabilities: dict[str, float]
    neighbours: tuple[Neighbour, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return asdict(self)


def collect_images(
    sources: Iterable[str | os.PathLike[str]],
    *,
    stone_pattern: str | None = None,
    check: bool = True,
    progress: Progress | None = None,
) -> Collection:
    """Images and folders of images as an unlabelled collection.

    The view is taken from a folder named surface, section, SUR or SEC on the way to the image, else from such
    a word in the file name, else it is "".

    Args:
        sources: image files and folders, which are searched through; a file that is named twice counts once.
        stone_pattern: regular expression searched in each path (with "/"); its groups joined by "-" are the
            stone. None: each image is a stone of its own.
        check: decode every image now, so that a broken one is found before anything else is done.
        progress: called as `progress(done, total)` while images are decoded.

    Raises:
        DataError: nothing there, no images, a path without a stone, or an image that cannot be read.
        ConfigError: the pattern is no regular expression.
    """
    try:
        pattern = None if stone_pattern is None else re.compile(stone_pattern)
    except re.error as error:
        raise ConfigError(f"--stone-pattern {stone_pattern!r}: is no regular expression ({error})") from error
    paths: dict[Path, None] = {}
    for source in map(Path, sources):
        if source.is_dir():
            found = sorted(
                p for p in source.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")
            )
            if not found:
                raise DataError(f"{source}: holds no images ({', '.join(SUFFIXES)}); give a folder that does")
            paths.update(dict.fromkeys(found))
        else:
            paths[source] = None
    if not paths:
        raise DataError("no image is given; name image files or folders")
    items = tuple(
        Item(
            path=path,
            label=UNLABELLED,
            view=_view_of(path),
            stone=_stone_of(path, pattern),
            name=path.as_posix(),
        )
        for path in paths
    )
    if check:
        for done, item in enumerate(items, start=1):
            item.load()
            if progress is not None:
                progress(done, len(items))
    views = tuple(sorted({item.view for item in items}))
    return Collection(items=items, classes=(), views=views, stone_known=pattern is not None, name="images")


def _view_of(path: Path) -> str:
    for part in reversed(path.parts[:-1]):
        if part.lower() in VIEW_NAMES:
            return VIEW_NAMES[part.lower()]
    words = re.split(r"[^a-z]+", path.stem.lower())
    return next((VIEW_NAMES[word] for word in words if word in VIEW_NAMES), "")


def _stone_of(path: Path, pattern: re.Pattern[str] | None) -> str:
    if pattern is None:
        return path.as_posix()
    match = pattern.search(path.as_posix())
    stone = "" if match is None else "-".join(group or "" for group in match.groups()) or match[0]
    if not stone:
        raise DataError(
            f"{path}: the stone pattern {pattern.pattern!r} finds no id in this path; mend the pattern"
        )
    return stone


def embed(
    network: nn.Module,
    collection: Collection,
    *,
    size: int,
    crops: int = 1,
    zoom: float | None = None,
    fuse_crops: bool = True,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> Tensor:
    """Embeddings of a collection, without augmentation.

    Args:
        network: images [B, 3, size, size] → embeddings [B, d]; its training mode is restored.
        collection: N images.
        size: side of the network's input, pixels.
        crops: crops of each image whose embeddings are averaged and normalised again.
        zoom: as in `PatchDataset`.
        fuse_crops: False keeps the crops apart.
        batch_size: images at a time.
        progress: called as `progress(done, total)`.

    Returns:
        [N, d] on the CPU, in the order of the collection; [N · crops, d], the crops of an image side by
        side, with `fuse_crops=False`.
    """
    dataset = PatchDataset(
        collection,
        collection.classes,
        size=size,
        crops=crops,
        zoom=zoom,
        cache_bytes=0 if crops == 1 else 1 << 28,
    )
    device = next((tensor.device for tensor in network.parameters()), torch.device("cpu"))
    was_training = network.training
    network.eval()
    parts = []
    try:
        with torch.inference_mode():
            for start in range(0, len(dataset), batch_size):
                rows = range(start, min(start + batch_size, len(dataset)))
                images = collate(dataset.__getitems__(rows))["image"]
                parts.append(network(images.to(device)).float().cpu())
                if progress is not None:
                    progress(min(rows[-1] + 1, len(dataset)) // crops, len(collection))
    finally:
        network.train(was_training)
    embeddings = torch.cat(parts).clone()
    if crops > 1 and fuse_crops:
        embeddings = normalize(embeddings.view(len(collection), crops, -1).mean(dim=1), dim=1)
    return embeddings


def identify(
    student: FinishedStudent,
    collection: Collection,
    *,
    top: int = 3,
    fuse: str | None = None,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> list[Identification]:
    """Identify every image of a collection, or every stone.

    Args:
        student: a loaded artefact.
        collection: the images, for example of `collect_images`.
        top: nearest references to name.
        fuse: "max", "mean" or "concat": all images of a stone give one answer, compared with the gallery's
            stones fused the same way; None answers image by image.
        batch_size: images at a time.
        progress: called as `progress(done, total)`.

    Returns:
        One row for each image, in their order, or for each stone, sorted.

    Raises:
        ConfigError: `fuse` without known stones, or an unknown way.
        DataError: the gallery cannot be fused, or an image shows a view that it does not have.
    """
    if fuse is not None and fuse not in FUSIONS:
        raise ConfigError(f"--fuse {fuse}: choose one of {', '.join(FUSIONS)}")
    if fuse is not None and not collection.stone_known:
        raise ConfigError("--fuse needs to know which images are of one stone; give --stone-pattern")
    network, gallery = student.network, student.gallery
    gallery_used = gallery if fuse is None else _fused(gallery, fuse)
    size = network.config.image_size
    embeddings = embed(
        network,
        collection,
        size=size,
        crops=student.crops,
        zoom=student.zoom,
        batch_size=batch_size,
        progress=progress,
    )
    items = collection.items
    if fuse is None:
        rows: tuple[tuple[int, ...], ...] = tuple((row,) for row in range(len(items)))
        names = tuple(item.title for item in items)
    else:
        strange = sorted({item.view for item in items} - set(gallery.view_names))
        if strange:
            raise DataError(
                f"{next(i.title for i in items if i.view == strange[0])}: shows the view {strange[0]!r}, "
                f"the gallery has "
                f"{', '.join(map(repr, gallery.view_names))}; put the images into folders named like the "
                f"views"
            )
        fused = fuse_views(
            embeddings, [i.stone for i in items], [i.view for i in items], fuse, all_views=gallery.view_names
        )
        embeddings, rows, names = fused.embeddings, fused.rows, fused.stones
    found = gallery_used.match(embeddings, k=top)
    return [
        _answer(gallery_used, found, at, names[at], [items[row] for row in rows[at]])
        for at in range(len(names))
    ]


def _fused(gallery: Gallery, how: str) -> Gallery:
    try:
        return gallery.fused(how)
    except ValueError as error:
        raise DataError(f"--fuse: {error}") from error


def _answer(gallery: Gallery, found: Matches, row: int, name: str, items: Sequence[Item]) -> Identification:
    best = int(found.nearest_class[row])
    probabilities = {
        gallery.classes[c]: float(found.probabilities[row, c])
        for c in found.probabilities[row].argsort(descending=True)
    }
    neighbours = tuple(
        Neighbour(
            name=gallery.names[at],
            label=gallery.classes[int(gallery.labels[at])],
            view=gallery.views[at],
            stone=gallery.stones[at],
            distance=float(distance),
        )
        for at, distance in zip(found.neighbours[row].tolist(), found.neighbour_distances[row], strict=True)
    )
    return Identification(
        name=name,
        images=tuple(item.title for item in items),
        views=tuple(sorted({item.view for item in items})),
        label=UNKNOWN if bool(found.unknown[row]) else gallery.classes[best],
        nearest_class=gallery.classes[best],
        confidence=float(found.probabilities[row, best]),
        distance=float(found.distance[row]),
        threshold=gallery.threshold,
        probabilities=probabilities,
        neighbours=neighbours,
    )


def identification_table(rows: Sequence[Identification]) -> Table:
    """A table for the terminal: image, class, confidence, distance and threshold, nearest references."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("image" if all(len(row.images) == 1 for row in rows) else "stone", overflow="fold")
    for heading in ("class", "confidence", "distance"):
        table.add_column(heading, justify="left" if heading == "class" else "right", no_wrap=True)
    table.add_column("nearest references", overflow="fold")
    for row in rows:
        unknown = row.label == UNKNOWN
        label = Text(f"unknown (nearest {row.nearest_class})" if unknown else row.label)
        label.stylize("yellow" if unknown else "bold green")
        limit = "" if row.threshold is None else f" {'>' if unknown else '≤'} {row.threshold:.2f}"
        near = ", ".join(f"{n.name} ({n.label}, {n.distance:.2f})" for n in row.neighbours)
        table.add_row(
            Text(row.name), label, f"{row.confidence:.0%}", f"{row.distance:.2f}{limit}", Text(near)
        )
    return table


def thumbnails(collection: Collection, *, side: int = 64) -> Tensor:
    """Small pictures of a collection, for a gallery.

    Args:
        collection: N images.
        side: side of the pictures, pixels.

    Returns:
        uint8 [N, side, side, 3].
    """
    pictures = [torch.from_numpy(resize_square(item.load(), side).copy()) for item in collection.items]
    return torch.stack(pictures) if pictures else torch.zeros(0, side, side, 3, dtype=torch.uint8)
