"""Vectorised tokenisation against a loop over characters, and the character → group map."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.genomic.tokenizers import CharacterTokenizer, KmerTokenizer, KmerTokens

SIX = KmerTokenizer()
TEXT = st.text(alphabet="ACGTACGTACGTACGTN", min_size=0, max_size=80)


def greedy(text: str, k: int) -> list[str]:
    """The rule as it is stated: at each place a k-mer if the next k characters are letters, else one."""
    tokens, i = [], 0
    while i < len(text):
        piece = text[i : i + k]
        tokens.append(piece if len(piece) == k and set(piece) <= set("ACGT") else text[i])
        i += len(tokens[-1])
    return tokens


def windows(texts: list[str], width: int | None = None) -> np.ndarray:
    width = max(map(len, texts), default=0) if width is None else width
    joined = "".join(t.ljust(width, "N") for t in texts).encode()
    return np.frombuffer(joined, np.uint8).reshape(len(texts), width)


def words(tokenizer: KmerTokenizer, tokens: KmerTokens, row: int = 0) -> list[str]:
    return [tokenizer.token(i) for i in tokens.ids[row, : int(tokens.lengths[row])].tolist()]


@settings(max_examples=150, deadline=None)
@given(st.lists(TEXT, min_size=1, max_size=6), st.integers(1, 6))
def test_batches_agree_with_the_loop(texts, k):
    tokenizer = SIX if k == 6 else KmerTokenizer(k)
    width = max(map(len, texts))
    tokens = tokenizer.encode(windows(texts))
    assert (
        tokens.ids.dtype == tokens.groups.dtype == tokens.sizes.dtype == tokens.lengths.dtype == torch.int64
    )
    assert tokens.ids.shape == tokens.sizes.shape == (len(texts), int(tokens.lengths.max()))
    for row, text in enumerate(texts):
        expected = greedy(text.ljust(width, "N"), k)
        assert words(tokenizer, tokens, row) == expected
        count = len(expected)
        assert tokens.sizes[row, :count].tolist() == [len(t) for t in expected]
        assert (tokens.ids[row, count:] == tokenizer.pad_id).all()
        assert (tokens.sizes[row, count:] == 0).all()
        assert tokens.groups[row].tolist() == [i for i, t in enumerate(expected) for _ in t]


@settings(max_examples=100, deadline=None)
@given(st.lists(TEXT, min_size=1, max_size=5))
def test_lengths_leave_the_rest_outside(texts):
    tokens = SIX.encode(windows(texts), np.array([len(t) for t in texts]))
    for row, text in enumerate(texts):
        expected = greedy(text, 6)
        assert words(SIX, tokens, row) == expected
        assert tokens.groups[row, : len(text)].tolist() == [i for i, t in enumerate(expected) for _ in t]
        assert (tokens.groups[row, len(text) :] == -1).all()
        assert (tokens.offsets[row, len(text) :] == -1).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(TEXT, min_size=1, max_size=5))
def test_the_groups_partition_the_characters(texts):
    batch = windows(texts)
    tokens = SIX.encode(batch)
    assert (tokens.sizes.sum(1) == batch.shape[1]).all()
    for row in range(len(texts)):
        counted = torch.bincount(tokens.groups[row], minlength=tokens.ids.shape[1])
        assert torch.equal(counted, tokens.sizes[row])
        assert (tokens.groups[row].diff() >= 0).all()
    assert (SIX.decode(tokens) == batch).all()


def test_known_ids():
    """Printed by users of the published tokenizer: AAAAAA 6, A 4102, T 4103, C 4104, G 4105, N 4106."""
    assert SIX.vocab_size == 4107
    assert (SIX.unk_id, SIX.pad_id, SIX.mask_id, SIX.cls_id) == (0, 1, 2, 3)
    assert SIX.encode(windows(["AAAAAAT"])).ids.tolist() == [[6, 4103]]
    assert SIX.encode(windows(["ATCGN"])).ids.tolist() == [[4102, 4103, 4104, 4105, 4106]]
    assert [SIX.token(6 + i) for i in (0, 1, 2, 3, 4, 4095)] == [
        *("AAAAAA", "AAAAAT", "AAAAAC", "AAAAAG", "AAAATA", "GGGGGG"),
    ]
    assert SIX.kmer_ids.tolist() == list(range(6, 4102))


def test_an_n_breaks_the_frame():
    tokens = SIX.encode(windows(["ACGTACGTNACGTACG"]))
    assert words(SIX, tokens) == ["ACGTAC", "G", "T", "N", "ACGTAC", "G"]
    assert tokens.groups.tolist() != [[i // 6 for i in range(16)]]
    five = KmerTokenizer(5)
    assert words(five, five.encode(windows(["ATCGAATNGGCGATGCAC"]))) == [
        *("ATCGA", "A", "T", "N", "GGCGA", "TGCAC"),
    ]


def test_the_other_strand_has_other_tokens_unless_the_length_is_a_multiple_of_six():
    complement = str.maketrans("ACGT", "TGCA")
    for text, same in (("ACGGTTCAGATC", True), ("ACGGTTCAGAT", False)):
        there = words(SIX, SIX.encode(windows([text])))
        back = words(SIX, SIX.encode(windows([text.translate(complement)[::-1]])))
        assert ([w.translate(complement)[::-1] for w in back[::-1]] == there) is same


def test_lower_case_uracil_and_iupac_letters_are_read_by_rule():
    plain, odd = b"ACTGNNNNNNNNNNNAC", b"acUGRYSWKMBDHVNac"
    for tokenizer in (SIX, CharacterTokenizer()):
        got = [tokenizer.encode(np.frombuffer(t, np.uint8)[None]) for t in (plain, odd)]
        ids = [g.ids if isinstance(g, KmerTokens) else g for g in got]
        assert torch.equal(*ids)


@pytest.mark.parametrize("tokenizer", [SIX, CharacterTokenizer()], ids=["kmer", "character"])
def test_what_is_no_dna_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"windows\[1, 2\] is 'E' \(byte 69\)"):
        tokenizer.encode(np.frombuffer(b"ACGTACEL", np.uint8).reshape(2, 4))
    with pytest.raises(ValueError, match=r"must be \[B, L\]"):
        tokenizer.encode(np.frombuffer(b"ACGT", np.uint8))
    with pytest.raises(TypeError, match="uint8"):
        tokenizer.encode(np.zeros((2, 3), np.int64))
    with pytest.raises(TypeError, match="uint8"):
        tokenizer.encode("ACGT")


def test_wrong_arguments():
    for k in (0, 9, 6.0, True):
        with pytest.raises(ValueError, match="k is"):
            KmerTokenizer(k)
    with pytest.raises(ValueError, match="lengths lie in"):
        SIX.encode(windows(["ACGT"]), np.array([5]))
    with pytest.raises(ValueError, match="lengths is"):
        SIX.encode(windows(["ACGT"]), np.array([[4]]))
    lacking = {t: i for t, i in SIX.vocabulary.items() if t != "GATTAC"}
    with pytest.raises(ValueError, match="lacks 1 tokens, among them GATTAC"):
        KmerTokenizer(vocabulary=lacking)
    with pytest.raises(ValueError, match="one id to two tokens"):
        KmerTokenizer(vocabulary={**SIX.vocabulary, "<bos>": 6})


def test_empty_batches():
    for shape in ((0, 7), (3, 0), (0, 0)):
        tokens = SIX.encode(np.zeros(shape, np.uint8))
        assert tokens.ids.shape == (shape[0], 0)
        assert tokens.groups.shape == tokens.offsets.shape == shape
        assert tokens.lengths.tolist() == [0] * shape[0]
        assert tokens.spread(torch.zeros(shape[0], 0)).shape == shape
        assert CharacterTokenizer().encode(np.zeros(shape, np.uint8)).shape == shape


def test_the_input_is_left_alone_and_torch_is_read_too():
    batch = windows(["acgtacgnNac"])
    before = batch.tobytes()
    tokens = SIX.encode(batch, np.array([8]))
    assert batch.tobytes() == before
    again = SIX.encode(torch.from_numpy(batch.copy()), torch.tensor([8]))
    assert torch.equal(tokens.ids, again.ids)
    assert torch.equal(tokens.groups, again.groups)


def test_spread_offsets_and_pool():
    generator = torch.Generator().manual_seed(0)
    tokens = SIX.encode(windows(["ACGTACGTNACGTACG", "ACGTACGTACGTAC"]), np.array([16, 14]))
    features = torch.randn(2, 16, 3, generator=generator, requires_grad=True)
    pooled = tokens.pool(features)
    for row, count in enumerate(tokens.lengths.tolist()):
        for token in range(tokens.ids.shape[1]):
            members = [i for i in range(16) if int(tokens.groups[row, i]) == token]
            if token < count:
                torch.testing.assert_close(pooled[row, token], features[row, members].mean(0))
                assert tokens.offsets[row, members].tolist() == list(range(len(members)))
                assert int(tokens.starts[row, token]) == members[0]
            else:
                assert (pooled[row, token] == 0).all()
    pooled.sum().backward()
    assert features.grad is not None
    assert (features.grad[1, 14:] == 0).all()
    mask = torch.rand(tokens.ids.shape, generator=generator) < 0.5
    for row, place in product(range(2), range(16)):
        group = int(tokens.groups[row, place])
        assert bool(tokens.spread(mask)[row, place]) == (group >= 0 and bool(mask[row, group]))
    vectors = torch.randn(*tokens.ids.shape, 2, generator=generator)
    assert torch.equal(tokens.spread(vectors)[0, 8], vectors[0, 3])
    assert (tokens.spread(vectors, fill=-1.0)[1, 14:] == -1).all()
    with pytest.raises(ValueError, match=r"must be \[B, L, d\]"):
        tokens.pool(torch.zeros(2, 5, 3))


def test_kinds_of_tokens_and_selection():
    tokens = SIX.encode(windows(["ACGTACGNA", "NNNNNNNNN"]))
    assert SIX.is_kmer(tokens.ids)[0].tolist()[:4] == [True, False, False, False]
    assert SIX.is_n(tokens.ids)[0].tolist()[:4] == [False, False, True, False]
    assert SIX.is_letters(tokens.ids)[0].tolist()[:4] == [True, True, False, True]
    assert not SIX.is_letters(tokens.ids)[1].any()
    assert tokens.valid.sum(1).tolist() == [4, 9]
    one = tokens.select(torch.tensor([1]))
    assert one.ids.shape == (1, 9)
    assert torch.equal(one.lengths, tokens.lengths[1:])
    assert torch.equal(tokens.to("cpu").ids, tokens.ids)


def test_characters_have_the_ids_of_caduceus():
    tokenizer = CharacterTokenizer()
    batch = windows(["ACGTN"])
    assert tokenizer.encode(batch).tolist() == [[7, 8, 9, 10, 11]]
    assert (tokenizer.mask_id, tokenizer.pad_id, tokenizer.vocab_size) == (3, 4, 12)
    assert tokenizer.nucleotide_ids == (7, 8, 9, 10)
    assert (tokenizer.decode(tokenizer.encode(batch)) == batch).all()
    assert tokenizer.decode(torch.tensor([3, 4, 7])).tobytes() == b"NNA"
