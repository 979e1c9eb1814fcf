"""Vocabularies of student and teacher: compare them before a token-level loss, cut both to what they share.

Logit losses need column i to be the same token on both sides. Language-model heads are often padded beyond
the tokenizer (151,936 and 152,064 columns for one tokenizer of 151,665 tokens), and an equal *size* says
nothing about equal tokens. Filling the missing columns with zeros would give them real probability.

When to use: `VocabAlignment` before any token-level loss between two language models; `uld_loss` only where
it says "cross-tokenizer".

Legend: V columns of a head, U shared tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from ._reduction import (
    Reduction,
    check_floating,
    check_mask,
    check_reduction,
    check_temperature,
    reduce_rows,
    upcast,
)

Kind = Literal["identical", "prefix-truncate", "intersect", "cross-tokenizer"]


@runtime_checkable
class HasVocabulary(Protocol):
    """A tokenizer of `transformers` or `tokenizers`: anything with get_vocab() → {token: id}."""

    def get_vocab(self) -> dict[str, int]:
        """Return the map from token to id, added tokens included."""


@dataclass(frozen=True, kw_only=True)
class VocabAlignment:
    """How the columns of two language-model heads correspond; build it with `check`, apply it with `align`.

    Attributes:
        kind: "identical": the token → id maps are equal. "prefix-truncate": one map is the other plus tokens
            with ids beyond it. "intersect": enough tokens are shared, but ids differ or each side has tokens
            of its own. "cross-tokenizer": too few are shared; token-level losses do not apply (use
            `uld_loss`).
        shared: U, the number of shared tokens.
        student_size: ids of the student's tokenizer, max id + 1.
        teacher_size: ids of the teacher's tokenizer, max id + 1.
        student_ids: int64 [U], ids of the shared tokens in the student's head, ascending.
        teacher_ids: int64 [U], ids of the same tokens in the teacher's head.

    Example:
        >>> student = {"a": 0, "b": 1, "c": 2}
        >>> alignment = VocabAlignment.check(student, student | {"<image>": 3})
        >>> alignment.kind
        'prefix-truncate'
        >>> s, t = alignment.align(torch.randn(2, 3), torch.randn(2, 8))  # the teacher's head is padded to 8
        >>> s.shape, t.shape
        (torch.Size([2, 3]), torch.Size([2, 3]))
    """

    kind: Kind
    shared: int
    student_size: int
    teacher_size: int
    student_ids: Tensor = field(repr=False)
    teacher_ids: Tensor = field(repr=False)

    @classmethod
    def check(
        cls,
        student: Mapping[str, int] | HasVocabulary,
        teacher: Mapping[str, int] | HasVocabulary,
        *,
        min_overlap: float = 0.9,
    ) -> VocabAlignment:
        """Compare two vocabularies, token by token.

        Args:
            student: the student's token → id map, or its tokenizer.
            teacher: the teacher's token → id map, or its tokenizer.
            min_overlap: smallest share of the *smaller* vocabulary that must exist in the other one to call
                them one tokenizer with changes ("intersect") rather than two ("cross-tokenizer"). In (0, 1];
                the default is our choice. Sharing tokens does not prove that both cut a text alike: when in
                doubt compare the ids of a few texts.

        Returns:
            The alignment.

        Raises:
            TypeError: neither a mapping nor a tokenizer, or an id that is not an integer.
            ValueError: an empty vocabulary, a negative or repeated id, or min_overlap outside (0, 1].

        Example:
            >>> ids = {"a": 0, "b": 1, "c": 2, "d": 3}
            >>> VocabAlignment.check(ids, {"d": 0, "c": 1, "b": 2, "a": 3}).kind  # equal sizes, other tokens
            'intersect'
        """
        if not 0 < min_overlap <= 1:
            raise ValueError(f"min_overlap={min_overlap} must lie in (0, 1]")
        s, t = _read("student", student), _read("teacher", teacher)
        pairs = sorted((i, t[token]) for token, i in s.items() if token in t)
        sizes = max(s.values()) + 1, max(t.values()) + 1
        kind: Kind
        if len(pairs) < min_overlap * min(len(s), len(t)):
            kind = "cross-tokenizer"
        elif len(pairs) == len(s) == len(t) and all(i == j for i, j in pairs):
            kind = "identical"
        elif all(i == j for i, j in pairs) and _extends(s, t, sizes):
            kind = "prefix-truncate"
        else:
            kind = "intersect"
        ids = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
        return cls(
            kind=kind,
            shared=len(pairs),
            student_size=sizes[0],
            teacher_size=sizes[1],
            student_ids=ids[:, 0].contiguous(),
            teacher_ids=ids[:, 1].contiguous(),
        )

    def align(self, student_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
        """Cut both logits to the shared tokens, in one order.

        The softmax of the result is the distribution renormalised over the shared tokens, so any logit loss
        can follow. Columns of a padded head beyond the tokenizer are dropped.

        Args:
            student_logits: [..., Vs], Vs ≥ student_size.
            teacher_logits: [..., Vt], Vt ≥ teacher_size.

        Returns:
            Two tensors [..., U]; views where the shared ids are 0 … U−1, copies otherwise. Both keep their
            graph.

        Raises:
            TypeError: not floating point.
            ValueError: a head narrower than its tokenizer, or kind "cross-tokenizer".
        """
        if self.kind == "cross-tokenizer":
            raise ValueError(
                f"the two tokenizers share only {self.shared} tokens ({self.student_size} and "
                f"{self.teacher_size} ids): columns cannot be matched; use uld_loss, or a student with "
                "the teacher's tokenizer"
            )
        sides = (
            ("student", student_logits, self.student_size, self.student_ids),
            ("teacher", teacher_logits, self.teacher_size, self.teacher_ids),
        )
        cut = []
        for name, logits, size, ids in sides:
            check_floating(f"{name}_logits", logits)
            if logits.dim() == 0 or logits.shape[-1] < size:
                width = logits.shape[-1] if logits.dim() else 0
                raise ValueError(
                    f"{name}_logits have {width} columns but the {name}'s tokenizer has ids "
                    f"up to {size - 1}. A padded head may be wider than {size}, never narrower: were student "
                    "and teacher exchanged, or tokens added without resizing the head?"
                )
            cut.append(_select(logits, ids))
        return cut[0], cut[1]


def _select(logits: Tensor, ids: Tensor) -> Tensor:
    count = len(ids)
    if count and int(ids[0]) == 0 and int(ids[-1]) == count - 1 and bool((ids.diff() == 1).all()):
        return logits[..., :count]
    return logits.index_select(-1, ids.to(logits.device))


def _extends(s: Mapping[str, int], t: Mapping[str, int], sizes: tuple[int, int]) -> bool:
    """Whether the larger map is the smaller one plus tokens with ids at or beyond its end."""
    small, large, size = (s, t, sizes[0]) if sizes[0] <= sizes[1] else (t, s, sizes[1])
    added = [i for token, i in large.items() if token not in small]
    return all(token in large for token in small) and min(added, default=size) >= size


def _read(name: str, vocabulary: Mapping[str, int] | HasVocabulary) -> dict[str, int]:
    if isinstance(vocabulary, Mapping):
        ids = dict(vocabulary)
    elif isinstance(vocabulary, HasVocabulary):
        ids = dict(vocabulary.get_vocab())
    else:
        raise TypeError(
            f"{name} must be a token → id mapping or a tokenizer with get_vocab(), "
            f"got {type(vocabulary).__name__}"
        )
    if not ids:
        raise ValueError(f"{name}'s vocabulary is empty")
    seen: dict[int, str] = {}
    for token, i in ids.items():
        if isinstance(i, bool) or not isinstance(i, int):
            raise TypeError(f"{name}'s token {token!r} has id {i!r}; an integer is needed")
        if i < 0:
            raise ValueError(f"{name}'s token {token!r} has the negative id {i}")
        if i in seen:
            raise ValueError(f"{name}'s tokens {seen[i]!r} and {token!r} share the id {i}")
        seen[i] = token
    return ids


def uld_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "token_mean",
    num_items: int | Tensor | None = None,
) -> Tensor:
    """Universal logit distillation: Wasserstein-1 between *sorted* probabilities, for two tokenizers.

    loss = mean over tokens of Σ_i |q_(i) − p_(i)|, with q_(1) ≥ q_(2) ≥ … the sorted student probabilities,
    p_(i) the teacher's, and the shorter list continued with zeros (here right: these are probabilities, not
    logits).

    It is the cheapest one-to-one relabelling of tokens, and so ignores *which* token is probable: weak, but
    defined for any two vocabularies.

    Args:
        student: logits [..., Vs].
        teacher: logits [..., Vt] with the same leading shape, position k of both belonging together; no
            gradient flows into them. With sequences of different length cut both to the shorter one, or match
            spans first.
        temperature: T > 0 for both, or a tensor that broadcasts to [..., 1].
        mask: bool [...], True = the position counts.
        reduction: over positions: "token_mean", "sum", "batch_mean" or "none" ([...], zero where masked).
        num_items: global number of valid positions, for "token_mean" over accumulation steps or ranks.

    Returns:
        Scalar in [0, 2], or [...].

    Raises:
        TypeError: not floating point, or the mask not boolean.
        ValueError: leading shapes differ, or temperature ≤ 0.

    Source: Boizard et al., "Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for
    LLMs", 2024.

    Relations to sibling losses: never more than twice the total variation where vocabularies agree; then use
    `forward_kl` after `VocabAlignment.align`.

    Example:
        >>> uld_loss(torch.tensor([[0.0, 3.0, 1.0]]), torch.tensor([[3.0, 1.0, 0.0]])).item()
        0.0
    """
    check_floating("student", student)
    check_floating("teacher", teacher)
    if (
        student.dim() == 0
        or student.shape[:-1] != teacher.shape[:-1]
        or 0 in (student.shape[-1], teacher.shape[-1])
    ):
        raise ValueError(
            f"student has shape {list(student.shape)} and teacher {list(teacher.shape)}; all but the "
            "last dimension must be equal, and the last not empty"
        )
    shape = student.shape[:-1]
    check_temperature(temperature, shape)
    check_mask(mask, shape)
    check_reduction(reduction, num_items)
    student, teacher = upcast(student, teacher.detach())
    student, teacher = student / temperature, teacher / temperature
    if mask is None:
        student, teacher = student.reshape(-1, student.shape[-1]), teacher.reshape(-1, teacher.shape[-1])
    else:
        student, teacher = student[mask], teacher[mask]
    q, p = (z.softmax(-1).sort(-1, descending=True).values for z in (student, teacher))
    width = max(q.shape[-1], p.shape[-1])
    q, p = (F.pad(x, (0, width - x.shape[-1])) for x in (q, p))
    return reduce_rows(
        (q - p).abs().sum(-1), mask=mask, shape=shape, reduction=reduction, num_items=num_items
    )
