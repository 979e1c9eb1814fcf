"""The k-mer Transformer, its training by masked language modelling, marginals and the artefact."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.core.errors import ConfigError, DataError
from stillhouse.core.train import OptimConfig, SeededLoader, Step, TrainConfig, Trainer
from stillhouse.genomic.teacher import (
    KmerTeacher,
    KmerTransformer,
    KmerTransformerConfig,
    MaskedLanguageDistiller,
    Teacher,
    corrupt,
    evaluate_teacher,
    load_teacher,
    nucleotide_marginals,
    save_teacher,
)
from stillhouse.genomic.tokenizers import KmerTokenizer, KmerTokens

SMALL = KmerTransformerConfig(width=32, depth=3, heads=4, max_tokens=64, k=3)
THREE = KmerTokenizer(3)


def random_windows(count: int, length: int, *, seed: int = 0, n: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    share = [(1 - n) / 4] * 4 + [n]
    return np.frombuffer(b"ACGTN", np.uint8)[rng.choice(5, size=(count, length), p=share)]


def make_network(config: KmerTransformerConfig = SMALL, seed: int = 0) -> KmerTransformer:
    torch.manual_seed(seed)
    return KmerTransformer(config, KmerTokenizer(config.k).vocab_size)


@pytest.fixture
def teacher() -> KmerTeacher:
    return KmerTeacher(make_network())


def make_step(index: int = 0, items: int | None = None) -> Step:
    return Step(
        index=index, total=9, epoch=0, role="teacher", micro=0, accumulate=1, num_items=items,
        device=torch.device("cpu"), rank=0, world_size=1,
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------- network


def by_hand(network: KmerTransformer, ids: list[int]) -> torch.Tensor:
    """One window in float64 with complex rotations and a loop over heads: [T, width]."""
    w = {name: value.double() for name, value in network.state_dict().items()}
    config = network.config
    d, size = config.width, config.width // config.heads

    def norm(x, scale):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * scale

    rows = []
    for index in ids:
        row, word = w["embedding.weight"][index].clone(), THREE.token(index)
        if config.composed and len(word) == 3:
            for j, letter in enumerate(word):
                row += w["letters"][4 * j + "ATCG".index(letter)]
        rows.append(row)
    x = torch.stack(rows)
    place = torch.arange(len(ids), dtype=torch.float64)[:, None]
    angle = place * 10000.0 ** (-torch.arange(size // 2, dtype=torch.float64) * 2 / size)
    turn = torch.polar(torch.ones_like(angle), angle)

    def rotate(part):
        z = torch.complex(part[:, : size // 2], part[:, size // 2 :]) * turn
        return torch.cat([z.real, z.imag], -1)

    for i in range(config.depth):
        b = f"blocks.{i}."
        q, k, v = (norm(x, w[b + "attention_norm.weight"]) @ w[b + "qkv.weight"].T).split(d, -1)
        heads = []
        for h in range(config.heads):
            part = slice(h * size, (h + 1) * size)
            weights = (rotate(q[:, part]) @ rotate(k[:, part]).T / size**0.5).softmax(-1)
            heads.append(weights @ v[:, part])
        x = x + torch.cat(heads, -1) @ w[b + "project.weight"].T
        grown = norm(x, w[b + "mlp_norm.weight"]) @ w[b + "grow.weight"].T
        if config.activation == "swiglu":
            gate, value = grown.chunk(2, -1)
            grown = gate * torch.sigmoid(gate) * value
        else:
            grown = grown * 0.5 * (1 + torch.erf(grown / 2**0.5))
        x = x + grown @ w[b + "shrink.weight"].T
    return norm(x, w["norm.weight"])


@pytest.mark.parametrize(("activation", "composed"), [("swiglu", True), ("gelu", True), ("swiglu", False)])
def test_the_network_is_what_it_says(activation, composed):
    config = KmerTransformerConfig(width=32, depth=2, heads=4, k=3, activation=activation, composed=composed)
    network = make_network(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(8)  # away from the almost linear start
        network.norm.weight.uniform_(0.5, 1.5)
    ids = THREE.encode(random_windows(1, 40, n=0.05)).ids
    assert ids.shape[1] > 14  # single letters and N are among them
    torch.testing.assert_close(
        network(ids)[0].double(), by_hand(network, ids[0].tolist()), rtol=1e-4, atol=1e-5
    )


def test_padding_changes_nothing(teacher):
    windows = random_windows(3, 60)
    windows[1, 30:] = ord("N")
    lengths = np.array([60, 30, 0])
    together = teacher.tokenizer.encode(windows, lengths)
    features = teacher.features(together)[0]
    assert features.isfinite().all()
    alone = teacher.features(teacher.tokenizer.encode(windows[1:2, :30]))[0]
    torch.testing.assert_close(features[1, :10], alone[0], rtol=1e-4, atol=1e-5)


def test_layers_and_their_refusal(teacher):
    tokens = teacher.tokenizer.encode(random_windows(2, 30))
    one, last, first, again = teacher.features(tokens, layers=(1, -1, 0, 3))
    assert torch.equal(last, again)
    assert first.shape == (2, 10, teacher.width)
    assert torch.equal(one, teacher.features(tokens, layers=[-3])[0])
    assert not torch.allclose(one, last)
    assert last.shape == (2, 10, teacher.width)
    assert not last.requires_grad
    for wrong in ((4,), (-5,), ()):
        with pytest.raises(ValueError, match="layers"):
            teacher.features(tokens, layers=wrong)


def test_what_is_hidden_does_not_leak(teacher):
    windows = random_windows(4, 48, n=0.02)
    tokens = teacher.tokenizer.encode(windows)
    generator = torch.Generator().manual_seed(0)
    hide = (torch.rand(tokens.ids.shape, generator=generator) < 0.4) & teacher.tokenizer.is_letters(
        tokens.ids
    )
    changed = windows.copy()
    places = tokens.spread(hide).numpy()
    table = np.zeros(256, np.uint8)
    table[[ord(c) for c in "ACGTN"]] = [ord(c) for c in "TGACN"]
    changed[places] = table[changed[places]]
    other = teacher.tokenizer.encode(changed)
    assert hide.any()
    assert not torch.equal(tokens.ids, other.ids)
    for a, b in zip(
        teacher.features(tokens, visible=~hide, layers=(1, -1)),
        teacher.features(other, visible=~hide, layers=(1, -1)),
        strict=True,
    ):
        assert torch.equal(a, b)
    answers = [teacher.nucleotide_log_probs(t, visible=~hide) for t in (tokens, other)]
    assert torch.equal(*answers)
    assert not torch.allclose(teacher.features(tokens)[0], teacher.features(other)[0])
    shown = teacher.features(tokens, visible=torch.ones_like(hide))[0]
    assert torch.equal(shown, teacher.features(tokens)[0])
    with pytest.raises(ValueError, match="visible is"):
        teacher.features(tokens, visible=torch.ones(4, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="visible is"):
        teacher.features(tokens, visible=torch.ones(tokens.ids.shape))


@pytest.mark.parametrize("composed", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_every_weight_gets_a_gradient(composed, tied):
    network = make_network(
        KmerTransformerConfig(width=32, depth=1, heads=2, k=3, composed=composed, tied=tied)
    )
    batch = torch.from_numpy(random_windows(2, 60))
    MaskedLanguageDistiller(network).loss("teacher", batch, make_step()).total.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


def test_a_teacher_answers_to_the_protocol(teacher):
    assert isinstance(teacher, Teacher)
    assert teacher.parameters == sum(p.numel() for p in teacher.network.parameters())
    assert teacher.network.head.weight is teacher.network.embedding.weight
    assert not any(p.requires_grad for p in teacher.network.train().parameters())
    assert not teacher.network.training
    assert teacher.licence is None
    fresh, same = teacher.untrained(3), teacher.untrained(3)
    assert not torch.equal(fresh.network.embedding.weight, teacher.network.embedding.weight)
    assert torch.equal(fresh.network.embedding.weight, same.network.embedding.weight)


def test_wrong_sizes_and_inputs(teacher):
    for wrong, name in (
        ({"width": 30, "heads": 4}, "width"),
        ({"width": 4}, "width"),
        ({"depth": 0}, "depth"),
        ({"depth": 2.0}, "depth"),
        ({"dropout": 1.0}, "dropout"),
        ({"mlp_ratio": 0}, "mlp_ratio"),
        ({"k": 9}, "k"),
        ({"activation": "relu"}, "activation"),
    ):
        with pytest.raises(ConfigError, match=f"teacher.{name}"):
            KmerTransformerConfig(**wrong)
    with pytest.raises(ValueError, match="65 tokens and this teacher reads 64"):
        teacher.features(teacher.tokenizer.encode(random_windows(1, 195)))
    with pytest.raises(ValueError, match="max_tokens = 64"):
        teacher.network(torch.zeros(1, 65, dtype=torch.long))
    with pytest.raises(ValueError, match="vocabulary ends at"):
        teacher.features(KmerTokenizer(6).encode(np.frombuffer(b"GGGGGG", np.uint8)[None]))
    with pytest.raises(ValueError, match="expected k = 3 and vocab_size = 9"):
        KmerTransformer(SMALL, 9)
    with pytest.raises(ValueError, match="k = 6"):
        KmerTeacher(make_network(), KmerTokenizer(6))


# ------------------------------------------------------------------------------------------------- marginals


@settings(max_examples=30, deadline=None)
@given(st.text(alphabet="ACGTACGTACGTN", min_size=1, max_size=14), st.integers(1, 4), st.integers(0, 99))
def test_marginals_are_the_sums_over_words(text, k, seed):
    tokenizer = KmerTokenizer(k)
    tokens = tokenizer.encode(np.frombuffer(text.encode(), np.uint8)[None])
    generator = torch.Generator().manual_seed(seed)
    shape = (*tokens.ids.shape, tokenizer.vocab_size + 2)
    logits = 3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    found = nucleotide_marginals(logits, tokens, tokenizer).exp()[0]
    torch.testing.assert_close(found.sum(-1), torch.ones(len(text), dtype=torch.float64))
    for place in range(len(text)):
        token = int(tokens.groups[0, place])
        size, offset = int(tokens.sizes[0, token]), int(tokens.offsets[0, place])
        if text[place] == "N":
            assert (found[place] == 0.25).all()
            continue
        weights = {
            "".join(w): logits[0, token, tokenizer.vocabulary["".join(w)]].exp()
            for w in product("ACGT", repeat=size)
        }
        total = sum(weights.values())
        for index, letter in enumerate("ACGT"):
            expected = sum(v for word, v in weights.items() if word[offset] == letter) / total
            torch.testing.assert_close(found[place, index], expected)


def test_marginals_of_a_sure_model_and_beyond_the_end():
    tokenizer = KmerTokenizer()
    text = b"ACGTTGCANNN"
    tokens = tokenizer.encode(np.frombuffer(text, np.uint8)[None], np.array([8]))
    logits = torch.full((1, 3, tokenizer.vocab_size), -200.0).scatter(2, tokens.ids[..., None], 200.0)
    log_probs = nucleotide_marginals(logits, tokens, tokenizer)
    assert log_probs.isfinite().all()
    assert [b"ACGT"[i] for i in log_probs[0, :8].argmax(-1).tolist()] == list(text[:8])
    assert torch.allclose(log_probs[0, 8:].exp(), torch.tensor(0.25))
    logits[..., :6] = 500.0  # special tokens have no say
    assert torch.equal(nucleotide_marginals(logits, tokens, tokenizer), log_probs)
    with pytest.raises(ValueError, match="logits has the shape"):
        nucleotide_marginals(logits[..., :50], tokens, tokenizer)


# ------------------------------------------------------------------------------------- masked language model


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.01, 1.0), st.sampled_from([0.0, 0.1, 0.6]))
def test_only_letters_are_chosen_and_replaced_by_k_mers(key, ratio, n):
    windows = random_windows(5, 61, seed=key, n=n)
    tokens = THREE.encode(windows, np.array([61, 40, 7, 0, 61]))
    seen = corrupt(tokens, THREE, key=key, ratio=ratio)
    candidates = THREE.is_letters(tokens.ids) & tokens.valid
    assert not (seen.chosen & ~candidates).any()
    expected = [min(c, max(1, round(c * ratio))) if c else 0 for c in candidates.sum(1).tolist()]
    assert all(abs(a - b) <= 1 for a, b in zip(seen.chosen.sum(1).tolist(), expected, strict=True))
    assert torch.equal(seen.ids[~seen.chosen], tokens.ids[~seen.chosen])
    differs = seen.ids != tokens.ids
    swapped = seen.ids[differs & (seen.ids != THREE.mask_id)]
    assert THREE.is_kmer(swapped).all()


def test_shares_are_80_10_10_and_replacements_uniform():
    tokens = THREE.encode(random_windows(400, 300))
    seen = corrupt(tokens, THREE, key=1, ratio=0.5)
    count = int(seen.chosen.sum())
    assert count == 400 * 50
    masked = int((seen.ids == THREE.mask_id).sum()) / count
    swapped = seen.ids[(seen.ids != tokens.ids) & (seen.ids != THREE.mask_id)]
    spread = 4 * (0.8 * 0.2 / count) ** 0.5  # four standard errors
    assert abs(masked - 0.8) < spread
    assert abs(len(swapped) / count - 0.1 * 63 / 64) < spread
    counted = torch.bincount(swapped - int(THREE.kmer_ids[0]), minlength=64)
    expected = len(swapped) / 64
    assert float(((counted - expected) ** 2 / expected).sum()) < 63 + 5 * (2 * 63) ** 0.5
    places = seen.chosen.float().mean(0)  # every place as often as any other
    assert float((places - 0.5).abs().max()) < 5 * (0.25 / 400) ** 0.5


def test_the_draw_follows_window_and_key_alone():
    windows = random_windows(4, 60, n=0.03)
    whole = THREE.encode(windows)
    seen = corrupt(whole, THREE, key=5)
    for row in range(4):  # the same window in another batch, with another padding
        alone = THREE.encode(windows[row : row + 1])
        part = corrupt(alone, THREE, key=5)
        count = int(alone.lengths[0])
        assert torch.equal(part.ids[0], seen.ids[row, :count])
    assert not torch.equal(corrupt(whole, THREE, key=6).chosen, seen.chosen)
    for wrong in ({"ratio": 0.0}, {"ratio": 1.1}, {"mask_share": 0.9, "random_share": 0.2}):
        with pytest.raises(ValueError, match=r"ratio is|add up"):
            corrupt(whole, THREE, key=0, **wrong)


def test_the_loss_is_the_cross_entropy_of_the_chosen():
    network = make_network()
    distiller = MaskedLanguageDistiller(network, seed=3)
    batch = torch.from_numpy(random_windows(6, 60, n=0.02))
    items = distiller.num_items(batch)
    losses = distiller.loss("teacher", batch, make_step(index=7, items=items))
    tokens = THREE.encode(batch)
    seen = corrupt(tokens, THREE, key=(3 << 32) + 7)
    assert int(seen.chosen.sum()) == items
    logits = network.logits(network(seen.ids, attend=tokens.valid))
    expected = -logits.log_softmax(-1).gather(2, tokens.ids[..., None])[..., 0][seen.chosen].mean()
    torch.testing.assert_close(losses.total, expected)
    halves = [torch.from_numpy(batch.numpy()[a:b].copy()) for a, b in ((0, 2), (2, 6))]
    parts = [distiller.loss("teacher", half, make_step(7, items)).total for half in halves]
    torch.testing.assert_close(parts[0] + parts[1], losses.total)
    assert sum(map(distiller.num_items, halves)) == items
    again = distiller.loss("teacher", tokens, make_step(7, items))  # tokenised before
    assert torch.equal(again.total, losses.total)
    empty = torch.full((2, 9), ord("N"), dtype=torch.uint8)
    nothing = distiller.loss("teacher", empty, make_step(items=0)).total
    assert float(nothing.detach()) == 0
    nothing.backward()


class Repeats:
    """Windows that repeat one word each: what is hidden can be read from what is not."""

    seeded = True

    def __len__(self) -> int:
        return 512

    def __getitem__(self, key: tuple[int, int]) -> np.ndarray:
        rng = np.random.default_rng(key[1])
        word = np.frombuffer(b"ACGT", np.uint8)[rng.integers(4, size=3)]
        return np.tile(word, 12)


def train(network: KmerTransformer, out, steps: int):
    loader = SeededLoader(Repeats(), batch_size=32, seed=0)
    trainer = Trainer(TrainConfig(steps=steps, log_every=20, clip_norm=1.0), out=out, quiet=True)
    return trainer.fit(MaskedLanguageDistiller(network), loader, OptimConfig(lr=3e-3, warmup_steps=10))


def test_it_learns_and_comes_back_from_disk(tmp_path):
    network = make_network()
    windows = np.stack([Repeats()[0, 10_000 + i] for i in range(64)])
    before = evaluate_teacher(KmerTeacher(make_network()), windows)
    train(network, tmp_path / "run", 200)
    teacher = KmerTeacher(network, licence="CC0-1.0")
    after = evaluate_teacher(teacher, windows)
    assert before["cross_entropy"] == pytest.approx(np.log(4), abs=0.05)
    assert after["cross_entropy"] < 0.4
    assert after["accuracy"] > 0.9 > before["accuracy"]
    save_teacher(tmp_path / "teacher", teacher, metrics=after, card="# Teacher\n")
    back = load_teacher(tmp_path / "teacher")
    tokens = THREE.encode(windows)
    assert back.tokenizer == teacher.tokenizer
    assert back.licence == "CC0-1.0"
    assert torch.equal(back.features(tokens)[0], teacher.features(tokens)[0])
    assert evaluate_teacher(back, windows) == after


def test_an_artefact_that_does_not_fit_says_so(tmp_path, teacher):
    from stillhouse.core.artifact import Artifact

    with pytest.raises(DataError, match="no artefact folder"):
        load_teacher(tmp_path / "nothing")
    save_teacher(tmp_path / "a", teacher)
    saved = Artifact.load(tmp_path / "a")
    files = {name: saved.file(name) for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt")}
    wrong = {**saved.config, "network": {**saved.config["network"], "width": 64}}
    Artifact.save(
        tmp_path / "b",
        kind=saved.kind,
        tensors=saved.tensors(),
        config=wrong,
        metrics={},
        card="",
        files=files,
    )
    with pytest.raises(DataError, match="does not describe the weights"):
        load_teacher(tmp_path / "b")
    Artifact.save(tmp_path / "c", kind="other", tensors={"x": torch.zeros(1)}, config={}, metrics={}, card="")
    with pytest.raises(DataError, match="'other'"):
        load_teacher(tmp_path / "c")


def test_evaluation_refuses_what_it_cannot_score(teacher):
    with pytest.raises(ValueError, match="no nucleotide"):
        evaluate_teacher(teacher, np.full((2, 9), ord("N"), np.uint8))
    with pytest.raises(ValueError, match="batch is 0"):
        evaluate_teacher(teacher, random_windows(1, 9), batch=0)


def test_tokens_may_be_empty(teacher):
    tokens = teacher.tokenizer.encode(np.zeros((2, 0), np.uint8))
    assert isinstance(tokens, KmerTokens)
    assert teacher.features(tokens)[0].shape == (2, 0, 32)
    assert teacher.nucleotide_log_probs(tokens).shape == (2, 0, 4)
