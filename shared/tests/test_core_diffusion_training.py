"""Surrogates, adversarial terms, critic, samplers; a student that beats Euler; diffusers as an oracle."""

from __future__ import annotations

import copy
import itertools
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stillhouse.core.diffusion import (
    DDIM,
    AverageVelocityMap,
    Critic,
    DiscreteVP,
    Euler,
    Guidance,
    NetworkDenoiser,
    Prediction,
    RectifiedFlow,
    StepSchedule,
    UniformTimes,
    UpdateSchedule,
    VPCosine,
    X0Map,
    consistency,
    count_evaluations,
    distribution_matching,
    dsm,
    f_weight,
    gan_d,
    gan_g,
    kl_logits,
    r1,
    sample,
    sample_with_scheduler,
    schedule_of,
    score_matching_surrogate,
    vsd_surrogate,
)
from stillhouse.core.errors import MissingDependencyError
from stillhouse.core.metrics import mmd2, mode_coverage
from stillhouse.core.testing import (
    GaussianMixture,
    assert_gradcheck,
    assert_gradient,
    assert_no_gradient,
)
from stillhouse.core.train import Losses, OptimConfig, Step, TrainConfig, Trainer

FLOW = RectifiedFlow()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- surrogates ----------------------------------------------------------------------------------------------


def test_a_surrogate_s_gradient_is_what_it_says() -> None:
    x, fake, real = normal(3, 4).requires_grad_(), normal(3, 4, seed=1), normal(3, 4, seed=2)
    weight = torch.tensor([1.0, 2.0, 0.5])
    direction = weight[:, None] * (fake - real)
    for reduction, count in (("sum", 1), ("mean", 12), ("batch_mean", 3)):
        loss = score_matching_surrogate(x, fake, real, weight, reduction=reduction)  # type: ignore[arg-type]
        assert torch.allclose(torch.autograd.grad(loss, x)[0], direction / count)
        loss = vsd_surrogate(fake - real, x, weight=weight, reduction=reduction)  # type: ignore[arg-type]
        assert torch.allclose(torch.autograd.grad(loss, x)[0], direction / count)


def test_no_gradient_reaches_teacher_or_critic() -> None:
    x, net = normal(3, 4).requires_grad_(), nn.Linear(4, 4).double()
    for loss in (
        score_matching_surrogate(x, net(x), net(x) + 1, normaliser="dmd2"),
        vsd_surrogate(net(x), x, normaliser="rms"),
        consistency(x, net(x)),
        dsm(x, net(x)),
    ):
        assert_gradient(loss, x)
        assert_no_gradient(loss, net)


def test_normalisers() -> None:
    x, fake, real = normal(3, 4).requires_grad_(), normal(3, 4, seed=1), normal(3, 4, seed=2)
    scale = (x.detach() - real).abs().mean(1, keepdim=True)
    for normaliser, expected in (
        ("dmd2", (fake - real) / scale),
        ("fastgen", (fake - real) / (scale + 1e-6)),
    ):
        loss = score_matching_surrogate(x, fake, real, normaliser=normaliser, reduction="sum")  # type: ignore[arg-type]
        assert torch.allclose(torch.autograd.grad(loss, x)[0], expected)
    # where the sample is the teacher's answer DMD2 divides by zero, and turns that into numbers
    loss = score_matching_surrogate(x, x.detach(), x.detach(), normaliser="dmd2")
    assert torch.equal(torch.autograd.grad(loss, x)[0], torch.zeros(3, 4, dtype=torch.float64))
    g = fake - real
    for name, size in (("abs_mean", g.abs().mean(1)), ("rms", g.square().mean(1).sqrt())):
        loss = vsd_surrogate(g, x, normaliser=name, reduction="sum")  # type: ignore[arg-type]
        assert torch.allclose(torch.autograd.grad(loss, x)[0], g / size[:, None])
        zero = vsd_surrogate(torch.zeros_like(g), x, normaliser=name)  # type: ignore[arg-type]
        assert torch.equal(torch.autograd.grad(zero, x)[0], torch.zeros_like(g))


def test_masks_leave_out_and_do_not_dilute() -> None:
    x, target = normal(2, 4).requires_grad_(), normal(2, 4, seed=1)
    mask = torch.tensor([[True, True, False, False], [True, False, False, False]])
    loss = dsm(x, target.masked_fill(~mask, float("nan")), mask=mask)
    expected = ((x - target)[mask] ** 2).mean()
    assert torch.allclose(loss, expected)
    assert torch.isfinite(torch.autograd.grad(loss, x)[0]).all()
    nothing = dsm(x, target, mask=torch.zeros_like(mask))
    assert float(nothing.detach()) == 0.0
    same = vsd_surrogate(target, x, mask=mask)
    assert torch.allclose(same, (target * x)[mask].mean())


def test_consistency_metrics() -> None:
    a, b = normal(3, 2), normal(3, 2, seed=1)
    assert torch.allclose(consistency(a, b), (a - b).square().mean())
    assert torch.allclose(consistency(a, b, "l1"), (a - b).abs().mean())
    huber = consistency(a, b, "huber", huber_c=0.5)
    assert torch.allclose(huber, (((a - b) ** 2 + 0.25).sqrt() - 0.5).mean())
    for metric in ("l2", "huber"):
        assert_gradcheck(lambda x, m=metric: consistency(x, b, m), a)  # type: ignore[misc]


def test_wrong_surrogate_arguments_are_named() -> None:
    x = torch.zeros(2, 3)
    for call, message in (
        (lambda: dsm(x, x[:1]), "target has shape"),
        (lambda: score_matching_surrogate(x, x, x[:, :1]), "real has shape"),
        (lambda: score_matching_surrogate(x, x, x, normaliser="dmd"), "normaliser"),
        (lambda: vsd_surrogate(x, x, reduction="avg"), "reduction"),
        (lambda: vsd_surrogate(x, x, weight=torch.ones(3)), "weight has 3"),
        (lambda: consistency(x, x, "lpips"), "metric"),
    ):
        with pytest.raises(ValueError, match=message):
            call()  # type: ignore[no-untyped-call]


# -- adversarial ---------------------------------------------------------------------------------------------


def test_adversarial_terms() -> None:
    real, fake = normal(5), normal(5, seed=1)
    assert torch.allclose(gan_g(fake), torch.log1p((-fake).exp()).mean())
    expected = -(torch.sigmoid(real).log().mean() + (1 - torch.sigmoid(fake)).log().mean())
    assert torch.allclose(gan_d(real, fake), expected)
    weight = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64, requires_grad=True)
    x = normal(4, 3).requires_grad_()
    penalty = r1(x @ weight, x)
    assert torch.allclose(penalty, weight.square().sum())
    assert torch.allclose(torch.autograd.grad(penalty, weight)[0], 2 * weight)
    with pytest.raises(ValueError, match="requires_grad_"):
        r1(x.detach() @ weight, x.detach())


@pytest.mark.parametrize("name", ["rkl", "kl", "js", "sf", "neyman", "sh", "jf"])
def test_f_weights_are_normalised_and_of_the_right_shape(name: str) -> None:
    r = torch.tensor([0.25, 1.0, 4.0], dtype=torch.float64)
    h = {
        "rkl": torch.ones(3), "kl": r, "js": 1 - 1 / (1 + r), "sf": 1 / (1 + r),
        "neyman": 1 / r, "sh": r.sqrt(), "jf": 1 + r,
    }[name]  # fmt: skip
    found = f_weight(r.log(), name)  # type: ignore[arg-type]
    assert float(found.mean()) == pytest.approx(1.0)
    assert torch.allclose(found / found[0], (h / h[0]).double())


def test_the_logit_divergence_is_teacher_to_student() -> None:
    s, t = normal(2, 5, 7), normal(2, 5, 7, seed=1)
    mask = torch.rand(2, 5) < 0.5
    p = t.softmax(-1)
    expected = (p * (t.log_softmax(-1) - s.log_softmax(-1))).sum(-1)[mask].mean()
    assert torch.allclose(kl_logits(s, t, mask=mask).double(), expected)


# -- samplers ------------------------------------------------------------------------------------------------


def test_modes_of_the_sampler_keep_the_law_of_an_exact_map() -> None:
    """With the exact flow map every mode gives the data's distribution; so does any number of steps."""
    two = GaussianMixture.two()

    class Exact:
        schedule = FLOW

        def jump(self, x: Tensor, t: float, s: float, cond: Any = None) -> Tensor:
            return two.flow_map(x, t, s, FLOW)

    z = normal(20000, 1)
    for mode, gamma in (("ode", 0.0), ("sde", 0.0), ("tcd", 0.3)):
        generator = torch.Generator().manual_seed(1)
        made = sample(Exact(), z, StepSchedule.uniform(3), mode, gamma=gamma, generator=generator)  # type: ignore[arg-type]
        rank = two.cdf(made.x).flatten().sort().values
        uniform = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
        assert float((rank - uniform).abs().max()) < 0.012  # Kolmogorov–Smirnov, p ≈ 0.01


def test_tcd_lies_between_ode_and_sde() -> None:
    teacher = X0Map(GaussianMixture.two().denoiser(FLOW))
    z, steps = normal(6, 1), StepSchedule.uniform(4)
    runs = {}
    for mode, gamma in (("ode", 0.0), ("sde", 0.0), ("tcd", 0.0), ("tcd", 1.0)):
        generator = torch.Generator().manual_seed(0)
        runs[mode, gamma] = sample(teacher, z, steps, mode, gamma=gamma, generator=generator).x  # type: ignore[arg-type]
    assert torch.equal(runs["tcd", 0.0], runs["ode", 0.0])
    assert torch.equal(runs["tcd", 1.0], runs["sde", 0.0])


def test_evaluations_are_counted_and_guidance_counts_two() -> None:
    oracle = GaussianMixture.ring().denoiser(FLOW)
    label = {"label": torch.tensor([1, 2])}
    none = {"label": torch.tensor([-1, -1])}
    z, steps = normal(2, 2), StepSchedule.uniform(5)
    plain = sample(X0Map(oracle), z, steps, cond=label, return_path=True)
    assert plain.evaluations == 5
    assert len(plain.path) == 6
    guided = Guidance(3.0).bind(oracle, none)
    assert sample(X0Map(guided), z, steps, cond=label).evaluations == 10
    interval = Guidance(3.0, interval=(0.3, 0.7)).bind(oracle, none)
    assert sample(X0Map(interval), z, steps, cond=label).evaluations == 5 + 2  # at 0.6 and 0.4
    with count_evaluations() as made:
        DDIM().solve(oracle, z, steps.times, label)
    assert made.count == 5
    mean = AverageVelocityMap(lambda x, t, s, cond: torch.zeros_like(x), FLOW)
    assert sample(mean, z, steps).evaluations == 5


def test_impossible_walks_are_refused() -> None:
    teacher = X0Map(GaussianMixture.two().denoiser(FLOW))
    z = normal(2, 1)
    with pytest.raises(ValueError, match="mode"):
        sample(teacher, z, StepSchedule.uniform(2), "ddpm")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="gamma"):
        sample(teacher, z, StepSchedule.uniform(2), "tcd", gamma=2.0)
    with pytest.raises(ValueError, match="native time"):
        sample(teacher, z, StepSchedule.karras(3))


# -- the critic and distribution matching -------------------------------------------------------------------


class Perceptron(nn.Module):
    """A small network of x and t; returns its hidden layer where it is asked for."""

    def __init__(self, dim: int = 2, width: int = 96) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(dim + 5, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
        )  # fmt: skip
        self.last = nn.Linear(width, dim)

    def forward(self, x: Tensor, t: Tensor, cond: Any, features: Sequence[int] = ()) -> Any:
        time = torch.stack([t, (6.28 * t).sin(), (6.28 * t).cos(), (12.57 * t).sin(), (12.57 * t).cos()], 1)
        hidden = self.body(torch.cat([x, time], 1))
        return (self.last(hidden), hidden) if features else self.last(hidden)


def denoiser(seed: int) -> NetworkDenoiser:
    torch.manual_seed(seed)
    return NetworkDenoiser(Perceptron(), FLOW, Prediction.FLOW)


def test_the_critic_s_loss_is_smallest_for_the_true_score() -> None:
    """Against the oracle of its own samples, in the kind of prediction the network has."""
    ring = GaussianMixture.ring()
    x = ring.sample(4000, torch.Generator().manual_seed(0)).float()

    class Exact(nn.Module):
        def __init__(self, off: float) -> None:
            super().__init__()
            self.off = nn.Parameter(torch.tensor(off))

        def forward(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
            return ring.denoiser(FLOW)(x, t, out=Prediction.FLOW) + self.off

    values = {}
    for off in (-0.3, 0.0, 0.3):
        critic = Critic(NetworkDenoiser(Exact(off), FLOW, Prediction.FLOW))
        loss = critic.loss(x, UniformTimes(0.05, 0.95), generator=torch.Generator().manual_seed(1))
        values[off] = float(loss.detach())
    assert values[0.0] < values[0.3] - 0.05
    assert values[0.0] < values[-0.3] - 0.05


def test_the_critic_is_held_in_the_student_s_turn() -> None:
    critic = Critic(denoiser(0), head=nn.Linear(96, 1), features=(1,))
    x = torch.randn(4, 2, requires_grad=True)
    with critic.held():
        loss = gan_g(critic.logits(x, 0.5))
        assert_gradient(loss, x)
        loss.backward()
    assert all(p.grad is None for p in critic.parameters())
    assert all(p.requires_grad for p in critic.parameters())
    with pytest.raises(ValueError, match="no head"):
        Critic(denoiser(0)).logits(x, 0.5)
    with pytest.raises(ValueError, match="features"):
        Critic(denoiser(0), head=nn.Linear(96, 1))


class Matching:
    """DMD without a GAN, one step: z → x̂ by the student's x₀ at t = 1; the teacher is the oracle."""

    def __init__(self, teacher: Any, *, ratio: int = 5, use_fake: bool = True) -> None:
        self.teacher, self.use_fake = teacher, use_fake
        self.student = denoiser(0)
        self.critic = Critic(copy.deepcopy(self.student))
        self.schedule = UpdateSchedule(ratio=ratio)

    def trainable(self) -> Mapping[str, nn.Module]:
        return {"student": self.student, "critic": self.critic}

    def frozen(self) -> Mapping[str, nn.Module]:
        return {}

    def roles(self, step: int) -> Sequence[str]:
        return self.schedule.roles(step)

    def loss(self, role: str, batch: Any, step: Step) -> Losses:
        x = self.student(torch.randn(256, 2), 1.0)
        if role == "critic":
            value = self.critic.loss(x, UniformTimes(0.02, 0.98))
        elif self.use_fake:
            value = distribution_matching(x, self.teacher, self.critic, UniformTimes(0.02, 0.98))
        else:  # score distillation without the critic
            t = UniformTimes(0.02, 0.98)(256)
            x_t = FLOW.add_noise(x.detach(), torch.randn(256, 2), t)
            value = score_matching_surrogate(x, x.detach(), self.teacher(x_t, t))
        return Losses(value, {"loss": value})


def regression(teacher: Any, student: NetworkDenoiser, steps: int = 400) -> None:
    """The student starts where DMD starts: it knows the teacher's flow, roughly."""
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
    for _ in range(steps):
        x0 = teacher.mixture.sample(256).float()
        eps, t = torch.randn(256, 2), torch.rand(256, dtype=torch.float64)
        x_t = FLOW.add_noise(x0, eps, t)
        loss = dsm(student(x_t, t, out=Prediction.FLOW), eps - x0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def distance(student: NetworkDenoiser, ring: GaussianMixture) -> tuple[float, int]:
    with torch.no_grad():
        made = student(normal(2000, 2, seed=9).float(), 1.0).double()
    data = ring.sample(2000, torch.Generator().manual_seed(5))
    return mmd2(made, data), mode_coverage(made, ring.means, std=0.15).covered


@pytest.mark.slow
def test_a_one_step_student_beats_one_step_of_euler_and_collapses_without_its_critic() -> None:
    """Distribution matching on the ring of eight, Euler at equal evaluations; the ablation is worse."""
    ring = GaussianMixture.ring()
    teacher = ring.denoiser(FLOW)
    euler = Euler().solve(teacher, normal(2000, 2, seed=9), StepSchedule.uniform(1).times)
    data = ring.sample(2000, torch.Generator().manual_seed(5))
    baseline = mmd2(euler, data)
    optim = {
        "student": OptimConfig(name="adam", lr=1e-3, betas=(0.0, 0.99), schedule="linear"),
        "critic": OptimConfig(name="adam", lr=2e-3, betas=(0.0, 0.99), schedule="constant"),
    }
    scores = {}
    for use_fake in (True, False):
        distiller = Matching(teacher, use_fake=use_fake)
        torch.manual_seed(1)
        regression(teacher, distiller.student)
        distiller.critic.denoiser.load_state_dict(distiller.student.state_dict())
        trainer = Trainer(TrainConfig(steps=4000, threads=1), out=None, quiet=True)
        trainer.fit(distiller, itertools.repeat(0), optim)
        scores[use_fake] = distance(distiller.student, ring)
    assert scores[True][0] < 0.25 * baseline
    assert scores[True][1] >= 7
    assert scores[False][0] > 2 * scores[True][0]


# -- diffusers -----------------------------------------------------------------------------------------------


@pytest.mark.oracle
@pytest.mark.parametrize("steps", [1, 5, 20])
@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_ddim_equals_that_of_diffusers(steps: int, kind: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(
        1000,
        beta_start=1e-4,
        beta_end=0.02,
        clip_sample=False,
        set_alpha_to_one=True,
        prediction_type=kind,
        timestep_spacing="trailing",
    )
    schedule = schedule_of(scheduler)
    assert isinstance(schedule, DiscreteVP)
    teacher = GaussianMixture.ring(weights=range(1, 9)).denoiser(schedule)
    z = normal(16, 2)
    found = sample_with_scheduler(scheduler, teacher, z, steps)
    assert found.evaluations == steps
    times = scheduler.timesteps.double()
    x = z
    for t, s in itertools.pairwise(times.tolist()):
        x = DDIM().step(teacher, x, t, s)
    x = teacher(x, float(times[-1]))  # its last α is 1: the answer itself
    # diffusers keeps its betas in float32, and so does the schedule made of them
    assert float((found.x - x).abs().max()) < 2e-5


@pytest.mark.oracle
def test_first_order_dpm_solver_is_ddim_and_second_order_is_better() -> None:
    """The schedule's own DDIM against DPM-Solver++ of diffusers, on the exact map of a mixture."""
    diffusers = pytest.importorskip("diffusers")
    mixture = GaussianMixture.two()
    z = normal(200, 1)
    errors = {}
    for order in (1, 2):
        scheduler = diffusers.DPMSolverMultistepScheduler(
            1000, beta_start=1e-4, beta_end=0.02, solver_order=order, final_sigmas_type="zero",
            timestep_spacing="trailing",
        )  # fmt: skip
        schedule = schedule_of(scheduler)
        teacher = mixture.denoiser(schedule)
        found = sample_with_scheduler(scheduler, teacher, z, 20).x
        if order == 1:
            times = scheduler.timesteps.double().tolist()
            x = z
            for t, s in itertools.pairwise(times):
                x = DDIM().step(teacher, x, t, s)
            x = teacher(x, times[-1])
            assert float((found - x).abs().max()) < 1e-4
        exact = mixture.transport(z, mixture.noised(schedule, 999))
        errors[order] = float((found - exact).square().mean().sqrt())
    assert errors[2] < 0.6 * errors[1]


@pytest.mark.oracle
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_equals_the_flow_matching_of_diffusers(shift: float) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(1000, shift=shift)
    assert isinstance(schedule_of(scheduler), RectifiedFlow)
    teacher = GaussianMixture.ring().denoiser(FLOW)
    z = normal(16, 2)
    found = sample_with_scheduler(scheduler, teacher, z, 8, return_path=True)
    expected = Euler().solve(teacher, z, scheduler.sigmas.double())
    assert float((found.x - expected).abs().max()) < 1e-5
    assert found.evaluations == 8
    assert len(found.path) == 9


@pytest.mark.oracle
def test_the_cosine_schedule_is_that_of_improved_ddpm() -> None:
    diffusers = pytest.importorskip("diffusers")
    table = diffusers.DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2").alphas_cumprod.double()
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    ours = VPCosine().alpha(t).square()
    assert torch.allclose(ours[:990], table[:990], atol=1e-5)  # its last betas are clipped


def test_a_scheduler_without_a_known_schedule_and_a_missing_library_say_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(TypeError, match="no schedule is known"):
        schedule_of(object())
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(MissingDependencyError, match="pip install"):
        sample_with_scheduler(object(), None, torch.zeros(1, 1), 1)  # type: ignore[arg-type]


def test_the_package_does_not_load_diffusers() -> None:
    code = "import sys; import stillhouse.core.diffusion; assert 'diffusers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
