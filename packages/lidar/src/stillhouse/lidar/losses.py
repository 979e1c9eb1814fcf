"""Objectives of the LiDAR distillers, as functions of tensors.

`noise_loss` trains the teacher (LiDiff), `diffusion_dpo_loss` tunes it by preference, `distillation_dpo_loss`
and `vsd_loss` distil it, `scene_loss` and `point_loss` are ScoreLiDAR's structural terms.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from stillhouse.core.diffusion import vsd_surrogate

from .nearest import nearest

PairWeight = Literal["none", "sigmoid"]


class NoiseLoss(NamedTuple):
    """Parts of the teacher's loss, each a scalar."""

    total: Tensor
    noise: Tensor
    moments: Tensor


def noise_loss(predicted: Tensor, eps: Tensor, *, moment: float = 5.0) -> NoiseLoss:
    """mean (ε̂ − ε)² + λ·[(mean ε̂)² + (std ε̂ − 1)²], mean and std over the whole tensor.

    Args:
        predicted: ε̂ `[B, N, 3]`.
        eps: the noise that was added.
        moment: λ ≥ 0.

    Source: PRBonn/LiDiff models.py, λ = 5.

    Example:
        >>> eps = torch.tensor([[[1.0, -1.0, 0.0], [1.0, -1.0, 0.0]]])
        >>> float(noise_loss(eps, eps, moment=0.0).total)
        0.0
    """
    if predicted.shape != eps.shape:
        raise ValueError(f"predicted has shape {list(predicted.shape)}, eps {list(eps.shape)}")
    if not moment >= 0:
        raise ValueError(f"moment is {moment}; it must be ≥ 0")
    noise = (predicted - eps).square().mean()
    moments = predicted.mean().square() + (predicted.std() - 1).square()
    return NoiseLoss(noise + moment * moments, noise, moments)


def diffusion_dpo_loss(
    winner: Tensor,
    loser: Tensor,
    reference_winner: Tensor,
    reference_loser: Tensor,
    *,
    beta: float = 1.0,
) -> Tensor:
    """−log σ(−β·[(e_w − e_w^ref) − (e_l − e_l^ref)]), mean over the batch; each e is ‖ε − ε̂‖², `[B]`.

    Args:
        winner: error of the network that is tuned on the noised winner, mean over points and axes.
        loser: the same on the loser.
        reference_winner: error of the frozen reference network on the winner.
        reference_loser: the same on the loser.
        beta: βT > 0; no value for this domain is public.

    Source: Wallace et al., Diffusion-DPO, 2023 (from memory, not checked against the paper).

    Example:
        >>> e = torch.tensor([0.4])
        >>> bool(torch.isclose(diffusion_dpo_loss(e, e, e, e), torch.tensor(math.log(2))))
        True
    """
    if not beta > 0:
        raise ValueError(f"beta is {beta}; it must be > 0")
    gap = (winner - reference_winner.detach()) - (loser - reference_loser.detach())
    return F.softplus(beta * gap).mean()


def vsd_loss(x: Tensor, g: Tensor, *, omega: Tensor | float = 1.0) -> Tensor:
    """mean(sg(g)·x) with g = ε_teacher − ε_aux: its gradient is the descent on KL(student ‖ teacher).

    Args:
        x: generated points `[B, N, 3]`, with their graph.
        g: difference of the noise predictions at the noised points.
        omega: ω(t), a number or `[B]`.
    """
    return vsd_surrogate(g, x, weight=omega)


def distillation_dpo_loss(
    x_w: Tensor,
    x_l: Tensor,
    g_w: Tensor,
    g_l: Tensor,
    *,
    loser_weight: float = 0.25,
    anchor: float = 0.0,
    pair_weight: PairWeight | Tensor = "none",
    beta: float = 1.0,
    omega: Tensor | float = 1.0,
    compat: Literal["intended", "reference"] = "intended",
    noised_w: Tensor | None = None,
    noised_l: Tensor | None = None,
) -> Tensor:
    """k·[mean(sg(g_w)·x_w) − λ·mean(sg(g_l)·x_l)] + anchor·mean(sg(g_w)·x_w).

    The gradient is that of Distillation-DPO as its factors mean it (our reading): towards the teacher on the
    winner, away from it on the loser. With λ = 1 and no anchor the objective has no lower bound: in a model
    that can be solved by hand the student's spread grows for ever. λ = 0 is plain VSD on the winner.

    Args:
        x_w: winners `[B, N, 3]`, with their graph.
        x_l: losers.
        g_w: ε_teacher − ε_aux_w at the noised winners; no gradient flows through it.
        g_l: ε_teacher − ε_aux_l at the noised losers.
        loser_weight: λ ≥ 0; the release has 1.
        anchor: weight ≥ 0 of an additional VSD term on the winner.
        pair_weight: k: "none" is 1; "sigmoid" is `fisher_weight` of each pair; or a tensor `[B]`.
        beta: slope of the sigmoid.
        omega: ω(t), a number or `[B]`.
        compat: "reference" multiplies by (noised − generated) as the released code does. The generator
            cancels in it, so that its gradient is exactly zero: kept to show that, and for nothing else.
        noised_w: the noised winners *with their graph*, for "reference".
        noised_l: the noised losers.

    Returns:
        Scalar; its value means nothing.

    Example:
        >>> x = torch.zeros(1, 1, 3, requires_grad=True)
        >>> g = torch.ones(1, 1, 3)
        >>> loss = distillation_dpo_loss(x, 1.1 * x, g, 2 * g, loser_weight=0.0)
        >>> torch.autograd.grad(loss, x)[0].tolist()
        [[[0.3333333432674408, 0.3333333432674408, 0.3333333432674408]]]
    """
    for name, value in (("loser_weight", loser_weight), ("anchor", anchor)):
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{name} is {value}; it must be a finite number ≥ 0")
    if not x_w.shape == x_l.shape == g_w.shape == g_l.shape:
        shapes = [list(x.shape) for x in (x_w, x_l, g_w, g_l)]
        raise ValueError(f"x_w, x_l, g_w, g_l have shapes {shapes}; they must be equal")
    if compat not in ("intended", "reference"):
        raise ValueError(f"compat is {compat!r}; allowed: 'intended', 'reference'")
    if compat == "reference":
        if noised_w is None or noised_l is None:
            raise ValueError("compat='reference' needs noised_w and noised_l")
        x_w, x_l = noised_w - x_w, noised_l - x_l
    if isinstance(pair_weight, Tensor):
        pairs: Tensor | float = pair_weight.detach()
    elif pair_weight == "sigmoid":
        pairs = fisher_weight(g_w, g_l, beta=beta)
    elif pair_weight == "none":
        pairs = 1.0
    else:
        raise ValueError(f"pair_weight is {pair_weight!r}; allowed: 'none', 'sigmoid', or a tensor [B]")
    both = pairs * omega
    loss = vsd_surrogate(g_w, x_w, weight=both)
    if loser_weight:
        loss = loss - loser_weight * vsd_surrogate(g_l, x_l, weight=both)
    if anchor:
        loss = loss + anchor * vsd_surrogate(g_w, x_w, weight=omega)
    return loss


@torch.no_grad()
def fisher_weight(g_w: Tensor, g_l: Tensor, *, beta: float = 1.0) -> Tensor:
    """σ(β·(mean g_w² − mean g_l²)) of each pair, `[B]`: fades once the loser is worse off than the winner.

    The gap of the Fisher divergences from the teacher, estimated at one time and one noise; a device of ours
    that keeps the preference term bounded.
    """
    gap = g_w.float().square().flatten(1).mean(1) - g_l.float().square().flatten(1).mean(1)
    return torch.sigmoid(beta * gap)


def scene_loss(generated: Tensor, full: Tensor, *, match: Literal["index", "nearest"] = "nearest") -> Tensor:
    """ScoreLiDAR's scene term: mean squared difference of coordinates of generated and true points.

    Args:
        generated: `[B, N, 3]`, with its graph.
        full: ground truth `[B, M, 3]`.
        match: "index" compares the i-th points of the two lists as the reference does, although their orders
            have nothing to do with each other (needs M = N); "nearest" each generated point with the nearest
            true one (ours).

    Returns:
        Scalar.
    """
    if match == "index":
        if generated.shape != full.shape:
            raise ValueError(
                f"match='index' needs equal shapes, got {list(generated.shape)} and {list(full.shape)}"
            )
        return F.mse_loss(generated, full)
    if match != "nearest":
        raise ValueError(f"match is {match!r}; allowed: 'index', 'nearest'")
    partners = [q[nearest(p.detach(), q)] for p, q in zip(generated, full, strict=True)]
    return F.mse_loss(generated, torch.stack(partners))


@torch.no_grad()
def keypoints(
    full: Tensor,
    *,
    share: float = 0.1,
    neighbours: int = 180,
    keep: float = 1 / 3,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Indices of points where the surface bends: e_min/Σe of the neighbours' covariance, the highest third.

    Args:
        full: one cloud `[M, 3]`.
        share: random subset that is looked at, in (0, 1].
        neighbours: k of the covariance, the point itself included; cut to the size of the subset.
        keep: share of the subset that is kept, in (0, 1].
        generator: for the subset.

    Returns:
        int64 `[K]` indices into `full`, K ≥ 1.

    Source: happyw1nd/ScoreLiDAR models.py: a tenth, 180 neighbours, a third.
    """
    from scipy.spatial import cKDTree

    if full.dim() != 2 or full.shape[1] != 3 or not len(full):
        raise ValueError(f"full has shape {list(full.shape)}; give [M, 3] with M ≥ 1")
    for name, value in (("share", share), ("keep", keep)):
        if not 0 < value <= 1:
            raise ValueError(f"{name} is {value}; it must lie in (0, 1]")
    device = "cpu" if generator is None else generator.device
    count = max(1, round(share * len(full)))
    chosen = torch.randperm(len(full), generator=generator, device=device)[:count].to(full.device)
    cloud = full[chosen].double().cpu()
    k = min(neighbours, count)
    index = torch.from_numpy(cKDTree(cloud.numpy()).query(cloud.numpy(), k=k)[1]).reshape(count, k)
    local = cloud[index]
    local = local - local.mean(1, keepdim=True)
    values = torch.linalg.eigvalsh(local.transpose(1, 2) @ local)
    curvature = values[:, 0] / values.sum(1).clamp_min(1e-12)
    top = curvature.topk(max(1, round(keep * count))).indices
    return chosen[top.to(full.device)]


def point_loss(
    generated: Tensor,
    full: Tensor,
    indices: Tensor,
    *,
    match: Literal["index", "nearest"] = "nearest",
    most: int = 1024,
) -> Tensor:
    """ScoreLiDAR's point term: mean squared difference of the keypoints' distance matrices.

    Args:
        generated: one cloud `[N, 3]`, with its graph.
        full: its ground truth `[M, 3]`.
        indices: keypoints of `full`, `[K]`.
        match: "index" takes the same indices of the generated list (the reference; needs K's indices < N),
            "nearest" the generated points next to the keypoints (ours).
        most: keypoints that are used at most; the matrices have this side.

    Returns:
        Scalar.
    """
    indices = indices[:most]
    anchors = full[indices]
    if match == "nearest":
        indices = nearest(anchors, generated.detach())
    elif match != "index":
        raise ValueError(f"match is {match!r}; allowed: 'index', 'nearest'")
    elif int(indices.max()) >= len(generated):
        raise ValueError(f"match='index' needs indices below the {len(generated)} generated points")
    return F.mse_loss(_distances(generated[indices]), _distances(anchors))


def _distances(x: Tensor) -> Tensor:
    square = (x[:, None] - x[None]).square().sum(-1)
    zero = square == 0
    return torch.where(
        zero, torch.zeros_like(square), torch.where(zero, torch.ones_like(square), square).sqrt()
    )
