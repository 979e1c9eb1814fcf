"""Shapes and precision that every file here shares: per-sample coefficients, guarded divisions."""

from __future__ import annotations

import torch
from torch import Tensor

GUARD = 1e-6


def per_sample(t: Tensor | float, x: Tensor, name: str = "t") -> Tensor:
    """Time as float64 `[B]` on the device of `x [B, *S]`; a number counts for every sample.

    Raises:
        ValueError: `t` is neither a scalar nor `[B]`.
    """
    time = torch.as_tensor(t, dtype=torch.float64, device=x.device)
    if time.dim() == 0:
        return time.expand(x.shape[0])
    if time.shape != x.shape[:1]:
        raise ValueError(f"{name} has shape {list(time.shape)}; give a number or [B] = [{x.shape[0]}]")
    return time


def like(coefficient: Tensor, x: Tensor) -> Tensor:
    """`[B]` reshaped to `[B, 1, …]`, to multiply `x [B, *S]`; the dtype stays."""
    return coefficient.reshape(-1, *[1] * (x.dim() - 1))


def guarded(divisor: Tensor) -> Tensor:
    """`divisor` with its magnitude raised to at least 1e-6, its sign kept (zero counts as positive)."""
    sign = torch.where(divisor < 0, -1.0, 1.0)
    return sign * divisor.abs().clamp_min(GUARD)
