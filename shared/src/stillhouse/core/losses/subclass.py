"""Pseudo-subclasses from the teacher's embedding (LELP), for problems with few classes.

With two or three classes the logits say almost nothing beyond the label. LELP splits every class along
informative linear directions of the teacher's embedding and distils the finer classes. **From the paper's
abstract:** that "informative linear subspaces" of the embedding become pseudo-subclasses whose logits a
student learns. **The steps below are our reading**, without access to the full text or to code: null space of
the head, PCA per class, whitening and a random rotation, signed pairs, and the constraint that a class's
subclasses sum to the teacher's class probability.

When to use: with two or three classes and a teacher whose embedding is at hand; with many classes the logits
carry more than the label themselves, and `forward_kl` is the simpler way.

Legend: C classes, S subclasses per class, k directions per class, D width of the embedding, R rank of the
head.
"""

from __future__ import annotations

import math
from typing import Self

import torch
from torch import Tensor, nn

from ._reduction import Reduction, check_floating, check_temperature, full_precision, upcast
from .divergence import forward_kl


class PseudoSubclasses(nn.Module):
    """Splits each class of a frozen teacher into S pseudo-subclasses; build it with `fit`.

    For an embedding h: h⊥ = h minus its part in the row space of the head W (what the logits tell already);
    for every class c, b_c = k coordinates of h⊥ − μ_c along whitened, rotated principal directions of that
    class; the subclass logits are u_c = (b_c, −b_c)/τ (signed pairs, S = 2k) or b_c/τ (S = k), and

    p(c, s | x) = p_T(c | x) · softmax_s(u_c),  so that Σ_s p(c, s) = p_T(c) exactly. S = 1 is plain KD.

    Args:
        head_basis: [D, R], orthonormal basis of the row space of W.
        means: μ [C, D], mean of h⊥ over each class.
        directions: [C, k, D]; k = 0 for S = 1.
        pairs: signed pairs (S = 2k) or single directions (S = k).
        temperature: τ > 0 of the subclass softmax. Coordinates have unit variance within their class.

    Shapes: forward(embeddings [..., D], teacher_logits [..., C]) → log p(c, s) [..., C, S].

    All state is in buffers: it moves with `.to(device)` and is saved by `state_dict`.

    Source: Loo, Iliopoulos, Hu & Vee, "Learning Embedding Linear Projections", arXiv 2409.20449 (abstract).

    Example:
        >>> h = torch.randn(60, 8)
        >>> head = torch.randn(2, 8)
        >>> split = PseudoSubclasses.fit(h, torch.arange(60) % 2, head, subclasses=4)
        >>> log_targets = split(h, h @ head.T)
        >>> log_targets.shape
        torch.Size([60, 2, 4])
        >>> torch.allclose(log_targets.exp().sum(-1), (h @ head.T).softmax(-1), atol=1e-6)
        True
    """

    head_basis: Tensor
    means: Tensor
    directions: Tensor

    def __init__(
        self,
        head_basis: Tensor,
        means: Tensor,
        directions: Tensor,
        *,
        pairs: bool = True,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        check_temperature(temperature, torch.Size(()))
        width = means.shape[-1]
        if (
            means.dim() != 2
            or directions.dim() != 3
            or head_basis.dim() != 2
            or directions.shape[::2] != means.shape
            or head_basis.shape[0] != width
        ):
            raise ValueError(
                f"head_basis {list(head_basis.shape)}, means {list(means.shape)} and directions "
                f"{list(directions.shape)} must be [D, R], [C, D] and [C, k, D]"
            )
        self.pairs = pairs
        self.temperature = temperature
        self.register_buffer("head_basis", head_basis.detach().clone())
        self.register_buffer("means", means.detach().clone())
        self.register_buffer("directions", directions.detach().clone())

    @property
    def classes(self) -> int:
        """C."""
        return self.means.shape[0]

    @property
    def subclasses(self) -> int:
        """S."""
        return max(1, self.directions.shape[1] * (2 if self.pairs else 1))

    @classmethod
    def fit(
        cls,
        embeddings: Tensor,
        labels: Tensor,
        head_weight: Tensor,
        *,
        subclasses: int,
        pairs: bool = True,
        rotate: bool = True,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> Self:
        """Find the directions from the teacher's embeddings of the training set.

        Args:
            embeddings: h [N, D], the input of the teacher's last linear layer.
            labels: int64 [N], 0 … C−1: true classes, or the teacher's predictions for unlabelled data. Every
                class needs more members than directions.
            head_weight: W [C, D] of that layer ([1, D] for a single-logit binary head).
            subclasses: S. With pairs even (or 1), S = 2k directions ±.
            pairs: one direction gives two subclasses, its two sides. Without pairs every direction is one
                subclass.
            rotate: turn the whitened directions of each class by a random rotation, so that no subclass owns
                the largest one. Without it subclass s is principal direction s.
            temperature: τ > 0 of the subclass softmax; small is harder.
            seed: of the rotations. Signs of principal directions are fixed (largest entry positive), so that
                the same data give the same subclasses on every machine up to rounding.

        Returns:
            The fitted module, in float32 (float64 for float64 embeddings), on the embeddings' device.

        Raises:
            TypeError: embeddings or head not floating point, labels not int64.
            ValueError: shapes that do not fit, S < 1 or odd with pairs, too few members in a class, or too
                few directions with any variance outside the head's row space.
        """
        directions_per_class = _check_fit(embeddings, labels, head_weight, subclasses, pairs)
        dtype = upcast(embeddings)[0].dtype
        with torch.no_grad(), full_precision(embeddings.device):
            h = embeddings.double()
            _, values, rows = torch.linalg.svd(head_weight.to(h), full_matrices=False)
            basis = rows[values > values[0] * max(head_weight.shape) * torch.finfo(torch.float32).eps].T
            h = h - (h @ basis) @ basis.T
            rng = torch.Generator().manual_seed(seed)
            means, directions = [], []
            for c in range(int(labels.max()) + 1):
                members = h[labels == c]
                means.append(members.mean(0))
                axes = _whitened_axes(members - means[-1], directions_per_class, c)
                if rotate and directions_per_class > 1:
                    axes = _random_rotation(directions_per_class, rng).to(axes) @ axes
                directions.append(axes)
            return cls(
                basis.to(dtype),
                torch.stack(means).to(dtype),
                torch.stack(directions).to(dtype),
                pairs=pairs,
                temperature=temperature,
            )

    def project(self, embeddings: Tensor) -> Tensor:
        """Remove what the head reads: [..., D] → h⊥ [..., D] with W h⊥ = 0."""
        with full_precision(embeddings.device):
            h = embeddings.to(self.means.dtype)
            return h - (h @ self.head_basis) @ self.head_basis.mT

    def subclass_logits(self, embeddings: Tensor) -> Tensor:
        """Subclass logits u of every class, whether the item belongs to it or not: [..., D] → [..., C, S]."""
        check_floating("embeddings", embeddings)
        if embeddings.dim() == 0 or embeddings.shape[-1] != self.means.shape[1]:
            raise ValueError(f"embeddings must be [..., {self.means.shape[1]}], got {list(embeddings.shape)}")
        centred = self.project(embeddings)[..., None, :] - self.means
        with full_precision(embeddings.device):
            coordinates = torch.einsum("...cd,ckd->...ck", centred, self.directions) / self.temperature
        if self.directions.shape[1] == 0:
            return centred.new_zeros(*centred.shape[:-1], 1)
        return torch.cat([coordinates, -coordinates], -1) if self.pairs else coordinates

    def forward(self, embeddings: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
        """Return log p(c, s) [..., C, S], without gradient; `temperature` softens p_T."""
        check_floating("teacher_logits", teacher_logits)
        check_temperature(temperature, torch.Size(()))
        if teacher_logits.shape != (*embeddings.shape[:-1], self.classes):
            raise ValueError(
                f"teacher_logits have shape {list(teacher_logits.shape)}; "
                f"{[*embeddings.shape[:-1], self.classes]} is needed"
            )
        with torch.no_grad():
            within = self.subclass_logits(embeddings).log_softmax(-1)
            log_p = (teacher_logits.to(within.dtype) / temperature).log_softmax(-1)
            return log_p[..., None] + within


def lelp_loss(
    student: Tensor,
    log_targets: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "token_mean",
    num_items: int | Tensor | None = None,
    scale_t2: bool = True,
) -> Tensor:
    """Forward KL from the teacher's pseudo-subclass distribution to the student's C·S outputs.

    loss = T²·mean KL(p(c, s) ‖ softmax(z/T)). For the hard-label part use the class marginal: cross-entropy
    of `class_logits(z, S)`.

    Args:
        student: logits z [..., C·S], class-major (the S subclasses of class 0 first).
        log_targets: log p(c, s) [..., C, S] or [..., C·S] from `PseudoSubclasses`, taken at the *same*
            temperature.
        temperature: T > 0 of the student's softmax.
        mask: bool [...], True = the item counts.
        reduction: "token_mean", "sum", "batch_mean" or "none".
        num_items: global number of valid items, for "token_mean" over accumulation steps or ranks.
        scale_t2: multiply by T².

    Returns:
        Scalar ≥ 0, or [...].

    Raises:
        TypeError: not floating point, or the mask not boolean.
        ValueError: shapes that do not fit, or temperature ≤ 0.

    Relations to sibling losses: with S = 1 it is `forward_kl` of the teacher's logits, bit for bit up to
    rounding.

    Example:
        >>> log_targets = torch.tensor([[[0.25, 0.25], [0.4, 0.1]]]).log()
        >>> lelp_loss(log_targets.flatten(1), log_targets).item() < 1e-6
        True
    """
    check_floating("log_targets", log_targets)
    if log_targets.shape != student.shape:
        if log_targets.dim() < 2 or log_targets.flatten(-2).shape != student.shape:
            raise ValueError(
                f"student has shape {list(student.shape)} and log_targets {list(log_targets.shape)}; the "
                "student needs one output per subclass, [..., C·S]"
            )
        log_targets = log_targets.flatten(-2)
    return forward_kl(
        student,
        temperature * log_targets,  # softmax(T·log p / T) = p: the targets carry their temperature already
        temperature=temperature,
        mask=mask,
        reduction=reduction,
        num_items=num_items,
        scale_t2=scale_t2,
    )


def class_logits(student: Tensor, subclasses: int) -> Tensor:
    """Marginalise a student's C·S outputs to C class logits: logsumexp over the subclasses.

    Args:
        student: logits [..., C·S], class-major.
        subclasses: S ≥ 1.

    Returns:
        [..., C]; their softmax is Σ_s softmax(z)_{c,s}.

    Raises:
        ValueError: S does not divide the last dimension.

    Example:
        >>> z = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log()
        >>> class_logits(z, 2).softmax(-1)
        tensor([[0.3000, 0.7000]])
    """
    if subclasses < 1 or student.dim() == 0 or student.shape[-1] % subclasses:
        raise ValueError(f"subclasses={subclasses} must divide the student's outputs {list(student.shape)}")
    return upcast(student)[0].unflatten(-1, (-1, subclasses)).logsumexp(-1)


def _whitened_axes(centred: Tensor, count: int, label: int) -> Tensor:
    """[n, D] → [count, D]: principal directions divided by their standard deviation, signs fixed."""
    if count == 0:
        return centred.new_zeros(0, centred.shape[1])
    _, values, axes = torch.linalg.svd(centred, full_matrices=False)
    floor = values[0] * max(centred.shape) * torch.finfo(torch.float32).eps
    rank = int((values > floor).sum()) if values[0] > 0 else 0
    if rank < count:
        raise ValueError(
            f"class {label} varies along only {rank} directions outside the head's row space; {count} are "
            "needed: lower subclasses"
        )
    axes = axes[:count]
    largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    return axes * largest.sign() / values[:count, None] * math.sqrt(len(centred) - 1)


def _random_rotation(size: int, rng: torch.Generator) -> Tensor:
    """A uniformly (Haar) distributed orthogonal matrix."""
    q, r = torch.linalg.qr(torch.randn(size, size, generator=rng, dtype=torch.float64))
    return q * r.diagonal().sign()


def _check_fit(embeddings: Tensor, labels: Tensor, head: Tensor, subclasses: int, pairs: bool) -> int:
    check_floating("embeddings", embeddings)
    check_floating("head_weight", head)
    if embeddings.dim() != 2 or head.dim() != 2 or head.shape[1] != embeddings.shape[1] or 0 in head.shape:
        raise ValueError(
            f"embeddings {list(embeddings.shape)} and head_weight {list(head.shape)} must be [N, D] and "
            "[C, D]"
        )
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64, got {labels.dtype}")
    if labels.shape != embeddings.shape[:1] or len(labels) == 0 or bool((labels < 0).any()):
        raise ValueError(
            f"labels have shape {list(labels.shape)}; one class ≥ 0 per row of embeddings "
            f"{list(embeddings.shape)} is needed"
        )
    if subclasses < 1 or (pairs and subclasses > 1 and subclasses % 2):
        raise ValueError(f"subclasses={subclasses} must be at least 1, and even with pairs=True")
    count = 0 if subclasses == 1 else subclasses // 2 if pairs else subclasses
    members = labels.bincount()
    if int(members.min()) <= max(count, 1):
        c = int(members.argmin())
        raise ValueError(f"class {c} has {int(members[c])} items; more than {max(count, 1)} are needed")
    return count
