"""A block of dilated gated convolutions, after the idea of ConvNova (ICLR 2025).

Two convolutions of the same dilation see the normalised input; one makes features, the other decides for each
of them how much passes. No down-sampling: every letter keeps its own feature. Written from the idea, not from
its code; the layout of the block is our reading.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class GatedConvolution(nn.Module):
    """W_o (GELU(conv_a x) ⊙ sigmoid(conv_b x)) with two convolutions of `kernel` letters.

    Args:
        width: channels in and out.
        kernel: letters of a convolution, odd.
        dilation: letters from tap to tap.

    Shapes: x [B, L, width], attend bool [B, L] or None → [B, L, width]. Padding is read as zero, as what lies
    beyond the ends is.
    """

    def __init__(self, width: int, kernel: int, dilation: int) -> None:
        super().__init__()
        reach = dilation * (kernel - 1) // 2
        self.branches = nn.Conv1d(width, 2 * width, kernel, padding=reach, dilation=dilation)
        self.out_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, attend: Tensor | None = None) -> Tensor:
        """Map [B, L, width] to [B, L, width]."""
        if attend is not None:
            x = x.masked_fill(~attend[..., None], 0.0)
        feature, gate = self.branches(x.transpose(1, 2)).transpose(1, 2).chunk(2, -1)
        return self.out_proj(F.gelu(feature, approximate="tanh") * torch.sigmoid(gate))
