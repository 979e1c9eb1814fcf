"""What every public loss promises, checked for each name that `stillhouse.core.losses` exports.

Every public name is a row of `LOSSES` or of `NOT_LOSSES`: exporting a new one without a row fails. Which
checks a loss gets follows from its signature: one that takes a mask is checked with masks, and so on.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from stillhouse.core import losses
from stillhouse.core.testing import assert_gradcheck, assert_gradient, assert_no_gradient

INF = math.inf
ROWS, CLASSES = 4, 6
TARGET = torch.tensor([1, 0, 3, 2])
REDUCTIONS = ("none", "token_mean", "sum", "batch_mean")


@dataclass(frozen=True, kw_only=True)
class Loss:
    """How to call one loss on (student, teacher) and what holds for its value."""

    name: str
    call: Callable[..., Tensor]
    kind: str = "logits"  # "logits" [ROWS, CLASSES] on both sides; otherwise features of the two shapes
    shapes: tuple[tuple[int, ...], tuple[int, ...]] = ((ROWS, CLASSES), (ROWS, CLASSES))
    least: float = 0.0  # greatest lower bound of the value
    at_equality: float | None = 0.0  # value at student ≡ teacher; None where it depends on the input
    reductions: tuple[str, ...] = REDUCTIONS
    removal: bool = True  # a masked row is as a removed one
    spoil: float = math.nan  # what a masked row may hold; transforms before the loss see every row
    overflows: bool = False  # exponentials of log-ratios by definition
    rename: dict[str, str] = field(default_factory=dict)  # our option → the loss's

    def __call__(self, student: Tensor, teacher: Tensor, **options: object) -> Tensor:
        return self.call(student, teacher, **{self.rename.get(k, k): v for k, v in options.items()})

    def takes(self, option: str) -> bool:
        return self.rename.get(option, option) in inspect.signature(getattr(losses, self.name)).parameters


def on_targets(student: Tensor, teacher: Tensor, **options) -> Tensor:
    target = TARGET if student.shape[0] == ROWS else TARGET[[0, 2, 3]]  # the rows that the removal test keeps
    return losses.dkd(student, teacher, target, **options)


def on_top_k(student: Tensor, teacher: Tensor, **options) -> Tensor:
    t = options.get("temperature", 1.0)
    return losses.topk_kl(
        student, losses.SparseTeacher.from_logits(teacher, k=3, temperatures=(t,)), **options
    )


def on_head(fn: Callable[..., Tensor], **fixed) -> Callable[..., Tensor]:
    """Logits through an identity head; forbidden classes come in through the bias, as in a real model."""

    def call(student: Tensor, teacher: Tensor, **options) -> Tensor:
        empty = student == -INF
        wall = empty.all(0) if len(student) else torch.zeros(student.shape[-1], dtype=torch.bool)
        bias = torch.zeros(student.shape[-1], dtype=student.dtype).masked_fill(wall, -INF)
        eye = torch.eye(student.shape[-1], dtype=student.dtype)
        head = losses.LinearHead(hidden=student.masked_fill(empty, 0.0), weight=eye, bias=bias)
        return fn(head, teacher, **fixed, **options)

    return call


def log_probs(logits: Tensor) -> Tensor:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.log_softmax(-1, dtype=dtype)


def on_policy(estimator: str, **fixed) -> Callable[..., Tensor]:
    def call(student: Tensor, teacher: Tensor, **options) -> Tensor:
        log_q, log_p = log_probs(student), log_probs(teacher)
        if estimator == "topk":
            log_q, log_p = log_q[..., :3], log_p[..., :3]
        elif estimator != "full":
            log_q, log_p = log_q[..., 0], log_p[..., 0]
        return losses.on_policy_kl(log_q, log_p, estimator=estimator, **fixed, **options)

    return call


def on_subclasses(student: Tensor, teacher: Tensor, **options) -> Tensor:
    log_targets = (log_probs(teacher.detach()) / options.get("temperature", 1.0)).log_softmax(-1)
    return losses.lelp_loss(student, log_targets.unflatten(-1, (-1, 2)), **options)


def on_interpolation(student: Tensor, teacher: Tensor, **options) -> Tensor:
    target = losses.taid_target(student.detach(), teacher, 0.4)
    return losses.forward_kl(student, target, **options)


def standardised(student: Tensor, teacher: Tensor, **options) -> Tensor:
    sides = (losses.logit_standardization(x) for x in (student, teacher.detach()))
    return losses.forward_kl(*sides, **options)


def on_scores(student: Tensor, teacher: Tensor) -> Tensor:
    # neither argument is a teacher to mi_alpha: the critic's scores are
    return losses.mi_alpha_loss(student @ teacher.detach().to(student).mT, 0.3)


class Keep(nn.Module):
    def forward(self, student: Tensor, keep: Tensor) -> Tensor:
        return student * keep


def on_maps(student: Tensor, teacher: Tensor) -> Tensor:
    return losses.mgd(student, teacher, Keep(), mask_ratio=0.0)


def on_projections(student: Tensor, teacher: Tensor, **options) -> Tensor:
    sides = ((x, x.flip(-1)) for x in (student, teacher))
    return losses.attention_relation(*sides, relation_heads=2, **options)


def on_memory(student: Tensor, teacher: Tensor) -> Tensor:
    crd = losses.CRD(student.shape[-1], teacher.shape[-1], 9, dim=4, negatives=5, normalizer=2.0)
    generator = torch.Generator().manual_seed(0)
    for parameter in crd.parameters():  # the heads' own initialisation draws from the global generator
        parameter.data.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return crd.eval().to(student.dtype)(student, teacher.to(student.dtype), torch.tensor([0, 4, 8]))


EMBEDDINGS = ((5, 4), (5, 3))
SAME = ((5, 4), (5, 4))
SPREAD = {"least": -INF, "at_equality": None}
UNREDUCED = {"reductions": ("token_mean", "sum", "batch_mean")}

LOSSES = [
    Loss(name="forward_kl", call=losses.forward_kl),
    Loss(name="kd_loss", call=losses.kd_loss),
    Loss(name="reverse_kl", call=losses.reverse_kl),
    Loss(name="generalized_jsd", call=losses.generalized_jsd),
    Loss(name="skew_forward_kl", call=losses.skew_forward_kl),
    Loss(name="skew_reverse_kl", call=losses.skew_reverse_kl),
    Loss(name="tvd", call=losses.tvd),
    Loss(name="alpha_divergence", call=losses.alpha_divergence),
    Loss(name="soft_cross_entropy", call=losses.soft_cross_entropy, at_equality=None),
    Loss(name="logit_mse", call=losses.logit_mse),
    Loss(name="dkd", call=on_targets),
    Loss(name="dist_loss", call=losses.dist_loss, rename={"temperature": "tau"}),
    Loss(name="topk_kl", call=on_top_k),
    Loss(name="fused_linear_kl", call=on_head(losses.fused_linear_kl), **UNREDUCED),
    Loss(name="fused_linear_kl", call=on_head(losses.fused_linear_kl, direction="reverse"), **UNREDUCED),
    Loss(name="fused_linear_jsd", call=on_head(losses.fused_linear_jsd), **UNREDUCED),
    Loss(name="on_policy_kl", call=on_policy("full"), spoil=9.0),
    Loss(name="on_policy_kl", call=on_policy("topk"), spoil=9.0),
    Loss(name="on_policy_kl", call=on_policy("k1", gradient="direct"), spoil=9.0, least=-INF),
    Loss(name="on_policy_kl", call=on_policy("k2", gradient="direct"), spoil=9.0),
    Loss(name="on_policy_kl", call=on_policy("k3", gradient="direct"), spoil=9.0, overflows=True),
    Loss(name="lelp_loss", call=on_subclasses),
    Loss(name="taid_target", call=on_interpolation),
    Loss(name="logit_standardization", call=standardised),
    Loss(name="uld_loss", call=losses.uld_loss),
    Loss(name="sinkhorn_loss", call=losses.sinkhorn_loss, at_equality=None, reductions=()),
    Loss(
        name="sinkhorn_loss",
        call=lambda s, t, **k: losses.sinkhorn_loss(s, t, debias=True, **k),
        least=-1e-2,  # ≥ 0 at convergence of the iterations only
        reductions=(),
    ),
    Loss(name="hint_loss", call=losses.hint_loss, kind="features", shapes=((ROWS, 3, 2), (ROWS, 3, 2))),
    Loss(name="cosine", call=losses.cosine, kind="features", shapes=((ROWS, 5), (ROWS, 5))),
    Loss(name="pkd", call=losses.pkd, kind="features", shapes=((ROWS, 5), (ROWS, 5))),
    Loss(
        name="attention_transfer",
        call=losses.attention_transfer,
        kind="features",
        shapes=((3, 4, 4, 6), (3, 2, 2, 3)),
    ),
    Loss(name="mgd", call=on_maps, kind="features", shapes=((2, 3, 4, 4), (2, 3, 4, 4))),
    Loss(name="cka", call=losses.cka, kind="features", shapes=EMBEDDINGS),
    Loss(name="rkd_distance", call=losses.rkd_distance, kind="features", shapes=EMBEDDINGS),
    Loss(name="rkd_angle", call=losses.rkd_angle, kind="features", shapes=EMBEDDINGS),
    Loss(name="similarity_preserving", call=losses.similarity_preserving, kind="features", shapes=EMBEDDINGS),
    Loss(
        name="correlation_congruence", call=losses.correlation_congruence, kind="features", shapes=EMBEDDINGS
    ),
    Loss(name="similarity_kl", call=losses.similarity_kl, kind="features", shapes=EMBEDDINGS),
    Loss(
        name="attention_relation",
        call=on_projections,
        kind="features",
        shapes=((2, 4, 4), (2, 4, 6)),
        removal=False,  # a masked token is also left out as a key; its own test compares with loops
    ),
    Loss(name="info_nce", call=losses.info_nce, kind="features", shapes=SAME, at_equality=None),
    Loss(name="mi_alpha_loss", call=on_scores, kind="features", shapes=SAME, **SPREAD),
    Loss(name="CRD", call=on_memory, kind="features", shapes=((3, 4), (3, 5)), at_equality=None),
]

NOT_LOSSES = {
    "Reduction": "the names of the reductions",
    "reduce": "what losses end with",
    "LinearHead": "an argument of the fused losses",
    "SparseTeacher": "an argument of topk_kl",
    "VocabAlignment": "cuts logits before a loss",
    "PseudoSubclasses": "makes the targets of lelp_loss",
    "MGDGenerator": "an argument of mgd",
    "causal_shift": "lines up logits and labels before a loss",
    "class_logits": "reads class logits out of subclass logits",
    "linear_cka": "a similarity; cka is the loss",
    "pairwise_distances": "part of rkd_distance",
    "mi_alpha": "a bound to be maximised; mi_alpha_loss is the loss",
    "sinkhorn_plan": "part of sinkhorn_loss",
    "Term": "a loss with its weight",
    "DistillationLoss": "a weighted sum of terms",
    "WeightedSum": "what DistillationLoss returns",
    "RatioWatch": "warns of silent terms",
    "LossBalancer": "weighs terms",
    "SumNormalised": "weighs terms",
    "GradNorm": "weighs terms",
    "Uncertainty": "weighs terms",
}


def every(keep: Callable[[Loss], bool] = lambda loss: True) -> pytest.MarkDecorator:
    chosen = [loss for loss in LOSSES if keep(loss)]
    names = [loss.name for loss in LOSSES]
    ids = [f"{loss.name}-{i}" if names.count(loss.name) > 1 else loss.name for i, loss in enumerate(chosen)]
    return pytest.mark.parametrize("loss", chosen, ids=ids)


def is_logits(loss: Loss) -> bool:
    return loss.kind == "logits"


def masked(loss: Loss) -> bool:
    return loss.takes("mask")


def pair(loss: Loss, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draws = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in loss.shapes)
    student, teacher = (1.5 * x for x in draws)
    return student.to(dtype), teacher.to(dtype)


def mask_shape(loss: Loss) -> tuple[int, ...]:
    return loss.shapes[0][:1] if loss.name == "hint_loss" else loss.shapes[0][:-1]


def grad_of(fn: Callable[[Tensor], Tensor], student: Tensor) -> Tensor:
    student = student.detach().clone().requires_grad_()
    return torch.autograd.grad(fn(student), student)[0]


# --- the table


def test_every_public_name_has_a_row():
    public = {
        name
        for name, value in vars(losses).items()
        if not name.startswith("_") and name != "annotations" and not inspect.ismodule(value)
    }
    registered = {loss.name for loss in LOSSES}
    missing = sorted(public - registered - set(NOT_LOSSES))
    assert not missing, f"exported without a row in LOSSES or NOT_LOSSES: {missing}"
    gone = sorted((registered | set(NOT_LOSSES)) - public)
    assert not gone, f"a row for what is not exported: {gone}"
    assert not registered & set(NOT_LOSSES)


@pytest.mark.parametrize("name", sorted({loss.name for loss in LOSSES}))
def test_docstring_says_shapes_and_shows_an_example(name):
    text = inspect.getdoc(getattr(losses, name)) or ""
    for part in ("Args:", "Example:", ">>>", "["):
        assert part in text, f"{name} has no {part}"
    assert "Returns:" in text or inspect.isclass(getattr(losses, name))


# --- gradients


@every()
def test_gradient_is_the_derivative(loss):
    student, teacher = pair(loss)
    if loss.name == "taid_target":  # its target follows the student without a gradient: hold it still
        teacher = losses.taid_target(student, teacher, 0.4)
        assert_gradcheck(lambda s: losses.forward_kl(s, teacher), student)
        return
    assert_gradcheck(lambda s: loss(s, teacher), student)


@every()
def test_teacher_gets_no_gradient(loss):
    student, teacher = (x.requires_grad_() for x in pair(loss))
    value = loss(student, teacher)
    assert_gradient(value, student)
    assert_no_gradient(value, teacher)


# --- values


@every()
@pytest.mark.parametrize("seed", range(3))
def test_bounds_and_value_at_equality(loss, seed):
    student, teacher = pair(loss, seed=seed)
    value = loss(student, teacher)
    assert value.dtype == torch.float64
    assert value.dim() == 0
    assert value >= loss.least - 1e-12
    if loss.at_equality is not None:
        assert float(loss(student, student)) == pytest.approx(loss.at_equality, abs=1e-10)
        if math.isfinite(loss.least):
            assert value > loss.at_equality + 1e-6, "two random inputs differ: the loss must say so"


@every(is_logits)
@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_logit_losses_ignore_the_level_of_a_row(loss, data):
    student, teacher = pair(loss, seed=data.draw(st.integers(0, 1000)))
    shift = torch.tensor(data.draw(st.lists(st.floats(-30, 30), min_size=ROWS, max_size=ROWS)))[:, None]
    moved = loss(student + shift, teacher - 2 * shift)
    torch.testing.assert_close(moved, loss(student, teacher), rtol=1e-7, atol=1e-9)


@every(lambda loss: loss.takes("scale_t2"))
def test_t2_is_a_plain_factor(loss):
    student, teacher = pair(loss)
    plain = loss(student, teacher, temperature=4.0, scale_t2=False)
    torch.testing.assert_close(loss(student, teacher, temperature=4.0), 16 * plain, rtol=1e-14, atol=0)


@every(lambda loss: loss.takes("reduction") and bool(loss.reductions))
def test_reductions_agree(loss):
    student, teacher = pair(loss)
    shape = mask_shape(loss)
    options, count = {}, math.prod(shape)
    if masked(loss):
        options["mask"] = torch.ones(shape, dtype=torch.bool)
        options["mask"].view(-1)[1] = False
        count -= 1
    total = loss(student, teacher, reduction="sum", **options)
    torch.testing.assert_close(loss(student, teacher, **options), total / count)
    torch.testing.assert_close(loss(student, teacher, num_items=10, **options), total / 10)
    torch.testing.assert_close(loss(student, teacher, num_items=torch.tensor(10), **options), total / 10)
    torch.testing.assert_close(loss(student, teacher, reduction="batch_mean", **options), total / shape[0])
    if "none" in loss.reductions:
        rows = loss(student, teacher, reduction="none", **options)
        assert rows.shape == shape
        assert not masked(loss) or rows.view(-1)[1] == 0
        torch.testing.assert_close(rows.sum(), total)


# --- masks


@every(lambda loss: masked(loss) and loss.removal)
def test_mask_is_row_removal_whatever_the_row_holds(loss):
    student, teacher = pair(loss)
    keep = torch.tensor([True, False, True, True])
    expected = loss(student[keep], teacher[keep])
    spoilt = student.clone(), teacher.clone()
    for side in spoilt:
        side[1] = loss.spoil
    torch.testing.assert_close(loss(*spoilt, mask=keep), expected)
    gradient = grad_of(lambda s: loss(s, spoilt[1], mask=keep), spoilt[0])
    assert (gradient[1] == 0).all()
    torch.testing.assert_close(gradient[keep], grad_of(lambda s: loss(s, teacher[keep]), student[keep]))


@every(masked)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_row_counts(loss, reduction):
    known = loss.takes("reduction") and reduction in (loss.reductions or REDUCTIONS)
    options = {"reduction": reduction} if known else {}
    student, teacher = pair(loss, torch.float32)
    student.requires_grad_()
    value = loss(student, teacher, mask=torch.zeros(mask_shape(loss), dtype=torch.bool), **options)
    assert (value == 0).all()
    value.sum().backward()  # the graph is connected
    assert (student.grad == 0).all()


# --- numerics


@every()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(loss, dtype):
    student, teacher = pair(loss, dtype)
    value, gradient = loss(student, teacher), grad_of(lambda s: loss(s, teacher), student)
    assert value.dtype == torch.float32
    assert value.isfinite()
    assert gradient.dtype == dtype
    assert gradient.isfinite().all()
    exact = loss(student.double(), teacher.double())
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if loss.name in ("CRD", "mi_alpha_loss") else {}
    torch.testing.assert_close(value.double(), exact, **(tolerance or {"rtol": 1e-4, "atol": 1e-5}))


@every()
def test_autocast_returns_float32_and_the_same_value(loss):
    student, teacher = pair(loss, torch.float32)
    plain = loss(student, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(student, teacher)
    assert value.dtype == torch.float32
    heads = ("fused_linear_kl", "fused_linear_jsd", "CRD", "mi_alpha_loss")  # products outside the loss
    tolerance = {"rtol": 3e-2, "atol": 3e-2} if loss.name in heads else {"rtol": 1e-6, "atol": 1e-7}
    torch.testing.assert_close(value, plain, **tolerance)


@every(lambda loss: is_logits(loss) and not loss.overflows)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_low_temperature(loss, dtype):
    student, teacher = (10 * x for x in pair(loss, dtype))
    cold = {"temperature": 0.02} if loss.takes("temperature") else {}
    if not cold:  # transforms and losses on log-probabilities: the caller divides
        student, teacher = student / 0.02, teacher / 0.02
    assert loss(student, teacher, **cold).isfinite()
    assert grad_of(lambda s: loss(s, teacher, **cold), student).isfinite().all()


@every(is_logits)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forbidden_classes_on_both_sides(loss, dtype):
    student, teacher = pair(loss, dtype)
    for side in (student, teacher):
        side[:, -2:] = -INF
    value, gradient = loss(student, teacher), grad_of(lambda s: loss(s, teacher), student)
    assert value.isfinite()
    assert gradient.isfinite().all()
    assert (gradient[:, -2:] == 0).all(), "a class that is not allowed is not learnt"


@every(is_logits)
def test_one_hot_teacher(loss):
    student, _ = pair(loss, torch.float32)
    teacher = torch.full_like(student, -INF).scatter_(1, TARGET[:, None], 0.0)
    assert grad_of(lambda s: loss(s, teacher), student).isfinite().all()
    sharp = torch.zeros_like(student).scatter_(1, TARGET[:, None], 1e4)
    assert loss.overflows or loss(student, sharp).isfinite()
    assert grad_of(lambda s: loss(s, sharp), student).isfinite().all()


@st.composite
def wild_logits(draw):
    """Logits of any size, equal ones and forbidden classes among them."""
    size = st.one_of(st.floats(-1e4, 1e4, width=32), st.sampled_from([0.0, 1e-30, -1e4, 1e4]))
    sides = [torch.from_numpy(draw(hnp.arrays(np.float32, (ROWS, CLASSES), elements=size))) for _ in "st"]
    wall = draw(st.lists(st.booleans(), min_size=2, max_size=2))
    for side in sides:
        side[:, -2:][:, torch.tensor(wall)] = -INF
    return sides


@every(lambda loss: is_logits(loss) and not loss.overflows)
@given(sides=wild_logits(), temperature=st.sampled_from([0.02, 0.7, 1.0, 20.0]))
@settings(max_examples=25, deadline=None)
def test_no_gradient_is_ever_nan(loss, sides, temperature):
    student, teacher = sides
    options = {"temperature": temperature} if loss.takes("temperature") else {}
    assert not loss(student, teacher, **options).isnan()
    assert grad_of(lambda s: loss(s, teacher, **options), student).isfinite().all()


@every(lambda loss: not is_logits(loss))
@pytest.mark.parametrize("case", ["zero", "constant", "one pair", "huge"])
def test_degenerate_features_have_finite_gradients(loss, case):
    student, teacher = pair(loss, torch.float32)
    if case == "zero":
        student, teacher = torch.zeros_like(student), torch.zeros_like(teacher)
    elif case == "constant":
        student, teacher = torch.ones_like(student), torch.ones_like(teacher)
    elif case == "one pair":
        student[1] = student[0]
    else:
        student = 1e6 * student
    assert not loss(student, teacher).isnan()
    assert grad_of(lambda s: loss(s, teacher), student).isfinite().all()
