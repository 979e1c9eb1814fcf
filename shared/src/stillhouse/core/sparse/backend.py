"""The optional fast path: submanifold convolutions through the kernels of `spconv` or `spconv-triton`.

On CUDA they train and infer; on CPU `spconv` offers inference alone, in one thread, and is slower than
"torch". The result equals that of the "torch" backend up to rounding.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from types import ModuleType
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from stillhouse.core.errors import MissingDependencyError

from .tensor import SparseTensor

Backend = Literal["torch", "spconv"]
_MODULES = {"cpu": ("spconv.pytorch",), "cuda": ("spconv_triton.pytorch", "spconv.pytorch")}


def check_backend(backend: str) -> Backend:
    """The backend of that name.

    Raises:
        ValueError: there is none of that name.
        MissingDependencyError: it is not installed.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend is {backend!r}; allowed: 'torch', 'spconv'")
    if backend == "spconv" and not spconv_available():
        raise _missing()
    return backend  # type: ignore[return-value]


def spconv_available(device: str = "") -> bool:
    """Whether `backend="spconv"` can be used: on "cpu", on "cuda", or (by default) anywhere."""
    return any(_library(kind) is not None for kind in ([device] if device else _MODULES))


@lru_cache(maxsize=2)
def _library(device: str) -> ModuleType | None:
    for name in _MODULES.get(device, ()):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    return None


def _missing() -> MissingDependencyError:
    return MissingDependencyError(
        'backend="spconv" needs spconv-triton (CUDA) or spconv (CPU, inference): '
        'pip install "stillhouse-core[spconv]"'
    )


@lru_cache(maxsize=64)
def _layer(in_channels: int, out_channels: int, kernel: int, device: str) -> Any:
    """A layer of the library whose weight is put in at each call; it holds no state that matters."""
    library: Any = _library(device)
    options: dict[str, Any] = {}
    if device == "cpu":
        core = importlib.import_module("spconv.core")
        options["algo"] = core.ConvAlgo.Native
    layer = library.SubMConv3d(
        in_channels, out_channels, kernel, bias=False, indice_key=f"subm{kernel}", **options
    )
    return layer.requires_grad_(False)


@contextmanager
def _one_thread(needed: bool) -> Iterator[None]:
    """On CPU, spconv 2.3.8 sums into the same row from several threads at once and gives wrong values."""
    threads = torch.get_num_threads()
    if needed:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if needed:
            torch.set_num_threads(threads)


def spconv_submanifold(x: SparseTensor, weight: Tensor, kernel: int) -> Tensor:
    """`sparse_conv` over the submanifold map, by the library.

    Args:
        x: features [M, C].
        weight: [k³, C, D].
        kernel: odd side length k.

    Returns:
        [M, D].

    Raises:
        MissingDependencyError: the library is not installed.
        ValueError: a gradient is asked for on CPU, which the library cannot give.
    """
    device = x.features.device.type
    library: Any = _library(device)
    if library is None:
        raise _missing()
    if device == "cpu" and torch.is_grad_enabled() and (x.features.requires_grad or weight.requires_grad):
        raise ValueError('backend="spconv" has no gradient on CPU; use backend="torch" or torch.no_grad()')
    coords = x.coords
    cells = coords.coords[:, 1:]
    if coords.spconv is None:
        low = cells.amin(0)
        shape = (cells.amax(0) - low + 1).tolist()
        indices = torch.cat((coords.coords[:, :1], cells - low), 1).int().contiguous()
        coords.spconv = (indices, shape, {})
    indices, shape, pairs = coords.spconv
    if torch.is_autocast_enabled(x.features.device.type):
        dtype = torch.get_autocast_dtype(x.features.device.type)
    else:
        dtype = x.features.dtype
    features, weight = x.features.to(dtype).contiguous(), weight.to(dtype)
    tensor = library.SparseConvTensor(features, indices, shape, coords.batch_size, indice_dict=pairs)
    layer = _layer(weight.shape[1], weight.shape[2], kernel, device)
    # ours [k³, C, D] → [D, k, k, k, C]
    theirs = weight.permute(2, 0, 1).reshape(weight.shape[2], kernel, kernel, kernel, weight.shape[1])
    with _one_thread(device == "cpu"):
        result = torch.func.functional_call(layer, {"weight": theirs.contiguous()}, (tensor,))
    pairs.update(result.indice_dict)
    y: Tensor = result.features
    return y
