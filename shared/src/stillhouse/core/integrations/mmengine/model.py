"""A `Distiller` as an mmengine model whose `train_step` updates the roles of the step in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from mmengine.logging import MessageHub
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.registry import MODEL_WRAPPERS
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ...train.contract import Distiller, Losses, Step
from ...train.logs import scalar
from ...train.roles import Call, RoleModule, check_networks, warn_of_untrained
from .optim import RoleOptimWrapper

if TYPE_CHECKING:
    from typing import Self


@dataclass(slots=True)
class Update:
    """What one update of a role leaves for the hooks.

    Attributes:
        role: the role.
        values: detached scalars: the unweighted terms, "total", and "grad_norm" where gradients are clipped.
        weights: weight of each term in the total.
        task: the task term.
        lr: learning rate of the update.
    """

    role: str
    values: dict[str, Tensor]
    weights: Mapping[str, float]
    task: str | None
    lr: float


class DistillModel(BaseModel):
    """See `as_mm_model`.

    Attributes:
        distiller: the method; it and its teachers are no submodules.
        networks: the trainable networks by role; the state dict holds these and the counters alone.
        index: finished steps.
        updates: finished updates of each role.
        last: the updates of the last step.
        listeners: called as `listener(update)` after each update and before the distiller's `after_update`.
    """

    def __init__(self, distiller: Distiller, *, steps: int | None = None) -> None:
        super().__init__()
        networks = distiller.trainable()
        check_networks(networks, distiller.frozen())
        for teacher in distiller.frozen().values():
            teacher.eval().requires_grad_(False)
        warn_of_untrained(distiller)
        self.__dict__["distiller"] = distiller  # no submodule: a teacher in it must not reach the state dict
        self.steps = steps
        self.networks = nn.ModuleDict(networks)
        self.networks.train()
        self.calls: dict[str, Any] = {}
        self.index = 0
        self.updates = dict.fromkeys(networks, 0)
        self.last: list[Update] = []
        self.listeners: list[Callable[[Update], None]] = []
        self.register_buffer("progress", torch.zeros(1 + len(networks), dtype=torch.int64))
        self._modes: list[tuple[nn.Module, bool]] = []
        self.__dict__["role_modules"] = {
            name: RoleModule(name, network, distiller) for name, network in networks.items()
        }

    # -- the step --------------------------------------------------------------------------------------------

    def train_step(self, data: Any, optim_wrapper: OptimWrapper) -> dict[str, Tensor]:
        """Update the roles of this step.

        Args:
            data: a `StepBatch`, or one batch as the distiller takes it.
            optim_wrapper: an `OptimWrapperDict` with one wrapper a role, or the wrapper of the only role.

        Returns:
            `role.term` of each *unweighted* term and `role.loss` of each total, detached.
        """
        wrappers = self._wrappers(optim_wrapper)
        batches = data.micro if hasattr(data, "micro") else [(data, 0)]
        num_items = self._count([batch for batch, _ in batches])
        device = next(self.networks.parameters()).device
        if device.type != "cpu":
            batches = [(_moved(batch, device), epoch) for batch, epoch in batches]
        self.last = []
        for name in self.distiller.roles(self.index):
            with self._only(name):
                for wrapper in wrappers.values():
                    wrapper.zero_grad(set_to_none=True)
                step = self._update(name, wrappers[name], batches, num_items, device)
            for listener in self.listeners:
                listener(self.last[-1])
            if hasattr(self.distiller, "after_update"):
                self.distiller.after_update(name, step)
        self.index += 1
        return {
            f"{update.role}.{'loss' if name == 'total' else name}": value
            for update in self.last
            for name, value in update.values.items()
        }

    def _update(
        self,
        name: str,
        wrapper: OptimWrapper,
        batches: list[tuple[Any, int]],
        num_items: int | None,
        device: torch.device,
    ) -> Step:
        values: dict[str, Tensor] = {}
        for micro, (batch, epoch) in enumerate(batches):
            step = Step(
                index=self.index,
                total=self._total(),
                epoch=epoch,
                role=name,
                micro=micro,
                accumulate=len(batches),
                num_items=num_items,
                device=device,
                rank=_rank(),
                world_size=_world_size(),
                update=self.updates[name],
            )
            losses = self._micro(wrapper, Call(batch, step), values)
        lr = wrapper.param_groups[0]["lr"]
        wrapper.step()
        if isinstance(wrapper, RoleOptimWrapper) and wrapper.grad_norm is not None:
            values["grad_norm"] = wrapper.grad_norm
        self.updates[name] += 1
        self.last.append(Update(name, values, losses.weights, losses.task, lr))
        return step

    def _micro(self, wrapper: OptimWrapper, call: Call, values: dict[str, Tensor]) -> Losses:
        """Loss and backward of one micro-batch; its values are added to `values`."""
        step = call.step
        # ranks are averaged: a sum over all items has to be scaled up again
        scale = 1 / step.accumulate if step.num_items is None else float(step.world_size)
        module = self.calls.get(step.role, self.role_modules[step.role])
        with _syncing(module, last=step.micro + 1 == step.accumulate):
            with wrapper.optim_context(module):
                total = module(call)
            wrapper.backward(total if scale == 1 else total * scale)
        losses = call.losses
        assert losses is not None  # RoleModule.forward sets it or raises
        for term, value in (*losses.terms.items(), ("total", losses.total)):
            value = scalar(term, value)
            value = value if scale == 1 else value * scale
            values[term] = values[term] + value if term in values else value
        return losses

    def _wrappers(self, optim_wrapper: OptimWrapper) -> Mapping[str, OptimWrapper]:
        if isinstance(optim_wrapper, OptimWrapperDict):
            wrappers = optim_wrapper.optim_wrappers
        else:
            wrappers = {next(iter(self.networks)): optim_wrapper}
        if wrappers.keys() != self.updates.keys():
            raise ValueError(
                f"optim_wrapper has the roles {sorted(wrappers)}, the distiller trains "
                f"{sorted(self.updates)}; give an OptimWrapperDict with one wrapper a role"
            )
        for name, wrapper in wrappers.items():
            if wrapper._accumulative_counts != 1:
                raise ValueError(
                    f"optim_wrapper {name!r} has accumulative_counts = {wrapper._accumulative_counts}; all "
                    "roles of a step see the same micro-batches, so accumulate in the data: "
                    "StepData(…, accumulate=…)"
                )
        return wrappers

    @contextmanager
    def _only(self, name: str) -> Iterator[None]:
        """Let gradients end in the parameters of one role alone."""
        own = {id(p) for p in self.networks[name].parameters()}
        others = {
            id(p): p
            for other, network in self.networks.items()
            if other != name
            for p in network.parameters()
            if p.requires_grad and id(p) not in own
        }
        for parameter in others.values():
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in others.values():
                parameter.requires_grad_(True)

    def _count(self, batches: list[Any]) -> int | None:
        """Items that count in the whole step, over micro-batches and ranks."""
        if not hasattr(self.distiller, "num_items"):
            return None
        count = sum(int(self.distiller.num_items(batch)) for batch in batches)
        if _world_size() > 1:
            total = torch.tensor(count, device=next(self.networks.parameters()).device)
            torch.distributed.all_reduce(total)
            count = int(total)
        return max(count, 1)

    def _total(self) -> int:
        if self.steps is not None:
            return self.steps
        return int(MessageHub.get_current_instance().get_info("max_iters", self.index + 1))

    # -- what a module does ----------------------------------------------------------------------------------

    def forward(self, inputs: Any, data_samples: Any = None, mode: str = "tensor") -> Any:
        """Refuse: a distiller has no single forward.

        Raises:
            TypeError: always; the message says what to call.
        """
        raise TypeError(
            f"forward(mode={mode!r}) of a distiller was called; it trains through train_step. On several "
            'processes the Runner needs model_wrapper_cfg=dict(type="RoleParallel"); for predictions call '
            "the student itself"
        )

    def init_weights(self) -> None:
        """Do nothing: the networks come with their weights, which mmengine would draw anew."""

    def train(self, mode: bool = True) -> Self:
        """Switch between training and evaluation; in training each part has the mode it had before."""
        if mode == self.training:
            return self
        if mode:
            for module, training in self._modes:
                module.training = training
            return self
        self._modes = [(module, module.training) for module in self.modules()]
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        if isinstance(self.distiller, nn.Module):
            self.distiller._apply(fn, recurse)
        for teacher in self.distiller.frozen().values():
            teacher._apply(fn, recurse)  # no submodule, and yet on the same device
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.progress.copy_(torch.tensor([self.index, *self.updates.values()]))
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.index, *counts = self.progress.tolist()
        self.updates = dict(zip(self.updates, counts, strict=True))


@MODEL_WRAPPERS.register_module()
class RoleParallel(nn.Module):
    """Puts a `DistillModel` on its device and wraps the loss of each role in DistributedDataParallel.

    mmengine's own wrapper calls the model's forward and one optimizer; here each role's parameters and loss
    are wrapped by themselves. One process is left unwrapped.

    Args:
        module: the model.
        device: where it goes; None: the GPU of this process where there is one, else the CPU.
        find_unused_parameters: some parameters of a role get no gradient in some steps.
    """

    def __init__(
        self,
        module: DistillModel,
        device: torch.device | str | None = None,
        find_unused_parameters: bool = False,
    ) -> None:
        super().__init__()
        if device is None:
            device = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
        device = torch.device(device)
        self.module = module.to(device)
        if _world_size() > 1:
            for name, role_module in module.role_modules.items():
                module.calls[name] = DistributedDataParallel(
                    role_module,
                    device_ids=[device.index] if device.type == "cuda" else None,
                    find_unused_parameters=find_unused_parameters,
                )

    def train_step(self, data: Any, optim_wrapper: OptimWrapper) -> dict[str, Tensor]:
        """`DistillModel.train_step`."""
        return self.module.train_step(data, optim_wrapper)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """`DistillModel.forward`."""
        return self.module(*args, **kwargs)


def as_mm_model(distiller: Distiller, *, steps: int | None = None) -> DistillModel:
    """Make an mmengine model of a distiller.

    Its `train_step` updates `distiller.roles(step)` in order, each with its own wrapper of an
    `OptimWrapperDict`. Teachers move with the model, stay in eval mode and never reach its state dict. With
    mmengine's own loop and data loaders it works too, one batch a step.

    Args:
        distiller: the method.
        steps: steps of the whole run, for `Step.total`; None takes the Runner's `max_iters`.

    Example:
        >>> import torch
        >>> from mmengine.optim import OptimWrapper
        >>> from stillhouse.core.testing import ToyDistiller
        >>> model = as_mm_model(ToyDistiller(), steps=1)
        >>> optimizer = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.1))
        >>> log = model.train_step((torch.randn(4, 8), torch.tensor([0, 1, 2, 3])), optimizer)
        >>> sorted(log)
        ['student.ce', 'student.kd', 'student.loss']
    """
    return DistillModel(distiller, steps=steps)


def unwrapped(model: nn.Module) -> DistillModel:
    """The `DistillModel` of a runner's model."""
    found = model.module if isinstance(model, RoleParallel) else model
    if not isinstance(found, DistillModel):
        raise TypeError(
            f"the runner's model is a {type(found).__name__}; this hook needs as_mm_model(distiller)"
        )
    return found


def _syncing(module: Any, *, last: bool) -> AbstractContextManager[Any]:
    """Ranks exchange gradients on the last micro-batch only."""
    if last or not isinstance(module, DistributedDataParallel):
        return nullcontext()
    return module.no_sync()


def _moved(batch: Any, device: torch.device) -> Any:
    from lightning_fabric.utilities import move_data_to_device

    return move_data_to_device(batch, device)


def _ranks() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _rank() -> int:
    return torch.distributed.get_rank() if _ranks() else 0


def _world_size() -> int:
    return torch.distributed.get_world_size() if _ranks() else 1
