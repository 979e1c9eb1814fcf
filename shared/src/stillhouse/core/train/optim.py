"""Optimizer and learning-rate schedule of one role, from a small configuration.

The factor of the schedule at the role's update `s` of `S` (both count updates of this role alone, from 0):

- warm-up, s < W: (s + 1) / W, so that the first update is not lost and update W − 1 has the full rate;
- then with t = (s − W) / max(S − W, 1): "constant" 1; "linear" 1 − (1 − r)·t; "cosine" r + (1 − r)·(1 + cos
  πt) / 2; "multistep" γ^(number of milestones ≤ s), with r = `min_lr_ratio`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from stillhouse.core.errors import ConfigError

OptimizerName = Literal["adamw", "adam", "sgd"]
ScheduleName = Literal["cosine", "constant", "linear", "multistep"]


@dataclass(kw_only=True, slots=True, frozen=True)
class OptimConfig:
    """Optimizer and schedule of one role.

    Attributes:
        name: "adamw" (decoupled weight decay), "adam" (decay added to the gradient) or "sgd".
        lr: base learning rate (> 0).
        weight_decay: decay of every parameter (≥ 0).
        momentum: momentum of "sgd", 0 ≤ momentum < 1.
        betas: decay rates of the two moments of "adam" and "adamw", each in [0, 1).
        schedule: "cosine", "constant", "linear" or "multistep".
        warmup_steps: updates of linear warm-up (≥ 0).
        milestones: updates at which "multistep" multiplies the rate by `gamma`, increasing.
        gamma: factor of "multistep" (> 0).
        min_lr_ratio: where "cosine" and "linear" end, as a part of `lr`, in [0, 1].

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> config = OptimConfig(lr=0.1, schedule="linear")
        >>> optimizer, scheduler = config.build(layer.parameters(), total_steps=4)
        >>> rates = []
        >>> for _ in range(4):
        ...     rates.append(round(scheduler.get_last_lr()[0], 3))
        ...     _ = optimizer.step()
        ...     scheduler.step()
        >>> rates
        [0.1, 0.075, 0.05, 0.025]
    """

    name: OptimizerName = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.0
    momentum: float = 0.9
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: ScheduleName = "cosine"
    warmup_steps: int = 0
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    min_lr_ratio: float = 0.0

    def __post_init__(self) -> None:
        for name, allowed in (("name", get_args(OptimizerName)), ("schedule", get_args(ScheduleName))):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"optim.{name} is {getattr(self, name)!r}; allowed: {', '.join(allowed)}")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise ConfigError(f"optim.lr is {self.lr!r}; it must be a finite number > 0")
        if not (self.weight_decay >= 0 and math.isfinite(self.weight_decay)):
            raise ConfigError(f"optim.weight_decay is {self.weight_decay!r}; it must be a finite number ≥ 0")
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"optim.momentum is {self.momentum!r}; it must lie in [0, 1)")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optim.betas is {self.betas!r}; it must be two numbers in [0, 1)")
        if not isinstance(self.warmup_steps, int) or self.warmup_steps < 0:
            raise ConfigError(f"optim.warmup_steps is {self.warmup_steps!r}; it must be an integer ≥ 0")
        if self.schedule == "multistep" and not self.milestones:
            raise ConfigError('optim.milestones is empty; schedule "multistep" needs at least one milestone')
        if any(a >= b for a, b in zip((0, *self.milestones), self.milestones, strict=False)):
            raise ConfigError(
                f"optim.milestones is {self.milestones!r}; they must be increasing integers ≥ 1"
            )
        if not self.gamma > 0:
            raise ConfigError(f"optim.gamma is {self.gamma!r}; it must be > 0")
        if not 0 <= self.min_lr_ratio <= 1:
            raise ConfigError(f"optim.min_lr_ratio is {self.min_lr_ratio!r}; it must lie in [0, 1]")

    def factor(self, update: int, total_steps: int) -> float:
        """The schedule's factor on `lr` at a role's zero-based update; see the head of the module."""
        if update < self.warmup_steps:
            return (update + 1) / self.warmup_steps
        t = min((update - self.warmup_steps) / max(total_steps - self.warmup_steps, 1), 1.0)
        if self.schedule == "cosine":
            return self.min_lr_ratio + (1 - self.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * t))
        if self.schedule == "linear":
            return 1 - (1 - self.min_lr_ratio) * t
        if self.schedule == "multistep":
            return self.gamma ** sum(milestone <= update for milestone in self.milestones)
        return 1.0

    def build(self, parameters: Iterable[nn.Parameter], total_steps: int) -> tuple[Optimizer, LRScheduler]:
        """Make the optimizer of one role and its schedule.

        Args:
            parameters: the role's parameters; those that need no gradient and repeats (tied ones) are left
                out. One with the attribute `_no_weight_decay = True` is never decayed (decay rates and biases
                of a recurrence, for example); a copy made by `copy.deepcopy` may lose the mark.
            total_steps: updates of this role in the whole run (≥ 1).

        Returns:
            The optimizer and its scheduler; call `scheduler.step()` after each `optimizer.step()`.

        Raises:
            ValueError: no parameter needs a gradient, or `total_steps` < 1.
        """
        if total_steps < 1:
            raise ValueError(f"total_steps is {total_steps}; a schedule needs at least one update")
        chosen = list({id(p): p for p in parameters if p.requires_grad}.values())
        if not chosen:
            raise ValueError(
                "parameters holds none that needs a gradient; "
                "freeze less or leave the role out of trainable()"
            )
        groups: list[dict[str, Any]] = [{"params": [p for p in chosen if not _undecayed(p)]}]
        if self.weight_decay and len(groups[0]["params"]) < len(chosen):
            groups.append({"params": [p for p in chosen if _undecayed(p)], "weight_decay": 0.0})
            groups = [group for group in groups if group["params"]]
        else:
            groups = [{"params": chosen}]
        optimizer: Optimizer
        if self.name == "sgd":
            optimizer = SGD(groups, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
        else:
            adam = AdamW if self.name == "adamw" else Adam
            optimizer = adam(groups, lr=self.lr, betas=self.betas, weight_decay=self.weight_decay)
        return optimizer, LambdaLR(optimizer, lambda update: self.factor(update, total_steps))


def _undecayed(parameter: nn.Parameter) -> bool:
    return bool(getattr(parameter, "_no_weight_decay", False))
