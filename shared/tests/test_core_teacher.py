from __future__ import annotations

import copy
import math
import pickle
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from stillhouse.core.losses import forward_kl
from stillhouse.core.teacher import (
    DenseSignal,
    EmbeddingSignal,
    FrozenTeacher,
    HiddenSignal,
    MultiTeacher,
    OnlineTeacher,
    RelationSignal,
    ServedTeacher,
    SparseTeacher,
    TeacherSource,
    assert_frozen,
    combine_logits,
    freeze,
    to_device,
    weight_hash,
)


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- frozen
# -----------------------------------------------------------------------------------------------------


def test_freeze_survives_every_way_of_calling_train():
    teacher = freeze(network())
    parent = nn.ModuleDict({"student": network(1), "teacher": teacher})
    x = normal(0, 16, 4, dtype=torch.float32) + 5.0
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    expected = teacher(x)
    parent.train()
    teacher.train(True)
    teacher[2].train()
    assert parent["student"].training
    assert torch.equal(teacher(x), expected)  # dropout is off, the running statistics are used
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    assert_frozen(teacher)


def test_gradients_flow_through_freeze_but_not_through_frozen_teacher():
    x = normal(0, 2, 4, dtype=torch.float32).requires_grad_()
    freeze(network())(x).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    for mode in ("no_grad", "inference"):
        assert not FrozenTeacher(network(), mode)(x).requires_grad


@pytest.mark.parametrize("mode", ["no_grad", "inference"])
def test_teacher_is_invisible_to_checkpoint_and_optimizer_but_moves(mode: str):
    class Method(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student = network(1)
            self.teacher = FrozenTeacher(network(0), mode)  # type: ignore[arg-type]

    method = Method().train()
    assert all(name.startswith("student.") for name in method.state_dict())
    assert all(name.startswith("student.") for name, _ in method.named_parameters())
    optimizer = torch.optim.SGD(method.parameters(), lr=1.0)
    assert_frozen(method.teacher, optimizers=[optimizer], owners=[method.student, method])
    digest = weight_hash(method.teacher)
    x = normal(3, 6, 4, dtype=torch.float32)
    loss = forward_kl(method.student(x), method.teacher(x), temperature=2.0)
    loss.backward()  # inference tensors would raise here
    optimizer.step()
    assert weight_hash(method.teacher) == digest
    assert not method.teacher.module[2].training
    method.double()
    assert method.teacher.module[0].weight.dtype == torch.float64


def test_inference_mode_copies_any_nest_and_refuses_the_unknown():
    Pair = namedtuple("Pair", "a b")

    class Nest(nn.Module):
        def forward(self, x: Tensor, kind: str) -> object:
            pair = Pair(x * 2, [x, None])
            return {"nest": {"pair": pair, "n": 3}, "object": SimpleNamespace(x=x)}[kind]

    x = torch.ones(2, requires_grad=True)
    output = FrozenTeacher(Nest(), "inference")(x, kind="nest")
    assert isinstance(output["pair"], Pair)
    assert not output["pair"].a.is_inference()
    (output["pair"].a * x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [2.0, 2.0]
    with pytest.raises(TypeError, match="SimpleNamespace"):
        FrozenTeacher(Nest(), "inference")(x, kind="object")
    with pytest.raises(ValueError, match="grad_mode"):
        FrozenTeacher(Nest(), "grad")  # type: ignore[arg-type]


def test_frozen_modules_can_be_copied_and_pickled():
    teacher = freeze(network())
    for twin in (copy.deepcopy(teacher), pickle.loads(pickle.dumps(teacher))):
        assert weight_hash(twin) == weight_hash(teacher)
        assert twin.train()[2].training is False
        assert twin.train() is twin


def test_assert_frozen_names_each_problem():
    teacher = network()
    with pytest.raises(
        ValueError, match=r"the module itself is in training mode.*0\.weight requires a gradient"
    ):
        assert_frozen(teacher)
    freeze(teacher)
    optimizers = [torch.optim.SGD(network().parameters(), lr=1), torch.optim.SGD([teacher[3].bias], lr=1)]
    with pytest.raises(ValueError, match=r"3\.bias is in optimizer 1"):
        assert_frozen(teacher, optimizers=optimizers)
    student = network()
    student[3].weight = nn.Parameter(teacher[3].weight.data)  # shared memory, not the same object
    with pytest.raises(ValueError, match=r"3\.weight is 3\.weight of owner 0 \(Sequential\)"):
        assert_frozen(teacher, owners=[student])
    student[3].weight = nn.Parameter(teacher[3].weight.clone())
    assert_frozen(teacher, owners=[student])


def test_weight_hash_sees_values_names_dtypes_shapes_and_nothing_else():
    state = {"a": torch.arange(6.0), "b": torch.tensor(1, dtype=torch.int64)}
    digest = weight_hash(state)
    assert weight_hash(dict(reversed(state.items()))) == digest
    assert weight_hash({**state, "note": "text"}) == digest
    changed = state["a"].clone()
    changed.view(torch.int32)[3] ^= 1  # one bit
    for other in (
        {**state, "a": changed},
        {**state, "a": state["a"].reshape(2, 3)},
        {**state, "a": state["a"].double()},
        {"c": state["a"], "b": state["b"]},
    ):
        assert weight_hash(other) != digest
    assert weight_hash({"w": torch.arange(6.0).reshape(2, 3).T}) == weight_hash(
        {"w": torch.arange(6.0).reshape(2, 3).T.contiguous()}
    )
    assert len(weight_hash({"w": torch.ones(3, dtype=torch.bfloat16), "e": torch.empty(0)})) == 64


# --- sources
# ----------------------------------------------------------------------------------------------------


def test_online_teacher_reads_the_usual_outputs():
    class Keyword(nn.Module):
        def forward(self, x: Tensor, scale: float = 1.0, style: str = "tensor") -> object:
            z = x * scale
            return {"tensor": z, "mapping": {"logits": z}, "object": SimpleNamespace(logits=z), "bad": 3}[
                style
            ]

    teacher, x = OnlineTeacher(Keyword()), torch.ones(2, 3, requires_grad=True)
    assert isinstance(teacher, TeacherSource)
    for style in ("tensor", "mapping", "object"):
        signal = teacher.signal({"x": x, "scale": 2.0, "style": style})
        assert isinstance(signal, DenseSignal)
        assert torch.equal(signal.logits, torch.full((2, 3), 2.0))
        assert not signal.logits.requires_grad
    assert isinstance(teacher.signal((x, 3.0)), DenseSignal)
    with pytest.raises(TypeError, match="read="):
        teacher.signal((x, 1.0, "bad"))
    with pytest.raises(ValueError, match="inputs"):
        teacher.signal(ids=[1])
    embed = OnlineTeacher(Keyword(), read=EmbeddingSignal)
    assert isinstance(embed.signal(x), EmbeddingSignal)


def test_served_teacher_does_not_trust_its_answer():
    good = ServedTeacher(lambda inputs, ids: torch.zeros(len(ids), 5, requires_grad=True), device="cpu")
    signal = good.signal(ids=["a", "b"])
    assert isinstance(signal, DenseSignal)
    assert signal.logits.shape == (2, 5)
    assert not signal.logits.requires_grad
    sparse = SparseTeacher.from_logits(normal(0, 2, 9), k=3)
    assert ServedTeacher(lambda inputs, ids: sparse).signal(torch.zeros(2, 1)) is sparse
    for answer, error, word in (
        (torch.zeros(3, 5), ValueError, "2 samples"),
        (torch.tensor(1.0), ValueError, "2 samples"),
        (torch.full((2, 5), math.nan), ValueError, "NaN in logits"),
        (HiddenSignal({"h": torch.full((2, 5), math.nan)}), ValueError, "NaN in values"),
        ([1, 2], TypeError, "list"),
    ):
        with pytest.raises(error, match=word):
            ServedTeacher(lambda inputs, ids, answer=answer: answer).signal({"x": torch.zeros(2, 1)})
    minus = torch.tensor([[0.0, -math.inf]])
    assert ServedTeacher(lambda inputs, ids: minus).signal(ids=torch.tensor([4])) is not None


def test_to_device_moves_every_tensor_and_keeps_the_rest():
    moved = to_device(HiddenSignal({"a": torch.zeros(1), "b": torch.zeros(1)}), "meta")
    assert isinstance(moved, HiddenSignal)
    assert all(tensor.device.type == "meta" for tensor in moved.values.values())
    sparse = to_device(SparseTeacher.from_logits(normal(0, 2, 9), k=3, temperatures=(1.0, 2.0)), "meta")
    assert isinstance(sparse, SparseTeacher)
    assert sparse.lse is not None
    assert {t.device.type for t in (sparse.ids, sparse.logits, sparse.lse)} == {"meta"}
    assert sparse.temperatures == (1.0, 2.0)
    relation = to_device(RelationSignal(torch.zeros(2, 2), log_values=True), "meta")
    assert isinstance(relation, RelationSignal)
    assert relation.log_values


# --- several
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_weighted_sum_of_kl_has_the_gradient_of_the_mixture(temperature: float):
    teachers = [normal(m, 5, 7) * 3 for m in range(3)]
    weights = [0.5, 0.2, 0.3]
    student = normal(9, 5, 7).requires_grad_()
    summed = sum(
        w * forward_kl(student, z, temperature=temperature) for w, z in zip(weights, teachers, strict=True)
    )
    assert isinstance(summed, Tensor)
    (one,) = torch.autograd.grad(summed, student)
    mixture = combine_logits(teachers, "prob_mean", weights=weights, temperature=temperature)
    assert mixture.dtype == torch.float64
    (two,) = torch.autograd.grad(forward_kl(student, mixture, temperature=temperature), student)
    torch.testing.assert_close(one, two, rtol=0, atol=1e-15)
    # the values differ by the Jensen-Shannon divergence of the teachers, which the student cannot change
    p = [torch.softmax(z / temperature, -1) for z in teachers]
    mean = sum(w * q for w, q in zip(weights, p, strict=True))
    jsd = sum(w * (q * (q / mean).log()).sum(-1).mean() for w, q in zip(weights, p, strict=True))
    difference = summed - forward_kl(student, mixture, temperature=temperature)
    assert difference.item() == pytest.approx(temperature**2 * float(jsd), rel=1e-10)


def test_modes_against_their_definitions():
    z = [normal(m, 4, 6, dtype=torch.float32) for m in range(3)]
    w, t = [1.0, 2.0, 5.0], 2.5
    p = torch.stack([torch.softmax(x / t, -1) for x in z])
    share = torch.tensor(w)[:, None, None] / 8
    mean = torch.softmax(combine_logits(z, "prob_mean", weights=w, temperature=t) / t, -1)
    torch.testing.assert_close(mean, (share * p).sum(0))
    geometric = p.pow(share).prod(0)
    geometric = geometric / geometric.sum(-1, keepdim=True)
    log_mean = combine_logits(z, "log_prob_mean", weights=w, temperature=t)
    torch.testing.assert_close((log_mean / t).exp(), geometric)  # normalised already
    logit_mean = combine_logits(z, "logit_mean", weights=w, temperature=t)
    torch.testing.assert_close(logit_mean, sum(a * b for a, b in zip([0.125, 0.25, 0.625], z, strict=True)))
    torch.testing.assert_close(torch.softmax(logit_mean / t, -1), geometric)  # one distribution
    assert not torch.allclose(logit_mean, log_mean, atol=0.1)  # other logits


def test_min_entropy_picks_row_by_row_at_its_temperature():
    sharp, flat = torch.tensor([9.0, 0.0, 0.0]), torch.tensor([1.0, 0.9, 0.0])
    z = [torch.stack([sharp, flat, flat]), torch.stack([flat, sharp, flat + 1])]
    chosen = combine_logits(z, "min_entropy")
    assert torch.equal(chosen, torch.stack([sharp, sharp, flat]))
    masked = torch.tensor([[-math.inf, 1.0, -math.inf]])
    assert torch.equal(combine_logits([flat[None], masked], "min_entropy"), masked)
    # entropies can change order with the temperature
    a, b = torch.tensor([[3.0, 2.9, -40.0]]), torch.tensor([[2.0, 0.0, 0.0]])
    assert torch.equal(combine_logits([a, b], "min_entropy", temperature=10.0), a)
    assert torch.equal(combine_logits([b, a], "min_entropy", temperature=0.3), b)


def test_routes_reach_rows_and_whole_samples():
    z = [torch.full((2, 3, 4), float(m)) for m in range(3)]
    per_token = torch.tensor([[0, 1, 2], [2, 2, 0]])
    assert torch.equal(combine_logits(z, "per_sample_route", route=per_token)[..., 0], per_token.float())
    per_sample = combine_logits(z, "per_sample_route", route=torch.tensor([2, 1]))
    assert per_sample[:, :, 3].tolist() == [[2.0] * 3, [1.0] * 3]


def test_teacher_without_weight_cannot_poison_the_mean():
    good, masked = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, -math.inf]])
    for mode in ("prob_mean", "log_prob_mean", "logit_mean"):
        torch.testing.assert_close(
            torch.softmax(combine_logits([good, masked], mode, weights=[1, 0]), -1), torch.softmax(good, -1)
        )
    mixed = torch.softmax(combine_logits([good, masked], "prob_mean"), -1)
    torch.testing.assert_close(mixed, (torch.softmax(good, -1) + torch.tensor([[1.0, 0.0]])) / 2)
    assert torch.softmax(combine_logits([good, masked], "log_prob_mean"), -1).tolist() == [[1.0, 0.0]]


def test_learned_gate_finds_the_mixture_that_explains_the_labels():
    # two constant teachers; labels are 70 % class 0: the optimum has w·0.9 + (1 − w)·0.2 = 0.7, w = 5/7
    z = [
        torch.log(torch.tensor([[0.9, 0.1]])).expand(10, 2),
        torch.log(torch.tensor([[0.2, 0.8]])).expand(10, 2),
    ]
    labels = torch.tensor([0] * 7 + [1] * 3)
    sources = [ServedTeacher(lambda inputs, ids, m=m: z[m]) for m in range(2)]
    teacher = MultiTeacher(sources, mode="learned")
    assert [name for name, _ in teacher.named_parameters()] == ["gate"]
    optimizer = torch.optim.SGD(teacher.parameters(), lr=4.0)
    for _ in range(400):
        optimizer.zero_grad()
        teacher.nll(z, labels).backward()
        optimizer.step()
    assert torch.softmax(teacher.gate, 0)[0].item() == pytest.approx(5 / 7, abs=1e-3)
    combined = teacher.signal(ids=list(range(10))).logits
    assert not combined.requires_grad
    assert torch.softmax(combined, -1)[0, 0].item() == pytest.approx(0.7, abs=1e-3)
    twin = MultiTeacher(sources, mode="learned")
    twin.load_state_dict(teacher.state_dict())
    assert torch.equal(twin.signal(ids=list(range(10))).logits, combined)


def test_multi_teacher_asks_its_sources_and_routes():
    networks = [network(0), network(1)]
    x = normal(0, 5, 4, dtype=torch.float32)
    teacher = MultiTeacher([OnlineTeacher(n) for n in networks], mode="per_sample_route")
    route = torch.tensor([0, 1, 1, 0, 1])
    answers = torch.stack([n(x) for n in networks])
    assert torch.equal(teacher.signal(x, route=route).logits, answers[route, torch.arange(5)])
    assert list(teacher.parameters()) == []
    assert isinstance(teacher, TeacherSource)
    odd = MultiTeacher([OnlineTeacher(nn.Identity(), read=EmbeddingSignal)], mode="prob_mean")
    with pytest.raises(TypeError, match="teacher 0 gives a EmbeddingSignal"):
        odd.signal(x)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"mode": "mean"}, "mode"),
        ({"mode": "prob_mean", "weights": [1.0]}, "weights"),
        ({"mode": "prob_mean", "weights": [1.0, -1.0]}, "weights"),
        ({"mode": "prob_mean", "weights": [0.0, 0.0]}, "weights"),
        ({"mode": "min_entropy", "weights": [1.0, 1.0]}, "weights"),
        ({"mode": "prob_mean", "temperature": 0.0}, "temperature"),
        ({"mode": "per_sample_route"}, "route"),
        ({"mode": "prob_mean", "route": torch.tensor([0, 1])}, "route"),
        ({"mode": "per_sample_route", "route": torch.tensor([0, 2])}, r"\[0, 2\)"),
        ({"mode": "per_sample_route", "route": torch.tensor([0, 1, 0])}, "route"),
        ({"mode": "per_sample_route", "route": torch.tensor([0.0, 1.0])}, "integers"),
    ],
)
def test_combine_names_what_is_wrong(arguments: dict, word: str):
    with pytest.raises(ValueError, match=word):
        combine_logits([torch.zeros(2, 3), torch.zeros(2, 3)], **arguments)


def test_multi_teacher_arguments():
    source = OnlineTeacher(nn.Identity())
    for build, word in (
        (lambda: MultiTeacher([source], mode="mean"), "mode"),  # type: ignore[arg-type]
        (lambda: MultiTeacher([], mode="prob_mean"), "at least one"),
        (lambda: MultiTeacher([source], mode="learned", weights=[1.0]), "weights"),
        (lambda: MultiTeacher([source], mode="prob_mean", weights=[1.0, 2.0]), "2 weights for 1"),
        (
            lambda: MultiTeacher([source], mode="prob_mean").nll([torch.zeros(1, 2)], torch.tensor([0])),
            "learned",
        ),
        (lambda: combine_logits([torch.zeros(2, 3), torch.zeros(2, 4)], "prob_mean"), "one shape"),
    ):
        with pytest.raises(ValueError, match=word):
            build()
