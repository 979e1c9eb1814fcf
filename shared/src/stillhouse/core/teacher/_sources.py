"""Where a teacher's signal comes from: a network, a cache, a service."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ._frozen import FrozenTeacher, GradMode
from ._signals import DenseSignal, SparseTeacher, TeacherSignal, to_device

if TYPE_CHECKING:
    from ..cache import TeacherCache

Ids = Sequence[str | int | tuple[str | int, int]] | Tensor
Reader = Callable[[Any], TeacherSignal]


@runtime_checkable
class TeacherSource(Protocol):
    """Whatever answers `signal`."""

    def signal(self, inputs: Any = None, ids: Ids | None = None) -> TeacherSignal:
        """The teacher's signal for a batch.

        Args:
            inputs: What the teacher network takes: one argument, a tuple of positional or a mapping of
                keyword arguments.
            ids: Ids of the samples, for sources that look them up.
        """
        ...


class OnlineTeacher:
    """A teacher network that is run for every batch.

    Args:
        model: The network; it is frozen in place (see `FrozenTeacher`).
        read: Turns the network's output into a signal. None understands a tensor, an object with `.logits`,
            and a mapping with "logits": all become `DenseSignal`.
        grad_mode: "no_grad" or "inference", see `FrozenTeacher`.

    Example:
        >>> teacher = OnlineTeacher(nn.Linear(3, 5))
        >>> teacher.signal(torch.zeros(2, 3)).logits.shape
        torch.Size([2, 5])
    """

    def __init__(
        self, model: nn.Module, *, read: Reader | None = None, grad_mode: GradMode = "no_grad"
    ) -> None:
        self.teacher = model if isinstance(model, FrozenTeacher) else FrozenTeacher(model, grad_mode)
        self.read = read or read_logits

    def signal(self, inputs: Any = None, ids: Ids | None = None) -> TeacherSignal:
        """Runs the network on `inputs`; `ids` are not used."""
        if inputs is None:
            raise ValueError("an OnlineTeacher needs inputs")
        if isinstance(inputs, tuple):
            output = self.teacher(*inputs)
        elif isinstance(inputs, Mapping):
            output = self.teacher(**inputs)
        else:
            output = self.teacher(inputs)
        return self.read(output)

    def to(self, device: torch.device | str) -> OnlineTeacher:
        """Moves the network and returns the source."""
        self.teacher.to(device)
        return self


class CachedTeacher:
    """A teacher whose signals were stored before (`stillhouse.core.cache`).

    Opening the cache compares it with what the run expects; see `TeacherCache.open`.

    Args:
        cache: An open cache, or its folder.
        device: Where the signals go; None leaves them on the CPU.
    """

    def __init__(self, cache: TeacherCache | str | Path, *, device: torch.device | str | None = None) -> None:
        if isinstance(cache, (str, Path)):
            from ..cache import TeacherCache

            cache = TeacherCache.open(cache)
        self.cache = cache
        self.device = device

    def signal(self, inputs: Any = None, ids: Ids | None = None) -> TeacherSignal:
        """Looks `ids` up; `inputs` are not used. Ragged samples come padded; `cache.lookup` gives their mask
        too.

        Raises:
            ValueError: No ids.
            DataError: An id that is not in the cache.
        """
        if ids is None:
            raise ValueError("a CachedTeacher needs the ids of the samples")
        signal = self.cache.lookup(ids).signal
        return signal if self.device is None else to_device(signal, self.device)


class ServedTeacher:
    """A teacher behind a callable: a client of a server, another process, another framework.

    What comes back is not trusted: it must be of a signal type, have one row a sample and hold no NaN.

    Args:
        call: ``call(inputs, ids)`` → a signal, or a tensor of logits.
        device: Where the signal goes; None leaves it where it is.
    """

    def __init__(
        self,
        call: Callable[[Any, Ids | None], TeacherSignal | Tensor],
        *,
        device: torch.device | str | None = None,
    ) -> None:
        self.call = call
        self.device = device

    def signal(self, inputs: Any = None, ids: Ids | None = None) -> TeacherSignal:
        """Asks the callable.

        Raises:
            TypeError: The answer is neither a signal nor a tensor.
            ValueError: The answer has another number of rows than there are samples, or holds NaN.
        """
        with torch.no_grad():
            answer = self.call(inputs, ids)
        signal: TeacherSignal
        if isinstance(answer, Tensor):
            signal = DenseSignal(answer.detach())
        elif isinstance(answer, TeacherSignal):
            signal = answer
        else:
            raise TypeError(
                f"the served teacher must return a signal or a tensor, got {type(answer).__name__}"
            )
        rows = _rows(inputs, ids)
        for name, tensor in _parts(signal):
            if rows is not None and (tensor.dim() == 0 or tensor.shape[0] != rows):
                raise ValueError(
                    f"the served teacher was asked for {rows} samples, {name} has shape {list(tensor.shape)}"
                )
            if tensor.is_floating_point() and bool(torch.isnan(tensor).any()):
                raise ValueError(f"the served teacher returned NaN in {name}")
        return signal if self.device is None else to_device(signal, self.device)


def read_logits(output: Any) -> TeacherSignal:
    """Finds the logits in the output of a network: a tensor, ``output.logits`` or ``output["logits"]``.

    Raises:
        TypeError: None of these.
    """
    logits = output
    if isinstance(output, Mapping):
        logits = output.get("logits")
    elif not isinstance(output, Tensor):
        logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise TypeError(f"no logits in a {type(output).__name__}; pass read= that turns it into a signal")
    return DenseSignal(logits)


def _rows(inputs: Any, ids: Ids | None) -> int | None:
    if ids is not None:
        return len(ids)
    first = inputs
    if isinstance(inputs, tuple) and inputs:
        first = inputs[0]
    elif isinstance(inputs, Mapping) and inputs:
        first = next(iter(inputs.values()))
    return first.shape[0] if isinstance(first, Tensor) and first.dim() else None


def _parts(signal: TeacherSignal) -> list[tuple[str, Tensor]]:
    if isinstance(signal, SparseTeacher):
        parts = [("ids", signal.ids), ("logits", signal.logits)]
        return parts if signal.lse is None else [*parts, ("lse", signal.lse)]
    if isinstance(signal, DenseSignal):
        return [("logits", signal.logits)]
    if isinstance(signal.values, Tensor):
        return [("values", signal.values)]
    return [(f"values[{name!r}]", tensor) for name, tensor in signal.values.items()]
