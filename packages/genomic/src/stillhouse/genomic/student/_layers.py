"""Parts that every student shares: gated MLP, rotary positions, softmax attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPSILON = 1e-5


class RMSNorm(nn.Module):
    """x / √(mean x² + ε) ⊙ weight over the last dimension, in the dtype of x.

    `torch.nn.RMSNorm` with half-precision x under autocast and float32 weights takes a slower path and warns.

    Args:
        width: size of the last dimension.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [..., width]."""
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), EPSILON)


class GatedMLP(nn.Module):
    """SwiGLU: W_o (SiLU(W_g x) ⊙ W_u x), without biases; 3 · width · hidden parameters.

    Args:
        width: channels in and out.
        hidden: channels between.

    Shapes: [..., width] → [..., width].
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.in_proj = nn.Linear(width, 2 * hidden, bias=False)
        self.out_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., width] to [..., width]."""
        gate, up = self.in_proj(x).chunk(2, -1)
        return self.out_proj(F.silu(gate) * up)


def rotate(x: Tensor, positions: Tensor | None = None, *, base: float = 10_000.0) -> Tensor:
    """Rotary positions (RoFormer, arXiv 2104.09864): products of rotated vectors see distances alone.

    Args:
        x: [B, H, L, D], D even.
        positions: of the L vectors, [B, L]; None: 0 … L − 1.
        base: of the wavelengths 2π · base^(2i/D).

    Returns:
        [B, H, L, D].
    """
    length, half = x.shape[-2], x.shape[-1] // 2
    # Angles grow with the position: in float32 far ones would lose the distance they are to tell.
    exact = torch.float32 if x.device.type == "mps" else torch.float64
    rates = base ** (-torch.arange(half, device=x.device, dtype=exact) / half)
    if positions is None:
        positions = torch.arange(length, device=x.device)[None]
    angles = positions[:, None, :, None].to(exact) * rates
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    one, two = x[..., :half], x[..., half:]
    return torch.cat([one * cos - two * sin, two * cos + one * sin], -1)


class SelfAttention(nn.Module):
    """Bidirectional softmax attention with rotary positions; 4 · width² parameters, no biases.

    Args:
        width: channels in and out.
        heads: number of heads; width / heads even.

    Shapes: x [B, L, width], attend bool [B, L] (False = padding) or None → [B, L, width].
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, attend: Tensor | None = None) -> Tensor:
        """Attend from every position to those where `attend` is True."""
        batch, length, width = x.shape
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, width // self.heads)).permute(2, 0, 3, 1, 4)
        mask = None
        if attend is not None:
            # A row of padding alone would divide by zero; what it then attends to does not matter.
            mask = (attend | ~attend.any(1, keepdim=True))[:, None, None, :]
        o = F.scaled_dot_product_attention(rotate(q), rotate(k), v, attn_mask=mask)
        return self.out_proj(o.transpose(1, 2).reshape(batch, length, width))


def check_ids(ids: Tensor, attend: Tensor | None) -> None:
    """Raise ValueError unless ids are [B, L] and attend, if any, is a bool of the same shape."""
    if ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"ids is {ids.dtype} of the shape {tuple(ids.shape)}; it must be int64 [B, L]")
    if attend is not None and (attend.shape != ids.shape or attend.dtype != torch.bool):
        raise ValueError(
            f"attend is {attend.dtype} of the shape {tuple(attend.shape)}; it must be bool "
            f"{tuple(ids.shape)}, False at padding"
        )
