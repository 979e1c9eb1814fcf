"""Training a k-mer teacher: interrupted, on two ranks, and on real genomes."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from stillhouse.core.testing import run_ranks
from stillhouse.core.train import Losses, OptimConfig, SeededLoader, TrainConfig, Trainer
from stillhouse.genomic.teacher import (
    KmerTeacher,
    KmerTransformer,
    KmerTransformerConfig,
    MaskedLanguageDistiller,
    evaluate_teacher,
)
from stillhouse.genomic.tokenizers import CharacterTokenizer, KmerTokenizer


class Windows:
    """Random windows of different lengths, padded with N, drawn from the seed of the sample."""

    seeded = True

    def __len__(self) -> int:
        return 64

    def __getitem__(self, key: tuple[int, int]) -> np.ndarray:
        rng = np.random.default_rng(key[1])
        window = np.frombuffer(b"ACGT", np.uint8)[rng.integers(4, size=45)]
        window[int(rng.integers(20, 46)) :] = ord("N")
        return window


class Stops(MaskedLanguageDistiller):
    """Fails at a step."""

    at = 9

    def loss(self, role, batch, step) -> Losses:
        if step.index == self.at:
            raise KeyboardInterrupt
        return super().loss(role, batch, step)


def make_network() -> KmerTransformer:
    torch.manual_seed(0)
    return KmerTransformer(
        KmerTransformerConfig(width=16, depth=2, heads=2, k=3), KmerTokenizer(3).vocab_size
    )


def fit(out: str | None, kind: type[MaskedLanguageDistiller], **settings) -> dict[str, list]:
    network = make_network()
    loader = SeededLoader(Windows(), batch_size=8, seed=1)
    config = TrainConfig(steps=12, checkpoint_every=4, log_every=4, accelerator="cpu", **settings)
    trainer = Trainer(config, out=None if out is None else Path(out), quiet=True)
    trainer.fit(kind(network, seed=5), loader, OptimConfig(name="sgd", lr=0.5, schedule="constant"))
    return {name: value.tolist() for name, value in network.state_dict().items()}


def test_an_interrupted_run_ends_as_an_undisturbed_one(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fit(str(tmp_path / "a"), Stops)
    assert fit(str(tmp_path / "a"), MaskedLanguageDistiller) == fit(
        str(tmp_path / "b"), MaskedLanguageDistiller
    )


def test_accumulation_and_two_ranks_see_what_one_sees():
    one = fit(None, MaskedLanguageDistiller)
    twice = run_ranks(_two, 2)
    assert twice[0] == twice[1]
    start = {name: value.tolist() for name, value in make_network().state_dict().items()}
    for name, value in one.items():
        moved = np.abs(np.array(value) - np.array(start[name])).max()
        difference = np.abs(np.array(value) - np.array(twice[0][name])).max()
        assert difference < 1e-5 + 1e-3 * moved, name


def _two() -> dict[str, list]:
    return fit(None, MaskedLanguageDistiller, strategy="ddp", devices=2)


@pytest.fixture(scope="module")
def genome() -> np.ndarray:
    """Letters of a real chromosome piece with N and IUPAC letters in it."""
    path = Path(os.environ["STILLHOUSE_TEST_DATA"]) / "genomic" / "athaliana_1pct.fa"
    lines = path.read_bytes().split(b"\n")
    return np.frombuffer(b"".join(line.strip() for line in lines if not line.startswith(b">")), np.uint8)


@pytest.mark.real_data
def test_real_windows_come_back_from_their_tokens(genome):
    windows = genome[: len(genome) // 1024 * 1024].reshape(-1, 1024)
    tokenizer, characters = KmerTokenizer(), CharacterTokenizer()
    tokens = tokenizer.encode(windows)
    plain = characters.decode(characters.encode(windows))
    assert (plain == ord("N")).sum() > 2000
    assert (tokenizer.decode(tokens) == plain).all()
    assert (tokens.sizes.sum(1) == 1024).all()
    broken = torch.from_numpy((plain == ord("N")).any(1))
    regular = torch.arange(1024) // 6
    regular[1020:] = torch.arange(170, 174)
    assert (tokens.groups[~broken] == regular).all()
    assert (tokens.groups[broken] != regular).any(1).float().mean() > 0.9


@pytest.mark.real_data
@pytest.mark.slow
def test_a_teacher_learns_from_a_real_genome(genome):
    """Above the frequencies of letters and of 6-mers on a stretch it has not seen."""
    windows = genome[: len(genome) // 510 * 510].reshape(-1, 510)
    windows = windows[(windows != ord("N")).all(1)]
    train, test = windows[:-200], windows[-200:]
    torch.manual_seed(0)
    network = KmerTransformer(KmerTransformerConfig(width=96, depth=3, heads=4), KmerTokenizer().vocab_size)
    loader = SeededLoader(torch.from_numpy(train.copy()), batch_size=32, seed=0)
    trainer = Trainer(TrainConfig(steps=250, log_every=50, clip_norm=1.0), out=None, quiet=True)
    trainer.fit(MaskedLanguageDistiller(network), loader, OptimConfig(lr=2e-3, warmup_steps=25))
    plain = CharacterTokenizer()
    share = np.bincount(plain.encode(train).numpy().ravel(), minlength=12)[7:11] / train.size
    found = evaluate_teacher(KmerTeacher(network), test)
    entropy = float(-(share * np.log(share)).sum())
    assert found["cross_entropy"] < entropy - 0.01
