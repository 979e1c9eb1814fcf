"""Iterated self-distillation in kernel ridge regression (Borup & Andersen, "Even your Teacher Needs
Guidance", NeurIPS 2021).

The student of step τ is fitted to ``α y + (1 − α) ŷ^(τ−1)``: the ground truth and its teacher's predictions,
with ``ŷ^(0) = y``. With ``A = K (K + λI)⁻¹`` every step is a fixed linear map of y, and infinitely many steps
are one ridge regression with the regularisation λ/α.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

# The noisy sine of Mobahi, Farajtabar & Bartlett (2020), as the notebook of Borup & Andersen gives it.
MOBAHI_X: Array = np.arange(11) / 10.0
MOBAHI_Y: Array = np.array(
    [
        0.38476636465198066,
        1.2333967683416893,
        1.33232242218057,
        0.69201594888895180,
        -0.29756145531871736,
        -0.24189291901377769,
        -0.7964485769175675,
        -0.9616480167034174,
        -0.49672509509916934,
        -0.3469066003991437,
        0.5589512650600734,
    ]
)


def rbf_kernel(a: ArrayLike, b: ArrayLike, gamma: float) -> Array:
    """``exp(−γ ‖a_i − b_j‖²)``.

    Args:
        a: [n] or [n, d].
        b: [m] or [m, d].
        gamma: γ > 0.

    Returns:
        [n, m].

    Raises:
        ValueError: γ ≤ 0, or points of different dimension.
    """
    if not gamma > 0:
        raise ValueError(f"gamma must be positive, got {gamma!r}")
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    first, second = (x[:, None] if x.ndim == 1 else x for x in (first, second))
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        raise ValueError(
            f"a and b must be [n, d] and [m, d], got {list(first.shape)} and {list(second.shape)}"
        )
    return np.exp(-gamma * ((first[:, None, :] - second[None, :, :]) ** 2).sum(-1))


@dataclass(frozen=True)
class SelfDistillation:
    """Self-distillation of one kernel ridge regression, all steps in closed form.

    Args:
        kernel: K [n, n], symmetric positive semi-definite.
        targets: y [n] or [n, c].
        ridge: λ > 0.

    Raises:
        ValueError: A kernel that is not symmetric or not positive semi-definite, other shapes, λ ≤ 0.

    Example:
        >>> model = SelfDistillation(rbf_kernel(MOBAHI_X, MOBAHI_X, 80.0), MOBAHI_Y, ridge=0.2)
        >>> grid = np.linspace(0, 1, 101)
        >>> prediction = model.predict(rbf_kernel(grid, MOBAHI_X, 80.0), step=4, alpha=0.35)
        >>> round(float(np.mean((prediction - np.sin(2 * np.pi * grid)) ** 2)), 5)
        0.14983
    """

    kernel: Array
    targets: Array
    ridge: float
    eigenvalues: Array = field(init=False, repr=False)
    eigenvectors: Array = field(init=False, repr=False)

    def __post_init__(self) -> None:
        kernel = np.asarray(self.kernel, dtype=np.float64)
        targets = np.asarray(self.targets, dtype=np.float64)
        if kernel.ndim != 2 or kernel.shape[0] != kernel.shape[1]:
            raise ValueError(f"kernel must be [n, n], got {list(kernel.shape)}")
        if targets.ndim not in (1, 2) or len(targets) != len(kernel):
            raise ValueError(
                f"targets must be [{len(kernel)}] or [{len(kernel)}, c], got {list(targets.shape)}"
            )
        if not self.ridge > 0:
            raise ValueError(f"ridge must be positive, got {self.ridge!r}")
        scale = float(np.abs(kernel).max(initial=0.0))
        if not np.allclose(kernel, kernel.T, rtol=0, atol=1e-10 * scale):
            raise ValueError("kernel must be symmetric")
        values, vectors = np.linalg.eigh((kernel + kernel.T) / 2)
        if values.size and values[0] < -1e-8 * scale:
            raise ValueError(
                f"kernel must be positive semi-definite; its smallest eigenvalue is {values[0]:.3e}"
            )
        object.__setattr__(self, "kernel", kernel)
        object.__setattr__(self, "targets", targets)
        object.__setattr__(self, "eigenvalues", np.maximum(values, 0.0))
        object.__setattr__(self, "eigenvectors", vectors)

    def shrinkage(self, step: int, alpha: float) -> Array:
        """Factor by which step τ shrinks each eigen-direction of K: the diagonal of B_τ, by recursion.

        ``b_τ = a ((1 − α) b_(τ−1) + α)`` with ``b_0 = 1`` and ``a = d / (d + λ)`` (in ascending order of d).

        Args:
            step: τ ≥ 0.
            alpha: Weight of the ground truth. Any finite number; the optimum may lie outside [0, 1].

        Returns:
            [n].
        """
        _check_step(step)
        a = self.eigenvalues / (self.eigenvalues + self.ridge)
        b = np.ones_like(a)
        for _ in range(step):
            b = a * ((1.0 - alpha) * b + alpha)
        return b

    def fitted(self, step: int, alpha: float) -> Array:
        """ŷ^(τ), the predictions at the training points, from the closed form.

        ``[α Σ_{i=0}^{τ−2} (1−α)^i A^{i+1} + (1−α)^{τ−1} A^τ] y``; step 0 is y itself.

        Args:
            step: τ ≥ 0.
            alpha: Weight of the ground truth.

        Returns:
            Of the shape of the targets.
        """
        _check_step(step)
        if step == 0:
            return self.targets.copy()
        a = self.eigenvalues / (self.eigenvalues + self.ridge)
        powers = a[None, :] ** np.arange(1, step + 1)[:, None]
        weights = alpha * (1.0 - alpha) ** np.arange(step, dtype=np.float64)
        weights[-1] = (1.0 - alpha) ** (step - 1)
        return self._apply(weights @ powers)

    def iterate(self, steps: int, alpha: float) -> list[Array]:
        """ŷ^(1) … ŷ^(steps), by fitting again and again.

        Args:
            steps: Number of steps ≥ 1.
            alpha: Weight of the ground truth.
        """
        _check_step(steps, least=1)
        operator = self.kernel @ np.linalg.inv(self.kernel + self.ridge * np.eye(len(self.kernel)))
        fitted, previous = [], self.targets
        for _ in range(steps):
            previous = operator @ (alpha * self.targets + (1.0 - alpha) * previous)
            fitted.append(previous)
        return fitted

    def limit(self, alpha: float) -> Array:
        """ŷ^(∞) ``= K (K + (λ/α) I)⁻¹ y``; 0 for α = 0.

        Raises:
            ValueError: α outside [0, 1].
        """
        if not 0.0 <= alpha <= 1.0:
            raise ValueError(f"alpha must lie in [0, 1] for the limit, got {alpha!r}")
        return self._apply(alpha * self.eigenvalues / (alpha * self.eigenvalues + self.ridge))

    def predict(self, cross: ArrayLike, step: int | None, alpha: float) -> Array:
        """Predictions elsewhere: ``k(x) (K + λI)⁻¹ (α y + (1 − α) ŷ^(τ−1))``.

        Args:
            cross: Kernel between the new and the training points [m, n].
            step: τ ≥ 1, or None for the limit.
            alpha: Weight of the ground truth.

        Returns:
            [m] or [m, c].
        """
        k = np.asarray(cross, dtype=np.float64)
        if k.ndim != 2 or k.shape[1] != len(self.kernel):
            raise ValueError(f"cross must be [m, {len(self.kernel)}], got {list(k.shape)}")
        if step is None:
            if alpha == 0.0:
                return k @ np.zeros_like(self.targets)
            self.limit(alpha)  # checks alpha
            return k @ np.linalg.solve(self._ridged(self.ridge / alpha), self.targets)
        _check_step(step, least=1)
        target = alpha * self.targets + (1.0 - alpha) * self.fitted(step - 1, alpha)
        return k @ np.linalg.solve(self._ridged(self.ridge), target)

    def optimal_alpha(self, cross: ArrayLike, held_out: ArrayLike, previous: ArrayLike) -> float:
        """The α of the next step with the smallest squared error on held-out targets.

        The prediction is ``α a + (1 − α) b`` with ``a = k_v (K + λI)⁻¹ y`` and ``b = k_v (K + λI)⁻¹
        ŷ^(τ−1)``, so that ``α* = ⟨v − b, a − b⟩ / ‖a − b‖²``. It may leave [0, 1].

        Args:
            cross: Kernel between the held-out and the training points [m, n].
            held_out: v [m] or [m, c].
            previous: ŷ^(τ−1) of the previous step, whatever weights led there.

        Raises:
            ValueError: `previous` equals the targets (as for the first step), so that every α is the same.
        """
        k, v = np.asarray(cross, dtype=np.float64), np.asarray(held_out, dtype=np.float64)
        solved = np.linalg.solve(
            self._ridged(self.ridge),
            np.stack([self.targets, np.asarray(previous)], -1).reshape(len(self.kernel), -1),
        )
        both = (k @ solved).reshape(len(k), *self.targets.shape[1:], 2)
        a, b = both[..., 0], both[..., 1]
        length = float(((a - b) ** 2).sum())
        if length <= 1e-24 * float((a**2).sum() + (b**2).sum()):
            raise ValueError("previous equals the targets: the prediction does not depend on alpha")
        return float(((v - b) * (a - b)).sum() / length)

    def _ridged(self, ridge: float) -> Array:
        return self.kernel + ridge * np.eye(len(self.kernel))

    def _apply(self, factors: Array) -> Array:
        rotated = self.eigenvectors.T @ self.targets
        scaled = factors[:, None] * rotated if rotated.ndim == 2 else factors * rotated
        return self.eigenvectors @ scaled


def _check_step(step: int, least: int = 0) -> None:
    if step < least:
        raise ValueError(f"step must be ≥ {least}, got {step!r}")
