"""Several teachers as one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ._signals import DenseSignal
from ._sources import Ids, TeacherSource

Mode = Literal["prob_mean", "logit_mean", "log_prob_mean", "per_sample_route", "min_entropy", "learned"]


@torch.no_grad()
def combine_logits(
    logits: Sequence[Tensor],
    mode: Mode,
    *,
    weights: Sequence[float] | Tensor | None = None,
    temperature: float = 1.0,
    route: Tensor | None = None,
) -> Tensor:
    """Combines the logits of M teachers into logits whose softmax *at the same temperature* is the combined
    teacher.

    With ``p_m = softmax(z_m / T)`` and weights that sum to 1:

    - "prob_mean", "learned": ``T log Σ w_m p_m``. Its forward KL has the gradient of ``Σ w_m KL(p_m‖q)``.
    - "logit_mean": ``Σ w_m z_m``.
    - "log_prob_mean": ``T Σ w_m log p_m``, normalised: the geometric mean. As a distribution it equals
      "logit_mean"; the logits differ by a constant a row, which matters to losses on raw logits.
    - "per_sample_route": row i comes from teacher ``route[i]``.
    - "min_entropy": each row comes from the teacher with the smallest entropy at T (the first of equals).

    Args:
        logits: M tensors [..., V] of one shape.
        mode: See above.
        weights: M non-negative numbers, normalised here; None weighs equally. Not for routing modes.
        temperature: T > 0, that of the loss which will read the result.
        route: Integers in [0, M), [...] or its leading dimensions, for "per_sample_route".

    Returns:
        [..., V] float32 (float64 for float64), without gradient. −inf where a class has no mass.

    Raises:
        ValueError: An argument that does not fit; the message names it.

    Example:
        >>> z = [torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]])]
        >>> torch.softmax(combine_logits(z, "prob_mean", weights=[3, 1]), -1).round(decimals=4)
        tensor([[0.6904, 0.3096]])
    """
    if mode not in get_args(Mode):
        raise ValueError(f"mode={mode!r} is unknown; allowed: {', '.join(get_args(Mode))}")
    if not logits or any(z.shape != logits[0].shape for z in logits):
        raise ValueError(f"logits must be tensors of one shape, got {[list(z.shape) for z in logits]}")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be a finite number > 0, got {temperature!r}")
    if mode in ("per_sample_route", "min_entropy") and weights is not None:
        raise ValueError(f"weights mean nothing with mode={mode!r}")
    if (route is not None) != (mode == "per_sample_route"):
        raise ValueError(f'route goes with mode="per_sample_route" and only with it, got mode={mode!r}')
    stack = torch.stack([z if z.dtype == torch.float64 else z.float() for z in logits])
    if mode == "min_entropy":
        log_p = torch.log_softmax(stack / temperature, -1)
        entropy = -torch.where(log_p.isneginf(), 0.0, log_p.exp() * log_p).sum(-1)
        return _pick(stack, entropy.argmin(0))
    if route is not None:
        return _pick(stack, _checked_route(route, stack))
    w = _normalised(weights, len(logits), stack)
    keep = w > 0  # a teacher without weight must not contribute 0 · −inf
    w, stack = w[keep], stack[keep]
    column = w.view(-1, *([1] * (stack.dim() - 1)))
    if mode == "logit_mean":
        return (column * stack).sum(0)
    log_p = torch.log_softmax(stack / temperature, -1)
    if mode == "log_prob_mean":
        return temperature * torch.log_softmax((column * log_p).sum(0), -1)
    return temperature * torch.logsumexp(log_p + column.log(), 0)


class MultiTeacher(nn.Module):
    """M teachers combined into one signal of logits; itself a `TeacherSource`.

    Args:
        teachers: Sources of `DenseSignal` over one vocabulary.
        mode: See `combine_logits`. "learned" is "prob_mean" with weights ``softmax(gate)``; the gate is the
            module's only parameter and is trained by `nll`, because the distillation loss gives no gradient
            to its teacher.
        weights: Fixed weights of the mean modes, one a teacher.
        temperature: T at which the signal will be read.

    Raises:
        ValueError: An unknown mode, or weights with a mode that has none.

    Example:
        >>> from stillhouse.core.teacher import OnlineTeacher
        >>> teachers = [OnlineTeacher(nn.Linear(3, 4)) for _ in range(2)]
        >>> both = MultiTeacher(teachers, mode="prob_mean")
        >>> both.signal(torch.zeros(2, 3)).logits.shape
        torch.Size([2, 4])
    """

    def __init__(
        self,
        teachers: Sequence[TeacherSource],
        *,
        mode: Mode,
        weights: Sequence[float] | None = None,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        if mode not in get_args(Mode):
            raise ValueError(f"mode={mode!r} is unknown; allowed: {', '.join(get_args(Mode))}")
        if weights is not None and mode not in ("prob_mean", "logit_mean", "log_prob_mean"):
            raise ValueError(f"weights mean nothing with mode={mode!r}")
        if weights is not None and len(weights) != len(teachers):
            raise ValueError(f"{len(weights)} weights for {len(teachers)} teachers")
        if not teachers:
            raise ValueError("at least one teacher is needed; combine_logits works without")
        self._teachers = tuple(teachers)  # a tuple: teachers stay out of the module tree
        self.mode: Mode = mode
        self.fixed = None if weights is None else tuple(float(w) for w in weights)
        self.temperature = temperature
        if mode == "learned":
            self.gate = nn.Parameter(torch.zeros(len(teachers)))

    @property
    def teachers(self) -> tuple[TeacherSource, ...]:
        """The sources, in order."""
        return self._teachers

    def signal(
        self, inputs: Any = None, ids: Ids | None = None, *, route: Tensor | None = None
    ) -> DenseSignal:
        """Asks every teacher and combines their logits.

        Args:
            inputs: Passed to each source.
            ids: Passed to each source.
            route: Which teacher answers for which row, for "per_sample_route".

        Raises:
            TypeError: A teacher gives another kind of signal.
        """
        answers = [teacher.signal(inputs, ids) for teacher in self._teachers]
        for index, answer in enumerate(answers):
            if not isinstance(answer, DenseSignal):
                raise TypeError(
                    f"teacher {index} gives a {type(answer).__name__}; combining needs DenseSignal"
                )
        return DenseSignal(
            self.combine([a.logits for a in answers if isinstance(a, DenseSignal)], route=route)
        )

    def combine(
        self, logits: Sequence[Tensor], *, temperature: float | None = None, route: Tensor | None = None
    ) -> Tensor:
        """Combines given logits, see `combine_logits`.

        Args:
            logits: One tensor [..., V] a teacher.
            temperature: Overrides that of the construction, for a scheduled one.
            route: See `signal`.
        """
        weights = torch.softmax(self.gate.detach(), 0) if self.mode == "learned" else self.fixed
        return combine_logits(
            logits,
            self.mode,
            weights=weights,
            temperature=self.temperature if temperature is None else temperature,
            route=route,
        )

    def nll(self, logits: Sequence[Tensor], labels: Tensor) -> Tensor:
        """The loss of the gate: ``−mean log Σ_m w_m p_m(label)`` at T = 1, convex in the weights.

        Args:
            logits: One tensor [N, V] a teacher; treated as constants.
            labels: [N] classes.

        Returns:
            Scalar; its gradient reaches the gate alone.

        Raises:
            ValueError: The mode is not "learned".
        """
        if self.mode != "learned":
            raise ValueError(f'nll trains the gate of mode="learned", this is mode={self.mode!r}')
        log_p = torch.stack(
            [
                torch.log_softmax(z.detach().float(), -1).gather(-1, labels[:, None]).squeeze(-1)
                for z in logits
            ]
        )
        return -torch.logsumexp(log_p + torch.log_softmax(self.gate, 0)[:, None], 0).mean()


def _normalised(weights: Sequence[float] | Tensor | None, count: int, like: Tensor) -> Tensor:
    if weights is None:
        return like.new_full((count,), 1.0 / count)
    w = torch.as_tensor(weights, dtype=like.dtype, device=like.device)
    if w.shape != (count,) or not bool((w.isfinite() & (w >= 0)).all()) or float(w.sum()) <= 0:
        raise ValueError(f"weights must be {count} non-negative numbers, not all zero; got {w.tolist()}")
    return w / w.sum()


def _checked_route(route: Tensor, stack: Tensor) -> Tensor:
    rows = stack.shape[1:-1]
    if route.is_floating_point() or route.shape != rows[: route.dim()]:
        raise ValueError(
            f"route must hold integers of shape {list(rows)} or its start, got {list(route.shape)}"
        )
    if route.numel() and not (int(route.min()) >= 0 and int(route.max()) < len(stack)):
        raise ValueError(f"route must lie in [0, {len(stack)}), got [{int(route.min())}, {int(route.max())}]")
    return (
        route.to(stack.device).long().reshape(*route.shape, *([1] * (len(rows) - route.dim()))).expand(rows)
    )


def _pick(stack: Tensor, index: Tensor) -> Tensor:
    return torch.take_along_dim(stack, index[None, ..., None], 0).squeeze(0)
