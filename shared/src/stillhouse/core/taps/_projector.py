"""Maps student features to the teacher's width."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor, nn
from torch.nn.utils import parametrizations

Kind = Literal["linear", "mlp", "conv1x1", "identity", "orthogonal"]
Init = Literal["default", "xavier", "orthogonal", "eye"]


class Projector(nn.Module):
    """A trainable map between widths; put it into the role's networks so that the optimizer sees it.

    Kinds: "linear"; "mlp", Linear – GELU – Linear; "conv1x1", the linear map over the channels of a feature
        map;
    "identity", which checks the width; "orthogonal", a linear map without bias that stays orthogonal in
    training: it keeps lengths and angles where ``out_dim ≥ in_dim`` and is a projection with orthonormal rows
    otherwise.

    Args:
        kind: See above.
        in_dim: Width of the student's features.
        out_dim: Width of the teacher's features.
        hidden: Width of the middle of an "mlp"; None takes the larger of the two widths.
        bias: Whether "linear", "mlp" and "conv1x1" have biases.
        init: "default" (torch's), "xavier" (uniform), "orthogonal" or "eye" (identity, zero-padded); the last
            three start with zero biases. Only for kinds with free weights.
        spatial: Spatial dimensions of a "conv1x1": 1, 2 or 3.

    Raises:
        ValueError: A value outside what is allowed.

    Example:
        >>> import torch
        >>> Projector("linear", 8, 32)(torch.zeros(4, 10, 8)).shape
        torch.Size([4, 10, 32])
        >>> Projector("conv1x1", 8, 32)(torch.zeros(4, 8, 5, 5)).shape
        torch.Size([4, 32, 5, 5])
    """

    def __init__(
        self,
        kind: Kind,
        in_dim: int,
        out_dim: int,
        *,
        hidden: int | None = None,
        bias: bool = True,
        init: Init = "default",
        spatial: int = 2,
    ) -> None:
        super().__init__()
        if kind not in get_args(Kind):
            raise ValueError(f"kind={kind!r} is unknown; allowed: {', '.join(get_args(Kind))}")
        if init not in get_args(Init):
            raise ValueError(f"init={init!r} is unknown; allowed: {', '.join(get_args(Init))}")
        if in_dim < 1 or out_dim < 1 or (hidden is not None and hidden < 1):
            raise ValueError(
                f"widths must be ≥ 1, got in_dim={in_dim!r}, out_dim={out_dim!r}, hidden={hidden!r}"
            )
        if hidden is not None and kind != "mlp":
            raise ValueError(f'hidden is for kind="mlp", got kind={kind!r}')
        if init != "default" and kind in ("identity", "orthogonal"):
            raise ValueError(f"init={init!r} means nothing with kind={kind!r}")
        if kind == "identity" and in_dim != out_dim:
            raise ValueError(f'kind="identity" needs equal widths, got in_dim={in_dim} and out_dim={out_dim}')
        if spatial not in (1, 2, 3):
            raise ValueError(f"spatial must be 1, 2 or 3, got {spatial!r}")
        self.kind, self.in_dim, self.out_dim = kind, in_dim, out_dim
        self.map = _build(kind, in_dim, out_dim, hidden, bias, spatial)
        if init != "default":
            for module in self.map.modules():
                _initialise(module, init)

    def forward(self, features: Tensor) -> Tensor:
        """Projects features.

        Args:
            features: [..., in_dim]; [N, in_dim, ...] for "conv1x1".

        Returns:
            [..., out_dim]; [N, out_dim, ...] for "conv1x1".

        Raises:
            ValueError: Another width.
        """
        axis = 1 if self.kind == "conv1x1" else -1
        if features.dim() < 2 or features.shape[axis] != self.in_dim:
            raise ValueError(
                f"features must have width {self.in_dim} in dimension {axis}, "
                f"got shape {list(features.shape)}"
            )
        return self.map(features)

    def extra_repr(self) -> str:
        """Kind and widths, for printing."""
        return f"{self.kind}, {self.in_dim} → {self.out_dim}"


def _build(kind: Kind, in_dim: int, out_dim: int, hidden: int | None, bias: bool, spatial: int) -> nn.Module:
    if kind == "identity":
        return nn.Identity()
    if kind == "linear":
        return nn.Linear(in_dim, out_dim, bias=bias)
    if kind == "conv1x1":
        return (nn.Conv1d, nn.Conv2d, nn.Conv3d)[spatial - 1](in_dim, out_dim, 1, bias=bias)
    if kind == "orthogonal":
        return parametrizations.orthogonal(nn.Linear(in_dim, out_dim, bias=False))
    middle = hidden or max(in_dim, out_dim)
    return nn.Sequential(
        nn.Linear(in_dim, middle, bias=bias), nn.GELU(), nn.Linear(middle, out_dim, bias=bias)
    )


def _initialise(module: nn.Module, init: Init) -> None:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return
    matrix = weight.data.view(weight.shape[0], -1)
    if init == "xavier":
        nn.init.xavier_uniform_(matrix)
    elif init == "orthogonal":
        nn.init.orthogonal_(matrix)
    else:
        nn.init.eye_(matrix)
    bias = getattr(module, "bias", None)
    if isinstance(bias, Tensor):
        nn.init.zeros_(bias)
