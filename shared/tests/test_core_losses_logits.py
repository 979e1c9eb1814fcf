import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr

from stillhouse.core.losses import (
    dist_loss,
    dkd,
    forward_kl,
    logit_mse,
    logit_standardization,
    soft_cross_entropy,
    taid_target,
)
from stillhouse.core.testing import assert_gradcheck, assert_gradient, assert_no_gradient

INF = float("inf")
fast = settings(max_examples=20, deadline=None)


def pair(*shape, scale=1.5, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        scale * torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for _ in "st"
    )


def labels_for(rows, classes, seed=0):
    return torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(seed))


@st.composite
def logit_pairs(draw, rows=5, classes=6, least_rows=1):
    shape = (draw(st.integers(least_rows, rows)), draw(st.integers(2, classes)))
    finite = st.floats(-10, 10, width=32)
    return tuple(torch.from_numpy(draw(hnp.arrays(np.float64, shape, elements=finite))) for _ in "st")


def grad_of(fn, student):
    student = student.detach().clone().requires_grad_()
    return torch.autograd.grad(fn(student), student)[0]


def losses(rows, classes):
    """Each loss of the module as a function of student and teacher alone."""
    target = labels_for(rows, classes)
    return {
        "soft_cross_entropy": lambda s, t, **k: soft_cross_entropy(s, t, **k),
        "logit_mse": lambda s, t, **k: logit_mse(s, t, **k),
        "logit_mse_raw": lambda s, t, **k: logit_mse(s, t, center=False, **k),
        "dkd": lambda s, t, **k: dkd(s, t, target, **k),
        "dist": lambda s, t, **k: dist_loss(s, t, tau=2.0, **k),
        "taid": lambda s, t, **k: forward_kl(s, taid_target(s, t, 0.3), **k),
        "standardised": lambda s, t, **k: forward_kl(logit_standardization(s), logit_standardization(t), **k),
    }


each = pytest.mark.parametrize("name", list(losses(4, 6)))


# --- every loss of the module


@each
def test_gradcheck(name):
    student, teacher = pair(4, 6)
    if name == "taid":  # its target follows the student without a gradient: check it at a fixed target
        target = taid_target(student, teacher, 0.3)
        assert_gradcheck(lambda s: forward_kl(s, target), student)
        return
    loss = losses(4, 6)[name]
    assert_gradcheck(lambda s: loss(s, teacher), student)


@each
def test_gradient_reaches_the_student_only(name):
    student, teacher = (x.requires_grad_() for x in pair(4, 6))
    value = losses(4, 6)[name](student, teacher)
    assert_gradient(value, student)
    assert_no_gradient(value, teacher)


@each
def test_bfloat16_is_computed_in_float32(name):
    student, teacher = pair(4, 6, dtype=torch.bfloat16)
    loss = losses(4, 6)[name]
    value = loss(student, teacher)
    assert value.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(student, teacher), value)
    torch.testing.assert_close(value, loss(student.float(), teacher.float()), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(value.double(), loss(student.double(), teacher.double()), rtol=1e-4, atol=1e-6)
    gradient = grad_of(lambda s: loss(s, teacher), student)
    assert gradient.dtype == torch.bfloat16
    assert gradient.isfinite().all()


@each
def test_mask_is_row_removal(name):
    student, teacher = pair(6, 6)
    mask = torch.tensor([True, False, True, True, False, True])
    # a transform sees rows before any mask does, so it is given finite ones
    spoilt = student.masked_fill(~mask[:, None], 9.0 if name == "standardised" else float("nan"))
    loss = losses(6, 6)[name]
    if name == "dkd":
        expected = dkd(student[mask], teacher[mask], labels_for(6, 6)[mask])
    else:
        expected = loss(student[mask], teacher[mask])
    torch.testing.assert_close(loss(spoilt, teacher, mask=mask), expected)
    gradient = grad_of(lambda s: loss(s, teacher, mask=mask), spoilt)
    assert gradient.isfinite().all()
    assert (gradient[~mask] == 0).all()


@each
def test_no_row_counts(name):
    student, teacher = pair(4, 6)
    student.requires_grad_()
    value = losses(4, 6)[name](student, teacher, mask=torch.zeros(4, dtype=torch.bool))
    assert value == 0
    value.backward()
    assert (student.grad == 0).all()


@each
def test_forbidden_classes_on_both_sides(name):
    student, teacher = pair(4, 6, dtype=torch.float32)
    wall = torch.full((4, 2), -INF)
    wide = torch.cat((student, wall), -1), torch.cat((teacher, wall), -1)
    loss = losses(4, 6)[name]
    value, gradient = loss(*wide), grad_of(lambda s: loss(s, wide[1]), wide[0])
    assert value.isfinite()
    assert gradient.isfinite().all()
    if name != "dist":  # a correlation over classes sees the additional zero probabilities
        torch.testing.assert_close(value, loss(student, teacher))


@each
@given(logits=logit_pairs(least_rows=4, rows=4), shift=st.floats(-20, 20), seed=st.integers(0, 50))
@fast
def test_invariances(name, logits, shift, seed):
    student, teacher = logits
    loss = losses(4, student.shape[1])[name]
    value = loss(student, teacher)
    close = {"rtol": 1e-6, "atol": 1e-8}
    if name in ("standardised",):
        close["atol"] = 1e-4  # nearly constant rows are all rounding after standardisation
    if name != "logit_mse_raw":
        torch.testing.assert_close(loss(student + shift, teacher - shift), value, **close)
    if name != "dkd":
        order = torch.randperm(student.shape[1], generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(loss(student[:, order], teacher[:, order]), value, **close)
    if name != "soft_cross_entropy":
        assert value >= -1e-10


# --- soft cross-entropy and logit MSE


def test_soft_cross_entropy_agrees_with_torch():
    student, teacher = pair(5, 7)
    expected = F.cross_entropy(student / 2, F.softmax(teacher / 2, -1)) * 4
    torch.testing.assert_close(soft_cross_entropy(student, teacher, temperature=2.0), expected)


def test_logit_mse():
    student, teacher = pair(5, 7)
    torch.testing.assert_close(logit_mse(student, teacher, center=False), F.mse_loss(student, teacher))
    centred = [x - x.mean(-1, keepdim=True) for x in (student, teacher)]
    torch.testing.assert_close(logit_mse(student, teacher), F.mse_loss(*centred))
    assert logit_mse(student + 3, student) < 1e-25


# --- DKD


@given(logits=logit_pairs(), seed=st.integers(0, 50))
@fast
def test_kl_is_tckd_plus_weighted_nckd(logits, seed):
    student, teacher = logits
    target = labels_for(*student.shape, seed=seed)
    none = {"temperature": 2.0, "reduction": "none"}
    tckd = dkd(student, teacher, target, alpha=1.0, beta=0.0, **none)
    nckd = dkd(student, teacher, target, alpha=0.0, beta=1.0, **none)
    p_target = F.softmax(teacher / 2, -1).gather(-1, target[:, None])[:, 0]
    expected = forward_kl(student, teacher, **none)
    torch.testing.assert_close(tckd + (1 - p_target) * nckd, expected, rtol=1e-9, atol=1e-12)


def test_dkd_from_plain_probabilities():
    student, teacher = pair(6, 5)
    target = labels_for(6, 5)
    rows = []
    for s, t, y in zip(student, teacher, target, strict=True):
        q, p = F.softmax(s / 4, -1), F.softmax(t / 4, -1)
        others = torch.arange(5) != y
        bq, bp = torch.stack((q[y], 1 - q[y])), torch.stack((p[y], 1 - p[y]))
        hq, hp = q[others] / q[others].sum(), p[others] / p[others].sum()
        rows.append(((bp * (bp / bq).log()).sum() + 8 * (hp * (hp / hq).log()).sum()) * 16)
    torch.testing.assert_close(dkd(student, teacher, target), torch.stack(rows).mean())


def test_dkd_with_two_classes_is_kl():
    student, teacher = pair(5, 2, scale=20.0, dtype=torch.float32)
    target = labels_for(5, 2)
    torch.testing.assert_close(dkd(student, teacher, target), forward_kl(student, teacher, temperature=4.0))
    assert grad_of(lambda s: dkd(s, teacher, target), student).isfinite().all()


def test_dkd_with_a_one_hot_teacher():
    student, _ = pair(3, 4, dtype=torch.float32)
    target = torch.tensor([1, 0, 3])
    teacher = torch.full((3, 4), -INF).scatter_(1, target[:, None], 0.0)
    value = dkd(student, teacher, target, temperature=1.0)
    torch.testing.assert_close(value, F.cross_entropy(student, target))
    gradient = grad_of(lambda s: dkd(s, teacher, target, temperature=1.0), student)
    torch.testing.assert_close(gradient, grad_of(lambda s: F.cross_entropy(s, target), student))
    elsewhere = dkd(student, teacher, (target + 1) % 4, temperature=1.0)
    assert elsewhere.isfinite()


def test_dkd_low_temperature_and_t2():
    student, teacher = pair(6, 8, scale=3.0, dtype=torch.float32)
    target = labels_for(6, 8)
    assert dkd(student, teacher, target, temperature=0.02).isfinite()
    assert grad_of(lambda s: dkd(s, teacher, target, temperature=0.02), student).isfinite().all()
    scaled = dkd(student, teacher, target, temperature=4.0)
    assert float(scaled / dkd(student, teacher, target, temperature=4.0, scale_t2=False)) == 16.0
    per_row = torch.full((6, 1), 4.0)
    torch.testing.assert_close(dkd(student, teacher, target, temperature=per_row), scaled)


def test_dkd_arguments():
    student, teacher = pair(3, 4)
    with pytest.raises(ValueError, match=r"classes -100\.\.3"):
        dkd(student, teacher, torch.tensor([0, -100, 3]))
    mask = torch.tensor([True, False, True])
    assert dkd(student, teacher, torch.tensor([0, -100, 3]), mask=mask).isfinite()
    with pytest.raises(TypeError, match="integer class indices"):
        dkd(student, teacher, torch.zeros(3))
    with pytest.raises(ValueError, match="target has shape"):
        dkd(student, teacher, torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="at least 2"):
        dkd(student[:, :1], teacher[:, :1], torch.zeros(3, dtype=torch.long))


# --- DIST


def test_dist_agrees_with_scipy():
    student, teacher = pair(7, 5)
    tau = 2.0
    q, p = (F.softmax(x / tau, -1).numpy() for x in (student, teacher))
    inter = 1 - np.mean([pearsonr(a, b).statistic for a, b in zip(q, p, strict=True)])
    intra = 1 - np.mean([pearsonr(a, b).statistic for a, b in zip(q.T, p.T, strict=True)])
    expected = tau**2 * (1.5 * inter + 0.7 * intra)
    assert float(dist_loss(student, teacher, beta=1.5, gamma=0.7, tau=tau)) == pytest.approx(
        expected, rel=1e-9
    )


def test_dist_is_zero_for_an_affine_map_of_the_probabilities():
    _, teacher = pair(5, 6)
    p = F.softmax(teacher, -1)
    student = (0.4 * p + 0.1).log()  # each row again sums to one: 0.4 + 6·0.1
    assert dist_loss(student, teacher).abs() < 1e-12
    assert forward_kl(student, teacher) > 0.01


def test_dist_without_variance():
    student = torch.zeros(4, 5)
    _, teacher = pair(4, 5, dtype=torch.float32)
    torch.testing.assert_close(dist_loss(student, teacher), torch.tensor(2.0))
    assert grad_of(lambda s: dist_loss(s, teacher), student).isfinite().all()


def test_dist_arguments():
    student, teacher = pair(2, 5)
    with pytest.raises(ValueError, match="at least 3"):
        dist_loss(student, teacher)
    assert dist_loss(student, teacher, gamma=0.0).isfinite()
    with pytest.raises(ValueError, match="at least 2"):
        dist_loss(student[:, :1], teacher[:, :1])
    with pytest.raises(ValueError, match="temperature=0"):
        dist_loss(student, teacher, tau=0)


@pytest.mark.oracle
def test_torchdistill_dist():
    mid_level = pytest.importorskip("torchdistill.losses.mid_level")
    student, teacher = pair(8, 10, dtype=torch.float32)
    io = [{"path": {"output": x}} for x in (student, teacher)]
    theirs = mid_level.DISTLoss("path", "output", "path", "output", beta=2.0, gamma=1.5, tau=4.0)(*io)
    torch.testing.assert_close(dist_loss(student, teacher, beta=2.0, gamma=1.5, tau=4.0), theirs)


# --- standardisation and TAID


@given(logits=logit_pairs(), scale=st.floats(0.1, 10), shift=st.floats(-5, 5))
@fast
def test_standardisation_undoes_affine_maps(logits, scale, shift):
    z, _ = logits
    ours = logit_standardization(z)
    varied = z.std(-1) > 1e-2
    torch.testing.assert_close(
        ours[varied], ((z - z.mean(-1, keepdim=True)) / z.std(-1, keepdim=True))[varied], rtol=1e-4, atol=1e-6
    )
    torch.testing.assert_close(
        logit_standardization(scale * z + shift)[varied], ours[varied], rtol=1e-3, atol=1e-4
    )


def test_standardisation_edge_cases():
    constant = torch.full((2, 3), 4.0)
    assert (logit_standardization(constant) == 0).all()
    assert grad_of(lambda z: logit_standardization(z).square().sum(), constant).isfinite().all()
    walled = torch.tensor([[1.0, 2.0, 3.0, -INF]])
    torch.testing.assert_close(logit_standardization(walled)[:, :3], logit_standardization(walled[:, :3]))
    assert logit_standardization(walled)[0, 3] == -INF
    with pytest.raises(ValueError, match="at least 2"):
        logit_standardization(torch.zeros(2, 1))
    with pytest.raises(TypeError, match="floating"):
        logit_standardization(torch.zeros(2, 3, dtype=torch.long))


def test_taid_from_student_to_teacher():
    student, teacher = pair(4, 6)
    start = grad_of(lambda s: soft_cross_entropy(s, taid_target(s, teacher, 0.0)), student)
    assert start.abs().max() < 1e-15
    entropy = torch.distributions.Categorical(logits=student).entropy().mean()
    torch.testing.assert_close(soft_cross_entropy(student, taid_target(student, teacher, 0.0)), entropy)
    end = grad_of(lambda s: soft_cross_entropy(s, taid_target(s, teacher, 1.0)), student)
    torch.testing.assert_close(end, grad_of(lambda s: forward_kl(s, teacher), student))
    assert not taid_target(student.requires_grad_(), teacher.requires_grad_(), 0.5).requires_grad


def test_taid_mixes_logits_not_probabilities():
    student, teacher = pair(4, 6)
    target = F.softmax(taid_target(student, teacher, 0.3), -1)
    geometric = F.softmax(student, -1) ** 0.7 * F.softmax(teacher, -1) ** 0.3
    torch.testing.assert_close(target, geometric / geometric.sum(-1, keepdim=True))


@pytest.mark.parametrize("coef", [0.0, 0.3, 1.0, torch.tensor([[0.0], [0.5], [1.0]])])
def test_taid_with_forbidden_classes(coef):
    student, teacher = pair(3, 4, dtype=torch.float32)
    student[:, 0] = teacher[:, 0] = -INF
    target = taid_target(student, teacher, coef)
    assert not target.isnan().any()
    assert (target[:, 0] == -INF).all()
    gradient = grad_of(lambda s: forward_kl(s, taid_target(s, teacher, coef)), student)
    assert gradient.isfinite().all()
    one_sided = taid_target(student, torch.zeros(3, 4), 1.0)
    assert one_sided.isfinite().all()


def test_taid_arguments():
    student, teacher = pair(3, 4)
    with pytest.raises(ValueError, match=r"coef=1\.2"):
        taid_target(student, teacher, 1.2)
    with pytest.raises(ValueError, match="must be equal"):
        taid_target(student, teacher[:2], 0.5)
