from __future__ import annotations

import json
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.core.schedules import (
    CWSM,
    FLSW,
    AdaptiveThreshold,
    Constant,
    Cosine,
    Exponential,
    Linear,
    Piecewise,
    Schedule,
    TaidAdaptive,
    Warmup,
    as_schedule,
)

# --- closed forms
# -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "points"),
    [
        (Constant(0.3), {0: 0.3, 10**9: 0.3}),
        (Linear(1.0, 0.2, steps=8), {0: 1.0, 1: 0.9, 4: 0.6, 8: 0.2, 100: 0.2}),
        (Linear(0.0, 5.0, steps=10, after=20), {0: 0.0, 20: 0.0, 21: 0.5, 30: 5.0, 31: 5.0}),
        (
            Cosine(1.0, 0.0, steps=12),
            {0: 1.0, 3: 0.5 + math.sqrt(2) / 4, 4: 0.75, 6: 0.5, 8: 0.25, 12: 0.0, 99: 0.0},
        ),
        (Cosine(2.0, 4.0, steps=2, after=1), {0: 2.0, 1: 2.0, 2: 3.0, 3: 4.0}),
        (Exponential(16.0, 1.0, steps=4), {0: 16.0, 1: 8.0, 2: 4.0, 3: 2.0, 4: 1.0, 50: 1.0}),
        (Exponential(-1.0, -100.0, steps=2), {0: -1.0, 1: -10.0, 2: -100.0}),
        (Piecewise((5, 10), (1.0, 0.5, 0.0)), {0: 1.0, 4: 1.0, 5: 0.5, 9: 0.5, 10: 0.0, 11: 0.0}),
        (Piecewise((), (7.0,)), {0: 7.0, 3: 7.0}),
        (Warmup(0.8, steps=4), {0: 0.0, 1: 0.2, 2: 0.4, 4: 0.8, 9: 0.8}),
        (Warmup(Linear(1.0, 0.0, steps=10), steps=5, start=0.5), {0: 0.5, 1: 0.6 * 0.9, 5: 0.5, 10: 0.0}),
    ],
)
def test_values_follow_the_closed_form(schedule: Schedule, points: dict[int, float]):
    for step, value in points.items():
        assert schedule(step) == pytest.approx(value, abs=1e-12)


def test_calling_a_schedule_changes_nothing():
    schedule = Warmup(Cosine(1.0, 0.1, steps=50), steps=10)
    forwards = [schedule(step) for step in range(60)]
    assert [schedule(step) for step in reversed(range(60))] == forwards[::-1]


@settings(max_examples=60, deadline=None)
@given(st.floats(0.01, 50), st.floats(0.01, 50), st.integers(1, 1000), st.integers(0, 2000))
def test_ramps_stay_between_their_ends_and_reach_them(start: float, end: float, steps: int, step: int):
    low, high = min(start, end), max(start, end)
    for kind in (Linear, Cosine, Exponential):
        value = kind(start, end, steps)(step)
        assert low * (1 - 1e-12) <= value <= high * (1 + 1e-12)
        assert kind(start, end, steps)(steps) == pytest.approx(end, rel=1e-12)
        assert kind(start, end, steps)(0) == pytest.approx(start, rel=1e-12)


@pytest.mark.parametrize(
    ("build", "word"),
    [
        (lambda: Constant(math.nan), "value"),
        (lambda: Linear(0.0, 1.0, steps=0), "steps"),
        (lambda: Linear(0.0, math.inf, steps=1), "end"),
        (lambda: Cosine(0.0, 1.0, steps=3, after=-1), "after"),
        (lambda: Exponential(0.0, 1.0, steps=3), "non-zero"),
        (lambda: Exponential(-1.0, 1.0, steps=3), "one sign"),
        (lambda: Piecewise((3, 3), (1, 2, 3)), "strictly increasing"),
        (lambda: Piecewise((0,), (1, 2)), "milestones"),
        (lambda: Piecewise((3,), (1,)), "one value more"),
        (lambda: Warmup(1.0, steps=5, start=2.0), "start"),
        (lambda: Linear(0.0, 1.0, steps=3)(-1), "step"),
        (lambda: TaidAdaptive(total=0), "total"),
        (lambda: TaidAdaptive(total=5, start=0.9, end=0.5), "start"),
        (lambda: TaidAdaptive(total=5, alpha=2.0), "alpha"),
        (lambda: TaidAdaptive(total=5, beta=1.0), "beta"),
        (lambda: TaidAdaptive(total=5).update(math.nan, 0), "finite"),
        (lambda: AdaptiveThreshold(start=2.0), "start"),
        (lambda: AdaptiveThreshold(increment=0.0), "increment"),
        (lambda: AdaptiveThreshold().update(math.inf), "finite"),
        (lambda: FLSW(4.0, beta=-1.0), "beta"),
        (lambda: FLSW(4.0, beta=1.0, gamma=0.0), "gamma"),
        (lambda: CWSM(4.0, beta=1.0, minimum=0.0), "minimum"),
    ],
)
def test_wrong_arguments_are_named(build, word: str):
    with pytest.raises(ValueError, match=word):
        build()


def test_as_schedule_refuses_what_is_no_number():
    assert as_schedule(2)(5) == 2.0
    linear = Linear(0.0, 1.0, steps=2)
    assert as_schedule(linear) is linear
    for wrong in ("0.5", True, None):
        with pytest.raises(TypeError, match="weight"):
            as_schedule(wrong, "weight")  # type: ignore[arg-type]


# --- TAID
# -------------------------------------------------------------------------------------------------------

# Worked in 40-digit decimal arithmetic, independently of the class: α = β = ½, t₀ = 0.2, 10 steps.
TAID_TABLE = [  # loss, momentum, t
    (2.0, 0.0, 0.2),
    (1.0, 0.25, 0.4248706003543192),
    (1.0, 0.125, 0.5776276643516226),
    (3.0, -0.9375, 0.6370566361888216),
    (1.5, -0.21875, 0.7179076302510680),
    (0.5, 0.22395833333333331, 0.7962949963386512),
]


def test_taid_follows_the_hand_computed_table():
    t = TaidAdaptive(total=10, start=0.2, alpha=0.5, beta=0.5)
    for step, (loss, momentum, value) in enumerate(TAID_TABLE):
        assert t.update(loss, step) == pytest.approx(value, abs=1e-13)
        assert t.momentum == pytest.approx(momentum, abs=1e-13)
        assert t(12345) == t.t


def test_taid_linear_floor_wins_at_the_papers_step_size():
    t = TaidAdaptive(total=100, start=0.4)
    values = [t.update(loss, step) for step, loss in enumerate([2.5, 2.0, 2.1, 2.1])]
    assert values == pytest.approx([0.4, 0.406, 0.412, 0.418], abs=1e-14)
    assert t.momentum == pytest.approx(0.0014651999999999995, abs=1e-15)


def test_losses_may_be_tensors_in_the_graph():
    loss = torch.tensor(2.0, requires_grad=True) * 1.0
    t, threshold = TaidAdaptive(total=10), AdaptiveThreshold()
    assert t.update(loss, 0) == 0.4
    assert threshold.update(loss) == 0.0
    assert (t.previous_loss, threshold.reference) == (2.0, 2.0)


def test_taid_constant_loss_moves_by_half_alpha():
    t = TaidAdaptive(total=10**9, start=0.4, alpha=0.01)
    t.update(1.7, 0)
    before = t.t
    for _ in range(5):
        after = t.update(1.7, 0)
        assert after - before == pytest.approx(0.01 * 0.5 * (1 - before), abs=1e-15)
        before = after


def test_taid_without_adaptation_is_linear_and_never_exceeds_the_end():
    t = TaidAdaptive(total=4, start=0.2, end=0.6, adaptive=False)
    assert [t.update(1.0, step) for step in range(5)] == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.6])
    assert t.update(1.0, 9) == 0.6


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.0, 1e6), min_size=2, max_size=40), st.floats(0.0, 0.99), st.floats(0.0, 1.0))
def test_taid_is_monotone_and_bounded_for_any_loss(losses: list[float], start: float, alpha: float):
    t = TaidAdaptive(total=len(losses), start=start, alpha=alpha)
    values = [t.update(loss, step) for step, loss in enumerate(losses)]
    assert all(b >= a for a, b in pairwise(values))
    assert start <= values[0]
    assert values[-1] <= 1.0


def test_taid_resumes_through_json_at_every_step():
    whole = TaidAdaptive(total=10, start=0.2, alpha=0.5, beta=0.5)
    expected = [whole.update(loss, step) for step, (loss, _, _) in enumerate(TAID_TABLE)]
    for cut in range(len(TAID_TABLE)):
        first = TaidAdaptive(total=10, start=0.2, alpha=0.5, beta=0.5)
        values = [first.update(TAID_TABLE[step][0], step) for step in range(cut)]
        second = TaidAdaptive(total=10, start=0.2, alpha=0.5, beta=0.5)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        values += [second.update(TAID_TABLE[step][0], step) for step in range(cut, len(TAID_TABLE))]
        assert values == expected


# --- DistiLLM
# ---------------------------------------------------------------------------------------------------


def test_threshold_rises_only_past_the_tolerance_and_keeps_its_reference():
    threshold = AdaptiveThreshold(start=0.0, increment=0.4, tolerance=0.1)
    # 2.06 and 1.5 leave the reference at 2.0; 2.11 raises it; 2.2 is within 0.1 of 2.11; 3.0 and 4.0 saturate
    # at 1.
    losses = [2.0, 2.06, 1.5, 2.11, 2.2, 3.0, 4.0, 9.0]
    values = [threshold.update(loss) for loss in losses]
    assert values == pytest.approx([0.0, 0.0, 0.0, 0.4, 0.4, 0.8, 1.0, 1.0])
    assert threshold(0) == 1.0


def test_threshold_state_round_trip():
    first = AdaptiveThreshold()
    for loss in (1.0, 1.2):
        first.update(loss)
    second = AdaptiveThreshold()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.update(1.25) == first.update(1.25) == pytest.approx(0.1)
    assert second.update(1.31) == first.update(1.31) == pytest.approx(0.2)


# --- state of the others
# ----------------------------------------------------------------------------------------


def test_nested_state_reaches_the_adaptive_target():
    first = Warmup(TaidAdaptive(total=10, start=0.2, alpha=0.5), steps=2)
    first.target.update(2.0, 0)
    first.target.update(1.0, 1)
    second = Warmup(TaidAdaptive(total=10, start=0.2, alpha=0.5), steps=2)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second(1) == first(1) != Warmup(TaidAdaptive(total=10, start=0.2, alpha=0.5), steps=2)(1)


def test_state_of_another_kind_is_refused():
    with pytest.raises(ValueError, match=r"'Linear'.*'Cosine'"):
        Cosine(0.0, 1.0, steps=2).load_state_dict(Linear(0.0, 1.0, steps=2).state_dict())
    for schedule in (Constant(1.0), Linear(0, 1, 2), Exponential(1, 2, 2), Piecewise((1,), (0, 1))):
        schedule.load_state_dict(json.loads(json.dumps(schedule.state_dict())))


# --- per-sample temperatures
# ------------------------------------------------------------------------------------


def test_flsw_by_hand():
    student = torch.tensor([[3.0, 0.0], [0.0, 2.0], [1.0, 1.0]], requires_grad=True)
    teacher = torch.tensor([[1.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
    weights = [0.0, 1.0, (1 - math.sqrt(0.5)) ** 2]  # cosines 1, 0, 1/√2 and γ = 2
    mean = sum(weights) / 3
    tau = FLSW(4.0, beta=1.5, gamma=2.0)(student, teacher)
    assert tau.shape == (3, 1)
    assert not tau.requires_grad
    assert tau.squeeze(-1).tolist() == pytest.approx([4.0 + 1.5 * (mean - w) for w in weights], abs=1e-6)


def test_cwsm_by_hand_with_a_scheduled_base():
    student = torch.log(torch.tensor([[0.9, 0.1], [0.5, 0.5]]))
    weights = [1 / 0.901, 1 / 0.501]
    tau = CWSM(Linear(4.0, 2.0, steps=10), beta=1.0)(student, torch.zeros(2, 2), step=5)
    mean = sum(weights) / 2
    assert tau.squeeze(-1).tolist() == pytest.approx([3.0 + mean - w for w in weights], abs=1e-6)


def test_per_sample_masked_rows_do_not_move_the_others():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 5, 7, generator=generator), torch.randn(2, 5, 7, generator=generator)
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1]], dtype=torch.bool)
    full = FLSW(3.0, beta=2.0)(student, teacher, mask=mask).squeeze(-1)
    alone = FLSW(3.0, beta=2.0)(student[mask], teacher[mask]).squeeze(-1)
    torch.testing.assert_close(full[mask], alone)
    assert torch.all(full[~mask] == 3.0)
    assert alone.mean().item() == pytest.approx(3.0, abs=1e-5)


def test_per_sample_temperature_stays_positive_where_the_formula_does_not():
    student = torch.cat([torch.zeros(1, 1000), torch.eye(1, 1000) * 100])
    unsure, sure = CWSM(2.0, beta=1.0, minimum=0.25)(student, student).flatten().tolist()
    assert unsure == 0.25  # w = 1 / (1e-3 + 1e-3) = 500 against ≈ 1: the formula gives about −247
    assert sure == pytest.approx(2.0 + (500 + 1 / 1.001) / 2 - 1 / 1.001, abs=1e-2)


def test_per_sample_shapes_are_checked():
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 4\)"):
        FLSW(4.0, beta=1.0)(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="mask"):
        FLSW(4.0, beta=1.0)(torch.ones(2, 3), torch.ones(2, 3), mask=torch.ones(3, dtype=torch.bool))
