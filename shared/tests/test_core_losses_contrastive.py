"""Contrastive losses: information of Gaussians in closed form, NTXent, NCE written out, memory state."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stillhouse.core.losses.contrastive import CRD, info_nce, mi_alpha, mi_alpha_loss


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- InfoNCE ------------------------------------------------------------------------------------------------


def test_info_nce_equals_the_written_formula():
    student, teacher, extra = draw(5, 3), draw(5, 3, seed=1), draw(4, 3, seed=2)
    expected = 0.0
    for i in range(5):
        logits = F.cosine_similarity(student[i : i + 1], torch.cat([teacher, extra])) / 0.2
        expected += (logits.exp().sum().log() - logits[i]).item() / 5
    value = info_nce(student, teacher, temperature=0.2, negatives=extra)
    assert value.item() == pytest.approx(expected, rel=1e-10)


def test_info_nce_symmetric_is_the_mean_of_both_directions():
    student, teacher = draw(5, 3), draw(5, 3, seed=1)
    both = info_nce(student, teacher) + info_nce(teacher, student)
    assert torch.allclose(info_nce(student, teacher, symmetric=True), both / 2)


def test_info_nce_reductions_agree():
    student, teacher = draw(5, 3), draw(5, 3, seed=1)
    rows = info_nce(student, teacher, reduction="none")
    assert rows.shape == (5,)
    assert torch.allclose(info_nce(student, teacher), rows.mean())
    assert torch.allclose(info_nce(student, teacher, num_items=10), rows.sum() / 10)


@given(seed=st.integers(0, 10_000), items=st.integers(1, 8), scale=st.floats(0.01, 100))
@settings(max_examples=25, deadline=None)
def test_info_nce_ignores_scale_and_order_and_more_negatives_are_harder(seed: int, items: int, scale: float):
    student, teacher = draw(items, 4, seed=seed), draw(items, 4, seed=seed + 1)
    value = info_nce(student, teacher, temperature=0.3)
    order = torch.randperm(items, generator=torch.Generator().manual_seed(seed))
    assert value >= 0
    assert torch.allclose(info_nce(scale * student[order], teacher[order], temperature=0.3), value)
    assert info_nce(student, teacher, temperature=0.3, negatives=draw(3, 4, seed=seed + 2)) > value


def test_info_nce_gradcheck_and_zero_vectors():
    student, teacher = draw(5, 3).requires_grad_(), draw(5, 3, seed=1)
    assert torch.autograd.gradcheck(lambda s: info_nce(s, teacher, temperature=0.3), (student,))
    assert torch.autograd.gradcheck(lambda s: info_nce(s, teacher, symmetric=True), (student,))
    zero = torch.zeros(5, 3, requires_grad=True)
    value = info_nce(zero, teacher.float())
    value.backward()
    assert value.item() == pytest.approx(math.log(5))
    assert torch.equal(zero.grad, torch.zeros(5, 3))


def test_info_nce_teacher_and_negatives_get_no_gradient():
    student, teacher, extra = (draw(4, 3, seed=s).requires_grad_() for s in range(3))
    info_nce(student, teacher, negatives=extra, symmetric=True).backward()
    assert teacher.grad is None
    assert extra.grad is None
    assert student.grad.abs().sum() > 0


def test_info_nce_bfloat16_under_autocast():
    student, teacher = draw(16, 8).bfloat16(), draw(16, 8, seed=1).bfloat16()
    exact = info_nce(student.double(), teacher.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = info_nce(student, teacher)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(exact.item(), rel=1e-4)


# --- mutual-information bounds ------------------------------------------------------------------------------


def gaussian_scores(seed: int, *, rho: float, width: int, items: int) -> Tensor:
    """Log density ratio log p(x_j | y_i) / p(x_j) of correlated Gaussians, the best critic."""
    y = draw(items, width, seed=2 * seed)
    x = rho * y + math.sqrt(1 - rho**2) * draw(items, width, seed=2 * seed + 1)
    residual = (x[None] - rho * y[:, None]).square() / (1 - rho**2)
    return 0.5 * (x[None].square() - residual - math.log(1 - rho**2)).sum(-1)


def poole_interpolated(scores: Tensor, alpha: float, log_baseline: float) -> float:
    """The leave-one-out estimate with Python loops and plain exponentials."""
    k, joint, marginal = len(scores), [], []
    for i in range(k):

        def baseline(left_out: int, i: int = i) -> float:
            mean = sum(math.exp(scores[i, c]) for c in range(k) if c != left_out) / (k - 1)
            return alpha * mean + (1 - alpha) * math.exp(log_baseline)

        for j in range(k):
            if j != i:
                joint.append(float(scores[i, i]) - math.log(baseline(j)))
                marginal.append(math.exp(scores[i, j]) / baseline(i))
    return 1 + sum(joint) / len(joint) - sum(marginal) / len(marginal)


@pytest.mark.parametrize("alpha", [0.0, 0.01, 0.5, 1.0])
@pytest.mark.parametrize("log_baseline", [-0.5, 0.0, 1.0])
def test_mi_alpha_equals_loops(alpha: float, log_baseline: float):
    scores = 2 * draw(6, 6)
    value = mi_alpha(scores, alpha, log_baseline)
    assert value.item() == pytest.approx(poole_interpolated(scores, alpha, log_baseline), rel=1e-10)
    assert mi_alpha_loss(scores, alpha, log_baseline) == -value


def test_mi_alpha_end_points():
    scores = 2 * draw(6, 6)
    info = mi_alpha(scores, 1.0, leave_one_out=False)
    assert torch.allclose(info, math.log(6) - F.cross_entropy(scores, torch.arange(6)))
    off = ~torch.eye(6, dtype=torch.bool)
    nwj = scores.diagonal().mean() - scores[off].exp().mean() / math.e
    assert torch.allclose(mi_alpha(scores, 0.0, 1.0), nwj)
    assert torch.allclose(
        mi_alpha(scores, 1.0), mi_alpha(scores, 1.0, 5.0)
    )  # the baseline plays no part at α = 1
    student, teacher = draw(6, 3), draw(6, 3, seed=1)
    cosines = F.normalize(student) @ F.normalize(teacher).T / 0.07
    assert torch.allclose(
        mi_alpha(cosines, 1.0, leave_one_out=False), math.log(6) - info_nce(student, teacher)
    )


def test_gaussian_information_bias_falls_and_variance_grows_as_alpha_goes_to_zero():
    rho, width, items, batches = 0.9, 4, 32, 400
    truth = -width / 2 * math.log(1 - rho**2)
    means, deviations = [], []
    for alpha in (1.0, 0.3, 0.05, 0.0):
        values = torch.stack(
            [mi_alpha(gaussian_scores(s, rho=rho, width=width, items=items), alpha) for s in range(batches)]
        )
        error = values.std() / math.sqrt(batches)
        assert values.mean() <= truth + 3 * error
        means.append(values.mean().item())
        deviations.append(values.std().item())
    assert means == sorted(means)
    assert deviations == sorted(deviations)
    assert truth - means[0] > 0.3  # InfoNCE is biased this close to log K …
    assert abs(means[-1] - truth) < 4 * deviations[-1] / math.sqrt(batches)  # … and NWJ is not


@given(seed=st.integers(0, 10_000), scale=st.floats(0, 200), items=st.integers(3, 10))
@settings(max_examples=40, deadline=None)
def test_info_nce_end_cannot_exceed_the_log_of_the_candidates(seed: int, scale: float, items: int):
    scores = scale * draw(items, items, seed=seed).float()
    assert mi_alpha(scores, 1.0) <= math.log(items - 1) + 1e-5
    assert mi_alpha(scores, 1.0, leave_one_out=False) <= math.log(items) + 1e-5


def test_dominant_scores_do_not_cancel():
    scores = 60.0 * torch.eye(5) + draw(5, 5, dtype=torch.float32)
    exact = poole_interpolated(scores.double(), 0.5, 0.0)
    assert mi_alpha(scores, 0.5).item() == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("leave_one_out", [True, False])
def test_mi_alpha_gradcheck(alpha: float, leave_one_out: bool):
    scores, baseline = draw(5, 5).requires_grad_(), draw(5, seed=1).requires_grad_()

    def bound(s: Tensor, b: Tensor) -> Tensor:
        return mi_alpha(s, alpha, b, leave_one_out=leave_one_out)

    inputs = (scores, baseline if alpha < 1 else baseline.detach())
    assert torch.autograd.gradcheck(bound, inputs)


def test_mi_alpha_bfloat16():
    scores = draw(8, 8).bfloat16()
    value = mi_alpha(scores, 0.3)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(mi_alpha(scores.double(), 0.3).item(), rel=1e-4)


# --- CRD ----------------------------------------------------------------------------------------------------


def make_crd(**options) -> CRD:
    torch.manual_seed(0)
    return CRD(4, 6, **({"items": 20, "dim": 3, "negatives": 7} | options)).double()


def batch(seed: int = 0, items: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    index = torch.randperm(20, generator=torch.Generator().manual_seed(seed))[:items]
    return draw(items, 4, seed=seed), draw(items, 6, seed=seed + 1), index


def nce_by_loops(crd: CRD, student: Tensor, teacher: Tensor, index: Tensor, contrast: Tensor) -> float:
    total = 0.0
    noise = contrast.shape[1] / crd.items
    with torch.no_grad():
        u, v = F.normalize(crd.student_head(student)), F.normalize(crd.teacher_head(teacher))
    for embedding, memory in ((u, crd.teacher_memory), (v, crd.student_memory)):
        chosen = torch.cat([index[:, None], contrast], 1)
        raw = [
            [math.exp(embedding[i] @ memory[k] / crd.temperature) for k in chosen[i]]
            for i in range(len(index))
        ]
        z = crd.items * sum(map(sum, raw)) / (len(index) * chosen.shape[1])
        for row in raw:
            h = [value / z for value in row]
            total -= math.log(h[0] / (h[0] + noise)) / len(index)
            total -= sum(math.log(noise / (value + noise)) for value in h[1:]) / len(index)
    return total


def test_crd_equals_nce_written_out():
    crd = make_crd()
    student, teacher, index = batch()
    contrast = torch.randint(20, (5, 7), generator=torch.Generator().manual_seed(4))
    expected = nce_by_loops(crd, student, teacher, index, contrast)
    assert crd(student, teacher, index, contrast).item() == pytest.approx(expected, rel=1e-9)


def test_crd_memory_moves_for_the_batch_only_and_only_in_training():
    crd = make_crd()
    student, teacher, index = batch()
    before = crd.student_memory.clone()
    crd.eval()
    crd(student, teacher, index)
    assert torch.equal(crd.student_memory, before)
    assert crd.log_z.isnan().all()
    crd.train()
    crd(student, teacher, index)
    others = torch.ones(20, dtype=torch.bool)
    others[index] = False
    assert torch.equal(crd.student_memory[others], before[others])
    expected = F.normalize(0.5 * before[index] + 0.5 * F.normalize(crd.student_head(student)))
    assert torch.allclose(crd.student_memory[index], expected)
    assert torch.allclose(crd.teacher_memory[index].norm(dim=1), torch.ones(5, dtype=torch.float64))


def test_crd_normalizer_options():
    student, teacher, index = batch()
    kept = make_crd()
    kept(student, teacher, index)
    first = kept.log_z.clone()
    kept(*batch(seed=7))
    assert torch.equal(kept.log_z, first)
    kept.reset_normalizer()
    assert kept.log_z.isnan().all()
    kept(*batch(seed=7))
    assert not torch.allclose(kept.log_z, first)
    fixed = make_crd(normalizer=math.exp(2.0))
    assert torch.allclose(fixed.log_z, torch.full((2,), 2.0, dtype=torch.float64))
    contrast = torch.randint(20, (5, 7), generator=torch.Generator().manual_seed(4))
    each = make_crd(normalizer="batch")
    each(*batch(seed=7), contrast)
    expected = nce_by_loops(each, student, teacher, index, contrast)
    assert each(student, teacher, index, contrast).item() == pytest.approx(expected, rel=1e-9)


def test_crd_resumes_from_its_state_dict():
    crd = make_crd()
    for seed in range(3):
        crd(*batch(seed=seed))
    state = {name: value.clone() for name, value in crd.state_dict().items()}
    resumed = make_crd(seed=0)
    resumed.load_state_dict(state)
    for seed in range(3, 6):
        assert torch.equal(crd(*batch(seed=seed)), resumed(*batch(seed=seed)))


def test_crd_negatives_are_seeded_uniform_and_never_the_positive():
    crd = CRD(4, 6, items=10, negatives=2000, dim=3, seed=5)
    index = torch.tensor([0, 4, 9])
    first = crd.draw_negatives(index)
    assert (first != index[:, None]).all()
    counts = torch.stack([row.bincount(minlength=10) for row in first]).double()
    expected = torch.full((3, 10), 2000 / 9, dtype=torch.float64)
    expected[torch.arange(3), index] = 0
    chi2 = ((counts - expected).square() / expected.clamp_min(1e-9)).nan_to_num()[expected > 0].sum()
    assert chi2 < 52  # 24 degrees of freedom, p ≈ 1e-3
    assert not torch.equal(crd.draw_negatives(index), first)
    again = CRD(4, 6, items=10, negatives=2000, dim=3, seed=5)
    assert torch.equal(again.draw_negatives(index), first)
    other = CRD(4, 6, items=10, negatives=2000, dim=3, seed=6)
    assert not torch.equal(other.draw_negatives(index), first)


def test_crd_gradients():
    crd = make_crd(normalizer=20.0).eval()
    student, teacher, index = batch()
    student.requires_grad_()
    contrast = torch.randint(20, (5, 7), generator=torch.Generator().manual_seed(4))
    assert torch.autograd.gradcheck(lambda s: crd(s, teacher, index, contrast), (student,))
    teacher.requires_grad_()
    crd.train()
    crd(student, teacher, index).backward()
    assert teacher.grad is None
    assert all(p.grad.abs().sum() > 0 for p in crd.parameters())


def test_crd_learns_to_tell_its_items():
    torch.manual_seed(0)
    student = draw(20, 4, dtype=torch.float32)
    teacher = student @ draw(4, 6, seed=1, dtype=torch.float32)
    crd = CRD(4, 6, items=20, dim=8, negatives=10, temperature=0.2)
    optimizer = torch.optim.Adam(crd.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        loss = crd(student, teacher, torch.arange(20))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[1]
    with torch.no_grad():
        u, v = F.normalize(crd.student_head(student)), F.normalize(crd.teacher_head(teacher))
    assert ((u @ v.T).argmax(1) == torch.arange(20)).float().mean() > 0.8


def test_crd_bfloat16_under_autocast():
    crd = make_crd(normalizer=20.0).float().eval()
    student, teacher, index = batch()
    contrast = torch.randint(20, (5, 7), generator=torch.Generator().manual_seed(4))
    exact = crd(student.float(), teacher.float(), index, contrast)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = crd(student.float(), teacher.float(), index, contrast)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(exact.item(), rel=0.05)  # the heads themselves run in bfloat16


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match="projection"):
        info_nce(draw(3, 2), draw(3, 4))
    with pytest.raises(ValueError, match="negatives must be"):
        info_nce(draw(3, 2), draw(3, 2), negatives=draw(3, 4))
    with pytest.raises(ValueError, match="temperature"):
        info_nce(draw(3, 2), draw(3, 2), temperature=0.0)
    with pytest.raises(ValueError, match="square"):
        mi_alpha(draw(3, 2), 0.5)
    with pytest.raises(ValueError, match="K ≥ 3"):
        mi_alpha(draw(2, 2), 0.5)
    with pytest.raises(ValueError, match=r"alpha=1\.5"):
        mi_alpha(draw(3, 3), 1.5)
    with pytest.raises(ValueError, match="log_baseline"):
        mi_alpha(draw(3, 3), 0.5, torch.zeros(2))
    student, teacher, index = batch()
    crd = make_crd()
    with pytest.raises(TypeError, match="int64"):
        crd(student, teacher, index.float())
    with pytest.raises(ValueError, match="training set's size"):
        crd(student, teacher, index + 20)
    with pytest.raises(ValueError, match="index has shape"):
        crd(student, teacher, index[:3])
    for options in (
        {"items": 1},
        {"temperature": 0},
        {"momentum": 2},
        {"normalizer": "ever"},
        {"normalizer": -1.0},
        {"negatives": 0},
    ):
        with pytest.raises(ValueError, match=next(iter(options))):
            make_crd(**options)


# --- independent libraries ----------------------------------------------------------------------------------


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")
def test_info_nce_and_mi_alpha_equal_ntxent_of_pytorch_metric_learning():
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    student, teacher = draw(12, 6), draw(12, 6, seed=1)
    labels = torch.arange(12)
    oracle = losses.NTXentLoss(temperature=0.1)(
        student,
        labels,
        ref_emb=teacher,
        ref_labels=labels.clone(),  # the same tensor object would mean "do not pair i with i"
    )
    assert torch.allclose(info_nce(student, teacher, temperature=0.1), oracle, rtol=1e-6)
    scores = F.normalize(student) @ F.normalize(teacher).T / 0.1
    assert torch.allclose(math.log(12) - mi_alpha(scores, 1.0, leave_one_out=False), oracle, rtol=1e-6)


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")
def test_crd_equals_torchdistill():
    peer = pytest.importorskip("torchdistill.losses.mid_level")
    torch.manual_seed(0)
    crd = CRD(4, 6, items=64, dim=8, negatives=16)  # a power of two, which its alias sampler needs to start
    oracle = peer.CRDLoss("s", "e", "t", 8, 64, 16, 64, temperature=0.07, momentum=0.5)
    oracle.memory_v1.copy_(crd.student_memory)
    oracle.memory_v2.copy_(crd.teacher_memory)
    for step in range(3):  # Z of the first batch and the moved memories must agree as well
        student, teacher = draw(5, 4, seed=step).float(), draw(5, 6, seed=step + 9).float()
        index = torch.randperm(64)[:5]
        contrast = torch.randint(64, (5, 16))
        with torch.no_grad():
            u, v = F.normalize(crd.student_head(student)), F.normalize(crd.teacher_head(teacher))
        everything = {"pos_idx": index, "contrast_idx": torch.cat([index[:, None], contrast], 1)}
        expected = oracle({"s": {"output": u}, "e": {"input": everything}}, {"t": {"output": v}})
        value = crd(student, teacher, index, contrast)
        assert value.item() == pytest.approx(expected.item(), rel=1e-4)
    assert torch.allclose(crd.student_memory, oracle.memory_v1, atol=1e-6)
