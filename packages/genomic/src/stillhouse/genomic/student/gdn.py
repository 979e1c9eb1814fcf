"""Gated DeltaNet layers, one direction and both.

Defaults follow the layer of flash-linear-attention: q, k and v pass a short causal depthwise convolution
and SiLU; q and k have length 1 in every head and q is scaled by 1/√d_k; β = sigmoid(W_b x), doubled where
negative eigenvalues are allowed; log α = −exp(A_log) · softplus(W_a x + dt_bias); the output is
RMS-normalised in every head and gated by SiLU(W_g x). With heads · d_k = 0.75 d and d_v = 2 d_k that is about
6 d² parameters.

How HAD joins its two directions was not seen; adding them is our reading, as is one set of weights for each.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._config import StudentConfig
from ._layers import RMSNorm
from .ops import gated_delta


class Projected(NamedTuple):
    """What a direction asks of the recurrence; heads H.

    Attributes:
        q: queries, scaled, [B, L, H, d_k].
        k: keys of length 1 [B, L, H, d_k].
        v: values [B, L, H, d_v].
        log_alpha: [B, L, H], ≤ 0.
        beta: [B, L, H].
        gate: of the output, before SiLU, [B, L, H · d_v].
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log_alpha: Tensor
    beta: Tensor
    gate: Tensor


class ShortConvolution(nn.Module):
    """Causal depthwise convolution along L, then SiLU: y_t = SiLU(Σ_j w_j x_{t−K+1+j}), without bias.

    Args:
        channels: D.
        kernel: K.

    Shapes: [B, L, D] → [B, L, D].
    """

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, kernel).uniform_(-(kernel**-0.5), kernel**-0.5))

    def forward(self, x: Tensor) -> Tensor:
        """Convolve [B, L, D]."""
        channels, kernel = self.weight.shape
        padded = F.pad(x, (0, 0, kernel - 1, 0)).transpose(1, 2)
        # A 2-D convolution over [B, D, 1, L] keeps channels last, which is several times faster on a CPU.
        y = F.conv2d(padded[:, :, None], self.weight[:, None, None], groups=channels)
        return F.silu(y[:, :, 0].transpose(1, 2))


class GatedDeltaNet(nn.Module):
    """One direction: the output at a position depends on that position and those before it.

    Args:
        config: see `StudentConfig`; width, heads, head_dim, expand_v, conv_kernel, negative_eigenvalues,
            recurrence and chunk are read.

    Shapes: x [B, L, width], attend bool [B, L] or None → [B, L, width]. Padding writes nothing, decays
    nothing, and its letters do not reach the convolution, on either side of the sequence.

    Example:
        >>> layer = GatedDeltaNet(StudentConfig(width=16))
        >>> layer(torch.randn(2, 20, 16)).shape
        torch.Size([2, 20, 16])
    """

    def __init__(self, config: StudentConfig) -> None:
        super().__init__()
        self.config = config
        heads, keys, values = config.heads, config.key_dim, config.value_dim
        self.sizes = (heads * (2 * keys + values), heads * values, heads, heads)  # q k v | gate | a | b
        self.in_proj = nn.Linear(config.width, sum(self.sizes), bias=False)
        self.convolution = ShortConvolution(self.sizes[0], config.conv_kernel)
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(1e-4, 16).log())
        dt = torch.empty(heads).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # softplus(dt_bias) = dt
        self.norm = RMSNorm(values)
        self.out_proj = nn.Linear(heads * values, config.width, bias=False)
        self._mark()

    def _mark(self) -> None:
        """Ask optimizers not to decay the decay rates; `OptimConfig.build` listens."""
        for parameter in (self.A_log, self.dt_bias):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy or an unpickled layer has fresh parameters without the mark: set it again."""
        super().__setstate__(state)
        self._mark()

    def forward(self, x: Tensor, attend: Tensor | None = None) -> Tensor:
        """Map [B, L, width] to [B, L, width], causally."""
        parts = self.project(x, attend)
        return self.finish(self.recur(parts), parts.gate)

    def project(self, x: Tensor, attend: Tensor | None = None) -> Projected:
        """Everything before the recurrence.

        Args:
            x: [B, L, width].
            attend: bool [B, L], False at padding; None: no padding.
        """
        config = self.config
        mixed, gate, a, b = self.in_proj(x).split(self.sizes, -1)
        if attend is not None:
            mixed = mixed.masked_fill(~attend[..., None], 0.0)
        mixed = (
            self.convolution(mixed).unflatten(-1, (config.heads, -1)) if False else self.convolution(mixed)
        )
        keys, values = config.heads * config.key_dim, config.heads * config.value_dim
        q, k, v = (y.unflatten(-1, (config.heads, -1)) for y in mixed.split([keys, keys, values], -1))
        exact = torch.promote_types(a.dtype, torch.float32)  # a decay in half precision is a different decay
        log_alpha = -self.A_log.to(exact).exp() * F.softplus(a.to(exact) + self.dt_bias.to(exact))
        beta = b.to(exact).sigmoid() * (2.0 if config.negative_eigenvalues else 1.0)
        if attend is not None:
            outside = ~attend[..., None]
            log_alpha, beta = log_alpha.masked_fill(outside, 0.0), beta.masked_fill(outside, 0.0)
        return Projected(unit(q) * config.key_dim**-0.5, unit(k), v, log_alpha, beta, gate)

    def recur(self, parts: Projected) -> Tensor:
        """Run the recurrence; outputs [B, L, H, d_v]."""
        config = self.config
        return gated_delta(
            parts.q,
            parts.k,
            parts.v,
            parts.log_alpha,
            parts.beta,
            variant=config.recurrence,
            chunk=config.chunk,
        )

    def finish(self, o: Tensor, gate: Tensor) -> Tensor:
        """Normalise, gate and map back: o [B, L, H, d_v], gate [B, L, H · d_v] → [B, L, width]."""
        return self.out_proj(self.norm(o).flatten(-2) * F.silu(gate))


def unit(x: Tensor) -> Tensor:
    """Scale the last dimension to length 1; a zero vector stays zero."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


class BiGatedDeltaNet(nn.Module):
    """Both directions, in one pass through the recurrence.

    The second direction reads the flipped sequence; its output is flipped back. "add": sum. "concat": a
    linear map of both. "gate": r ⊙ forward + (1 − r) ⊙ backward with r = sigmoid(W x).

    Args:
        config: as of `GatedDeltaNet`, and tie_directions and combine.

    Shapes: x [B, L, width], attend bool [B, L] or None → [B, L, width].
    """

    def __init__(self, config: StudentConfig) -> None:
        super().__init__()
        self.config = config
        self.ahead = GatedDeltaNet(config)
        self.behind = None if config.tie_directions else GatedDeltaNet(config)
        width = config.width
        if config.combine == "concat":
            self.mix = nn.Linear(2 * width, width, bias=False)
        elif config.combine == "gate":
            self.mix = nn.Linear(width, width)

    def forward(self, x: Tensor, attend: Tensor | None = None) -> Tensor:
        """Map [B, L, width] to [B, L, width]."""
        back_x, back_attend = x.flip(1), None if attend is None else attend.flip(1)
        first, last = self.ahead, self.ahead if self.behind is None else self.behind
        ahead, behind = first.project(x, attend), last.project(back_x, back_attend)
        # The gates are left out: the recurrence does not see them.
        q, k, v, log_alpha, beta = (torch.cat(pair) for pair in zip(ahead[:-1], behind[:-1], strict=True))
        o = first.recur(Projected(q, k, v, log_alpha, beta, gate=ahead.gate))
        o_ahead, o_behind = o.chunk(2)
        forward = first.finish(o_ahead, ahead.gate)
        backward = last.finish(o_behind, behind.gate).flip(1)
        if self.config.combine == "add":
            return forward + backward
        if self.config.combine == "concat":
            return self.mix(torch.cat([forward, backward], -1))
        ratio = self.mix(x).sigmoid()
        return ratio * forward + (1 - ratio) * backward
