"""Feature losses: the student's intermediate activations imitate the teacher's.

Losses on positions of equal width (`hint_loss`, `cosine`, `pkd`) reduce like the logit losses; attention
transfer, MGD and CKA compare whole maps or batches. Where widths differ, project the student first; that
projection must be trained.

When to use: besides a logit loss, where the teacher's layers say more than its classes do: few labels, dense
prediction, embeddings. `hint_loss` where a projection may be learnt, `cosine` and `pkd` for embeddings that
are compared by angle, `attention_transfer` for convolutional maps of any width, `mgd` for detection and
segmentation, `cka` where only the geometry of the batch should be shared.

Legend: B items, C channels, H × W positions, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._geometry import check_embeddings, check_same_width, norm, unit
from ._reduction import (
    Reduction,
    check_floating,
    check_mask,
    full_precision,
    reduce_rows,
    upcast,
    valid_rows,
)

_POOLS: tuple[Callable[..., Tensor], ...] = (
    F.adaptive_avg_pool1d,
    F.adaptive_avg_pool2d,
    F.adaptive_avg_pool3d,
)


def hint_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    mask: Tensor | None = None,
    reduction: Reduction = "token_mean",
    num_items: int | Tensor | None = None,
) -> Tensor:
    """Mean squared error between two features of one shape (FitNets).

    Per item: mean over the item's elements of (f_S − f_T)²; then the mean over items. Without a mask this is
    the mean over all elements.

    Args:
        student: [..., *feature], after the regressor that maps it to the teacher's shape: [B, C, H, W], [B,
            L, D], …
        teacher: the same shape; no gradient flows into it.
        mask: bool over the *leading* dimensions, [B] or [B, L] …, True = the item counts. It says what an
            item is; without it an item is one entry of the first dimension.
        reduction: over items: "token_mean", "sum", "batch_mean" or "none".
        num_items: global number of valid items, for "token_mean" over accumulation steps or ranks.

    Returns:
        Scalar ≥ 0, or one value per item, zero where masked.

    Raises:
        TypeError: not floating point, or the mask not boolean.
        ValueError: shapes differ, or the mask does not fit the leading dimensions.

    Source: Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, without its factor ½ and
    averaged, as reference implementations do. The paper trains it as a first stage; adding it to the other
    losses is common.

    Relations to sibling losses: `cosine` and `pkd` ignore the length of the vectors; `mgd` hides part of the
    student's map first.

    Example:
        >>> student, teacher = torch.zeros(2, 3), torch.tensor([[1.0, 1.0, 1.0], [3.0, 0.0, 0.0]])
        >>> hint_loss(student, teacher).item()
        2.0
        >>> hint_loss(student, teacher, mask=torch.tensor([True, False])).item()
        1.0
    """
    check_same_width(student, teacher)
    leading = mask.dim() if isinstance(mask, Tensor) else 1
    shape = student.shape[:leading]
    check_mask(mask, shape)
    elements = math.prod(student.shape[leading:])
    student, teacher = (x.reshape(*shape, elements) for x in (student, teacher.detach()))
    student, teacher = upcast(*valid_rows(mask, student, teacher))
    rows = (student - teacher).square().mean(-1)
    return reduce_rows(rows, mask=mask, shape=shape, reduction=reduction, num_items=num_items)


def cosine(
    student: Tensor,
    teacher: Tensor,
    *,
    mask: Tensor | None = None,
    reduction: Reduction = "token_mean",
    num_items: int | Tensor | None = None,
) -> Tensor:
    """Cosine distance: mean over positions of 1 − cos(f_S, f_T).

    Args:
        student: [..., D].
        teacher: [..., D]; no gradient flows into it.
        mask: bool [...], True = the position counts.
        reduction: over positions: "token_mean", "sum", "batch_mean" or "none" ([...], zero where masked).
        num_items: global number of valid positions, for "token_mean" over accumulation steps or ranks.

    Returns:
        Scalar in [0, 2], or [...]. A zero vector has distance 1 to everything and gets gradient zero.

    Raises:
        TypeError: not floating point, or the mask not boolean.
        ValueError: shapes differ, or the mask does not fit.

    Relations to sibling losses: half of `pkd`; unlike `hint_loss` it ignores the length of the vectors.
    Embeddings that are compared by cosine at inference are best distilled with it.

    Example:
        >>> cosine(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[5.0, 0.0], [1.0, 0.0]])).item()
        0.5
    """
    check_same_width(student, teacher)
    check_mask(mask, student.shape[:-1])
    shape = student.shape[:-1]
    student, teacher = upcast(*valid_rows(mask, student, teacher.detach()))
    # ½‖u − v‖² = 1 − cos, without the cancellation of the latter near zero.
    rows = _half_squared_gap(student, teacher)
    return reduce_rows(rows, mask=mask, shape=shape, reduction=reduction, num_items=num_items)


def pkd(
    student: Tensor,
    teacher: Tensor,
    *,
    mask: Tensor | None = None,
    reduction: Reduction = "token_mean",
    num_items: int | Tensor | None = None,
) -> Tensor:
    """Patient KD: mean over items of ‖h_S/‖h_S‖ − h_T/‖h_T‖‖².

    Args:
        student: [..., D], usually the [CLS] state of one layer, [B, D].
        teacher: [..., D]; no gradient flows into it.
        mask: bool [...], True = the item counts.
        reduction: over items: "token_mean", "sum", "batch_mean" or "none" ([...], zero where masked).
        num_items: global number of valid items, for "token_mean" over accumulation steps or ranks.

    Returns:
        Scalar in [0, 4], or [...]. A zero vector is at 2 from everything and gets gradient zero.

    Raises:
        TypeError: not floating point, or the mask not boolean.
        ValueError: shapes differ, or the mask does not fit.

    Source: Sun et al., "Patient Knowledge Distillation for BERT Model Compression", EMNLP 2019,
    averaged over items instead of summed.

    Relations to sibling losses: exactly twice `cosine`.

    Example:
        >>> pkd(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 3.0]])).item()
        2.0
    """
    return 2 * cosine(student, teacher, mask=mask, reduction=reduction, num_items=num_items)


def _half_squared_gap(student: Tensor, teacher: Tensor) -> Tensor:
    """[N, D] twice → [N]: 1 − cos, and 1 where one of the vectors is zero."""
    u, v = unit(student), unit(teacher)
    both = (student != 0).any(-1) & (teacher != 0).any(-1)
    return torch.where(both, 0.5 * (u - v).square().sum(-1), 1.0)


def attention_transfer(
    student: Tensor, teacher: Tensor, *, mode: Literal["code", "paper"] = "code"
) -> Tensor:
    """Activation-based attention transfer: match where the energy of two feature maps lies.

    A(f) = vec(mean over channels of f²) / its L2 norm. "code": mean over B·positions of (A_S − A_T)²;
    "paper": mean over B of ‖A_S − A_T‖₂ (unsquared). The two differ by orders of magnitude, and so do their
    weights (the common β = 1000 belongs to "code").

    Args:
        student: [B, Cs, *spatial], one to three spatial dimensions.
        teacher: [B, Ct, *spatial]; no gradient flows into it. Channels may differ. Where the sizes differ,
            the larger map is average-pooled to the smaller one (along each dimension) before squaring.
        mode: "code" (the authors' implementation) or "paper" (their eq. 2).

    Returns:
        Scalar ≥ 0; an all-zero map has A = 0 and gets gradient zero.

    Raises:
        TypeError: not floating point.
        ValueError: batch or number of spatial dimensions differ, or an unknown mode.

    Source: Zagoruyko & Komodakis, "Paying More Attention to Attention", ICLR 2017.

    Relations to sibling losses: `similarity_preserving` keeps which *items* are alike, this one which
    *places* matter; `hint_loss` keeps every channel.

    Example:
        >>> teacher = torch.rand(2, 8, 4, 4)
        >>> attention_transfer(3 * teacher[:, :4].repeat(1, 2, 1, 1), teacher[:, :4]).item() < 1e-12
        True
    """
    for name, x in (("student", student), ("teacher", teacher)):
        check_floating(name, x)
        if not 3 <= x.dim() <= 5:
            raise ValueError(
                f"{name} must be [B, C, *spatial] with 1 to 3 spatial dimensions, got {list(x.shape)}"
            )
    if student.shape[0] != teacher.shape[0] or student.dim() != teacher.dim():
        raise ValueError(
            f"student has shape {list(student.shape)} and teacher {list(teacher.shape)}; the batch and the "
            "number of spatial dimensions must be equal"
        )
    if mode not in ("code", "paper"):
        raise ValueError(f"mode={mode!r} is unknown; allowed: code, paper")
    student, teacher = upcast(student, teacher.detach())
    size = [min(s, t) for s, t in zip(student.shape[2:], teacher.shape[2:], strict=True)]
    difference = _attention_map(student, size) - _attention_map(teacher, size)
    if mode == "code":
        return difference.square().mean()
    return norm(difference).mean()


def _attention_map(feature: Tensor, size: list[int]) -> Tensor:
    if list(feature.shape[2:]) != size:
        feature = _POOLS[len(size) - 1](feature, size)
    return unit(feature.square().mean(1).flatten(1))


class MGDGenerator(nn.Module):
    """The trained part of masked generative distillation: align, then regenerate the teacher's map.

    `align` is a 1×1 convolution where the channels differ (identity where not); `generate` is conv3×3 – ReLU
    – conv3×3. Both are trained with the student and thrown away afterwards, so hand their parameters to the
    optimizer.

    Args:
        student_channels: Cs of the student's map.
        teacher_channels: Ct of the teacher's map.

    Shapes: forward(student [B, Cs, H, W], keep [B, 1, H, W] or [B, Ct, 1, 1]) → [B, Ct, H, W].

    Example:
        >>> MGDGenerator(16, 32)(torch.rand(2, 16, 8, 8), torch.ones(2, 1, 8, 8)).shape
        torch.Size([2, 32, 8, 8])
    """

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        super().__init__()
        for name, channels in (
            ("student_channels", student_channels),
            ("teacher_channels", teacher_channels),
        ):
            if channels < 1:
                raise ValueError(f"{name}={channels} must be at least 1")
        self.align: nn.Module = (
            nn.Identity()
            if student_channels == teacher_channels
            else nn.Conv2d(student_channels, teacher_channels, 1)
        )
        self.generate = nn.Sequential(
            nn.Conv2d(teacher_channels, teacher_channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(teacher_channels, teacher_channels, 3, padding=1),
        )

    def forward(self, student: Tensor, keep: Tensor) -> Tensor:
        """Regenerate the teacher's map from the kept part of the student's."""
        generated: Tensor = self.generate(self.align(student) * keep)
        return generated


def mgd(
    student: Tensor,
    teacher: Tensor,
    generator: nn.Module,
    *,
    mask_ratio: float = 0.5,
    mask_dim: Literal["spatial", "channel"] = "spatial",
    rng: torch.Generator | None = None,
) -> Tensor:
    """Masked generative distillation: regenerate the teacher's map from a partly hidden student map.

    loss = ‖G(M ⊙ align(f_S)) − f_T‖² summed over elements / B, with M = 0 at a random share λ of places.

    Args:
        student: [B, Cs, H, W].
        teacher: [B, Ct, H, W]; no gradient flows into it.
        generator: `MGDGenerator`, or any module (student, keep) → [B, Ct, H, W].
        mask_ratio: λ in [0, 1), the expected share that is *hidden*.
        mask_dim: "spatial" hides positions in all channels [B, 1, H, W] (detection, segmentation); "channel"
            hides whole channels [B, Ct, 1, 1] (classification).
        rng: generator of the mask, for repeatability; None uses the global one. The mask is drawn on the
            generator's device, so that a CPU generator gives the same mask on every device.

    Returns:
        Scalar ≥ 0. It grows with Ct·H·W: the published weights α are 2e-5 … 7e-5 for detection.

    Raises:
        TypeError: not floating point.
        ValueError: not four dimensions, batch or spatial sizes differ, λ outside [0, 1), an unknown mask_dim,
            or the generator's output not shaped like the teacher.

    Source: Yang et al., "Masked Generative Distillation", ECCV 2022.

    Relations to sibling losses: with λ = 0 and an identity generator it is `hint_loss` times Ct·H·W.

    Example:
        >>> generator = MGDGenerator(4, 8)
        >>> student, teacher = torch.rand(2, 4, 6, 6), torch.rand(2, 8, 6, 6)
        >>> first = mgd(student, teacher, generator, rng=torch.Generator().manual_seed(0))
        >>> bool(first == mgd(student, teacher, generator, rng=torch.Generator().manual_seed(0)))
        True
    """
    for name, x in (("student", student), ("teacher", teacher)):
        check_floating(name, x)
        if x.dim() != 4:
            raise ValueError(f"{name} must be [B, C, H, W], got shape {list(x.shape)}")
    if student.shape[0] != teacher.shape[0] or student.shape[2:] != teacher.shape[2:]:
        raise ValueError(
            f"student has shape {list(student.shape)} and teacher {list(teacher.shape)}; batch, height and "
            "width must be equal: resize the student's map first"
        )
    if not 0 <= mask_ratio < 1:
        raise ValueError(f"mask_ratio={mask_ratio} must lie in [0, 1): it is the share that is hidden")
    batch, channels, height, width = teacher.shape
    if mask_dim == "spatial":
        shape = (batch, 1, height, width)
    elif mask_dim == "channel":
        shape = (batch, channels, 1, 1)
    else:
        raise ValueError(f"mask_dim={mask_dim!r} is unknown; allowed: spatial, channel")
    drawn = torch.rand(shape, generator=rng, device=rng.device if rng is not None else student.device)
    keep = (drawn >= mask_ratio).to(device=student.device, dtype=student.dtype)
    generated = generator(student, keep)
    if generated.shape != teacher.shape:
        raise ValueError(
            f"generator returned {list(generated.shape)}; the teacher's {list(teacher.shape)} is needed"
        )
    generated, teacher = upcast(generated, teacher.detach())
    return (generated - teacher).square().sum() / max(batch, 1)


def linear_cka(student: Tensor, teacher: Tensor, *, unbiased: bool = False) -> Tensor:
    """Linear centred kernel alignment of two sets of features; 1 = the same up to rotation and scale.

    CKA = HSIC(K, L) / √(HSIC(K, K)·HSIC(L, L)) with K = X Xᵀ, L = Y Yᵀ. HSIC is the inner product of the
    doubly centred matrices; with `unbiased` of the U-centred ones (diagonal left out), an unbiased estimate
    of HSIC from few items.

    Args:
        student: [B, Ds].
        teacher: [B, Dt], features of the same items; no gradient flows into them.
        unbiased: take the U-centred matrices (B ≥ 4). The plain value grows towards 1 with D/B, even for
            independent features; this one does not, and may be negative. The *ratio* of unbiased estimates is
            itself only approximately unbiased.

    Returns:
        Scalar in [0, 1] ([−1, 1] when unbiased); 0 with gradient zero when one side is constant.

    Raises:
        TypeError: not floating point.
        ValueError: different numbers of items, or fewer than 2 (4 when unbiased).

    Source: Kornblith et al., "Similarity of Neural Network Representations Revisited", ICML 2019; unbiased
    HSIC: Song et al., "Feature Selection via Dependence Maximization", JMLR 2012, in the U-centred form of
    Székely & Rizzo 2014.

    Example:
        >>> x = torch.tensor([[0.0, 1.0], [2.0, 0.0], [1.0, 1.0], [3.0, 5.0]])
        >>> round(linear_cka(x, 7 * x.flip(1) + 1).item(), 5)
        1.0
    """
    check_embeddings(student, teacher, min_items=4 if unbiased else 2)
    student, teacher = upcast(student, teacher.detach())
    with full_precision(student.device):
        k, l = (_centred_gram(x, unbiased=unbiased) for x in (student, teacher))  # noqa: E741
    # The angle between two matrices: `unit` keeps it finite where one of them is zero.
    return (unit(k.flatten()) * unit(l.flatten())).sum()


def cka(student: Tensor, teacher: Tensor, *, unbiased: bool = False) -> Tensor:
    """CKA distance: 1 − `linear_cka`, the loss.

    Args:
        student: [B, Ds].
        teacher: [B, Dt], features of the same items; no gradient flows into them.
        unbiased: see `linear_cka`.

    Returns:
        Scalar in [0, 1] ([0, 2] when unbiased); 0 for a rotated, scaled, shifted copy of the teacher.

    Raises:
        TypeError: not floating point.
        ValueError: different numbers of items, or fewer than 2 (4 when unbiased).

    Relations to sibling losses: `similarity_preserving` normalises every row of the Gram matrix, this one the
    matrix as a whole; `rkd_distance` shares its invariances.

    Example:
        >>> cka(torch.zeros(5, 2), torch.rand(5, 3)).item()
        1.0
    """
    return 1 - linear_cka(student, teacher, unbiased=unbiased)


def _centred_gram(x: Tensor, *, unbiased: bool) -> Tensor:
    """[B, D] → [B, B], doubly centred, or U-centred: zero diagonal, and every row and column sums to zero."""
    centred = x - x.mean(0)
    # Constant features leave rounding noise here, which must not be mistaken for structure.
    noise = 8 * torch.finfo(x.dtype).eps * x.detach().abs().amax()
    x = torch.where(centred.detach().abs().amax() > noise, centred, 0.0)
    items = x.shape[0]
    if not unbiased:
        return x @ x.mT
    eye = torch.eye(items, dtype=torch.bool, device=x.device)
    gram = (x @ x.mT).masked_fill(eye, 0.0)
    rows = gram.sum(1, keepdim=True)
    centred = gram - (rows + rows.mT) / (items - 2) + rows.sum() / ((items - 1) * (items - 2))
    return centred.masked_fill(eye, 0.0)
