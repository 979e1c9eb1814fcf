"""Contrastive losses: the student must tell its own teacher embedding from those of other items.

`info_nce` takes its negatives from the batch, `CRD` from a memory of the whole training set
(noise-contrastive estimation, another objective), `mi_alpha` is the family of mutual-information bounds
between InfoNCE and NWJ.

When to use: where the student's embedding must tell items apart. `info_nce` with batches of hundreds, `CRD`
where batches are small and items can be numbered, `mi_alpha_loss` to trade the bias of the one for the
variance of the other.

Legend: B items, K rows of a square score matrix, D embedding width, M negatives.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._geometry import check_embeddings, check_same_width, unit
from ._reduction import (
    Reduction,
    check_floating,
    check_reduction,
    check_temperature,
    full_precision,
    reduce_rows,
    upcast,
)


def info_nce(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 0.07,
    negatives: Tensor | None = None,
    symmetric: bool = False,
    reduction: Reduction = "token_mean",
    num_items: int | Tensor | None = None,
) -> Tensor:
    """In-batch InfoNCE: cross-entropy of picking the own teacher embedding among those of the batch.

    s_ij = cos(f_S,i, f_T,j) / τ;  loss = mean_i −log softmax_j(s_i·)_i.

    Args:
        student: [B, D].
        teacher: [B, D], row i the same item; no gradient flows into it.
        temperature: τ > 0.
        negatives: further teacher embeddings [M, D] that are nobody's positive, for example a queue;
            detached.
        symmetric: average with the direction teacher → student (its negatives are the student's embeddings of
            the batch).
        reduction: over the B items: "token_mean", "sum", "batch_mean" or "none" ([B]).
        num_items: global number of items, for "token_mean" over accumulation steps or ranks. Negatives stay
            local to the call: gathering embeddings over ranks is the caller's decision.

    Returns:
        Scalar ≥ 0, or [B]; log(B + M) when all scores are equal.

    Raises:
        TypeError: not floating point.
        ValueError: shapes that do not fit, or temperature ≤ 0.

    Source: van den Oord et al., "Representation Learning with Contrastive Predictive Coding", 2018.

    Relations to sibling losses: log B − loss (plain form) is `mi_alpha` at α = 1 without leave-one-out, which
    the batch size caps at log B; `CRD` takes thousands of negatives from a memory instead.

    Example:
        >>> info_nce(torch.eye(4), torch.eye(4), temperature=0.05).item() < 1e-6
        True
        >>> round(info_nce(torch.ones(4, 3), torch.ones(4, 3)).item() / math.log(4), 5)
        1.0
    """
    check_same_width(student, teacher)
    check_embeddings(student, teacher)
    check_temperature(temperature, torch.Size(()))
    check_reduction(reduction, num_items)
    student, teacher = upcast(student, teacher.detach())
    student, teacher = unit(student), unit(teacher)
    candidates = teacher
    if negatives is not None:
        check_floating("negatives", negatives)
        if negatives.dim() != 2 or negatives.shape[1] != teacher.shape[1]:
            raise ValueError(f"negatives must be [M, {teacher.shape[1]}], got shape {list(negatives.shape)}")
        candidates = torch.cat([teacher, unit(negatives.detach().to(teacher))])
    with full_precision(student.device):
        scores = student @ candidates.mT / temperature
    target = torch.arange(student.shape[0], device=student.device)
    rows = F.cross_entropy(scores, target, reduction="none")
    if symmetric:
        back = scores[:, : teacher.shape[0]].mT
        rows = 0.5 * (rows + F.cross_entropy(back, target, reduction="none"))
    return reduce_rows(rows, mask=None, shape=rows.shape, reduction=reduction, num_items=num_items)


def mi_alpha(
    scores: Tensor,
    alpha: float,
    log_baseline: float | Tensor = 0.0,
    *,
    leave_one_out: bool = True,
) -> Tensor:
    """Interpolated lower bound of mutual information from a critic's scores on one batch, to be *maximised*.

    With f_ij = scores[i, j] the critic of anchor y_i and candidate x_j (x_i belongs to y_i) and
    a_i = α · mean_j e^{f_ij} + (1 − α) · q(y_i):

    I_α = 1 + mean over pairs of log(e^{f_ii} / a_i) − mean over non-pairs of e^{f_ij} / a_i.

    α = 1 is InfoNCE (low variance, cannot exceed the log of the number of candidates), α = 0 is TUBA / NWJ
    (unbiased in the limit of a perfect critic, high variance). Everything is computed in the log domain.

    Args:
        scores: f [K, K], K ≥ 2 (≥ 3 with leave_one_out), raw critic values (not probabilities).
        alpha: α in [0, 1].
        log_baseline: log q(y), a number or [K] (a learned baseline gets gradients). Any value gives a valid
            bound; with 0 the best critic is the log density ratio log p(x|y)/p(x), with 1 it is NWJ's, 1 +
            that.
        leave_one_out: how the mean inside a_i is taken.
            True (default; Poole et al.): over K − 1 candidates in both terms, leaving out one negative for
            the pairs and the positive for the non-pairs, so that the anchors of the second term are
            independent of the candidates. A valid bound at every α; at most log(K − 1) at α = 1.
            False: over all K candidates, and the second mean runs over all K² entries, pairs included. At
            α = 1 this is exactly log K − InfoNCE, at most log K; at α < 1 the pairs in the second term bias
            it (downwards when pairs score higher than non-pairs).

    Returns:
        Scalar, in nats. Use its negative as a loss (`mi_alpha_loss`).

    Raises:
        TypeError: scores not floating point.
        ValueError: scores not square or too small, α outside [0, 1], or a baseline of another shape.

    Source: Poole et al., "On Variational Bounds of Mutual Information", ICML 2019, the interpolated bound;
    used as an intermediate-layer KD objective (MI-α) by He et al., "Distiller", SustaiNLP 2021. The form here
    follows the former; that it is the latter's to the letter is our reading.

    Relations to sibling losses: see `info_nce`.

    Example:
        >>> scores = 10 * torch.eye(4)
        >>> round(mi_alpha(scores, 1.0, leave_one_out=False).item() / math.log(4), 3)
        1.0
    """
    check_floating("scores", scores)
    least = 3 if leave_one_out else 2
    if scores.dim() != 2 or scores.shape[0] != scores.shape[1] or scores.shape[0] < least:
        raise ValueError(f"scores must be square [K, K] with K ≥ {least}, got shape {list(scores.shape)}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha} must lie in [0, 1]")
    (scores,) = upcast(scores)
    items = scores.shape[0]
    baseline = torch.as_tensor(log_baseline, dtype=scores.dtype, device=scores.device)
    if baseline.shape not in (torch.Size(()), torch.Size((items,))):
        raise ValueError(f"log_baseline must be a number or [{items}], got shape {list(baseline.shape)}")
    baseline = baseline.expand(items)[:, None]
    positive = scores.diagonal()
    if not leave_one_out:
        log_mean = scores.logsumexp(1, keepdim=True) - math.log(items)
        log_a = _interpolate(log_mean, baseline, alpha)
        joint = (positive - log_a[:, 0]).mean()
        return 1 + joint - (scores - log_a).flatten().logsumexp(0).sub(2 * math.log(items)).exp()
    log_a = _interpolate(
        _log_loo_sum(scores) - math.log(items - 1), baseline, alpha
    )  # [i, j]: without candidate j
    off = ~torch.eye(items, dtype=torch.bool, device=scores.device)
    joint = (positive[:, None] - log_a)[off].mean()
    ratios = (scores - log_a.diagonal()[:, None])[off]
    return 1 + joint - (ratios.logsumexp(0) - math.log(items * (items - 1))).exp()


def mi_alpha_loss(
    scores: Tensor,
    alpha: float,
    log_baseline: float | Tensor = 0.0,
    *,
    leave_one_out: bool = True,
) -> Tensor:
    """Minus `mi_alpha`: the loss of a critic and of the student features it reads.

    Args:
        scores: f [K, K] of (student anchor, teacher candidate); detach the teacher's features before the
            critic.
        alpha: see `mi_alpha`.
        log_baseline: see `mi_alpha`.
        leave_one_out: see `mi_alpha`.

    Returns:
        Scalar; negative once the bound is positive.

    Raises:
        TypeError: scores not floating point.
        ValueError: as `mi_alpha`.

    Example:
        >>> mi_alpha_loss(10 * torch.eye(5), 0.5).item() < 0
        True
    """
    return -mi_alpha(scores, alpha, log_baseline, leave_one_out=leave_one_out)


def _interpolate(log_mean: Tensor, log_baseline: Tensor, alpha: float) -> Tensor:
    if alpha == 1:
        return log_mean
    if alpha == 0:
        return log_baseline.expand_as(log_mean)
    return torch.logaddexp(math.log(alpha) + log_mean, math.log1p(-alpha) + log_baseline)


def _log_loo_sum(scores: Tensor) -> Tensor:
    """[i, j] = log Σ_{k≠j} e^{s_ik}, without the cancellation of subtracting a dominant term.

    Leaving out anything but the row's largest entry subtracts at most half of the sum; the sum without the
    largest is taken on its own.
    """
    largest = F.one_hot(scores.detach().argmax(1), scores.shape[1]).bool()
    total = scores.logsumexp(1, keepdim=True)
    without_largest = scores.masked_fill(largest, -math.inf).logsumexp(1, keepdim=True)
    share = torch.where(largest, -math.inf, scores - total).exp()  # ≤ ½, and 0 where it is not used
    return torch.where(largest, without_largest, total + torch.log1p(-share))


class CRD(nn.Module):
    """Contrastive representation distillation with memory banks.

    Both sides are embedded (linear, L2-normalised) and contrasted with the other side's memory. With m
    negatives per item, h(u, v) = e^{⟨u, v⟩/τ} / Z and P_n = 1/n for n training items,

    loss_side = mean_i [ −log h_i0 / (h_i0 + m·P_n) − Σ_{k=1..m} log m·P_n / (h_ik + m·P_n) ],

    and the loss is the sum of both sides: the student's embedding against the teacher's memory and vice
    versa. After the loss is formed, in training mode, the items' memory entries move: v ← unit(μ·v + (1 −
    μ)·embedding).

    Args:
        student_dim: width Ds of the student's features.
        teacher_dim: width Dt of the teacher's features.
        items: n, size of the training set; `index` counts 0 … n−1.
        dim: width of the embedding space.
        negatives: m, drawn uniformly with replacement from the other items for every item of every batch.
        temperature: τ > 0.
        momentum: μ in [0, 1].
        normalizer: Z. "first_batch": n · mean of e^{⟨u,v⟩/τ} over the first batch, kept from then on (the
            authors' rule; `reset_normalizer()` estimates it anew); "batch": the same from every batch; a
            number: that value.
        seed: of the memories' initial values and of the negatives, which depend on (seed, number of the draw)
            alone.

    Shapes: forward(student [B, Ds], teacher [B, Dt], index int64 [B], contrast int64 [B, m] or None) →
    scalar. `contrast` names the negatives, for example items of other classes; None draws them.

    Raises:
        TypeError: features not floating point, or indices not int64.
        ValueError: an argument out of its range, shapes that do not fit, or an index outside 0 … n−1.

    Source: Tian et al., "Contrastive Representation Distillation", ICLR 2020, and the authors' code.
    Deviations: the loss is computed in the log domain, without the code's ε = 1e-7; Z, the memories and the
    count of draws are in the state_dict, so that a resumed run goes on with the same negatives; negatives
    never equal the positive (the code's uniform sampler may return it); the module runs on any device;
    memories stay untouched in eval mode.

    Memory: 2·n·dim floats for the banks, and 2·B·(m + 1)·dim during a step. The banks are buffers of one
    process: under data parallelism every rank keeps its own.

    Relations to sibling losses: `info_nce` needs no dataset index and no memory, but has only B − 1
    negatives.

    Example:
        >>> crd = CRD(8, 16, items=100, dim=4, negatives=10)
        >>> crd(torch.randn(5, 8), torch.randn(5, 16), torch.arange(5)).shape
        torch.Size([])
    """

    student_memory: Tensor
    teacher_memory: Tensor
    log_z: Tensor
    draws: Tensor

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        items: int,
        *,
        dim: int = 128,
        negatives: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
        normalizer: Literal["first_batch", "batch"] | float = "first_batch",
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("student_dim", student_dim, 1),
            ("teacher_dim", teacher_dim, 1),
            ("items", items, 2),
            ("dim", dim, 1),
            ("negatives", negatives, 1),
        ):
            if value < least:
                raise ValueError(f"{name}={value} must be at least {least}")
        if not temperature > 0:
            raise ValueError(f"temperature={temperature} must be > 0")
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum={momentum} must lie in [0, 1]")
        if isinstance(normalizer, str):
            if normalizer not in ("first_batch", "batch"):
                raise ValueError(
                    f"normalizer={normalizer!r} is unknown; allowed: first_batch, batch, or a number > 0"
                )
        elif not normalizer > 0:
            raise ValueError(f"normalizer={normalizer} must be > 0")
        self.items = items
        self.negatives = negatives
        self.temperature = temperature
        self.momentum = momentum
        self.normalizer = normalizer
        self.seed = seed
        self.student_head = nn.Linear(student_dim, dim)
        self.teacher_head = nn.Linear(teacher_dim, dim)
        rng = torch.Generator().manual_seed(seed)
        for name in ("student_memory", "teacher_memory"):
            bound = math.sqrt(3 / dim)
            self.register_buffer(name, (2 * torch.rand(items, dim, generator=rng) - 1) * bound)
        self.register_buffer("log_z", torch.full((2,), math.nan))
        self.register_buffer("draws", torch.zeros((), dtype=torch.int64))
        self.reset_normalizer()

    def reset_normalizer(self) -> None:
        """Forget Z: a fixed number is restored, otherwise the next batch estimates it."""
        known = not isinstance(self.normalizer, str)
        self.log_z.fill_(math.log(float(self.normalizer)) if known else math.nan)

    def draw_negatives(self, index: Tensor) -> Tensor:
        """Draw m other items for each index [B] → [B, m], and count the draw."""
        mixed = (self.seed * 0x9E3779B97F4A7C15 + int(self.draws)) % 2**63
        self.draws += 1
        rng = torch.Generator().manual_seed(mixed)
        others = torch.randint(self.items - 1, (len(index), self.negatives), generator=rng).to(index.device)
        return others + (others >= index[:, None])  # skip the positive

    def forward(
        self, student: Tensor, teacher: Tensor, index: Tensor, contrast: Tensor | None = None
    ) -> Tensor:
        """Form the loss of one batch; in training mode, also move the memories."""
        check_embeddings(student, teacher)
        self._check_index("index", index)
        if contrast is None:
            contrast = self.draw_negatives(index)
        self._check_index("contrast", contrast)
        if index.shape != student.shape[:1] or contrast.dim() != 2 or contrast.shape[0] != len(index):
            raise ValueError(
                f"index has shape {list(index.shape)} and contrast {list(contrast.shape)}; for "
                f"{student.shape[0]} items they must be [{student.shape[0]}] and [{student.shape[0]}, m]"
            )
        u = unit(upcast(self.student_head(student))[0])
        v = unit(upcast(self.teacher_head(teacher.detach()))[0])
        chosen = torch.cat([index[:, None], contrast], 1)
        loss = self._side(0, u, self.teacher_memory[chosen]) + self._side(1, v, self.student_memory[chosen])
        if self.training:
            self._remember(self.student_memory, index, u)
            self._remember(self.teacher_memory, index, v)
        return loss

    def _side(self, side: int, embedding: Tensor, memory: Tensor) -> Tensor:
        """NCE of embeddings [B, D] against memory entries [B, 1 + m, D], the positive first."""
        with full_precision(embedding.device):
            scores = torch.einsum("bd,bkd->bk", embedding, memory.to(embedding)) / self.temperature
        log_h = scores - self._log_normalizer(side, scores.detach())
        log_noise = math.log((scores.shape[1] - 1) / self.items)
        positive = F.softplus(log_noise - log_h[:, 0])  # −log h/(h + noise)
        negative = F.softplus(log_h[:, 1:] - log_noise).sum(1)  # −log noise/(h + noise)
        return (positive + negative).mean()

    def _log_normalizer(self, side: int, scores: Tensor) -> Tensor:
        estimate = math.log(self.items) + scores.flatten().logsumexp(0) - math.log(scores.numel())
        if self.normalizer == "batch":
            return estimate
        if self.training and bool(self.log_z[side].isnan()):
            self.log_z[side] = estimate
        return torch.where(self.log_z[side].isnan(), estimate, self.log_z[side].to(estimate))

    def _remember(self, memory: Tensor, index: Tensor, embedding: Tensor) -> None:
        with torch.no_grad():
            moved = self.momentum * memory[index] + (1 - self.momentum) * embedding.to(memory)
            memory[index] = unit(moved)

    def _check_index(self, name: str, index: Tensor) -> None:
        if not isinstance(index, Tensor) or index.dtype != torch.int64:
            got = index.dtype if isinstance(index, Tensor) else type(index).__name__
            raise TypeError(f"{name} must be an int64 tensor, got {got}")
        if index.numel() == 0 or bool((index < 0).any()) or bool((index >= self.items).any()):
            raise ValueError(
                f"{name} must hold values of 0 … {self.items - 1}: `items` is the training set's size"
            )
