"""The reconstruction decoder: where logits are, and that nothing of a masked letter leaks into them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stillhouse.core.testing import assert_gradient
from stillhouse.genomic.student import MaskedDecoder, StudentConfig, build_student

MASK = 3
CONFIGS = {
    "gdn": StudentConfig(width=16, chunk=8),
    "cnn": StudentConfig(kind="cnn", width=16, conv_layers=2, mlp_ratio=1.0),
    "transformer": StudentConfig(kind="transformer", width=16, attention_layers=2),
}


def setting(length: int = 36, batch: int = 2) -> tuple[Tensor, Tensor]:
    """Letters, and masked groups of six; the rows have different numbers of them."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(7, 11, (batch, length), generator=g)
    masked = torch.zeros(batch, length, dtype=torch.bool)
    masked[0, 6:12] = masked[0, 24:30] = masked[1, 12:18] = True
    return ids, masked


def test_logits_lie_at_the_queries():
    torch.manual_seed(0)
    decoder = MaskedDecoder(16, depth=2)
    _, masked = setting()
    logits = decoder(torch.randn(2, 36, 16), ~masked, masked)
    assert logits.shape == (2, 36, 4)
    assert (logits[~masked] == 0).all()
    assert (logits[masked].abs().amax(-1) > 0).all()
    spread = logits[masked].std(0)
    assert (spread > 1e-4).all(), "masked letters are told apart by their positions"


def test_a_row_is_decoded_as_if_alone():
    torch.manual_seed(0)
    decoder = MaskedDecoder(16).double()
    _, masked = setting()
    features = torch.randn(2, 36, 16, dtype=torch.float64)
    both = decoder(features, ~masked, masked)
    for row in range(2):
        alone = decoder(features[[row]], ~masked[[row]], masked[[row]])
        torch.testing.assert_close(both[[row]], alone, rtol=0, atol=1e-12)


def test_only_distances_count():
    """Padding in front changes nothing."""
    torch.manual_seed(0)
    decoder = MaskedDecoder(16).double()
    _, masked = setting()
    features = torch.randn(2, 36, 16, dtype=torch.float64)
    pad = torch.zeros(2, 7, dtype=torch.bool)
    shifted = decoder(
        torch.cat([torch.randn(2, 7, 16, dtype=torch.float64), features], 1),
        torch.cat([pad, ~masked], 1),
        torch.cat([pad, masked], 1),
    )
    torch.testing.assert_close(shifted[:, 7:], decoder(features, ~masked, masked), rtol=0, atol=1e-10)


def test_features_of_masked_and_unasked_letters_are_not_read():
    torch.manual_seed(0)
    decoder = MaskedDecoder(16, depth=2)
    _, masked = setting()
    visible = ~masked
    visible[:, 33:] = False  # padding
    features = torch.randn(2, 36, 16, requires_grad=True)
    decoder(features, visible, masked).square().sum().backward()
    assert (features.grad[~visible] == 0).all()
    assert (features.grad[visible].abs().amax(-1) > 0).all()


@pytest.mark.parametrize("kind", CONFIGS)
def test_no_leak_by_gradient(kind):
    """With [MASK] in the encoder, logits do not depend on the masked letters: one-hot letters as input."""
    torch.manual_seed(0)
    encoder, decoder = build_student(CONFIGS[kind]).double(), MaskedDecoder(16).double()
    ids, masked = setting()
    one_hot = torch.nn.functional.one_hot(ids, 16).double().requires_grad_()
    fill = torch.nn.functional.one_hot(torch.tensor(MASK), 16).double()
    shown = torch.where(masked[..., None], fill, one_hot)
    features = encoder.encode(shown @ encoder.embedding.weight)
    logits = decoder(features, ~masked, masked)
    grad = torch.autograd.grad(logits.square().sum(), one_hot)[0]
    assert (grad[masked] == 0).all()
    assert (grad[~masked].abs().amax(-1) > 0).any()

    leaky = encoder.encode(one_hot @ encoder.embedding.weight)  # the classic bug, which this test must see
    grad = torch.autograd.grad(decoder(leaky, ~masked, masked).square().sum(), one_hot)[0]
    assert (grad[masked] != 0).any()


@pytest.mark.parametrize("kind", CONFIGS)
def test_no_leak_by_changing_letters(kind):
    torch.manual_seed(0)
    encoder, decoder = build_student(CONFIGS[kind]), MaskedDecoder(16)
    ids, masked = setting()
    changed = torch.where(masked, (ids - 7 + 1) % 4 + 7, ids)
    assert (changed != ids).any()
    one, two = (decoder(encoder(x.masked_fill(masked, MASK)), ~masked, masked) for x in (ids, changed))
    assert torch.equal(one, two)
    neighbour = ids.clone()
    neighbour[0, 5] = (ids[0, 5] - 7 + 1) % 4 + 7  # visible: this must be seen
    three = decoder(encoder(neighbour.masked_fill(masked, MASK)), ~masked, masked)
    assert (one[0] - three[0]).abs().max() > 0


def test_no_visible_letter_and_no_query():
    torch.manual_seed(0)
    decoder = MaskedDecoder(16)
    everything = torch.ones(1, 9, dtype=torch.bool)
    features = torch.randn(1, 9, 16, requires_grad=True)
    logits = decoder(features, ~everything, everything)
    logits.sum().backward()
    assert torch.isfinite(logits).all()
    assert (features.grad == 0).all()
    empty = decoder(torch.randn(2, 9, 16), everything.expand(2, 9), ~everything.expand(2, 9))
    assert empty.shape == (2, 9, 4)
    assert (empty == 0).all()
    empty.sum().backward()
    assert decoder(torch.randn(0, 9, 16), everything[:0], everything[:0]).shape == (0, 9, 4)


def test_every_weight_learns():
    torch.manual_seed(0)
    decoder = MaskedDecoder(16, depth=2, inner=24, heads=3)
    _, masked = setting()
    loss = decoder(torch.randn(2, 36, 16), ~masked, masked)[masked].square().sum()
    assert_gradient(loss, decoder)
    again = MaskedDecoder(**decoder.options)
    again.load_state_dict(decoder.state_dict())


def test_half_precision():
    torch.manual_seed(0)
    decoder = MaskedDecoder(16)
    _, masked = setting()
    features = torch.randn(2, 36, 16)
    exact = decoder(features, ~masked, masked)
    with torch.autocast("cpu", torch.bfloat16):
        half = decoder(features, ~masked, masked)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact, rtol=0.05, atol=0.05)


def test_it_learns_to_copy_a_repeat():
    """Letters of a repeat are found at their distance: positions work, and only they can do it."""
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(1)
    embedding, decoder = torch.nn.Embedding(16, 16), MaskedDecoder(16, mlp_ratio=1.0)
    optimizer = torch.optim.Adam([*embedding.parameters(), *decoder.parameters()], lr=1e-2)
    masked = torch.zeros(32, 8, dtype=torch.bool)
    masked[:, 5:7] = True
    losses = []
    for _ in range(120):
        half = torch.randint(7, 11, (32, 4), generator=g)
        ids = torch.cat([half, half], 1)
        logits = decoder(embedding(ids.masked_fill(masked, MASK)), ~masked, masked)
        loss = torch.nn.functional.cross_entropy(logits[masked], ids[masked] - 7)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) / 10 < 0.5  # chance is 1.39


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda d, f, m: d(f, ~m, torch.ones_like(m)), "share a letter"),
        (lambda d, f, m: d(f, m[:, :5], m), "visible is"),
        (lambda d, f, m: d(f, ~m, m.float()), "queries is"),
        (lambda d, f, m: MaskedDecoder(16, heads=3), "even"),
        (lambda d, f, m: MaskedDecoder(16, depth=0), "depth is 0"),
        (lambda d, f, m: MaskedDecoder(16, mlp_ratio=0), "mlp_ratio"),
    ],
)
def test_wrong_arguments_are_named(call, words):
    _, masked = setting()
    with pytest.raises(ValueError, match=words):
        call(MaskedDecoder(16), torch.randn(2, 36, 16), masked)
