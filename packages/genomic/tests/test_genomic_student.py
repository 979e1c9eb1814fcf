"""Student networks: sizes, directions, causality, padding, configuration."""

from __future__ import annotations

import copy
import pickle
from dataclasses import asdict, replace

import pytest
import torch
from torch import Tensor

from stillhouse.core.errors import ConfigError
from stillhouse.core.testing import assert_gradient
from stillhouse.genomic.student import (
    BiGatedDeltaNet,
    Encoder,
    GatedDeltaNet,
    StudentConfig,
    build_student,
    preset,
)

KINDS = ("gdn", "cnn", "transformer")
SMALL = {
    "gdn": StudentConfig(width=16, chunk=8),
    "cnn": StudentConfig(kind="cnn", width=16, conv_layers=2, dilation=3, mlp_ratio=1.0),
    "transformer": StudentConfig(kind="transformer", width=16, attention_layers=2),
}


def make(config: StudentConfig, *, double: bool = True) -> Encoder:
    torch.manual_seed(0)
    encoder = build_student(config)
    assert isinstance(encoder, Encoder)
    return encoder.double().eval() if double else encoder.eval()


def letters(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(7, 11, (batch, length), generator=torch.Generator().manual_seed(seed))


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# ------------------------------------------------------------------------------------ sizes


def test_the_one_million_student():
    """2 Bi-GDN blocks + 1 attention block at d = 128, piece by piece."""
    d, heads, keys, values = 128, 2, 48, 96
    gdn = d * (heads * (2 * keys + 2 * values) + 2 * heads) + heads * values * d  # in_proj, out_proj
    gdn += heads * (2 * keys + values) * 4 + 2 * heads + values  # convolution, A_log and dt_bias, norm
    block = 2 * d + 3 * d * 4 * d  # two norms, SwiGLU
    expected = 16 * d + 2 * (2 * gdn + block) + (4 * d * d + block) + d
    found = parameters(make(preset("gdn_1m"), double=False))
    assert found == expected == 1_060_112
    assert round(found / 1e6, 1) == 1.1


def test_a_direction_has_six_width_squared():
    layer = GatedDeltaNet(StudentConfig(width=256))
    matrices = sum(p.numel() for p in layer.parameters() if p.dim() == 2 and p.shape[1] != 4)
    assert matrices == 6 * 256**2 + 2 * 2 * 256


@pytest.mark.parametrize("size", ["1m", "64", "48", "32"])
def test_the_kinds_are_comparable(size):
    counts = [parameters(build_student(preset(f"{kind}_{size}"))) for kind in KINDS]
    assert max(counts) / min(counts) < 1.05


def marked(module):
    return {n for n, p in module.named_parameters() if getattr(p, "_no_weight_decay", False)}


def test_decay_parameters_are_marked_and_start_in_range():
    layer = GatedDeltaNet(StudentConfig(width=64, heads=16))
    assert marked(layer) == {"A_log", "dt_bias"}
    assert (layer.A_log.exp() <= 16).all()
    dt = torch.nn.functional.softplus(layer.dt_bias)
    assert ((dt > 0.99e-3) & (dt < 1.01e-1)).all()


@pytest.mark.parametrize("tie", [False, True])
def test_copies_keep_the_mark_and_their_own_parameters(tie):
    layer = BiGatedDeltaNet(StudentConfig(width=16, tie_directions=tie))
    copied = copy.deepcopy(layer)
    pickled = pickle.loads(pickle.dumps(layer))
    marks = marked(layer)
    assert marks
    for other in (copied, pickled):
        assert marked(other) == marks
        mine = {id(p) for p in layer.parameters()}
        assert all(id(p) not in mine for p in other.parameters())
        for (name, one), (_, two) in zip(layer.named_parameters(), other.named_parameters(), strict=True):
            assert torch.equal(one, two), name
    layer.requires_grad_(False)
    assert not any(p.requires_grad for p in copy.deepcopy(layer).parameters())


# ------------------------------------------------------------------------------------ directions


@pytest.mark.parametrize("combine", ["add", "concat", "gate"])
@pytest.mark.parametrize("recurrence", ["gated_delta", "printed"])
def test_swapping_the_directions_reverses_the_output(combine, recurrence):
    torch.manual_seed(0)
    layer = BiGatedDeltaNet(StudentConfig(width=16, chunk=8, combine=combine, recurrence=recurrence)).double()
    x = torch.randn(2, 21, 16, dtype=torch.float64)
    before = layer(x)
    unswapped = layer(x.flip(1)).flip(1)
    layer.ahead, layer.behind = layer.behind, layer.ahead
    with torch.no_grad():
        if combine == "concat":
            layer.mix.weight.copy_(layer.mix.weight.roll(16, 1))
        if combine == "gate":
            layer.mix.weight.neg_()
            layer.mix.bias.neg_()
    torch.testing.assert_close(layer(x.flip(1)).flip(1), before, rtol=0, atol=1e-12)
    assert (unswapped - before).abs().max() > 1e-2


def test_tied_directions_reverse_the_output_and_share_weights():
    torch.manual_seed(0)
    config = StudentConfig(width=16, chunk=8, tie_directions=True)
    layer = BiGatedDeltaNet(config).double()
    x = torch.randn(2, 21, 16, dtype=torch.float64)
    torch.testing.assert_close(layer(x.flip(1)).flip(1), layer(x), rtol=0, atol=1e-12)
    assert 2 * parameters(layer) == parameters(BiGatedDeltaNet(replace(config, tie_directions=False)))


def test_both_directions_in_one_pass_are_each_alone():
    torch.manual_seed(0)
    layer = BiGatedDeltaNet(StudentConfig(width=16, chunk=8)).double()
    x = torch.randn(2, 21, 16, dtype=torch.float64)
    alone = layer.ahead(x) + layer.behind(x.flip(1)).flip(1)
    torch.testing.assert_close(layer(x), alone, rtol=0, atol=1e-12)


def test_one_direction_is_causal():
    torch.manual_seed(0)
    layer = GatedDeltaNet(StudentConfig(width=16, chunk=8)).double()
    x = torch.randn(1, 30, 16, dtype=torch.float64, requires_grad=True)
    layer(x)[:, 11].square().sum().backward()
    assert (x.grad[:, 12:] == 0).all()
    assert (x.grad[:, :12].abs().amax(-1) > 0).all()


def test_both_directions_see_everything():
    torch.manual_seed(0)
    layer = BiGatedDeltaNet(StudentConfig(width=16, chunk=8)).double()
    x = torch.randn(1, 30, 16, dtype=torch.float64, requires_grad=True)
    layer(x)[:, 11].square().sum().backward()
    assert (x.grad.abs().amax(-1) > 0).all()


def test_negative_eigenvalues_double_beta():
    torch.manual_seed(0)
    config = StudentConfig(width=16)
    layer = GatedDeltaNet(config)
    x = torch.randn(1, 9, 16)
    single = layer.project(x).beta
    layer.config = replace(config, negative_eigenvalues=True)
    torch.testing.assert_close(layer.project(x).beta, 2 * single)


def test_keys_have_length_one_and_queries_are_scaled():
    parts = GatedDeltaNet(StudentConfig(width=64)).project(torch.randn(2, 30, 64))
    torch.testing.assert_close(parts.k.norm(dim=-1), torch.ones(2, 30, 2), rtol=0, atol=1e-2)
    torch.testing.assert_close(parts.q.norm(dim=-1), torch.full((2, 30, 2), 24**-0.5), rtol=1e-2, atol=0)
    assert (parts.log_alpha <= 0).all()
    assert ((parts.beta > 0) & (parts.beta < 1)).all()


# ------------------------------------------------------------------------------------ encoder


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_and_hidden(kind):
    encoder = make(SMALL[kind])
    ids = letters(3, 27)
    features, hidden = encoder(ids, hidden=True)
    assert features.shape == (3, 27, 16)
    assert len(hidden) == encoder.depth
    assert hidden[-1] is features
    assert torch.equal(encoder(ids), features)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_leak(kind, side):
    """Features of letters, and gradients of weights, are those without padding, in a batch of both."""
    encoder = make(SMALL[kind])
    short, long = letters(1, 19), letters(1, 32, seed=1)
    padded = torch.full((1, 32), 4)
    real = slice(13, 32) if side == "left" else slice(0, 19)
    padded[:, real] = short
    ids = torch.cat([padded, long])
    attend = torch.ones(2, 32, dtype=torch.bool)
    attend[0] = False
    attend[0, real] = True

    alone = encoder(short)
    together = encoder(ids, attend=attend)
    torch.testing.assert_close(together[:1, real], alone, rtol=0, atol=1e-10)
    torch.testing.assert_close(together[1:], encoder(long), rtol=0, atol=1e-10)
    assert torch.isfinite(together).all()
    assert (encoder(ids)[:1, real] - alone).abs().max() > 1e-3, "without the mask, padding is seen"

    weights = list(encoder.parameters())
    one = torch.autograd.grad(alone.square().sum(), weights)
    two = torch.autograd.grad(together[:1, real].square().sum(), weights)
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_a_gap_neither_writes_nor_decays():
    """Padding in the middle: the recurrence passes over it."""
    torch.manual_seed(0)
    layer = GatedDeltaNet(StudentConfig(width=16, chunk=8)).double()
    x = torch.randn(1, 30, 16, dtype=torch.float64)
    attend = torch.ones(1, 30, dtype=torch.bool)
    attend[:, 10:17] = False
    parts = layer.project(x, attend)
    whole = layer.recur(parts)
    closed = layer.recur(type(parts)(*(part[:, attend[0]] for part in parts)))
    torch.testing.assert_close(whole[:, attend[0]], closed, rtol=0, atol=1e-12)
    assert (parts.v[:, 10:13].abs() > 0).any(), "the convolution has a tail there"


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_padding_alone_is_finite(kind):
    encoder = make(SMALL[kind])
    attend = torch.tensor([[True] * 9, [False] * 9])
    features = encoder(letters(2, 9), attend=attend)
    features[attend].sum().backward()
    assert torch.isfinite(features).all()
    assert all(torch.isfinite(p.grad).all() for p in encoder.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_learns(kind):
    encoder = make(SMALL[kind])
    loss = encoder(letters(2, 40)).pow(3).sum()
    assert_gradient(loss, encoder)


@pytest.mark.parametrize("kind", KINDS)
def test_a_letter_reaches_its_neighbours(kind):
    """Features depend on letters on both sides."""
    encoder = make(SMALL[kind])
    x = encoder.embedding(letters(1, 25)).detach().requires_grad_()
    features = encoder.encode(x)
    assert isinstance(features, Tensor)
    features[0, 12].pow(2).sum().backward()
    reach = x.grad[0].abs().amax(-1) > 0
    assert reach[8:17].all()


def test_the_reach_of_the_cnn_is_what_its_dilations_say():
    encoder = make(StudentConfig(kind="cnn", width=8, conv_layers=2, kernel=3, dilation=4, mlp_ratio=1.0))
    x = encoder.embedding(letters(1, 41)).detach().requires_grad_()
    encoder.encode(x)[0, 20].pow(2).sum().backward()
    reach = (x.grad[0].abs().amax(-1) > 0).nonzero().flatten() - 20
    assert (reach.min(), reach.max()) == (-5, 5)  # 1 + 4


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision(kind):
    encoder = make(SMALL[kind], double=False)
    ids = letters(2, 33)
    exact = encoder(ids)
    with torch.autocast("cpu", torch.bfloat16):
        half = encoder(ids)
    half.float().sum().backward()
    assert (half.float() - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_any_length(kind):
    encoder = make(SMALL[kind])
    for length in (0, 1, 2, 65):
        assert encoder(letters(2, length)).shape == (2, length, 16)


def test_the_seed_fixes_the_weights():
    one, two = make(SMALL["gdn"]), make(SMALL["gdn"])
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


@pytest.mark.parametrize(
    "ids, attend",
    [
        (torch.zeros(3, dtype=torch.int64), None),
        (torch.zeros(2, 3), None),
        (torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 4, dtype=torch.bool)),
        (torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3)),
    ],
)
def test_wrong_inputs_are_named(ids, attend):
    with pytest.raises(ValueError, match=r"ids is|attend is"):
        make(SMALL["cnn"])(ids, attend=attend)


# ------------------------------------------------------------------------------------ configuration


@pytest.mark.parametrize(
    "change, words",
    [
        ({"kind": "mamba"}, "allowed: gdn, cnn, transformer"),
        ({"width": 0}, "width is 0"),
        ({"width": 18}, "0.75"),
        ({"width": 16.0}, "width is 16.0"),
        ({"heads": True}, "heads is True"),
        ({"attention_heads": 16, "width": 16}, "even"),
        ({"kernel": 4, "kind": "cnn"}, "odd"),
        ({"recurrence": "delta"}, "gated_delta, printed"),
        ({"combine": "max"}, "add, concat, gate"),
        ({"gdn_layers": 0, "attention_layers": 0}, "without layers"),
        ({"vocab": 4}, "vocab is 4"),
        ({"expand_v": 0.3}, "no integer"),
        ({"mlp_ratio": 0.0}, "mlp_ratio is 0.0"),
        ({"mlp_ratio": float("nan")}, "mlp_ratio is nan"),
    ],
)
def test_impossible_settings_are_refused(change, words):
    with pytest.raises(ConfigError, match=words):
        StudentConfig(**change)


def test_presets():
    assert StudentConfig(**asdict(preset("gdn_1m"))) == preset("gdn_1m")
    with pytest.raises(ConfigError, match="gdn_1m"):
        preset("gdn_2m")
