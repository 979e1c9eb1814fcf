"""Identities I1 to I7 of few-step distillation, with a teacher in closed form."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from stillhouse.core.diffusion import (
    DDIM,
    Euler,
    Heun,
    NoiseSchedule,
    Policy,
    PolicyMap,
    Prediction,
    RectifiedFlow,
    SignalMap,
    StepSchedule,
    Trig,
    TrigMap,
    VPCosine,
    VPLinear,
    X0Map,
    boot_weight,
    convert,
    freeflow_target,
    phased_weight,
    scm_tangent,
    score_matching_surrogate,
    signal_step,
    subinterval_target,
    subinterval_weight,
    velocity,
)
from stillhouse.core.testing import GaussianMixture

FLOW = RectifiedFlow()
TWO = GaussianMixture.two()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small tensors: threads that wait for each other cost more than they bring."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def grid(low: float = -3.0, high: float = 3.0, count: int = 41) -> Tensor:
    return torch.linspace(low, high, count, dtype=torch.float64)[:, None]


# -- the oracle itself ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [FLOW, VPLinear(), VPCosine(), Trig(0.5)])
def test_the_oracle_s_score_is_the_gradient_of_the_log_density(schedule: NoiseSchedule) -> None:
    ring = GaussianMixture.ring(weights=range(1, 9))
    t = 0.4
    x = torch.randn(30, 2, generator=generator(), dtype=torch.float64).requires_grad_()
    (expected,) = torch.autograd.grad(ring.noised(schedule, t).log_prob(x).sum(), x)
    oracle = ring.denoiser(schedule)
    assert torch.allclose(oracle.score(x.detach(), t), expected, atol=1e-12)
    assert torch.allclose(oracle(x.detach(), t, out=Prediction.SCORE), expected, atol=1e-10)


def test_the_oracle_s_denoiser_is_the_conditional_mean() -> None:
    """By self-normalised importance sampling of x₀ given x_t."""
    t, x_t = 0.6, torch.tensor([[0.2]], dtype=torch.float64)
    x0 = TWO.sample(400_000, generator())
    weights = (-0.5 * ((x_t - (1 - t) * x0) / t).square()).exp()
    estimate = float((weights * x0).sum() / weights.sum())
    assert float(TWO.denoiser(FLOW)(x_t, t)) == pytest.approx(estimate, abs=0.01)


def test_a_label_leaves_its_component_alone() -> None:
    ring = GaussianMixture.ring()
    oracle = ring.denoiser(FLOW)
    x = torch.randn(3, 2, generator=generator(), dtype=torch.float64)
    cond = {"label": torch.tensor([2, -1, 5])}
    found = oracle(x, 0.5, cond)
    assert torch.allclose(found[0], ring.only(2).denoiser(FLOW)(x[:1], 0.5)[0])
    assert torch.allclose(found[1], oracle(x[1:2], 0.5)[0])


def test_the_flow_map_carries_samples_of_one_marginal_to_the_other() -> None:
    z = torch.randn(20001, 1, generator=generator(), dtype=torch.float64)
    x = TWO.flow_map(z, 1.0, 0.0, FLOW)
    assert torch.allclose(TWO.cdf(x), GaussianMixture([0.0]).cdf(z), atol=1e-12)
    assert float(x.std()) == pytest.approx(TWO.std, rel=0.02)
    solved = Heun().solve(TWO.denoiser(FLOW), z[:50], StepSchedule.uniform(400).times)
    assert float((solved - x[:50]).abs().max()) < 2e-3


# -- T1: the Euler row ---------------------------------------------------------------------------------------

# steps: (RMS, mean absolute) error; any few-step student has to beat the entry of its own evaluations
EULER_ROW = {
    1: (1.446, 1.270),
    2: (0.709, 0.520),
    4: (0.421, 0.271),
    8: (0.240, 0.136),
    16: (0.141, 0.0684),
    64: (0.0486, 0.0172),
}


def euler_error(steps: int) -> tuple[float, float]:
    """(RMS, mean absolute) error of Euler against the exact map, by quadrature over the noise."""
    u = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    z = torch.special.ndtri(u)[:, None]
    error = Euler().solve(TWO.denoiser(FLOW), z, StepSchedule.uniform(steps).times) - TWO.flow_map(
        z, 1.0, 0.0, FLOW
    )
    return float(error.square().mean().sqrt()), float(error.abs().mean())


@pytest.mark.parametrize("steps", EULER_ROW)
def test_the_euler_row(steps: int) -> None:
    assert euler_error(steps) == pytest.approx(EULER_ROW[steps], rel=5e-3)


def test_one_euler_step_lands_on_the_mean() -> None:
    z = grid()
    end = Euler().step(TWO.denoiser(FLOW), z, 1.0, 0.0)
    assert torch.allclose(end, torch.full_like(end, 0.1), atol=1e-12)
    rms, absolute = euler_error(1)
    assert rms == pytest.approx(TWO.std, rel=1e-3)
    assert rms == pytest.approx(1.446, abs=2e-3)
    assert absolute == pytest.approx(1.27, abs=0.01)


def test_orders_of_the_solvers() -> None:
    """Halving the step halves Euler's error and quarters Heun's; DDIM is Euler for a rectified flow."""
    teacher = GaussianMixture([0.4], 0.6).denoiser(FLOW)
    z = grid()
    exact = teacher.mixture.flow_map(z, 1.0, 0.0, FLOW)

    def error(solver: Euler | Heun | DDIM, steps: int) -> float:
        return float((solver.solve(teacher, z, StepSchedule.uniform(steps).times) - exact).abs().max())

    assert error(Euler(), 32) / error(Euler(), 64) == pytest.approx(2, abs=0.2)
    assert error(Heun(), 32) / error(Heun(), 64) == pytest.approx(4, abs=0.8)
    assert error(DDIM(), 8) == pytest.approx(error(Euler(), 8), rel=1e-9)


def test_ddim_is_exact_for_a_denoiser_that_never_changes_its_mind() -> None:
    from stillhouse.core.diffusion import FunctionDenoiser

    schedule = VPLinear()
    still = FunctionDenoiser(lambda x, t, cond: torch.full_like(x, 0.7), schedule, Prediction.X0)
    x0, eps = torch.full((1, 2), 0.7, dtype=torch.float64), torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    x = schedule.add_noise(x0, eps, 0.9)
    assert torch.allclose(DDIM().step(still, x, 0.9, 0.3), schedule.add_noise(x0, eps, 0.3), atol=1e-12)
    assert torch.allclose(X0Map(still).jump(x, 0.9, 0.3), schedule.add_noise(x0, eps, 0.3), atol=1e-12)


# -- I1 ------------------------------------------------------------------------------------------------------


def test_i1_scores_from_noise_from_flow_and_their_difference() -> None:
    x, t = grid(), 0.37
    p, q = TWO.denoiser(FLOW), GaussianMixture([0.5, -0.3], [0.4, 0.9]).denoiser(FLOW)
    alpha, sigma = 1 - t, t
    score = p.score(x, t)
    assert torch.allclose(score, -p(x, t, out=Prediction.EPS) / sigma, atol=1e-12)
    v = p(x, t, out=Prediction.FLOW)
    assert torch.allclose(score, -(x + alpha * v) / (sigma * (alpha + sigma)), atol=1e-12)
    gap = q.score(x, t) - score
    assert torch.allclose(gap, alpha / sigma**2 * (q(x, t) - p(x, t)), atol=1e-12)
    exact = convert(x, v, t, Prediction.FLOW, Prediction.SCORE, FLOW)
    assert float((exact + (x + alpha * v) / sigma).abs().max()) < 2e-14


# -- I2 ------------------------------------------------------------------------------------------------------


def test_i2_the_gradient_of_distribution_matching_is_that_of_the_kl() -> None:
    a, b, t = 1.4, -0.5, 0.6
    alpha, sigma = 1 - t, t
    m_q, v_q = alpha * b, alpha**2 * a**2 + sigma**2
    m_p, v_p = alpha * 0.8, alpha**2 * 0.6**2 + sigma**2
    analytic = torch.tensor([alpha**2 * a * (1 / v_p - 1 / v_q), alpha * (m_q - m_p) / v_p])
    assert analytic.tolist() == pytest.approx([0.20386, -0.49808], abs=1e-5)

    real = GaussianMixture([0.8], 0.6).denoiser(FLOW)
    fake = GaussianMixture([b], a).denoiser(FLOW)
    theta = torch.tensor([a, b], dtype=torch.float64, requires_grad=True)
    z = torch.randn(1_000_000, 1, generator=generator(), dtype=torch.float64)
    eps = torch.randn(1_000_000, 1, generator=generator(1), dtype=torch.float64)
    x = theta[0] * z + theta[1]
    x_t = FLOW.add_noise(x.detach(), eps, t)
    # s_f − s_r = α/σ²·(x0_f − x0_r), and dx_t/dx = α
    loss = score_matching_surrogate(x, fake(x_t, t), real(x_t, t), alpha**2 / sigma**2)
    (gradient,) = torch.autograd.grad(loss, theta)
    assert torch.allclose(gradient, analytic.double(), atol=3e-3)


# -- I3 ------------------------------------------------------------------------------------------------------

STEP_T, STEP_S = 0.8, 0.5
EXACT = {-1.0: -0.570, 0.0: -0.184, 0.5: 0.086}
NAIVE = {-1.0: -0.667, 0.0: -0.104, 0.5: 0.221}


def regress(targets: Tensor, x_t: Tensor, at: float) -> tuple[float, float]:
    """Local linear regression of targets at x_t = at: (value, standard error)."""
    near = (x_t - at).abs() < 0.1
    design = torch.stack([torch.ones_like(x_t[near]), x_t[near] - at], 1)
    coefficients = torch.linalg.lstsq(design, targets[near, None]).solution[:, 0]
    spread = (targets[near] - design @ coefficients).std()
    return float(coefficients[0]), float(spread) / math.sqrt(int(near.sum()))


def test_i3_the_target_on_a_sub_interval_is_unbiased_and_the_naive_one_is_not() -> None:
    count = 2_000_000
    x0, eps = TWO.sample(count, generator()), torch.randn(count, 1, generator=generator(1)).double()
    x_s = FLOW.add_noise(x0, eps, STEP_S)
    fresh = torch.randn(count, 1, generator=generator(2)).double()
    x_t = FLOW.renoise(x_s, STEP_S, STEP_T, fresh)
    unbiased = subinterval_target(x_s, fresh, STEP_S, STEP_T, FLOW)
    for at, exact in EXACT.items():
        v = float(TWO.denoiser(FLOW)(torch.tensor([[at]]).double(), STEP_T, out=Prediction.FLOW))
        assert v == pytest.approx(exact, abs=1e-3)
        found, error = regress(unbiased[:, 0], x_t[:, 0], at)
        assert abs(found - v) < 4 * error
        assert error < 0.02
        naive, error = regress((fresh - x_s)[:, 0], x_t[:, 0], at)
        assert naive == pytest.approx(NAIVE[at], abs=max(4 * error, 2e-3))
        assert abs(naive - v) > 5 * error


def test_i3_closed_form_of_the_naive_target() -> None:
    """E[ε − x_s | x_t] with the mixture of x_s: what the naive numbers are."""
    ratio, step = (float(v) for v in FLOW.transition(STEP_S, STEP_T))
    middle = TWO.noised(FLOW, STEP_S)
    for at, expected in NAIVE.items():
        x = torch.tensor([[at]], dtype=torch.float64)
        mean = float(middle.posterior_mean(x, torch.tensor([ratio]).double(), torch.tensor([step]).double()))
        assert (at - ratio * mean) / step - mean == pytest.approx(expected, abs=1.5e-3)


def test_i3_the_last_phase_is_the_plain_critic_s_target() -> None:
    x0, eps = TWO.sample(10, generator()), torch.randn(10, 1, generator=generator(1)).double()
    for schedule in (FLOW, VPCosine(offset=0.0)):
        assert torch.allclose(subinterval_target(x0, eps, 0.0, 0.7, schedule), eps - x0, atol=1e-6)
    assert float(subinterval_weight(0.5, 0.5001, FLOW)) == 10.0
    assert float(subinterval_weight(0.0, 0.8, FLOW)) == pytest.approx(1 / 0.64)
    with pytest.raises(ValueError, match="not before"):
        subinterval_target(x0, eps, 0.7, 0.7, FLOW)


def test_i3_the_generator_s_weight_is_the_score_s_times_the_inner_derivative() -> None:
    x, s, t = grid(), 0.3, 0.6
    p, q = TWO.denoiser(FLOW), GaussianMixture([0.5], 0.9).denoiser(FLOW)
    ratio, _ = FLOW.transition(s, t)
    expected = (q.score(x, t) - p.score(x, t)) * ratio
    flows = p(x, t, out=Prediction.FLOW) - q(x, t, out=Prediction.FLOW)
    assert torch.allclose(phased_weight(s, t, FLOW) * flows, expected, atol=1e-10)
    assert float(phased_weight(s, t, FLOW)) == pytest.approx(float((1 - t) * ratio / t))


# -- I4 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [0.2, 0.5, 0.9])
def test_i4_freeflow_s_target_is_the_exact_map_s_own_answer(d: float) -> None:
    """F + d·∂F/∂d = −v(f, 1 − d) with v towards the noise."""
    z = grid()

    def average(z: Tensor, d: Tensor) -> Tensor:
        now = float(d[0])
        return (TWO.flow_map(z, 1.0, 1 - now, FLOW) - z) / now

    def v(x: Tensor, t: Tensor) -> Tensor:
        return TWO.denoiser(FLOW)(x, t, out=Prediction.FLOW)

    live, target = freeflow_target(average, v, z, d, delta=1e-4)
    assert float((live - target).abs().max()) < 1e-6
    wrong = freeflow_target(average, lambda x, t: -v(x, t), z, d, delta=1e-4)[1]
    assert float((live - wrong).abs().max()) > 0.1


def test_i4_the_functional_derivative_equals_the_finite_one() -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)).double()

    def average(z: Tensor, d: Tensor) -> Tensor:
        return network(torch.cat([z, d[:, None]], 1))

    def v(x: Tensor, t: Tensor) -> Tensor:
        return TWO.denoiser(FLOW)(x, t, out=Prediction.FLOW)

    live, exact = freeflow_target(average, v, grid(), 0.4)
    _, finite = freeflow_target(average, v, grid(), 0.4, delta=1e-5)
    assert torch.allclose(exact, finite, atol=1e-8)
    assert live.requires_grad
    assert not exact.requires_grad


# -- I5 ------------------------------------------------------------------------------------------------------


def test_i5_the_signal_obeys_its_equation_and_steps_exactly_for_a_frozen_answer() -> None:
    """y = (x_t − σ_t·z)/α_t on the exact path: dy/dt = −λ′·(f(x_t) − y), λ = −log(α/σ)."""
    z, t, h = grid(-2, 2), 0.6, 1e-4

    def signal(at: float) -> Tensor:
        return (TWO.flow_map(z, 1.0, at, FLOW) - at * z) / (1 - at)

    slope = (signal(t + h) - signal(t - h)) / (2 * h)
    answer = TWO.denoiser(FLOW)(TWO.flow_map(z, 1.0, t, FLOW), t)
    rate = 1 / t + 1 / (1 - t)  # λ′ of −log((1 − t)/t)
    assert torch.allclose(slope, -rate * (answer - signal(t)), atol=1e-6)

    y, f, s = grid(-1, 1), torch.full_like(grid(), 0.3), 0.2
    for schedule in (FLOW, VPLinear(), VPCosine()):
        ratio = schedule.sigma(s) * schedule.alpha(t) / (schedule.alpha(s) * schedule.sigma(t))
        stepped = signal_step(y, f, t, s, schedule)
        assert torch.allclose(stepped, f + ratio * (y - f))
        # the same step by DDIM: x_t = α·y + σ·z
        noise = grid(-2, 2)
        x_t = schedule.alpha(t) * y + schedule.sigma(t) * noise
        eps = (x_t - schedule.alpha(t) * f) / schedule.sigma(t)
        x_s = schedule.alpha(s) * f + schedule.sigma(s) * eps
        assert torch.allclose((x_s - schedule.sigma(s) * noise) / schedule.alpha(s), stepped, atol=1e-10)
        assert float(boot_weight(t, s, schedule)) == pytest.approx(1 / (1 - float(ratio)) ** 2)
    # pure noise has no α to divide by: the first step gives the answer's share
    first = signal_step(torch.zeros_like(f), f, 1.0, 0.5, FLOW)
    assert torch.allclose(first, f)


def test_i5_a_signal_map_jumps_from_noise_only() -> None:
    student = SignalMap(lambda z, s, cond: torch.full_like(z, 2.0), FLOW)
    z = grid()
    assert torch.allclose(student.jump(z, 1.0, 0.25), 0.75 * 2.0 + 0.25 * z)
    with pytest.raises(ValueError, match="jumps from"):
        student.jump(z, 0.9, 0.0)


# -- I6 ------------------------------------------------------------------------------------------------------


def test_i6_arcflow_s_displacement_is_the_integral_of_its_velocity() -> None:
    g = generator()
    means = torch.randn(3, 5, 2, generator=g, dtype=torch.float64)
    weights = torch.randn(3, 5, generator=g, dtype=torch.float64).softmax(1)
    log_gammas = torch.randn(3, 5, generator=g, dtype=torch.float64)
    log_gammas[:, 0] = 0.0
    policy = Policy(means, weights, log_gammas, torch.full((3,), 0.9, dtype=torch.float64))
    a, b = 0.9, 0.2
    nodes = [-0.9061798459386640, -0.5384693101056831, 0.0, 0.5384693101056831, 0.9061798459386640]
    shares = [0.2369268850561891, 0.4786286704993665, 0.5688888888888889, 0.4786286704993665]
    shares.append(shares[0])
    total = torch.zeros(3, 2, dtype=torch.float64)
    pieces = 20
    for i in range(pieces):  # Gauss–Legendre, composite
        low, width = b + (a - b) * i / pieces, (a - b) / pieces
        for node, share in zip(nodes, shares, strict=True):
            total += share * width / 2 * policy.velocity(low + width * (node + 1) / 2)
    assert float((policy.displacement(a, b) + total).abs().max()) < 1e-14
    assert torch.allclose(
        policy.displacement(a, 0.5) + policy.displacement(0.5, b), policy.displacement(a, b)
    )
    student = PolicyMap(lambda x, t, cond: policy, FLOW)
    x = torch.zeros(3, 2, dtype=torch.float64)
    assert torch.allclose(student.jump(x, a, b), policy.displacement(a, b))


def test_i6_no_growth_is_a_straight_line_and_tiny_growth_is_continuous() -> None:
    means = torch.tensor([[[1.0], [3.0]]], dtype=torch.float64)
    weights = torch.tensor([[0.25, 0.75]], dtype=torch.float64)
    source = torch.ones(1, dtype=torch.float64)
    straight = Policy(means, weights, torch.zeros(1, 2, dtype=torch.float64), source)
    assert float(straight.displacement(0.8, 0.3)) == pytest.approx(-0.5 * 2.5)
    for log_gamma in (9e-5, 2.1e-4, -1e-9):
        policy = Policy(means, weights, torch.full((1, 2), log_gamma, dtype=torch.float64), source)
        exact = -2.5 * (math.exp(0.2 * log_gamma) * math.expm1(0.5 * log_gamma) / log_gamma)
        assert float(policy.displacement(0.8, 0.3)) == pytest.approx(exact, rel=1e-13)


# -- I7 ------------------------------------------------------------------------------------------------------

HALF = Trig(sigma_data=0.5)
SMALL = TWO.scaled(0.5 / TWO.std)


def exact_network(x: Tensor, t: Tensor) -> Tensor:
    """F of the exact consistency function: f(x, t) = cos t·x − sin t·σ_d·F(x/σ_d, t) = x₀ of the path."""
    at, state = float(t[0]), 0.5 * x
    end = SMALL.flow_map(state, at, 0.0, HALF)
    return (math.cos(at) * state - end) / (math.sin(at) * 0.5)


@pytest.mark.parametrize("t", [0.4, 0.9, 1.3])
def test_i7_the_tangent_vanishes_for_the_exact_consistency_function(t: float) -> None:
    x = SMALL.flow_map(0.5 * grid(-2.5, 2.5), math.pi / 2, t, HALF)
    slope = velocity(SMALL.denoiser(HALF), x, t)
    _, g = scm_tangent(exact_network, x, t, slope, sigma_data=0.5, warmup=1.0, delta=1e-4)
    assert float(g.abs().max()) < 1e-6
    _, cold = scm_tangent(exact_network, x, t, slope, sigma_data=0.5, warmup=0.0, delta=1e-4)
    assert 0.04 < float(cold.abs().max()) < 0.4
    assert float(cold.abs().mean()) > 1e4 * float(g.abs().max())


def test_i7_the_tangent_is_cos_t_times_the_total_derivative_and_jvp_agrees() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)).double()

    def network(x: Tensor, t: Tensor) -> Tensor:
        return net(torch.cat([x, t[:, None]], 1))

    x, t, slope = grid(), 0.9, 0.3 * grid().cos()
    still, g = scm_tangent(network, x, t, slope, sigma_data=0.5)
    _, finite = scm_tangent(network, x, t, slope, sigma_data=0.5, delta=1e-5)
    assert torch.allclose(g, finite, atol=1e-8)

    def f(x: Tensor, at: float) -> Tensor:
        time = torch.full((len(x),), at, dtype=torch.float64)
        return math.cos(at) * x - math.sin(at) * 0.5 * network(x / 0.5, time)

    h = 1e-5
    total = (f(x + h * slope, t + h) - f(x - h * slope, t - h)) / (2 * h)
    assert torch.allclose(g, math.cos(t) * total.detach(), atol=1e-8)
    assert torch.allclose(still, network(x / 0.5, torch.full((len(x),), t, dtype=torch.float64)))
    _, unit = scm_tangent(network, x, t, slope, sigma_data=0.5, normalise=0.1)
    assert torch.allclose(unit, g / (g.abs() + 0.1))


def test_i7_gaussian_data_have_nothing_to_learn_and_the_map_is_a_rotation() -> None:
    gauss = GaussianMixture([0.0], 0.5)
    x = grid()
    for t in (0.3, 1.2):
        oracle = gauss.denoiser(HALF)
        assert float(oracle(x, t, out=Prediction.TRIG).abs().max()) < 1e-12
    student = TrigMap(lambda x, t, cond: torch.zeros_like(x), HALF)
    assert torch.allclose(student.jump(x, 1.0, 0.2), math.cos(0.8) * x)


def test_the_trig_map_is_the_ddim_jump() -> None:
    oracle = TWO.denoiser(HALF)
    student = TrigMap(lambda x, t, cond: oracle(0.5 * x, t, out=Prediction.TRIG), HALF)
    x = grid()
    assert torch.allclose(student.jump(x, 1.2, 0.3), X0Map(oracle).jump(x, 1.2, 0.3), atol=1e-10)
    assert torch.allclose(student.jump(x, 1.2, 0.3), DDIM().step(oracle, x, 1.2, 0.3), atol=1e-10)
