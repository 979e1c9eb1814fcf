"""Grouped masking: whole groups, nothing in between, the share asked for, N never."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.genomic.masking import GroupMask, group_mask, nothing_masked, seeded_mask
from stillhouse.genomic.tokenizers import KmerTokenizer, KmerTokens

TOKENIZERS = {k: KmerTokenizer(k) for k in (3, 6)}


def _windows(seed: int, rows: int, length: int, share_n: float) -> np.ndarray:
    rng = np.random.default_rng(seed)
    windows = np.frombuffer(b"ACGT", np.uint8)[rng.integers(0, 4, (rows, length))]
    return np.where(rng.random((rows, length)) < share_n, ord("N"), windows).astype(np.uint8)


def _check(tokens: KmerTokens, mask: GroupMask, windows: np.ndarray) -> None:
    """The properties of the specification, character by character."""
    for row in range(len(windows)):
        covered = np.zeros(windows.shape[1], int)
        for token in range(int(tokens.lengths[row])):
            members = (tokens.groups[row] == token).numpy()
            covered += members
            hidden = mask.characters[row].numpy()[members]
            if mask.groups[row, token]:
                assert hidden.all()
                assert (windows[row][members] != ord("N")).all()
                assert not mask.alignable[row, token]
            else:
                assert not hidden.any()
            if mask.alignable[row, token]:
                assert (windows[row][members] != ord("N")).all()
                assert not mask.groups[row, token]
        inside = (tokens.groups[row] >= 0).numpy()
        assert (covered == inside).all()  # every character is in one group, masked or not
        assert not mask.characters[row].numpy()[~inside].any()
        padding = ~tokens.valid[row]
        assert not mask.groups[row][padding].any()
        assert not mask.alignable[row][padding].any()
    letters = (windows != ord("N")) & (tokens.groups >= 0).numpy()
    assert (mask.letters.numpy() == letters).all()
    together = tokens.spread(mask.groups | mask.alignable).numpy()
    assert (together == letters).all()  # masked and alignable tokens cover every nucleotide


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 3),
    length=st.integers(1, 80),
    share_n=st.sampled_from([0.0, 0.02, 0.2, 0.9, 1.0]),
    ratio=st.floats(0.01, 0.99),
    k=st.sampled_from([3, 6]),
    short=st.booleans(),
)
def test_a_masked_token_is_masked_whole_and_a_visible_one_not_at_all(
    seed: int, rows: int, length: int, share_n: float, ratio: float, k: int, short: bool
) -> None:
    tokenizer, windows = TOKENIZERS[k], _windows(seed, rows, length, share_n)
    lengths = np.random.default_rng(seed).integers(0, length + 1, rows) if short else None
    tokens = tokenizer.encode(windows, lengths)
    generator = torch.Generator().manual_seed(seed)
    for mask in (
        group_mask(tokens, ratio, tokenizer=tokenizer, generator=generator),
        seeded_mask(tokens, ratio, tokenizer=tokenizer, key=seed),
    ):
        _check(tokens, mask, windows)


@pytest.mark.parametrize("ratio", [0.15, 0.5, 0.75])
def test_the_masked_share_lies_within_binomial_bounds(ratio: float) -> None:
    tokenizer = TOKENIZERS[6]
    tokens = tokenizer.encode(_windows(0, 200, 600, 0.01))
    candidates = int((tokenizer.is_letters(tokens.ids) & tokens.valid).sum())
    spread = 5 * math.sqrt(ratio * (1 - ratio) / candidates)  # 5 standard deviations
    for mask in (
        group_mask(tokens, ratio, tokenizer=tokenizer, generator=torch.Generator().manual_seed(1)),
        seeded_mask(tokens, ratio, tokenizer=tokenizer, key=1),
    ):
        assert abs(int(mask.groups.sum()) / candidates - ratio) < spread
        single = tokens.sizes == 1
        letters = single & tokenizer.is_letters(tokens.ids)
        share = float(mask.groups[letters].double().mean())  # left-over letters as often as k-mers
        assert abs(share - ratio) < 5 * math.sqrt(ratio * (1 - ratio) / int(letters.sum()))


def test_every_window_has_something_to_see_and_something_to_guess() -> None:
    tokenizer = TOKENIZERS[3]
    tokens = tokenizer.encode(_windows(0, 300, 9, 0.0))
    for ratio in (0.01, 0.99):
        mask = group_mask(tokens, ratio, tokenizer=tokenizer, generator=torch.Generator().manual_seed(0))
        assert mask.groups.any(1).all()
        assert mask.alignable.any(1).all()


def test_a_seeded_mask_follows_from_key_and_window_alone() -> None:
    tokenizer = TOKENIZERS[6]
    windows = _windows(0, 8, 120, 0.02)
    tokens = tokenizer.encode(windows)
    whole = seeded_mask(tokens, 0.4, tokenizer=tokenizer, key=7)
    part = seeded_mask(tokenizer.encode(windows[5:]), 0.4, tokenizer=tokenizer, key=7)
    assert torch.equal(whole.characters[5:], part.characters)
    other = seeded_mask(tokens, 0.4, tokenizer=tokenizer, key=8)
    assert not torch.equal(whole.characters, other.characters)
    rows = [whole.characters[i].tolist() for i in range(8)]
    assert len({tuple(row) for row in rows}) == 8


def test_nothing_masked_hides_nothing() -> None:
    tokenizer = TOKENIZERS[6]
    windows = _windows(0, 4, 60, 0.1)
    mask = nothing_masked(tokenizer.encode(windows), tokenizer=tokenizer)
    assert not mask.groups.any()
    assert torch.equal(mask.letters, torch.from_numpy(windows != ord("N")))


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1, float("nan")])
def test_a_share_out_of_range_is_refused(ratio: float) -> None:
    tokens = TOKENIZERS[3].encode(_windows(0, 1, 9, 0.0))
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        group_mask(tokens, ratio, tokenizer=TOKENIZERS[3], generator=torch.Generator())
