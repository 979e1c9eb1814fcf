"""A teacher that cannot be trained by accident."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)
GradMode = Literal["no_grad", "inference"]


class _StayInEval:
    """Takes the place of a frozen module's `train`; a class, so that the module can still be copied and
    pickled."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, mode: bool = True) -> nn.Module:
        return self.module


def freeze(module: M) -> M:
    """Freezes a module in place: eval mode for good, no parameter wants a gradient.

    A later `.train()`, of the module, of one of its parts or of a parent, leaves it in eval mode, so that
    dropout stays off and batch-norm statistics stay as they are. Gradients still flow *through* it to its
    inputs; `FrozenTeacher` stops those too.

    Args:
        module: The teacher.

    Returns:
        The same module.

    Example:
        >>> teacher = freeze(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)))
        >>> teacher.train()[1].training, teacher[0].weight.requires_grad
        (False, False)
    """
    module.requires_grad_(False)
    module.eval()
    for part in module.modules():
        part.train = _StayInEval(part)  # type: ignore[method-assign]
    return module


class FrozenTeacher(nn.Module):
    """A frozen module that is invisible to optimizers, checkpoints and data parallelism.

    The module is kept out of the module tree: `parameters()` and `state_dict()` of the wrapper, and of
    whatever holds the wrapper, are without it. `.to(device)` still moves it. Its outputs carry no gradient.

    Args:
        module: The teacher; it is frozen in place (`freeze`).
        grad_mode: "no_grad", or "inference" for `torch.inference_mode`, which saves a little bookkeeping.
            Inference tensors cannot enter a graph, so that the outputs are copied once; choose it for
            teachers whose outputs are small beside their activations.

    Raises:
        ValueError: An unknown `grad_mode`.

    Example:
        >>> holder = nn.ModuleDict({"student": nn.Linear(2, 2), "teacher": FrozenTeacher(nn.Linear(2, 2))})
        >>> sorted(holder.state_dict())
        ['student.bias', 'student.weight']
    """

    def __init__(self, module: nn.Module, grad_mode: GradMode = "no_grad") -> None:
        super().__init__()
        if grad_mode not in ("no_grad", "inference"):
            raise ValueError(f'grad_mode must be "no_grad" or "inference", got {grad_mode!r}')
        self._hidden = (freeze(module),)  # a tuple is not registered as a submodule
        self.grad_mode = grad_mode
        super().train(False)

    @property
    def module(self) -> nn.Module:
        """The frozen module itself, for taps, parameter counts and sharding."""
        return self._hidden[0]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the module on its own arguments, without gradient."""
        if self.grad_mode == "inference":
            with torch.inference_mode():
                output = self.module(*args, **kwargs)
            return _map_tensors(output, torch.clone)
        with torch.no_grad():
            return self.module(*args, **kwargs)

    def train(self, mode: bool = True) -> FrozenTeacher:
        """Does nothing: a frozen teacher stays in eval mode."""
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> FrozenTeacher:
        self.module._apply(fn)
        return super()._apply(fn, recurse)


def assert_frozen(
    teacher: nn.Module,
    *,
    optimizers: Iterable[torch.optim.Optimizer] = (),
    owners: Iterable[nn.Module] = (),
) -> None:
    """Raises unless a teacher is frozen and out of reach.

    Args:
        teacher: The module, or its `FrozenTeacher`.
        optimizers: None of these may hold a parameter that lies in the teacher's memory.
        owners: The trained modules; none of them may have a parameter or buffer in the teacher's memory,
            neither as a submodule nor as a tensor that was shared instead of copied.

    Raises:
        ValueError: With the names of all that is wrong.
    """
    module = teacher.module if isinstance(teacher, FrozenTeacher) else teacher
    problems = [
        f"{name or 'the module itself'} is in training mode"
        for name, m in module.named_modules()
        if m.training
    ]
    problems += [
        f"parameter {name} requires a gradient" for name, p in module.named_parameters() if p.requires_grad
    ]
    mine = {_address(tensor): name for name, tensor in _tensors(module) if tensor.numel()}
    for index, optimizer in enumerate(optimizers):
        for group in optimizer.param_groups:
            problems += [
                f"{mine[_address(p)]} is in optimizer {index}" for p in group["params"] if _address(p) in mine
            ]
    for index, owner in enumerate(owners):
        problems += [
            f"{mine[_address(tensor)]} is {name} of owner {index} ({type(owner).__name__})"
            for name, tensor in _tensors(owner)
            if tensor.numel() and _address(tensor) in mine
        ]
    if problems:
        shown = "; ".join(problems[:10]) + (f"; and {len(problems) - 10} more" if len(problems) > 10 else "")
        raise ValueError(
            f"the teacher is not frozen: {shown}. Use freeze(teacher) or FrozenTeacher(teacher), and copy "
            "what the student takes from it"
        )


def weight_hash(source: nn.Module | Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all weights and buffers, in hexadecimal.

    The same weights give the same hash on any device and in any order of registration; one changed bit gives
    another.

    Args:
        source: A module, a `FrozenTeacher`, or a mapping of tensors such as a state_dict. Entries that are no
            tensors are left out.

    Example:
        >>> len(weight_hash({"w": torch.zeros(3)}))
        64
    """
    if isinstance(source, FrozenTeacher):
        source = source.module
    state = source.state_dict() if isinstance(source, nn.Module) else source
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name]
        if not isinstance(tensor, Tensor):
            continue
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _address(tensor: Tensor) -> tuple[str, int]:
    pointer = tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else 0
    return (str(tensor.device), pointer or id(tensor))


def _map_tensors(value: Any, fn: Any) -> Any:
    """Applies `fn` to the tensors of nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        return fn(value)
    if isinstance(value, tuple):
        parts = [_map_tensors(part, fn) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, list):
        return [_map_tensors(part, fn) for part in value]
    if isinstance(value, Mapping):
        mapped = {key: _map_tensors(part, fn) for key, part in value.items()}
        return mapped if type(value) is dict else type(value)(mapped)  # type: ignore[call-arg]
    if value is None or isinstance(value, (int, float, str, bool)):
        return value
    raise TypeError(
        f'grad_mode="inference" copies tensors, tuples, lists and mappings, not {type(value).__name__}; '
        'use grad_mode="no_grad"'
    )
