"""Reverse complement: the equivariant wrapper, its head, and averaging over the strands."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from stillhouse.genomic.student import RcEquivariant, RcHead, StudentConfig, build_student, conjoin
from stillhouse.genomic.student.rc import complement_ids

KINDS = {
    "gdn": StudentConfig(width=16, chunk=8),
    "cnn": StudentConfig(kind="cnn", width=16, conv_layers=2, mlp_ratio=1.0),
    "transformer": StudentConfig(kind="transformer", width=16, attention_layers=2),
}
OTHER = {7: 10, 8: 9, 9: 8, 10: 7}  # A-T, C-G, written out here a second time on purpose


def letters(batch: int, length: int) -> Tensor:
    ids = torch.randint(7, 12, (batch, length), generator=torch.Generator().manual_seed(0))
    ids[:, 3] = 3  # a [MASK], which is its own complement
    return ids


def rc(ids: Tensor) -> Tensor:
    return torch.tensor([[OTHER.get(i, i) for i in reversed(row)] for row in ids.tolist()])


def error(f: RcEquivariant, ids: Tensor) -> float:
    with torch.no_grad():
        return float((f(rc(ids)) - f(ids).flip(1, 2)).abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_equivariance(kind):
    torch.manual_seed(0)
    f = build_student(replace(KINDS[kind], rc_equivariant=True))
    assert isinstance(f, RcEquivariant)
    assert f(letters(2, 23)).shape == (2, 23, f.width) == (2, 23, 32)
    assert error(f, letters(2, 23)) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_complement_is_caught(kind):
    """The same test with A ↔ C and G ↔ T must fail, clearly."""
    torch.manual_seed(0)
    table = list(range(16))
    table[7], table[8], table[9], table[10] = 8, 7, 10, 9
    f = RcEquivariant(build_student(KINDS[kind]), complement=table)
    assert error(f, letters(2, 23)) > 0.05


def test_the_plain_encoder_is_not_equivariant():
    torch.manual_seed(0)
    encoder = build_student(KINDS["gdn"])
    ids = letters(2, 23)
    assert (encoder(rc(ids)) - encoder(ids).flip(1, 2)).abs().max() > 0.1


def test_hidden_layers_and_padding_are_equivariant():
    torch.manual_seed(0)
    f = RcEquivariant(build_student(KINDS["gdn"]))
    ids = letters(2, 23)
    attend = torch.ones(2, 23, dtype=torch.bool)
    attend[0, :6] = False
    _, one = f(ids, attend=attend, hidden=True)
    _, two = f(rc(ids), attend=attend.flip(1), hidden=True)
    assert len(one) == f.depth == 3
    for a, b in zip(one, two, strict=True):
        keep = attend[..., None]
        torch.testing.assert_close(b.flip(1, 2) * keep, a * keep, rtol=0, atol=1e-5)
    short = f(ids[:1, 6:])
    torch.testing.assert_close(f(ids, attend=attend)[:1, 6:], short, rtol=0, atol=1e-5)


def test_head_is_equivariant():
    torch.manual_seed(0)
    f = RcEquivariant(build_student(KINDS["cnn"]))
    head = RcHead(f.width)
    ids = letters(2, 23)
    with torch.no_grad():
        logits, other = head(f(ids)), head(f(rc(ids)))
    torch.testing.assert_close(other, logits.flip(1)[..., [3, 2, 1, 0]], rtol=0, atol=1e-5)
    assert (other - logits.flip(1)).abs().max() > 0.01
    with pytest.raises(ValueError, match="width is 3"):
        RcHead(3)


def test_weights_are_shared_and_learn():
    f = RcEquivariant(build_student(KINDS["cnn"]))
    assert sum(p.numel() for p in f.parameters()) == sum(p.numel() for p in f.encoder.parameters())
    f(letters(2, 23)).pow(3).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in f.parameters())


def test_complement_table():
    table = complement_ids()
    assert [table[i] for i in range(16)] == [*range(7), 10, 9, 8, 7, *range(11, 16)]
    assert all(table[table[i]] == i for i in range(16))
    with pytest.raises(ValueError, match="complement has 3 ids"):
        RcEquivariant(build_student(KINDS["cnn"]), complement=(0, 1, 2))


def test_conjoined_logits_are_invariant():
    from stillhouse.genomic.data import reverse_complement

    rng = np.random.default_rng(0)
    windows = np.frombuffer(b"ACGTN", np.uint8)[rng.integers(0, 5, (4, 30))]
    weights = rng.normal(size=(30, 256, 3))

    def model(x):
        return weights[np.arange(30), x].sum(1)

    both = conjoin(model, windows)
    np.testing.assert_allclose(both, (model(windows) + model(reverse_complement(windows))) / 2)
    np.testing.assert_allclose(conjoin(model, reverse_complement(windows)), both)
    assert np.abs(model(reverse_complement(windows)) - model(windows)).max() > 0.1
    one = conjoin(lambda x: torch.from_numpy(model(x)), windows[:1])  # a batch of one keeps its dimension
    assert one.shape == (1, 3)
    np.testing.assert_allclose(one.numpy(), both[:1])
