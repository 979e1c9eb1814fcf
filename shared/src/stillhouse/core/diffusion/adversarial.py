"""Adversarial terms and what else moves a critic's logits: gan_g, gan_d, r1, f-distill weights, kl_logits."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Divergence = Literal["rkl", "kl", "js", "sf", "neyman", "sh", "jf"]


def gan_g(fake: Tensor) -> Tensor:
    """Non-saturating loss of the generator, mean softplus(−C(fake)); logits in any shape.

    Example:
        >>> round(gan_g(torch.zeros(3)).item(), 4)
        0.6931
    """
    return F.softplus(-fake).mean()


def gan_d(real: Tensor, fake: Tensor) -> Tensor:
    """Loss of the discriminator, mean softplus(−C(real)) + mean softplus(C(fake))."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def r1(logits: Tensor, x: Tensor) -> Tensor:
    """Mean over samples of ‖∂C/∂x‖² at real data.

    Args:
        logits: the discriminator's answer to `x`, with its graph; the first axis is that of the samples.
        x: `[B, *S]`, which needs a gradient.

    Returns:
        Scalar; weigh it with γ/2.

    Source: Mescheder et al., Which Training Methods for GANs do actually Converge?, ICML 2018.

    Raises:
        ValueError: `x` needs no gradient.
    """
    if not x.requires_grad:
        raise ValueError("x needs no gradient; call x.requires_grad_() before the discriminator sees it")
    (gradient,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
    return gradient.flatten(1).square().sum(1).mean()


def f_weight(logits: Tensor, divergence: Divergence) -> Tensor:
    """h(r) of f-distill with r = exp(logit), normalised to mean 1: turns the reverse KL of DMD into another
    divergence.

    Args:
        logits: discriminator logits log(p_data/p_student), `[B]`.
        divergence: "rkl" 1, "kl" r, "js" 1 − 1/(1 + r), "sf" 1/(1 + r), "neyman" 1/r, "sh" √r, "jf" 1 + r.

    Returns:
        `[B]` weights without gradient.

    Source: f-distill as in NVlabs/FastGen; its average of r over bins of t is left out.
    """
    r = logits.detach().exp()
    weights = {
        "rkl": torch.ones_like(r),
        "kl": r,
        "js": r / (1 + r),
        "sf": 1 / (1 + r),
        "neyman": 1 / r,
        "sh": r.sqrt(),
        "jf": 1 + r,
    }
    if divergence not in weights:
        raise ValueError(f"divergence is {divergence!r}; allowed: {', '.join(map(repr, weights))}")
    return weights[divergence] / weights[divergence].mean()


def kl_logits(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """KL(teacher ‖ student) of logits `[..., V]`, mean over the positions of `mask [...]`; for discrete
    diffusion.

    The full set of divergences is in `stillhouse.core.losses`.
    """
    from ..losses import forward_kl

    return forward_kl(student, teacher, mask=mask)
