"""The reconstruction decoder of pre-training: masked letters ask, visible letters answer.

After CrossMAE: a query is a learned mask embedding and its position; keys and values are the features of
visible letters. Masked letters do not see each other. Positions are rotary, so only distances count. Size,
depth and positions of HAD's decoder were not seen (our reading).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._layers import GatedMLP, RMSNorm, rotate


class CrossAttention(nn.Module):
    """Softmax attention from queries to keys with rotary positions, without biases.

    Args:
        width: channels of queries, keys and output.
        heads: number of heads; width / heads even.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.split = (heads, width // heads)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.kv_proj = nn.Linear(width, 2 * width, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, at: Tensor, keys: Tensor, keys_at: Tensor, mask: Tensor) -> Tensor:
        """Attend.

        Args:
            x: queries [B, M, width].
            at: their positions, int64 [B, M].
            keys: [B, V, width].
            keys_at: their positions, int64 [B, V].
            mask: bool [B, V], True where there is a key; at least one in every row.

        Returns:
            [B, M, width].
        """
        q = self.q_proj(x).unflatten(-1, self.split).transpose(1, 2)
        k, v = self.kv_proj(keys).unflatten(-1, (2, *self.split)).permute(2, 0, 3, 1, 4)
        o = F.scaled_dot_product_attention(
            rotate(q, at), rotate(k, keys_at), v, attn_mask=mask[:, None, None, :]
        )
        return self.out_proj(o.transpose(1, 2).flatten(-2))


class DecoderBlock(nn.Module):
    """x + cross-attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(width)
        self.attention = CrossAttention(width, heads)
        self.mlp_norm = RMSNorm(width)
        self.mlp = GatedMLP(width, max(1, round(mlp_ratio * width)))

    def forward(self, x: Tensor, at: Tensor, keys: Tensor, keys_at: Tensor, mask: Tensor) -> Tensor:
        """As `CrossAttention.forward`."""
        x = x + self.attention(self.attention_norm(x), at, keys, keys_at, mask)
        return x + self.mlp(self.mlp_norm(x))


class MaskedDecoder(nn.Module):
    """Nucleotide logits of masked letters from the features of visible ones.

    Features at masked letters are never read, so what is decoded knows of a masked letter only what the
    encoder was given of it: give it [MASK] there.

    Args:
        width: channels of the encoder's features.
        depth: number of blocks.
        heads: heads of a block; inner / heads even.
        inner: channels of the decoder; None is `width`.
        mlp_ratio: hidden channels of its gated MLPs, in units of `inner`.

    Attributes:
        options: these five, to build it again: `MaskedDecoder(**decoder.options)`.

    Example:
        >>> decoder = MaskedDecoder(width=8)
        >>> masked = torch.tensor([[False, True, True, False, False]])
        >>> decoder(torch.randn(1, 5, 8), ~masked, masked).shape
        torch.Size([1, 5, 4])
    """

    def __init__(
        self, width: int, depth: int = 1, heads: int = 2, *, inner: int | None = None, mlp_ratio: float = 2.0
    ) -> None:
        super().__init__()
        inner = width if inner is None else inner
        for name, value in (("width", width), ("depth", depth), ("heads", heads), ("inner", inner)):
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be an integer of at least 1")
        if inner % (2 * heads):
            raise ValueError(f"inner {inner} and heads {heads}: inner / heads must be an even integer")
        if not mlp_ratio > 0:
            raise ValueError(f"mlp_ratio is {mlp_ratio!r}; it must be > 0")
        self.options = {
            "width": width,
            "depth": depth,
            "heads": heads,
            "inner": inner,
            "mlp_ratio": mlp_ratio,
        }
        self.in_proj = nn.Linear(width, inner, bias=False)
        self.key_norm = RMSNorm(inner)
        self.mask_embedding = nn.Parameter(torch.randn(inner))
        self.blocks = nn.ModuleList(DecoderBlock(inner, heads, mlp_ratio) for _ in range(depth))
        self.norm = RMSNorm(inner)
        self.head = nn.Linear(inner, 4)

    def forward(self, features: Tensor, visible: Tensor, queries: Tensor) -> Tensor:
        """Decode.

        Args:
            features: of the encoder [B, L, width].
            visible: bool [B, L], True where a letter's feature may be read; not at masked letters, not at
                padding.
            queries: bool [B, L], True at the masked letters to reconstruct.

        Returns:
            float [B, L, 4], logits over A, C, G, T at `queries`, zero elsewhere. In a row without visible
            letters they do not depend on the features.

        Raises:
            ValueError: shapes that do not fit, or a letter both visible and asked for.
        """
        for name, given in (("visible", visible), ("queries", queries)):
            if given.shape != features.shape[:2] or given.dtype != torch.bool:
                raise ValueError(
                    f"{name} is {given.dtype} of the shape {tuple(given.shape)}; it must be bool "
                    f"{tuple(features.shape[:2])}"
                )
        if bool((visible & queries).any()):
            raise ValueError("queries and visible share a letter: it would answer its own question")
        asked_at, asked = _gather(queries)
        keys_at, known = _gather(visible)
        nothing = ~known.any(1, keepdim=True)
        keys = self.key_norm(self.in_proj(_pick(features, keys_at))).masked_fill(~known[..., None], 0.0)
        x = self.mask_embedding.to(keys.dtype).expand(*asked_at.shape, -1)
        for block in self.blocks:
            x = block(x, asked_at, keys, keys_at, known | nothing)
        logits = self.head(self.norm(x))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        out = logits.new_zeros(*queries.shape, 4)
        return out.masked_scatter(queries[..., None], logits[asked])


def _gather(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of the True entries of every row, in order, [B, m ≥ 1], and which of them are such, bool."""
    most = max(int(chosen.sum(1).max()), 1) if chosen.numel() else 1
    order = chosen.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
    return order, chosen.gather(1, order)


def _pick(features: Tensor, at: Tensor) -> Tensor:
    return features.gather(1, at[..., None].expand(-1, -1, features.shape[-1]))
