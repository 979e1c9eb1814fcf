"""The noise net (LiDiff's MinkUNetDiff): a sparse UNet, its stages gated by the partial scan and the time."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from stillhouse.core.sparse import Bags, SparseTensor, SparseUNet, gather_rows, nearest_voxels

from ._condition import Condition
from ._config import NetworkConfig
from ._points import PointHead, cell_offsets, check_clouds, voxel_input, voxelize_clouds


def time_embedding(t: Tensor, channels: int) -> Tensor:
    """Sinusoidal embedding: half sines, half cosines, frequencies 10000^(−i / (half − 1)).

    Args:
        t: [B], integer or real.
        channels: even, at least 4.

    Returns:
        float32 [B, channels].
    """
    half = channels // 2
    rates = torch.exp(torch.arange(half, device=t.device) * (-math.log(10000.0) / (half - 1)))
    angles = t.float()[:, None] * rates
    return torch.cat((angles.sin(), angles.cos()), 1)


class Gate(nn.Module):
    """What a stage's input is multiplied with, for each coarse voxel of the partial scan.

    Features of the scan → two-layer MLP; time embedding → two-layer MLP; both side by side → two-layer MLP.
    It runs once a coarse voxel, before the match, which gives the same as running it once a fine voxel.

    The bias of the last layer begins at 1, so that an untrained gate lets everything through (our choice).

    Args:
        condition: channels C of the partial features.
        time: channels of the time embedding.
        width: channels W of the stage's input.
    """

    def __init__(self, condition: int, time: int, width: int) -> None:
        super().__init__()
        self.scan = _mlp(condition, condition, condition)
        self.time = _mlp(time, time, condition)
        self.both = _mlp(2 * condition, condition, width)
        nn.init.ones_(self.both[-1].bias)  # type: ignore[arg-type]

    def forward(self, features: Tensor, batch: Tensor, embedding: Tensor) -> Tensor:
        """Features [M, C], their samples int64 [M], embedding [B, time] → [M, W]."""
        time = self.time(embedding)[batch]
        gate: Tensor = self.both(torch.cat((self.scan(features), time), 1))
        return gate


def _mlp(first: int, hidden: int, last: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(first, hidden), nn.LeakyReLU(0.1), nn.Linear(hidden, last))


class NoiseNet(nn.Module):
    """Predicts the noise ε of a noisy cloud x_t, given a partial scan and the time.

    Before each of the 2·stages stages of the UNet the features of every voxel are multiplied with a gate made
    of the time and of the nearest coarse voxel of the partial encoder's output (centre to centre: our
    reading). With the default config these are the sizes of LiDiff's network (reference code: PRBonn/LiDiff,
    lidiff/models/minkunet.py).

    Args:
        config: widths and voxel, equal to those of the `PartialEncoder`.

    Shape:
        x_t [B, N, 3] metres, condition of B samples, t [B] (0 … 999) → ε [B, N, 3].

    Example:
        >>> import torch
        >>> from stillhouse.lidar.networks import PartialEncoder
        >>> config = NetworkConfig.reduced(stages=3)
        >>> encoder, net = PartialEncoder(config), NoiseNet(config)
        >>> partial = torch.randn(2, 50, 3)
        >>> net(partial.repeat(1, 10, 1), encoder(partial), torch.tensor([999, 10])).shape
        torch.Size([2, 500, 3])
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        point_channels = 3 if config.point_offsets else 0
        self.unet = SparseUNet(
            3 + point_channels,
            config.channels,
            blocks=config.blocks,
            norm=config.norm,
            backend=config.backend,
        )
        self.gates = nn.ModuleList(
            Gate(config.encoder[-1], config.time_channels, width) for width in self.unet.input_widths
        )
        self.head = PointHead(config.channels[-1], config.head_channels, 3, point_channels)

    def forward(self, x_t: Tensor, part_features: Condition, t: Tensor) -> Tensor:
        """Predict the noise.

        Raises:
            ValueError: shapes do not fit, a point is NaN or infinite, or too far for 16-bit cells.
        """
        check_clouds("x_t", x_t)
        condition = part_features
        if condition.batch_size != len(x_t) or t.shape != (len(x_t),):
            raise ValueError(
                f"x_t holds {len(x_t)} clouds, the condition {condition.batch_size} and t is "
                f"{tuple(t.shape)}; all must have one for each cloud"
            )
        voxels = voxelize_clouds(x_t, self.config.voxel)
        flat = x_t.reshape(-1, 3)
        offsets = cell_offsets(flat, voxels) if self.config.point_offsets else None
        embedding = time_embedding(t, self.config.time_channels).to(x_t.dtype)
        coarse = condition.tensor.coords
        matches: dict[int, tuple[Tensor, Bags]] = {}

        def modulate(stage: int, x: SparseTensor) -> SparseTensor:
            stride = x.coords.stride
            if stride not in matches:
                match = nearest_voxels(x.coords, coarse)
                matches[stride] = match, Bags.of(match, len(coarse))
            gate = self.gates[stage](condition.features, coarse.batch, embedding)
            return x.replace(x.features * gather_rows(gate, *matches[stride]))

        y = self.unet(voxel_input(flat, voxels, offsets), modulate)
        noise: Tensor = self.head(y.features, voxels, offsets)
        return noise.reshape(x_t.shape)
