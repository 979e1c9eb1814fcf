"""`PatchDataset`: images of a collection as standardised tensors for training and evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .images import standardise_channels
from .items import UNLABELLED, Collection
from .window import WindowAugment

if TYPE_CHECKING:
    from .augment import Augment

_CACHE_BYTES = 1_000_000_000


class PatchDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """Images of a collection, resized or cropped to one size and standardised per channel.

    `dataset[index]` is the image as it is, without augmentation: what evaluation needs. `dataset[(index,
    seed)]` is the image augmented with random numbers that follow from `seed` alone; a loader that respects
    `seeded = True` asks like that. Augmentation comes before the standardisation, so that what a network
    sees always has mean 0 and standard deviation 1 (the stone papers standardise first).

    Args:
        collection: the images.
        classes: names that become the label numbers 0, 1, …; labels that are not among them, and hidden
            ones, are −1.
        size: side of the output in pixels, at least 8.
        augment: what to do to an image at training; None for nothing.
        crops: 1 shrinks the whole image to `size` × `size` (cutting the longer side to a square, centred).
            k > 1 takes k crops of `size` × `size` at the image's own scale: spread evenly without a seed,
            at random with one. The length is then k × the number of images.
        zoom: resize the image (cut to a square) to `zoom · size` first, at least 1, and take the crops from
            that, also with `crops=1` (the middle without a seed, a random place with one). None: as said
            under `crops`.
        cache_bytes: most memory, in bytes, that decoded images may take; further ones are decoded at each
            use.

    Each sample is a dictionary:

    | key | value |
    |---|---|
    | `image` | float32 [3, size, size], each channel with mean 0 and standard deviation 1 |
    | `label` | int, −1 where unknown |
    | `index` | int, place of the item in `collection.items` |
    | `group` | int, number of the stone, the same for all images of a stone |
    | `view` | int, number of the view in `collection.views` |

    Raises:
        ValueError: an argument out of range, or a crop larger than an image.
        DataError: on access, an image that cannot be read.

    Example:
        >>> from stillhouse.kidney.data import SimulateConfig, simulate
        >>> stones = simulate(SimulateConfig(stones_per_class=1, views=("surface",)))
        >>> dataset = PatchDataset(stones, stones.classes, size=32)
        >>> sample = dataset[0]
        >>> tuple(sample["image"].shape), sample["label"], len(dataset) == len(stones)
        ((3, 32, 32), 0, True)
    """

    seeded = True

    def __init__(
        self,
        collection: Collection,
        classes: Sequence[str],
        *,
        size: int,
        augment: Augment | WindowAugment | None = None,
        crops: int = 1,
        zoom: float | None = None,
        cache_bytes: int = _CACHE_BYTES,
    ) -> None:
        if size < 8:
            raise ValueError(f"size: {size} is too small; give at least 8 pixels")
        if crops < 1:
            raise ValueError(f"crops: {crops} must be at least 1")
        if zoom is not None and zoom < 1:
            raise ValueError(f"zoom: {zoom} must be at least 1, or None")
        if cache_bytes < 0:
            raise ValueError(f"cache_bytes: {cache_bytes} must not be negative")
        if len(set(classes)) != len(classes):
            raise ValueError(f"classes: {tuple(classes)} has a name twice")
        self.collection = collection
        self.classes = tuple(classes)
        self.size = size
        self.augment = augment
        self.crops = crops
        self.zoom = zoom
        self.cache_bytes = cache_bytes
        self._cache: dict[int, np.ndarray] = {}
        self._cached = 0
        numbers = {name: number for number, name in enumerate(self.classes)}
        stones = {stone: number for number, stone in enumerate(collection.stones)}
        views = {view: number for number, view in enumerate(collection.views)}
        items = collection.items
        self.labels = [-1 if i.label == UNLABELLED else numbers.get(i.label, -1) for i in items]
        self.groups = [stones[i.stone] for i in items]
        self.views = [views.get(i.view, -1) for i in items]

    def __len__(self) -> int:
        return len(self.collection.items) * self.crops

    def item_index(self, index: int) -> int:
        """Place in `collection.items` of sample `index`."""
        return index // self.crops

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[int | tuple[int, int]]) -> list[dict[str, Any]]:
        """Several samples at once, as a `DataLoader` asks for them; augmented as one batch."""
        pairs = [key if isinstance(key, tuple) else (key, None) for key in keys]
        items, images = [], []
        for index, seed in pairs:
            if not -len(self) <= index < len(self):
                raise IndexError(f"index {index} is out of range for {len(self)} samples")
            item, crop = divmod(index % len(self), self.crops)
            pixels = self._prepared(item)
            windowed = seed is not None and isinstance(self.augment, WindowAugment)
            if pixels.shape[0] != self.size or pixels.shape[1] != self.size:
                pixels = pixels if windowed else self._crop(pixels, item, crop, seed)
            items.append(item)
            images.append(torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))))
        return self._samples(items, images, [seed for _, seed in pairs])

    def _samples(
        self, items: Sequence[int], images: Sequence[Tensor], seeds: Sequence[int | None]
    ) -> list[dict[str, Any]]:
        """Augment images of one shape together, standardise, add the numbers."""
        done: list[Tensor | None] = [None] * len(items)
        shapes: dict[tuple[bool, tuple[int, ...]], list[int]] = {}
        for row, (image, seed) in enumerate(zip(images, seeds, strict=True)):
            changed = self.augment is not None and seed is not None
            shapes.setdefault((changed, tuple(image.shape)), []).append(row)
        for (changed, _), rows in shapes.items():
            batch = torch.stack([images[row] for row in rows]).to(torch.float32) / 255
            if changed and self.augment is not None:
                drawn = [seed for seed in (seeds[row] for row in rows) if seed is not None]
                if isinstance(self.augment, WindowAugment):
                    batch = self.augment.batch(batch, drawn, size=self.size)
                else:
                    batch = self.augment.batch(batch, drawn)
            for row, image in zip(rows, standardise_channels(batch, eps=1e-4), strict=True):
                done[row] = image
        return [
            {
                "image": image,
                "label": self.labels[item],
                "index": item,
                "group": self.groups[item],
                "view": self.views[item],
            }
            for item, image in zip(items, done, strict=True)
        ]

    def _prepared(self, item: int) -> np.ndarray:
        """The decoded image, uint8 [H, W, 3], at the output size where the whole image is wanted."""
        found = self._cache.get(item)
        if found is not None:
            return found
        source = self.collection.items[item]
        pixels = source.load()
        if self.zoom is not None:
            pixels = resize_square(pixels, round(self.zoom * self.size))
        elif self.crops == 1:
            pixels = resize_square(pixels, self.size)
        elif min(pixels.shape[:2]) < self.size:
            raise ValueError(
                f"{source.title}: is {pixels.shape[1]} × {pixels.shape[0]}, smaller than the crop of "
                f"{self.size}; use crops=1, which resizes, or a smaller size"
            )
        if self._cached + pixels.nbytes <= self.cache_bytes:
            self._cache[item] = pixels
            self._cached += pixels.nbytes
        return pixels

    def _crop(self, pixels: np.ndarray, item: int, crop: int, seed: int | None) -> np.ndarray:
        rows, columns = pixels.shape[0] - self.size, pixels.shape[1] - self.size
        if seed is None:
            top, left = _spread(crop, self.crops, rows, columns)
        else:
            # A stream of its own: the augmentation draws from the same seed.
            draw = np.random.default_rng((abs(seed), 1))
            top, left = int(draw.integers(rows + 1)), int(draw.integers(columns + 1))
        return pixels[top : top + self.size, left : left + self.size]


def resize_square(pixels: np.ndarray, size: int) -> np.ndarray:
    """Cut the longer side to a centred square and resize to `size` × `size` with antialiasing.

    Args:
        pixels: uint8 [H, W, 3].
        size: side of the result in pixels.

    Returns:
        uint8 [size, size, 3]; the same array where it has that size already.
    """
    height, width = pixels.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = pixels[top : top + side, left : left + side]
    if side == size:
        return square
    planes = torch.from_numpy(square.astype(np.float32)).permute(2, 0, 1)[None]
    shrunk = F.interpolate(planes, (size, size), mode="bilinear", align_corners=False, antialias=True)
    return shrunk[0].round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous().numpy()


def _spread(crop: int, crops: int, rows: int, columns: int) -> tuple[int, int]:
    """Corner of crop number `crop` of `crops` on an even grid over the positions that fit."""
    across = int(np.ceil(np.sqrt(crops)))
    down = int(np.ceil(crops / across))
    row, column = divmod(crop, across)
    top = rows // 2 if down == 1 else round(row * rows / (down - 1))
    left = columns // 2 if across == 1 else round(column * columns / (across - 1))
    return top, left


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Stack samples to a batch: `image` float32 [B, 3, size, size], the integers int64 [B].

    Example:
        >>> sample = {"image": torch.zeros(3, 8, 8), "label": 1, "index": 0, "group": 4, "view": 0}
        >>> batch = collate([sample, sample])
        >>> tuple(batch["image"].shape), batch["label"].tolist()
        ((2, 3, 8, 8), [1, 1])
    """
    if not samples:
        raise ValueError("samples: is empty; a batch needs at least one")
    integers = {key: torch.tensor([s[key] for s in samples]) for key in ("label", "index", "group", "view")}
    return {"image": torch.stack([s["image"] for s in samples]), **integers}
