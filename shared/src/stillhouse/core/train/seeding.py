"""The state of every global random generator, as plain values."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int, rank: int = 0) -> None:
    """Seed python, numpy and torch (all devices).

    Rank 0 gets `seed` itself, so that one process does what `torch.manual_seed(seed)` promises; other ranks
    get seeds of their own that no neighbouring seed's run shares.

    Args:
        seed: 0 ≤ seed < 2³².
        rank: index of this process.
    """
    own = seed if rank == 0 else int(np.random.SeedSequence((seed, rank)).generate_state(1)[0])
    random.seed(own)
    np.random.seed(own)  # noqa: NPY002  the legacy global generator is what libraries draw from
    torch.manual_seed(own)


def rng_state(device: torch.device) -> dict[str, Any]:
    """State of the generators of python, numpy, torch's CPU and one CUDA device."""
    kind, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002
    state = {
        "python": random.getstate(),
        "numpy": (kind, [int(key) for key in keys], position, has_gauss, cached),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def rng_states(device: torch.device, world_size: int) -> list[dict[str, Any]]:
    """`rng_state` of every rank, by rank; every rank calls it."""
    states = [rng_state(device)]
    if world_size > 1:
        states = [{}] * world_size
        torch.distributed.all_gather_object(states, rng_state(device))
    return states


def set_rng_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Restore what `rng_state` returned; a CUDA state is left out on another device."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


@contextmanager
def rng_untouched(device: torch.device) -> Iterator[None]:
    """Whatever the block draws, the generators are afterwards as they were before."""
    state = rng_state(device)
    try:
        yield
    finally:
        set_rng_state(state, device)
