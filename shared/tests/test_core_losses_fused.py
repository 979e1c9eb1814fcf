import dataclasses

import pytest
import torch
import torch.nn.functional as F

from stillhouse.core.losses import (
    LinearHead,
    SparseTeacher,
    causal_shift,
    forward_kl,
    fused_linear_jsd,
    fused_linear_kl,
    generalized_jsd,
    reverse_kl,
    topk_kl,
)
from stillhouse.core.testing import assert_gradcheck, assert_gradient, assert_no_gradient

INF = float("inf")
ROWS, WIDTH, TEACHER_WIDTH, VOCAB = (3, 5), 8, 6, 40

FUSED = {
    "forward": (fused_linear_kl, forward_kl, {}),
    "reverse": (lambda *a, **k: fused_linear_kl(*a, direction="reverse", **k), reverse_kl, {}),
    "jsd": (fused_linear_jsd, generalized_jsd, {"beta": 0.3}),
    "jsd_0": (fused_linear_jsd, forward_kl, {}),
}


def fused(name, *args, **options):
    fn, _, extra = FUSED[name]
    extra = {"beta": 0.0} if name == "jsd_0" else extra
    return fn(*args, **extra, **options)


def naive(name, *args, **options):
    _, fn, extra = FUSED[name]
    return fn(*args, **extra, **options)


each = pytest.mark.parametrize("name", list(FUSED))


def heads(dtype=torch.float64, seed=0, bias=True, rows=ROWS, vocab=VOCAB, **options):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    student = LinearHead(
        hidden=draw(*rows, WIDTH).requires_grad_(),
        weight=draw(vocab, WIDTH).requires_grad_(),
        bias=draw(vocab).requires_grad_() if bias else None,
        **options,
    )
    teacher = LinearHead(
        hidden=draw(*rows, TEACHER_WIDTH),
        weight=draw(vocab, TEACHER_WIDTH),
        bias=draw(vocab) if bias else None,
    )
    return student, teacher


def gradients(loss, head):
    tensors = [t for t in (head.hidden, head.weight, head.bias) if t is not None]
    return torch.autograd.grad(loss, tensors, retain_graph=True)


def assert_same(ours, theirs, head, rtol=1e-9, atol=1e-12):
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)
    for a, b in zip(gradients(ours, head), gradients(theirs, head), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


# --- equal to the plain loss


@each
@pytest.mark.parametrize("rows", [1, 4, 7, 15, 100])
def test_equals_the_loss_on_logits_for_any_chunk(name, rows):
    student, teacher = heads()
    ours = fused(name, student, teacher, temperature=2.0, chunk_rows=rows)
    assert_same(ours, naive(name, student.logits(), teacher.logits(), temperature=2.0), student)


@each
def test_float32_is_within_1e_5(name):
    student, teacher = heads(torch.float32, rows=(64,), vocab=3000)
    ours = fused(name, student, teacher, chunk_rows=10)
    theirs = naive(name, student.logits(), teacher.logits())
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    for a, b in zip(gradients(ours, student), gradients(theirs, student), strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


@each
def test_scale_and_softcap(name):
    student, teacher = heads(logit_scale=0.7, softcap=3.0)
    teacher = dataclasses.replace(teacher, logit_scale=1.3, softcap=5.0)
    logits = 3.0 * torch.tanh(0.7 * F.linear(student.hidden, student.weight, student.bias) / 3.0)
    torch.testing.assert_close(student.logits(), logits)
    ours = fused(name, student, teacher, temperature=1.5, chunk_rows=4)
    assert_same(ours, naive(name, logits, teacher.logits(), temperature=1.5), student)


@each
def test_labels_mask_and_weights(name):
    student, teacher = heads()
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(VOCAB, ROWS, generator=generator).masked_fill(
        torch.rand(ROWS, generator=generator) < 0.3, -7
    )
    mask = torch.rand(ROWS, generator=generator) < 0.8
    weights = torch.rand(ROWS, generator=generator, dtype=torch.float64)
    both = mask & (labels != -7)
    assert 2 < both.sum() < 12
    options = {"labels": labels, "ignore_index": -7, "mask": mask, "chunk_rows": 2}
    rows = naive(name, student.logits(), teacher.logits(), mask=both, reduction="none")
    assert_same(fused(name, student, teacher, **options), rows.sum() / both.sum(), student)
    weighted = (rows * weights).sum()
    assert_same(fused(name, student, teacher, weights=weights, **options), weighted / both.sum(), student)
    for extra, expected in (
        ({"reduction": "sum"}, weighted),
        ({"reduction": "batch_mean"}, weighted / 3),
        ({"num_items": 50}, weighted / 50),
        ({"num_items": torch.tensor(50)}, weighted / 50),
    ):
        assert_same(fused(name, student, teacher, weights=weights, **options, **extra), expected, student)


@each
def test_teacher_logits_are_not_copied_but_equal(name):
    student, teacher = heads()
    logits = teacher.logits()
    mask = torch.rand(ROWS, generator=torch.Generator().manual_seed(1)) < 0.6
    ours = fused(name, student, logits, mask=mask, chunk_rows=3)
    assert_same(ours, naive(name, student.logits(), logits, mask=mask), student)


@each
def test_temperature_per_row(name):
    student, teacher = heads()
    temperature = torch.linspace(0.5, 3.0, 5).double()[None, :, None]
    mask = torch.rand(ROWS, generator=torch.Generator().manual_seed(1)) < 0.6
    ours = fused(name, student, teacher, temperature=temperature, mask=mask, chunk_rows=3)
    expected = naive(name, student.logits(), teacher.logits(), temperature=temperature, mask=mask)
    assert_same(ours, expected, student)


@each
def test_vocabulary_is_cut_and_renormalised(name):
    student, _ = heads(vocab=VOCAB)
    _, teacher = heads(vocab=VOCAB + 12, seed=1)
    ours = fused(name, student, teacher, vocab=33, chunk_rows=4)
    theirs = naive(name, student.logits()[..., :33], teacher.logits()[..., :33])
    assert_same(ours, theirs, student)
    assert (gradients(ours, student)[1][33:] == 0).all()
    with pytest.raises(ValueError, match="vocab="):
        fused(name, student, teacher)


def test_padded_heads_of_one_model_agree_exactly():
    """One model with 10 rows of padding in the student's head and 28 in the teacher's: cut, they agree."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(20, 8, generator=generator), torch.randn(100, 8, generator=generator)
    student = LinearHead(hidden=hidden, weight=F.pad(weight, (0, 0, 0, 10)))
    teacher = LinearHead(hidden=hidden, weight=F.pad(weight, (0, 0, 0, 28)))
    assert fused_linear_kl(student, teacher, vocab=100) == 0
    padded = F.pad(student.logits(), (0, 18), value=-INF)  # what is left is the mass of the teacher's padding
    assert reverse_kl(padded, teacher.logits()) > 1e-4


@pytest.mark.parametrize("tail", ["bucket", "renormalize", "renormalize_teacher", "truncate"])
def test_stored_top_k_teacher(tail):
    student, teacher = heads(logit_scale=0.8, softcap=10.0)
    sparse = SparseTeacher.from_logits(teacher.logits(), k=7, temperatures=(1.0, 2.0))
    mask = torch.rand(ROWS, generator=torch.Generator().manual_seed(1)) < 0.6
    options = {"temperature": 2.0, "tail": tail, "mask": mask}
    ours = fused_linear_kl(student, sparse, chunk_rows=4, **options)
    assert_same(ours, topk_kl(student.logits(), sparse, **options), student)


def test_sampled_teacher():
    student, teacher = heads()
    sparse = SparseTeacher.sample(teacher.logits(), draws=9, generator=torch.Generator().manual_seed(0))
    ours = fused_linear_kl(student, sparse, sampler="importance", chunk_rows=4)
    assert_same(ours, topk_kl(student.logits(), sparse, sampler="importance"), student)


def test_sequence_end_to_end():
    """Shift the hidden states, drop the prompt before the head."""
    student, teacher = heads()
    labels = torch.full(ROWS, -100)
    labels[:, 3:] = 4
    hidden, targets, mask = causal_shift(student.hidden, labels)
    teacher_hidden, _, _ = causal_shift(teacher.hidden, labels)
    ours = fused_linear_kl(
        dataclasses.replace(student, hidden=hidden),
        dataclasses.replace(teacher, hidden=teacher_hidden),
        labels=targets,
    )
    theirs = forward_kl(student.logits()[:, :-1], teacher.logits()[:, :-1], mask=mask)
    assert_same(ours, theirs, student)


# --- gradients


@each
def test_gradcheck(name):
    student, teacher = heads(rows=(3,), vocab=7, logit_scale=0.9, softcap=4.0)

    def loss(hidden, weight, bias):
        head = dataclasses.replace(student, hidden=hidden, weight=weight, bias=bias)
        return fused(name, head, teacher, temperature=1.5, chunk_rows=2)

    assert_gradcheck(loss, student.hidden, student.weight, student.bias)


def test_gradcheck_with_a_stored_teacher():
    student, teacher = heads(rows=(3,), vocab=7)
    sparse = SparseTeacher.from_logits(teacher.logits(), k=3)

    def loss(hidden, weight, bias):
        head = dataclasses.replace(student, hidden=hidden, weight=weight, bias=bias)
        return fused_linear_kl(head, sparse, chunk_rows=2)

    assert_gradcheck(loss, student.hidden, student.weight, student.bias)


def test_gradient_goes_where_it_is_wanted():
    student, teacher = heads()
    for tensor in (teacher.hidden, teacher.weight, teacher.bias):
        tensor.requires_grad_()
    loss = fused_linear_kl(student, teacher)
    assert_no_gradient(loss, [teacher.hidden, teacher.weight, teacher.bias])
    assert_gradient(loss, [student.hidden, student.weight, student.bias])
    frozen = dataclasses.replace(student, weight=student.weight.detach(), bias=None)
    loss = fused_linear_kl(frozen, teacher)
    assert_gradient(loss, student.hidden)
    assert_no_gradient(loss, student.weight)
    with torch.no_grad():
        value = fused_linear_kl(student, teacher)
    assert not value.requires_grad
    assert value == fused_linear_kl(student, teacher)


def test_gradient_can_be_read_twice_and_scales():
    student, teacher = heads()
    loss = fused_linear_kl(student, teacher)
    first = torch.autograd.grad(loss, student.weight, retain_graph=True)[0]
    kept = first.clone()
    torch.testing.assert_close(torch.autograd.grad(3 * loss, student.weight, retain_graph=True)[0], 3 * first)
    assert torch.equal(torch.autograd.grad(loss, student.weight)[0], kept)
    assert torch.equal(first, kept)  # what was given away is not touched again
    loss = fused_linear_kl(student, teacher)
    (2 * loss).backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(student.weight.grad, 3 * kept)
    loss = fused_linear_kl(student, teacher.logits())
    for _ in range(2):
        torch.testing.assert_close(gradients(loss, student)[1], kept)
    loss = fused_linear_kl(student, teacher)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, student.hidden, create_graph=True)


# --- numerics


@each
def test_bfloat16_head(name):
    student, teacher = heads(torch.bfloat16, rows=(32,), vocab=200)
    loss = fused(name, student, teacher, temperature=2.0, chunk_rows=5)
    assert loss.dtype == torch.float32
    plain = naive(name, student.logits(), teacher.logits(), temperature=2.0)
    torch.testing.assert_close(loss, plain, rtol=2e-3, atol=1e-5)
    exact_student, exact_teacher = (
        LinearHead(
            **{f: getattr(h, f).detach().double().requires_grad_() for f in ("hidden", "weight", "bias")}
        )
        for h in (student, teacher)
    )
    exact = fused(name, exact_student, exact_teacher, temperature=2.0)
    torch.testing.assert_close(loss.double(), exact, rtol=2e-2, atol=0)
    for ours, theirs in zip(gradients(loss, student), gradients(exact, exact_student), strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours.double() - theirs).norm() < 2e-2 * theirs.norm()


def test_weight_gradient_is_accumulated_in_float32():
    """512 chunks of one row: accumulated in bfloat16 the small addends would be lost."""
    student, teacher = heads(torch.bfloat16, rows=(512,), vocab=16, bias=False)
    one = fused_linear_kl(student, teacher, chunk_rows=512)
    many = fused_linear_kl(student, teacher, chunk_rows=1)
    a, b = (torch.autograd.grad(x, student.weight)[0].double() for x in (one, many))
    assert (a - b).norm() < 5e-3 * a.norm()


def test_autocast_runs_the_products_in_bfloat16_and_the_loss_in_float32():
    student, teacher = heads(torch.float32, rows=(16,), vocab=100, bias=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = fused_linear_kl(student, teacher)
        plain = forward_kl(student.logits(), teacher.logits())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, plain, rtol=1e-2, atol=0)
    assert loss != fused_linear_kl(student, teacher)
    by_hidden, by_weight = gradients(loss, student)
    assert by_hidden.dtype == by_weight.dtype == torch.float32
    exact = gradients(fused_linear_kl(student, teacher), student)
    assert (by_weight - exact[1]).norm() < 2e-2 * exact[1].norm()


@each
def test_no_row_counts(name):
    student, teacher = heads()
    loss = fused(name, student, teacher, labels=torch.full(ROWS, -100))
    assert loss == 0
    for gradient in gradients(loss, student):
        assert (gradient == 0).all()


@each
def test_masked_rows_may_hold_anything(name):
    student, teacher = heads()
    mask = torch.ones(ROWS, dtype=torch.bool)
    mask[0, 2] = mask[2, 4] = False
    spoilt = student.hidden.detach().clone()
    spoilt[~mask] = float("nan")
    head = dataclasses.replace(student, hidden=spoilt.requires_grad_())
    loss = fused(name, head, teacher, mask=mask)
    torch.testing.assert_close(loss, fused(name, student, teacher, mask=mask))
    for gradient in gradients(loss, head):
        assert gradient.isfinite().all()


@each
def test_low_temperature_and_forbidden_tokens(name):
    student, teacher = heads(torch.float32)
    for head in (student, teacher):
        head.bias.data[:3] = -INF
    for temperature in (0.02, 1.0):
        loss = fused(name, student, teacher, temperature=temperature)
        assert loss.isfinite()
        for gradient in gradients(loss, student):
            assert gradient.isfinite().all()


def test_infinite_row_of_weight_zero_does_not_count():
    student, teacher = heads(torch.float32)
    student.bias.data[:3] = -INF
    weights = torch.zeros(ROWS)
    assert fused_linear_kl(student, teacher, weights=weights) == 0
    weights[0, 0] = 1.0
    assert fused_linear_kl(student, teacher, weights=weights) == INF


def test_t2_switch():
    student, teacher = heads()
    scaled = fused_linear_kl(student, teacher, temperature=4.0)
    plain = fused_linear_kl(student, teacher, temperature=4.0, scale_t2=False)
    torch.testing.assert_close(scaled, 16 * plain, rtol=1e-14, atol=0)


def test_default_chunk_is_bounded_by_bytes():
    student, teacher = heads(torch.float32, rows=(50,), vocab=1000)
    expected = fused_linear_kl(student, teacher, chunk_rows=50)
    for chunk_bytes in (1, 8_000, 100_000):
        torch.testing.assert_close(fused_linear_kl(student, teacher, chunk_bytes=chunk_bytes), expected)


# --- arguments


def test_wrong_arguments():
    student, teacher = heads()
    sparse = SparseTeacher.from_logits(teacher.logits(), k=3)
    for message, call in {
        "reduction='none'": lambda: fused_linear_kl(student, teacher, reduction="none"),
        "direction='up'": lambda: fused_linear_kl(student, teacher, direction="up"),
        "forward direction only": lambda: fused_linear_kl(student, sparse, direction="reverse"),
        "one temperature": lambda: fused_linear_kl(student, sparse, temperature=torch.ones(5, 1)),
        "is not stored": lambda: fused_linear_kl(student, sparse, temperature=3.0),
        "normalised over": lambda: fused_linear_kl(student, sparse, vocab=30),
        "vocab=41": lambda: fused_linear_kl(student, teacher, vocab=41),
        "labels have shape": lambda: fused_linear_kl(student, teacher, labels=torch.zeros(3, 4)),
        "weights have shape": lambda: fused_linear_kl(student, teacher, weights=torch.ones(3)),
        "the teacher has rows": lambda: fused_linear_kl(student, teacher.logits()[:2]),
        "give temperature no gradient": lambda: fused_linear_kl(
            student, teacher, temperature=torch.ones(5, 1, requires_grad=True)
        ),
        "beta=2": lambda: fused_linear_jsd(student, teacher, beta=2.0),
        "chunk_rows=0": lambda: fused_linear_kl(student, teacher, chunk_rows=0),
        "chunk_bytes=0": lambda: fused_linear_kl(student, teacher, chunk_bytes=0),
        "softcap=0": lambda: dataclasses.replace(student, softcap=0.0),
        "bias has shape": lambda: dataclasses.replace(student, bias=torch.zeros(3)),
        "must be": lambda: dataclasses.replace(student, weight=torch.zeros(40, 3, dtype=torch.float64)),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="cast one"):
        dataclasses.replace(student, weight=student.weight.float())
    with pytest.raises(TypeError, match="student must be a LinearHead"):
        fused_linear_kl(student.logits(), teacher)


@pytest.mark.oracle
def test_liger_fused_jsd():
    chunked = pytest.importorskip("liger_kernel.chunked_loss")
    student, teacher = heads(torch.float32, rows=(37,), vocab=60)
    labels = torch.arange(37).masked_fill(torch.arange(37) % 3 == 0, -100)
    for beta in (0.0, 0.3, 1.0):
        loss = chunked.LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0,
            weight_soft_loss=1.0,
            beta=beta,
            temperature=2.0,
            compiled=False,
            chunk_size=8,
        )
        theirs = loss(
            student.hidden, student.weight, teacher.hidden, teacher.weight, labels, student.bias, teacher.bias
        )
        ours = fused_linear_jsd(student, teacher, beta=beta, temperature=2.0, labels=labels, scale_t2=False)
        assert_same(ours, theirs, student, rtol=1e-4, atol=1e-6)
