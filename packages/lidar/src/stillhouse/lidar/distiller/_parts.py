"""What the distillers share: asking a network in a mode of its own, conditions, the batch's two clouds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..process import LocalProcess, tile

Norm = Literal["frozen", "batch"]


@contextmanager
def mode(network: nn.Module, training: bool) -> Iterator[None]:
    """The network in eval or train mode inside; each of its parts as it was afterwards."""
    before = [(module, module.training) for module in network.modules()]
    network.train(training)
    try:
        yield
    finally:
        for module, was in before:
            module.training = was


def clouds(batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """(partial `[B, n, 3]`, full `[B, N, 3]`, partial tiled to N points)."""
    partial, full = batch["partial"], batch["full"]
    return partial, full, tile(partial, full.shape[1])


def noised(
    process: LocalProcess, points: Tensor, t: Tensor | None = None, eps: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(x_t, t `[B]`, ε): t uniform and ε normal where they are not given."""
    if t is None:
        t = process.draw_times(len(points), points.device)
    if eps is None:
        eps = torch.randn_like(points)
    return process.add_noise(points, eps, t), t, eps


def null_condition(encoder: Any, batch_size: int) -> Any:
    """The encoder's condition that stands for none, of `batch_size` scans."""
    if not hasattr(encoder, "null"):
        raise TypeError(f"{type(encoder).__name__} has no null(); guidance and condition dropping need it")
    return encoder.null(batch_size)
