"""GEMINI, the guided student and their batches: what is trained, what is frozen, what a term is worth."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from stillhouse.core.errors import ConfigError, DataError
from stillhouse.core.testing import assert_gradient, assert_no_gradient
from stillhouse.core.train import Step
from stillhouse.kidney.config import DistillConfig, ModelConfig, TeacherConfig
from stillhouse.kidney.distiller import Classifier, ClassifierDistiller, GuidedDistiller, MetricLoss
from stillhouse.kidney.hypothesis import hypothesis_logits, mean_posterior
from stillhouse.kidney.sampling import EpisodeSampler, GuidedSampler, Layout
from stillhouse.kidney.student import (
    Student,
    StudentConfig,
    Trunk,
    build_student,
    imagenet_names,
    load_imagenet_weights,
)
from stillhouse.kidney.teacher import Gemini, GeminiDistiller, episode_rows, mutual_cka, teacher_posterior

MODEL = ModelConfig(width=4, dim=8, teacher_width=4, teacher_dim=6)
LAYOUT = Layout(classes=3, per_class=4, support=2, pool=5)


def _step(index: int = 0, total: int = 10, role: str = "student") -> Step:
    return Step(index, total, 0, role, 0, 1, None, torch.device("cpu"), 0, 1)


def _batch(layout: Layout = LAYOUT, copies: int = 1, seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    labels = torch.cat(
        [torch.arange(layout.classes).repeat_interleave(layout.per_class), torch.full((2 * layout.pool,), -1)]
    ).repeat(copies)
    images = torch.randn(len(labels), 3, 32, 32, generator=g)
    index = torch.cat([torch.arange(layout.labelled), 12 + torch.arange(layout.pool).repeat(2)]).repeat(
        copies
    )
    return {"image": images, "label": labels, "index": index}


def _teacher(branches: tuple[str, ...] = ("class", "image"), model: ModelConfig = MODEL) -> Gemini:
    torch.manual_seed(1)
    return Gemini(model, branches)


def _gemini(config: TeacherConfig, layout: Layout = LAYOUT) -> GeminiDistiller:
    labels = [*torch.arange(3).repeat_interleave(4).tolist(), *[-1] * 5]
    return GeminiDistiller(_teacher(config.branches), config, layout, num_classes=3, labels=labels)


def _guided(
    config: DistillConfig, *, teacher: Gemini | None = None, layout: Layout = LAYOUT
) -> GuidedDistiller:
    torch.manual_seed(2)
    student = build_student(StudentConfig(width=4, dim=8, image_size=32))
    return GuidedDistiller(student, teacher, config, layout, num_classes=3, teacher_tau=0.1)


# ---- networks


def test_embeddings_have_length_one_and_branches_lie_side_by_side() -> None:
    teacher = _teacher().eval()
    images = torch.randn(3, 3, 32, 32)
    embedding, parts = teacher(images), teacher.branches(images)
    torch.testing.assert_close(embedding.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(embedding * 2**0.5, torch.cat(parts, dim=1))


def test_separate_trunks_share_nothing_and_a_shared_one_is_one() -> None:
    shared, separate = _teacher(), _teacher(model=replace(MODEL, teacher_trunk="separate"))
    assert len(shared.trunks) == 1
    assert len(separate.trunks) == 2
    loss = separate.branches(torch.randn(4, 3, 32, 32))[0].sum()
    assert_no_gradient(loss, list(separate.trunks[1].parameters()))


def test_a_bottleneck_student_has_the_papers_size() -> None:
    trunk = Trunk("resnet50", 64, "imagenet")
    assert trunk.features == 2048
    # The standard ResNet-50 has 25,557,032 parameters, 2,049,000 of them in its classifier.
    assert sum(p.numel() for p in trunk.parameters()) == 25_557_032 - 2_049_000


def test_features_are_the_embedding_before_its_length_is_one() -> None:
    student = build_student(StudentConfig(width=4, dim=8, image_size=32)).eval()
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(F.normalize(student.features(images), dim=1), student(images))
    assert not torch.allclose(student.features(images).norm(dim=1), torch.ones(2), atol=1e-2)


def test_weights_of_another_network_are_refused_by_name(tmp_path) -> None:
    from safetensors.torch import save_file

    narrow, wide = Trunk("resnet10", 4, "imagenet"), Trunk("resnet10", 8, "imagenet")
    save_file(imagenet_names(narrow), tmp_path / "narrow.safetensors")
    with pytest.raises(
        DataError, match=r"narrow\.safetensors: does not fit .*conv1.weight is \(4, 3, 7, 7\)"
    ):
        load_imagenet_weights(wide, tmp_path / "narrow.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "narrow.safetensors").read_bytes()[:100])
    with pytest.raises(DataError, match=r"cut\.safetensors: is no readable state dict"):
        load_imagenet_weights(narrow, tmp_path / "cut.safetensors")
    with pytest.raises(DataError, match="no such file"):
        load_imagenet_weights(narrow, tmp_path / "none.safetensors")


def test_weights_saved_by_torch_load_with_their_classifier_left_out(tmp_path) -> None:
    source, target = Trunk("resnet10", 4, "imagenet"), Trunk("resnet10", 4, "imagenet")
    torch.save({**imagenet_names(source), "fc.weight": torch.zeros(5, 32)}, tmp_path / "weights.pth")
    assert load_imagenet_weights(target, tmp_path / "weights.pth") == len(source.net.state_dict())
    assert torch.equal(source.net.layer4[0].conv2.weight, target.net.layer4[0].conv2.weight)


def test_both_networks_start_from_the_same_file_where_asked(tmp_path) -> None:
    from safetensors.torch import save_file

    from stillhouse.kidney.config import KidneyConfig
    from stillhouse.kidney.fit import new_student, new_teacher

    source = Trunk("resnet10", 4, "imagenet")
    save_file(imagenet_names(source), tmp_path / "w.safetensors")
    model = ModelConfig(
        width=4,
        teacher_width=4,
        stem="imagenet",
        weights=str(tmp_path / "w.safetensors"),
        teacher_from_weights=True,
        teacher_trunk="separate",
    )
    config = KidneyConfig(model=model)
    for trunk in (new_student(config, 0).trunk, *new_teacher(config, 0).trunks):
        assert torch.equal(trunk.net.layer3[0].conv1.weight, source.net.layer3[0].conv1.weight)
    fresh = new_teacher(KidneyConfig(model=replace(model, teacher_from_weights=False)), 0)
    assert not torch.equal(fresh.trunks[0].net.conv1.weight, source.net.conv1.weight)
    with pytest.raises(ConfigError, match=r"teacher_from_weights needs model\.weights"):
        replace(model, teacher_width=8)


@pytest.mark.parametrize("field", [{"backbone": "vgg"}, {"stem": "big"}, {"width": 0}, {"dim": True}])
def test_a_student_that_cannot_be_built_is_refused(field: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        StudentConfig(**field)  # type: ignore[arg-type]


# ---- batches


def test_support_and_queries_of_an_episode_are_different_images() -> None:
    labels = np.arange(3).repeat(5)
    sampler = EpisodeSampler(labels.tolist(), Layout(3, 6, 3, 4), pool=7, seed=0, length=20)
    for batch in sampler:
        block = np.array(batch[:18]).reshape(3, 6)
        for c, row in enumerate(block):
            assert set(labels[row]) == {c}
            assert not set(row[:3]) & set(row[3:])
        assert batch[18:22] == batch[22:26]
        assert len(set(batch[18:22])) == 4


def test_a_class_with_one_image_is_support_and_query() -> None:
    sampler = EpisodeSampler([0, 1, 1], Layout(2, 2, 1, 0), pool=0, seed=0, length=3)
    assert all(batch[0] == batch[1] == 0 and batch[2] != batch[3] for batch in sampler)


def test_fewer_ways_than_classes_draw_different_classes() -> None:
    labels = np.arange(6).repeat(4)
    sampler = EpisodeSampler(labels.tolist(), Layout(2, 4, 2, 0), pool=0, seed=1, length=60)
    seen = {tuple(sorted(set(labels[batch]))) for batch in sampler}
    assert all(len(pair) == 2 for pair in seen)
    assert len(seen) > 8


@pytest.mark.parametrize("kind", [EpisodeSampler, GuidedSampler])
def test_batches_follow_from_seed_and_epoch_alone(kind: type) -> None:
    labels = np.arange(3).repeat(5).tolist()
    make = lambda seed: kind(labels, Layout(3, 4, 2, 3), pool=9, seed=seed, length=5)  # noqa: E731
    one, two, other = make(0), make(0), make(1)
    for sampler in (one, two, other):
        sampler.set_epoch(3)
    first = list(one)
    np.random.rand(5)  # the global generator does not matter  # noqa: NPY002
    assert first == list(two)
    assert first != list(other)
    two.set_epoch(4)
    assert first != list(two)


def test_a_guided_batch_has_m_images_of_each_class_and_the_pool_twice() -> None:
    labels = np.arange(4).repeat(3)
    sampler = GuidedSampler(labels.tolist(), Layout(4, 5, 0, 6), pool=10, seed=0, length=8, replicas=2)
    for batch in sampler:
        assert len(batch) == 2 * (20 + 12)
        for half in (batch[:32], batch[32:]):
            assert np.bincount(labels[half[:20]], minlength=4).tolist() == [5] * 4
            assert half[20:26] == half[26:32]
            assert min(half[20:]) >= 12


# ---- teacher


def test_the_posterior_is_the_mean_over_branches_and_leaves_the_support_itself_out() -> None:
    branches = [F.normalize(torch.randn(9, 4), dim=1) for _ in range(2)]
    labels, support, query = torch.tensor([0, 0, 1, 1]), torch.arange(4), torch.arange(4, 9)
    got = teacher_posterior(branches, query, support, labels, 2, tau=0.2)
    expected = mean_posterior([hypothesis_logits(z[4:], z[:4], labels, 2, tau=0.2) for z in branches])
    torch.testing.assert_close(got, expected)
    own = teacher_posterior(branches, support, support, labels, 2, tau=0.2)
    direct = mean_posterior([hypothesis_logits(z[:4], z[:4], labels, 2, tau=0.2) for z in branches])
    assert (own.gather(1, labels[:, None]) < direct.gather(1, labels[:, None])).all()


def test_the_episode_loss_is_the_cross_entropy_of_the_queries() -> None:
    config = TeacherConfig(branches=("class",), pool=0, refine=0.0, tau=0.3)
    layout = replace(LAYOUT, pool=0)
    distiller = GeminiDistiller(_teacher(("class",)), config, layout, num_classes=3, labels=[0, 1, 2] * 4)
    batch = _batch(layout)
    got = distiller.loss("teacher", batch, _step(role="teacher"))
    (z,) = distiller.network.branches(batch["image"])
    support, query = episode_rows(layout)
    logits = hypothesis_logits(z[query], z[support], batch["label"][support], 3, tau=0.3)
    torch.testing.assert_close(got.total, F.cross_entropy(logits, batch["label"][query]))


def test_the_classifier_of_a_branch_is_smoothed_cross_entropy_and_is_thrown_away() -> None:
    config = TeacherConfig(
        branches=("class",), pool=0, refine=0.0, episode_weight=0.0, classify_weight=2.0, smoothing=0.1
    )
    layout = replace(LAYOUT, pool=0)
    distiller = GeminiDistiller(_teacher(("class",)), config, layout, num_classes=3, labels=[0, 1, 2] * 4)
    batch = _batch(layout)
    got = distiller.loss("teacher", batch, _step(role="teacher"))
    (raw,) = distiller.network.raw_branches(batch["image"])
    log = distiller._classify[0](raw).log_softmax(-1)
    target = 0.9 * F.one_hot(batch["label"], 3) + 0.1 / 3
    torch.testing.assert_close(got.total, -2.0 * (target * log).sum(-1).mean())
    assert not any("classify" in name for name in distiller.network.state_dict())


def test_two_layouts_in_a_batch_give_the_mean_of_their_losses() -> None:
    distiller = _gemini(TeacherConfig(refine=0.0, diversity=0.3))
    distiller.network.eval()  # batch normalisation would mix the two
    one, two = _batch(seed=1), _batch(seed=2)
    both = {name: torch.cat([one[name], two[name]]) for name in one}
    values = [distiller.loss("teacher", b, _step()).total for b in (one, two, both)]
    torch.testing.assert_close(values[2], (values[0] + values[1]) / 2)


def test_the_image_branch_needs_no_labels_and_the_class_branch_no_pool() -> None:
    model = replace(MODEL, teacher_trunk="separate")
    config = TeacherConfig(refine=0.0)
    network = Gemini(model, config.branches)
    distiller = GeminiDistiller(network, config, LAYOUT, num_classes=3, labels=[0, 1, 2] * 4 + [-1] * 5)
    # The terms are detached in the log, so each is asked for alone.
    branches = network.branches(_batch()["image"])
    terms = distiller._episode(branches, _batch()["label"], _batch()["index"], _step())
    assert_no_gradient(terms["image"], list(network.trunks[0].parameters()))
    assert_no_gradient(terms["episode"], list(network.trunks[1].parameters()))


def test_refined_targets_are_the_closed_form_of_two_visits() -> None:
    config = TeacherConfig(refine_start=0.0, refine_momentum=0.5, refine_confidence=0.0)
    distiller = _gemini(config)
    first, second = torch.tensor([[0.8, 0.1, 0.1]]), torch.tensor([[0.2, 0.7, 0.1]])
    row = torch.tensor([12])
    distiller._targets_of(row, first)
    target, sure = distiller._targets_of(row, second)
    kept = (first + second) / 2
    torch.testing.assert_close(distiller._targets[12:13], kept)
    ratio = (kept / kept.clamp_min(0.02)) ** 2  # the prior is the mean over the images seen: this one
    torch.testing.assert_close(target, ratio / ratio.sum())
    assert sure.tolist() == [1.0]


def test_a_labelled_image_keeps_its_label_as_target() -> None:
    distiller = _gemini(TeacherConfig(refine_start=0.0))
    target, _ = distiller._targets_of(torch.tensor([0]), torch.tensor([[0.1, 0.1, 0.8]]))
    assert target.tolist() == [[1.0, 0.0, 0.0]]


def test_refinement_waits_for_its_start_and_survives_a_resume() -> None:
    distiller = _gemini(TeacherConfig(refine_start=0.5, refine_confidence=0.0))
    assert distiller.loss("teacher", _batch(), _step(4)).terms["refine"].item() == 0.0
    assert distiller.loss("teacher", _batch(), _step(5)).terms["refine"].item() > 0.0
    twin = _gemini(TeacherConfig(refine_start=0.5, refine_confidence=0.0))
    twin.load_state_dict(distiller.state_dict())
    assert torch.equal(twin._targets, distiller._targets)
    assert torch.equal(twin._seen, distiller._seen)


def test_branches_that_are_alike_are_told_apart_by_cka() -> None:
    a = torch.randn(20, 4, requires_grad=True)
    b = torch.randn(20, 4, requires_grad=True)
    assert mutual_cka(a, a).item() == pytest.approx(1.0, abs=1e-5)
    assert mutual_cka(a, b).item() < 0.7
    assert_gradient(mutual_cka(a, b), [a, b])


# ---- student


@pytest.mark.parametrize("method", ["hypothesis", "rkd"])
def test_distillation_reaches_the_student_and_never_the_teacher(method: str) -> None:
    teacher = _teacher()
    distiller = _guided(DistillConfig(method=method), teacher=teacher)
    losses = distiller.loss("student", _batch(), _step())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not teacher.training
    assert_gradient(losses.total, list(distiller.student.trunk.parameters()))
    assert {id(p) for p in distiller.parts.parameters()}.isdisjoint({id(p) for p in teacher.parameters()})
    assert losses.weights == {"metric": 1.0, method: 1.0}


def test_a_student_that_equals_its_teacher_has_no_hypothesis_loss() -> None:
    model = ModelConfig(width=4, dim=8, teacher_width=4, teacher_dim=8)
    config = DistillConfig(method="hypothesis", consensus=False, tau=0.1)
    distiller = _guided(config, teacher=Gemini(model, ("class",)))
    assert distiller.teacher is not None
    distiller.teacher.trunks[0].load_state_dict(distiller.student.trunk.state_dict())
    distiller.teacher.heads[0].load_state_dict(distiller.student.head.state_dict())
    distiller.parts.eval()  # the frozen teacher is in evaluation mode
    value = distiller.loss("student", _batch(), _step()).terms["hypothesis"]
    assert float(value.detach()) == pytest.approx(0.0, abs=1e-6)
    shuffled = replace(config, shuffle_teacher=True)
    other = GuidedDistiller(
        distiller.student, distiller.teacher, shuffled, LAYOUT, num_classes=3, teacher_tau=0.1
    )
    assert float(other.loss("student", _batch(), _step()).terms["hypothesis"].detach()) > 1e-3


def test_consensus_gives_both_windows_of_an_image_one_answer() -> None:
    teacher = _teacher()
    alone = _guided(DistillConfig(consensus=False), teacher=teacher)
    agreed = _guided(DistillConfig(consensus=True), teacher=teacher)
    batch = _batch()
    batch["image"][LAYOUT.labelled + LAYOUT.pool :] = batch["image"][
        LAYOUT.labelled : LAYOUT.labelled + LAYOUT.pool
    ]
    values = [float(d.loss("student", batch, _step()).terms["hypothesis"].detach()) for d in (alone, agreed)]
    assert values[0] == pytest.approx(values[1], abs=1e-6)  # the same window twice: nothing to agree on
    different = [
        float(d.loss("student", _batch(), _step()).terms["hypothesis"].detach()) for d in (alone, agreed)
    ]
    assert different[0] != pytest.approx(different[1], abs=1e-4)


def test_rkd_is_zero_for_a_scaled_turned_and_shifted_teacher_and_the_metric_loss_is_not() -> None:
    from stillhouse.core.losses import rkd_angle, rkd_distance

    raw = torch.randn(12, 8, dtype=torch.float64)
    q, _ = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))
    target = 3.0 * raw @ q + 1.5
    assert float(rkd_distance(raw, target)) == pytest.approx(0.0, abs=1e-20)
    assert float(rkd_angle(raw, target)) == pytest.approx(0.0, abs=1e-20)
    assert float(F.mse_loss(raw, target)) > 1.0


def test_s2sd_teaches_itself_and_its_feature_term_waits() -> None:
    distiller = _guided(DistillConfig(method="s2sd", s2sd_delay=0.5), layout=replace(LAYOUT, pool=0))
    batch = _batch(replace(LAYOUT, pool=0))
    assert distiller.frozen() == {}
    early = distiller.loss("student", batch, _step(0))
    late = distiller.loss("student", batch, _step(6))
    assert early.terms["s2sd"].item() != pytest.approx(late.terms["s2sd"].item(), abs=1e-6)
    assert early.terms["metric"].item() == pytest.approx(late.terms["metric"].item(), abs=1e-6)
    assert_gradient(early.total, list(distiller.parts["wide"].parameters()))


@pytest.mark.parametrize("name", ["multi_similarity", "triplet", "contrastive", "proxy_anchor"])
def test_metric_losses_fall_when_a_student_follows_them(name: str) -> None:
    torch.manual_seed(0)
    loss = MetricLoss(name, num_classes=3, dim=4)
    points = torch.nn.Parameter(torch.randn(12, 4))
    labels = torch.arange(3).repeat_interleave(4)
    optimizer = torch.optim.SGD([points, *loss.parameters()], lr=0.2)
    values = []
    for _ in range(40):
        value = loss(F.normalize(points, dim=1), labels)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(float(value.detach()))
    assert min(values[-5:]) < 0.7 * values[0]


def test_a_method_with_a_teacher_needs_one() -> None:
    with pytest.raises(ValueError, match="'hypothesis' needs a teacher"):
        _guided(DistillConfig(method="hypothesis"))


def test_the_classifier_is_plain_cross_entropy() -> None:
    torch.manual_seed(0)
    network = Classifier(Student(StudentConfig(width=4, dim=8, image_size=32)), 3)
    batch = _batch(replace(LAYOUT, pool=0))
    got = ClassifierDistiller(network, smoothing=0.0).loss("student", batch, _step())
    expected = -network(batch["image"]).log_softmax(-1).gather(1, batch["label"][:, None]).mean()
    torch.testing.assert_close(got.total, expected)
    torch.testing.assert_close(network.embed(batch["image"]).norm(dim=1), torch.ones(12))
