"""Which student layer learns from which teacher layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from ..losses.features import linear_cka

T = TypeVar("T")


@dataclass(frozen=True)
class LayerMap:
    """Pairs of (student layer, teacher layer). Layer 0 is the embedding output, layer i ≥ 1 the output of
    block i.

    Args:
        pairs: The pairs, in order.
        student_layers: Number of student blocks, where known.
        teacher_layers: Number of teacher blocks, where known.

    Raises:
        ValueError: No pairs, or a layer that does not exist.

    Example:
        >>> LayerMap.uniform(4, 12).pairs
        ((1, 3), (2, 6), (3, 9), (4, 12))
    """

    pairs: tuple[tuple[int, int], ...]
    student_layers: int | None = None
    teacher_layers: int | None = None

    def __post_init__(self) -> None:
        pairs = tuple((int(s), int(t)) for s, t in self.pairs)
        object.__setattr__(self, "pairs", pairs)
        if not pairs:
            raise ValueError("pairs must hold at least one (student layer, teacher layer)")
        for side, index, layers in (("student", 0, self.student_layers), ("teacher", 1, self.teacher_layers)):
            if layers is not None and layers < 1:
                raise ValueError(f"{side}_layers must be at least 1, got {layers!r}")
            for pair in pairs:
                if pair[index] < 0 or (layers is not None and pair[index] > layers):
                    allowed = "≥ 0" if layers is None else f"in 0 … {layers}"
                    raise ValueError(f"{side} layer {pair[index]} of the pair {pair} must be {allowed}")

    @classmethod
    def uniform(cls, student_layers: int, teacher_layers: int, *, embedding: bool = False) -> LayerMap:
        """Spreads the student's blocks evenly: i → round(i · teacher_layers / student_layers), halves
        upwards.

        Args:
            student_layers: Number of student blocks.
            teacher_layers: Number of teacher blocks.
            embedding: Also map layer 0 to layer 0.
        """
        _positive(student_layers, teacher_layers)
        pairs = [
            (i, max(1, (2 * i * teacher_layers + student_layers) // (2 * student_layers)))
            for i in range(1, student_layers + 1)
        ]
        return cls(tuple([(0, 0)] * embedding + pairs), student_layers, teacher_layers)

    @classmethod
    def last(cls, n: int, student_layers: int, teacher_layers: int) -> LayerMap:
        """Maps the last `n` blocks of the student to the last `n` of the teacher."""
        _positive(student_layers, teacher_layers)
        if not 1 <= n <= min(student_layers, teacher_layers):
            raise ValueError(f"n must lie in [1, {min(student_layers, teacher_layers)}], got {n!r}")
        pairs = tuple((student_layers - j, teacher_layers - j) for j in reversed(range(n)))
        return cls(pairs, student_layers, teacher_layers)

    @classmethod
    def first_last(cls, student_layers: int, teacher_layers: int) -> LayerMap:
        """Maps the first block to the first and the last to the last."""
        _positive(student_layers, teacher_layers)
        ends = ((1, 1), (student_layers, teacher_layers))
        return cls(ends if student_layers > 1 else ends[1:], student_layers, teacher_layers)

    @classmethod
    def explicit(
        cls,
        pairs: Sequence[tuple[int, int]],
        *,
        student_layers: int | None = None,
        teacher_layers: int | None = None,
    ) -> LayerMap:
        """Takes the pairs as given; the numbers of layers, where given, are checked against."""
        return cls(tuple(pairs), student_layers, teacher_layers)

    @classmethod
    def search(
        cls,
        student_features: Sequence[Tensor],
        teacher_features: Sequence[Tensor],
        *,
        similarity: Callable[[Tensor, Tensor], Tensor] = linear_cka,
        monotone: bool = True,
    ) -> LayerMap:
        """Finds for each student block the teacher block with the most similar features.

        With `monotone` the teacher layers do not decrease along the student, and the *sum* of the
        similarities is the largest among all such maps (dynamic programming); otherwise each block takes its
        best on its own.

        Args:
            student_features: Features of blocks 1 … n on one set of samples, each [N, ...] (flattened to [N,
                D]).
            teacher_features: The same of the teacher, on the same samples.
            similarity: Of two [N, D] tensors, larger is more similar.
            monotone: See above.
        """
        table = similarity_matrix(student_features, teacher_features, similarity=similarity)
        chosen = _best_monotone(table) if monotone else table.argmax(dim=1).tolist()
        pairs = tuple((s + 1, t + 1) for s, t in enumerate(chosen))
        return cls(pairs, len(student_features), len(teacher_features))

    def select(self, student: Sequence[T], teacher: Sequence[T]) -> list[tuple[T, T]]:
        """Picks the mapped hidden states.

        Args:
            student: Embedding output and block outputs, so one more than there are blocks (as
                ``output_hidden_states`` of transformers gives them).
            teacher: The same of the teacher.

        Raises:
            ValueError: A sequence without its embedding entry, or too short.
        """
        for side, states, layers, index in (
            ("student", student, self.student_layers, 0),
            ("teacher", teacher, self.teacher_layers, 1),
        ):
            needed = max(pair[index] for pair in self.pairs) + 1
            if layers is not None and len(states) != layers + 1:
                raise ValueError(
                    f"{side} has {len(states)} hidden states; {layers} blocks and the embedding output "
                    f"make {layers + 1}"
                )
            if len(states) < needed:
                raise ValueError(f"{side} has {len(states)} hidden states; the map needs at least {needed}")
        return [(student[s], teacher[t]) for s, t in self.pairs]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self.pairs)

    def __len__(self) -> int:
        return len(self.pairs)


@torch.no_grad()
def similarity_matrix(
    student_features: Sequence[Tensor],
    teacher_features: Sequence[Tensor],
    *,
    similarity: Callable[[Tensor, Tensor], Tensor] = linear_cka,
) -> Tensor:
    """Similarity of every student block with every teacher block: [student blocks, teacher blocks].

    Raises:
        ValueError: No features, or different numbers of samples.
    """
    rows = {feature.shape[0] for feature in (*student_features, *teacher_features)}
    if not student_features or not teacher_features or len(rows) != 1:
        raise ValueError(
            f"features of one set of samples are needed on both sides, got sample numbers {sorted(rows)}"
        )
    students = [feature.flatten(1) for feature in student_features]
    teachers = [feature.flatten(1) for feature in teacher_features]
    return torch.stack([torch.stack([similarity(s, t) for t in teachers]) for s in students])


def _best_monotone(table: Tensor) -> list[int]:
    scores = table.double().tolist()
    columns = range(len(scores[0]))
    best, back = list(scores[0]), []
    for row in scores[1:]:
        prefix: list[int] = []  # prefix[t]: where the best predecessor among 0 … t lies
        for t in columns:
            prefix.append(t if t == 0 or best[t] > best[prefix[-1]] else prefix[-1])
        back.append(prefix)
        best = [best[prefix[t]] + row[t] for t in columns]
    chosen = [max(columns, key=lambda t: best[t])]
    for prefix in reversed(back):
        chosen.append(prefix[chosen[-1]])
    return chosen[::-1]


def _positive(student_layers: int, teacher_layers: int) -> None:
    if student_layers < 1 or teacher_layers < 1:
        raise ValueError(f"numbers of layers must be ≥ 1, got {student_layers!r} and {teacher_layers!r}")
