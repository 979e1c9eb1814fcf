"""Features on a coordinate set."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .coordinates import CoordinateSet


@dataclass(frozen=True, slots=True)
class SparseTensor:
    """Features of occupied voxels.

    Attributes:
        features: [M, C].
        coords: the M voxels, with their cached kernel maps.
    """

    features: Tensor
    coords: CoordinateSet

    def __post_init__(self) -> None:
        if self.features.ndim != 2 or len(self.features) != len(self.coords):
            raise ValueError(
                f"features is {tuple(self.features.shape)}; it must be [{len(self.coords)}, C], a row for "
                "each voxel"
            )

    def replace(self, features: Tensor) -> SparseTensor:
        """Other features [M, C'] on the same voxels."""
        return SparseTensor(features, self.coords)

    def dense(self) -> tuple[Tensor, Tensor]:
        """The whole box that the voxels occupy, 0 where there is none.

        Returns:
            Volume [B, C, X, Y, Z] and its lowest cell int64 [3].
        """
        cells = self.coords.coords
        low = cells[:, 1:].amin(0)
        size = (cells[:, 1:].amax(0) - low + 1).tolist()
        b, (x, y, z) = cells[:, 0], (cells[:, 1:] - low).unbind(1)
        volume = self.features.new_zeros(self.coords.batch_size, *size, self.features.shape[1])
        return volume.index_put((b, x, y, z), self.features).permute(0, 4, 1, 2, 3), low
