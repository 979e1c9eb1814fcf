"""Tokenizers on disk: transformers reads ours, we read NTv2's, and all give the same ids."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.core.errors import DataError
from stillhouse.genomic.tokenizers import CharacterTokenizer, KmerTokenizer

TEXT = st.text(alphabet="ACGTACGTACGTACGTN", min_size=1, max_size=70)
ODD = st.text(alphabet="ACGTacgtUuNnRYSWKMBDHVrykv", min_size=1, max_size=50)


def window(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8)[None]


@pytest.fixture(scope="module")
def ntv2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer folder as NTv2 ships it."""
    folder = tmp_path_factory.mktemp("ntv2")
    kmers = ["".join(w) for w in product("ATCG", repeat=6)]
    lines = ["<unk>", "<pad>", "<mask>", "<cls>", "<eos>", "<bos>", *kmers, *"ATCGN"]
    (folder / "vocab.txt").write_text("\n".join(lines))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "EsmTokenizer", "eos_token": None, "model_max_length": 2048})
    )
    return folder


@pytest.fixture(scope="module")
def esm(ntv2: Path):
    from transformers import EsmTokenizer

    return EsmTokenizer(str(ntv2 / "vocab.txt"), eos_token=None)


def test_an_ntv2_folder_is_our_default(ntv2):
    assert KmerTokenizer.from_pretrained(ntv2) == KmerTokenizer()


@pytest.mark.oracle
@settings(max_examples=60, deadline=None)
@given(TEXT)
def test_ids_are_those_of_the_esm_tokenizer(esm, text):
    tokens = KmerTokenizer().encode(window(text))
    assert [3, *tokens.ids[0].tolist()] == esm(text)["input_ids"]


@pytest.mark.oracle
@settings(max_examples=80, deadline=None)
@given(st.one_of(TEXT, ODD))
def test_ids_are_those_of_the_fast_tokenizer(text):
    for k in (1, 6):
        ours = _cached(k)
        ids = ours[0].encode(window(text)).ids[0].tolist()
        assert ours[1](text, add_special_tokens=False)["input_ids"] == ids
        assert ours[1](text)["input_ids"] == [3, *ids]


_made: dict[int, tuple] = {}


def _cached(k: int) -> tuple:
    if k not in _made:
        tokenizer = KmerTokenizer(k)
        _made[k] = tokenizer, tokenizer.to_huggingface()
    return _made[k]


@pytest.mark.oracle
@settings(max_examples=40, deadline=None)
@given(st.one_of(TEXT, ODD))
def test_characters_are_those_of_the_fast_tokenizer(text):
    if 0 not in _made:
        _made[0] = CharacterTokenizer(), CharacterTokenizer().to_huggingface()
    ours, fast = _made[0]
    ids = ours.encode(window(text))[0].tolist()
    assert fast(text)["input_ids"] == [*ids, ours.sep_id]
    assert fast(text, add_special_tokens=False)["input_ids"] == ids


@pytest.mark.parametrize("k", [1, 3, 6])
def test_a_saved_folder_comes_back_through_autotokenizer(tmp_path, k):
    from transformers import AutoTokenizer

    ours = KmerTokenizer(k)
    ours.save_pretrained(tmp_path)
    assert KmerTokenizer.from_pretrained(tmp_path) == ours
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "ACGTACGTNACGTACGTTTAC"
    assert theirs(text)["input_ids"] == [3, *ours.encode(window(text)).ids[0].tolist()]
    assert (theirs.pad_token_id, theirs.mask_token_id, theirs.unk_token_id) == (1, 2, 0)
    assert len(theirs) == ours.vocab_size
    assert theirs(["ACG", text], padding=True)["input_ids"][0][-1] == 1
    (tmp_path / "tokenizer.json").unlink()
    assert KmerTokenizer.from_pretrained(tmp_path).vocabulary == ours.vocabulary  # from vocab.txt


def test_a_masked_text_keeps_its_mask():
    tokenizer = KmerTokenizer()
    fast = tokenizer.to_huggingface(max_length=99)
    assert fast("ACCTGA<mask>TTCTGA")["input_ids"][1:] == [
        *(tokenizer.vocabulary["ACCTGA"], tokenizer.mask_id, tokenizer.vocabulary["TTCTGA"]),
    ]
    assert fast.model_max_length == 99
    assert fast.decode(tokenizer.encode(window("ACCTGATTCTGAA")).ids[0]) == "ACCTGATTCTGAA"


def test_characters_come_back_through_autotokenizer(tmp_path):
    from transformers import AutoTokenizer

    CharacterTokenizer().save_pretrained(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("ACGTN")["input_ids"] == [7, 8, 9, 10, 11, 1]
    assert theirs(["ACG", "A"], padding=True)["input_ids"][1] == [4, 4, 7, 1]
    CharacterTokenizer.from_pretrained(tmp_path)
    by_letter = KmerTokenizer.from_pretrained(tmp_path)  # the same folder read as 1-mers
    assert by_letter.k == 1
    assert by_letter.starts_with is None
    assert by_letter.encode(window("ACGTN")).ids.tolist() == [[7, 8, 9, 10, 11]]
    assert (by_letter.mask_id, by_letter.pad_id) == (3, 4)


def test_a_vocabulary_of_lower_case_letters(tmp_path):
    ids = {"[PAD]": 0, "[MASK]": 1, "[UNK]": 2, "a": 3, "c": 4, "g": 5, "t": 6}
    (tmp_path / "vocab.json").write_text(json.dumps(ids))
    tokenizer = KmerTokenizer.from_pretrained(tmp_path)
    tokens = tokenizer.encode(window("ACGTN"))
    assert tokens.ids.tolist() == [[3, 4, 5, 6, 2]]  # no N here: unknown
    assert tokenizer.decode(tokens).tobytes() == b"ACGTN"
    with pytest.raises(ValueError, match="lower case"):
        tokenizer.to_huggingface()


def test_folders_that_do_not_fit_say_why(tmp_path, ntv2):
    with pytest.raises(DataError, match="holds none of"):
        KmerTokenizer.from_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[MASK]\nthe\nof\n")
    with pytest.raises(DataError, match="neither k-mers nor letters"):
        KmerTokenizer.from_pretrained(tmp_path)
    kmers = ["".join(w) for w in product("ATCG", repeat=3)]
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *kmers]))
    with pytest.raises(DataError, match=r"Overlapping k-mers \(DNABERT\)"):
        KmerTokenizer.from_pretrained(tmp_path)
    whole = (ntv2 / "vocab.txt").read_bytes()
    (tmp_path / "vocab.txt").write_bytes(whole[:-2000])
    with pytest.raises(DataError, match="not a vocabulary of non-overlapping k-mers"):
        KmerTokenizer.from_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_bytes(whole.replace(b"GATTAC", b"GATTAX"))
    with pytest.raises(DataError, match="lacks 1 tokens, among them GATTAC"):
        KmerTokenizer.from_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read as a vocabulary"):
        KmerTokenizer.from_pretrained(tmp_path)
    for text in ("{", "[]", '{"model": {"vocab": ["A"]}}', '{"model": {"vocab": {"A": "x"}}}'):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(DataError, match="cannot be read as a vocabulary"):
            KmerTokenizer.from_pretrained(tmp_path)
    with pytest.raises(DataError, match="not the character vocabulary"):
        CharacterTokenizer.from_pretrained(ntv2)
