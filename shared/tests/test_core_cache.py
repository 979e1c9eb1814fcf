"""What goes into a cache comes out of it, and nothing that does not fit gets in."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from stillhouse.core.cache import CacheSpec, TeacherCache, fill, settings_hash, vocabulary_hash
from stillhouse.core.cache._codec import pack_ids, unpack_ids
from stillhouse.core.cache._ids import KeyTable, keys_of
from stillhouse.core.errors import DataError
from stillhouse.core.losses import forward_kl
from stillhouse.core.losses.topk import topk_kl
from stillhouse.core.teacher import (
    CachedTeacher,
    DenseSignal,
    EmbeddingSignal,
    HiddenSignal,
    MultiTeacher,
    OnlineTeacher,
    RelationSignal,
    SparseTeacher,
    TeacherSignal,
    weight_hash,
)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def spec(kind: str, **changes: object) -> CacheSpec:
    return CacheSpec(**{"kind": kind, "teacher": "t", "teacher_hash": "abc", **changes})  # type: ignore[arg-type]


def store(path: Path, spec: CacheSpec, signal: TeacherSignal, count: int, **options: object) -> TeacherCache:
    mask = options.pop("mask", None)
    with TeacherCache.create(path, spec, **options) as writer:  # type: ignore[arg-type]
        writer.add(list(range(count)), signal, mask=mask)  # type: ignore[arg-type]
        writer.finish()
    return TeacherCache.open(path, expect=spec, verify=True)


KEY_OF_NAME = ["0xdb6b1d695c0a6a79", "0xe92bb91a5fefd315"]
KEY_OF_PAIR = ["0x6f1c47d01ac79a2a", "0x4e4ed1274f61656b"]

# --- ids
# --------------------------------------------------------------------------------------------------------


def test_keys_are_stable_for_ever():
    keys = keys_of(["img_1.png", 7, -1, ("img_1.png", 3)])
    assert keys[1].tolist() == [7, 0]
    assert keys[2].tolist() == [2**64 - 1, 0]
    # written down once; a change here makes every cache on every disk unreadable
    assert [hex(word) for word in keys[0].tolist()] == KEY_OF_NAME
    assert [hex(word) for word in keys[3].tolist()] == KEY_OF_PAIR
    assert np.array_equal(keys_of(torch.tensor([7, -1])), keys[1:3])
    assert np.array_equal(keys_of(np.array([7, -1], np.int32)), keys[1:3])


def test_kinds_of_ids_do_not_meet():
    ids = [1, "1", (1, 1), ("1", 1), ("1", 11), ("11", 1), "11", 11, "p1"]
    keys = keys_of(ids)
    assert len({tuple(key) for key in keys.tolist()}) == len(ids)
    assert all(
        key[1] % 2 == 1 for key, sample in zip(keys.tolist(), ids, strict=True) if not isinstance(sample, int)
    )


def test_find_survives_colliding_first_words():
    rng = np.random.default_rng(0)
    keys = np.stack([rng.integers(0, 5, 300), rng.permutation(300)], axis=1).astype(np.uint64)
    table = KeyTable.of(keys)
    ordered = np.stack([table.first, table.second], axis=1)
    shuffled = keys[rng.permutation(300)]
    position = table.find(shuffled)
    assert np.array_equal(ordered[position], shuffled)
    absent = np.array([[0, 1000], [9, 0], [2, 999]], np.uint64)
    assert table.find(absent).tolist() == [-1, -1, -1]
    assert KeyTable.of(keys[:0]).find(absent).tolist() == [-1, -1, -1]


@pytest.mark.parametrize(
    "ids", ["abc", [1.5], [None], [("a", "b")], [2**63], torch.zeros(2), np.zeros((2, 2), int)]
)
def test_wrong_ids(ids: object):
    with pytest.raises(TypeError):
        keys_of(ids)  # type: ignore[arg-type]


def test_hashes_of_settings_and_vocabularies():
    assert settings_hash({"a": 1, "b": [1, 2.5, None]}) == settings_hash({"b": (1, 2.5, None), "a": 1})
    assert settings_hash({"seed": 1}) != settings_hash({"seed": 2})
    assert vocabulary_hash({"a": 0, "b": 1}) != vocabulary_hash({"b": 0, "a": 1})
    assert vocabulary_hash(["ab", "c"]) != vocabulary_hash(["a", "bc"])
    assert vocabulary_hash(["\ud800"]) != vocabulary_hash(["?"])


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from([2, 3, 4]))
def test_packed_ids_round_trip(data: st.DataObject, width: int):
    top = {2: 2**16, 3: 2**24, 4: 2**31}[width]
    ids = torch.tensor(data.draw(st.lists(st.integers(0, top - 1), min_size=1, max_size=20)))
    packed = pack_ids(ids[None], width)
    assert packed.nbytes == width * len(ids)
    assert torch.equal(unpack_ids(packed, width)[0], ids)


# --- logits
# -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "error"), [("float32", 0.0), ("float16", 1e-3), ("bfloat16", 8e-3)])
def test_dense_logits_come_back_with_the_precision_of_their_dtype(tmp_path: Path, dtype: str, error: float):
    logits = 4 * normal(0, 50, 30) + 1e5 * torch.arange(50)[:, None]  # float16 ends at 65504
    logits[3, 5:] = -math.inf
    cache = store(tmp_path / "c", spec("dense", vocab=30, dtype=dtype), DenseSignal(logits), 50)
    signal = cache.lookup(list(range(50))).signal
    assert isinstance(signal, DenseSignal)
    assert torch.equal(signal.logits.isneginf(), logits.isneginf())
    p, q = torch.softmax(logits.double(), -1), torch.softmax(signal.logits.double(), -1)
    assert (p - q).abs().max() <= error
    assert dtype != "float32" or torch.equal(signal.logits, logits)


def test_relative_storage_beats_plain_float16(tmp_path: Path):
    logits = 2 * normal(0, 200, 50) + 24.0  # language-model logits live around 20 … 30
    cache = store(tmp_path, spec("dense", vocab=50), DenseSignal(logits), 200)
    p = torch.softmax(logits.double(), -1)

    def kl(stored: Tensor) -> float:
        q = torch.softmax(stored.double(), -1)
        return (p * (p / q).log()).sum(-1).mean().item()

    relative = kl(cache.lookup(list(range(200))).signal.logits)  # type: ignore[union-attr]
    assert 0 <= relative < kl(logits.half().float()) / 4


def test_far_logits_are_clamped_and_minus_infinity_is_kept(tmp_path: Path):
    logits = torch.tensor([[0.0, -1e6, -math.inf]])
    cache = store(tmp_path, spec("dense", vocab=3), DenseSignal(logits), 1)
    assert cache.lookup([0]).signal.logits.tolist() == [[0.0, -65504.0, -math.inf]]  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_topk_mass_is_exact_at_every_stored_temperature(tmp_path: Path, dtype: str):
    logits, temperatures = 3 * normal(0, 40, 500) + 17.0, (0.5, 1.0, 2.0, 7.0)
    cache = store(
        tmp_path,
        spec("topk", vocab=500, k=8, temperatures=temperatures, dtype=dtype),
        DenseSignal(logits),
        40,
    )
    signal = cache.lookup(list(range(40))).signal
    assert isinstance(signal, SparseTeacher)
    assert torch.equal(signal.ids, logits.topk(8, -1).indices)
    tolerance = 1e-5 if dtype == "float32" else 4e-3
    for temperature in temperatures:
        p = torch.softmax(logits.double() / temperature, -1).gather(-1, signal.ids)
        log_p, log_tail = signal.log_probs(temperature)
        torch.testing.assert_close(
            log_p.exp().double(), p, rtol=tolerance / min(temperature, 1), atol=tolerance
        )
        tail = (1 - p.sum(-1)).float()
        torch.testing.assert_close(log_tail.exp(), tail, rtol=0, atol=2 * tolerance)
    with pytest.raises(ValueError, match="not stored"):
        signal.log_probs(3.0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_tiny_tail_survives_rounding(tmp_path: Path, dtype: str):
    logits = normal(0, 200, 1000)
    logits[:, :10] += torch.linspace(9, 14, 200)[:, None]
    p = torch.softmax(logits.double(), -1)
    tails = 1 - p.topk(10).values.sum(-1)
    assert tails.max() > 0.01
    assert tails.min() < 2e-4
    made = spec("topk", vocab=1000, k=10, temperatures=(1.0, 0.5), dtype=dtype)
    signal = store(tmp_path, made, DenseSignal(logits + 30), 200).lookup(list(range(200))).signal
    assert isinstance(signal, SparseTeacher)
    log_p, log_tail = signal.log_probs(1.0)
    torch.testing.assert_close(log_tail.double(), tails.log(), rtol=0, atol=0.01)
    torch.testing.assert_close(log_p.exp().sum(-1) + log_tail.exp(), torch.ones(200))
    log_p, _ = signal.log_probs(0.5)
    exact = torch.log_softmax(logits.double() / 0.5, -1).gather(-1, signal.ids)
    torch.testing.assert_close(log_p.double(), exact, rtol=0, atol=0.1 if dtype == "bfloat16" else 0.01)
    # plain rounding beside the exact logsumexp leaves tails of the wrong sign
    rounded = (logits + 30).topk(10).values.half().double()
    mass = (rounded - torch.logsumexp(logits.double() + 30, -1, keepdim=True)).exp().sum(-1)
    assert (mass > 1).any()


def test_topk_accepts_sparse_and_dense_signals_alike(tmp_path: Path):
    logits = normal(0, 20, 300)
    one = spec("topk", vocab=300, k=5, temperatures=(1.0, 2.0))
    sparse = SparseTeacher.from_logits(logits, k=5, temperatures=(1.0, 2.0))
    a = store(tmp_path / "a", one, DenseSignal(logits), 20).lookup(list(range(20))).signal
    b = store(tmp_path / "b", one, sparse, 20).lookup(list(range(20))).signal
    assert isinstance(a, SparseTeacher)
    assert isinstance(b, SparseTeacher)
    assert torch.equal(a.logits, b.logits)
    assert torch.equal(a.ids, b.ids)
    torch.testing.assert_close(a.lse, b.lse)
    assert torch.all(a.logits[:, 0] == 0)  # relative to the row's maximum


def test_loss_from_the_cache_is_the_loss_from_the_teacher(tmp_path: Path):
    logits, student = 2 * normal(0, 30, 400) + 20, normal(1, 30, 400)
    cache = store(
        tmp_path,
        spec("topk", vocab=400, k=16, temperatures=(1.0, 2.0), dtype="float32"),
        DenseSignal(logits),
        30,
    )
    online = SparseTeacher.from_logits(logits, k=16, temperatures=(1.0, 2.0))
    signal = CachedTeacher(cache).signal(ids=torch.arange(30))
    for temperature in (1.0, 2.0):
        mine = topk_kl(student, signal, temperature=temperature)  # type: ignore[arg-type]
        theirs = topk_kl(student, online, temperature=temperature)
        torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=0)


def test_a_kept_token_takes_less_than_six_bytes(tmp_path: Path):
    for vocab, width in ((50_000, 2), (152_064, 3)):
        folder = tmp_path / str(vocab)
        cache = store(folder, spec("topk", vocab=vocab, k=64), DenseSignal(normal(0, 100, vocab)), 100)
        a_row = (2 + width) * 64 + 4  # value and id a token, one logsumexp a row
        per_row = sum(record.bytes for record in cache.shards) / 100
        assert a_row < per_row < a_row + 40  # 24 bytes of key and offset a sample, and the header
        assert per_row / 64 < 6


def test_log_probabilities_serve_one_temperature_unless_complete(tmp_path: Path):
    logits = normal(0, 10, 6)
    log_p = DenseSignal(torch.log_softmax(logits, -1), log_values=True)
    with pytest.raises(ValueError, match="T=1 only"):
        spec("topk", vocab=6, k=3, log_values=True, temperatures=(1.0, 2.0))
    part = store(tmp_path / "part", spec("topk", vocab=6, k=3, log_values=True), log_p, 10)
    signal = part.lookup(list(range(10))).signal
    assert isinstance(signal, SparseTeacher)
    expected = torch.log_softmax(logits, -1).topk(3, -1).values
    mine, tail = signal.log_probs(1.0)
    torch.testing.assert_close(mine, expected, atol=2e-3, rtol=0)
    torch.testing.assert_close(tail.exp(), 1 - expected.exp().sum(-1), atol=1e-6, rtol=0)  # the mass is kept
    with pytest.raises(ValueError, match="T=1 only"):
        topk_kl(normal(1, 10, 6), signal, temperature=2.0)
    whole = store(
        tmp_path / "whole",
        spec("topk", vocab=6, k=6, log_values=True, temperatures=(2.0,), dtype="float32"),
        log_p,
        10,
    )
    signal = whole.lookup(list(range(10))).signal
    assert isinstance(signal, SparseTeacher)
    mine = topk_kl(normal(1, 10, 6), signal, temperature=2.0)
    torch.testing.assert_close(
        mine, forward_kl(normal(1, 10, 6), logits, temperature=2.0), rtol=1e-5, atol=1e-7
    )


# --- other signals
# ----------------------------------------------------------------------------------------------


def test_int8_embeddings_are_within_half_a_step(tmp_path: Path):
    values = normal(0, 30, 64) * torch.logspace(-6, 6, 30)[:, None]
    values[4] = 0.0
    cache = store(tmp_path, spec("embedding", dtype="int8"), EmbeddingSignal(values), 30)
    signal = cache.lookup(list(range(30))).signal
    assert isinstance(signal, EmbeddingSignal)
    step = values.abs().amax(-1, keepdim=True) / 127
    assert torch.all((signal.values - values).abs() <= step * 0.5001)
    assert torch.all(signal.values[4] == 0)
    cosine = torch.nn.functional.cosine_similarity(signal.values, values)
    assert cosine[[0, 1, 29]].min() > 0.9999
    assert cache.bytes < 30 * (64 + 4 + 24 + 32) + 1500


@pytest.mark.parametrize(("dtype", "digits"), [("float16", 11), ("bfloat16", 8), ("float32", 24)])
def test_embeddings_keep_their_significant_bits(tmp_path: Path, dtype: str, digits: int):
    values = normal(0, 30, 8)
    signal = (
        store(tmp_path, spec("embedding", dtype=dtype), EmbeddingSignal(values), 30).lookup([7, 3, 7]).signal
    )
    assert isinstance(signal, EmbeddingSignal)
    torch.testing.assert_close(signal.values, values[[7, 3, 7]], rtol=2.0**-digits, atol=1e-7)


def test_hidden_states_of_several_layers(tmp_path: Path):
    values = {"stage1": normal(0, 6, 3, 4, 4), "head": normal(1, 6, 5)}
    for dtype in ("float16", "int8"):
        cache = store(tmp_path / dtype, spec("hidden", dtype=dtype), HiddenSignal(values), 6)
        signal = cache.lookup([5, 0]).signal
        assert isinstance(signal, HiddenSignal)
        assert signal.values["stage1"].shape == (2, 3, 4, 4)
        for name, value in values.items():
            torch.testing.assert_close(signal.values[name], value[[5, 0]], rtol=1e-3, atol=0.02)


def test_relations_may_hold_minus_infinity_as_logarithms(tmp_path: Path):
    values = torch.log_softmax(
        normal(0, 4, 2, 5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), -math.inf), -1
    )
    cache = store(tmp_path, spec("relation", log_values=True), RelationSignal(values, log_values=True), 4)
    signal = cache.lookup([1]).signal
    assert isinstance(signal, RelationSignal)
    assert signal.log_values
    assert torch.equal(signal.values.isneginf(), values[[1]].isneginf())


def test_dense_maps_keep_their_shape(tmp_path: Path):
    logits = normal(0, 5, 3, 4, 7)
    cache = store(tmp_path, spec("dense", vocab=7, dtype="float32"), DenseSignal(logits), 5)
    assert cache.shapes[""] == (3, 4)
    lookup = cache.lookup([4, 1])
    torch.testing.assert_close(lookup.signal.logits, logits[[4, 1]])  # type: ignore[union-attr]
    assert lookup.rows.tolist() == [12, 12]
    assert lookup.mask is None
    flat = cache.lookup([4, 1], layout="flat").signal.logits  # type: ignore[union-attr]
    torch.testing.assert_close(flat, logits[[4, 1]].reshape(24, 7))


# --- ragged
# -----------------------------------------------------------------------------------------------------


def test_ragged_rows_line_up_with_the_students_mask(tmp_path: Path):
    logits, student = 2 * normal(0, 6, 9, 40), normal(1, 6, 9, 40)
    mask = torch.rand(6, 9, generator=torch.Generator().manual_seed(2)) < 0.5
    mask[2] = False
    logits[~mask] = math.nan  # what padding holds does not matter
    made = spec("topk", vocab=40, k=40, ragged=True, dtype="float32")
    with TeacherCache.create(tmp_path, made, shard_bytes=1) as writer:
        writer.add([0, 1], DenseSignal(logits[:2]), mask=mask[:2])
        writer.add([2, 3, 4, 5], DenseSignal(logits[2:]), mask=mask[2:])
        writer.finish()
    cache = TeacherCache.open(tmp_path)
    order = torch.tensor([4, 0, 2, 5, 1, 3])
    flat = cache.lookup(order, layout="flat")
    assert flat.rows.tolist() == mask[order].sum(1).tolist()
    expected = forward_kl(student[order], torch.where(mask[..., None], logits, 0.0)[order], mask=mask[order])
    mine = topk_kl(student[order][mask[order]], flat.signal)  # type: ignore[arg-type]
    torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-7)
    padded = cache.lookup(order)
    assert padded.mask is not None
    assert padded.mask.sum(1).tolist() == flat.rows.tolist()
    assert isinstance(padded.signal, SparseTeacher)
    assert isinstance(flat.signal, SparseTeacher)
    assert torch.equal(padded.signal.logits[padded.mask], flat.signal.logits)
    pushed = torch.zeros(*padded.mask.shape, 40)
    pushed[padded.mask] = student[order][mask[order]]
    again = topk_kl(pushed, padded.signal, mask=padded.mask)
    torch.testing.assert_close(again, expected, rtol=1e-5, atol=1e-7)
    assert cache.lookup([2]).rows.tolist() == [0]


def test_ragged_hidden_states(tmp_path: Path):
    values = {"h": normal(0, 3, 5, 4), "g": normal(1, 3, 5, 2)}
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 0, 0, 0, 0], [1, 1, 0, 0, 0]], dtype=torch.bool)
    cache = store(tmp_path, spec("hidden", ragged=True, dtype="float32"), HiddenSignal(values), 3, mask=mask)
    lookup = cache.lookup([1, 2])
    assert isinstance(lookup.signal, HiddenSignal)
    assert lookup.signal.values["h"].shape == (2, 2, 4)
    assert torch.equal(lookup.signal.values["g"][1], values["g"][2, :2])
    assert torch.all(lookup.signal.values["h"][0, 1] == 0)
    assert lookup.mask is not None
    assert lookup.mask.tolist() == [[True, False], [True, True]]


# --- teachers
# ---------------------------------------------------------------------------------------------------


def test_fill_asks_the_teacher_for_what_is_missing_only(tmp_path: Path):
    torch.manual_seed(0)
    network = nn.Linear(4, 6)
    teacher, inputs = OnlineTeacher(network), normal(1, 20, 4)
    made = spec("dense", vocab=6, dtype="float32", teacher_hash=weight_hash(network))
    batches = [(list(range(s, s + 5)), inputs[s : s + 5]) for s in range(0, 20, 5)]
    with TeacherCache.create(tmp_path, made) as writer:
        writer.add([3, 7], DenseSignal(network(inputs[[3, 7]]).detach()))
        assert writer.missing([2, 3, 4, 7]) == [0, 2]
        calls: list[int] = []
        handle = network.register_forward_hook(lambda m, i, o: calls.append(len(o)))
        assert fill(writer, teacher, batches) == 18
        assert fill(writer, teacher, batches) == 0
        assert fill(writer, teacher, [(torch.tensor([19, 20]), inputs[:2])]) == 1
        handle.remove()
        assert calls == [5, 5, 5, 5, 2]
        writer.finish()
    source = CachedTeacher(tmp_path, device="cpu")
    signal = source.signal(ids=torch.arange(20))
    torch.testing.assert_close(signal.logits, network(inputs).detach())  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="ids"):
        source.signal(inputs)
    both = MultiTeacher([source, source], mode="prob_mean").signal(ids=[1, 2])
    torch.testing.assert_close(
        torch.softmax(both.logits, -1), torch.softmax(network(inputs[1:3]), -1).detach()
    )


# --- what does not fit
# ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"teacher_hash": "xyz"}, "'abc' in the cache and 'xyz'"),
        ({"vocabulary_hash": "v2"}, "None in the cache and 'v2'"),
        ({"k": 16}, "k is 4 in the cache and 16"),
        ({"temperatures": (1.0,)}, r"\[1.0, 2.0\] in the cache and \[1.0\]"),
        ({"preprocessing_hash": "crop"}, "'' in the cache and 'crop'"),
        ({"dtype": "float32"}, "'float16' in the cache and 'float32'"),
        ({"k": 16, "teacher": "u"}, "teacher is 't'.*; k is 4"),
    ],
)
def test_a_mismatch_names_both_sides(tmp_path: Path, changes: dict, words: str):
    base = {"vocab": 50, "k": 4, "temperatures": (1.0, 2.0)}
    store(tmp_path, spec("topk", **base), DenseSignal(normal(0, 3, 50)), 3)
    other = spec("topk", **{**base, **changes})
    for attempt in (
        lambda: TeacherCache.open(tmp_path, expect=other),
        lambda: TeacherCache.open(tmp_path, expect=changes),
        lambda: TeacherCache.create(tmp_path, other),
    ):
        with pytest.raises(DataError, match=words):
            attempt()
    with pytest.raises(ValueError, match="no \\['teachers'\\]"):
        TeacherCache.open(tmp_path, expect={"teachers": 1})


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"kind": "logits"}, "kind"),
        ({"kind": "dense", "vocab": 3, "dtype": "float64"}, "dtype"),
        ({"kind": "dense", "vocab": 3, "teacher_hash": ""}, "teacher_hash"),
        ({"kind": "dense"}, "vocab"),
        ({"kind": "embedding", "vocab": 3}, "vocab"),
        ({"kind": "topk", "vocab": 3, "k": 4}, "k must"),
        ({"kind": "topk", "vocab": 3}, "k must"),
        ({"kind": "dense", "vocab": 3, "k": 2}, "k means"),
        ({"kind": "dense", "vocab": 3, "dtype": "int8"}, "int8"),
        ({"kind": "embedding", "ragged": True}, "ragged"),
        ({"kind": "embedding", "log_values": True}, "log_values"),
        ({"kind": "topk", "vocab": 3, "k": 2, "temperatures": (0.0,)}, "temperatures"),
        ({"kind": "topk", "vocab": 3, "k": 2, "temperatures": (1.0, 1.0)}, "different"),
        ({"kind": "dense", "vocab": 3, "temperatures": (2.0,)}, "topk"),
    ],
)
def test_specifications_that_make_no_sense(arguments: dict, word: str):
    with pytest.raises(ValueError, match=word):
        CacheSpec(**{"teacher": "t", "teacher_hash": "h", **arguments})


def _sparse(**changes: object) -> SparseTeacher:
    signal = SparseTeacher.from_logits(normal(0, 2, 9), k=3)
    fields = {name: getattr(signal, name) for name in SparseTeacher.__slots__}
    return SparseTeacher(**{**fields, **changes})  # type: ignore[arg-type]


DENSE, TOPK = spec("dense", vocab=9), spec("topk", vocab=9, k=3)


@pytest.mark.parametrize(
    ("made", "signal", "error", "word"),
    [
        (DENSE, DenseSignal(torch.zeros(2, 8)), ValueError, "8 classes, the cache vocab=9"),
        (DENSE, DenseSignal(torch.full((2, 9), math.nan)), ValueError, "finite maximum"),
        (DENSE, DenseSignal(torch.full((2, 9), -math.inf)), ValueError, "finite maximum"),
        (DENSE, DenseSignal(torch.zeros(2, 9), log_values=True), ValueError, "log_values"),
        (DENSE, EmbeddingSignal(torch.zeros(2, 9)), TypeError, "DenseSignal, got EmbeddingSignal"),
        (DENSE, DenseSignal(torch.zeros(3, 9)), ValueError, "2 ids for a signal of 3"),
        (TOPK, DenseSignal(torch.zeros(2, 8)), ValueError, "8 classes"),
        (TOPK, DenseSignal(torch.zeros(2, 9), log_values=True), ValueError, "log_values"),
        (TOPK, EmbeddingSignal(torch.zeros(2, 9)), TypeError, "EmbeddingSignal"),
        (TOPK, _sparse(vocab=12), ValueError, "vocab=12, the cache 9"),
        (TOPK, _sparse(temperatures=(2.0,)), ValueError, "temperatures"),
        (TOPK, _sparse(ids=torch.tensor([[0, 1, 9], [0, 1, 2]])), ValueError, r"\[0, 9\)"),
        (TOPK, _sparse(weights=torch.ones(2, 3)), ValueError, "importance"),
        (TOPK, _sparse(lse=torch.full((2, 1), math.inf)), ValueError, "logsumexp"),
        (TOPK, SparseTeacher.from_logits(normal(0, 2, 9), k=2), ValueError, "k=2, the cache 3"),
        (spec("embedding"), EmbeddingSignal(torch.full((2, 3), math.inf)), ValueError, "infinite"),
        (spec("embedding"), EmbeddingSignal(torch.full((2, 3), -1e5)), ValueError, "range of float16"),
        (spec("embedding"), EmbeddingSignal(torch.zeros(2)), ValueError, "more than 1"),
        (spec("hidden"), HiddenSignal({"scale.a": torch.zeros(2, 3)}), ValueError, "names"),
        (
            spec("hidden"),
            HiddenSignal({"a": torch.zeros(2, 3), "b": torch.zeros(3, 3)}),
            ValueError,
            "leading",
        ),
        (spec("hidden", ragged=True), HiddenSignal({"a": torch.zeros(2, 3)}), ValueError, "more than 2"),
        (spec("dense", vocab=9, ragged=True), DenseSignal(torch.zeros(2, 9)), ValueError, "ragged signal"),
    ],
)
def test_signals_that_do_not_fit_leave_the_cache_as_it_was(
    tmp_path: Path, made: CacheSpec, signal: TeacherSignal, error: type[Exception], word: str
):
    with TeacherCache.create(tmp_path, made) as writer:
        with pytest.raises(error, match=word):
            writer.add([0, 1], signal)
        assert writer.missing([0, 1]) == [0, 1]
        writer.close()
    assert list(tmp_path.glob("shard-*")) == []


def test_masks_belong_to_ragged_caches(tmp_path: Path):
    with TeacherCache.create(tmp_path / "a", DENSE) as writer, pytest.raises(ValueError, match="ragged=True"):
        writer.add([0], DenseSignal(torch.zeros(1, 9)), mask=torch.ones(1, dtype=torch.bool))
    ragged = spec("dense", vocab=9, ragged=True)
    with (
        TeacherCache.create(tmp_path / "b", ragged) as writer,
        pytest.raises(ValueError, match=r"bool \[1, 4\]"),
    ):
        writer.add([0], DenseSignal(torch.zeros(1, 4, 9)), mask=torch.ones(1, 3, dtype=torch.bool))


def test_ids_and_shapes_are_watched_while_writing(tmp_path: Path):
    with TeacherCache.create(tmp_path, spec("embedding"), shard_bytes=1) as writer:
        writer.add([0, 1], EmbeddingSignal(torch.zeros(2, 3)))
        with pytest.raises(ValueError, match="1 of the 2 ids are stored already"):
            writer.add([1, 2], EmbeddingSignal(torch.zeros(2, 3)))
        with pytest.raises(ValueError, match="1 occur twice"):
            writer.add([5, 5], EmbeddingSignal(torch.zeros(2, 3)))
        with pytest.raises(ValueError, match=r"\(4,\).*\(3,\)"):
            writer.add([7], EmbeddingSignal(torch.zeros(1, 4)))
        writer.close()
        with pytest.raises(ValueError, match="closed"):
            writer.add([9], EmbeddingSignal(torch.zeros(1, 3)))
    with pytest.raises(ValueError, match="rank"):
        TeacherCache.create(tmp_path, spec("embedding"), rank=-1)
