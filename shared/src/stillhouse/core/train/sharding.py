"""Sharded parameters (DTensor) and plain ones under one name, without importing `torch.distributed.tensor`.

That import takes as long as torch's own; only a process that shards pays for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(value: Any) -> bool:
    """Whether a value is a DTensor."""
    return isinstance(value, Tensor) and hasattr(value, "full_tensor")


def local(tensor: Any) -> Tensor:
    """The part of a tensor that lives on this rank."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def gathered(value: Any) -> Any:
    """A nest with every sharded tensor in full; where anything is sharded, every rank has to call it."""
    if is_sharded(value):
        return value.full_tensor()
    if isinstance(value, Mapping):
        return {key: gathered(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        items = [gathered(item) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    return value


def placed(value: Tensor, like: Any) -> Tensor:
    """A full tensor with the device, layout and sharding of another of the same shape; its dtype stays."""
    if not is_sharded(like):
        return torch.empty_like(like, dtype=value.dtype).copy_(value)
    from torch.distributed.tensor import distribute_tensor

    # every rank holds the full tensor and keeps its own part
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def exchange_gradients(network: nn.Module, enabled: bool) -> None:
    """Whether the sharded parts of a network reduce their gradients over the ranks in a backward."""
    for module in network.modules():
        exchange: Any = getattr(
            module, "set_requires_gradient_sync", None
        )  # what fully_shard adds to a module
        if exchange is not None:
            exchange(enabled, recurse=False)
