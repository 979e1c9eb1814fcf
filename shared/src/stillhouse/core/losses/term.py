"""Weighted terms of a distillation objective, and the watch that notices a term which does nothing.

When to use: as soon as an objective has more than one term, or a weight or temperature that changes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..schedules import PerSampleTemperature, Schedule, as_schedule
from .balance import LossBalancer as LossBalancer


class Term:
    """One term of an objective: a function, its weight and its temperature.

    Args:
        fn: Anything that returns a scalar tensor: a function of `stillhouse.core.losses`, a lambda, an
            `nn.Module` with parameters of its own. None takes a value that was computed elsewhere.
        weight: Number or schedule that multiplies the value in the total.
        temperature: Passed to `fn` as ``temperature=`` where given: a number, a schedule, or a
            `PerSampleTemperature` (which sees the first two positional inputs, student and teacher logits, or
            the inputs of these names).
        settings: Further keyword arguments of `fn` that are numbers or schedules, such as TAID's coefficient.

    Raises:
        TypeError: `fn` is not callable, or a weight is neither a number nor a schedule.
        ValueError: A temperature or settings without a function to pass them to.

    Example:
        >>> from stillhouse.core.schedules import Linear
        >>> def distance(a: Tensor, b: Tensor, temperature: float) -> Tensor:
        ...     return temperature * (a - b).square().mean()
        >>> term = Term(distance, weight=0.5, temperature=Linear(4, 2, steps=10))
        >>> term((torch.tensor([1.0, 3.0]), torch.tensor([0.0, 3.0])), step=5)
        tensor(1.5000)
    """

    def __init__(
        self,
        fn: Callable[..., Tensor] | None = None,
        *,
        weight: float | Schedule = 1.0,
        temperature: float | Schedule | PerSampleTemperature | None = None,
        settings: Mapping[str, float | Schedule] | None = None,
    ) -> None:
        if fn is not None and not callable(fn):
            raise TypeError(f"fn must be callable or None, got {type(fn).__name__}: {fn!r}")
        if fn is None and (temperature is not None or settings):
            raise ValueError("temperature and settings need a function; this term has fn=None")
        self.fn = fn
        self.weight = as_schedule(weight, "weight")
        self.temperature: Schedule | PerSampleTemperature | None
        if temperature is None or isinstance(temperature, PerSampleTemperature):
            self.temperature = temperature
        else:
            self.temperature = as_schedule(temperature, "temperature")
        self.settings = {
            name: as_schedule(value, f"settings[{name!r}]") for name, value in (settings or {}).items()
        }

    def __call__(self, inputs: Any, step: int = 0) -> Tensor:
        """Computes the unweighted value.

        Args:
            inputs: A tuple of positional or a mapping of keyword arguments of `fn`; anything else is its only
                argument. With ``fn=None`` the value itself.
            step: Optimizer step, for the schedules.

        Returns:
            Scalar tensor.

        Raises:
            TypeError: The value is not a tensor.
            ValueError: The value is not a scalar.
        """
        if self.fn is None:
            value = inputs
        else:
            args, kwargs = _arguments(inputs)
            if isinstance(self.temperature, PerSampleTemperature):
                kwargs["temperature"] = self.temperature(
                    *_logits(args, kwargs), step=step, mask=kwargs.get("mask")
                )
            elif self.temperature is not None:
                kwargs["temperature"] = self.temperature(step)
            for name, schedule in self.settings.items():
                kwargs[name] = schedule(step)
            value = self.fn(*args, **kwargs)
        if not isinstance(value, Tensor):
            raise TypeError(f"a term must give a tensor, got {type(value).__name__}")
        if value.dim() != 0:
            raise ValueError(f"a term must give a scalar, got shape {list(value.shape)}; reduce it first")
        return value

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state of the schedules. Parameters of `fn` are not here; see `DistillationLoss`."""
        return {name: schedule.state_dict() for name, schedule in self._schedules().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned.

        Raises:
            ValueError: The state is that of a term with other schedules.
        """
        schedules = self._schedules()
        if set(schedules) != set(state):
            raise ValueError(f"state has the schedules {sorted(state)}, this term has {sorted(schedules)}")
        for name, schedule in schedules.items():
            schedule.load_state_dict(state[name])

    def _schedules(self) -> dict[str, Schedule]:
        schedules = {"weight": self.weight, **{f"settings.{name}": s for name, s in self.settings.items()}}
        if isinstance(self.temperature, PerSampleTemperature):
            schedules["temperature"] = self.temperature.temperature
        elif self.temperature is not None:
            schedules["temperature"] = self.temperature
        return schedules


@dataclass(slots=True)
class WeightedSum:
    """What a `DistillationLoss` returns; the fields are those of the trainer's `Losses`.

    Attributes:
        total: Differentiable scalar.
        terms: Unweighted scalar of each term, still attached to the graph.
        weights: The weight each term had in `total`.
        task: Name of the task term, if one was named.
    """

    total: Tensor
    terms: dict[str, Tensor]
    weights: dict[str, float]
    task: str | None = None


class DistillationLoss(nn.Module):
    """A weighted sum of terms that keeps the unweighted values for the log.

    It is an `nn.Module` so that the parameters of its terms (projectors, a critic) and of its balancer are
    found by `parameters()`; put it beside the student in the role's `nn.ModuleDict`. Its `state_dict` holds
    the state of the schedules too, as one uint8 tensor of JSON, which safetensors can store.

    Args:
        terms: Name → `Term`, or a bare weight (number or schedule) for a value that is computed elsewhere.
        task: Name of the task term, against which a distillation term is judged too small (`RatioWatch`).
        balancer: How the weights are combined; None takes them as they are.

    Raises:
        ValueError: No terms, a wrong name, or a task that is not among them.

    Example:
        >>> from stillhouse.core.losses import forward_kl
        >>> kd = Term(forward_kl, weight=0.9, temperature=4.0)
        >>> loss = DistillationLoss({"ce": 0.1, "kd": kd}, task="ce")
        >>> student, teacher = torch.zeros(2, 3), torch.zeros(2, 3)
        >>> result = loss({"ce": torch.tensor(2.0), "kd": (student, teacher)}, step=0)
        >>> round(result.total.item(), 6), result.weights
        (0.2, {'ce': 0.1, 'kd': 0.9})
    """

    def __init__(
        self,
        terms: Mapping[str, Term | float | Schedule],
        *,
        task: str | None = None,
        balancer: LossBalancer | None = None,
    ) -> None:
        super().__init__()
        if not terms:
            raise ValueError("terms must name at least one term")
        if task is not None and task not in terms:
            raise ValueError(f"task={task!r} is not among the terms {sorted(terms)}")
        self.terms = {
            name: term if isinstance(term, Term) else Term(weight=term) for name, term in terms.items()
        }
        self.task = task
        self.balancer = LossBalancer() if balancer is None else balancer
        self.balancer.check_names(tuple(self.terms))
        self.functions = nn.ModuleDict(
            {name: term.fn for name, term in self.terms.items() if isinstance(term.fn, nn.Module)}
        )

    def forward(self, inputs: Mapping[str, Any], step: int = 0) -> WeightedSum:
        """Computes every term and their weighted sum.

        Args:
            inputs: For each term its inputs, see `Term.__call__`.
            step: Optimizer step, for the schedules.

        Raises:
            ValueError: Inputs missing for a term, or given for one that does not exist.
        """
        missing, extra = self.terms.keys() - inputs.keys(), inputs.keys() - self.terms.keys()
        if missing or extra:
            raise ValueError(
                f"inputs must be given for exactly the terms {sorted(self.terms)}: "
                f"missing {sorted(missing)}, unknown {sorted(extra)}"
            )
        values = {name: term(inputs[name], step) for name, term in self.terms.items()}
        weights = {name: term.weight(step) for name, term in self.terms.items()}
        total, used = self.balancer(values, weights)
        return WeightedSum(total, values, used, self.task)

    def get_extra_state(self) -> Tensor:
        """State of the schedules: JSON as a uint8 tensor."""
        state = {name: term.state_dict() for name, term in self.terms.items()}
        return torch.frombuffer(bytearray(json.dumps(state, allow_nan=False).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Restores what `get_extra_state` returned.

        Raises:
            ValueError: The state is that of other terms.
        """
        loaded = json.loads(bytes(state.cpu().tolist()))
        if set(loaded) != set(self.terms):
            raise ValueError(f"state has the terms {sorted(loaded)}, this loss has {sorted(self.terms)}")
        for name, term in self.terms.items():
            term.load_state_dict(loaded[name])


def _number(value: float | Tensor) -> float:
    return float(value.detach() if isinstance(value, Tensor) else value)


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, tuple):
        return inputs, {}
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (inputs,), {}


def _logits(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    names = ("student", "teacher")
    found = [*args[:2], *(kwargs[name] for name in names[len(args) :] if name in kwargs)]
    if len(found) != 2:
        raise ValueError(
            "a per-sample temperature needs the student's and the teacher's logits as first two inputs"
        )
    return found[0], found[1]


class RatioWatch:
    """Counts how long each KD term has been negligible beside the task term.

    The commonest silent failure of distillation code is a KD term that is orders of magnitude smaller than
    the task term (a wrong reduction, a forgotten T², a zero-initialised projector): training goes on and the
    teacher teaches nothing. This class only counts; whoever owns the log prints the warning.

    A term is *small* in one update when ``|weight · value| < threshold · |weight_task · value_task|``. Its
    name is returned once, when it has been small for `patience` updates in a row, and again only after it has
    recovered in between. A term whose weight is zero is switched off on purpose (a warm-up, for example), and
    a non-finite value says nothing about the ratio: neither counts, and both start the count anew.

    Args:
        threshold: Ratio below which a term is small, in (0, 1).
        patience: Consecutive small updates after which the name is returned, ≥ 1.

    Raises:
        ValueError: A threshold or patience outside its range.

    Example:
        >>> watch = RatioWatch(threshold=0.01, patience=2)
        >>> watch.update({"ce": 1.0, "kd": 1e-4}, {"ce": 1.0, "kd": 0.5}, task="ce")
        ()
        >>> watch.update({"ce": 1.0, "kd": 1e-4}, {"ce": 1.0, "kd": 0.5}, task="ce")
        ('kd',)
        >>> watch.counts["kd"], watch.ratios["kd"]
        (2, 5e-05)
    """

    def __init__(self, threshold: float = 0.01, patience: int = 100) -> None:
        if not 0.0 < threshold < 1.0:
            raise ValueError(f"threshold must lie in (0, 1), got {threshold!r}")
        if patience < 1:
            raise ValueError(f"patience must be at least 1 update, got {patience!r}")
        self.threshold = float(threshold)
        self.patience = int(patience)
        self.counts: dict[str, int] = {}
        self.ratios: dict[str, float] = {}

    def update(
        self,
        terms: Mapping[str, float | Tensor],
        weights: Mapping[str, float] | None = None,
        *,
        task: str | None,
    ) -> tuple[str, ...]:
        """Takes the terms of one update and returns the names that have just reached the patience.

        Args:
            terms: Unweighted value of each term, floats or scalar tensors.
            weights: Weight of each term; a missing one counts as 1.
            task: Name of the task term. With None, or a name that is not among `terms`, there is nothing to
                compare with and nothing is counted.

        Returns:
            Names of the terms to warn of now, in the order of `terms`; empty most of the time. `ratios` holds
            the last ratio of each term, `counts` the length of its present run of small updates.
        """
        if task is None or task not in terms:
            return ()
        weights = weights or {}
        reference = abs(float(weights.get(task, 1.0)) * _number(terms[task]))
        warned = []
        for name, value in terms.items():
            if name == task:
                continue
            weight = float(weights.get(name, 1.0))
            part = abs(weight * _number(value))
            if weight == 0.0 or not math.isfinite(part) or not math.isfinite(reference):
                self.counts[name] = 0
                continue
            self.ratios[name] = part / reference if reference > 0.0 else math.inf
            if part < self.threshold * reference:
                self.counts[name] = self.counts.get(name, 0) + 1
                if self.counts[name] == self.patience:
                    warned.append(name)
            else:
                self.counts[name] = 0
        return tuple(warned)

    def message(self, name: str, task: str) -> str:
        """The one-line warning for a term returned by `update`: what is wrong and what to look at."""
        return (
            f"the weighted term {name!r} has been below {self.threshold:.1%} of {task!r} for "
            f"{self.counts.get(name, 0)} steps (ratio now {self.ratios.get(name, math.nan):.1e}): the "
            "teacher hardly teaches. Check the reduction, the weight and the T² factor of that term."
        )

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state: the running counts and the last ratios."""
        return {"counts": dict(self.counts), "ratios": dict(self.ratios)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.counts = {str(name): int(count) for name, count in state["counts"].items()}
        self.ratios = {str(name): float(ratio) for name, ratio in state["ratios"].items()}
