"""Teachers that know nothing, or say it in the wrong place: the controls of an ablation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..tokenizers import KmerTokenizer, KmerTokens
from ._masked_language import _window_hash
from ._protocol import Teacher


class _Around:
    """What a wrapped teacher has in common with the one inside."""

    def __init__(self, teacher: Teacher, seed: int) -> None:
        if type(seed) is not int or seed < 0:
            raise ValueError(f"seed is {seed!r}; it must be an integer ≥ 0")
        self.teacher, self.seed = teacher, seed

    @property
    def tokenizer(self) -> KmerTokenizer:
        """Vocabulary of the teacher inside."""
        return self.teacher.tokenizer

    @property
    def network(self) -> nn.Module:
        """Network of the teacher inside."""
        return self.teacher.network

    @property
    def width(self) -> int:
        """Channels of a feature."""
        return self.teacher.width

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return self.teacher.depth

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return self.teacher.parameters

    def untrained(self, seed: int) -> Teacher:
        """The architecture of the teacher inside with fresh weights."""
        return self.teacher.untrained(seed)


class RandomTeacher(_Around):
    """A teacher's architecture with fresh weights: features without knowledge.

    Args:
        teacher: the architecture; its weights are left alone.
        seed: of the fresh weights.
    """

    def __init__(self, teacher: Teacher, *, seed: int = 0) -> None:
        super().__init__(teacher, seed)
        self.teacher = teacher.untrained(seed)

    @property
    def name(self) -> str:
        """For people."""
        return self.teacher.name

    @property
    def licence(self) -> str | None:
        """None: no trained weight is in it."""
        return None

    def features(
        self, tokens: KmerTokens, *, visible: Tensor | None = None, layers: Sequence[int] = (-1,)
    ) -> list[Tensor]:
        """See `Teacher.features`."""
        return self.teacher.features(tokens, visible=visible, layers=layers)

    def nucleotide_log_probs(self, tokens: KmerTokens, *, visible: Tensor | None = None) -> Tensor:
        """See `Teacher.nucleotide_log_probs`."""
        return self.teacher.nucleotide_log_probs(tokens, visible=visible)


class ShuffledTeacher(_Around):
    """A teacher whose answers are given to other tokens: the right distribution, the wrong places.

    The features of all visible tokens of a batch are permuted over windows and positions, the same way in
    every layer; no token keeps its own (unless it is the only one). The permutation follows from the seed and
    the content of the batch, so that a run can be repeated. Hidden tokens and padding keep theirs.

    Args:
        teacher: the teacher inside.
        seed: of the permutations.
    """

    def __init__(self, teacher: Teacher, *, seed: int = 0) -> None:
        super().__init__(teacher, seed)

    @property
    def name(self) -> str:
        """For people."""
        return f"shuffled {self.teacher.name}"

    @property
    def licence(self) -> str | None:
        """That of the teacher inside."""
        return self.teacher.licence

    def features(
        self, tokens: KmerTokens, *, visible: Tensor | None = None, layers: Sequence[int] = (-1,)
    ) -> list[Tensor]:
        """See `Teacher.features`; the order of the tokens is lost."""
        among = tokens.valid if visible is None else tokens.valid & visible.to(tokens.ids.device).bool()
        return [
            self._permuted(values, tokens, among)
            for values in self.teacher.features(tokens, visible=visible, layers=layers)
        ]

    def nucleotide_log_probs(self, tokens: KmerTokens, *, visible: Tensor | None = None) -> Tensor:
        """See `Teacher.nucleotide_log_probs`; permuted over the characters that are not N."""
        letters = self.tokenizer.is_letters(tokens.ids) & tokens.valid
        values = self.teacher.nucleotide_log_probs(tokens, visible=visible)
        return self._permuted(values, tokens, tokens.spread(letters))

    def _permuted(self, values: Tensor, tokens: KmerTokens, among: Tensor) -> Tensor:
        places = among.reshape(-1).nonzero()[:, 0].cpu()
        content = int(_window_hash(tokens).sum()) & (2**62 - 1)
        generator = torch.Generator().manual_seed((self.seed * 0x9E3779B97F4A7C15 + content) & (2**62 - 1))
        order = places[torch.randperm(len(places), generator=generator)].to(values.device)
        flat = values.reshape(-1, values.shape[-1])
        result = flat.clone()
        result[order] = flat[order.roll(1)]  # one cycle through all of them
        return result.view_as(values)
