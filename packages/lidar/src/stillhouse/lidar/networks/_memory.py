"""How much memory a network needs, from its widths and the number of points, before anything is allocated."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ._config import NetworkConfig

Kind = Literal["noise", "encoder", "refine"]
PAIRS = 3.0  # neighbours of a voxel among 26, a round upper figure for noisy clouds


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes by purpose.

    Attributes:
        parameters: number of parameters.
        weights: bytes of the weights; in training with their gradients and two moments of Adam.
        activations: bytes kept for the backward pass, or of the skip connections in inference.
        maps: bytes of the kernel maps.
        transient: bytes of the largest single layer's working set.
    """

    parameters: int
    weights: int
    activations: int
    maps: int
    transient: int

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.weights + self.activations + self.maps + self.transient

    def __str__(self) -> str:
        def mib(size: int) -> str:
            return f"{size / 2**20:,.0f} MiB"

        return (
            f"{mib(self.total)}: {self.parameters:,} parameters {mib(self.weights)}, activations "
            f"{mib(self.activations)}, kernel maps {mib(self.maps)}, largest layer {mib(self.transient)}"
        )


def occupied(points: int, side: float, *, radius: float = 50.0, depth: float = 4.0) -> int:
    """Voxels of a cloud scattered over a disc, expected: K·(1 − e^(−N/K)), K = π·radius²·depth / side³."""
    cells = math.pi * radius**2 * depth / side**3
    return max(1, min(points, math.ceil(-cells * math.expm1(-points / cells))))


def memory_estimate(
    config: NetworkConfig,
    points: int,
    *,
    batch: int = 1,
    training: bool = True,
    kind: Kind = "noise",
    voxels: Sequence[int] | None = None,
    radius: float = 50.0,
    value_bytes: int = 4,
) -> MemoryEstimate:
    """Memory of one network in one pass.

    Counts what autograd keeps (outputs of convolutions for the norm, of activations for the next layer,
    gates, skips), kernel maps, weights with Adam's moments, and the working set of the widest layer. Buffers
    of the allocator come on top.

    Args:
        config: of the network.
        points: N of each cloud (of the partial scan for "encoder").
        batch: clouds at a time.
        training: with backward pass and optimizer, or inference alone.
        kind: "noise", "encoder" or "refine".
        voxels: voxels of each level of the whole batch, finest first (`stillhouse.core.sparse.level_sizes`);
            by default those of a noisy cloud scattered over a disc of `radius`.
        radius: metres.
        value_bytes: 4 for float32, 2 under half-precision autocast.

    Example:
        >>> memory_estimate(NetworkConfig.reduced(), 4000).parameters
        2200711
    """
    sides = [config.voxel * 2**level for level in range(config.stages + 1)]
    if voxels is None:
        voxels = [batch * occupied(points, side, radius=radius) for side in sides]
    if len(voxels) != len(sides):
        raise ValueError(
            f"voxels has {len(voxels)} numbers; with {config.stages} stages it needs {len(sides)}"
        )
    parameters, kept, widest = _walk(config, voxels, kind)
    if kind == "noise":
        kept += batch * points * (2 * config.head_channels if config.point_offsets else 3)
    skips = sum(m * c for m, c in zip(voxels, (config.stem, *config.encoder), strict=True))
    maps = sum(round(8 * m * (4 * PAIRS + 4)) for m in voxels)
    return MemoryEstimate(
        parameters=parameters,
        weights=4 * parameters * (4 if training else 1),
        activations=value_bytes * (kept if training else skips),
        maps=maps,
        transient=round(value_bytes * widest * (PAIRS + 1) * (3 if training else 2)),
    )


def _walk(config: NetworkConfig, voxels: Sequence[int], kind: Kind) -> tuple[int, int, int]:
    """Parameters, values kept for the backward pass, and the largest voxels × channels of a layer."""
    parameters = kept = widest = 0

    def conv(m: int, k: int, c: int, d: int) -> None:
        """Convolution with norm; its output and, after the activation, the next layer's input are kept."""
        nonlocal parameters, kept, widest
        parameters += k * c * d + 2 * d
        kept += 2 * m * d
        widest = max(widest, m * max(c, d))

    def blocks(m: int, c: int, d: int) -> None:
        nonlocal parameters, kept
        for _ in range(config.blocks):
            conv(m, 27, c, d)
            conv(m, 27, d, d)
            if c != d:
                parameters += c * d + 2 * d
                kept += m * d
            c = d

    def gate(m: int, width: int) -> None:
        nonlocal parameters, kept
        if kind == "noise":
            c, t = config.encoder[-1], config.time_channels
            parameters += 2 * c * (c + 1) + t * (t + 1) + c * (t + 1) + c * (2 * c + 1) + width * (c + 1)
            kept += 2 * m * width

    inputs = 6 if config.point_offsets else 3
    conv(voxels[0], 27, inputs, config.stem)
    conv(voxels[0], 27, config.stem, config.stem)
    c = config.stem
    for level, d in enumerate(config.encoder):
        gate(voxels[level], c)
        conv(voxels[level + 1], 8, c, c)
        blocks(voxels[level + 1], c, d)
        c = d
    if kind == "encoder":
        return parameters, kept, widest
    skips = (config.stem, *config.encoder)[:-1]
    for level, d in zip(range(config.stages - 1, -1, -1), config.decoder, strict=True):
        gate(voxels[level + 1], c)
        conv(voxels[level], 8, c, d)
        kept += voxels[level] * (d + skips[level])
        blocks(voxels[level], d + skips[level], d)
        c = d
    outputs = 3 if kind == "noise" else 3 * config.offsets
    own = 3 if config.point_offsets else 0
    parameters += (c + own + 1) * config.head_channels + (config.head_channels + 1) * outputs
    return parameters, kept, widest
