from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stillhouse.core.losses import forward_kl
from stillhouse.core.losses.balance import GradNorm, LossBalancer, SumNormalised, Uncertainty
from stillhouse.core.losses.term import DistillationLoss, RatioWatch, Term
from stillhouse.core.schedules import FLSW, AdaptiveThreshold, Linear, TaidAdaptive, Warmup

# --- RatioWatch
# -------------------------------------------------------------------------------------------------


def test_watch_warns_once_after_a_run_and_again_after_recovery():
    watch = RatioWatch(threshold=0.1, patience=3)
    small, large = {"ce": 2.0, "kd": 0.3}, {"ce": 2.0, "kd": 0.5}
    weights = {"ce": 1.0, "kd": 0.5}  # ratios 0.075 and 0.125
    warned = [watch.update(values, weights, task="ce") for values in [small] * 2 + [large] + [small] * 5]
    assert warned == [(), (), (), (), (), ("kd",), (), ()]
    assert watch.ratios["kd"] == pytest.approx(0.075)
    assert watch.update(large, weights, task="ce") == ()
    assert [watch.update(small, weights, task="ce") for _ in range(3)][-1] == ("kd",)


def test_watch_boundary_sign_and_zero_task():
    watch = RatioWatch(threshold=0.5, patience=1)
    assert watch.update({"ce": 2.0, "kd": 1.0}, task="ce") == ()  # exactly the threshold is not below it
    assert watch.update({"ce": -2.0, "kd": -0.9}, task="ce") == ("kd",)  # magnitudes are compared
    assert watch.update({"ce": 0.0, "kd": 0.0}, task="ce") == ()
    assert watch.update({"ce": 0.0, "kd": 1e-9}, task="ce") == ()
    assert watch.ratios["kd"] == math.inf


def test_watch_ignores_what_says_nothing():
    watch = RatioWatch(patience=1)
    assert watch.update({"ce": 1.0, "kd": 1e-9}, task=None) == ()
    assert watch.update({"kd": 1e-9}, task="ce") == ()
    assert watch.update({"ce": 1.0, "kd": 1e-9}, {"kd": 0.0}, task="ce") == ()
    assert watch.update({"ce": math.nan, "kd": 1e-9}, task="ce") == ()
    assert watch.update({"ce": 1.0, "kd": math.inf}, task="ce") == ()
    assert watch.update({"ce": 1.0, "kd": 1e-9, "hint": 1e-9, "big": 1.0}, task="ce") == ("kd", "hint")
    assert "'kd'" in watch.message("kd", "ce")
    assert "1.0%" in watch.message("kd", "ce")


def test_watch_state_round_trip_keeps_the_run():
    first = RatioWatch(patience=4)
    for _ in range(3):
        first.update({"ce": 1.0, "kd": 0.0}, task="ce")
    second = RatioWatch(patience=4)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    attached = torch.tensor(
        1.0, requires_grad=True
    )  # tensors that want a gradient are read without a warning
    assert second.update({"ce": attached, "kd": 0 * attached}, task="ce") == ("kd",)


@pytest.mark.parametrize(
    ("arguments", "word"), [({"threshold": 0.0}, "threshold"), ({"patience": 0}, "patience")]
)
def test_watch_arguments(arguments: dict, word: str):
    with pytest.raises(ValueError, match=word):
        RatioWatch(**arguments)


# --- Term and DistillationLoss
# ----------------------------------------------------------------------------------


def _logits(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_total_is_the_scheduled_sum_and_terms_stay_unweighted():
    student, teacher = _logits(0, 6, 5).requires_grad_(), _logits(1, 6, 5)
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    loss = DistillationLoss(
        {
            "ce": Term(nn.functional.cross_entropy, weight=0.3),
            "kd": Term(forward_kl, weight=Linear(0.0, 1.0, steps=10), temperature=Linear(4.0, 2.0, steps=10)),
            "extra": 2.0,
        },
        task="ce",
    )
    for step in (0, 4, 10):
        result = loss(
            {
                "ce": (student, labels),
                "kd": {"student": student, "teacher": teacher},
                "extra": student.square().mean(),
            },
            step=step,
        )
        temperature = 4.0 - 0.2 * step
        p, q = torch.softmax(teacher / temperature, -1), torch.softmax(student / temperature, -1)
        kd = temperature**2 * (p * (p / q).log()).sum(-1).mean()
        ce = -torch.log_softmax(student, -1)[torch.arange(6), labels].mean()
        assert result.terms["kd"].item() == pytest.approx(kd.item(), rel=1e-10)
        assert result.terms["ce"].item() == pytest.approx(ce.item(), rel=1e-10)
        expected = 0.3 * ce + step / 10 * kd + 2.0 * student.square().mean()
        assert result.total.item() == pytest.approx(expected.item(), rel=1e-10)
        assert result.weights == {"ce": 0.3, "kd": pytest.approx(step / 10), "extra": 2.0}
        assert result.task == "ce"
        gradient = torch.autograd.grad(result.total, student, retain_graph=True)[0]
        torch.testing.assert_close(gradient, torch.autograd.grad(expected, student)[0])


def test_per_sample_temperature_reaches_the_function_with_its_mask():
    student, teacher = _logits(2, 3, 4, 7), _logits(3, 3, 4, 7)
    mask = torch.arange(12).reshape(3, 4) % 3 != 0
    rule = FLSW(Linear(4.0, 2.0, steps=2), beta=2.0)
    value = Term(forward_kl, temperature=rule)({"student": student, "teacher": teacher, "mask": mask}, step=1)
    tau = rule(student, teacher, step=1, mask=mask)
    assert tau[mask].std() > 0.01
    expected = forward_kl(student, teacher, temperature=tau.double(), mask=mask)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    positional = Term(lambda s, t, temperature: temperature.mean(), temperature=rule)(
        (student, teacher), step=1
    )
    assert positional.item() == pytest.approx(rule(student, teacher, step=1).mean().item())
    with pytest.raises(ValueError, match="first two inputs"):
        Term(lambda a, temperature: a.sum(), temperature=rule)((student,))


def test_settings_schedule_any_keyword():
    taid = TaidAdaptive(total=10, start=0.2, alpha=0.5)
    term = Term(lambda x, coef: coef * x, settings={"coef": taid})
    assert term(torch.tensor(2.0)).item() == pytest.approx(0.4)
    taid.update(1.0, 0)
    taid.update(1.0, 1)
    assert term(torch.tensor(2.0), step=1).item() == pytest.approx(2 * (0.2 + 0.5 * 0.5 * 0.8))


def test_parameters_of_terms_and_balancer_are_found_and_saved(tmp_path: Path):
    class Hint(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.projector = nn.Linear(3, 5)

        def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
            return (self.projector(student) - teacher).square().mean()

    def build() -> DistillationLoss:
        taid = TaidAdaptive(total=10, start=0.2, alpha=0.5)
        return DistillationLoss(
            {
                "hint": Term(Hint(), weight=Warmup(1.0, steps=3)),
                "taid": Term(lambda x, coef: coef * x, weight=AdaptiveThreshold(), settings={"coef": taid}),
                "kd": Term(forward_kl, temperature=FLSW(Linear(2.0, 1.0, steps=2), beta=1.0)),
            },
            balancer=Uncertainty(("hint", "taid", "kd")),
        )

    torch.manual_seed(0)
    first = build()
    assert {name for name, _ in first.named_parameters()} == {
        "functions.hint.projector.weight",
        "functions.hint.projector.bias",
        "balancer.log_variance",
    }
    taid, threshold = first.terms["taid"].settings["coef"], first.terms["taid"].weight
    assert isinstance(taid, TaidAdaptive)
    assert isinstance(threshold, AdaptiveThreshold)
    for step, value in enumerate((2.0, 1.0, 3.0)):
        taid.update(value, step)
        threshold.update(value)
    save_file(first.state_dict(), tmp_path / "loss.safetensors")
    second = build()
    second.load_state_dict(load_file(tmp_path / "loss.safetensors"))
    again, threshold_again = second.terms["taid"].settings["coef"], second.terms["taid"].weight
    assert again(0) == taid(0) != 0.2
    assert threshold_again(0) == threshold(0) == pytest.approx(0.1)
    assert taid.update(0.5, 3) == again.update(0.5, 3)  # type: ignore[attr-defined]
    for mine, theirs in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_state_of_another_objective_is_refused():
    first = DistillationLoss({"ce": 1.0, "kd": Term(forward_kl, temperature=2.0)})
    with pytest.raises(ValueError, match="terms"):
        DistillationLoss({"ce": 1.0}).set_extra_state(first.get_extra_state())
    with pytest.raises(ValueError, match="temperature"):
        DistillationLoss({"ce": 1.0, "kd": 1.0}).set_extra_state(first.get_extra_state())
    with pytest.raises(ValueError, match="Linear"):
        DistillationLoss({"ce": Linear(0, 1, 5), "kd": Term(forward_kl, temperature=2.0)}).set_extra_state(
            first.get_extra_state()
        )


@pytest.mark.parametrize(
    ("build", "error", "word"),
    [
        (lambda: Term(3), TypeError, "fn"),
        (lambda: Term(temperature=2.0), ValueError, "fn=None"),
        (lambda: Term(weight="1"), TypeError, "weight"),
        (lambda: Term(forward_kl, settings={"beta": "x"}), TypeError, "beta"),
        (lambda: DistillationLoss({}), ValueError, "at least one"),
        (lambda: DistillationLoss({"ce": 1.0}, task="kd"), ValueError, "kd"),
        (
            lambda: DistillationLoss({"ce": 1.0, "kd": 1.0})({"ce": torch.tensor(1.0)}),
            ValueError,
            "missing.*kd",
        ),
        (lambda: DistillationLoss({"ce": 1.0})({"ce": torch.tensor(1.0), "k": 0}), ValueError, "unknown.*k"),
        (lambda: DistillationLoss({"ce": 1.0})({"ce": torch.ones(3)}), ValueError, "scalar"),
        (lambda: DistillationLoss({"ce": 1.0})({"ce": 1.0}), TypeError, "tensor"),
        (lambda: DistillationLoss({"ce": 1.0}, balancer=Uncertainty(("ce", "kd"))), ValueError, "kd"),
        (lambda: DistillationLoss({"ce": 1.0}, balancer=GradNorm(("ce", "kd"))), ValueError, "kd"),
        (lambda: GradNorm(("ce",)), ValueError, "names"),
        (lambda: GradNorm(("a", "b"), alpha=-1.0), ValueError, "alpha"),
        (lambda: GradNorm(("a", "b"), lr=0.0), ValueError, "lr"),
        (lambda: Uncertainty(("a", "a")), ValueError, "names"),
        (lambda: SumNormalised()({"a": torch.tensor(1.0)}, {"a": 0.0}), ValueError, "zero"),
    ],
)
def test_wrong_use_is_named(build, error: type[Exception], word: str):
    with pytest.raises(error, match=word):
        build()


# --- balancers
# --------------------------------------------------------------------------------------------------


def test_static_and_sum_normalised_by_hand():
    terms = {"a": torch.tensor(2.0), "b": torch.tensor(10.0)}
    assert LossBalancer()(terms, {"a": 3.0, "b": 0.1})[0].item() == pytest.approx(7.0)
    total, used = SumNormalised()(terms, {"a": 3.0, "b": -1.0})
    assert used == {"a": 0.75, "b": -0.25}
    assert total.item() == pytest.approx(-1.0)


def test_gradnorm_by_hand():
    w = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    balancer = GradNorm(("a", "b"), alpha=1.0, lr=0.1)

    def terms() -> dict[str, Tensor]:
        return {"a": w.square().sum(), "b": (3 * w[0] + 4 * w[1])}

    # first update: losses 5 and 11, r = 1; norms 2√5 and 5; mean (2√5 + 5)/2 = 4.736: a grows, b falls
    balancer.update(terms(), [w])
    moved = [1 + 0.1 * 2 * math.sqrt(5), 1 - 0.1 * 5]
    scale = 2 / sum(moved)
    assert balancer.weights.tolist() == pytest.approx([m * scale for m in moved], rel=1e-12)
    # second update at w = (0, 1): losses 1 and 4, so progress 1/5 and 4/11; norms 2 and 5
    with torch.no_grad():
        w.copy_(torch.tensor([0.0, 1.0]))
    v = balancer.weights.tolist()
    balancer.update(terms(), [w])
    g = [2 * v[0], 5 * v[1]]
    mean, progress = sum(g) / 2, [1 / 5, 4 / 11]
    targets = [mean * p / (sum(progress) / 2) for p in progress]
    moved = [v[i] - 0.1 * math.copysign(1, g[i] - targets[i]) * n for i, n in enumerate((2.0, 5.0))]
    assert balancer.weights.tolist() == pytest.approx([m * 2 / sum(moved) for m in moved], rel=1e-12)
    total, used = balancer(terms(), {"a": 2.0, "b": 1.0})
    assert used == {
        "a": pytest.approx(2 * balancer.weights[0].item()),
        "b": pytest.approx(balancer.weights[1].item()),
    }
    assert total.item() == pytest.approx(used["a"] * 1 + used["b"] * 4)


def test_gradnorm_equalises_a_hundredfold_difference():
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(8, dtype=torch.float64))
    a, b = torch.randn(2, 8, dtype=torch.float64)
    balancer = GradNorm(("small", "large"), alpha=0.0, lr=1e-4)
    norms = {"small": a.norm(), "large": 100 * b.norm()}
    for _ in range(600):
        balancer.update({"small": w @ a + 50, "large": 100 * (w @ b) + 5000}, [w])
    v = balancer.weights
    ratio = (v[0] * norms["small"] / (v[1] * norms["large"])).item()
    assert 0.5 < ratio < 2.0  # from 0.01 at the start
    assert v.sum().item() == pytest.approx(2.0)


def test_gradnorm_state_and_errors():
    w = nn.Parameter(torch.tensor([1.0]))
    first = GradNorm(("a", "b"))
    first.update({"a": w.sum(), "b": 3 * w.sum()}, [w])
    second = GradNorm(("a", "b"))
    second.load_state_dict(first.state_dict())
    for balancer in (first, second):
        balancer.update({"a": 2 * w.sum(), "b": 2 * w.sum()}, [w])
    assert torch.equal(first.weights, second.weights)
    with pytest.raises(ValueError, match="positive"):
        first.update({"a": -w.sum(), "b": w.sum()}, [w])
    with pytest.raises(ValueError, match="shared"):
        first.update({"a": w.sum(), "b": w.sum()}, [])
    with pytest.raises(ValueError, match="terms"):
        first.update({"a": w.sum()}, [w])


def test_gradnorm_term_that_misses_the_shared_layer_has_no_gradient_there():
    w, other = nn.Parameter(torch.tensor([1.0])), nn.Parameter(torch.tensor([1.0]))
    balancer = GradNorm(("a", "b"), alpha=0.0, lr=0.1)
    balancer.update({"a": w.sum(), "b": other.sum()}, [w])
    assert balancer.weights.tolist() == pytest.approx([2 * 0.9 / 1.9, 2 / 1.9])


def test_uncertainty_has_its_optimum_at_the_log_of_the_loss():
    balancer = Uncertainty(("a", "b"))
    terms = {"a": torch.tensor(0.25), "b": torch.tensor(9.0)}
    with torch.no_grad():
        balancer.log_variance.copy_(torch.tensor([math.log(0.25), math.log(9.0)]))
    total, used = balancer(terms, {"a": 1.0, "b": 2.0})
    total.backward()
    assert balancer.log_variance.grad is not None
    assert balancer.log_variance.grad.abs().max().item() < 1e-6
    assert total.item() == pytest.approx(0.5 * (1 + math.log(0.25)) + (1 + math.log(9.0)), rel=1e-6)
    assert used["a"] == pytest.approx(0.5 / 0.25)
    assert used["b"] == pytest.approx(2 * 0.5 / 9.0)


def test_uncertainty_weight_is_the_gradient_of_the_total():
    balancer = Uncertainty(("a", "b"))
    with torch.no_grad():
        balancer.log_variance.copy_(torch.tensor([0.7, -0.4]))
    terms = {"a": torch.tensor(0.25, requires_grad=True), "b": torch.tensor(9.0, requires_grad=True)}
    total, used = balancer(terms, {"a": 1.0, "b": 3.0})
    total.backward()
    assert {name: value.grad.item() for name, value in terms.items()} == pytest.approx(used, rel=1e-6)
