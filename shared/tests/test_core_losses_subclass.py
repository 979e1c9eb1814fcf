"""LELP: exact marginals, scikit-learn's PCA, hidden clusters found, and a student that gains from them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA
from sklearn.metrics import normalized_mutual_info_score
from torch import Tensor, nn

from stillhouse.core.losses.divergence import forward_kl
from stillhouse.core.losses.subclass import PseudoSubclasses, class_logits, lelp_loss


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def problem(seed: int = 0, classes: int = 2, width: int = 8, items: int = 90):
    """Embeddings, labels and a head, with a different spread along every axis."""
    scale = torch.linspace(0.5, 3, width, dtype=torch.float64)
    return (
        draw(items, width, seed=seed) * scale,
        torch.arange(items) % classes,
        draw(classes, width, seed=seed + 1),
    )


# --- the split ----------------------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 10_000),
    classes=st.integers(2, 4),
    subclasses=st.sampled_from([1, 2, 4]),
    t=st.floats(0.5, 5),
)
@settings(max_examples=25, deadline=None)
def test_subclasses_sum_to_the_teachers_class_probability(seed: int, classes: int, subclasses: int, t: float):
    h, labels, head = problem(seed, classes)
    split = PseudoSubclasses.fit(h, labels, head, subclasses=subclasses, seed=seed)
    logits = h @ head.T
    log_targets = split(h, logits, temperature=t)
    assert log_targets.shape == (90, classes, subclasses)
    assert (split.classes, split.subclasses) == (classes, subclasses)
    assert torch.allclose(log_targets.exp().sum(-1), (logits / t).softmax(-1), rtol=1e-12)


def test_projection_empties_the_head():
    h, labels, head = problem()
    split = PseudoSubclasses.fit(h, labels, head, subclasses=2)
    projected = split.project(h)
    assert (head @ projected.T).abs().max() < 1e-12
    assert torch.allclose(split.project(projected), projected)
    doubled = torch.cat([head, head[:1] + head[1:]])  # a dependent row adds nothing to the row space
    again = PseudoSubclasses.fit(h, labels, doubled, subclasses=2)
    assert again.head_basis.shape == (8, 2)
    assert torch.allclose(again.project(h), projected)


def test_moving_the_embedding_along_the_head_changes_no_subclass():
    h, labels, head = problem()
    split = PseudoSubclasses.fit(h, labels, head, subclasses=4)
    assert torch.allclose(split.subclass_logits(h + 7 * head[0]), split.subclass_logits(h))


@pytest.mark.parametrize("pairs", [True, False])
def test_directions_are_scikit_learns_principal_components(pairs: bool):
    h, labels, head = problem()
    split = PseudoSubclasses.fit(h, labels, head, subclasses=4, pairs=pairs, rotate=False)
    for c in range(2):
        projected = split.project(h)[labels == c]
        count = split.directions.shape[1]
        oracle = PCA(n_components=count, svd_solver="full").fit(projected.numpy())
        ours = F.normalize(split.directions[c], dim=1)
        cosines = (ours * torch.from_numpy(oracle.components_)).sum(1)
        assert torch.allclose(cosines.abs(), torch.ones(count, dtype=torch.float64))
        largest = ours.gather(1, ours.abs().argmax(1, keepdim=True))
        assert (largest > 0).all()
        variance = split.directions[c].norm(dim=1) ** -2
        assert torch.allclose(variance, torch.from_numpy(oracle.explained_variance_))
        assert torch.allclose(split.means[c], torch.from_numpy(oracle.mean_))


@pytest.mark.parametrize("rotate", [True, False])
def test_coordinates_have_unit_variance_and_are_uncorrelated_within_their_class(rotate: bool):
    h, labels, head = problem()
    split = PseudoSubclasses.fit(h, labels, head, subclasses=3, pairs=False, rotate=rotate)
    for c in range(2):
        coordinates = split.subclass_logits(h)[labels == c, c]
        assert torch.allclose(torch.cov(coordinates.T), torch.eye(3, dtype=torch.float64), atol=1e-10)
        assert coordinates.mean(0).abs().max() < 1e-10


def test_pairs_are_opposite_and_temperature_divides():
    h, labels, head = problem()
    split = PseudoSubclasses.fit(h, labels, head, subclasses=4)
    u = split.subclass_logits(h)
    assert torch.equal(u[..., :2], -u[..., 2:])
    cold = PseudoSubclasses.fit(h, labels, head, subclasses=4, temperature=0.5)
    assert torch.allclose(cold.subclass_logits(h), 2 * u)


def test_hidden_clusters_are_found():
    """Two clusters per class, apart in a direction the head does not read."""
    for seed in range(3):
        labels = torch.arange(400) % 2
        clusters = torch.arange(400) // 2 % 2
        h = 0.5 * draw(400, 10, seed=seed)
        h[:, 0] += 4 * labels
        h[:, 3] += torch.where(labels == 0, 6.0, 0.0) * clusters
        h[:, 7] += torch.where(labels == 1, 6.0, 0.0) * clusters
        head = torch.zeros(2, 10, dtype=torch.float64)
        head[0, 0], head[1, 0] = -1, 1
        split = PseudoSubclasses.fit(h, labels, head, subclasses=2, seed=seed)
        log_targets = split(h, h @ head.T + torch.tensor([2.0, -2.0]))
        for c in range(2):
            found = log_targets[labels == c, c].argmax(-1)
            assert normalized_mutual_info_score(clusters[labels == c], found) > 0.98


def test_the_split_is_repeatable_and_the_seed_only_rotates():
    h, labels, head = problem()
    one, two, other = (PseudoSubclasses.fit(h, labels, head, subclasses=6, seed=s) for s in (0, 0, 1))
    assert torch.equal(one.directions, two.directions)
    assert not torch.allclose(one.directions, other.directions)
    for c in range(2):  # the same whitened space: R Rᵀ is the identity between them
        gram = [s.directions[c].T @ s.directions[c] for s in (one, other)]
        assert torch.allclose(gram[0], gram[1])


def test_state_dict_round_trip_and_dtype():
    h, labels, head = problem()
    split = PseudoSubclasses.fit(h.float(), labels, head.float(), subclasses=4)
    assert split.means.dtype == torch.float32
    state = split.state_dict()
    blank = PseudoSubclasses(*(torch.zeros_like(state[n]) for n in ("head_basis", "means", "directions")))
    blank.load_state_dict(state)
    logits = (h @ head.T).float()
    assert torch.equal(blank(h.float(), logits), split(h.float(), logits))
    half = split(h.bfloat16(), logits.bfloat16())
    assert half.dtype == torch.float32
    assert torch.allclose(half.exp(), split(h.float(), logits).exp(), atol=0.05)


# --- the loss -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [1.0, 4.0])
def test_one_subclass_is_plain_distillation(t: float):
    h, labels, head = problem(classes=3)
    student, teacher = draw(90, 3, seed=5).requires_grad_(), h @ head.T
    split = PseudoSubclasses.fit(h, labels, head, subclasses=1)
    lelp = lelp_loss(student, split(h, teacher, temperature=t), temperature=t)
    plain = forward_kl(student, teacher, temperature=t)
    assert torch.allclose(lelp, plain, rtol=1e-12)
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (lelp, plain)]
    assert torch.allclose(*gradients, atol=1e-14)
    assert torch.equal(class_logits(student, 1), student)


def test_lelp_loss_is_zero_exactly_at_the_targets_and_bounds_the_class_divergence():
    h, labels, head = problem()
    split = PseudoSubclasses.fit(h, labels, head, subclasses=4)
    log_targets = split(h, h @ head.T)
    assert abs(lelp_loss(log_targets.flatten(1) + 3, log_targets)) < 1e-14
    student = draw(90, 8, seed=2)
    fine = lelp_loss(student, log_targets, reduction="none")
    coarse = forward_kl(class_logits(student, 4), h @ head.T, reduction="none")
    assert (fine >= coarse - 1e-12).all()  # data-processing inequality


def test_lelp_loss_mask_and_gradcheck():
    h, labels, head = problem()
    split = PseudoSubclasses.fit(h, labels, head, subclasses=2)
    log_targets = split(h, h @ head.T)[:6]
    student = draw(6, 4).requires_grad_()
    mask = torch.tensor([1, 0, 1, 1, 0, 1]).bool()
    assert torch.allclose(
        lelp_loss(student, log_targets, mask=mask), lelp_loss(student[mask], log_targets[mask])
    )
    assert torch.autograd.gradcheck(
        lambda s: lelp_loss(s, log_targets, temperature=2.0, mask=mask), (student,)
    )
    assert torch.autograd.gradcheck(lambda s: class_logits(s, 2), (student,))


def test_lelp_loss_bfloat16():
    h, labels, head = problem()
    split = PseudoSubclasses.fit(h, labels, head, subclasses=2)
    log_targets = split(h, h @ head.T).float()
    student = draw(90, 4).bfloat16()
    value = lelp_loss(student, log_targets)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(lelp_loss(student.double(), log_targets.double()).item(), rel=1e-4)


def test_targets_carry_no_gradient():
    h, labels, head = problem()
    split = PseudoSubclasses.fit(h, labels, head, subclasses=2)
    assert not list(split.parameters())
    assert not split(h.requires_grad_(), (h @ head.T).requires_grad_()).requires_grad


@given(seed=st.integers(0, 10_000), subclasses=st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_class_logits_are_the_marginals(seed: int, subclasses: int):
    z = draw(5, 3 * subclasses, seed=seed)
    expected = z.softmax(-1).reshape(5, 3, subclasses).sum(-1)
    assert torch.allclose(class_logits(z, subclasses).softmax(-1), expected)


def test_errors_name_what_is_wrong():
    h, labels, head = problem()
    with pytest.raises(ValueError, match="subclasses=3"):
        PseudoSubclasses.fit(h, labels, head, subclasses=3)
    with pytest.raises(ValueError, match="class 0 varies along only 6 directions"):
        PseudoSubclasses.fit(h, labels, head, subclasses=7, pairs=False)
    with pytest.raises(ValueError, match="class 1 has 1 items"):
        PseudoSubclasses.fit(h, (torch.arange(90) == 0).long(), head, subclasses=2)
    with pytest.raises(TypeError, match="int64"):
        PseudoSubclasses.fit(h, labels.float(), head, subclasses=2)
    with pytest.raises(ValueError, match=r"\[N, D\] and \[C, D\]"):
        PseudoSubclasses.fit(h, labels, head[:, :5], subclasses=2)
    split = PseudoSubclasses.fit(h, labels, head, subclasses=2)
    with pytest.raises(ValueError, match="teacher_logits have shape"):
        split(h, draw(90, 3))
    with pytest.raises(ValueError, match="embeddings must be"):
        split.subclass_logits(draw(90, 5))
    with pytest.raises(ValueError, match="one output per subclass"):
        lelp_loss(draw(90, 3), split(h, h @ head.T))
    with pytest.raises(ValueError, match="must divide"):
        class_logits(draw(2, 5), 2)
    with pytest.raises(ValueError, match=r"\[C, k, D\]"):
        PseudoSubclasses(draw(8, 2), draw(2, 8), draw(2, 1, 5))


# --- ablation -----------------------------------------------------------------------------------------------


def xor_task(items: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Class = sign product of two inputs among twenty; the teacher's embedding also knows the first sign.

    Returns inputs, labels, teacher embeddings, teacher logits and the head.
    """
    x = draw(items, 20, seed=seed, dtype=torch.float32)
    signs = torch.randint(2, (items, 2), generator=torch.Generator().manual_seed(seed)) * 2 - 1
    x[:, :2] = signs * (1 + 0.3 * x[:, :2])
    label = (signs.prod(1) > 0).long()
    h = 0.3 * draw(items, 6, seed=seed + 1, dtype=torch.float32)
    h[:, 0] += 2.0 * label - 1
    h[:, 1] += signs[:, 0]
    head = torch.zeros(2, 6)
    head[0, 0], head[1, 0] = -3, 3
    return x, label, h, h @ head.T, head


def student_accuracy(target: str, seed: int) -> float:
    x, label, h, logits, head = xor_task(160, seed=10 * seed)
    subclasses = 1 if target == "kd" else 2
    split = PseudoSubclasses.fit(h, label, head, subclasses=subclasses, temperature=0.3)
    if target == "shuffled":  # the same marginals, subclasses of another item
        within = split.subclass_logits(h).log_softmax(-1)
        order = torch.randperm(160, generator=torch.Generator().manual_seed(seed))
        log_targets = logits.log_softmax(-1)[..., None] + within[order]
    else:
        log_targets = split(h, logits)
    torch.manual_seed(seed)
    student = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 2 * subclasses))
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.02, weight_decay=0.1)
    for _ in range(150):
        loss = lelp_loss(student(x), log_targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    test_x, test_label, *_ = xor_task(2000, seed=10 * seed + 5)
    with torch.no_grad():
        return (class_logits(student(test_x), subclasses).argmax(1) == test_label).float().mean().item()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads cost more than they bring for networks this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_a_student_gains_from_subclasses_with_few_items_and_not_from_shuffled_ones():
    accuracy = {
        target: [student_accuracy(target, seed) for seed in range(3)] for target in ("kd", "lelp", "shuffled")
    }
    mean = {target: sum(values) / len(values) for target, values in accuracy.items()}
    assert mean["lelp"] > mean["kd"] + 0.2, accuracy
    assert mean["lelp"] > mean["shuffled"] + 0.2, accuracy
