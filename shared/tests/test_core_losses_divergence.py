import math
from functools import partial

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from scipy.special import rel_entr

from stillhouse.core.losses import (
    _closed_form,
    _forms,
    alpha_divergence,
    forward_kl,
    generalized_jsd,
    kd_loss,
    logit_mse,
    reduce,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    soft_cross_entropy,
    tvd,
)
from stillhouse.core.testing import assert_gradcheck, assert_gradient, assert_no_gradient

DIVERGENCES = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd_0.5": partial(generalized_jsd, beta=0.5),
    "jsd_0.1": partial(generalized_jsd, beta=0.1),
    "skew_forward": partial(skew_forward_kl, alpha=0.1),
    "skew_reverse": partial(skew_reverse_kl, alpha=0.1),
    "tvd": tvd,
    "alpha_0.3": partial(alpha_divergence, alpha=0.3),
}
FORMS = {
    "forward": _forms.ForwardKL(),
    "cross_entropy": _forms.ForwardKL(entropy=False),
    "reverse": _forms.ReverseKL(),
    "jsd": _forms.JensenShannon(0.3),
    "skew_forward": _forms.SkewForwardKL(0.1),
    "skew_forward_ce": _forms.SkewForwardKL(0.1, entropy=False),
    "skew_reverse": _forms.SkewReverseKL(0.1),
    "tvd": _forms.TotalVariation(),
    "alpha": _forms.AlphaDivergence(0.3),
}
each = pytest.mark.parametrize("loss", list(DIVERGENCES.values()), ids=list(DIVERGENCES))
fast = settings(max_examples=15, deadline=None)
INF = float("inf")


def pair(*shape, scale=1.5, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        scale * torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for _ in "st"
    )


@st.composite
def logit_pairs(draw, rows=4, classes=7):
    shape = (draw(st.integers(1, rows)), draw(st.integers(2, classes)))
    finite = st.floats(-20, 20, width=32)
    return tuple(torch.from_numpy(draw(hnp.arrays(np.float64, shape, elements=finite))) for _ in "st")


def grad_of(fn, student):
    student = student.detach().clone().requires_grad_()
    return torch.autograd.grad(fn(student), student)[0]


# --- values against independent implementations


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_kl_agrees_with_scipy_and_torch(temperature):
    student, teacher = pair(5, 11)
    q, p = (F.softmax(x / temperature, -1).numpy() for x in (student, teacher))
    t2 = temperature**2
    rows = forward_kl(student, teacher, temperature=temperature, reduction="none").numpy()
    np.testing.assert_allclose(rows, t2 * rel_entr(p, q).sum(-1), rtol=1e-10)
    rows = reverse_kl(student, teacher, temperature=temperature, reduction="none").numpy()
    np.testing.assert_allclose(rows, t2 * rel_entr(q, p).sum(-1), rtol=1e-10)
    log_q, log_p = (F.log_softmax(x / temperature, -1) for x in (student, teacher))
    expected = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean") * t2
    torch.testing.assert_close(forward_kl(student, teacher, temperature=temperature), expected)
    assert kd_loss is forward_kl


def test_jsd_agrees_with_scipy():
    student, teacher = pair(6, 9)
    q, p = (F.softmax(x, -1).numpy() for x in (student, teacher))
    rows = generalized_jsd(student, teacher, reduction="none").numpy()
    np.testing.assert_allclose(rows, jensenshannon(p, q, axis=-1) ** 2, rtol=1e-9)


def test_the_others_agree_with_their_formulas():
    student, teacher = pair(6, 9)
    q, p = (F.softmax(x, -1).numpy() for x in (student, teacher))
    both = {"reduction": "none"}
    np.testing.assert_allclose(tvd(student, teacher, **both), 0.5 * np.abs(p - q).sum(-1))
    np.testing.assert_allclose(
        skew_forward_kl(student, teacher, alpha=0.2, **both), rel_entr(p, 0.2 * p + 0.8 * q).sum(-1)
    )
    np.testing.assert_allclose(
        skew_reverse_kl(student, teacher, alpha=0.2, **both), rel_entr(q, 0.8 * p + 0.2 * q).sum(-1)
    )
    expected = (1 - (p**0.3 * q**0.7).sum(-1)) / (0.3 * 0.7)
    np.testing.assert_allclose(alpha_divergence(student, teacher, alpha=0.3, **both), expected, rtol=1e-9)
    np.testing.assert_allclose(
        alpha_divergence(student, teacher, alpha=0.5, **both), 2 * ((p**0.5 - q**0.5) ** 2).sum(-1), rtol=1e-9
    )


def test_reference_forms_of_distillm():
    student, teacher = pair(5, 8)
    q, p = (F.softmax(x, -1) for x in (student, teacher))
    lam = 0.9  # the student's weight there
    m = (1 - lam) * p + lam * q
    expected = (lam * (q * (q / m).log()).sum(-1) + (1 - lam) * (p * (p / m).log()).sum(-1)).mean()
    torch.testing.assert_close(generalized_jsd(student, teacher, beta=lam, compat="reference"), expected)
    torch.testing.assert_close(generalized_jsd(student, teacher, beta=1 - lam), expected)
    cross = -(p * (0.1 * p + 0.9 * q).log()).sum(-1).mean()
    torch.testing.assert_close(skew_forward_kl(student, teacher, alpha=0.1, compat="reference"), cross)
    ours = grad_of(lambda s: skew_forward_kl(s, teacher, alpha=0.1), student)
    theirs = grad_of(lambda s: skew_forward_kl(s, teacher, alpha=0.1, compat="reference"), student)
    torch.testing.assert_close(ours, theirs)


# --- gradients


@pytest.mark.parametrize("form", list(FORMS.values()), ids=list(FORMS))
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_closed_form_backward_equals_autograd(form, temperature):
    student, teacher = pair(7, 11)
    weights = torch.arange(1.0, 8.0, dtype=torch.float64)
    per_row = torch.linspace(0.5, 3.0, 7, dtype=torch.float64)[:, None]
    for t in (temperature, per_row):
        ours = grad_of(
            lambda s, t=t: (_closed_form.divergence_rows(form, s, teacher, t) * weights).sum(), student
        )
        log_p = F.log_softmax(teacher / t, -1)
        auto = grad_of(
            lambda s, t=t, log_p=log_p: (form.values(F.log_softmax(s / t, -1), log_p) * weights).sum(),
            student,
        )
        torch.testing.assert_close(ours, auto, rtol=1e-11, atol=1e-13)


def test_written_out_gradients():
    """The formulas of the documentation, T² included."""
    student, teacher = pair(3, 6)
    t, beta = 2.0, 0.3
    log_q, log_p = (F.log_softmax(x / t, -1) for x in (student, teacher))
    q, p = log_q.exp(), log_p.exp()
    sums = {"temperature": t, "reduction": "sum"}
    torch.testing.assert_close(grad_of(lambda s: forward_kl(s, teacher, **sums), student), t * (q - p))
    kl = (q * (log_q - log_p)).sum(-1, keepdim=True)
    torch.testing.assert_close(
        grad_of(lambda s: reverse_kl(s, teacher, **sums), student), t * q * (log_q - log_p - kl)
    )
    log_m = (beta * p + (1 - beta) * q).log()
    inner = log_q - log_m - (q * (log_q - log_m)).sum(-1, keepdim=True)
    torch.testing.assert_close(
        grad_of(lambda s: generalized_jsd(s, teacher, beta=beta, **sums), student), t * (1 - beta) * q * inner
    )


@each
def test_gradcheck(loss):
    student, teacher = pair(3, 5)
    mask = torch.tensor([True, False, True])
    assert_gradcheck(lambda s: loss(s, teacher, temperature=1.7, mask=mask), student, second=True)


def test_second_derivative_of_forward_kl_is_the_softmax_covariance():
    student, teacher = pair(1, 5)
    hessian = torch.autograd.functional.hessian(lambda s: forward_kl(s, teacher), student)[0, :, 0]
    q = F.softmax(student[0], -1)
    torch.testing.assert_close(hessian, torch.diag(q) - torch.outer(q, q))


def test_works_under_functional_grad():
    student, teacher = pair(3, 5)
    ours = torch.func.grad(lambda s: forward_kl(s, teacher))(student)
    torch.testing.assert_close(ours, grad_of(lambda s: forward_kl(s, teacher), student))


@each
def test_temperature_can_be_learnt(loss):
    student, teacher = pair(3, 5)
    temperature = torch.tensor([[1.3], [2.0], [0.8]])
    assert_gradcheck(lambda s, t: loss(s, teacher, temperature=t), student, temperature)


@each
def test_teacher_gets_no_gradient(loss):
    student, teacher = (x.requires_grad_() for x in pair(4, 6))
    value = loss(student, teacher)
    assert_no_gradient(value, teacher)
    assert_gradient(value, student)


def test_several_teachers_have_the_gradient_of_their_mixture():
    student, first = pair(4, 6)
    second, _ = pair(4, 6, seed=1)
    separate = grad_of(lambda s: 0.3 * forward_kl(s, first) + 0.7 * forward_kl(s, second), student)
    mixture = (0.3 * F.softmax(first, -1) + 0.7 * F.softmax(second, -1)).log()
    torch.testing.assert_close(separate, grad_of(lambda s: forward_kl(s, mixture), student))


# --- properties


@each
@given(logits=logit_pairs())
@fast
def test_never_negative_and_zero_where_equal(loss, logits):
    student, teacher = logits
    assert (loss(student, teacher, reduction="none") >= -1e-12).all()
    assert loss(student, student).abs() < 1e-12


@each
@given(logits=logit_pairs())
@fast
def test_positive_where_the_distributions_differ(loss, logits):
    student, teacher = logits
    distance = (F.softmax(student, -1) - F.softmax(teacher, -1)).abs().amax(-1)
    assert (loss(student, teacher, reduction="none")[distance > 1e-3] > 1e-9).all()


@each
@given(logits=logit_pairs(), shift=st.floats(-50, 50), seed=st.integers(0, 99))
@fast
def test_invariant_to_shifts_and_permutations(loss, logits, shift, seed):
    student, teacher = logits
    value = loss(student, teacher, temperature=2.0)
    torch.testing.assert_close(
        loss(student + shift, teacher - shift, temperature=2.0), value, rtol=1e-7, atol=1e-10
    )
    order = torch.randperm(student.shape[1], generator=torch.Generator().manual_seed(seed))
    moved = loss(student[:, order], teacher[:, order], temperature=2.0)
    torch.testing.assert_close(moved, value, rtol=1e-7, atol=1e-10)
    gradient = grad_of(lambda s: loss(s, teacher), student)[:, order]
    torch.testing.assert_close(
        grad_of(lambda s: loss(s, teacher[:, order]), student[:, order]), gradient, rtol=1e-6, atol=1e-10
    )


@each
@given(logits=logit_pairs(rows=6), data=st.data())
@fast
def test_mask_is_row_removal(loss, logits, data):
    student, teacher = logits
    rows = student.shape[0]
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows)))
    spoilt = student.masked_fill(~mask[:, None], float("nan"))
    value = loss(spoilt, teacher, mask=mask, temperature=1.5)
    expected = (
        loss(student[mask], teacher[mask], temperature=1.5) if mask.any() else torch.tensor(0.0).double()
    )
    torch.testing.assert_close(value, expected)
    gradient = grad_of(lambda s: loss(s, teacher, mask=mask, temperature=1.5), spoilt)
    assert gradient.isfinite().all()
    assert (gradient[~mask] == 0).all()


@given(logits=logit_pairs())
@fast
def test_inequalities_between_divergences(logits):
    student, teacher = logits
    none = {"reduction": "none"}
    jsd, total = generalized_jsd(student, teacher, **none), tvd(student, teacher, **none)
    assert (jsd <= math.log(2) + 1e-12).all()
    for kl in (forward_kl(student, teacher, **none), reverse_kl(student, teacher, **none)):
        assert (total <= (kl / 2).clamp_min(0).sqrt() + 1e-9).all()  # Pinsker
    assert (skew_forward_kl(student, teacher, alpha=0.1, **none) <= -math.log(0.1) + 1e-12).all()
    assert (skew_reverse_kl(student, teacher, alpha=0.1, **none) <= -math.log(0.1) + 1e-12).all()
    beta = 0.3
    mixture = beta * skew_forward_kl(student, teacher, alpha=beta) + (1 - beta) * skew_reverse_kl(
        student, teacher, alpha=1 - beta
    )
    torch.testing.assert_close(generalized_jsd(student, teacher, beta=beta), mixture, rtol=1e-7, atol=1e-12)


@each
@pytest.mark.parametrize("elements", [1, 13, 64, 10**6])
def test_block_size_changes_nothing(loss, elements, monkeypatch):
    student, teacher = pair(9, 13, dtype=torch.float32)
    value, gradient = loss(student, teacher), grad_of(lambda s: loss(s, teacher), student)
    monkeypatch.setattr(_closed_form, "_BLOCK_ELEMENTS", {"cpu": elements})
    torch.testing.assert_close(loss(student, teacher), value, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(grad_of(lambda s: loss(s, teacher), student), gradient, rtol=1e-6, atol=1e-8)


# --- limits


@each
def test_t2_switch_is_exactly_t_squared(loss):
    student, teacher = pair(5, 9)
    with_factor = loss(student, teacher, temperature=4.0)
    assert float(with_factor / loss(student, teacher, temperature=4.0, scale_t2=False)) == 16.0


def test_high_temperature_limit():
    student, teacher = pair(64, 10, scale=1.0)
    limit = logit_mse(student, teacher) / 2
    relative = (forward_kl(student, teacher, temperature=1e3) / limit - 1).abs()
    assert relative < 6e-4
    coarse = (forward_kl(student, teacher, temperature=1e2) / limit - 1).abs()
    assert relative < 0.2 * coarse  # first order in 1/T


def test_jsd_over_beta_tends_to_the_two_kls():
    student, teacher = pair(200, 10, scale=1.0)
    kl = forward_kl(student, teacher)
    gaps = {b: float((generalized_jsd(student, teacher, beta=b) / b - kl).abs()) for b in (1e-3, 1e-5)}
    assert gaps[1e-3] < 4e-3
    assert gaps[1e-5] < 4e-5
    assert gaps[1e-3] / gaps[1e-5] == pytest.approx(100, rel=0.02)
    reverse = generalized_jsd(student, teacher, beta=1 - 1e-5) / 1e-5
    assert float((reverse - reverse_kl(student, teacher)).abs()) < 4e-5


def test_special_cases_and_continuity_at_the_ends():
    student, teacher = pair(5, 9)
    forward, reverse = forward_kl(student, teacher), reverse_kl(student, teacher)
    assert generalized_jsd(student, teacher, beta=0.0) == forward
    assert generalized_jsd(student, teacher, beta=1.0) == reverse
    assert skew_forward_kl(student, teacher, alpha=0.0) == forward
    assert skew_reverse_kl(student, teacher, alpha=0.0) == reverse
    assert alpha_divergence(student, teacher, alpha=1.0) == forward
    assert alpha_divergence(student, teacher, alpha=0.0) == reverse
    torch.testing.assert_close(alpha_divergence(student, teacher, alpha=1 - 1e-6), forward, rtol=1e-4, atol=0)
    torch.testing.assert_close(alpha_divergence(student, teacher, alpha=1e-6), reverse, rtol=1e-4, atol=0)
    torch.testing.assert_close(skew_forward_kl(student, teacher, alpha=1e-7), forward, rtol=1e-5, atol=0)


# --- numerics


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [0.02, 0.05])
def test_low_temperature_has_finite_gradients(loss, dtype, temperature):
    student, teacher = pair(8, 32, scale=3.0, dtype=dtype)
    value = loss(student, teacher, temperature=temperature)
    assert value.isfinite()
    assert grad_of(lambda s: loss(s, teacher, temperature=temperature), student).isfinite().all()


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forbidden_classes_on_both_sides_are_as_if_absent(loss, dtype):
    student, teacher = pair(4, 6, dtype=dtype)
    wall = torch.full((4, 3), -INF, dtype=dtype)
    wide = torch.cat((student, wall), -1), torch.cat((teacher, wall), -1)
    torch.testing.assert_close(loss(*wide), loss(student, teacher))
    gradient = grad_of(lambda s: loss(s, wide[1]), wide[0])
    torch.testing.assert_close(gradient[:, :6], grad_of(lambda s: loss(s, teacher), student))
    assert (gradient[:, 6:] == 0).all()
    log = [F.log_softmax(x.float(), -1) for x in wide]
    assert grad_of(lambda s: loss(s, log[1], log_input=True), log[0]).isfinite().all()


@each
def test_one_hot_teacher(loss):
    student, _ = pair(3, 4, dtype=torch.float32)
    teacher = torch.full((3, 4), -INF).scatter_(1, torch.tensor([[1], [0], [3]]), 0.0)
    value = loss(student, teacher, reduction="none")
    gradient = grad_of(lambda s: loss(s, teacher, reduction="sum"), student)
    assert gradient.isfinite().all()
    if loss is reverse_kl:  # the student has mass where the teacher has none
        assert (value == INF).all()
        assert (gradient == 0).all()
    else:
        assert value.isfinite().all()
        assert (gradient.gather(1, torch.tensor([[1], [0], [3]])) < 0).all()


def test_mismatched_supports_are_infinite_with_a_defined_gradient():
    student, teacher = torch.tensor([[0.0, 1.0, -INF]]), torch.tensor([[1.0, 0.0, 2.0]])
    assert forward_kl(student, teacher) == INF
    q, p = F.softmax(student, -1), F.softmax(teacher, -1)
    torch.testing.assert_close(grad_of(lambda s: forward_kl(s, teacher), student), q - p)
    assert reverse_kl(student, teacher).isfinite()
    assert reverse_kl(teacher, student) == INF
    assert (grad_of(lambda s: reverse_kl(s, student), teacher) == 0).all()
    log = [F.log_softmax(x, -1) for x in (student, teacher)]
    assert reverse_kl(log[1], log[0], log_input=True) == INF
    assert grad_of(lambda s: reverse_kl(s, log[0], log_input=True), log[1]).isfinite().all()
    for loss in (generalized_jsd, skew_forward_kl, skew_reverse_kl, tvd, alpha_divergence):
        for s, t in ((student, teacher), (teacher, student)):
            assert loss(s, t).isfinite()
            assert grad_of(lambda s, t=t, loss=loss: loss(s, t), s).isfinite().all()


@each
@pytest.mark.parametrize("reduction", ["token_mean", "sum", "batch_mean"])
def test_no_row_counts(loss, reduction):
    student, teacher = pair(2, 3, 5)
    student.requires_grad_()
    value = loss(student, teacher, mask=torch.zeros(2, 3, dtype=torch.bool), reduction=reduction)
    assert value == 0
    value.backward()
    assert (student.grad == 0).all()


@each
def test_bfloat16_is_computed_in_float32(loss):
    student, teacher = pair(4, 50, dtype=torch.bfloat16)
    value = loss(student, teacher, temperature=2.0)
    assert value.dtype == torch.float32
    torch.testing.assert_close(
        value, loss(student.float(), teacher.float(), temperature=2.0), rtol=1e-6, atol=0
    )
    wide = loss(student.double(), teacher.double(), temperature=2.0)
    torch.testing.assert_close(value.double(), wide, rtol=1e-4, atol=1e-7)
    gradient = grad_of(lambda s: loss(s, teacher, temperature=2.0), student)
    assert gradient.dtype == torch.bfloat16
    exact = grad_of(lambda s: loss(s, teacher.float(), temperature=2.0), student.float())
    torch.testing.assert_close(gradient.float(), exact, rtol=1e-2, atol=1e-6)


@each
def test_autocast_changes_nothing(loss):
    student, teacher = pair(4, 50, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(student, teacher)
        gradient = grad_of(lambda s: loss(s, teacher), student)
    assert value.dtype == torch.float32
    assert value == loss(student, teacher)
    assert torch.equal(gradient, grad_of(lambda s: loss(s, teacher), student))


def test_small_kl_keeps_its_precision_in_float32():
    student, teacher = pair(64, 1000, scale=1.0, dtype=torch.float32)
    exact = forward_kl(student.double(), teacher.double())
    assert float((forward_kl(student, teacher).double() / exact - 1).abs()) < 1e-6


# --- arguments


def test_reductions_and_global_count():
    student, teacher = pair(2, 4, 6)
    mask = torch.tensor([[True, True, False, True], [True, False, False, False]])
    rows = forward_kl(student, teacher, mask=mask, reduction="none")
    assert rows.shape == (2, 4)
    assert (rows[~mask] == 0).all()
    torch.testing.assert_close(forward_kl(student, teacher, mask=mask), rows.sum() / 4)
    torch.testing.assert_close(forward_kl(student, teacher, mask=mask, reduction="sum"), rows.sum())
    torch.testing.assert_close(
        forward_kl(student, teacher, mask=mask, reduction="batch_mean"), rows.sum() / 2
    )
    parts = [
        forward_kl(student[i : i + 1], teacher[i : i + 1], mask=mask[i : i + 1], num_items=n)
        for i, n in ((0, 4), (1, torch.tensor(4)))
    ]
    torch.testing.assert_close(sum(parts), forward_kl(student, teacher, mask=mask))


def test_gradient_of_unreduced_rows():
    student, teacher = pair(2, 4, 6)
    mask = torch.rand(2, 4, generator=torch.Generator().manual_seed(0)) > 0.4
    weights = torch.arange(8.0, dtype=torch.float64).reshape(2, 4)
    assert_gradcheck(lambda s: (forward_kl(s, teacher, mask=mask, reduction="none") * weights).sum(), student)


def test_temperature_per_row():
    student, teacher = pair(2, 3, 6)
    temperature = torch.tensor([1.0, 2.0, 0.5]).reshape(1, 3, 1)
    mask = torch.tensor([[True, True, False], [False, True, True]])
    rows = forward_kl(student, teacher, temperature=temperature, mask=mask, reduction="none")
    for i, j in mask.nonzero().tolist():
        single = forward_kl(student[i, j], teacher[i, j], temperature=float(temperature[0, j]))
        torch.testing.assert_close(rows[i, j], single)
    assert forward_kl(student, teacher, temperature=torch.tensor(2.0)) == forward_kl(
        student, teacher, temperature=2.0
    )


@each
def test_log_probabilities_as_input(loss):
    student, teacher = pair(4, 6)
    log_q, log_p = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
    torch.testing.assert_close(loss(log_q, log_p, log_input=True), loss(student, teacher))
    with pytest.raises(ValueError, match="log_input=True"):
        loss(log_q, log_p, log_input=True, temperature=2.0)


def test_one_dimensional_logits():
    student, teacher = pair(6)
    torch.testing.assert_close(forward_kl(student, teacher), forward_kl(student[None], teacher[None]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": torch.ones(3)}, r"temperature\[..., None\]"),
        ({"temperature": torch.ones(4, 1)}, "does not fit rows"),
        ({"temperature": -torch.ones(3, 1)}, "must be > 0"),
        ({"mask": torch.ones(2, dtype=torch.bool)}, "mask has shape"),
        ({"reduction": "mean"}, "allowed: none, token_mean, sum, batch_mean"),
        ({"reduction": "sum", "num_items": 3}, "num_items"),
        ({"num_items": -1}, "num_items=-1"),
    ],
)
def test_wrong_arguments(change, message):
    student, teacher = pair(3, 5)
    with pytest.raises(ValueError, match=message):
        forward_kl(student, teacher, **change)


def test_wrong_shapes_and_types():
    student, teacher = pair(3, 5)
    with pytest.raises(ValueError, match="shared real vocabulary"):
        forward_kl(student, teacher[:, :4])
    with pytest.raises(ValueError, match="must be equal"):
        forward_kl(student, teacher[:2])
    with pytest.raises(TypeError, match="floating-point"):
        forward_kl(student.long(), teacher)
    with pytest.raises(TypeError, match="mask must be a bool"):
        forward_kl(student, teacher, mask=torch.ones(3))
    for loss, wrong in (
        (generalized_jsd, {"beta": 1.5}),
        (skew_forward_kl, {"alpha": 1.0}),
        (skew_reverse_kl, {"alpha": -0.1}),
        (alpha_divergence, {"alpha": 2.0}),
        (generalized_jsd, {"compat": "trl"}),
        (generalized_jsd, {"beta": 1.0, "compat": "reference"}),
    ):
        with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
            loss(student, teacher, **wrong)


def test_reduce_alone():
    values = torch.tensor([1.0, 2.0, 6.0], requires_grad=True)
    mask = torch.tensor([True, False, True])
    assert reduce(values, mask=mask) == 3.5
    assert reduce(values, mask=mask, num_items=torch.tensor(14)) == 0.5
    assert reduce(values, mask=torch.zeros(3, dtype=torch.bool)).requires_grad


# --- peers


@pytest.mark.oracle
def test_torchdistill_kd_loss():
    mid_level = pytest.importorskip("torchdistill.losses.mid_level")
    student, teacher = pair(6, 10, dtype=torch.float32)
    io = [{"path": {"output": x}} for x in (student, teacher)]
    raw = mid_level.KDLoss("path", "output", "path", "output", temperature=4.0, alpha=0)(*io, targets=None)
    torch.testing.assert_close(forward_kl(student, teacher, temperature=4.0, scale_t2=False), raw)
    targets = torch.arange(6)
    scaled = mid_level.KDLoss("path", "output", "path", "output", temperature=4.0, alpha=0.4)(
        *io, targets=targets
    )
    ours = 0.4 * F.cross_entropy(student, targets) + 0.6 * forward_kl(student, teacher, temperature=4.0)
    torch.testing.assert_close(ours, scaled)
    assert float(forward_kl(student, teacher, temperature=4.0) / raw) == pytest.approx(16.0, rel=1e-5)


@pytest.mark.oracle
def test_trl_generalized_jsd():
    gkd = pytest.importorskip("trl.experimental.gkd")
    student, teacher = pair(2, 5, 20, dtype=torch.float32)
    labels = torch.zeros(2, 5, dtype=torch.long).masked_fill(torch.eye(2, 5, dtype=torch.bool), -100)
    for beta in (0.0, 0.3, 1.0):
        theirs = gkd.GKDTrainer.generalized_jsd_loss(
            student, teacher, labels=labels, beta=beta, temperature=2.0
        )
        ours = generalized_jsd(
            student, teacher, beta=beta, temperature=2.0, mask=labels != -100, scale_t2=False
        )
        torch.testing.assert_close(ours, theirs)


def test_cross_entropy_and_kl_differ_by_the_entropy():
    student, teacher = pair(4, 6)
    entropy = torch.distributions.Categorical(logits=teacher).entropy().mean()
    torch.testing.assert_close(soft_cross_entropy(student, teacher) - forward_kl(student, teacher), entropy)
    torch.testing.assert_close(
        grad_of(lambda s: soft_cross_entropy(s, teacher), student),
        grad_of(lambda s: forward_kl(s, teacher), student),
    )
