"""The gated delta rule: closed forms, the two forms against each other, stability, linear growth."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from stillhouse.core.testing import assert_gradcheck
from stillhouse.genomic.student.ops import (
    Variant,
    gated_delta,
    gated_delta_chunked,
    gated_delta_recurrent,
)

FORMS = [gated_delta_recurrent, gated_delta_chunked]
VARIANTS: list[Variant] = ["gated_delta", "printed"]


def draw(
    length: int, *, batch: int = 2, heads: int = 3, keys: int = 5, values: int = 4, seed: int = 0
) -> tuple[Tensor, ...]:
    """Random inputs in float64: q, k, v, log_alpha, beta."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    q, k = normal(batch, length, heads, keys), normalize(normal(batch, length, heads, keys), dim=-1)
    decay = -2 * torch.rand(batch, length, heads, generator=g, dtype=torch.float64)
    beta = torch.rand(batch, length, heads, generator=g, dtype=torch.float64)
    return q, k, normal(batch, length, heads, values), decay, beta


def start(*, batch: int = 2, heads: int = 3, keys: int = 5, values: int = 4) -> Tensor:
    g = torch.Generator().manual_seed(99)
    return torch.randn(batch, heads, values, keys, generator=g, dtype=torch.float64)


def constant(value: float, like: Tensor) -> Tensor:
    return torch.full(like.shape[:3], value, dtype=like.dtype)


# ------------------------------------------------------------------------------------ closed forms


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("alpha", [1.0, 0.7])
def test_overwrite(form, alpha):
    """β = 1: after writing (k, v), S k = v, whatever S was and however it decays."""
    _, k, v, _, beta = draw(1)
    o, state = form(
        k,
        k,
        v,
        constant(math.log(alpha), k),
        torch.ones_like(beta),
        initial=start(),
    )
    torch.testing.assert_close(o, v, rtol=0, atol=1e-14)
    torch.testing.assert_close(torch.einsum("bhvk,blhk->blhv", state, k), v, rtol=0, atol=1e-14)


@pytest.mark.parametrize("form", FORMS)
def test_the_printed_variant_does_not_overwrite(form):
    """Its residual is (1 − α)‖S k‖; at α = 1 the two variants are one."""
    _, k, v, _, beta = draw(1)
    old = torch.einsum("bhvk,blhk->blhv", start(), k)
    for alpha in (0.7, 0.2, 1.0):
        o, _ = form(
            k,
            k,
            v,
            constant(math.log(alpha), k),
            torch.ones_like(beta),
            initial=start(),
            variant="printed",
        )
        residual = (o - v).norm(dim=-1)
        torch.testing.assert_close(residual, (1 - alpha) * old.norm(dim=-1), rtol=0, atol=1e-14)
    assert old.norm(dim=-1).min() > 0.1


@pytest.mark.parametrize("form", FORMS)
def test_variants_agree_without_decay(form):
    q, k, v, _, beta = draw(23)
    one, two = (form(q, k, v, constant(0.0, k), beta, variant=v_)[0] for v_ in VARIANTS)
    torch.testing.assert_close(one, two, rtol=0, atol=1e-13)


def test_variants_differ_with_decay():
    x = draw(23)
    one, two = (gated_delta_recurrent(*x, variant=v)[0] for v in VARIANTS)
    assert (one - two).abs().max() > 0.1


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_without_writing_the_state_decays_by_the_product(form, variant):
    q, k, v, decay, beta = draw(37)
    _, state = form(q, k, v, decay, torch.zeros_like(beta), initial=start(), variant=variant)
    torch.testing.assert_close(state, start() * decay.sum(1).exp()[..., None, None], rtol=1e-12, atol=1e-300)
    _, kept = form(q, k, v, torch.zeros_like(decay), torch.zeros_like(beta), initial=start(), variant=variant)
    torch.testing.assert_close(kept, start(), rtol=0, atol=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_orthonormal_keys_are_recalled_with_later_decay(form, variant):
    """β = 1: reading key i after L writes returns v_i · Π_{j>i} α_j."""
    length = 7
    _, _, v, decay, beta = draw(length)
    basis = torch.linalg.qr(
        torch.randn(length, length, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ).Q
    k = basis[None, :, None].expand(2, length, 3, length)
    _, state = form(k, k, v, decay, torch.ones_like(beta), variant=variant)
    read = torch.einsum("bhvk,blhk->blhv", state, k)
    later = decay.flip(1).cumsum(1).flip(1) - decay
    torch.testing.assert_close(read, v * later.exp()[..., None], rtol=0, atol=1e-13)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_against_the_matrix_formula(form, variant):
    """Every step from the formula with explicit matrices, one batch entry and head at a time."""
    q, k, v, decay, beta = draw(19, batch=1, heads=2)
    beta = 2 * beta  # negative eigenvalues too
    o, state = form(q, k, v, decay, beta, variant=variant)
    eye = torch.eye(k.shape[-1], dtype=torch.float64)
    for head in range(2):
        s = torch.zeros(v.shape[-1], k.shape[-1], dtype=torch.float64)
        for t in range(19):
            kk, b, a = k[0, t, head], beta[0, t, head], decay[0, t, head].exp()
            outer = torch.outer(kk, kk)
            s = a * s @ (eye - b * outer) if variant == "gated_delta" else s @ (a * eye - b * outer)
            s = s + b * torch.outer(v[0, t, head], kk)
            torch.testing.assert_close(o[0, t, head], s @ q[0, t, head], rtol=0, atol=1e-12)
        torch.testing.assert_close(state[0, head], s, rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------------ recurrent and chunked


@given(
    length=st.integers(1, 70),
    chunk=st.integers(1, 40),
    variant=st.sampled_from(VARIANTS),
    scale=st.floats(0.0, 20.0),
    strength=st.sampled_from([1.0, 2.0]),
)
@settings(max_examples=40, deadline=None)
def test_chunked_is_recurrent(length, chunk, variant, scale, strength):
    q, k, v, decay, beta = draw(length, seed=length)
    decay, beta = decay * scale, beta * strength
    one, s1 = gated_delta_recurrent(q, k, v, decay, beta, initial=start(), variant=variant)
    two, s2 = gated_delta_chunked(q, k, v, decay, beta, initial=start(), variant=variant, chunk=chunk)
    torch.testing.assert_close(one, two, rtol=0, atol=1e-10)
    torch.testing.assert_close(s1, s2, rtol=0, atol=1e-10)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("length, chunk", [(37, 16), (64, 32), (5, 32)])
def test_gradients_agree(variant, length, chunk):
    x = [t.requires_grad_() for t in (*draw(length), start())]
    weight = torch.randn(2, length, 3, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    found = []
    for form, extra in ((gated_delta_recurrent, {}), (gated_delta_chunked, {"chunk": chunk})):
        o, state = form(*x[:5], initial=x[5], variant=variant, **extra)
        loss = (o * weight).sum() + (state * start()).sum()
        found.append(torch.autograd.grad(loss, x))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-10)
        assert one.abs().max() > 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck(variant):
    x = draw(7, batch=1, heads=2, keys=3, values=2)
    assert_gradcheck(lambda *a: gated_delta_chunked(*a, variant=variant, chunk=3)[0], *x)


def test_float32_follows_float64_under_strong_decay():
    """log α down to −80 a step beside steps that keep all: no overflow, no loss of what is weak."""
    q, k, v, decay, beta = draw(200, seed=3)
    strong = torch.rand(decay.shape, generator=torch.Generator().manual_seed(4)) < 0.3
    decay = torch.where(strong, 40 * decay, 0.05 * decay)
    exact, _ = gated_delta_recurrent(q, k, v, decay, beta)
    x = [t.float().requires_grad_() for t in (q, k, v, decay, beta)]
    o, _ = gated_delta_chunked(*x, chunk=64)
    torch.testing.assert_close(o.double(), exact, rtol=1e-4, atol=1e-5)
    o.sum().backward()
    assert all(torch.isfinite(t.grad).all() for t in x)


def test_total_forgetting():
    """α = 0 wipes the state: what comes after does not depend on what came before."""
    q, k, v, decay, beta = draw(40)
    decay = decay.clone()
    decay[:, 20] = -torch.inf
    whole, _ = gated_delta_chunked(q, k, v, decay, beta, chunk=16)
    after, _ = gated_delta_recurrent(*(t[:, 20:] for t in (q, k, v, decay, beta)))
    torch.testing.assert_close(whole[:, 20:], after, rtol=0, atol=1e-12)


def test_repeated_keys_stay_bounded_in_float32():
    """One key written over and over, β = 1: the worst case for the triangular system."""
    k = torch.tensor([0.6, 0.8]).expand(1, 512, 1, 2)
    v = torch.randn(1, 512, 1, 3, generator=torch.Generator().manual_seed(0))
    o, _ = gated_delta_chunked(k, k, v, torch.zeros(1, 512, 1), torch.ones(1, 512, 1), chunk=64)
    torch.testing.assert_close(o, v, rtol=0, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_causality_by_gradient(form, variant):
    x = [t.requires_grad_() for t in draw(21)]
    o, _ = form(*x, variant=variant)
    o[:, 9].square().sum().backward()
    for t in x:
        assert (t.grad[:, 10:] == 0).all()
    for name, t in zip("qkvab", x, strict=True):
        assert t.grad[:, 9].abs().max() > 0 or name == "a", name
    assert x[2].grad[:, 3].abs().max() > 0


def test_pieces_with_carried_state_are_the_whole():
    x = draw(50)
    whole, last = gated_delta_chunked(*x, chunk=16)
    first, state = gated_delta_chunked(*(t[:, :21] for t in x), chunk=16)
    second, end = gated_delta_chunked(*(t[:, 21:] for t in x), chunk=16, initial=state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(end, last, rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_empty_sequence(form):
    o, state = form(*draw(0), initial=start())
    assert o.shape == (2, 0, 3, 4)
    assert torch.equal(state, start())


def test_dtypes():
    half = [t.bfloat16() for t in draw(20)]
    with torch.autocast("cpu", torch.bfloat16):
        o, state = gated_delta_chunked(*half)
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    exact, _ = gated_delta_recurrent(*(t.double() for t in half))
    torch.testing.assert_close(o.double(), exact, rtol=0.02, atol=0.02)
    assert gated_delta(*draw(20)).dtype == torch.float64


def test_saved_memory_is_linear_in_length():
    """What autograd keeps for the backward pass doubles with L."""

    def kept(length: int) -> int:
        sizes = {}

        def pack(t: Tensor) -> Tensor:
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        x = [t.requires_grad_() for t in draw(length)]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            o, _ = gated_delta_chunked(*x, chunk=32)
        assert o.requires_grad
        return sum(sizes.values())

    assert kept(2048) / kept(1024) == pytest.approx(2.0, rel=0.02)


@pytest.mark.parametrize(
    "change, name",
    [
        ({"k": torch.zeros(2, 5, 3, 4)}, "k"),
        ({"v": torch.zeros(2, 4, 3, 4)}, "v"),
        ({"log_alpha": torch.zeros(2, 5)}, "log_alpha"),
        ({"beta": torch.zeros(2, 5, 3, 1)}, "beta"),
        ({"initial": torch.zeros(2, 3, 5, 4)}, "initial"),
        ({"variant": "delta"}, "variant"),
        ({"q": torch.zeros(2, 5, 3)}, "q"),
    ],
)
def test_wrong_shapes_are_named(change, name):
    inputs = dict(zip(("q", "k", "v", "log_alpha", "beta"), draw(5), strict=True))
    for form in FORMS:
        with pytest.raises(ValueError, match=rf"^{name} "):
            form(**{**inputs, **change})


def test_chunk_is_checked():
    with pytest.raises(ValueError, match="chunk is 0"):
        gated_delta_chunked(*draw(5), chunk=0)


@pytest.mark.gpu
def test_cuda_kernels_give_the_same():
    pytest.importorskip("fla", reason="flash-linear-attention is not installed")
    x = draw(200, keys=64, values=128, heads=2)
    exact, _ = gated_delta_recurrent(*x)
    half = [t.to("cuda", torch.bfloat16) for t in x[:3]] + [t.to("cuda").float() for t in x[3:]]
    torch.testing.assert_close(gated_delta(*half).double().cpu(), exact, rtol=0.05, atol=0.05)


@pytest.mark.gpu
def test_cuda_without_kernels_gives_the_same():
    x = draw(200)
    exact, _ = gated_delta_recurrent(*x)
    found = gated_delta(*(t.to("cuda").float() for t in x))
    torch.testing.assert_close(found.double().cpu(), exact, rtol=1e-3, atol=1e-3)
