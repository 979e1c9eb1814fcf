"""Random windows: a turned, mirrored and rescaled part of an image, with changed gamma.

For textures, whose class does not depend on where, how large or which way round they are seen. The stone
papers' own list of changes is `Augment`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowAugment:
    """One random window an image, reproducible from a seed.

    Args:
        scale: smallest and largest side of the window as shares of the image's side, drawn evenly on a
            logarithmic scale; 0 < smallest ≤ largest ≤ 1.
        degrees: largest turn; places outside the image are mirrored in.
        mirror: whether half of the windows are mirrored.
        gamma: the image (values 0 to 1) is raised to exp(u), u even in ±gamma.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> augment = WindowAugment(scale=(0.3, 0.9))
        >>> images = torch.rand(2, 3, 48, 48)
        >>> out = augment.batch(images, [1, 2], size=32)
        >>> out.shape, torch.equal(out[1], augment.batch(images[1:], [2], size=32)[0])
        (torch.Size([2, 3, 32, 32]), True)
    """

    scale: tuple[float, float] = (0.5, 1.0)
    degrees: float = 180.0
    mirror: bool = True
    gamma: float = 0.3

    def __post_init__(self) -> None:
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale: {self.scale} must be two shares, 0 < smallest ≤ largest ≤ 1")
        if not 0 <= self.degrees <= 180:
            raise ValueError(f"degrees: {self.degrees} must be from 0 to 180")
        if self.gamma < 0:
            raise ValueError(f"gamma: {self.gamma} must not be negative")

    def draw(self, seed: int) -> tuple[np.ndarray, float]:
        """What `seed` draws: float64 [2, 3], window to image (both −1 to 1), and gamma."""
        rng = np.random.default_rng(abs(seed))
        side = float(np.exp(rng.uniform(*np.log(self.scale))))
        turn = np.radians(rng.uniform(-self.degrees, self.degrees))
        flip = -1.0 if self.mirror and rng.random() < 0.5 else 1.0
        x, y = rng.uniform(-1, 1, 2) * (1 - side)
        cos, sin = side * np.cos(turn), side * np.sin(turn)
        return np.array([[flip * cos, -sin, x], [flip * sin, cos, y]]), float(
            np.exp(rng.uniform(-self.gamma, self.gamma))
        )

    def batch(self, images: Tensor, seeds: Sequence[int], *, size: int) -> Tensor:
        """Windows of a batch.

        Args:
            images: float [B, C, H, W], values 0 to 1.
            seeds: one for each image.
            size: side of the result in pixels.

        Returns:
            float [B, C, size, size], values 0 to 1.
        """
        if images.ndim != 4 or len(seeds) != len(images):
            raise ValueError(
                f"images: is {tuple(images.shape)} with {len(seeds)} seeds; it must be [B, C, H, W] with "
                "B seeds"
            )
        drawn = [self.draw(seed) for seed in seeds]
        matrices = torch.from_numpy(np.stack([matrix for matrix, _ in drawn])).to(
            images.device, torch.float32
        )
        gamma = torch.tensor([g for _, g in drawn], device=images.device)[:, None, None, None]
        grid = F.affine_grid(matrices, [len(images), images.shape[1], size, size], align_corners=False)
        window = F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
        return window.clamp(0, 1) ** gamma
