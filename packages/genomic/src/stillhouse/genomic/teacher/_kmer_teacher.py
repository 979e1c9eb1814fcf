"""The teacher that this package trains itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stillhouse.core.teacher import freeze

from ..tokenizers import KmerTokenizer, KmerTokens
from ._kmer_transformer import KmerTransformer
from ._marginal import nucleotide_marginals
from ._protocol import check_tokens, count_parameters, layer_indices, shown_ids


class KmerTeacher:
    """A trained `KmerTransformer`, frozen; see `Teacher` for what it answers.

    The hidden state −1 is the output after the last norm. It reads no [CLS].

    Args:
        network: it is frozen in place; give a copy of one that is still trained.
        tokenizer: its vocabulary; NTv2's order for the network's k when None.
        licence: terms of the weights; None when there are none to pass on.
        name: for people.

    Raises:
        ValueError: a network and a tokenizer that do not fit.
    """

    def __init__(
        self,
        network: KmerTransformer,
        tokenizer: KmerTokenizer | None = None,
        *,
        licence: str | None = None,
        name: str = "kmer-transformer",
    ) -> None:
        tokenizer = KmerTokenizer(network.config.k) if tokenizer is None else tokenizer
        if (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.k) != (
            network.vocab_size,
            network.pad_id,
            network.config.k,
        ):
            raise ValueError(
                f"tokenizer has {tokenizer.vocab_size} ids, pad id {tokenizer.pad_id} and k = {tokenizer.k}; "
                f"the network {network.vocab_size}, {network.pad_id} and {network.config.k}"
            )
        self.network, self.tokenizer, self.licence, self.name = freeze(network), tokenizer, licence, name
        self.width, self.depth = network.config.width, network.config.depth
        self.parameters = count_parameters(network)

    def to(self, device: torch.device | str) -> KmerTeacher:
        """Move the network; returns itself."""
        self.network.to(device)
        return self

    def _states(self, tokens: KmerTokens, visible: Tensor | None, keep: tuple[int, ...]) -> list[Tensor]:
        check_tokens(tokens, self.tokenizer, self.network.config.max_tokens)
        device = self.network.embedding.weight.device
        ids = shown_ids(tokens, visible, self.tokenizer.mask_id).to(device)
        return self.network.hidden_states(ids, attend=attention(tokens, device), keep=keep)

    @torch.no_grad()
    def features(
        self, tokens: KmerTokens, *, visible: Tensor | None = None, layers: Sequence[int] = (-1,)
    ) -> list[Tensor]:
        """See `Teacher.features`."""
        wanted = layer_indices(layers, self.depth)
        states = self._states(tokens, visible, tuple(wanted))
        return [states[layer].float() for layer in wanted]

    @torch.no_grad()
    def nucleotide_log_probs(self, tokens: KmerTokens, *, visible: Tensor | None = None) -> Tensor:
        """See `Teacher.nucleotide_log_probs`."""
        last = self._states(tokens, visible, ())[-1]
        return nucleotide_marginals(self.network.logits(last), tokens.to(last.device), self.tokenizer)

    def untrained(self, seed: int) -> KmerTeacher:
        """The same architecture with fresh weights."""
        device = self.network.embedding.weight.device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            fresh = KmerTransformer(self.network.config, tokenizer=self.tokenizer)
        return KmerTeacher(fresh.to(device), self.tokenizer, name=f"untrained {self.name}")


def attention(tokens: KmerTokens, device: torch.device) -> Tensor | None:
    """Where there are tokens, bool [B, T] on a device; None when there is no padding."""
    if bool((tokens.lengths == tokens.ids.shape[1]).all()):
        return None
    return tokens.valid.to(device)
