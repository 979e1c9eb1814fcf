"""Relational losses: the student copies how the items of a batch relate to each other, not where they lie.

None of them asks student and teacher to have the same width. Distances and directions are computed from
coordinate differences, not from a Gram matrix (which loses all digits for close points), and coincident
points get gradient zero.

When to use: for embeddings and retrieval, where only relations count and widths differ: `rkd_distance` and
`rkd_angle` keep the geometry up to scale and rotation, `similarity_kl` who the neighbours are,
`similarity_preserving` and `correlation_congruence` the similarities themselves; `attention_relation` for
transformers with other widths and numbers of heads.

Legend: B items in a batch, D width, L tokens, A relation heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._geometry import check_embeddings, unit
from ._reduction import (
    Reduction,
    check_floating,
    check_mask,
    check_reduction,
    check_temperature,
    full_precision,
    reduce_rows,
    upcast,
)

_CHUNK_BYTES_CPU = 4 * 2**20  # a block that stays in cache is fastest there
_CHUNK_BYTES_ACCELERATOR = 64 * 2**20


def pairwise_distances(x: Tensor) -> Tensor:
    """Euclidean distances between all rows: exact for close points, gradient zero for coincident ones.

    Args:
        x: [B, D] floating point.

    Returns:
        [B, B] in float32 (float64 for float64 input), symmetric, zero diagonal.

    Raises:
        TypeError: not floating point.
        ValueError: not two dimensions.

    Relations to other functions: `torch.cdist` by default switches to the Gram form above 25 rows, which in
    float32 loses every digit of distances below about 1e-4 of the norms; this function never does.

    Example:
        >>> pairwise_distances(torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]]))[0]
        tensor([0., 5., 0.])
    """
    check_floating("x", x)
    if x.dim() != 2:
        raise ValueError(f"x must be [B, D], got shape {list(x.shape)}")
    (x,) = upcast(x)
    return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")


def _relative_distances(x: Tensor) -> Tensor:
    distances = pairwise_distances(x)
    count = (distances > 0).sum()
    mean = distances.sum() / count.clamp_min(1)
    return distances / torch.where(count > 0, mean, 1.0)


def rkd_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Relational KD, distance-wise: match pairwise distances, each in units of the batch's mean distance.

    d_ij = ‖e_i − e_j‖ / mean of the positive distances;  loss = mean over B² of smooth-L1(d_ij^S − d_ij^T).

    Args:
        student: [B, Ds] embeddings, B ≥ 2.
        teacher: [B, Dt] embeddings of the same items; no gradient flows into them.

    Returns:
        Scalar ≥ 0; 0 when the student is a scaled, rotated, shifted copy of the teacher.

    Raises:
        TypeError: not floating point.
        ValueError: not two dimensions, different numbers of items, or fewer than two.

    Source: Park et al., "Relational Knowledge Distillation", CVPR 2019. The diagonal counts in the
    mean, as in the authors' code. Apply it before an L2 normalisation: on the sphere the freedom of scale and
    shift is gone.

    Relations to sibling losses: `rkd_angle` matches third-order structure and is usually added with twice the
    weight; `similarity_preserving` compares inner products, which do change under a shift.

    Example:
        >>> teacher = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
        >>> rkd_distance(3 * teacher + 5, teacher).item() < 1e-12
        True
    """
    check_embeddings(student, teacher, min_items=2)
    student, teacher = upcast(student, teacher.detach())
    return F.smooth_l1_loss(_relative_distances(student), _relative_distances(teacher))


class _AngleLoss(torch.autograd.Function):
    """Mean of smooth-L1 over all B³ angles, block by block of vertices, the gradient taken in the same pass.

    For a vertex j, U [B, D] holds the unit vectors from e_j to every e_i, and U Uᵀ [B, B] the cosines at j.
    With δ the derivative of smooth-L1, dL/dU = 2 δ U (δ is symmetric), and through the normalisation dL/d(e_i
    − e_j) = (dU_i − U_i ⟨U_i, dU_i⟩) / ‖e_i − e_j‖. Only one block of vertices is ever held.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, chunk: int) -> Tensor:
        items = student.shape[0]
        wants_gradient = ctx.needs_input_grad[0]
        gradient = torch.zeros_like(student) if wants_gradient else None
        total = torch.zeros((), dtype=torch.float64, device=student.device)
        with full_precision(student.device):
            for start in range(0, items, chunk):
                block = slice(start, min(start + chunk, items))
                unit_s, length = _directions(student, block)
                unit_t, _ = _directions(teacher, block)
                difference = torch.bmm(unit_s, unit_s.mT).sub_(torch.bmm(unit_t, unit_t.mT))
                total += F.smooth_l1_loss(difference, torch.zeros_like(difference), reduction="sum").double()
                if gradient is None:
                    continue
                slope = torch.bmm(difference.clamp_(-1, 1), unit_s).mul_(2)
                slope -= unit_s * (unit_s * slope).sum(-1, keepdim=True)
                slope /= length
                gradient += slope.sum(0)
                gradient[block] -= slope.sum(1)
        scale = 1.0 / items**3
        if gradient is not None:
            ctx.save_for_backward(gradient.mul_(scale))
        return (total * scale).to(student.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None
        (gradient,) = ctx.saved_tensors
        return gradient * upstream, None, None


def _directions(x: Tensor, block: slice) -> tuple[Tensor, Tensor]:
    """Unit vectors [b, B, D] from each vertex of the block to every item (0 if coincident), and lengths."""
    difference = x[None] - x[block, None]
    length = torch.linalg.vector_norm(difference, dim=-1, keepdim=True)
    length.masked_fill_(length == 0, 1.0)  # the difference itself is zero there
    return difference.div_(length), length


def rkd_angle(student: Tensor, teacher: Tensor, *, chunk: int | None = None) -> Tensor:
    """Relational KD, angle-wise: match the cosine of every angle that three items form.

    ψ_ijk = ⟨(e_i − e_j)/‖e_i − e_j‖, (e_k − e_j)/‖e_k − e_j‖⟩;  loss = mean over B³ of smooth-L1(ψ^S − ψ^T).

    Memory is O(c·B·(B + D)) for c vertices at a time instead of O(B³), forward and backward: the gradient [B,
    Ds] is formed in the forward pass. Second derivatives are not available.

    Args:
        student: [B, Ds] embeddings, B ≥ 2.
        teacher: [B, Dt] embeddings of the same items; no gradient flows into them.
        chunk: vertices c per block, ≥ 1; None takes as many as fit into about 4 MiB (64 MiB on an
            accelerator). It changes nothing but speed and memory.

    Returns:
        Scalar ≥ 0; 0 when the student is a scaled, rotated, shifted copy of the teacher.

    Raises:
        TypeError: not floating point.
        ValueError: not two dimensions, different numbers of items, fewer than two, or chunk < 1.

    Source: Park et al., "Relational Knowledge Distillation", CVPR 2019. Degenerate triplets count in
    the mean, as in the authors' code; an angle with a side of length zero has cosine 0.

    Relations to sibling losses: see `rkd_distance`, with which it is usually combined at twice the weight.

    Example:
        >>> teacher = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
        >>> student = teacher @ torch.tensor([[0.0, 1.0], [-1.0, 0.0]]) * 3 + 5
        >>> rkd_angle(student, teacher).item()
        0.0
    """
    check_embeddings(student, teacher, min_items=2)
    student, teacher = upcast(student, teacher.detach())
    items = student.shape[0]
    if chunk is None:
        widths = 3 * student.shape[1] + 2 * teacher.shape[1] + 3 * items
        budget = _CHUNK_BYTES_CPU if student.device.type == "cpu" else _CHUNK_BYTES_ACCELERATOR
        chunk = max(1, budget // (student.element_size() * items * widths))
    elif chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1; leave it out to let memory decide")
    loss: Tensor = _AngleLoss.apply(student, teacher, chunk)
    return loss


def similarity_preserving(student: Tensor, teacher: Tensor) -> Tensor:
    """Match the row-normalised Gram matrices of a batch.

    G = row-L2-normalise(E Eᵀ), E the flattened features;  loss = ‖G_S − G_T‖_F² / B².

    Args:
        student: [B, ...] features; all dimensions after the first are flattened.
        teacher: [B, ...] features of the same items; no gradient flows into them.

    Returns:
        Scalar ≥ 0, at most 4/B.

    Raises:
        TypeError: not floating point.
        ValueError: different numbers of items.

    Source: Tung & Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019.

    Relations to sibling losses: `correlation_congruence` compares kernels of unit vectors; `similarity_kl`
    compares rows as distributions; `cka` compares centred Gram matrices as a whole.

    Example:
        >>> teacher = torch.eye(3)
        >>> similarity_preserving(2 * teacher, teacher).item()
        0.0
    """
    student, teacher = _flat_pair(student, teacher)
    with full_precision(student.device):
        difference = unit(student @ student.mT) - unit(teacher @ teacher.mT)
    return difference.square().mean()


def correlation_congruence(student: Tensor, teacher: Tensor, *, gamma: float = 0.4, order: int = 2) -> Tensor:
    """Match Gaussian-kernel matrices of the unit vectors of a batch, in the kernel's Taylor form.

    K_ij = e^{−2γ} Σ_{p=0}^{P} (2γ)^p / p! · ⟨u_i, u_j⟩^p with u = e/‖e‖;  loss = ‖K_S − K_T‖_F² / B².

    Args:
        student: [B, ...] features; all dimensions after the first are flattened.
        teacher: [B, ...] features of the same items; no gradient flows into them.
        gamma: kernel width γ > 0; for P → ∞, K_ij = exp(−γ‖u_i − u_j‖²).
        order: P ≥ 1.

    Returns:
        Scalar in [0, 1].

    Raises:
        TypeError: not floating point.
        ValueError: different numbers of items, gamma ≤ 0 or order < 1.

    Source: Peng et al., "Correlation Congruence for Knowledge Distillation", ICCV 2019. The loss is the
    *squared* Frobenius norm over B²; torchdistill's `CCKDLoss` takes the norm without the square and leaves
    the normalisation to the caller.

    Relations to sibling losses: see `similarity_preserving`.

    Example:
        >>> teacher = torch.eye(3)
        >>> correlation_congruence(2 * teacher, teacher).item()
        0.0
    """
    if not gamma > 0:
        raise ValueError(f"gamma={gamma} must be > 0")
    if order < 1:
        raise ValueError(f"order={order} must be at least 1")
    student, teacher = _flat_pair(student, teacher)

    def kernel(x: Tensor) -> Tensor:
        units = unit(x)
        cosine = units @ units.mT
        total = torch.zeros_like(cosine)
        for p in range(order, -1, -1):  # Horner: Σ a_p c^p
            total = total * cosine + (2 * gamma) ** p / math.factorial(p)
        return math.exp(-2 * gamma) * total

    with full_precision(student.device):
        return (kernel(student) - kernel(teacher)).square().mean()


def similarity_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 1.0,
    exclude_self: bool = False,
    scale_t2: bool = True,
    reduction: Reduction = "token_mean",
    num_items: int | Tensor | None = None,
) -> Tensor:
    """Match every item's distribution of similarity to the batch (the distillation term of S2SD).

    s_ij = cos(e_i, e_j);  loss = T² · mean_i KL(softmax_j(s^T_ij / T) ‖ softmax_j(s^S_ij / T)).

    Args:
        student: [B, ...] features; all dimensions after the first are flattened.
        teacher: [B, ...] features of the same items; no gradient flows into them.
        temperature: T > 0. Cosines lie in [−1, 1], so T of about 0.1–1 makes rows peaked enough to carry
            information.
        exclude_self: leave s_ii = 1, which carries no information, out of the rows (needs B ≥ 2). The
            published form keeps it.
        scale_t2: multiply by T².
        reduction: over the B rows: "token_mean", "sum", "batch_mean" or "none" ([B]).
        num_items: global number of rows, for "token_mean" over accumulation steps or ranks.

    Returns:
        Scalar ≥ 0, or [B].

    Raises:
        TypeError: not floating point.
        ValueError: different numbers of items, temperature ≤ 0, too few items.

    Source: Roth et al., "Simultaneous Similarity-based Self-Distillation for Deep Metric Learning", ICML
    2021.

    Relations to sibling losses: the same matrices as `similarity_preserving`, compared as distributions, so
    that the nearest neighbours count most; `rkd_distance` keeps absolute distances.

    Example:
        >>> teacher = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> similarity_kl(2 * teacher, teacher, temperature=0.5).item()
        0.0
    """
    check_temperature(temperature, torch.Size(()))
    student, teacher = _flat_pair(student, teacher)
    items = student.shape[0]
    if exclude_self and items < 2:
        raise ValueError("exclude_self=True needs at least 2 items in a batch, got 1")

    def log_rows(x: Tensor) -> Tensor:
        units = unit(x)
        return units @ units.mT / temperature

    with full_precision(student.device):
        scores_s, scores_t = log_rows(student), log_rows(teacher)
    keep = ~torch.eye(items, dtype=torch.bool, device=student.device) if exclude_self else None
    rows = _masked_kl(scores_s, scores_t, keep)
    if scale_t2:
        rows = rows * temperature**2
    return reduce_rows(rows, mask=None, shape=rows.shape, reduction=reduction, num_items=num_items)


def attention_relation(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    relation_heads: int,
    mask: Tensor | None = None,
    reduction: Reduction = "token_mean",
    num_items: int | Tensor | None = None,
) -> Tensor:
    """Multi-head self-attention relation distillation (MiniLM v2).

    Each X ∈ {Q, K, V} [L, H] is split into A relation heads of width d = H/A, R_X = softmax(X Xᵀ / √d) per
    head, and loss = Σ_X mean over A heads and valid query tokens of KL(R_X^T ‖ R_X^S).

    Args:
        student: the projected queries, keys and values of one layer, each [B, L, Hs]; any number of tensors ≥
            1.
        teacher: as many tensors [B, L, Ht], in the same order; no gradient flows into them.
        relation_heads: A ≥ 1; divides Hs and Ht. It need not be the number of attention heads of either
            network.
        mask: bool [B, L], True = a real token. Padding is left out as key (before the softmax) and as query
            (in the mean).
        reduction: over query tokens: "token_mean", "sum", "batch_mean" or "none" ([B, L], zero where masked).
        num_items: global number of valid tokens, for "token_mean" over accumulation steps or ranks.

    Returns:
        Scalar ≥ 0, or [B, L].

    Raises:
        TypeError: not floating point, or the mask not boolean.
        ValueError: shapes do not fit, or `relation_heads` does not divide a width.

    Source: Wang et al., "MiniLMv2: Multi-Head Self-Attention Relation Distillation for Compressing Pretrained
    Transformers", Findings of ACL 2021. One layer of the teacher (the last, or an upper middle one for large
    teachers) is matched to the student's last.

    Relations to sibling losses: `similarity_kl` relates items of a batch, this one tokens of a sequence.

    Example:
        >>> q, k, v = torch.randn(3, 2, 5, 8).unbind()
        >>> attention_relation((q, k, v), (q, k, v), relation_heads=4).item()
        0.0
    """
    check_reduction(reduction, num_items)
    shape = _check_projections(student, teacher, relation_heads)
    check_mask(mask, shape)
    keys = None
    if mask is not None:
        # A sequence without a real token has no query to average, but its rows must stay finite.
        keys = (mask | ~mask.any(-1, keepdim=True))[:, None, None, :]
    relations = []
    for x_s, x_t in zip(student, teacher, strict=True):
        x_s, x_t = upcast(x_s, x_t.detach())
        if mask is not None:
            x_s, x_t = (x.masked_fill(~mask[..., None], 0) for x in (x_s, x_t))
        with full_precision(x_s.device):
            scores_s, scores_t = (_relation_scores(x, relation_heads) for x in (x_s, x_t))
        relations.append(_masked_kl(scores_s, scores_t, keys).mean(1))
    total = torch.stack(relations).sum(0)
    values = total if mask is None else total[mask]
    return reduce_rows(values.reshape(-1), mask=mask, shape=shape, reduction=reduction, num_items=num_items)


def _relation_scores(x: Tensor, heads: int) -> Tensor:
    """[B, L, H] → [B, A, L, L] scaled inner products within each relation head."""
    split = x.unflatten(-1, (heads, x.shape[-1] // heads)).transpose(1, 2)
    return split @ split.mT / math.sqrt(split.shape[-1])


def _masked_kl(scores_s: Tensor, scores_t: Tensor, keep: Tensor | None) -> Tensor:
    """KL(softmax(scores_t) ‖ softmax(scores_s)) over the last axis, among the kept columns (≥ 1 per row)."""
    if keep is not None:
        scores_s, scores_t = (s.masked_fill(~keep, -math.inf) for s in (scores_s, scores_t))
    log_q, log_p = scores_s.log_softmax(-1), scores_t.log_softmax(-1)
    ratio = log_p - log_q
    if keep is not None:
        ratio = ratio.masked_fill(~keep, 0.0)
    return (log_p.exp() * ratio).sum(-1)


def _flat_pair(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    for name, x in (("student", student), ("teacher", teacher)):
        check_floating(name, x)
        if x.dim() < 2:
            raise ValueError(
                f"{name} must be features [B, ...] with at least 2 dimensions, got {list(x.shape)}"
            )
    student, teacher = student.flatten(1), teacher.detach().flatten(1)
    check_embeddings(student, teacher)
    student, teacher = upcast(student, teacher)
    return student, teacher


def _check_projections(student: Sequence[Tensor], teacher: Sequence[Tensor], heads: int) -> torch.Size:
    if isinstance(student, Tensor) or isinstance(teacher, Tensor):
        raise TypeError("student and teacher must be sequences of tensors, for example (q, k, v)")
    if len(student) != len(teacher) or not student:
        raise ValueError(
            f"student holds {len(student)} tensors and teacher {len(teacher)}; give as many, at least 1"
        )
    if heads < 1:
        raise ValueError(f"relation_heads={heads} must be at least 1")
    for name, tensors in (("student", student), ("teacher", teacher)):
        for x in tensors:
            check_floating(name, x)
            if x.dim() != 3 or x.shape[:2] != student[0].shape[:2]:
                raise ValueError(f"{name} tensors must be [B, L, H] of the same B and L, got {list(x.shape)}")
            if x.shape[-1] == 0 or x.shape[-1] % heads:
                raise ValueError(
                    f"relation_heads={heads} does not divide the {name}'s width {x.shape[-1]}; choose another"
                )
    return student[0].shape[:2]
