"""A small masked language model over k-mers: pre-norm, rotary positions, gated MLP."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillhouse.core.errors import ConfigError

from ..tokenizers import KmerTokenizer
from ._marginal import spelling


@dataclass(frozen=True, slots=True, kw_only=True)
class KmerTransformerConfig:
    """Sizes of a `KmerTransformer`.

    Attributes:
        width: channels d (≥ 8), a multiple of `heads`.
        depth: blocks (≥ 1).
        heads: attention heads; d / heads must be even.
        mlp_ratio: hidden channels of the MLP in units of d (> 0). "swiglu" has ⅔ of them, rounded up to a
            multiple of 8, so that both activations have about as many weights.
        dropout: share of channels dropped after attention and MLP, in [0, 1).
        max_tokens: longest sequence in tokens.
        activation: "swiglu" or "gelu".
        tied: the head shares the embedding's weights.
        composed: the embedding of a token is a vector of its own plus one of each of its letters at its
            place, so that k-mers with letters in common begin alike. A vocabulary of 4096 words is learned
            from a genome of a few megabases in far fewer steps.
        k: letters of a token.
    """

    width: int = 128
    depth: int = 4
    heads: int = 4
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    max_tokens: int = 2048
    activation: Literal["swiglu", "gelu"] = "swiglu"
    tied: bool = True
    composed: bool = True
    k: int = 6

    def __post_init__(self) -> None:
        least_values = (("width", 8), ("depth", 1), ("heads", 1), ("max_tokens", 1), ("k", 1))
        for name, least in least_values:
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ConfigError(f"teacher.{name} is {value!r}; it must be an integer ≥ {least}")
        if self.k > 8:
            raise ConfigError(f"teacher.k is {self.k}; it must be an integer in [1, 8]")
        if self.width % (2 * self.heads):
            raise ConfigError(
                f"teacher.width is {self.width} with {self.heads} heads; it must be a multiple of "
                f"{2 * self.heads}, so that a head has an even number of channels to rotate"
            )
        if not self.mlp_ratio > 0:
            raise ConfigError(f"teacher.mlp_ratio is {self.mlp_ratio!r}; it must be > 0")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"teacher.dropout is {self.dropout!r}; it must lie in [0, 1)")
        if self.activation not in ("swiglu", "gelu"):
            raise ConfigError(f"teacher.activation is {self.activation!r}; allowed: swiglu, gelu")


class KmerTransformer(nn.Module):
    """The network. B windows of T tokens, width d, vocabulary V.

    Args:
        config: sizes.
        vocab_size: V; may be left out.
        tokenizer: the vocabulary; NTv2's order for the configuration's k when None.

    Attributes:
        vocab_size, pad_id: of the tokenizer; the embedding of the pad id stays zero.

    Raises:
        ValueError: a tokenizer of another k or size.

    Example:
        >>> network = KmerTransformer(KmerTransformerConfig(width=16, depth=1, heads=2))
        >>> features = network(torch.tensor([[6, 7, 8]]))
        >>> features.shape, network.logits(features[:, 1]).shape
        (torch.Size([1, 3, 16]), torch.Size([1, 4107]))
    """

    def __init__(
        self,
        config: KmerTransformerConfig,
        vocab_size: int | None = None,
        *,
        tokenizer: KmerTokenizer | None = None,
    ) -> None:
        super().__init__()
        tokenizer = KmerTokenizer(config.k) if tokenizer is None else tokenizer
        size = tokenizer.vocab_size
        if tokenizer.k != config.k or vocab_size not in (None, size):
            raise ValueError(
                f"the tokenizer has k = {tokenizer.k} and {size} ids; expected k = {config.k} and "
                f"vocab_size = {vocab_size}"
            )
        self.config, self.vocab_size, self.pad_id = config, size, tokenizer.pad_id
        d = config.width
        self.embedding = nn.Embedding(size, d, padding_idx=self.pad_id)
        self.letters = nn.Parameter(torch.empty(4 * config.k, d)) if config.composed else None
        self.kmer_ids: Tensor
        self.spelling: Tensor
        self.register_buffer("kmer_ids", tokenizer.kmer_ids.clone(), persistent=False)
        self.register_buffer("spelling", spelling(config.k).float(), persistent=False)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.depth))
        self.norm = nn.RMSNorm(d, eps=1e-6)
        self.head = nn.Linear(d, size)
        cos, sin = _rotations(config.max_tokens, d // config.heads)
        self.cos: Tensor
        self.sin: Tensor
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self._initialise()
        if config.tied:
            self.head.weight = self.embedding.weight

    def _initialise(self) -> None:
        ends: list[nn.Linear] = []
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
            if isinstance(module, _Block):  # residual branches add up over the depth
                ends += [module.project, module.shrink]
        for end in ends:
            nn.init.normal_(end.weight, std=0.02 / math.sqrt(2 * self.config.depth))
        with torch.no_grad():
            self.embedding.weight[self.pad_id].zero_()
            if self.letters is not None:
                nn.init.normal_(self.letters, std=0.02)

    def forward(self, ids: Tensor, *, attend: Tensor | None = None) -> Tensor:
        """Final features.

        Args:
            ids: int64 [B, T].
            attend: bool [B, T], False = padding that no token attends to; None: no padding.

        Returns:
            [B, T, d], after the last norm.
        """
        return self.hidden_states(ids, attend=attend, keep=())[-1]

    def hidden_states(
        self, ids: Tensor, *, attend: Tensor | None = None, keep: tuple[int, ...] | None = None
    ) -> list[Tensor]:
        """Embeddings, the blocks' outputs, and in the last place the output after the last norm.

        Args:
            ids: int64 [B, T].
            attend: as in `forward`.
            keep: which of the first `depth` entries are wanted; the others come back empty. None: all.

        Returns:
            depth + 1 tensors [B, T, d].

        Raises:
            ValueError: T exceeds `max_tokens`.
        """
        length = ids.shape[1]
        if length > self.config.max_tokens:
            raise ValueError(
                f"ids has {length} tokens; this network reads max_tokens = {self.config.max_tokens}"
            )
        mask = None
        if attend is not None:
            attend = attend.clone()
            attend[:, :1] = True  # a window without tokens would have nothing to attend to
            mask = attend[:, None, None, :]
        x = F.embedding(ids, self._composed(self.embedding.weight), padding_idx=self.pad_id)
        cos, sin = self.cos[:length], self.sin[:length]
        states = []
        for index, block in enumerate(self.blocks):
            states.append(x if keep is None or index in keep else x.new_empty(0))
            x = block(x, cos, sin, mask)
        return [*states, self.norm(x)]

    def logits(self, features: Tensor) -> Tensor:
        """Logits over the vocabulary, [..., V]; give it the features of the tokens in question alone."""
        return F.linear(features, self._composed(self.head.weight), self.head.bias)

    def _composed(self, weight: Tensor) -> Tensor:
        """Vectors of tokens [V, d]: their own, and for k-mers those of their letters."""
        if self.letters is None:
            return weight
        return weight.index_add(0, self.kmer_ids, self.spelling.to(self.letters.dtype) @ self.letters)


class _Block(nn.Module):
    def __init__(self, config: KmerTransformerConfig) -> None:
        super().__init__()
        d = config.width
        self.heads, self.dropout, self.gated = config.heads, config.dropout, config.activation == "swiglu"
        self.attention_norm, self.mlp_norm = nn.RMSNorm(d, eps=1e-6), nn.RMSNorm(d, eps=1e-6)
        self.qkv = nn.Linear(d, 3 * d, bias=False)
        self.project = nn.Linear(d, d, bias=False)
        hidden = config.mlp_ratio * d * (2 / 3 if self.gated else 1)
        hidden = max(8, -(-int(hidden) // 8) * 8)
        self.grow = nn.Linear(d, hidden * (2 if self.gated else 1), bias=False)
        self.shrink = nn.Linear(hidden, d, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        b, t, d = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(b, t, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(_rotate(q, cos, sin), _rotate(k, cos, sin), v, attn_mask=mask)
        x = x + self._drop(self.project(mixed.transpose(1, 2).reshape(b, t, d)))
        grown = self.grow(self.mlp_norm(x))
        if self.gated:
            gate, value = grown.chunk(2, dim=-1)
            grown = F.silu(gate) * value
        else:
            grown = F.gelu(grown)
        return x + self._drop(self.shrink(grown))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


def _rotations(length: int, channels: int, base: float = 10000.0) -> tuple[Tensor, Tensor]:
    """cos and sin of position · base^(−2i / channels), [length, channels], both halves alike (RoFormer)."""
    frequency = base ** (-torch.arange(0, channels, 2, dtype=torch.float64) / channels)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos().float(), angle.sin().float()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate channel i with channel i + half by the angle of the position; x [B, heads, T, channels]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
