import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.core.losses import SparseTeacher, forward_kl, topk_kl
from stillhouse.core.testing import assert_gradcheck

INF = float("inf")
TAILS = ("bucket", "renormalize", "renormalize_teacher", "truncate")
fast = settings(max_examples=30, deadline=None)


def pair(*shape, scale=1.5, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        scale * torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for _ in "st"
    )


def grad_of(fn, student):
    student = student.detach().clone().requires_grad_()
    return torch.autograd.grad(fn(student), student)[0]


def by_hand(student, teacher, k, temperature, tail):
    """Each mode from plain probabilities, one row at a time."""
    rows = []
    for s, t in zip(student, teacher, strict=True):
        q, p = F.softmax(s / temperature, -1), F.softmax(t / temperature, -1)
        kept = t.topk(k).indices
        pk, qk = p[kept], q[kept]
        if tail.startswith("renormalize"):
            pk = pk / pk.sum()
        if tail == "renormalize":
            qk = qk / qk.sum()
        value = (pk * (pk / qk).log()).sum()
        if tail == "bucket":
            value = value + (1 - pk.sum()) * ((1 - pk.sum()) / (1 - qk.sum())).log()
        rows.append(temperature**2 * value)
    return torch.stack(rows)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_every_mode_from_plain_probabilities(tail, temperature):
    student, teacher = pair(5, 12)
    sparse = SparseTeacher.from_logits(teacher, k=4, temperatures=(1.0, 2.0))
    options = {"tail": tail, "temperature": temperature}
    value = topk_kl(student, sparse, reduction="none", **options)
    torch.testing.assert_close(value, by_hand(student, teacher, 4, temperature, tail))
    ours = grad_of(lambda s: topk_kl(s, sparse, **options), student)
    theirs = grad_of(lambda s: by_hand(s, teacher, 4, temperature, tail).mean(), student)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("tail", TAILS)
def test_gradcheck(tail):
    student, teacher = pair(2, 3, 7)
    sparse = SparseTeacher.from_logits(teacher, k=3, temperatures=(1.5,))
    mask = torch.tensor([[True, False, True], [True, True, False]])
    assert_gradcheck(lambda s: topk_kl(s, sparse, tail=tail, temperature=1.5, mask=mask), student)


def test_bucket_gradient_is_q_minus_sparse_p():
    """On the kept tokens q − p; on the others q − p_tail·q/q_tail."""
    student, teacher = pair(3, 9)
    sparse = SparseTeacher.from_logits(teacher, k=3)
    q, p = F.softmax(student, -1), F.softmax(teacher, -1)
    kept = torch.zeros_like(q, dtype=torch.bool).scatter_(-1, sparse.ids, True)
    p_tail, q_tail = ((x * ~kept).sum(-1, keepdim=True) for x in (p, q))
    expected = q - torch.where(kept, p, p_tail * q / q_tail)
    torch.testing.assert_close(grad_of(lambda s: topk_kl(s, sparse, reduction="sum"), student), expected)


@pytest.mark.parametrize("tail", TAILS)
def test_all_tokens_kept_is_the_full_kl(tail):
    student, teacher = pair(4, 6, dtype=torch.float32)
    sparse = SparseTeacher.from_logits(teacher, k=6, temperatures=(2.0,))
    full = forward_kl(student, teacher, temperature=2.0)
    torch.testing.assert_close(topk_kl(student, sparse, tail=tail, temperature=2.0), full)
    torch.testing.assert_close(
        grad_of(lambda s: topk_kl(s, sparse, tail=tail, temperature=2.0), student),
        grad_of(lambda s: forward_kl(s, teacher, temperature=2.0), student),
    )


@st.composite
def logit_pairs(draw):
    shape = (draw(st.integers(1, 4)), draw(st.integers(2, 12)))
    finite = st.floats(-15, 15, width=32)
    return tuple(torch.from_numpy(draw(hnp.arrays(np.float64, shape, elements=finite))) for _ in "st")


@given(logits=logit_pairs(), data=st.data())
@fast
def test_data_processing_bound(logits, data):
    student, teacher = logits
    k = data.draw(st.integers(1, student.shape[1]))
    value = topk_kl(student, SparseTeacher.from_logits(teacher, k=k), reduction="none")
    assert (value >= -1e-9).all()
    assert (value <= forward_kl(student, teacher, reduction="none") + 1e-9).all()
    if k < student.shape[1]:  # one token more is a finer partition
        finer = topk_kl(student, SparseTeacher.from_logits(teacher, k=k + 1), reduction="none")
        assert (value <= finer + 1e-9).all()


def test_bias_of_each_mode_on_a_large_vocabulary():
    """V = 1000, k = 8, teacher 2·N(0, 1), student 0.9·teacher + 1.2·N(0, 1): what each mode makes of it."""
    noise, teacher = pair(2000, 1000, scale=1.0, dtype=torch.float32)
    teacher = 2 * teacher
    student = 0.9 * teacher + 1.2 * noise
    full = forward_kl(student, teacher, reduction="none")
    sparse = SparseTeacher.from_logits(teacher, k=8)
    rows = {tail: topk_kl(student, sparse, tail=tail, reduction="none") for tail in TAILS}
    assert float(full.mean()) == pytest.approx(0.718, rel=0.05)
    figures = {"bucket": 0.229, "truncate": 0.292, "renormalize": 0.550, "renormalize_teacher": 2.066}
    for tail, figure in figures.items():
        assert float(rows[tail].mean()) == pytest.approx(figure, rel=0.05), tail
    assert (rows["bucket"] >= 0).all()
    assert (rows["bucket"] <= full).all()
    assert 0 < (rows["truncate"] < 0).float().mean() < 0.02
    assert (rows["renormalize"] >= 0).all()


# --- the importance-sampled teacher


def test_sampled_teacher_is_unbiased_in_value_and_gradient():
    student, teacher = (x[:1] for x in pair(1, 8, scale=1.0))
    full = forward_kl(student, teacher, temperature=2.0)
    gradient = grad_of(lambda s: forward_kl(s, teacher, temperature=2.0), student)
    many = 20000
    for proposal in (None, 3.0):
        sparse = SparseTeacher.sample(
            teacher.expand(many, 8),
            draws=4,
            temperature=2.0,
            proposal_temperature=proposal,
            generator=torch.Generator().manual_seed(0),
        )
        options = {"sampler": "importance", "temperature": 2.0}
        values = topk_kl(student.expand(many, 8), sparse, reduction="none", **options)
        error = values.std() / many**0.5
        assert (values.mean() - full).abs() < 4 * error
        ours = grad_of(lambda s, x=sparse, o=options: topk_kl(s.expand(many, 8), x, **o), student)
        torch.testing.assert_close(ours, gradient, rtol=0.0, atol=0.02)
        assert not torch.allclose(gradient, torch.zeros_like(gradient), atol=0.1)


def test_sampled_weights_are_exact_by_enumeration():
    """E[w·f(id)] over the proposal, summed over the vocabulary, is Σ p f."""
    _, teacher = pair(1, 6)
    sparse = SparseTeacher.sample(
        teacher.expand(500, 6),
        draws=1,
        temperature=1.0,
        proposal_temperature=2.0,
        generator=torch.Generator(),
    )
    p, proposal = F.softmax(teacher[0], -1), F.softmax(teacher[0] / 2, -1)
    torch.testing.assert_close(sparse.weights[:, 0], (p / proposal)[sparse.ids[:, 0]])


def test_sampled_gradcheck_with_repeated_ids():
    student, teacher = pair(3, 4)
    sparse = SparseTeacher.sample(teacher, draws=9, generator=torch.Generator().manual_seed(1))
    assert (sparse.ids.sort(-1).values.diff(dim=-1) == 0).any()
    assert_gradcheck(lambda s: topk_kl(s, sparse, sampler="importance"), student)


# --- the signal


def test_tail_mass_is_exact_at_every_stored_temperature():
    _, teacher = pair(50, 400, scale=2.0)
    sparse = SparseTeacher.from_logits(teacher, k=10, temperatures=(1.0, 2.0, 4.0))
    for t in (1.0, 2.0, 4.0):
        p = F.softmax(teacher / t, -1)
        kept = p.gather(-1, sparse.ids)
        log_p, log_tail = sparse.log_probs(t)
        torch.testing.assert_close(log_p.exp(), kept, rtol=1e-12, atol=0)
        outside = p.scatter(-1, sparse.ids, 0.0).sum(-1)
        torch.testing.assert_close(log_tail.exp(), outside, rtol=1e-9, atol=0)


def test_log_probabilities_alone_refuse_other_temperatures():
    student, teacher = pair(4, 10)
    log_p = F.log_softmax(teacher, -1)
    values, ids = log_p.topk(3)
    signal = SparseTeacher(ids=ids, logits=values, lse=None, vocab=10, log_values=True)
    torch.testing.assert_close(
        topk_kl(student, signal), topk_kl(student, SparseTeacher.from_logits(teacher, k=3))
    )
    with pytest.raises(ValueError, match="at T=1 only"):
        topk_kl(student, signal, temperature=2.0)
    values, ids = log_p.topk(10)
    complete = SparseTeacher(ids=ids, logits=values, lse=None, vocab=10, log_values=True)
    full = forward_kl(student, teacher, temperature=2.0)
    torch.testing.assert_close(topk_kl(student, complete, temperature=2.0), full)


def test_half_precision_storage():
    student, teacher = pair(64, 500, dtype=torch.float32)
    exact = topk_kl(student, SparseTeacher.from_logits(teacher, k=16), reduction="none")
    stored = SparseTeacher.from_logits(teacher, k=16, dtype=torch.float16)
    assert stored.logits.dtype == torch.float16
    assert stored.lse.dtype == torch.float32
    value = topk_kl(student, stored, reduction="none")
    torch.testing.assert_close(value, exact, rtol=0, atol=5e-3)
    assert (value >= -1e-6).all()


def test_mass_above_one_from_rounding_is_scaled_back():
    signal = SparseTeacher(
        ids=torch.tensor([[0, 1]]),
        logits=torch.tensor([[1.0, 0.5]]),
        lse=torch.logsumexp(torch.tensor([[1.0, 0.5]]), -1, keepdim=True) - 1e-3,
        vocab=5,
    )
    log_p, log_tail = signal.log_probs()
    torch.testing.assert_close(log_p.exp().sum(), torch.tensor(1.0))
    assert log_tail.item() == -INF
    assert topk_kl(torch.zeros(1, 5), signal) > 0


# --- numerics


def test_nearly_all_mass_kept_keeps_the_tail_precise():
    """q_tail = 1e-12 cannot be had as 1 − Σ q in float32."""
    student = torch.tensor([[0.0, 0.0, -28.0, -28.0]])
    teacher = torch.tensor([[0.0, 0.0, -3.0, -3.0]])
    sparse = SparseTeacher.from_logits(teacher, k=2)
    exact = topk_kl(student.double(), SparseTeacher.from_logits(teacher.double(), k=2))
    torch.testing.assert_close(topk_kl(student, sparse).double(), exact, rtol=1e-5, atol=0)
    gradient = grad_of(lambda s: topk_kl(s, sparse), student)
    assert gradient.isfinite().all()
    assert (gradient[:, 2:] < -0.01).all()


@pytest.mark.parametrize("tail", TAILS)
def test_forbidden_tokens(tail):
    student, teacher = pair(3, 6, dtype=torch.float32)
    wall = torch.full((3, 2), -INF)
    wide = torch.cat((student, wall), -1), torch.cat((teacher, wall), -1)
    for k in (3, 6, 7, 8):  # with 7 the signal itself holds −inf
        sparse = SparseTeacher.from_logits(wide[1], k=k)
        value = topk_kl(wide[0], sparse, tail=tail)
        expected = topk_kl(student, SparseTeacher.from_logits(teacher, k=min(k, 6)), tail=tail)
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6)
        gradient = grad_of(lambda s, sparse=sparse: topk_kl(s, sparse, tail=tail), wide[0])
        assert gradient.isfinite().all()
        assert (gradient[:, 6:] == 0).all()


def test_student_without_a_tail_is_infinite():
    teacher = torch.zeros(1, 4)
    student = torch.tensor([[0.0, 0.0, -INF, -INF]])
    sparse = SparseTeacher(
        ids=torch.tensor([[0, 1]]), logits=teacher[:, :2], lse=teacher.logsumexp(-1)[:, None], vocab=4
    )
    assert topk_kl(student, sparse) == INF
    assert grad_of(lambda s: topk_kl(s, sparse), student).isfinite().all()
    assert topk_kl(student, sparse, tail="renormalize").isfinite()


def test_low_temperature():
    student, teacher = pair(6, 40, scale=3.0, dtype=torch.float32)
    sparse = SparseTeacher.from_logits(teacher, k=5, temperatures=(0.02,))
    assert topk_kl(student, sparse, temperature=0.02).isfinite()
    assert grad_of(lambda s: topk_kl(s, sparse, temperature=0.02), student).isfinite().all()


def test_bfloat16_is_computed_in_float32():
    student, teacher = pair(6, 40, dtype=torch.bfloat16)
    sparse = SparseTeacher.from_logits(teacher, k=5)
    value = topk_kl(student, sparse)
    assert value.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(topk_kl(student, sparse), value)
    wide = topk_kl(student.double(), SparseTeacher.from_logits(teacher.double(), k=5))
    torch.testing.assert_close(value.double(), wide, rtol=1e-4, atol=0)
    assert grad_of(lambda s: topk_kl(s, sparse), student).dtype == torch.bfloat16


def test_mask_is_row_removal_and_empty_mask():
    student, teacher = pair(5, 9)
    sparse = SparseTeacher.from_logits(teacher, k=3)
    mask = torch.tensor([True, False, True, True, False])
    spoilt = student.masked_fill(~mask[:, None], float("nan"))
    expected = topk_kl(student[mask], SparseTeacher.from_logits(teacher[mask], k=3))
    torch.testing.assert_close(topk_kl(spoilt, sparse, mask=mask), expected)
    assert grad_of(lambda s: topk_kl(s, sparse, mask=mask), spoilt).isfinite().all()
    student.requires_grad_()
    nothing = topk_kl(student, sparse, mask=torch.zeros(5, dtype=torch.bool))
    nothing.backward()
    assert nothing == 0
    assert (student.grad == 0).all()


def test_second_derivative_is_refused():
    student, teacher = pair(2, 5)
    loss = topk_kl(student.requires_grad_(), SparseTeacher.from_logits(teacher, k=3))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, student, create_graph=True)


def test_t2_switch():
    student, teacher = pair(5, 9)
    sparse = SparseTeacher.from_logits(teacher, k=3, temperatures=(4.0,))
    scaled = topk_kl(student, sparse, temperature=4.0)
    assert float(scaled / topk_kl(student, sparse, temperature=4.0, scale_t2=False)) == 16.0


# --- arguments


def test_wrong_arguments():
    student, teacher = pair(3, 8)
    sparse = SparseTeacher.from_logits(teacher, k=2)
    sampled = SparseTeacher.sample(teacher, draws=2, generator=torch.Generator().manual_seed(0))
    wrong = SparseTeacher(ids=sparse.ids + 7, logits=sparse.logits, lse=sparse.lse, vocab=8)
    for message, call in {
        "temperature=2.0 is not stored": lambda: topk_kl(student, sparse, temperature=2.0),
        "shared real vocabulary": lambda: topk_kl(student[:, :7], sparse),
        "all but the last dimension": lambda: topk_kl(student[:2], sparse),
        "tail='drop'": lambda: topk_kl(student, sparse, tail="drop"),
        "sampler='random'": lambda: topk_kl(student, sparse, sampler="random"),
        "does not fit": lambda: topk_kl(student, sparse, sampler="importance"),
        "holds sampled tokens": lambda: topk_kl(student, sampled),
        "sampled for 1.0": lambda: topk_kl(student, sampled, sampler="importance", temperature=2.0),
        "no meaning with sampled": lambda: topk_kl(student, sampled, sampler="importance", tail="truncate"),
        "leave the vocabulary": lambda: topk_kl(student, wrong),
        "k=9": lambda: SparseTeacher.from_logits(teacher, k=9),
        "draws=0": lambda: SparseTeacher.sample(teacher, draws=0),
        "temperature=0.0": lambda: SparseTeacher.from_logits(teacher, k=2, temperatures=(0.0,)),
        "at least one temperature": lambda: SparseTeacher.from_logits(teacher, k=2, temperatures=()),
        "lse is None": lambda: SparseTeacher(ids=sparse.ids, logits=sparse.logits, lse=None, vocab=8),
        "lse has shape": lambda: SparseTeacher(
            ids=sparse.ids, logits=sparse.logits, lse=sparse.lse, temperatures=(1.0, 2.0), vocab=8
        ),
        "both must be": lambda: SparseTeacher(
            ids=sparse.ids, logits=sparse.logits[:2], lse=sparse.lse, vocab=8
        ),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="SparseTeacher"):
        topk_kl(student, teacher)
    with pytest.raises(TypeError, match="ids must hold integers"):
        SparseTeacher(ids=sparse.logits, logits=sparse.logits, lse=sparse.lse, vocab=8)
