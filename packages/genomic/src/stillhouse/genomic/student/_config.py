"""What is needed to build a student again, and the sizes the package ships."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from stillhouse.core.errors import ConfigError

from .ops import Variant

Kind = Literal["gdn", "cnn", "transformer"]
Combine = Literal["add", "concat", "gate"]


@dataclass(kw_only=True, slots=True, frozen=True)
class StudentConfig:
    """A student network.

    Attributes:
        kind: "gdn" (bidirectional Gated DeltaNet, then attention), "cnn" (dilated gated convolutions) or
            "transformer" (attention alone).
        width: channels d of the features.
        gdn_layers: Bi-GDN blocks; "gdn" only.
        attention_layers: attention blocks, after the Bi-GDN blocks of "gdn", or all of "transformer".
        conv_layers: blocks of "cnn".
        heads: heads of the recurrence.
        head_dim: channels of a key and a query; None is 0.75 · width / heads, which makes 6 d² parameters a
            direction.
        expand_v: channels of a value, in units of head_dim.
        attention_heads: heads of softmax attention; width / attention_heads must be even (rotary positions).
        mlp_ratio: hidden channels of the gated MLP, in units of width.
        conv_kernel: letters of the short causal convolution of the recurrence.
        kernel: letters of a convolution of "cnn", odd.
        dilation: block i of "cnn" has the dilation `dilation`^i.
        tie_directions: one set of weights for both directions, as Caduceus ties its projections.
        negative_eigenvalues: β in (0, 2) instead of (0, 1).
        recurrence: "gated_delta" or "printed"; see `ops`.
        combine: how the two directions join: "add", "concat" (then a linear map) or "gate" (a learned
            mixture in every channel).
        chunk: steps of a chunk of the recurrence; changes nothing but speed.
        vocab: rows of the embedding; 12 letters and special tokens, padded to 16 as in Caduceus.
        rc_equivariant: share the weights between the strands (`RcEquivariant`); features have 2 · width
            channels.
    """

    kind: Kind = "gdn"
    width: int = 128
    gdn_layers: int = 2
    attention_layers: int = 1
    conv_layers: int = 3
    heads: int = 2
    head_dim: int | None = None
    expand_v: float = 2.0
    attention_heads: int = 2
    mlp_ratio: float = 4.0
    conv_kernel: int = 4
    kernel: int = 9
    dilation: int = 4
    tie_directions: bool = False
    negative_eigenvalues: bool = False
    recurrence: Variant = "gated_delta"
    combine: Combine = "add"
    chunk: int = 32
    vocab: int = 16
    rc_equivariant: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (
            ("kind", get_args(Kind)),
            ("recurrence", get_args(Variant)),
            ("combine", get_args(Combine)),
        ):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; allowed: {', '.join(allowed)}")
        for name in ("width", "heads", "attention_heads", "conv_kernel", "kernel", "dilation", "chunk"):
            _integer(name, getattr(self, name), 1)
        for name in ("gdn_layers", "attention_layers", "conv_layers"):
            _integer(name, getattr(self, name), 0)
        _integer("vocab", self.vocab, 12)
        if self.kernel % 2 == 0:
            raise ConfigError(f"kernel is {self.kernel}; it must be odd, so that a convolution has a middle")
        for name in ("expand_v", "mlp_ratio"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be > 0")
        if not self.depth:
            raise ConfigError(f"a student of the kind {self.kind!r} without layers; set at least one")
        if self.kind == "gdn" and self.gdn_layers:
            if self.head_dim is None and (3 * self.width) % (4 * self.heads):
                raise ConfigError(
                    f"0.75 · width / heads is no integer for width {self.width} and heads {self.heads}; "
                    "change one of them or set head_dim"
                )
            if self.head_dim is not None:
                _integer("head_dim", self.head_dim, 1)
            if self.key_dim * self.expand_v % 1:
                raise ConfigError(f"expand_v · head_dim is no integer: {self.expand_v} · {self.key_dim}")
        if self.kind != "cnn" and self.attention_layers and self.width % (2 * self.attention_heads):
            raise ConfigError(
                f"width {self.width} and attention_heads {self.attention_heads}: width / attention_heads "
                "must be an even integer"
            )

    @property
    def key_dim(self) -> int:
        """Channels of a key of one head."""
        return 3 * self.width // (4 * self.heads) if self.head_dim is None else self.head_dim

    @property
    def value_dim(self) -> int:
        """Channels of a value of one head."""
        return int(self.key_dim * self.expand_v)

    @property
    def mlp_width(self) -> int:
        """Hidden channels of the gated MLP."""
        return max(1, round(self.mlp_ratio * self.width))

    @property
    def depth(self) -> int:
        """Number of blocks."""
        if self.kind == "gdn":
            return self.gdn_layers + self.attention_layers
        return self.conv_layers if self.kind == "cnn" else self.attention_layers


def _integer(name: str, value: object, minimum: int) -> None:
    if type(value) is not int or value < minimum:
        raise ConfigError(f"{name} is {value!r}; it must be an integer of at least {minimum}")


_SIZES = {"1m": 128, "64": 64, "48": 48, "32": 32}


def preset(name: str) -> StudentConfig:
    """A student the package ships.

    The three kinds have comparable parameter counts at every width, about 65 d². "gdn_1m" is two Bi-GDN
    blocks and one attention block at d = 128, 1.06 M parameters: consistent with the 1.1 M of HAD, whose
    layer count and width were not seen (our reading).

    Args:
        name: kind and size, "gdn_1m", "cnn_64", "transformer_32", …; kinds "gdn", "cnn", "transformer";
            sizes "1m" (d = 128), "64", "48", "32".

    Returns:
        Its configuration; change it with `dataclasses.replace`.

    Raises:
        ConfigError: an unknown name.

    Example:
        >>> preset("gdn_1m").width, preset("cnn_32").kind
        (128, 'cnn')
    """
    kind, _, size = name.rpartition("_")
    if size not in _SIZES or kind not in get_args(Kind):
        names = ", ".join(f"{k}_{s}" for k in get_args(Kind) for s in _SIZES)
        raise ConfigError(f"student preset {name!r} is unknown; allowed: {names}")
    width = _SIZES[size]
    if kind == "cnn":
        return StudentConfig(kind="cnn", width=width, conv_layers=3, mlp_ratio=1.0)
    if kind == "transformer":
        return StudentConfig(kind="transformer", width=width, attention_layers=4)
    return StudentConfig(width=width)
