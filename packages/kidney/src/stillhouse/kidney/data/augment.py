"""Training augmentation of the stone papers: for each image one change, picked at random.

Flips · mirrored border of 50 pixels (at 256) · perspective 0.4 · affine ±90° with scale 0.5 to 1 · rotation
±180°. All five move pixels and nothing else, so that each is a plane homography and all can be drawn with
one resampling. Two backends draw from the same distributions:

- `fast` (default): one homography an image, resampled with `torch.nn.functional.grid_sample`; also for
  whole batches.
- `monai`: MONAI's own transforms, with a perspective written for it (MONAI has none); slower, for those who
  want to extend a MONAI pipeline.

The papers do not say what fills the corners that a turned image leaves; here the image is mirrored at its
border (our reading), since black corners would tell the network which images were turned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Kind = Literal["flip", "pad", "perspective", "affine", "rotation"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""The five changes."""

REFERENCE_SIDE = 256
"""Side, in pixels, of the patches that widths are given for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Augment:
    """One random geometric change an image, reproducible from a seed.

    Args:
        kinds: the changes to pick from, each equally likely.
        pad: width of the mirrored border, in pixels of a 256-pixel image; scaled with the size of the
            image. The padded image is resized to the old size.
        perspective: how far corners move inwards, as a share of half the side, from 0 to 1.
        affine_degrees: largest turn of the affine change.
        affine_scale: smallest and largest size of the image after the affine change, relative.
        rotation_degrees: largest turn of the rotation.
        probability: share of images that are changed at all; the papers change all.
        backend: `fast` or `monai`; the same distributions, not the same draws.

    Source of the five changes and their sizes: the endoscopic stone papers. Filling by mirroring is our
    reading.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> augment = Augment()
        >>> image = torch.rand(3, 32, 32)
        >>> torch.equal(augment(image, 7), augment(image, 7))
        True
        >>> augment.batch(torch.rand(4, 3, 32, 32), [1, 2, 3, 4]).shape
        torch.Size([4, 3, 32, 32])
    """

    kinds: tuple[Kind, ...] = KINDS
    pad: float = 50.0
    perspective: float = 0.4
    affine_degrees: float = 90.0
    affine_scale: tuple[float, float] = (0.5, 1.0)
    rotation_degrees: float = 180.0
    probability: float = 1.0
    backend: Literal["fast", "monai"] = "fast"

    def __post_init__(self) -> None:
        if not self.kinds or not set(self.kinds) <= set(KINDS):
            raise ValueError(f"kinds: {self.kinds} must be some of {KINDS}")
        if not 0 <= self.pad <= REFERENCE_SIDE:
            raise ValueError(f"pad: {self.pad} must be from 0 to {REFERENCE_SIDE}")
        for name in ("perspective", "probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: {getattr(self, name)} must be from 0 to 1")
        for name in ("affine_degrees", "rotation_degrees"):
            if not 0 <= getattr(self, name) <= 180:
                raise ValueError(f"{name}: {getattr(self, name)} must be from 0 to 180")
        if len(self.affine_scale) != 2 or not 0 < self.affine_scale[0] <= self.affine_scale[1]:
            raise ValueError(f"affine_scale: {self.affine_scale} must be two numbers, 0 < smallest ≤ largest")
        if self.backend not in ("fast", "monai"):
            raise ValueError(f"backend: {self.backend!r} is unknown; allowed are 'fast' and 'monai'")

    def __call__(self, image: Tensor, seed: int) -> Tensor:
        """Return `image`, float [C, H, W] with H = W, changed as `seed` says; same shape and type."""
        _need_square(image, 3)
        if self.backend == "monai":
            return self._by_monai(image, seed)
        return self.batch(image[None], (seed,))[0]

    def batch(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        """Change a batch, float [B, C, H, W] with H = W, each image by its own seed as a call alone would."""
        _need_square(images, 4)
        if len(seeds) != len(images):
            raise ValueError(f"seeds: {len(seeds)} seeds for {len(images)} images; give one for each image")
        if self.backend == "monai":
            return torch.stack(
                [self._by_monai(image, seed) for image, seed in zip(images, seeds, strict=True)]
            )
        matrices = np.stack([self.homography(seed) for seed in seeds])
        return warp(images, torch.from_numpy(matrices).to(images.device, torch.float32))

    def homography(self, seed: int) -> np.ndarray:
        """The change that `seed` draws: float64 [3, 3], from places in the result to places in the image.

        Places are (x, y, 1) with x and y from −1 at the left and upper border to 1 at the opposite ones.
        """
        rng = np.random.default_rng(abs(seed))
        kind = self.kinds[int(rng.integers(len(self.kinds)))]
        if rng.random() >= self.probability:
            return np.eye(3)
        if kind == "flip":
            return np.diag([*_FLIPS[int(rng.integers(3))], 1.0])
        if kind == "pad":
            grown = 1 + 2 * self.pad / REFERENCE_SIDE
            return np.diag([grown, grown, 1.0])
        if kind == "perspective":
            return perspective_homography(rng.uniform(0, self.perspective, (4, 2)))
        if kind == "affine":
            turn = rng.uniform(-self.affine_degrees, self.affine_degrees)
            return _turn(turn) / np.array([*[rng.uniform(*self.affine_scale)] * 2, 1.0])
        return _turn(rng.uniform(-self.rotation_degrees, self.rotation_degrees))

    def _by_monai(self, image: Tensor, seed: int) -> Tensor:
        from .augment_monai import pipeline  # MONAI takes seconds to import

        transform = pipeline(self, image.shape[-1])
        # MONAI keeps a generator with a 32-bit seed for each transform; this sets them all.
        transform.set_random_state(seed=abs(seed) % 2**32)
        return torch.as_tensor(transform(image)).as_subclass(torch.Tensor).to(image.dtype)


_FLIPS = ((-1.0, 1.0), (1.0, -1.0), (-1.0, -1.0))


def warp(images: Tensor, matrices: Tensor) -> Tensor:
    """Resample images through homographies, bilinearly, mirrored at the border.

    Args:
        images: float [B, C, H, W].
        matrices: float [B, 3, 3], from places in the result to places in the image, (x, y, 1) with −1 and 1
            at the borders.

    Returns:
        [B, C, H, W] of the type of `images`.
    """
    batch, _, height, width = images.shape
    grid = F.affine_grid(
        torch.eye(2, 3, device=images.device, dtype=torch.float32).expand(1, 2, 3),
        [1, 1, height, width],
        align_corners=False,
    ).reshape(-1, 2)
    points = torch.cat([grid, torch.ones_like(grid[:, :1])], dim=1) @ matrices.transpose(1, 2)
    places = (points[..., :2] / points[..., 2:]).reshape(batch, height, width, 2)
    return F.grid_sample(
        images.to(torch.float32), places, mode="bilinear", padding_mode="reflection", align_corners=False
    ).to(images.dtype)


def perspective_homography(inwards: np.ndarray) -> np.ndarray:
    """The homography that moves the corners of the image inwards.

    Args:
        inwards: float [4, 2], how far the corners (upper left, upper right, lower right, lower left) move
            in x and y, as shares of half the side, from 0 to 1.

    Returns:
        float64 [3, 3], from places in the result to places in the image.
    """
    corners = np.array([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])
    moved = corners * (1 - inwards)
    rows = []
    for (x, y), (u, v) in zip(moved, corners, strict=True):
        rows.append([x, y, 1, 0, 0, 0, -u * x, -u * y])
        rows.append([0, 0, 0, x, y, 1, -v * x, -v * y])
    solution = np.linalg.solve(np.array(rows), corners.reshape(-1))
    return np.append(solution, 1.0).reshape(3, 3)


def _turn(degrees: float) -> np.ndarray:
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])


def _need_square(images: Tensor, dimensions: int) -> None:
    if images.ndim != dimensions or images.shape[-1] != images.shape[-2] or not images.is_floating_point():
        wanted = "[C, H, W]" if dimensions == 3 else "[B, C, H, W]"
        raise ValueError(
            f"image: is {images.dtype} {tuple(images.shape)}; it must be float {wanted} with H = W"
        )
