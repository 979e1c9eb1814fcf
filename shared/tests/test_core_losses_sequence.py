import pytest
import torch
import torch.nn.functional as F

from stillhouse.core.losses import causal_shift, forward_kl, on_policy_kl, reverse_kl
from stillhouse.core.testing import assert_gradcheck, assert_no_gradient

INF = float("inf")
SAMPLED = ("k1", "k2", "k3")


def distributions(vocab=6, rows=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (
        1.5 * torch.randn(rows, vocab, generator=generator, dtype=torch.float64) for _ in "st"
    )
    return student, teacher


def expected_gradient(student, teacher, **options):
    """E_{y~q} of the gradient of the estimator at token y, by enumeration of the vocabulary."""
    total = torch.zeros_like(student)
    q = F.softmax(student, -1)
    for y in range(student.shape[-1]):
        leaf = student.clone().requires_grad_()
        log_q = F.log_softmax(leaf, -1)[:, y]
        loss = on_policy_kl(log_q, F.log_softmax(teacher, -1)[:, y], reduction="sum", **options)
        total += q[:, y, None] * torch.autograd.grad(loss, leaf)[0]
    return total


def expected_value(student, teacher, estimator, **options):
    log_q, log_p = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
    values = on_policy_kl(log_q, log_p, estimator=estimator, reduction="none", **options)
    return (log_q.exp() * values).sum(-1)


def gradient_of(loss, student, teacher):
    leaf = student.clone().requires_grad_()
    return torch.autograd.grad(loss(leaf, teacher, reduction="sum"), leaf)[0]


# --- the causal shift


def test_planted_mask_counts_exactly_the_response():
    prompt, response, length = 3, 4, 9  # the rest is padding
    labels = torch.full((1, length), -100)
    labels[0, prompt : prompt + response] = torch.arange(response)
    logits = torch.arange(length, dtype=torch.float32)[None, :, None].expand(1, length, 2)
    shifted, targets, mask = causal_shift(logits, labels)
    assert mask.sum() == response
    assert targets[mask].tolist() == [0, 1, 2, 3]
    # token `prompt` is predicted at position prompt − 1
    assert shifted[mask][:, 0].tolist() == [2.0, 3.0, 4.0, 5.0]
    assert shifted.data_ptr() == logits.data_ptr()


def test_shift_makes_the_loss_ignore_everything_else():
    labels = torch.tensor([[-100, -100, 5, 6, -100]])
    student, teacher = (torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    student.requires_grad_()
    z_s, _, mask = causal_shift(student, labels)
    z_t, _, _ = causal_shift(teacher, labels)
    loss = forward_kl(z_s, z_t, mask=mask)
    torch.testing.assert_close(loss, forward_kl(student[:, 1:3], teacher[:, 1:3]))
    loss.backward()
    assert (student.grad.abs().sum(-1)[0] > 0).tolist() == [False, True, True, False, False]


def test_shift_arguments():
    for logits, labels in (
        (torch.zeros(2, 4, 3), torch.zeros(2, 3, dtype=torch.long)),
        (torch.zeros(4, 3), torch.zeros(2, 4, dtype=torch.long)),
    ):
        with pytest.raises(ValueError, match="before any shift"):
            causal_shift(logits, labels)
    with pytest.raises(ValueError, match="L = 0"):
        causal_shift(torch.zeros(2, 0, 3), torch.zeros(2, 0, dtype=torch.long))
    shifted, _, mask = causal_shift(torch.zeros(2, 1, 3), torch.zeros(2, 1, dtype=torch.long))
    assert shifted.shape == (2, 0, 3)
    assert mask.shape == (2, 0)


# --- values and gradients of the estimators, by enumeration


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_value_is_unbiased(estimator):
    student, teacher = distributions()
    torch.testing.assert_close(
        expected_value(student, teacher, estimator), reverse_kl(student, teacher)[None]
    )


def test_k2_is_biased_by_a_term_of_third_order():
    student, teacher = distributions()

    def relative_bias(size):
        near = student + size * (teacher - student)
        exact = reverse_kl(student, near)
        return float((expected_value(student, near, "k2") - exact).abs() / exact)

    assert relative_bias(1.0) > 0.05
    assert relative_bias(0.01) == pytest.approx(relative_bias(0.1) / 10, rel=0.2)


@pytest.mark.parametrize("estimator", SAMPLED)
def test_score_gradient_is_unbiased_for_reverse_kl(estimator):
    student, teacher = distributions()
    mean = expected_gradient(student, teacher, estimator=estimator)
    torch.testing.assert_close(mean, gradient_of(reverse_kl, student, teacher))


def test_score_gradient_is_the_same_for_all_three():
    log_q = torch.tensor([-0.3, -2.0, -1.0], dtype=torch.float64, requires_grad=True)
    log_p = torch.tensor([-1.0, -0.5, -1.0], dtype=torch.float64)
    for estimator in SAMPLED:
        loss = on_policy_kl(log_q, log_p, estimator=estimator, reduction="sum")
        torch.testing.assert_close(torch.autograd.grad(loss, log_q)[0], (log_q - log_p).detach())


def test_what_direct_differentiation_gives():
    """k1: nothing; k2: the reverse KL's gradient; k3: the forward KL's."""
    student, teacher = distributions()
    mean = {e: expected_gradient(student, teacher, estimator=e, gradient="direct") for e in SAMPLED}
    assert mean["k1"].abs().max() < 1e-14
    torch.testing.assert_close(mean["k2"], gradient_of(reverse_kl, student, teacher))
    torch.testing.assert_close(mean["k3"], gradient_of(forward_kl, student, teacher))
    assert not torch.allclose(mean["k3"], mean["k2"], atol=0.05)


@pytest.mark.parametrize("estimator", SAMPLED)
def test_off_policy_weight_keeps_it_unbiased(estimator):
    student, teacher = distributions()
    behaviour, _ = distributions(seed=3)
    log_b = F.log_softmax(behaviour, -1)
    total, value = torch.zeros_like(student), 0.0
    for y in range(student.shape[-1]):
        leaf = student.clone().requires_grad_()
        loss = on_policy_kl(
            F.log_softmax(leaf, -1)[:, y],
            F.log_softmax(teacher, -1)[:, y],
            estimator=estimator,
            behaviour_logp=log_b[:, y],
        )
        total += log_b[:, y, None].exp() * torch.autograd.grad(loss, leaf)[0]
        value += float(log_b[0, y].exp() * loss.detach())
    torch.testing.assert_close(total, gradient_of(reverse_kl, student, teacher))
    if estimator != "k2":
        assert value == pytest.approx(float(reverse_kl(student, teacher)))


def test_k3_is_never_negative_and_varies_less_than_k1():
    student, teacher = distributions(vocab=200, rows=1)
    teacher = student + 0.3 * teacher
    log_q, log_p = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
    values = {e: on_policy_kl(log_q, log_p, estimator=e, reduction="none") for e in SAMPLED}
    assert (values["k3"] >= 0).all()
    assert (values["k1"] < 0).any()
    variance = {e: (log_q.exp() * v.square()).sum() - (log_q.exp() * v).sum() ** 2 for e, v in values.items()}
    assert variance["k3"] < 0.5 * variance["k1"]


def test_full_is_the_reverse_kl():
    student, teacher = distributions(rows=4)
    log_q, log_p = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
    torch.testing.assert_close(on_policy_kl(log_q, log_p, estimator="full"), reverse_kl(student, teacher))
    leaf = student.clone().requires_grad_()
    loss = on_policy_kl(F.log_softmax(leaf, -1), log_p, estimator="full", reduction="sum")
    torch.testing.assert_close(torch.autograd.grad(loss, leaf)[0], gradient_of(reverse_kl, student, teacher))


def test_topk_merges_the_tail():
    student, teacher = distributions(vocab=10, rows=4)
    log_q, log_p = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
    full = on_policy_kl(log_q, log_p, estimator="full", reduction="none")
    last = torch.zeros_like(full)
    for k in (1, 3, 6, 10):
        kept, ids = log_q.topk(k)
        value = on_policy_kl(kept, log_p.gather(-1, ids), estimator="topk", reduction="none")
        assert (value >= last - 1e-12).all()
        assert (value <= full + 1e-12).all()
        last = value
    torch.testing.assert_close(last, full)
    kept, ids = log_q.topk(3)
    q, p = kept.exp(), log_p.gather(-1, ids).exp()
    q, p = (torch.cat((x, 1 - x.sum(-1, keepdim=True)), -1) for x in (q, p))
    expected = (q * (q / p).log()).sum(-1)
    value = on_policy_kl(kept, log_p.gather(-1, ids), estimator="topk", reduction="none")
    torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("estimator", ["full", "topk"])
def test_gradcheck_of_the_analytic_estimators(estimator):
    student, teacher = distributions(rows=3)
    log_p = F.log_softmax(teacher, -1)[:, :4]
    assert_gradcheck(lambda s: on_policy_kl(F.log_softmax(s, -1)[:, :4], log_p, estimator=estimator), student)


@pytest.mark.parametrize("estimator", SAMPLED)
def test_gradcheck_of_the_values(estimator):
    student, teacher = distributions(rows=3)
    log_q, log_p = F.log_softmax(student, -1)[:, 0], F.log_softmax(teacher, -1)[:, 0]
    assert_gradcheck(lambda q: on_policy_kl(q, log_p, estimator=estimator, gradient="direct"), log_q)


# --- numerics and arguments


@pytest.mark.parametrize("estimator", [*SAMPLED, "full", "topk"])
def test_mask_dtype_and_teacher(estimator):
    student, teacher = distributions(vocab=4, rows=5)
    sampled = estimator in SAMPLED
    log_q, log_p = (F.log_softmax(x, -1)[:, 0 if sampled else slice(None)] for x in (student, teacher))
    mask = torch.tensor([True, False, True, False, True])
    spoilt = log_q.clone()
    spoilt[~mask] = float("nan")
    spoilt.requires_grad_()
    log_p.requires_grad_()
    loss = on_policy_kl(spoilt, log_p, estimator=estimator, mask=mask)
    torch.testing.assert_close(loss, on_policy_kl(log_q[mask], log_p[mask], estimator=estimator))
    assert_no_gradient(loss, log_p)
    assert torch.autograd.grad(loss, spoilt)[0].isfinite().all()
    empty = on_policy_kl(spoilt, log_p, estimator=estimator, mask=torch.zeros(5, dtype=torch.bool))
    assert empty == 0
    assert (torch.autograd.grad(empty, spoilt)[0] == 0).all()
    low = on_policy_kl(log_q.bfloat16(), log_p.bfloat16(), estimator=estimator)
    assert low.dtype == torch.float32
    if estimator in SAMPLED:
        exact = on_policy_kl(log_q.bfloat16().double(), log_p.bfloat16().double(), estimator=estimator)
        torch.testing.assert_close(low.double(), exact.detach(), rtol=1e-5, atol=1e-7)


def test_token_that_the_teacher_excludes():
    log_q = torch.tensor([-0.5, -1.0], requires_grad=True)
    log_p = torch.tensor([-INF, -1.0])
    for estimator in SAMPLED:
        loss = on_policy_kl(log_q, log_p, estimator=estimator)
        assert loss == INF
        assert torch.autograd.grad(loss, log_q)[0].isfinite().all()
    full_q = torch.tensor([[0.5, 0.5, 0.0]]).log().requires_grad_()
    loss = on_policy_kl(full_q, torch.tensor([[0.9, 0.1, 0.0]]).log(), estimator="full")
    assert loss.isfinite()
    assert torch.autograd.grad(loss, full_q)[0].isfinite().all()


@pytest.mark.parametrize("gradient", ["score", "direct"])
def test_a_token_that_the_teacher_excludes_spoils_no_other(gradient):
    logits = torch.tensor([[0.5, 1.0], [2.0, 0.0]])
    log_p = torch.tensor([-INF, -1.0])
    for estimator in SAMPLED:
        student = logits.clone().requires_grad_()
        log_q = student.log_softmax(-1)[:, 0]
        loss = on_policy_kl(log_q, log_p, estimator=estimator, gradient=gradient)
        assert torch.autograd.grad(loss, student)[0].isfinite().all()


@pytest.mark.parametrize("estimator", SAMPLED)
def test_a_token_that_the_student_excludes_weighs_nothing(estimator):
    log_q = torch.tensor([-INF, -1.0], requires_grad=True)
    behaviour = torch.tensor([-0.5, -1.0])
    for log_p in (torch.tensor([-2.0, -1.5]), torch.tensor([-INF, -1.5])):
        options = {"estimator": estimator, "behaviour_logp": behaviour, "reduction": "none"}
        rows = on_policy_kl(log_q, log_p, **options)
        assert rows[0] == 0
        torch.testing.assert_close(
            rows[1:], on_policy_kl(log_q[1:], log_p[1:], **options | {"behaviour_logp": behaviour[1:]})
        )
        gradient = torch.autograd.grad(rows.sum(), log_q)[0]
        assert gradient[0] == 0
        assert gradient[1] != 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_topk_where_rounding_takes_the_teachers_tail(dtype):
    student = torch.tensor([[3.0, 1.0, 2.0, 0.0]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[60.0, 30.0, 0.0, 0.0]], dtype=dtype)
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    bound = on_policy_kl(log_q[:, :2], log_p[:, :2], estimator="topk")
    assert 0 < bound < on_policy_kl(log_q, log_p, estimator="full")
    gradient = torch.autograd.grad(bound, student)[0]
    assert gradient.isfinite().all()
    assert (gradient[0, 2:] > 0).all()  # a step downhill takes from the tail


def test_topk_with_all_the_mass():
    log_q = torch.tensor([[0.5, 0.5]]).log().requires_grad_()
    loss = on_policy_kl(log_q, torch.tensor([[0.25, 0.5]]).log(), estimator="topk")
    torch.testing.assert_close(
        loss, torch.tensor(0.5).mul(2.0).log().mul(0.5) + 0.5 * torch.tensor(2.0).log()
    )
    assert torch.autograd.grad(loss, log_q)[0].isfinite().all()


def test_wrong_arguments():
    log_q = torch.tensor([[-1.0, -2.0]])
    for message, options in {
        "estimator='k4'": {"estimator": "k4"},
        "gradient='none'": {"gradient": "none"},
        "samples nothing": {"estimator": "full", "behaviour_logp": log_q[:, 0]},
        "behaviour_logp has shape": {"behaviour_logp": log_q[:, 0]},
    }.items():
        with pytest.raises(ValueError, match=message):
            on_policy_kl(log_q, log_q, **options)
    with pytest.raises(ValueError, match="one entry per token"):
        on_policy_kl(torch.tensor(-1.0), torch.tensor(-1.0))
