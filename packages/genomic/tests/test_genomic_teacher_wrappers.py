"""Controls and the cache: teachers that wrap a teacher."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stillhouse.core.errors import DataError
from stillhouse.genomic.teacher import (
    KmerTeacher,
    KmerTransformer,
    KmerTransformerConfig,
    RandomTeacher,
    ShuffledTeacher,
    Teacher,
    cached_features,
)
from stillhouse.genomic.tokenizers import KmerTokenizer

THREE = KmerTokenizer(3)


@pytest.fixture(scope="module")
def teacher() -> KmerTeacher:
    torch.manual_seed(100)
    config = KmerTransformerConfig(width=16, depth=2, heads=2, k=3)
    return KmerTeacher(KmerTransformer(config, THREE.vocab_size), licence="MIT")


@pytest.fixture(scope="module")
def windows() -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.frombuffer(b"ACGTN", np.uint8)[rng.choice(5, size=(12, 40), p=[0.24] * 4 + [0.04])]


def test_a_random_teacher_is_the_architecture_alone(teacher, windows):
    tokens = THREE.encode(windows)
    first, same, other = (RandomTeacher(teacher, seed=s) for s in (0, 0, 1))
    assert isinstance(first, Teacher)
    assert (first.width, first.depth, first.parameters) == (teacher.width, teacher.depth, teacher.parameters)
    assert first.licence is None
    assert torch.equal(first.features(tokens)[0], same.features(tokens)[0])
    assert not torch.allclose(first.features(tokens)[0], other.features(tokens)[0])
    assert not torch.allclose(first.features(tokens)[0], teacher.features(tokens)[0])
    assert first.nucleotide_log_probs(tokens).shape == (12, 40, 4)
    assert torch.equal(first.untrained(1).features(tokens)[0], other.features(tokens)[0])


def test_a_shuffled_teacher_says_the_same_in_other_places(teacher, windows):
    tokens = THREE.encode(windows)
    shuffled = ShuffledTeacher(teacher, seed=4)
    assert isinstance(shuffled, Teacher)
    assert shuffled.licence == "MIT"
    generator = torch.Generator().manual_seed(0)
    visible = torch.rand(tokens.ids.shape, generator=generator) < 0.7
    among = visible & tokens.valid
    true = teacher.features(tokens, visible=visible, layers=(1, -1))
    found = shuffled.features(tokens, visible=visible, layers=(1, -1))
    for a, b in zip(true, found, strict=True):
        assert torch.equal(a[~among], b[~among])  # hidden tokens and padding keep theirs
        assert not torch.isclose(a[among], b[among]).all(-1).any()  # no visible token does
        rows = [torch.unique(x[among], dim=0) for x in (a, b)]
        assert torch.equal(*rows)  # the same vectors altogether
    moved = [
        (b[among][:, None] == a[among]).all(-1).int().argmax(1) for a, b in zip(true, found, strict=True)
    ]
    assert torch.equal(*moved)  # the same way in every layer
    again = shuffled.features(tokens, visible=visible)[0]
    assert torch.equal(again, found[1])
    other = ShuffledTeacher(teacher, seed=5).features(tokens, visible=visible)[0]
    assert not torch.equal(other, again)
    one = THREE.encode(windows[:1, :3])
    assert torch.equal(shuffled.features(one)[0], teacher.features(one)[0])  # nowhere to go


def test_shuffled_log_probs(teacher, windows):
    tokens = THREE.encode(windows)
    true, found = (t.nucleotide_log_probs(tokens) for t in (teacher, ShuffledTeacher(teacher)))
    known = torch.from_numpy(windows != ord("N"))
    assert torch.equal(true[~known], found[~known])
    assert not torch.equal(true, found)
    assert torch.equal(true[known].sort(0).values, found[known].sort(0).values)


def test_wrong_seeds(teacher):
    for seed in (-1, 1.5):
        with pytest.raises(ValueError, match="seed is"):
            ShuffledTeacher(teacher, seed=seed)


@pytest.mark.parametrize(("dtype", "error"), [("float32", 0.0), ("float16", 2e-3), ("int8", 3e-2)])
def test_cached_features_are_the_teachers(tmp_path, teacher, windows, dtype, error):
    doubled = np.concatenate([windows, windows[:3]])  # a window may occur twice
    cached = cached_features(teacher, doubled, tmp_path / "cache", layers=(1, -1), batch=5, dtype=dtype)
    assert isinstance(cached, Teacher)
    assert len(cached.cache) == 12
    tokens = THREE.encode(windows[[7, 2, 7]])
    for a, b in zip(
        teacher.features(tokens, layers=(-1, 1)), cached.features(tokens, layers=(-1, 1)), strict=True
    ):
        assert float((a - b)[tokens.valid].abs().max()) <= error
        assert b.dtype == torch.float32
    assert (cached.hits, cached.misses) == (3, 0)


def test_what_is_not_in_the_cache_is_asked_of_the_teacher(tmp_path, teacher, windows):
    cached = cached_features(teacher, windows[:6], tmp_path / "cache", dtype="float32")
    tokens = THREE.encode(windows[4:8])
    valid = tokens.valid
    torch.testing.assert_close(cached.features(tokens)[0][valid], teacher.features(tokens)[0][valid])
    assert (cached.hits, cached.misses) == (2, 2)
    visible = torch.ones_like(valid)
    visible[:, 1] = False
    torch.testing.assert_close(
        cached.features(tokens, visible=visible)[0], teacher.features(tokens, visible=visible)[0]
    )
    torch.testing.assert_close(
        cached.features(tokens, layers=(1,))[0], teacher.features(tokens, layers=(1,))[0]
    )
    assert (cached.hits, cached.misses) == (2, 10)


class Counting:
    """Counts the windows that a teacher is asked about."""

    def __init__(self, inner: KmerTeacher) -> None:
        self.inner, self.asked = inner, 0

    def __getattr__(self, name: str):
        return getattr(self.inner, name)

    def features(self, tokens, **options):
        self.asked += len(tokens.ids)
        return self.inner.features(tokens, **options)


def test_a_cache_is_made_once_and_belongs_to_one_teacher(tmp_path, teacher, windows):
    counting = Counting(teacher)
    cached_features(counting, windows[:6], tmp_path / "cache")
    assert counting.asked == 6
    cached_features(counting, windows, tmp_path / "cache")
    assert counting.asked == 12  # the six that were new
    with pytest.raises(DataError, match="does not fit"):
        cached_features(RandomTeacher(teacher), windows, tmp_path / "cache")
    with pytest.raises(DataError, match="does not fit"):
        cached_features(counting, windows, tmp_path / "cache", layers=(1,))
    with pytest.raises(ValueError, match="batch is 0"):
        cached_features(teacher, windows, tmp_path / "other", batch=0)
    assert not (tmp_path / "other").exists()
