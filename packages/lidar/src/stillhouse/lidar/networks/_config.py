"""Widths and voxel of the networks."""

from __future__ import annotations

from dataclasses import dataclass

from stillhouse.core.sparse import Backend, Norm, split_channels

FULL = (32, 32, 64, 128, 256, 256, 128, 96, 96)
REDUCED = (16, 16, 32, 64, 64, 64, 32, 24, 24)
REDUCED_3 = (16, 16, 32, 64, 64, 32, 24)
SINGLE = (16, 16, 32, 48, 64, 64, 32, 24, 24)


@dataclass(kw_only=True, slots=True, frozen=True)
class NetworkConfig:
    """Sizes of a network; the defaults are those of LiDiff's noise net.

    Attributes:
        channels: stem, encoder stages, decoder stages: 1 + 2·stages widths.
        voxel: side of the finest voxel, metres.
        blocks: residual blocks of a stage.
        time_channels: width of the sinusoidal time embedding, even, at least 4.
        head_channels: hidden width of the head.
        norm: "batch" (reference) or "layer", with which the clouds of a batch stay independent in training,
            too.
        point_offsets: also show the network where in its voxel each point lies, on the way in and in the
            head. The reference does not: all points of a voxel get one answer, fair with voxels of 0.05 m,
            coarse with those of a CPU.
        offsets: points that the refinement net makes of one.
        reach: bound of the refinement's offsets along each axis, metres.
        factor: single-pass network: completed points for one partial point.
        spread: single-pass network: standard deviation of the noise round a point, as a share of its distance
            (our choice).
        crowding: single-pass network: copies of a point grow with this power of its distance (our choice).
        backend: "torch", or "spconv" for that library's kernels.

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> NetworkConfig().stages, NetworkConfig.reduced(stages=3).channels
        (4, (16, 16, 32, 64, 64, 32, 24))
    """

    channels: tuple[int, ...] = FULL
    voxel: float = 0.05
    blocks: int = 2
    time_channels: int = 96
    head_channels: int = 20
    norm: Norm = "batch"
    point_offsets: bool = False
    offsets: int = 6
    reach: float = 1.0
    factor: int = 10
    spread: float = 0.05
    crowding: float = 1.0
    backend: Backend = "torch"

    def __post_init__(self) -> None:
        split_channels(self.channels)
        if self.norm not in ("batch", "layer"):
            raise ValueError(f"norm is {self.norm!r}; allowed: 'batch', 'layer'")
        if self.time_channels < 4 or self.time_channels % 2:
            raise ValueError(f"time_channels is {self.time_channels}; it must be even and at least 4")
        for name in ("blocks", "head_channels", "offsets", "factor"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("voxel", "reach", "spread"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0 and finite")
        if not 0 <= self.crowding <= 4:
            raise ValueError(f"crowding is {self.crowding}; it must lie in [0, 4]")

    @classmethod
    def reduced(cls, *, stages: int = 4, voxel: float = 0.25) -> NetworkConfig:
        """A small noise net for CPUs, with 3 or 4 stages and `point_offsets`."""
        if stages not in (3, 4):
            raise ValueError(f"stages is {stages}; allowed: 3, 4")
        return cls(channels=REDUCED if stages == 4 else REDUCED_3, voxel=voxel, point_offsets=True)

    @classmethod
    def single(cls, *, voxel: float = 0.05) -> NetworkConfig:
        """The single-pass network beside the full teacher: about 6 % of its parameters."""
        return cls(channels=SINGLE, voxel=voxel, point_offsets=True)

    @property
    def stages(self) -> int:
        """Number of encoder stages, equal to that of decoder stages."""
        return len(self.channels) // 2

    @property
    def stem(self) -> int:
        """Width of the stem."""
        return self.channels[0]

    @property
    def encoder(self) -> tuple[int, ...]:
        """Widths of the encoder stages, finest first."""
        return self.channels[1 : 1 + self.stages]

    @property
    def decoder(self) -> tuple[int, ...]:
        """Widths of the decoder stages, coarsest first."""
        return self.channels[1 + self.stages :]
