"""The critic of distribution matching: a fake-score network, and perhaps a discriminator on its features."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .denoiser import NetworkDenoiser
from .prediction import Prediction, convert
from .surrogates import dsm, score_matching_surrogate
from .times import TimeSampler


class Critic(nn.Module):
    """Follows the student's distribution by denoising score matching on its samples.

    Args:
        denoiser: the fake-score network, usually a copy of the teacher's.
        head: `head(features)` → logits `[B, …]`, a discriminator on the denoiser's features; None for none.
        features: layers that the head looks at.

    Example:
        >>> from stillhouse.core.diffusion import RectifiedFlow, UniformTimes
        >>> class Zero(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.scale = nn.Parameter(torch.zeros(()))
        ...     def forward(self, x, t, cond):
        ...         return self.scale * x
        >>> critic = Critic(NetworkDenoiser(Zero(), RectifiedFlow(), Prediction.X0))
        >>> generator = torch.Generator().manual_seed(0)
        >>> float(critic.loss(torch.ones(4, 2), UniformTimes(), generator=generator).detach())
        1.0
    """

    def __init__(
        self,
        denoiser: NetworkDenoiser,
        head: nn.Module | None = None,
        features: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        if head is not None and not features:
            raise ValueError("features is empty; name the layers that the head looks at")
        self.denoiser, self.head, self.features = denoiser, head, features

    def loss(
        self,
        fake: Tensor,
        times: TimeSampler | Tensor,
        cond: Any = None,
        *,
        weight: Callable[[Tensor], Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Denoising score matching on the student's samples, in the network's own kind of prediction.

        Args:
            fake: samples `[B, *S]`; their graph is cut.
            times: a sampler, or times `[B]`.
            cond: condition.
            weight: function of `t [B]` → `[B]`; None weighs all times alike.
            generator: for times and noise.

        Returns:
            Scalar.
        """
        fake = fake.detach()
        t = times if isinstance(times, Tensor) else times.sample(len(fake), generator)
        t = t.to(fake.device)
        eps = torch.randn(fake.shape, dtype=fake.dtype, device=fake.device, generator=generator)
        schedule, kind = self.denoiser.schedule, self.denoiser.prediction
        x_t = schedule.add_noise(fake, eps, t)
        target = convert(x_t, eps, t, Prediction.EPS, kind, schedule)
        if kind is Prediction.X0:
            target = fake
        elif kind is Prediction.FLOW:
            target = eps - fake
        weights = 1.0 if weight is None else weight(t)
        return dsm(self.denoiser(x_t, t, cond, out=kind), target, weights)

    def logits(self, x_t: Tensor, t: Tensor | float, cond: Any = None) -> Tensor:
        """The discriminator's logits at noised samples.

        Raises:
            ValueError: the critic has no head.
        """
        if self.head is None:
            raise ValueError("this critic has no head; give one to the constructor")
        _, *taken = self.denoiser(x_t, t, cond, features=self.features, out=self.denoiser.prediction)
        return self.head(taken[0])

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, gradients pass through the critic to its input and end in none of its parameters; their
        `.grad` is as it was."""
        wanted = [p for p in self.parameters() if p.requires_grad]
        for parameter in wanted:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in wanted:
                parameter.requires_grad_(True)


def distribution_matching(
    x: Tensor,
    teacher: Callable[..., Tensor],
    critic: Critic,
    times: TimeSampler | Tensor,
    cond: Any = None,
    *,
    normaliser: str = "dmd2",
    weight: Callable[[Tensor], Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """DMD's loss of the student: re-noise its sample, compare the critic's x₀ with the teacher's.

    Args:
        x: the student's samples `[B, *S]`, with their graph.
        teacher: a denoiser, guided or not, of the critic's schedule.
        critic: the fake score.
        times: a sampler, or times `[B]`.
        cond: condition of both.
        normaliser: see `score_matching_surrogate`.
        weight: function of `t [B]` → `[B]`.
        generator: for times and noise.

    Returns:
        Scalar; no gradient reaches teacher or critic.

    Source: Yin et al., DMD2, 2024.
    """
    with torch.no_grad():
        t = (times if isinstance(times, Tensor) else times.sample(len(x), generator)).to(x.device)
        eps = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
        x_t = critic.denoiser.schedule.add_noise(x.detach(), eps, t)
        real = teacher(x_t, t, cond, out=Prediction.X0)
        fake = critic.denoiser(x_t, t, cond, out=Prediction.X0)
        weights = 1.0 if weight is None else weight(t)
    return score_matching_surrogate(x, fake, real, weights, normaliser=normaliser)  # type: ignore[arg-type]
