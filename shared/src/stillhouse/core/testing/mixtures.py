"""A teacher without error: Gaussian mixtures, whose denoiser under any noise schedule is a closed form."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from stillhouse.core.diffusion.evaluations import tally
from stillhouse.core.diffusion.prediction import Prediction, convert
from stillhouse.core.diffusion.schedules import NoiseSchedule


class GaussianMixture:
    """Mixture of isotropic Gaussians, Σ_k w_k·N(μ_k, s_k²·I), in float64.

    Args:
        means: `[K, D]`, or `[K]` for one dimension.
        stds: s_k > 0, `[K]` or a number.
        weights: `[K]`, normalised; None for equal ones.

    Attributes:
        means, stds, weights: `[K, D]`, `[K]`, `[K]` float64.

    Example:
        >>> ring = GaussianMixture.ring()
        >>> ring.sample(5, torch.Generator().manual_seed(0)).shape
        torch.Size([5, 2])
    """

    def __init__(self, means: Any, stds: Any = 1.0, weights: Any = None) -> None:
        means = torch.as_tensor(means, dtype=torch.float64)
        self.means = means[:, None] if means.dim() == 1 else means
        if self.means.dim() != 2 or not len(self.means):
            raise ValueError(f"means has shape {list(means.shape)}; give [K, D] or [K] with K ≥ 1")
        count = len(self.means)
        self.stds = torch.as_tensor(stds, dtype=torch.float64).expand(count).clone()
        if not bool((self.stds > 0).all()):
            raise ValueError(f"stds is {self.stds.tolist()}; each must be > 0")
        given = torch.ones(count) if weights is None else torch.as_tensor(weights)
        if given.shape != (count,) or not bool((given > 0).all()):
            raise ValueError(f"weights must be {count} numbers > 0, one a component")
        self.weights = given.double() / given.double().sum()

    @classmethod
    def two(cls) -> GaussianMixture:
        """Two components on a line: weights 0.3 and 0.7, means −2 and 1, deviations 0.3 and 0.5."""
        return cls([-2.0, 1.0], [0.3, 0.5], [0.3, 0.7])

    @classmethod
    def ring(
        cls, modes: int = 8, radius: float = 2.0, std: float = 0.15, *, weights: Any = None
    ) -> GaussianMixture:
        """Equal Gaussians on a circle in the plane; `weights=range(1, 9)` makes them unequal."""
        angle = 2 * math.pi * torch.arange(modes, dtype=torch.float64) / modes
        means = radius * torch.stack([angle.cos(), angle.sin()], 1)
        return cls(means, std, None if weights is None else list(weights))

    @property
    def dim(self) -> int:
        """D."""
        return self.means.shape[1]

    @property
    def mean(self) -> Tensor:
        """E x, `[D]`."""
        return self.weights @ self.means

    @property
    def std(self) -> float:
        """√(E‖x − E x‖²/D)."""
        square = (self.means - self.mean).square().sum(1) + self.dim * self.stds.square()
        return math.sqrt(float(self.weights @ square) / self.dim)

    def scaled(self, factor: float) -> GaussianMixture:
        """The distribution of factor·x."""
        return GaussianMixture(factor * self.means, abs(factor) * self.stds, self.weights)

    def only(self, component: int) -> GaussianMixture:
        """One component alone: the conditional distribution of its class."""
        return GaussianMixture(self.means[component : component + 1], self.stds[component : component + 1])

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """`[count, D]` float64."""
        return self.sample_with_labels(count, generator)[0]

    def sample_with_labels(
        self, count: int, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Samples `[count, D]` and the component of each, int64 `[count]`."""
        labels = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, self.dim, generator=generator, dtype=torch.float64)
        return self.means[labels] + self.stds[labels, None] * noise, labels

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x), `[B]`."""
        square = (x.double()[:, None] - self.means).square().sum(2)
        constant = 0.5 * self.dim * (2 * math.pi * self.stds.square()).log()
        return (self.weights.log() - 0.5 * square / self.stds.square() - constant).logsumexp(1)

    def noised(self, schedule: NoiseSchedule, t: float) -> GaussianMixture:
        """The marginal of x_t = α·x₀ + σ·ε."""
        alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
        variance = (alpha * self.stds).square() + sigma**2
        return GaussianMixture(alpha * self.means, variance.sqrt(), self.weights)

    def posterior_mean(
        self, x_t: Tensor, alpha: Tensor, sigma: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        """E[x₀ | x_t], float64.

        Args:
            x_t: `[B, D]`.
            alpha: α `[B]`.
            sigma: σ `[B]`.
            labels: component of each sample `[B]`, −1 for the whole mixture; None for that throughout.
        """
        share, gap, spreads = self._responsibilities(x_t, alpha, sigma, labels)
        gain = alpha[:, None] * self.stds.square() / spreads
        return (share[..., None] * (self.means + gain[..., None] * gap)).sum(1)

    def _responsibilities(
        self, x_t: Tensor, alpha: Tensor, sigma: Tensor, labels: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """P(k | x_t) `[B, K]`, x_t − α·μ_k `[B, K, D]`, variances of the noised components `[B, K]`."""
        a, s = alpha[:, None], sigma[:, None]
        spreads = (a * self.stds).square() + s.square()
        gap = x_t.double()[:, None] - a[..., None] * self.means
        joint = self.weights.log() - 0.5 * (gap.square().sum(2) / spreads + self.dim * spreads.log())
        if labels is not None:
            own = torch.arange(len(self.means)) == labels[:, None]
            joint = joint.masked_fill(~(own | (labels[:, None] < 0)), -math.inf)
        return joint.softmax(1), gap, spreads

    def denoiser(self, schedule: NoiseSchedule, prediction: Prediction = Prediction.X0) -> Oracle:
        """The exact denoiser of this mixture under a schedule."""
        return Oracle(self, schedule, prediction)

    def cdf(self, x: Tensor) -> Tensor:
        """P(X ≤ x) in one dimension, in the shape of x."""
        self._one_dimension()
        z = (x.double()[..., None] - self.means[:, 0]) / self.stds
        return (self.weights * torch.special.ndtr(z)).sum(-1)

    def transport(self, x: Tensor, source: GaussianMixture) -> Tensor:
        """The increasing map that takes `source` to this mixture, in one dimension, by bisection to 1e-14.

        The probability-flow ODE in one dimension keeps the order of points, so that this is its exact flow
        map from the marginal at one time to that at another.

        Args:
            x: points of `source`, any shape.
            source: the distribution of x.
        """
        self._one_dimension()
        # work from the nearer tail: 1 − 1e-17 is 1
        target = source.cdf(x)
        upper = source.scaled(-1.0).cdf(-x.double())
        reach = 40 * self.stds.max()
        low = torch.full_like(target, float(self.means.min() - reach))
        high = torch.full_like(target, float(self.means.max() + reach))
        mirrored = self.scaled(-1.0)
        for _ in range(80):
            middle = (low + high) / 2
            below = torch.where(target < 0.5, self.cdf(middle) < target, mirrored.cdf(-middle) > upper)
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def flow_map(self, x_t: Tensor, t: float, s: float, schedule: NoiseSchedule) -> Tensor:
        """x_s of the exact probability-flow ODE from x_t, in one dimension; any shape."""
        return self.noised(schedule, s).transport(x_t, self.noised(schedule, t))

    def _one_dimension(self) -> None:
        if self.dim != 1:
            raise ValueError(f"the mixture has {self.dim} dimensions; this is for one")


class Oracle:
    """The exact denoiser of a mixture; conditions are {"label": int `[B]`}, −1 for none.

    Args:
        mixture: the data.
        schedule: the noise.
        prediction: what `out` is by default in conversions.
    """

    schedule: NoiseSchedule
    prediction: Prediction

    def __init__(self, mixture: GaussianMixture, schedule: NoiseSchedule, prediction: Prediction) -> None:
        self.mixture, self.schedule, self.prediction = mixture, schedule, prediction

    def __call__(
        self, x_t: Tensor, t: Tensor | float, cond: Any = None, *, out: Prediction = Prediction.X0
    ) -> Tensor:
        """Exact prediction of kind `out`, `[B, D]`, in the dtype of x_t."""
        tally()
        time = torch.as_tensor(t, dtype=torch.float64).expand(len(x_t))
        labels = None if cond is None else cond["label"]
        alpha, sigma = self.schedule.alpha(time), self.schedule.sigma(time)
        x0 = self.mixture.posterior_mean(x_t, alpha, sigma, labels)
        if out is Prediction.EPS and bool((sigma < 1e-3).any()):
            # (x − α·x₀)/σ cancels where σ is small; −σ·score does not
            return (-sigma[:, None] * self.score(x_t, time, labels)).to(x_t.dtype)
        return convert(x_t.double(), x0, time, Prediction.X0, out, self.schedule).to(x_t.dtype)

    def score(self, x_t: Tensor, t: Tensor | float, labels: Tensor | None = None) -> Tensor:
        """∇ log p_t(x_t) = −Σ_k P(k | x_t)·(x_t − α·μ_k)/variance_k, `[B, D]` float64."""
        time = torch.as_tensor(t, dtype=torch.float64).expand(len(x_t))
        share, gap, spreads = self.mixture._responsibilities(
            x_t, self.schedule.alpha(time), self.schedule.sigma(time), labels
        )
        return -(share[..., None] * gap / spreads[..., None]).sum(1)
