"""Noise schedules: how data and noise are mixed at a time t.

    x_t = α(t)·x₀ + σ(t)·ε,   ε ~ N(0, I)

Larger t means more noise. Each schedule has its own native time, `t_min … t_max`: [0, 1] for `VPLinear`,
`VPCosine` and `RectifiedFlow`, the angle [0, π/2] for `Trig`, the noise level itself for `EDM`, the index
[0, N − 1] for the tables `DiscreteVP` and `Local`. All coefficients are computed and returned in float64.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from ._shape import guarded, like, per_sample


class NoiseSchedule(ABC):
    """Base of all schedules; also called interpolant.

    Attributes:
        t_min: the clean end of the native time.
        t_max: the noisy end.
        variance_preserving: α² + σ² = 1 at every t, which is what `Prediction.V` needs.

    Shapes: t `[B]` float64 (a number where that is convenient); x₀, ε, x_t `[B, *S]`. What comes back for a
    tensor x has the dtype of x.
    """

    t_min: float = 0.0
    t_max: float = 1.0
    variance_preserving: bool = False

    @abstractmethod
    def alpha(self, t: Tensor | float) -> Tensor:
        """α(t), float64, in the shape of t."""

    @abstractmethod
    def sigma(self, t: Tensor | float) -> Tensor:
        """σ(t) ≥ 0, float64."""

    @abstractmethod
    def dalpha(self, t: Tensor | float) -> Tensor:
        """dα/dt, float64."""

    @abstractmethod
    def dsigma(self, t: Tensor | float) -> Tensor:
        """dσ/dt, float64; infinite at t_min for the variance-preserving schedules."""

    @abstractmethod
    def t_from_log_snr(self, log_snr: Tensor | float) -> Tensor:
        """The time with a given log(α²/σ²), clipped to the native range: carries a time from one schedule to
        another by matching signal-to-noise ratios."""

    def log_snr(self, t: Tensor | float) -> Tensor:
        """log(α²/σ²), falling in t; ±inf where σ or α is 0."""
        return 2 * (self.alpha(t).log() - self.sigma(t).log())

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor | float) -> Tensor:
        """x_t = α(t)·x₀ + σ(t)·ε."""
        t = per_sample(t, x0)
        return _mix(self.alpha(t), x0, self.sigma(t), eps)

    def velocity(self, x0: Tensor, eps: Tensor, t: Tensor | float) -> Tensor:
        """dx_t/dt = α′(t)·x₀ + σ′(t)·ε, in the schedule's own time, towards the noise."""
        t = per_sample(t, x0)
        return _mix(self.dalpha(t), x0, self.dsigma(t), eps)

    def transition(self, s: Tensor | float, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """(α_{t|s}, σ_{t|s}) of x_t given x_s for s ≤ t.

        α_{t|s} = α_t/α_s and σ_{t|s}² = σ_t² − α_{t|s}²·σ_s². Division by α_s is guarded.
        """
        ratio = self.alpha(t) / guarded(self.alpha(s))
        variance = self.sigma(t).square() - (ratio * self.sigma(s)).square()
        return ratio, variance.clamp_min(0).sqrt()

    def renoise(self, x_s: Tensor, s: Tensor | float, t: Tensor | float, eps: Tensor) -> Tensor:
        """x_t = α_{t|s}·x_s + σ_{t|s}·ε: more noise on what is noisy already, for s ≤ t.

        Raises:
            ValueError: some s > t.
        """
        s, t = per_sample(s, x_s, "s"), per_sample(t, x_s)
        if bool((s > t).any()):
            raise ValueError("s is later than t for some sample; renoise adds noise, it cannot remove any")
        ratio, sigma = self.transition(s, t)
        return _mix(ratio, x_s, sigma, eps)

    def check(self, t: Tensor, name: str = "t") -> None:
        """Raise a ValueError where a time leaves the native range."""
        if not bool(((t >= self.t_min) & (t <= self.t_max)).all()):
            raise ValueError(
                f"{name} lies in [{float(t.min()):g}, {float(t.max()):g}]; the native time of "
                f"{type(self).__name__} is [{self.t_min:g}, {self.t_max:g}]"
            )

    def __repr__(self) -> str:
        values = ", ".join(
            f"{key}={value!r}"
            for key, value in vars(self).items()
            if not key.startswith("_") and isinstance(value, int | float) and not isinstance(value, bool)
        )
        return f"{type(self).__name__}({values})"


class RectifiedFlow(NoiseSchedule):
    """α = 1 − τ, σ = τ with τ = shift·t / (1 + (shift − 1)·t).

    Args:
        shift: > 1 spends more of the steps at high noise; 1 is the plain straight path.

    Example:
        >>> RectifiedFlow().add_noise(torch.ones(1, 2), torch.zeros(1, 2), 0.25)
        tensor([[0.7500, 0.7500]])
    """

    def __init__(self, shift: float = 1.0) -> None:
        self.shift = _positive("shift", shift)

    def _tau(self, t: Tensor | float) -> Tensor:
        t = _double(t)
        return self.shift * t / (1 + (self.shift - 1) * t)

    def _slope(self, t: Tensor | float) -> Tensor:
        return self.shift / (1 + (self.shift - 1) * _double(t)).square()

    def alpha(self, t: Tensor | float) -> Tensor:
        """1 − τ."""
        return 1 - self._tau(t)

    def sigma(self, t: Tensor | float) -> Tensor:
        """τ."""
        return self._tau(t)

    def dalpha(self, t: Tensor | float) -> Tensor:
        """−dτ/dt."""
        return -self._slope(t)

    def dsigma(self, t: Tensor | float) -> Tensor:
        """dτ/dt."""
        return self._slope(t)

    def t_from_log_snr(self, log_snr: Tensor | float) -> Tensor:
        """τ = sigmoid(−log_snr/2), unshifted."""
        tau = torch.sigmoid(-_double(log_snr) / 2)
        return tau / (self.shift - (self.shift - 1) * tau)


class VPLinear(NoiseSchedule):
    """Variance preserving with linear β: log α = −½·(β₀·t + ½·(β₁ − β₀)·t²), σ = √(1 − α²), t in [0, 1].

    Args:
        beta_start: β₀ > 0.
        beta_end: β₁ > β₀.

    Source: Song et al., Score-Based Generative Modeling through SDEs, ICLR 2021, appendix C. The table of N
    discrete betas of DDPM is `DiscreteVP`.

    Example:
        >>> t = VPLinear().t_from_log_snr(0.0)
        >>> round(float(VPLinear().alpha(t)) ** 2, 12)
        0.5
    """

    variance_preserving = True

    def __init__(self, beta_start: float = 0.1, beta_end: float = 20.0) -> None:
        self.beta_start = _positive("beta_start", beta_start)
        self.beta_end = _positive("beta_end", beta_end)
        if beta_end <= beta_start:
            raise ValueError(f"beta_end is {beta_end}; it must exceed beta_start = {beta_start}")

    def _log_alpha_bar(self, t: Tensor | float) -> Tensor:
        t = _double(t)
        return -(self.beta_start * t + 0.5 * (self.beta_end - self.beta_start) * t.square())

    def _beta(self, t: Tensor | float) -> Tensor:
        return self.beta_start + (self.beta_end - self.beta_start) * _double(t)

    def alpha(self, t: Tensor | float) -> Tensor:
        """exp(½·log ᾱ)."""
        return (self._log_alpha_bar(t) / 2).exp()

    def sigma(self, t: Tensor | float) -> Tensor:
        """√(1 − ᾱ), without cancellation near t = 0."""
        return (-torch.expm1(self._log_alpha_bar(t))).sqrt()

    def dalpha(self, t: Tensor | float) -> Tensor:
        """−½·β·α."""
        return -0.5 * self._beta(t) * self.alpha(t)

    def dsigma(self, t: Tensor | float) -> Tensor:
        """½·β·ᾱ/σ."""
        return 0.5 * self._beta(t) * self.alpha(t).square() / self.sigma(t)

    def t_from_log_snr(self, log_snr: Tensor | float) -> Tensor:
        """Root of the quadratic, in the form without cancellation."""
        c = torch.nn.functional.softplus(-_double(log_snr))
        root = (self.beta_start**2 + 2 * (self.beta_end - self.beta_start) * c).sqrt()
        return (2 * c / (self.beta_start + root)).clamp(self.t_min, self.t_max)


class VPCosine(NoiseSchedule):
    """Variance preserving, ᾱ = cos²(u)/cos²(u₀) with u = (t + s)/(1 + s)·π/2, t in [0, 1].

    Args:
        offset: s ≥ 0; 0 makes it the plain quarter circle.

    Source: Nichol and Dhariwal, Improved DDPM, 2021, equation 17 (whose betas are clipped at 0.999; these are
    not).

    Example:
        >>> float(VPCosine(offset=0.0).alpha(0.5)) ** 2
        0.5000000000000001
    """

    variance_preserving = True

    def __init__(self, offset: float = 0.008) -> None:
        if not (offset >= 0 and math.isfinite(offset)):
            raise ValueError(f"offset is {offset}; it must be a finite number ≥ 0")
        self.offset = float(offset)
        self._u0 = offset / (1 + offset) * math.pi / 2
        self._du = math.pi / 2 / (1 + offset)

    def _u(self, t: Tensor | float) -> Tensor:
        return self._u0 + self._du * _double(t)

    def alpha(self, t: Tensor | float) -> Tensor:
        """cos u / cos u₀."""
        t = _double(t)
        return torch.where(t >= 1, torch.zeros_like(t), self._u(t).cos() / math.cos(self._u0))

    def sigma(self, t: Tensor | float) -> Tensor:
        """√(1 − ᾱ) as √(sin(u − u₀)·sin(u + u₀))/cos u₀, without cancellation."""
        u = self._u(t)
        product = (u - self._u0).sin() * (u + self._u0).sin()
        return product.clamp_min(0).sqrt() / math.cos(self._u0)

    def dalpha(self, t: Tensor | float) -> Tensor:
        """−u′·sin u / cos u₀."""
        return -self._du * self._u(t).sin() / math.cos(self._u0)

    def dsigma(self, t: Tensor | float) -> Tensor:
        """−α·α′/σ."""
        if self.offset == 0:
            return self._du * self._u(t).cos()
        return -self.alpha(t) * self.dalpha(t) / self.sigma(t)

    def t_from_log_snr(self, log_snr: Tensor | float) -> Tensor:
        """u = arccos(√ᾱ·cos u₀)."""
        alpha = torch.sigmoid(_double(log_snr)).sqrt()
        u = (alpha * math.cos(self._u0)).clamp(-1, 1).acos()
        return ((u - self._u0) / self._du).clamp(self.t_min, self.t_max)


class Trig(NoiseSchedule):
    """α = cos t, σ = σ_data·sin t with the angle t in [0, π/2] (TrigFlow).

    Args:
        sigma_data: standard deviation of the data; the noise end is N(0, σ_data²).

    Source: Lu and Song, sCM, 2024. There z has standard deviation σ_data; here ε is standard normal.

    Example:
        >>> Trig(sigma_data=0.5).sigma(math.pi / 2)
        tensor(0.5000, dtype=torch.float64)
    """

    t_max = math.pi / 2

    def __init__(self, sigma_data: float = 1.0) -> None:
        self.sigma_data = _positive("sigma_data", sigma_data)
        self.variance_preserving = self.sigma_data == 1.0

    def alpha(self, t: Tensor | float) -> Tensor:
        """cos t."""
        return _double(t).cos()

    def sigma(self, t: Tensor | float) -> Tensor:
        """σ_data·sin t."""
        return self.sigma_data * _double(t).sin()

    def dalpha(self, t: Tensor | float) -> Tensor:
        """−sin t."""
        return -_double(t).sin()

    def dsigma(self, t: Tensor | float) -> Tensor:
        """σ_data·cos t."""
        return self.sigma_data * _double(t).cos()

    def t_from_log_snr(self, log_snr: Tensor | float) -> Tensor:
        """tan t = 1/(σ_data·α/σ)."""
        return torch.atan((-_double(log_snr) / 2).exp() / self.sigma_data)


class EDM(NoiseSchedule):
    """α = 1, σ = t: the native time is the noise level.

    Args:
        sigma_min: smallest level of the step schedules made for it.
        sigma_max: largest level.

    Source: Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models, 2022.
    """

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0) -> None:
        self.sigma_min = _positive("sigma_min", sigma_min)
        self.t_max = _positive("sigma_max", sigma_max)
        if sigma_max <= sigma_min:
            raise ValueError(f"sigma_max is {sigma_max}; it must exceed sigma_min = {sigma_min}")

    def alpha(self, t: Tensor | float) -> Tensor:
        """1."""
        return torch.ones_like(_double(t))

    def sigma(self, t: Tensor | float) -> Tensor:
        """t."""
        return _double(t)

    def dalpha(self, t: Tensor | float) -> Tensor:
        """0."""
        return torch.zeros_like(_double(t))

    def dsigma(self, t: Tensor | float) -> Tensor:
        """1."""
        return torch.ones_like(_double(t))

    def t_from_log_snr(self, log_snr: Tensor | float) -> Tensor:
        """exp(−log_snr/2)."""
        return (-_double(log_snr) / 2).exp().clamp(self.t_min, self.t_max)


class _Table(NoiseSchedule):
    """ᾱ at the indices 0 … N − 1, linear in log ᾱ between them; the native time is the index."""

    def __init__(self, alphas_bar: Sequence[float] | Tensor) -> None:
        table = torch.as_tensor(alphas_bar, dtype=torch.float64).clone()
        if table.dim() != 1 or len(table) < 2:
            raise ValueError(f"alphas_bar has shape {list(table.shape)}; give a list of at least 2 numbers")
        falls = bool((table[1:] < table[:-1]).all())
        if not (falls and float(table[-1]) > 0 and float(table[0]) < 1):
            raise ValueError("alphas_bar must fall strictly and lie inside (0, 1)")
        self._log = table.log()
        self.steps = len(table)
        self.t_max = float(self.steps - 1)

    @staticmethod
    def betas_linear(beta_start: float, beta_end: float, steps: int) -> Tensor:
        """ᾱ of DDPM's linear betas, [N] float64."""
        if not (0 < beta_start < beta_end < 1) or steps < 2:
            raise ValueError(
                f"beta_start, beta_end, steps are {beta_start}, {beta_end}, {steps}; "
                "they must satisfy 0 < beta_start < beta_end < 1 and steps ≥ 2"
            )
        betas = torch.linspace(beta_start, beta_end, steps, dtype=torch.float64)
        return torch.log1p(-betas).cumsum(0).exp()

    def alpha_bar(self, t: Tensor | float) -> Tensor:
        """ᾱ(t), float64."""
        return self._log_alpha_bar(t)[0].exp()

    def _log_alpha_bar(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """log ᾱ and its derivative by the index."""
        t = _double(t)
        table = self._log.to(t.device)
        low = t.detach().floor().clamp(0, self.steps - 2).long()
        slope = table[low + 1] - table[low]
        return table[low] + slope * (t - low), slope

    def t_from_log_snr(self, log_snr: Tensor | float) -> Tensor:
        """Inverse of the piecewise linear log ᾱ."""
        return self._index(torch.nn.functional.logsigmoid(_double(log_snr)))

    def _index(self, wanted: Tensor) -> Tensor:
        table = self._log.to(wanted.device)
        above = torch.searchsorted(-table, -wanted.contiguous()).clamp(1, self.steps - 1)
        low = above - 1
        t = low + (wanted - table[low]) / (table[above] - table[low])
        return t.clamp(self.t_min, self.t_max)


class DiscreteVP(_Table):
    """The variance-preserving table of DDPM: α = √ᾱ_t, σ = √(1 − ᾱ_t), t the index in [0, N − 1].

    Index 0 has a little noise already, as in DDPM. Times between two indices are interpolated linearly in
    log ᾱ (our choice), so that the derivative is piecewise.

    Args:
        alphas_bar: [N] falling numbers in (0, 1).

    Example:
        >>> schedule = DiscreteVP.linear(1e-4, 0.02, steps=1000)
        >>> round(float(schedule.alpha_bar(999)), 8)
        4.036e-05
    """

    variance_preserving = True

    @classmethod
    def linear(cls, beta_start: float = 1e-4, beta_end: float = 0.02, steps: int = 1000) -> DiscreteVP:
        """With linear betas."""
        return cls(cls.betas_linear(beta_start, beta_end, steps))

    def alpha(self, t: Tensor | float) -> Tensor:
        """√ᾱ."""
        return (self._log_alpha_bar(t)[0] / 2).exp()

    def sigma(self, t: Tensor | float) -> Tensor:
        """√(1 − ᾱ)."""
        return (-torch.expm1(self._log_alpha_bar(t)[0])).sqrt()

    def dalpha(self, t: Tensor | float) -> Tensor:
        """½·α·(log ᾱ)′."""
        log, slope = self._log_alpha_bar(t)
        return 0.5 * slope * (log / 2).exp()

    def dsigma(self, t: Tensor | float) -> Tensor:
        """−½·ᾱ·(log ᾱ)′/σ."""
        log, slope = self._log_alpha_bar(t)
        return -0.5 * slope * log.exp() / self.sigma(t)


class Local(_Table):
    """LiDiff's local process: x_t = p + σ_t·ε with σ_t = √(1 − ᾱ_t), so that α = 1 at every t.

    The point p, in metres, is not shrunk: the noise is an offset from it. t is the index in [0, N − 1].

    Args:
        alphas_bar: [N] falling numbers in (0, 1).

    Source: Nunes et al., LiDiff, CVPR 2024; its betas are 3.5e-5 … 0.007 over 1000 steps.

    Example:
        >>> schedule = Local.linear()
        >>> [round(float(schedule.sigma(t)), 3) for t in (0, 500, 999)]
        [0.006, 0.768, 0.985]
    """

    @classmethod
    def linear(cls, beta_start: float = 3.5e-5, beta_end: float = 0.007, steps: int = 1000) -> Local:
        """With linear betas; the defaults are LiDiff's."""
        return cls(cls.betas_linear(beta_start, beta_end, steps))

    def alpha(self, t: Tensor | float) -> Tensor:
        """1."""
        return torch.ones_like(_double(t))

    def sigma(self, t: Tensor | float) -> Tensor:
        """√(1 − ᾱ)."""
        return (-torch.expm1(self._log_alpha_bar(t)[0])).sqrt()

    def dalpha(self, t: Tensor | float) -> Tensor:
        """0."""
        return torch.zeros_like(_double(t))

    def dsigma(self, t: Tensor | float) -> Tensor:
        """−½·ᾱ·(log ᾱ)′/σ."""
        log, slope = self._log_alpha_bar(t)
        return -0.5 * slope * log.exp() / self.sigma(t)

    def t_from_log_snr(self, log_snr: Tensor | float) -> Tensor:
        """σ² = exp(−log_snr), hence ᾱ = 1 − σ²."""
        variance = (-_double(log_snr)).exp().clamp_max(1 - 1e-15)
        return self._index(torch.log1p(-variance))


def _mix(a: Tensor, x: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """a·x + b·y with coefficients [B]; the products of half precision are summed in float32."""
    if x.shape != y.shape:
        raise ValueError(f"shapes differ: {list(x.shape)} and {list(y.shape)}")
    wide = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
    mixed = like(a, x).to(wide) * x.to(wide) + like(b, x).to(wide) * y.to(wide)
    return mixed.to(x.dtype)


def _double(t: Tensor | float) -> Tensor:
    return torch.as_tensor(t, dtype=torch.float64) if not isinstance(t, Tensor) else t.to(torch.float64)


def _positive(name: str, value: float) -> float:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} is {value}; it must be a finite number > 0")
    return float(value)
