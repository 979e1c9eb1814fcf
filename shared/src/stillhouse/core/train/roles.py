"""What the trainer keeps of one role: network, wrapper, optimizer, schedule, average and counter."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .contract import Distiller, Losses, Step
from .ema import EMA
from .sharding import is_sharded, placed

_LOG = logging.getLogger(__name__)


class Call:
    """One call of `Distiller.loss`; opaque on purpose: no wrapper converts, copies or moves the batch."""

    __slots__ = ("batch", "losses", "step")

    def __init__(self, batch: Any, step: Step) -> None:
        self.batch, self.step = batch, step
        self.losses: Losses | None = None


class RoleModule(nn.Module):
    """Owns the network of one role, and computes that role's loss in its forward.

    DDP wraps this module: it sees the role's parameters alone and has its forward around the whole loss,
    while the distiller goes on using its own attributes.
    """

    _loss: Callable[[str, Any, Step], Losses]

    def __init__(self, role: str, network: nn.Module, distiller: Distiller) -> None:
        super().__init__()
        self.role = role
        self.network = network
        self._loss = (
            distiller.loss
        )  # a method, so that the distiller is no submodule and brings no teacher along

    def forward(self, call: Call) -> Tensor:
        """Compute the losses into `call.losses` and return their total."""
        losses = self._loss(self.role, call.batch, call.step)
        if not isinstance(losses, Losses):
            raise TypeError(
                f"loss({self.role!r}, …) returned a {type(losses).__name__}; it must return Losses"
            )
        if losses.total.dim() or not losses.total.requires_grad:
            raise ValueError(
                f"the total of role {self.role!r} has shape {tuple(losses.total.shape)} and requires_grad = "
                f"{losses.total.requires_grad}; it must be a scalar that depends on the role's network"
            )
        call.losses = losses
        return losses.total


@dataclass(slots=True)
class Role:
    """The machinery of one role."""

    name: str
    network: nn.Module
    module: Any  # the RoleModule as Fabric set it up
    optimizer: Any  # the optimizer as Fabric set it up; the torch one is .optimizer
    scheduler: LRScheduler
    ema: EMA | None
    others: list[nn.Parameter]  # parameters of the other roles alone
    updates: int = 0
    lr: float = 0.0


def check_networks(trainable: Mapping[str, nn.Module], frozen: Mapping[str, nn.Module]) -> None:
    """Raise where a distiller's networks cannot be trained as it says."""
    if not trainable:
        raise ValueError("trainable() is empty; it must name at least one role")
    for role in trainable:
        if not re.fullmatch(r"[\w-]+", role):
            raise ValueError(f"role {role!r} must be named with letters, digits, '_' and '-' only")
    for role, network in trainable.items():
        own = {id(p) for p in network.parameters()}
        for name, teacher in frozen.items():
            if any(id(p) in own for p in teacher.parameters()):
                raise ValueError(
                    f"frozen() {name!r} and trainable() {role!r} share parameters; copy the network"
                )


def warn_of_untrained(distiller: Distiller) -> None:
    """Warn of parameters that need a gradient and that no optimizer holds: a forgotten projector, say."""
    known = {id(p) for network in distiller.trainable().values() for p in network.parameters()}
    attributes = getattr(distiller, "__dict__", {})
    modules = {"": distiller} if isinstance(distiller, nn.Module) else attributes
    lost = [
        f"{name}.{key}".strip(".")
        for name, module in modules.items()
        if isinstance(module, nn.Module)
        for key, p in module.named_parameters()
        if p.requires_grad and id(p) not in known
    ]
    if lost:
        _LOG.warning(
            "%d parameters need a gradient and belong to no role: %s", len(lost), ", ".join(lost[:5])
        )


@contextmanager
def frozen_in_eval(teachers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Teachers in eval mode without gradient; inside the block `.train()` of a parent does not reach them."""
    for teacher in teachers.values():
        teacher.eval().requires_grad_(False)
        teacher.__dict__["train"] = lambda mode=True, teacher=teacher: teacher
    try:
        yield
    finally:
        for teacher in teachers.values():
            teacher.__dict__.pop("train", None)


@contextmanager
def evaluating(roles: Mapping[str, Role]) -> Iterator[None]:
    """Networks in eval mode with their averaged weights, each part in its own mode again afterwards."""
    modes = [(module, module.training) for role in roles.values() for module in role.network.modules()]
    averages = [role.ema for role in roles.values() if role.ema is not None]
    try:
        for role in roles.values():
            role.network.eval()
        with _all_applied(averages), torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _all_applied(averages: list[EMA]) -> Iterator[None]:
    if not averages:
        yield
        return
    with averages[0].applied(), _all_applied(averages[1:]):
        yield


def load_weights(network: nn.Module, state: Mapping[str, Any]) -> None:
    """Load a full state dict into a network that may be sharded."""
    present = network.state_dict()
    network.load_state_dict(
        {
            key: placed(value, present[key]) if is_sharded(present.get(key)) else value
            for key, value in state.items()
        }
    )


def load_optimizer(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Load a full state dict into an optimizer whose parameters may be sharded or laid out differently."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    slots = {
        index: {
            key: placed(value, parameters[index]).detach()
            if isinstance(value, Tensor) and key != "step" and value.shape == parameters[index].shape
            else value
            for key, value in slot.items()
        }
        for index, slot in state["state"].items()
    }
    optimizer.load_state_dict({"state": slots, "param_groups": state["param_groups"]})


def own_state(distiller: Distiller) -> Any:
    """A distiller's `state_dict()` without the weights of its networks; None where it has none."""
    if not hasattr(distiller, "state_dict"):
        return None
    networks = (*distiller.trainable().values(), *distiller.frozen().values())
    known = {
        tensor.untyped_storage().data_ptr()
        for network in networks
        for tensor in (*network.parameters(), *network.buffers())
        if not is_sharded(tensor) and tensor.numel()
    }

    def own(value: Any) -> bool:
        if is_sharded(value):
            return False
        return not (
            isinstance(value, Tensor) and value.numel() and value.untyped_storage().data_ptr() in known
        )

    def pruned(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: pruned(item) for key, item in value.items() if own(item)}
        if isinstance(value, tuple | list):
            items = [pruned(item) for item in value if own(item)]
            return tuple(items) if isinstance(value, tuple) else items
        return value

    return pruned(distiller.state_dict())


def load_own_state(distiller: Any, state: Any) -> None:
    """Give a distiller back what `own_state` took."""
    if isinstance(distiller, nn.Module) and type(distiller).load_state_dict is nn.Module.load_state_dict:
        distiller.load_state_dict(state, strict=False)  # the weights of its networks are stored by role
    else:
        distiller.load_state_dict(state)
