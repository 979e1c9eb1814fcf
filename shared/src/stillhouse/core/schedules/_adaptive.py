"""Schedules that learn from the losses they are shown: TAID's t and DistiLLM's threshold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ._scalar import Schedule


class TaidAdaptive(Schedule):
    """The adaptive interpolation coefficient t of TAID (Temporally Adaptive Interpolated Distillation, ICLR
    2025).

    The rule is that of the authors' code. After a step with loss L_n, with ``t_lin = start + (end −
    start)·step/total``:

        δ = (L_{n−1} − L_n) / (L_{n−1} + 1e−15)
        m ← β m + (1 − β) δ
        t ← min(end, max(t_lin, t + α σ(m) (1 − t)))

    The first update only stores its loss. t never falls. Because ``t ≥ t_lin`` it reaches `end` with the
    schedule of steps at the latest; a falling loss only makes it faster.

    Here t moves only in `update`. The authors' code moves it inside forward, where gradient accumulation and
    validation batches advance it too; and it feeds the rank's own loss, so that the ranks drift apart. Give
    `update` the mean loss over micro-batches and ranks, once per optimizer step.

    Args:
        total: Number of optimizer steps of the run, ≥ 1.
        start: First t, in [0, 1). The authors use 0.4 for a Phi-3 teacher and 0.2 for the other pairs.
        end: Last t, in (start, 1].
        alpha: Step size α, in [0, 1].
        beta: Momentum β, in [0, 1).
        adaptive: False gives ``t = t_lin``.

    Source: SakanaAI/TAID, ``taid.py``; Shing et al., ICLR 2025.

    Example:
        >>> t = TaidAdaptive(total=1000, start=0.4)
        >>> t.update(2.0, step=0)
        0.4
        >>> round(t.update(2.0, step=0), 9)     # a constant loss moves t by α · ½ · (1 − t)
        0.40015
    """

    def __init__(
        self,
        total: int,
        start: float = 0.4,
        end: float = 1.0,
        *,
        alpha: float = 5e-4,
        beta: float = 0.99,
        adaptive: bool = True,
    ) -> None:
        if total < 1:
            raise ValueError(f"total must be at least 1 step, got {total!r}")
        if not 0.0 <= start < end <= 1.0:
            raise ValueError(f"0 ≤ start < end ≤ 1 is required, got start={start!r}, end={end!r}")
        if not 0.0 <= alpha <= 1.0:
            raise ValueError(f"alpha must lie in [0, 1], got {alpha!r}")
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"beta must lie in [0, 1), got {beta!r}")
        self.total, self.start, self.end = int(total), float(start), float(end)
        self.alpha, self.beta, self.adaptive = float(alpha), float(beta), bool(adaptive)
        self.t = self.start
        self.momentum = 0.0
        self.previous_loss: float | None = None

    def __call__(self, step: int) -> float:
        """The present t. The step is not used: t is state, moved by `update` alone."""
        return self.t

    def update(self, loss: float | Tensor, step: int) -> float:
        """Shows one optimizer step's loss and moves t.

        Args:
            loss: Mean TAID loss of the step over micro-batches and ranks. In the authors' code this is the
                cross-entropy ``−Σ p_t log q``, not the KL divergence; the rule reads the value, so the two
                differ.
            step: Index of the step the loss belongs to, counted from 0.

        Returns:
            The new t.

        Raises:
            ValueError: A loss that is not finite, or a negative step.
        """
        loss = _number(loss)
        if not math.isfinite(loss):
            raise ValueError(f"loss must be finite, got {loss!r}; skip the update for a step that diverged")
        if step < 0:
            raise ValueError(f"step must be ≥ 0, got {step!r}")
        if self.previous_loss is None:
            self.previous_loss = loss
            return self.t
        change = (self.previous_loss - loss) / (self.previous_loss + 1e-15)
        self.momentum = self.beta * self.momentum + (1.0 - self.beta) * change
        linear = self.start + (self.end - self.start) * step / self.total
        if self.adaptive:
            moved = self.t + self.alpha * _sigmoid(self.momentum) * (1.0 - self.t)
            self.t = min(self.end, max(linear, moved))
        else:
            self.t = min(self.end, linear)
        self.previous_loss = loss
        return self.t

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state: t, the momentum and the last loss."""
        return {
            **super().state_dict(),
            "t": self.t,
            "momentum": self.momentum,
            "previous_loss": self.previous_loss,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        super().load_state_dict(state)
        self.t = float(state["t"])
        self.momentum = float(state["momentum"])
        previous = state["previous_loss"]
        self.previous_loss = None if previous is None else float(previous)


class AdaptiveThreshold(Schedule):
    """The share of student-generated outputs of DistiLLM (Ko et al., ICML 2024), raised when validation gets
    worse.

    After each validation: if ``loss ≥ reference + tolerance`` the threshold grows by `increment`, at most to
    `maximum`, and this loss becomes the new reference; otherwise nothing changes, so that a slow rise over
    several validations counts too. The first update only stores its loss (the authors validate once before
    training).

    Args:
        start: First value, in [0, maximum].
        increment: Growth per raise, > 0.
        tolerance: Rise of the validation loss that is forgiven, ≥ 0.
        maximum: Upper end, in (0, 1].

    Source: jongwooko/distillm, ``finetune.py``.

    Example:
        >>> threshold = AdaptiveThreshold()
        >>> [round(threshold.update(loss), 3) for loss in (2.0, 2.05, 2.2, 2.25, 2.4)]
        [0.0, 0.0, 0.1, 0.1, 0.2]
    """

    def __init__(
        self, start: float = 0.0, *, increment: float = 0.1, tolerance: float = 0.1, maximum: float = 1.0
    ) -> None:
        if not 0.0 < maximum <= 1.0:
            raise ValueError(f"maximum must lie in (0, 1], got {maximum!r}")
        if not 0.0 <= start <= maximum:
            raise ValueError(f"start must lie in [0, maximum={maximum!r}], got {start!r}")
        if not increment > 0.0:
            raise ValueError(f"increment must be positive, got {increment!r}")
        if not tolerance >= 0.0:
            raise ValueError(f"tolerance must be ≥ 0, got {tolerance!r}")
        self.increment, self.tolerance, self.maximum = float(increment), float(tolerance), float(maximum)
        self.value = float(start)
        self.reference: float | None = None

    def __call__(self, step: int) -> float:
        """The present threshold. The step is not used: the threshold is state, moved by `update` alone."""
        return self.value

    def update(self, validation_loss: float | Tensor) -> float:
        """Shows one validation loss and returns the threshold that holds from now on.

        Raises:
            ValueError: A loss that is not finite.
        """
        loss = _number(validation_loss)
        if not math.isfinite(loss):
            raise ValueError(f"validation_loss must be finite, got {loss!r}")
        if self.reference is None:
            self.reference = loss
        elif loss >= self.reference + self.tolerance:
            self.value = min(self.maximum, self.value + self.increment)
            self.reference = loss
        return self.value

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state: the threshold and the reference loss."""
        return {**super().state_dict(), "value": self.value, "reference": self.reference}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        super().load_state_dict(state)
        self.value = float(state["value"])
        reference = state["reference"]
        self.reference = None if reference is None else float(reference)


def _number(value: float | Tensor) -> float:
    return float(value.detach() if isinstance(value, Tensor) else value)


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0.0 else math.exp(x) / (1.0 + math.exp(x))
