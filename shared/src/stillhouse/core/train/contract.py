"""What a distiller is, and what the trainer hands to it and takes from it.

A `Distiller` says which networks it trains and what one update of each role costs; the `Trainer` does the
rest. The classes here are the whole agreement between the two, so that losses and distillers also run in
anyone's own loop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor, nn

from stillhouse.core.errors import ConfigError, StillhouseError

Precision = Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true"]
Strategy = Literal["auto", "ddp", "fsdp2"]


@dataclass(slots=True)
class Step:
    """Where the run stands when `Distiller.loss` is called.

    Attributes:
        index: zero-based optimizer step of the run, 0 ≤ index < total.
        total: number of steps of the whole run.
        epoch: zero-based pass over the data that the batch comes from (0 when the data know no epochs).
        role: the role that is being updated.
        micro: zero-based micro-batch of this step, 0 ≤ micro < accumulate.
        accumulate: micro-batches per step.
        num_items: items (tokens, pixels, …) that count in the whole step, summed over micro-batches and
            ranks, when the distiller defines `num_items(batch)`; None otherwise. When it is a number, every
            part of the total must be a *sum* divided by it, and the trainer adds micro-batches and ranks up;
            when it is None the trainer averages over micro-batches and ranks.
        device: device of the batch.
        rank: index of this process among all.
        world_size: number of processes.
        update: zero-based update of this role, i.e. how often the role was updated before.
    """

    index: int
    total: int
    epoch: int
    role: str
    micro: int
    accumulate: int
    num_items: int | None
    device: torch.device
    rank: int
    world_size: int
    update: int = 0


@dataclass(slots=True)
class Losses:
    """What one call of `Distiller.loss` returns.

    Attributes:
        total: differentiable scalar, the objective of the role.
        terms: *unweighted* scalar terms for the log; the trainer detaches them.
        weights: the weight each term has in the total, for the warning about a distillation term that is too
            small to matter. Terms without a weight are logged and not watched.
        task: name of the term that is the task's own loss; the other weighted terms are distillation terms.

    Example:
        >>> ce, kl = torch.tensor(2.0), torch.tensor(0.5)
        >>> Losses(ce + 0.9 * kl, {"ce": ce, "kl": kl}, weights={"ce": 1.0, "kl": 0.9}, task="ce").total
        tensor(2.4500)
    """

    total: Tensor
    terms: dict[str, Tensor]
    weights: dict[str, float] = field(default_factory=dict)
    task: str | None = None


@runtime_checkable
class Distiller(Protocol):
    """The four methods a distillation method has; it may be a plain object or an `nn.Module`.

    Three more methods are used when they exist:

    - `num_items(batch) -> int`: items of this micro-batch that count, see `Step.num_items`. It sees the batch
      as the data gave it, before it is moved to the device.
    - `after_update(role, step)`: called once after the role's optimizer step, with the `Step` of the last
      micro-batch (a mean teacher moves here).
    - `state_dict()` / `load_state_dict(state)`: whatever else a resumed run needs (schedules, adaptive
      temperatures); nested dicts, lists and tuples of tensors, numbers, strings, booleans and None. Weights
      of the networks in `trainable()` and `frozen()` are left out of it, so that an `nn.Module` may keep the
      state_dict it was born with. Rank 0's state is stored; it has to be the same on every rank.

    Example:
        >>> class Hinton:
        ...     def __init__(self, student, teacher):
        ...         self.student, self.teacher = student, teacher
        ...     def trainable(self):
        ...         return {"student": self.student}
        ...     def frozen(self):
        ...         return {"teacher": self.teacher}
        ...     def roles(self, step):
        ...         return ("student",)
        ...     def loss(self, role, batch, step):
        ...         x, y = batch
        ...         logits = self.student(x)
        ...         with torch.no_grad():
        ...             target = self.teacher(x).softmax(-1)
        ...         ce = nn.functional.cross_entropy(logits, y)
        ...         kd = nn.functional.kl_div(logits.log_softmax(-1), target, reduction="batchmean")
        ...         return Losses(ce + kd, {"ce": ce, "kd": kd}, weights={"ce": 1.0, "kd": 1.0}, task="ce")
        >>> isinstance(Hinton(nn.Linear(2, 2), nn.Linear(2, 2)), Distiller)
        True
    """

    def trainable(self) -> Mapping[str, nn.Module]:
        """Networks by role, for example `{"student": …, "critic": …}`.

        A role that trains several modules (a student and its projectors) gives one `nn.ModuleDict` of them.
        The same objects must come back every time.
        """
        ...

    def frozen(self) -> Mapping[str, nn.Module]:
        """Teachers: kept in eval mode and without gradient, never in an optimizer, an EMA or a checkpoint."""
        ...

    def roles(self, step: int) -> Sequence[str]:
        """Who is updated at this step, in order: a pure function of `step`.

        All roles of a step see the same batch.
        """
        ...

    def loss(self, role: str, batch: Any, step: Step) -> Losses:
        """Objective of one role on one micro-batch.

        Gradients flow through the networks of the other roles and do not end there: their parameters need no
        gradient while this runs (under fsdp2 such gradients are computed and dropped).
        """
        ...


@dataclass(kw_only=True, slots=True, frozen=True)
class TrainConfig:
    """How a run is trained; nothing here depends on the method.

    Attributes:
        steps: optimizer steps of the run (≥ 1).
        accumulate: micro-batches per step (≥ 1).
        precision: "32-true", "bf16-mixed", "16-mixed" (CUDA only), "bf16-true", "16-true" or "64-true".
        strategy: "auto" (one device, or ddp over several), "ddp" or "fsdp2".
        accelerator: "auto", "cpu", "cuda", "mps", …
        devices: devices of this node, or "auto". Under `torchrun` and SLURM the launcher's numbers are taken.
        nodes: number of nodes.
        clip_norm: largest norm of each role's gradient (> 0); None does not clip.
        ema: decay in (0, 1) of an exponential moving average of each role's network, or None.
        checkpoint_every: steps between checkpoints; 0 writes one at the end only.
        keep: how many good checkpoints stay (≥ 1).
        log_every: steps between log rows (≥ 1); a row holds means over the steps since the row before.
        evaluate_every: steps between calls of `evaluate`; 0 calls it at the end only.
        seed: seeds python, numpy and torch at the start of the fit (0 ≤ seed < 2³²).
        threads: CPU threads of torch, or None to leave them as they are.
        find_unused: ddp only: some parameters of a role get no gradient in some steps (costs a graph walk a
            step).
    """

    steps: int = 1000
    accumulate: int = 1
    precision: Precision = "32-true"
    strategy: Strategy = "auto"
    accelerator: str = "auto"
    devices: int | Literal["auto"] = 1
    nodes: int = 1
    clip_norm: float | None = None
    ema: float | None = None
    checkpoint_every: int = 0
    keep: int = 2
    log_every: int = 10
    evaluate_every: int = 0
    seed: int = 0
    threads: int | None = None
    find_unused: bool = False

    def __post_init__(self) -> None:
        for name, least in (
            ("steps", 1),
            ("accumulate", 1),
            ("nodes", 1),
            ("keep", 1),
            ("log_every", 1),
            ("checkpoint_every", 0),
            ("evaluate_every", 0),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"train.{name} is {value!r}; it must be an integer ≥ {least}")
        if self.threads is not None and (not isinstance(self.threads, int) or self.threads < 1):
            raise ConfigError(f"train.threads is {self.threads!r}; it must be an integer ≥ 1 or None")
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            raise ConfigError(f"train.seed is {self.seed!r}; it must be an integer with 0 ≤ seed < 2**32")
        if self.devices != "auto" and (not isinstance(self.devices, int) or self.devices < 1):
            raise ConfigError(f'train.devices is {self.devices!r}; it must be an integer ≥ 1 or "auto"')
        for name, allowed in (("precision", get_args(Precision)), ("strategy", get_args(Strategy))):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"train.{name} is {getattr(self, name)!r}; allowed: {', '.join(allowed)}")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ConfigError(
                f"train.clip_norm is {self.clip_norm!r}; it must be > 0, or None for no clipping"
            )
        if self.ema is not None and not 0 < self.ema < 1:
            raise ConfigError(
                f"train.ema is {self.ema!r}; a decay lies strictly between 0 and 1, or None for no average"
            )


class NonFiniteLossError(StillhouseError, FloatingPointError):
    """A loss became NaN or infinite; the message names role, term and step. The last checkpoint is kept."""
