"""What a teacher is, and what all of them do with their input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from ..tokenizers import KmerTokenizer, KmerTokens


@runtime_checkable
class Teacher(Protocol):
    """A frozen network over k-mer tokens.

    Attributes:
        name: for people.
        tokenizer: the vocabulary its tokens must come from.
        network: the frozen module, for `Distiller.frozen` and for `to(device)`.
        width: channels of a feature.
        depth: number of blocks.
        licence: SPDX identifier of the weights' terms, or None when it is not known. A student inherits it.
        parameters: number of weights.
    """

    @property
    def name(self) -> str: ...

    @property
    def tokenizer(self) -> KmerTokenizer: ...

    @property
    def network(self) -> nn.Module: ...

    @property
    def width(self) -> int: ...

    @property
    def depth(self) -> int: ...

    @property
    def licence(self) -> str | None: ...

    @property
    def parameters(self) -> int: ...

    def features(
        self, tokens: KmerTokens, *, visible: Tensor | None = None, layers: Sequence[int] = (-1,)
    ) -> list[Tensor]:
        """Hidden states of tokens.

        Args:
            tokens: a batch in the teacher's own vocabulary.
            visible: bool [B, T]; hidden tokens are replaced by the mask token before anything else, so that
                no feature depends on what they hold (our reading: the paper does not say what the teacher
                sees). Their features come back too, as those of masked tokens. None: everything is visible.
            layers: which hidden states: 0 the embeddings, i the output of block i, −1 the last.

        Returns:
            One tensor [B, T, width] float32 a layer, on the device of the network, without gradient and
            without [CLS]. What stands at padding means nothing.
        """
        ...

    def nucleotide_log_probs(self, tokens: KmerTokens, *, visible: Tensor | None = None) -> Tensor:
        """What the teacher's distribution over tokens says about each character.

        Returns:
            Log-probabilities [B, L, 4] float32 in the order A, C, G, T; see `nucleotide_marginals`.
        """
        ...

    def untrained(self, seed: int) -> Teacher:
        """The same architecture with fresh weights."""
        ...


def shown_ids(tokens: KmerTokens, visible: Tensor | None, mask_id: int) -> Tensor:
    """Token ids with the hidden ones replaced by the mask token, int64 [B, T]; padding stays padding."""
    if visible is None:
        return tokens.ids
    if visible.shape != tokens.ids.shape or visible.dtype.is_floating_point or visible.dtype.is_complex:
        raise ValueError(
            f"visible is {visible.dtype} {tuple(visible.shape)}; it must be bool [B, T] = "
            f"{tuple(tokens.ids.shape)}, True = the teacher sees the token"
        )
    hidden = ~visible.to(tokens.ids.device).bool() & tokens.valid
    return tokens.ids.masked_fill(hidden, mask_id)


def layer_indices(layers: Sequence[int], depth: int) -> list[int]:
    """Indices in [0, depth] of hidden states, counted from the end where negative.

    Raises:
        ValueError: no layer, or one that is not there.
    """
    if not layers:
        raise ValueError("layers is empty; name at least one, −1 is the last")
    for layer in layers:
        if not -depth - 1 <= layer <= depth:
            raise ValueError(
                f"layers holds {layer}; this teacher has the embeddings 0 and the blocks 1 … {depth} "
                f"(or −1 … {-depth - 1})"
            )
    return [layer % (depth + 1) for layer in layers]


def count_parameters(network: nn.Module) -> int:
    """Number of weights, tied ones once."""
    return sum(p.numel() for p in network.parameters())


def check_tokens(tokens: KmerTokens, tokenizer: KmerTokenizer, limit: int | None) -> None:
    """Refuse ids beyond the vocabulary and sequences beyond the context.

    Raises:
        ValueError: naming both numbers.
    """
    if limit is not None and tokens.ids.shape[1] > limit:
        raise ValueError(
            f"a window has {tokens.ids.shape[1]} tokens and this teacher reads {limit}; take shorter windows "
            "(every N is a token of its own)"
        )
    if tokens.ids.numel() and int(tokens.ids.max()) >= tokenizer.vocab_size:
        raise ValueError(
            f"tokens hold the id {int(tokens.ids.max())} and the teacher's vocabulary ends at "
            f"{tokenizer.vocab_size - 1}; tokenise with teacher.tokenizer"
        )
