"""The changes of `Augment` as MONAI transforms; imported only when that backend is asked for."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from monai.transforms import Affine, BorderPad, Compose, Identity, OneOf, RandFlip, RandRotate, Resize
from monai.transforms.transform import RandomizableTransform
from torch import Tensor

from .augment import REFERENCE_SIDE, perspective_homography, warp

if TYPE_CHECKING:
    from .augment import Augment


class RandPerspective(RandomizableTransform):
    """Move the four corners inwards at random; MONAI has no perspective change of its own.

    Args:
        distortion: how far at most, as a share of half the side, from 0 to 1.
    """

    def __init__(self, distortion: float) -> None:
        super().__init__(prob=1.0)
        self.distortion = distortion

    def __call__(self, image: Tensor) -> Tensor:
        """Return `image`, float [C, H, W], seen at a slant; same shape."""
        inwards = self.R.uniform(0, self.distortion, (4, 2))
        matrix = torch.from_numpy(perspective_homography(inwards)).to(torch.float32)
        return warp(torch.as_tensor(image)[None], matrix[None])[0]


class RandSimilarity(RandomizableTransform):
    """Turn and shrink at random, both axes alike; `RandAffine` would draw a factor for each axis.

    Args:
        turn: largest turn in radians.
        smallest, largest: size of the image afterwards, relative.
    """

    def __init__(self, turn: float, smallest: float, largest: float) -> None:
        super().__init__(prob=1.0)
        self.turn = turn
        self.sizes = (smallest, largest)

    def __call__(self, image: Tensor) -> Tensor:
        """Return `image`, float [C, H, W], turned and shrunk; same shape."""
        turn, size = self.R.uniform(-self.turn, self.turn), self.R.uniform(*self.sizes)
        # MONAI maps from the result to the image, so that its factor is the inverse of the image's size.
        change: Callable[[Tensor], Any] = Affine(
            rotate_params=turn, scale_params=(1 / size, 1 / size), padding_mode="reflection", image_only=True
        )
        turned: Tensor = change(image)
        return turned


@lru_cache(maxsize=8)
def pipeline(augment: Augment, side: int) -> OneOf:
    """MONAI's `OneOf` over the changes of `augment`, for images float [C, side, side]."""
    border = round(augment.pad / REFERENCE_SIDE * side)
    changes: dict[str, Callable[..., Any]] = {
        "flip": OneOf([RandFlip(prob=1.0, spatial_axis=axes) for axes in (0, 1, (0, 1))]),
        "pad": Compose([BorderPad(border, mode="symmetric"), Resize((side, side), mode="bilinear")]),
        "perspective": RandPerspective(augment.perspective),
        "affine": RandSimilarity(float(np.radians(augment.affine_degrees)), *augment.affine_scale),
        "rotation": RandRotate(
            range_x=float(np.radians(augment.rotation_degrees)), prob=1.0, padding_mode="reflection"
        ),
    }
    weight = augment.probability / len(augment.kinds)
    chosen = [(changes[kind], weight) for kind in augment.kinds]
    if augment.probability < 1:
        chosen.append((Identity(), 1 - augment.probability))
    return OneOf([change for change, _ in chosen], [share for _, share in chosen])
