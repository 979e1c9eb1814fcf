"""Closed-form regression targets of the few-step methods: Phased DMD, BOOT, FreeFlow, sCM/TBCM."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ._shape import guarded, like, per_sample
from .schedules import NoiseSchedule


def subinterval_target(
    x_s: Tensor, eps: Tensor, s: Tensor | float, t: Tensor | float, schedule: NoiseSchedule
) -> Tensor:
    """Unbiased flow target of a critic that only has samples of x_s and noises them further to x_t.

    (α_s²·σ_t + α_t·σ_s²)/(α_s²·σ_{t|s})·ε − x_s/α_s

    whose conditional mean given x_t = α_{t|s}·x_s + σ_{t|s}·ε is that of ε_total − x₀. At s = 0 it is ε − x₀.
    Its variance grows without bound as t → s: weigh it by `subinterval_weight`.

    Args:
        x_s: `[B, *S]`.
        eps: the noise that took x_s to x_t.
        s: start of the interval, `[B]` or a number.
        t: later time, s < t.
        schedule: where α and σ come from.

    Returns:
        `[B, *S]`.

    Source: Phased DMD, 2025, as summarised by a third party; the derivation is ours.

    Example:
        >>> from stillhouse.core.diffusion import RectifiedFlow
        >>> x0, eps = torch.tensor([[1.0]]), torch.tensor([[3.0]])
        >>> subinterval_target(x0, eps, 0.0, 0.7, RectifiedFlow())
        tensor([[2.]])
    """
    s, t = per_sample(s, x_s, "s"), per_sample(t, x_s)
    if bool((s >= t).any()):
        raise ValueError("s is not before t for some sample; the interval is (s, t]")
    a_s, s_s = schedule.alpha(s), schedule.sigma(s)
    _, step = schedule.transition(s, t)
    top = a_s.square() * schedule.sigma(t) + schedule.alpha(t) * s_s.square()
    factor = top / guarded(a_s.square() * step)
    target = like(factor, x_s) * eps.double() - x_s.double() / like(guarded(a_s), x_s)
    return target.to(x_s.dtype)


def subinterval_weight(
    s: Tensor | float, t: Tensor | float, schedule: NoiseSchedule, *, highest: float = 10.0
) -> Tensor:
    """clamp(1/σ_{t|s}², 0, highest): the weight of `subinterval_target`'s squared error, float64 `[B]`.

    Taking the clamp as the whole weight is our reading of a summary that does not give the base weight.
    """
    _, step = schedule.transition(s, t)
    return (1 / step.square()).clamp(0, highest)


def phased_weight(s: Tensor | float, t: Tensor | float, schedule: NoiseSchedule) -> Tensor:
    """α_t·α_{t|s}/(α_t·σ_t + σ_t²): the factor on (teacher − fake) flows in the generator's gradient by x_s.

    Source: identity I1 of the score with dx_t/dx_s = α_{t|s}; valid where flow = ε − x₀.
    """
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    ratio, _ = schedule.transition(s, t)
    return alpha * ratio / guarded(alpha * sigma + sigma.square())


def signal_step(
    y: Tensor, x0: Tensor, t: Tensor | float, s: Tensor | float, schedule: NoiseSchedule
) -> Tensor:
    """BOOT's exact step of the signal ODE for a frozen x₀: y_s = x₀ + ratio·(y_t − x₀), s < t.

    dy/dt = −λ′·(x₀ − y) with λ = −log(α/σ), hence ratio = σ_s·α_t/(α_s·σ_t). Nothing is divided by α_t.

    Args:
        y: the signal (x_t − σ_t·z)/α_t at t, `[B, *S]`.
        x0: the teacher's answer at x_t.
        t: present time.
        s: next time.
        schedule: where α and σ come from.
    """
    t, s = per_sample(t, y), per_sample(s, y, "s")
    ratio = schedule.sigma(s) * schedule.alpha(t) / guarded(schedule.alpha(s) * schedule.sigma(t))
    return (x0 + like(ratio, y) * (y - x0)).to(y.dtype)


def boot_weight(t: Tensor | float, s: Tensor | float, schedule: NoiseSchedule) -> Tensor:
    """1/(1 − ratio)² of `signal_step`: keeps the gradient of order one as s → t, float64."""
    ratio = schedule.sigma(s) * schedule.alpha(t) / guarded(schedule.alpha(s) * schedule.sigma(t))
    return 1 / (1 - ratio).square()


def freeflow_target(
    average: Callable[[Tensor, Tensor], Tensor],
    velocity: Callable[[Tensor, Tensor], Tensor],
    z: Tensor,
    d: Tensor | float,
    *,
    delta: float | None = None,
) -> tuple[Tensor, Tensor]:
    """FreeFlow's prediction target u(f(z, d), 1 − d) − d·∂F/∂d, with u = −v pointing to the data.

    f(z, d) = z + d·F(z, d). The exact map has F + d·∂F/∂d = −v(f, 1 − d), so that F equals the target.

    Args:
        average: the student, `F(z, d [B])` → `[B, *S]`.
        velocity: the teacher, `v(x, t [B])` → `[B, *S]`, noise-ward.
        z: noise `[B, *S]`.
        d: travelled time in [0, 1], `[B]` or a number.
        delta: half step of a central difference in d; None differentiates forwards
            (exactly; every operation of the student needs a forward derivative).

    Returns:
        (F with its graph, target without one).
    """
    d = per_sample(d, z, "d")
    live = average(z, d)
    with torch.no_grad():
        if delta is None:
            _, slope = _jvp(lambda at: average(z, at), (d,), (torch.ones_like(d),))
        else:
            slope = (average(z, d + delta) - average(z, d - delta)) / (2 * delta)
        span = like(d, z)
        state = (z + span * live.detach()).to(z.dtype)
        target = -velocity(state, 1 - d) - span * slope.detach()
    return live, target.to(live.dtype)


def scm_tangent(
    network: Callable[[Tensor, Tensor], Tensor],
    x_t: Tensor,
    t: Tensor | float,
    dxdt: Tensor,
    *,
    sigma_data: float = 0.5,
    warmup: float = 1.0,
    normalise: float | None = None,
    delta: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Tangent of sCM, g = cos t · df/dt along the teacher's path, zero for an exact consistency function.

    g = −cos²t·(σ_d·F⁻ − dxdt) − r·(cos t·sin t·x_t + σ_d·JVP), where JVP is cos t·sin t·dF/dt and
    f = cos t·x_t − sin t·σ_d·F(x_t/σ_d, t).

    Args:
        network: `F(x/σ_d, t [B])` → `[B, *S]`.
        x_t: states of the teacher's path in TrigFlow, `[B, *S]`.
        t: angle in [0, π/2], `[B]` or a number.
        dxdt: the teacher's velocity at x_t.
        sigma_data: σ_d.
        warmup: r in [0, 1]; only with r = 1 is g the tangent.
        normalise: c of g ← g/(‖g‖ + c) with the norm of each sample; TBCM uses 0.1. None leaves g as it is.
        delta: half step of a central difference; None differentiates forwards.

    Returns:
        (F⁻ without a graph, g without a graph); the loss is ‖F − F⁻ − g‖².

    Source: Lu and Song, sCM, 2024; TBCM (hustvl/TBCM), 2025.
    """
    t = per_sample(t, x_t)
    span = like(t, x_t)
    both = span.cos() * span.sin()
    x, direction = x_t / sigma_data, both * dxdt / sigma_data
    moving = t.cos() * t.sin()
    with torch.no_grad():
        if delta is None:
            still, slope = _jvp(network, (x.double(), t), (direction.double(), moving))
        else:
            still = network(x, t)
            ahead = network(x + delta * direction, t + delta * moving)
            behind = network(x - delta * direction, t - delta * moving)
            slope = (ahead - behind) / (2 * delta)
        still, slope = still.detach(), slope.detach()
        g = -span.cos().square() * (sigma_data * still - dxdt)
        g = g - warmup * (both * x_t + sigma_data * slope)
        if normalise is not None:
            norm = g.flatten(1).norm(dim=1)
            g = g / like(norm + normalise, g)
    return still.to(x_t.dtype), g.to(x_t.dtype)


def _jvp(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], tangents: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """(value, directional derivative) by forward differentiation."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        # torch compiles its own formulas with what it has deprecated, on the first use
        warnings.filterwarnings("ignore", r"`torch\.jit\.script` is deprecated", DeprecationWarning)
        pairs = [forward_ad.make_dual(x.clone(), v.clone()) for x, v in zip(inputs, tangents, strict=True)]
        value, slope = forward_ad.unpack_dual(function(*pairs))
        return value, torch.zeros_like(value) if slope is None else slope
