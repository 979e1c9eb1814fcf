"""Queries, keys and values of attention layers, for relation losses such as MiniLM v2's."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._tap import FeatureTap, find_module

_SEPARATE = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("to_q", "to_k", "to_v"),
    ("wq", "wk", "wv"),
    ("q", "k", "v"),
)
_FUSED = ("qkv", "qkv_proj", "to_qkv", "Wqkv", "c_attn")


class QKV(NamedTuple):
    """Projected queries, keys and values before they are split into heads, each [B, L, D]."""

    q: Tensor
    k: Tensor
    v: Tensor


class QKVTap:
    """The taps that `tap_qkv` puts on; use it like a `FeatureTap`.

    `pop` returns name → `QKV`.
    """

    def __init__(self, readers: Mapping[str, _Separate | _Fused | _Multihead]) -> None:
        self._readers = dict(readers)

    def pop(self) -> dict[str, QKV]:
        """Returns what was collected and forgets it.

        Raises:
            RuntimeError: An attention layer has not run since the last call.
        """
        return {name: reader.pop() for name, reader in self._readers.items()}

    def remove(self) -> None:
        """Takes the hooks away."""
        for reader in self._readers.values():
            reader.remove()

    def __enter__(self) -> QKVTap:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def tap_qkv(
    model: nn.Module, paths: Mapping[str, str | tuple[str, str, str]], *, detach: bool = False
) -> QKVTap:
    """Taps queries, keys and values of attention layers.

    Understood are: three projections in one module under a usual set of names (``q_proj k_proj v_proj``,
    ``query key value``, ``q_lin …``, ``to_q …``, ``wq …``, ``q k v``); one fused projection whose output is
    the three side by side (``qkv``, ``qkv_proj``, ``to_qkv``, ``Wqkv``, ``c_attn``), as wide as three times
    its input; `nn.MultiheadAttention`, whose projections are recomputed from its inputs and weights (without
    ``bias_k``, ``bias_v`` and the zero token, which are no projections). Fused projections that interleave
    heads (``query_key_value`` of GPT-NeoX and BLOOM) or give keys fewer heads cannot be told apart by their
    shape and are refused.

    Rotary embeddings and norms that a layer applies to q and k after the projection are not included.

    Args:
        model: The network.
        paths: Name → path of an attention module, or the three paths of its projections.
        detach: Cut the values from the graph.

    Raises:
        ValueError: A module in which no queries, keys and values are found.

    Example:
        >>> attention = nn.MultiheadAttention(8, 2, batch_first=True)
        >>> x = torch.zeros(3, 5, 8)
        >>> with tap_qkv(attention, {"layer": ""}) as tap:
        ...     _ = attention(x, x, x)
        ...     tap.pop()["layer"].k.shape
        torch.Size([3, 5, 8])
    """
    readers: dict[str, _Separate | _Fused | _Multihead] = {}
    try:
        for name, path in paths.items():
            readers[name] = _reader(model, path, detach)
    except BaseException:
        QKVTap(readers).remove()
        raise
    return QKVTap(readers)


def _reader(
    model: nn.Module, path: str | tuple[str, str, str], detach: bool
) -> _Separate | _Fused | _Multihead:
    if not isinstance(path, str):
        return _Separate(model, path, detach)
    module = find_module(model, path)
    if isinstance(module, nn.MultiheadAttention):
        return _Multihead(module, path, detach)
    children = dict(module.named_children())
    for triple in _SEPARATE:
        if all(name in children for name in triple):
            return _Separate(module, triple, detach)
    for name in _FUSED:
        if name in children:
            width_in, width_out = _widths(children[name])
            if width_out != 3 * width_in:
                raise ValueError(
                    f"{path}.{name} maps {width_in} to {width_out}, not three times as much: grouped keys "
                    "and values cannot be cut apart without the numbers of heads"
                )
            return _Fused(module, name, detach)
    raise ValueError(
        f"no queries, keys and values found in {path!r} ({type(module).__name__} with {sorted(children)}); "
        "give the paths of its three projections"
    )


class _Separate:
    def __init__(self, model: nn.Module, triple: tuple[str, str, str], detach: bool) -> None:
        self._tap = FeatureTap(model, dict(zip("qkv", triple, strict=True)), detach=detach)

    def pop(self) -> QKV:
        return QKV(**self._tap.pop())

    def remove(self) -> None:
        self._tap.remove()


class _Fused:
    def __init__(self, model: nn.Module, path: str, detach: bool) -> None:
        self._tap = FeatureTap(model, {"qkv": path}, detach=detach)

    def pop(self) -> QKV:
        return QKV(*self._tap.pop()["qkv"].chunk(3, dim=-1))

    def remove(self) -> None:
        self._tap.remove()


class _Multihead:
    def __init__(self, module: nn.MultiheadAttention, path: str, detach: bool) -> None:
        self._module, self._path, self._detach = module, path, detach
        self._inputs: tuple[Tensor, Tensor, Tensor] | None = None
        self._handle = module.register_forward_pre_hook(self._before, with_kwargs=True)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [*args[:3], *(kwargs[name] for name in ("query", "key", "value")[len(args) :])]
        self._inputs = (given[0], given[1], given[2])

    def pop(self) -> QKV:
        inputs, self._inputs = self._inputs, None
        if inputs is None:
            raise RuntimeError(f"the attention layer {self._path!r} has not run since the last pop")
        m = self._module
        if m.in_proj_weight is not None:
            weights = m.in_proj_weight.chunk(3)
        else:
            weights = (m.q_proj_weight, m.k_proj_weight, m.v_proj_weight)
        biases = (None, None, None) if m.in_proj_bias is None else m.in_proj_bias.chunk(3)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self._detach):
            parts = [F.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True)]
        if not m.batch_first and parts[0].dim() == 3:
            parts = [part.transpose(0, 1) for part in parts]
        return QKV(*parts)

    def remove(self) -> None:
        self._handle.remove()
        self._inputs = None


def _widths(module: nn.Module) -> tuple[int, int]:
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise ValueError(f"a fused projection must have a weight matrix, got {type(module).__name__}")
    return weight.shape[0], weight.shape[1]  # transformers' Conv1D stores [in, out]
