"""From a distribution over k-mers to one over the nucleotides of each character."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..tokenizers import KmerTokenizer, KmerTokens

_TO_ACGT = (0, 2, 3, 1)  # places of A, C, G, T in the vocabulary's order A, T, C, G


def nucleotide_marginals(logits: Tensor, tokens: KmerTokens, tokenizer: KmerTokenizer) -> Tensor:
    """Log-probability of A, C, G, T at each character.

    The frame is known, so a token of k characters is one of the 4^k k-mers: the softmax runs over these
    alone, and p(x_i = a) is the sum over all k-mers with the letter a at the place of i. A token of one
    letter is one of A, T, C, G. Where the sequence has N, and beyond its end, nothing is known:
    log ¼ each. Probabilities below the smallest normal number of the type are raised to it.

    Args:
        logits: over the vocabulary, [B, T, V] with V ≥ `tokenizer.vocab_size`.
        tokens: the frame; only `sizes`, `groups` and where N stands are used.
        tokenizer: the vocabulary.

    Returns:
        [B, L, 4], float32 (float64 for float64 logits); exp sums to 1.

    Raises:
        ValueError: shapes that do not fit.

    Example:
        >>> import numpy as np
        >>> tokenizer = KmerTokenizer(k=2)
        >>> tokens = tokenizer.encode(np.frombuffer(b"ACG", np.uint8)[None])
        >>> logits = torch.zeros(1, 2, tokenizer.vocab_size)
        >>> logits[0, 0, tokenizer.vocabulary["AC"]] = 20.0
        >>> nucleotide_marginals(logits, tokens, tokenizer).exp().round(decimals=2)[0].tolist()
        [[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]]
    """
    if logits.shape[:2] != tokens.ids.shape or logits.shape[-1] < tokenizer.vocab_size:
        raise ValueError(
            f"logits has the shape {tuple(logits.shape)}; it must be [B, T, V] with [B, T] = "
            f"{tuple(tokens.ids.shape)} and V ≥ {tokenizer.vocab_size}"
        )
    logits = logits if logits.dtype == torch.float64 else logits.float()
    k, device = tokenizer.k, logits.device
    sizes, known = tokens.sizes, ~tokenizer.is_n(tokens.ids)
    table = logits.new_full((*tokens.ids.shape, k, 4), -math.log(4))
    whole = (sizes == k) & known
    single = (sizes == 1) & known if k > 1 else torch.zeros_like(whole)
    if whole.any():
        probs = logits[whole][:, tokenizer.kmer_ids.to(device)].softmax(-1)
        flat = probs @ spelling(k).to(probs)
        tiny = torch.finfo(flat.dtype).tiny
        table[whole] = flat.clamp_min(tiny).log().view(-1, k, 4)
    if single.any():
        letters = logits[single][:, tokenizer.letter_ids.to(device)].log_softmax(-1)
        table[single] = letters[:, None, :].expand(-1, k, -1).clone()
    if not tokens.ids.shape[1]:
        return logits.new_full((*tokens.groups.shape, 4), -math.log(4))
    rows = torch.arange(len(tokens.ids), device=device)[:, None]
    inside = tokens.groups >= 0
    found = table[rows, tokens.groups.clamp_min(0), tokens.offsets.clamp_min(0)]
    found = found.masked_fill(~inside[..., None], -math.log(4))
    return found[..., list(_TO_ACGT)]


def spelling(k: int) -> Tensor:
    """int64 [4^k, k · 4]: 1 where the k-mer has the letter at the place; letters in the order A T C G."""
    values = torch.arange(4**k)
    digits = torch.stack([(values >> (2 * (k - 1 - j))) & 3 for j in range(k)], dim=1)
    return torch.nn.functional.one_hot(digits, 4).view(4**k, k * 4)
