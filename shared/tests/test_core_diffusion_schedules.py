"""Schedules, predictions, times, guidance, counting, updates and EMA: identities in float64."""

from __future__ import annotations

import doctest
import importlib
import math
import pkgutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import stillhouse.core.diffusion as diffusion
from stillhouse.core.diffusion import (
    EDM,
    EMA,
    DiscreteVP,
    FunctionDenoiser,
    Guidance,
    IndexTimes,
    KarrasTimes,
    Local,
    LogitNormalTimes,
    NetworkDenoiser,
    NoiseSchedule,
    Prediction,
    RectifiedFlow,
    ShiftedTimes,
    StepSchedule,
    StratifiedTimes,
    Trig,
    UniformTimes,
    UpdateSchedule,
    VPCosine,
    VPLinear,
    at_level,
    convert,
    count_evaluations,
    power_decay,
    split,
    trig_route,
)

SCHEDULES: dict[str, NoiseSchedule] = {
    "vp_linear": VPLinear(),
    "vp_cosine": VPCosine(),
    "circle": VPCosine(offset=0.0),
    "flow": RectifiedFlow(),
    "flow_shift": RectifiedFlow(shift=3.2),
    "trig": Trig(),
    "trig_half": Trig(sigma_data=0.5),
    "edm": EDM(),
    "ddpm": DiscreteVP.linear(),
    "local": Local.linear(),
}


def inside(schedule: NoiseSchedule, count: int = 37) -> Tensor:
    """Times strictly inside the native range, none of them a knot of a table."""
    share = torch.linspace(0.01, 0.99, count, dtype=torch.float64)
    return schedule.t_min + (schedule.t_max - schedule.t_min) * share


def test_doctests() -> None:
    for info in pkgutil.iter_modules(diffusion.__path__):
        module = importlib.import_module(f"{diffusion.__name__}.{info.name}")
        assert doctest.testmod(module).failed == 0, module.__name__


@pytest.mark.parametrize("name", SCHEDULES)
def test_derivatives_are_those_of_finite_differences(name: str) -> None:
    schedule, t = SCHEDULES[name], inside(SCHEDULES[name])
    h = 1e-6 * (schedule.t_max - schedule.t_min)
    for value, slope in ((schedule.alpha, schedule.dalpha), (schedule.sigma, schedule.dsigma)):
        numeric = (value(t + h) - value(t - h)) / (2 * h)
        assert torch.allclose(slope(t), numeric, rtol=2e-6, atol=1e-9 / schedule.t_max)


@pytest.mark.parametrize("name", SCHEDULES)
def test_log_snr_falls_and_inverts(name: str) -> None:
    schedule, t = SCHEDULES[name], inside(SCHEDULES[name])
    log_snr = schedule.log_snr(t)
    assert bool((log_snr.diff() < 0).all())
    assert torch.allclose(schedule.t_from_log_snr(log_snr), t, rtol=1e-9, atol=1e-9)
    assert schedule.alpha(t).dtype == torch.float64
    if schedule.variance_preserving:
        assert torch.allclose(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, torch.ones_like(t))


@pytest.mark.parametrize("name", ["flow", "flow_shift", "trig", "circle"])
def test_pure_data_and_pure_noise_at_the_ends(name: str) -> None:
    schedule = SCHEDULES[name]
    assert float(schedule.sigma(schedule.t_min)) == 0.0
    assert float(schedule.alpha(schedule.t_max)) == pytest.approx(0.0, abs=1e-15)
    x0, eps = torch.ones(1, 2), torch.full((1, 2), 3.0)
    assert torch.equal(schedule.add_noise(x0, eps, schedule.t_min), x0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_two_steps_of_noise_are_one(name: str) -> None:
    """x_t given x_s: the coefficients of (x₀, ε) agree with those of x_t given x₀."""
    schedule = SCHEDULES[name]
    t = inside(schedule)
    s, t = t[:-5], t[5:]
    ratio, step = schedule.transition(s, t)
    assert torch.allclose(ratio * schedule.alpha(s), schedule.alpha(t))
    assert torch.allclose((ratio * schedule.sigma(s)) ** 2 + step**2, schedule.sigma(t) ** 2)
    with pytest.raises(ValueError, match="later"):
        schedule.renoise(torch.zeros(1, 2), float(t[3]), float(s[0]), torch.zeros(1, 2))


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(SCHEDULES)),
    share=st.floats(0.02, 0.98),
    x0=st.floats(-3, 3),
    eps=st.floats(-3, 3),
)
def test_every_prediction_converts_to_every_other(name: str, share: float, x0: float, eps: float) -> None:
    schedule = SCHEDULES[name]
    t = schedule.t_min + (schedule.t_max - schedule.t_min) * share
    data, noise = torch.tensor([[x0]], dtype=torch.float64), torch.tensor([[eps]], dtype=torch.float64)
    x_t = schedule.add_noise(data, noise, t)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    truth = {
        Prediction.X0: data,
        Prediction.EPS: noise,
        Prediction.FLOW: noise - data,
        Prediction.SCORE: -noise / sigma,
    }
    if schedule.variance_preserving:
        truth[Prediction.V] = alpha * noise - sigma * data
    if isinstance(schedule, Trig):
        truth[Prediction.TRIG] = math.cos(t) * noise - math.sin(t) * data / schedule.sigma_data
    for src, value in truth.items():
        for dst, expected in truth.items():
            found = convert(x_t, value, t, src, dst, schedule)
            scale = 1 + float(expected.abs()) + float(1 / alpha + 1 / sigma) * 3
            assert float((found - expected).abs()) < 1e-11 * scale**2, (src, dst)
        back = split(x_t, value, t, src, schedule)
        assert torch.allclose(alpha * back[0] + sigma * back[1], x_t, atol=1e-9)


def test_the_trig_prediction_is_its_velocity() -> None:
    schedule = Trig(sigma_data=0.5)
    x0, eps = torch.tensor([[0.7]], dtype=torch.float64), torch.tensor([[-1.1]], dtype=torch.float64)
    x_t = schedule.add_noise(x0, eps, 0.8)
    answer = convert(x_t, x0, 0.8, Prediction.X0, Prediction.TRIG, schedule)
    assert torch.allclose(0.5 * answer, schedule.velocity(x0, eps, 0.8))


def test_no_conversion_blows_up_at_the_ends() -> None:
    for name in ("flow", "trig", "circle", "edm"):
        schedule = SCHEDULES[name]
        for t in (schedule.t_min, schedule.t_max):
            for src in (Prediction.X0, Prediction.EPS, Prediction.FLOW, Prediction.SCORE):
                for dst in (Prediction.X0, Prediction.EPS, Prediction.FLOW, Prediction.SCORE):
                    out = convert(torch.ones(1, 2), torch.ones(1, 2), t, src, dst, schedule)
                    assert torch.isfinite(out).all(), (name, t, src, dst)


def test_kinds_that_a_schedule_has_not_are_refused() -> None:
    x = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="α² \\+ σ² = 1"):
        convert(x, x, 0.5, Prediction.V, Prediction.X0, RectifiedFlow())
    with pytest.raises(ValueError, match="Trig"):
        convert(x, x, 0.5, Prediction.X0, Prediction.TRIG, VPLinear())
    with pytest.raises(ValueError, match="out has shape"):
        convert(x, x[:, :0], 0.5, Prediction.X0, Prediction.EPS, VPLinear())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_dtype_of_the_sample_stays(dtype: torch.dtype) -> None:
    x = torch.ones(2, 3, dtype=dtype)
    t = torch.tensor([0.2, 0.4])
    assert SCHEDULES["flow"].add_noise(x, x, t).dtype == dtype
    assert convert(x, x, t, Prediction.FLOW, Prediction.X0, RectifiedFlow()).dtype == dtype


def test_times_carry_over_by_signal_to_noise() -> None:
    """The same pair (x₀, ε) at the matched time of another schedule is the scaled sample."""
    x0 = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    eps = torch.randn(5, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for name, other in (("flow", "ddpm"), ("vp_linear", "trig_half"), ("trig", "edm")):
        a, b = SCHEDULES[name], SCHEDULES[other]
        low = 0.2 if other == "ddpm" else 0.05
        t = a.t_min + (a.t_max - a.t_min) * torch.linspace(low, 0.95, 5, dtype=torch.float64)
        time, factor = at_level(a, b, t)
        assert torch.allclose(b.add_noise(x0, eps, time), factor[:, None] * a.add_noise(x0, eps, t))


# -- times ---------------------------------------------------------------------------------------------------


def test_grids() -> None:
    assert StepSchedule.uniform(2, Trig()).times.tolist() == pytest.approx([math.pi / 2, math.pi / 4, 0])
    shifted = StepSchedule.shifted(4, 3.0).times
    plain = StepSchedule.uniform(4).times
    assert torch.allclose(shifted, RectifiedFlow(3.0).sigma(plain))
    karras = StepSchedule.karras(5).times
    assert karras[0] == pytest.approx(80)
    assert karras[-2] == pytest.approx(0.002)
    assert float(karras[-1]) == 0.0
    parts = StepSchedule.uniform(8).segments(4)
    assert [p.steps for p in parts] == [2] * 4
    assert StepSchedule.uniform(8).phase_bounds(2) == [(1.0, 0.5), (0.5, 0.0)]
    with pytest.raises(ValueError, match="divide"):
        StepSchedule.uniform(8).segments(3)
    with pytest.raises(ValueError, match="fall"):
        StepSchedule(torch.tensor([0.0, 1.0]))


def test_time_samplers_have_their_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    n = 20000
    assert float(UniformTimes(0.02, 0.98)(n, generator).mean()) == pytest.approx(0.5, abs=0.01)
    logit = LogitNormalTimes(0.8, 1.5)(n, generator).logit()
    assert float(logit.mean()) == pytest.approx(0.8, abs=0.04)
    assert float(logit.std()) == pytest.approx(1.5, abs=0.04)
    shifted = ShiftedTimes(UniformTimes(), 3.0)(n, generator)
    back = shifted / (3 - 2 * shifted)
    assert float(back.mean()) == pytest.approx(0.5, abs=0.01)
    index = IndexTimes(10)(n, generator)
    assert sorted(set(index.tolist())) == list(range(10))
    levels = KarrasTimes(4)(n, generator)
    assert set(levels.tolist()) == set(StepSchedule.karras(4).times[:-1].tolist())


def test_stratified_times_are_one_between_each_pair_and_vary_less() -> None:
    nodes = trig_route(16)
    assert float(nodes[0]) == math.pi / 2
    generator = torch.Generator().manual_seed(0)
    sampler = StratifiedTimes(nodes)
    draws = torch.stack([sampler(16, generator) for _ in range(200)])
    assert bool((draws[:, 0] == nodes[0]).all())
    assert bool(((draws[:, 1:] <= nodes[:-1]) & (draws[:, 1:] >= nodes[1:])).all())
    free = torch.stack([UniformTimes(float(nodes[-1]), float(nodes[0]))(15, generator) for _ in range(200)])
    assert float(draws[:, 1:].mean(1).var()) < 0.1 * float(free.mean(1).var())
    with pytest.raises(ValueError, match="nodes"):
        sampler(4)


# -- guidance and counting -----------------------------------------------------------------------------------


def answer(x: Tensor, t: Tensor, cond: float) -> Tensor:
    return torch.full_like(x, cond)


def test_guidance_in_both_conventions_on_an_interval_and_counted() -> None:
    teacher = FunctionDenoiser(answer, RectifiedFlow(), Prediction.X0)
    x = torch.zeros(2, 3)
    with count_evaluations() as made:
        assert torch.equal(Guidance(3.0)(teacher, x, 0.5, 2.0, 1.0), torch.full_like(x, 4.0))
    assert made.count == 2
    extra = Guidance(2.0, convention="extra")
    assert torch.equal(extra(teacher, x, 0.5, 2.0, 1.0), torch.full_like(x, (1 + 2) * 2.0 - 2 * 1.0))
    for scale, expected in ((1.0, 2.0), (0.0, 1.0)):
        with count_evaluations() as made:
            assert torch.equal(Guidance(scale)(teacher, x, 0.5, 2.0, 1.0), torch.full_like(x, expected))
        assert made.count == 1
    part = Guidance(3.0, interval=(0.3, 0.7))
    mixed = part(teacher, x, torch.tensor([0.5, 0.9]), 2.0, 1.0)
    assert mixed[:, 0].tolist() == [4.0, 2.0]
    with count_evaluations() as made:
        part(teacher, x, 0.9, 2.0, 1.0)
    assert made.count == 1


def test_a_random_scale_is_drawn_and_conditions_are_dropped() -> None:
    guidance = Guidance((0.5, 4.0), cond_drop=0.25)
    generator = torch.Generator().manual_seed(0)
    draws = [guidance.draw(generator) for _ in range(300)]
    assert 0.5 <= min(draws) < 0.7 < 3.8 < max(draws) <= 4.0
    assert float(guidance.drop(8000, generator).double().mean()) == pytest.approx(0.25, abs=0.02)
    with pytest.raises(ValueError, match="draw"):
        guidance.weight()
    for options, message in (
        ({"scale": float("nan")}, "scale"),
        ({"convention": "imagen"}, "convention"),
        ({"interval": (0.7, 0.3)}, "interval"),
        ({"cond_drop": 1.0}, "cond_drop"),
    ):
        with pytest.raises(ValueError, match=message):
            Guidance(**options)  # type: ignore[arg-type]


def test_a_network_is_asked_for_what_the_caller_wants() -> None:
    seen: dict[str, object] = {}

    class Network(nn.Module):
        def forward(self, x: Tensor, t: Tensor, cond: object, **extra: object) -> object:
            seen.update(extra, t=t)
            return (x, ["features"]) if extra.get("features") else x

    denoiser = NetworkDenoiser(Network(), RectifiedFlow(), Prediction.FLOW, time_scale=1000.0)
    x = torch.ones(2, 2)
    plain = denoiser(x, 0.25, out=Prediction.FLOW)
    assert torch.equal(plain, x)
    assert seen["t"].tolist() == [250.0, 250.0]  # type: ignore[attr-defined]
    out, features = denoiser(x, 0.25, r=0.1, features=(1,))
    assert features == ["features"]
    assert torch.allclose(seen["r"], torch.tensor([100.0, 100.0]))  # type: ignore[arg-type]
    assert torch.allclose(out, x - 0.25 * x)


# -- updates and averages ------------------------------------------------------------------------------------


def test_update_schedules() -> None:
    rule = UpdateSchedule(ratio=5)
    turns = [rule.roles(i) for i in range(10)]
    assert turns.count(("student", "critic")) == 2
    assert turns.count(("critic",)) == 8
    exclusive = UpdateSchedule(ratio=4, exclusive=True)
    turns = [exclusive.roles(i) for i in range(10)]
    assert turns.count(("student",)) == 2
    assert ("student", "critic") not in turns
    both = UpdateSchedule(ratio=1, critics=("winner", "loser"), first="critic", warmup=2)
    assert both.roles(1) == ("winner", "loser")
    assert both.roles(2) == ("winner", "loser", "student")
    with pytest.raises(ValueError, match="ratio"):
        UpdateSchedule(ratio=0)


@pytest.mark.parametrize("gamma", [0.0, 7.0])
def test_the_power_average_is_its_closed_form(gamma: float) -> None:
    """Weights ∝ i^γ in the limit; for γ = 0 the plain mean, exactly."""
    live = nn.Linear(1, 1, bias=False)
    ema = EMA(live, power_decay(gamma))
    values = torch.arange(1.0, 401.0)
    for value in values:
        nn.init.constant_(live.weight, float(value))
        ema.update(live)
    found = float(ema.network.weight)  # type: ignore[arg-type]
    if gamma == 0:
        assert found == pytest.approx(float(values.mean()), rel=1e-5)
    else:
        expected = float((values.double() ** (gamma + 1)).sum() / (values.double() ** gamma).sum())
        assert found == pytest.approx(expected, rel=5e-3)


def test_the_average_is_frozen_follows_buffers_and_starts_late() -> None:
    live = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    ema = EMA(live, 0.9, start=2)
    for _ in range(2):
        live(torch.randn(8, 2))
        with torch.no_grad():
            live[0].weight.add_(1.0)
        ema.update(live)
    assert torch.equal(ema.network[0].weight, live[0].weight)  # type: ignore[index]
    assert torch.equal(ema.network[1].running_mean, live[1].running_mean)  # type: ignore[index]
    ema.train()
    assert not ema.network.training
    assert not any(p.requires_grad for p in ema.parameters())
    other = EMA(live, 0.9, start=2)
    other.load_state_dict(ema.state_dict())
    assert other.updates == 2
