"""Optimizers of the roles as mmengine's wrappers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.registry import OPTIM_WRAPPERS
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ...errors import ConfigError
from ...train.contract import Distiller, TrainConfig
from ...train.optim import OptimConfig

_AUTOCAST = {"32-true": None, "bf16-mixed": torch.bfloat16}


@OPTIM_WRAPPERS.register_module()
class RoleOptimWrapper(OptimWrapper):
    """Optimizer of one role with its schedule, which counts the updates of this role alone.

    mmengine steps every schedule at every iteration, which is wrong for a role that is not updated each time,
    and its mixed precision makes a GradScaler, on a GPU only; bfloat16 needs none. Both are done here.

    Args:
        optimizer: optimizer of the role's parameters.
        scheduler: stepped after each update.
        clip_norm: largest norm of the gradient; None does not clip.
        dtype: autocast runs the loss in it; None does not.

    Attributes:
        grad_norm: norm before the last clip, None without clipping.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        scheduler: LRScheduler | None = None,
        clip_norm: float | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(optimizer, clip_grad=None if clip_norm is None else {"max_norm": clip_norm})
        self.scheduler, self.dtype = scheduler, dtype
        self.grad_norm: Tensor | None = None

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Autocast where asked for."""
        if self.dtype is None:
            yield
            return
        device = next(model.parameters()).device.type
        with torch.autocast(device, dtype=self.dtype):
            yield

    def step(self, **kwargs: Any) -> None:
        """Clip, update the parameters, move the schedule."""
        super().step(**kwargs)
        if self.scheduler is not None:
            self.scheduler.step()

    def _clip_grad(self) -> None:
        # mmengine's own brings the norm to the host at every update, under one name for all roles
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.grad_norm = torch.nn.utils.clip_grad_norm_(parameters, **self.clip_grad_kwargs)


def optim_wrappers(
    distiller: Distiller, optim: OptimConfig | Mapping[str, OptimConfig], config: TrainConfig
) -> OptimWrapperDict:
    """One `RoleOptimWrapper` a role, with schedules that end at the role's last update.

    Args:
        distiller: its trainable networks are on their device.
        optim: one configuration for all roles, or one for each.
        config: `steps`, `clip_norm` and `precision` are used.

    Raises:
        ConfigError: `optim` lacks a role or names another, or a precision that is not "32-true" or
            "bf16-mixed".

    Example:
        >>> from stillhouse.core.testing import TwoRoleDistiller
        >>> wrappers = optim_wrappers(TwoRoleDistiller(), OptimConfig(), TrainConfig(steps=4))
        >>> sorted(wrappers.keys())
        ['critic', 'student']
    """
    networks = distiller.trainable()
    if config.precision not in _AUTOCAST:
        raise ConfigError(
            f'train.precision is "{config.precision}"; under mmengine it is one of {", ".join(_AUTOCAST)}'
        )
    if not isinstance(optim, OptimConfig) and optim.keys() != networks.keys():
        raise ConfigError(f"optim names the roles {sorted(optim)}, the distiller trains {sorted(networks)}")
    updates = Counter(dict.fromkeys(networks, 0))
    for step in range(config.steps):
        updates.update(distiller.roles(step))
    strange = updates.keys() - networks.keys()
    if strange:
        raise ValueError(f"roles() names {sorted(strange)[0]!r}; trainable() has {sorted(networks)}")
    wrappers = {}
    for name, network in networks.items():
        chosen = optim if isinstance(optim, OptimConfig) else optim[name]
        try:
            optimizer, scheduler = chosen.build(network.parameters(), max(updates[name], 1))
        except ValueError as error:
            raise ValueError(f"role {name!r}: {error}") from None
        wrappers[name] = RoleOptimWrapper(
            optimizer,
            scheduler=scheduler,
            clip_norm=config.clip_norm,
            dtype=_AUTOCAST[config.precision],
        )
    return OptimWrapperDict(**wrappers)
