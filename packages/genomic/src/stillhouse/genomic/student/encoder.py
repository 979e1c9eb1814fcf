"""The encoder: embedding, pre-norm residual blocks, a last normalisation."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor, nn

from ._config import StudentConfig
from ._layers import GatedMLP, RMSNorm, SelfAttention, check_ids
from .cnn import GatedConvolution
from .gdn import BiGatedDeltaNet
from .rc import RcEquivariant


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)).

    Args:
        config: gives width and mlp_ratio.
        mixer: called as mixer(x [B, L, width], attend bool [B, L] or None) → [B, L, width].
    """

    def __init__(self, config: StudentConfig, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(config.width)
        self.mixer = mixer
        self.mlp_norm = RMSNorm(config.width)
        self.mlp = GatedMLP(config.width, config.mlp_width)

    def forward(self, x: Tensor, attend: Tensor | None = None) -> Tensor:
        """Map [B, L, width] to [B, L, width]."""
        x = x + self.mixer(self.mixer_norm(x), attend)
        return x + self.mlp(self.mlp_norm(x))


class Encoder(nn.Module):
    """Ids of letters → one feature vector a letter.

    Attributes:
        config: what it was built from.
        width: channels of its features.
        depth: number of blocks.

    Shapes: ids int64 [B, L], attend bool [B, L] or None → [B, L, width]; any L. Features at padding are
    finite and meaningless; those of the letters are what they are without padding.

    Example:
        >>> import torch
        >>> from stillhouse.genomic.student import build_student, preset
        >>> encoder = build_student(preset("gdn_32"))
        >>> features, hidden = encoder(torch.tensor([[7, 8, 9, 10, 11]]), hidden=True)
        >>> features.shape, len(hidden)
        (torch.Size([1, 5, 32]), 3)
    """

    def __init__(self, config: StudentConfig) -> None:
        super().__init__()
        self.config = config
        self.width = config.width
        self.depth = config.depth
        self.embedding = nn.Embedding(config.vocab, config.width)
        self.blocks = nn.ModuleList(Block(config, mixer) for mixer in _mixers(config))
        self.norm = RMSNorm(config.width)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Conv1d):
                inputs = module.weight[0].numel()
                scale = (2 * config.depth) ** -0.5 if name.endswith("out_proj") else 1.0
                nn.init.normal_(module.weight, std=scale * inputs**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @overload
    def forward(
        self, ids: Tensor, *, attend: Tensor | None = None, hidden: Literal[False] = False
    ) -> Tensor: ...

    @overload
    def forward(
        self, ids: Tensor, *, attend: Tensor | None = None, hidden: Literal[True]
    ) -> tuple[Tensor, list[Tensor]]: ...

    def forward(
        self, ids: Tensor, *, attend: Tensor | None = None, hidden: bool = False
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Encode.

        Args:
            ids: int64 [B, L], below `config.vocab`.
            attend: bool [B, L], False at padding, on either side; None: no padding.
            hidden: return the output of every block as well.

        Returns:
            Features [B, L, width]; with `hidden` also the list of the blocks' outputs, each [B, L, width],
            the last of them the features themselves.

        Raises:
            ValueError: shapes that do not fit.
        """
        check_ids(ids, attend)
        return self.encode(self.embedding(ids), attend=attend, hidden=hidden)

    def encode(
        self, x: Tensor, *, attend: Tensor | None = None, hidden: bool = False
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """The same from embedded letters [B, L, width], for gradients with respect to the input."""
        outputs = []
        for block in self.blocks:
            x = block(x, attend) if x.shape[1] else x  # convolutions refuse an empty sequence
            outputs.append(x)
        features = self.norm(x)
        return (features, [*outputs[:-1], features]) if hidden else features


def build_student(config: StudentConfig) -> Encoder | RcEquivariant:
    """Build a student with fresh weights, drawn from torch's global generator.

    Args:
        config: see `StudentConfig` and `preset`.

    Returns:
        An `Encoder`; an `RcEquivariant` around one where `config.rc_equivariant`. Both are called alike.
    """
    encoder = Encoder(config)
    return RcEquivariant(encoder) if config.rc_equivariant else encoder


def _mixers(config: StudentConfig) -> list[nn.Module]:
    attention = [SelfAttention(config.width, config.attention_heads) for _ in range(config.attention_layers)]
    if config.kind == "transformer":
        return [*attention]
    if config.kind == "cnn":
        return [
            GatedConvolution(config.width, config.kernel, config.dilation**i)
            for i in range(config.conv_layers)
        ]
    return [*(BiGatedDeltaNet(config) for _ in range(config.gdn_layers)), *attention]
