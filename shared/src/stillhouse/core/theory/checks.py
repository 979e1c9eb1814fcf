"""The known values of this folder, computed anew."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from .krr import MOBAHI_X, MOBAHI_Y, SelfDistillation, rbf_kernel
from .operators import GeometricAnchoring, LinearAnchoring, iterate, kl_divergence, resample

# Mean squared error to sin 2πx on the grid 0, 0.01, …, 1; steps 1 … 6 and ∞; γ = 80, λ = 0.2.
KNOWN_ERRORS = {
    0.0: (0.16477, 0.15076, 0.14915, 0.15561, 0.16735, 0.18251, 0.49505),
    0.25: (0.16477, 0.15309, 0.14958, 0.14903, 0.14946, 0.15011, 0.15250),
    0.35: (0.16477, 0.15424, 0.15089, 0.14983, 0.14954, 0.14948, 0.14959),
}
# Best α of steps 2 … 5 on 25 points from 0.03 to 0.97, each step continuing from the best one before.
KNOWN_ALPHAS = (-0.5446, 0.3453, 0.3492, 0.3501)


@dataclass(frozen=True)
class Check:
    """One known value beside the computed one.

    Attributes:
        name: What is compared.
        computed: What came out.
        expected: What should, as text.
        passed: Whether it did.
    """

    name: str
    computed: float
    expected: str
    passed: bool


def run_checks() -> list[Check]:
    """Computes everything anew; takes about a second.

    Example:
        >>> all(check.passed for check in run_checks())
        True
    """
    return [*_ridge_checks(), *_operator_checks()]


def mobahi_model() -> SelfDistillation:
    """The regression behind `KNOWN_ERRORS`."""
    return SelfDistillation(rbf_kernel(MOBAHI_X, MOBAHI_X, 80.0), MOBAHI_Y, ridge=0.2)


def mobahi_error(step: int | None, alpha: float) -> float:
    """Mean squared error to the noiseless sine on the grid of 101 points; `step` None is the limit."""
    grid = np.arange(101) / 100.0
    prediction = mobahi_model().predict(rbf_kernel(grid, MOBAHI_X, 80.0), step, alpha)
    return float(np.mean((prediction - np.sin(2 * np.pi * grid)) ** 2))


def optimal_alphas(steps: int) -> list[float]:
    """Best α of steps 2 … on 25 points between the ends, each step continuing from the best one before."""
    model, points = mobahi_model(), np.linspace(0.03, 0.97, 25)
    cross, truth = rbf_kernel(points, MOBAHI_X, 80.0), np.sin(2 * np.pi * points)
    shrink = model.kernel @ np.linalg.inv(model.kernel + model.ridge * np.eye(len(MOBAHI_X)))
    previous, alphas = shrink @ MOBAHI_Y, []
    for _ in range(steps - 1):
        alphas.append(model.optimal_alpha(cross, truth, previous))
        previous = shrink @ (alphas[-1] * MOBAHI_Y + (1 - alphas[-1]) * previous)
    return alphas


def _ridge_checks() -> Iterator[Check]:
    for alpha, row in KNOWN_ERRORS.items():
        for index, expected in enumerate(row):
            step = index + 1 if index < 6 else None
            error = mobahi_error(step, alpha)
            name = f"ridge: error at step {step or '∞'}, α = {alpha}"
            yield Check(name, error, f"{expected:.5f}", abs(error - expected) <= 5.001e-6)
    for index, (alpha, expected) in enumerate(zip(optimal_alphas(5), KNOWN_ALPHAS, strict=True)):
        yield Check(
            f"ridge: best α of step {index + 2}", alpha, f"{expected:.4f}", abs(alpha - expected) <= 5.001e-5
        )
    model = mobahi_model()
    gap = max(
        float(np.abs(fitted - model.fitted(step + 1, alpha)).max())
        for alpha in (0.0, 0.25, 1.0)
        for step, fitted in enumerate(model.iterate(8, alpha))
    )
    yield Check("ridge: closed form against iteration", gap, "≤ 1e-12", gap <= 1e-12)
    ridged = SelfDistillation(model.kernel, model.targets, ridge=0.2 / 0.35)
    gap = float(np.abs(model.limit(0.35) - ridged.fitted(1, 1.0)).max())
    yield Check("ridge: limit against a ridge of λ/α", gap, "≤ 1e-12", gap <= 1e-12)
    rate = 0.65 * float(model.shrinkage(1, 1.0).max())
    distances = [float(np.linalg.norm(fitted - model.limit(0.35))) for fitted in model.iterate(8, 0.35)]
    worst = max(b / a for a, b in pairwise(distances))
    yield Check("ridge: contraction per step", worst, f"≤ (1−α)σ(A) = {rate:.4f}", worst <= rate + 1e-12)


def _operator_checks() -> Iterator[Check]:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(2, 2000, 10, generator=generator, dtype=torch.float64)
    p, q = torch.softmax(logits, -1)
    for a in (0.2, 0.5):
        for kind, operator in (("linear", LinearAnchoring(a)), ("geometric", GeometricAnchoring(a))):
            after = operator(p, q)
            forward = float((kl_divergence(q, after) / kl_divergence(q, p)).max())
            reverse = float((kl_divergence(after, q) / kl_divergence(p, q)).max())
            yield Check(
                f"{kind}, a = {a}: worst KL(q‖p′)/KL(q‖p)", forward, f"≤ {1 - a}", forward <= 1 - a + 1e-12
            )
            if kind == "linear":
                yield Check(
                    f"linear, a = {a}: worst KL(p′‖q)/KL(p‖q)",
                    reverse,
                    f"≤ {1 - a}",
                    reverse <= 1 - a + 1e-12,
                )
            else:
                expected = f"between {1 - a} and 1: no contraction by 1 − a"
                yield Check(
                    f"geometric, a = {a}: worst KL(p′‖q)/KL(p‖q)", reverse, expected, 1 - a < reverse <= 1
                )
    chain = iterate(LinearAnchoring(0.5), p[0], q[0], 12)
    ratio = float(kl_divergence(q[0], chain[12]) / kl_divergence(q[0], chain[11]))
    yield Check(
        "linear, a = 0.5: asymptotic rate of KL(q‖p)", ratio, "(1−a)² = 0.25", abs(ratio - 0.25) <= 2e-3
    )
    drift = {a: _drift(a, q[:50], generator) for a in (0.0, 0.5)}
    yield Check(
        "50 resampled generations without anchor: mean KL(p‖q)", drift[0.0], "> 0.5", drift[0.0] > 0.5
    )
    anchored = drift[0.5]
    yield Check("50 resampled generations, a = 0.5: mean KL(p‖q)", anchored, "< 0.1", anchored < 0.1)


def _drift(a: float, q: torch.Tensor, generator: torch.Generator) -> float:
    operator, p = LinearAnchoring(a), q
    for _ in range(50):
        p = operator(resample(p, 200, generator), q)
    value = float(kl_divergence(p, q).mean())
    return value if math.isfinite(value) else math.inf
