"""Hypothesis-space distillation: the teacher's posterior over a support set, asked of the student in its own
space.

Both networks see the same support and query images. Each forms its own class prototypes c_k (means of its
embeddings of the support) and from them a posterior

    p(k | x) = softmax_k(−‖f(x) − c_k‖² / τ),

and the student minimises T²·KL(p_T ‖ p_S). Regions of decision are transferred, not coordinates. The method
is the one that the paper names; formula and constants are our reading.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stillhouse.core.losses import forward_kl


def class_means(support: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Class prototypes: the mean embedding of each class.

    Args:
        support: [S, d].
        labels: integers in [0, num_classes) [S]; each class must occur.
        num_classes: C.

    Returns:
        [C, d].

    Raises:
        ValueError: a class without support, or a label out of range.
    """
    if labels.numel() != len(support) or len(support) == 0:
        raise ValueError(f"labels has {labels.numel()} entries for {len(support)} support embeddings")
    if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        raise ValueError(
            f"labels span [{int(labels.min())}, {int(labels.max())}]; allowed is [0, {num_classes})"
        )
    counts = torch.bincount(labels, minlength=num_classes)
    if bool((counts == 0).any()):
        raise ValueError(
            f"class {int((counts == 0).nonzero()[0])} has no support; give each class at least one image"
        )
    sums = support.new_zeros(num_classes, support.shape[1]).index_add(0, labels, support)
    return sums / counts[:, None].to(support.dtype)


def hypothesis_logits(
    queries: Tensor, support: Tensor, labels: Tensor, num_classes: int, *, tau: float
) -> Tensor:
    """−‖q − c_k‖²/τ for each query and class, with prototypes made of the support: for training.

    `metrics.prototype_logits` is the same formula for prototypes that are there already: for scoring.

    Args:
        queries: [Q, d].
        support: [S, d] embeddings of the same network.
        labels: [S] integers in [0, num_classes).
        num_classes: C.
        tau: τ > 0, on squared distances.

    Returns:
        [Q, C].

    Example:
        >>> query, support = torch.tensor([[0.0, 1.0]]), torch.eye(2)
        >>> hypothesis_logits(query, support, torch.tensor([0, 1]), 2, tau=1.0)
        tensor([[-2., -0.]])
    """
    if not tau > 0:
        raise ValueError(f"tau is {tau}; it must be above 0")
    return -_squared(queries, class_means(support, labels, num_classes)) / tau


def leave_one_out_logits(support: Tensor, labels: Tensor, num_classes: int, *, tau: float) -> Tensor:
    """The same for support images as their own queries, each left out of the prototype of its class.

    An image that helps to form its own prototype is nearer to it than a new image would be. A class with
    one image keeps it (there would be nothing else).

    Args:
        support: [S, d].
        labels: [S] integers in [0, num_classes).
        num_classes: C.
        tau: τ > 0.

    Returns:
        [S, C].
    """
    if not tau > 0:
        raise ValueError(f"tau is {tau}; it must be above 0")
    prototypes = class_means(support, labels, num_classes)
    counts = torch.bincount(labels, minlength=num_classes).to(support.dtype)[labels][:, None]
    own = prototypes[labels]
    without = torch.where(counts > 1, (counts * own - support) / (counts - 1).clamp_min(1), own)
    own_column = torch.nn.functional.one_hot(labels, num_classes).bool()
    squared = torch.where(
        own_column, (support - without).square().sum(1, keepdim=True), _squared(support, prototypes)
    )
    return -squared / tau


def mean_posterior(branch_logits: Sequence[Tensor]) -> Tensor:
    """Logarithm of the mean of the branches' posteriors.

    Args:
        branch_logits: logits [Q, C] of each branch.

    Returns:
        log p [Q, C]; its rows sum to 1 after exp.

    Example:
        >>> mean_posterior([torch.zeros(1, 2), torch.tensor([[0.0, 60.0]])]).exp()
        tensor([[0.2500, 0.7500]])
    """
    if not branch_logits:
        raise ValueError("branch_logits is empty; give the logits of at least one branch")
    stacked = torch.stack([logits.float().log_softmax(-1) for logits in branch_logits])
    return stacked.logsumexp(0) - torch.log(torch.tensor(float(len(stacked)), device=stacked.device))


def hypothesis_kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """T²·KL(p_T ‖ p_S), mean over the queries; the teacher gets no gradient.

    Args:
        student_logits: of `hypothesis_logits` in the student's space [Q, C].
        teacher_logits: the same in the teacher's space, or log-probabilities of `mean_posterior` [Q, C].
        temperature: T > 0.
        mask: which queries count, bool [Q].

    Returns:
        Scalar, 0 where both posteriors agree.

    Example:
        >>> student = torch.tensor([[0.0, 1.0]])
        >>> float(hypothesis_kd(student, student + 3.0))
        0.0
    """
    return forward_kl(student_logits, teacher_logits, temperature=temperature, mask=mask, scale_t2=True)


def _squared(a: Tensor, b: Tensor) -> Tensor:
    """Squared Euclidean distances [N, M] from differences: exact 0 and gradients at equality."""
    return (a[:, None] - b[None]).square().sum(-1)
