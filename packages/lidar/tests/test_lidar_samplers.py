"""T5: each sampler with an ideal network and a true offset of 0.300 m; guidance, counting, gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stillhouse.core.testing import assert_gradient
from stillhouse.lidar.process import LocalProcess, VPProcess
from stillhouse.lidar.samplers import keep_scene, sample

OFFSET = 0.300


def ideal(truth: Tensor, process: LocalProcess) -> Callable[[Tensor, Any, Tensor], Tensor]:
    """The noise that takes `truth` to x_t."""

    def network(x: Tensor, condition: Any, t: Tensor) -> Tensor:
        alpha = process.schedule.alpha(t.double())[:, None, None].to(x.dtype)
        sigma = process.sigma(t.double())[:, None, None].to(x.dtype)
        return (x - alpha * truth) / sigma

    return network


def scan(points: int = 2000) -> Tensor:
    return 20 * torch.rand(1, points, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def displaced(steps: int, sampler: str, **options: Any) -> tuple[float, float]:
    """Mean and standard deviation of the offset that a sampler finds; the truth is 0.300 and 0."""
    x = scan()
    process = LocalProcess()
    made = sample(
        ideal(x + OFFSET, process),
        None,
        x,
        steps=steps,
        sampler=sampler,  # type: ignore[arg-type]
        generator=torch.Generator().manual_seed(0),
        **options,
    )
    offset = made.points - x
    return float(offset.mean()), float(offset.std())


@pytest.mark.parametrize("steps", [1, 2, 8, 50])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_t5_the_local_sampler_is_exact_at_any_number_of_steps(steps: int, eta: float) -> None:
    mean, std = displaced(steps, "local", eta=eta)
    assert mean == pytest.approx(OFFSET, abs=1e-3)
    assert std < 1e-3


@pytest.mark.oracle
@pytest.mark.parametrize(("steps", "expected"), [(1, 1.749), (8, 0.309), (50, 0.300)])
def test_t5_the_reference_sampler_overshoots_in_few_steps(steps: int, expected: float) -> None:
    mean, _ = displaced(steps, "vp_reference")
    assert mean == pytest.approx(expected, abs=1e-3)


@pytest.mark.oracle
def test_the_last_noise_level_of_the_reference_is_an_option() -> None:
    _, zero = displaced(50, "vp_reference", final_sigmas_type="zero")
    _, old = displaced(50, "vp_reference", final_sigmas_type="sigma_min")
    assert zero < 1e-4
    assert old == pytest.approx(0.006, abs=1e-3)


@pytest.mark.oracle
def test_the_reference_starts_from_noise_of_standard_deviation_one() -> None:
    x = scan()
    result = sample(
        lambda x, c, t: torch.zeros_like(x),
        None,
        x,
        steps=2,
        sampler="vp_reference",
        generator=torch.Generator().manual_seed(0),
        return_path=True,
    )
    assert result.path is not None
    assert float((result.path[0] - x).std()) == pytest.approx(1.0, abs=0.02)
    noise = torch.ones_like(x)
    local = sample(lambda x, c, t: torch.zeros_like(x), None, x, steps=2, noise=noise, return_path=True)
    assert local.path is not None
    assert torch.allclose(local.path[0] - x, 0.98517 * noise, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 4])
def test_the_start_from_a_noised_scan_is_exact_for_an_ideal_network(steps: int) -> None:
    x, process = scan(), VPProcess()
    result = sample(ideal(x + OFFSET, process), None, x, steps=steps, sampler="lidpm")
    assert torch.allclose(result.points, x + OFFSET, atol=1e-3)


def test_the_start_from_a_noised_scan_keeps_the_scan_where_it_starts_late() -> None:
    x = scan()
    early = sample(
        lambda x, c, t: torch.zeros_like(x),
        None,
        x,
        steps=1,
        sampler="lidpm",
        start=1,
        noise=torch.ones_like(x),
        return_path=True,
    )
    assert early.path is not None
    assert float((early.path[0] - x).abs().max()) < 0.01


def test_guidance_counts_two_and_mixes_as_it_says() -> None:
    x = torch.zeros(1, 3, 3)
    process = LocalProcess()

    def network(x: Tensor, condition: Any, t: Tensor) -> Tensor:
        return torch.full_like(x, condition)

    plain = sample(network, 2.0, x, steps=3, noise=torch.zeros_like(x))
    assert plain.evaluations == 3
    strong = sample(network, 2.0, x, steps=1, guidance=3.5, null=1.0, noise=torch.zeros_like(x))
    assert strong.evaluations == 2
    sigma = float(process.sigma(999))
    assert torch.allclose(strong.points, torch.full_like(x, -sigma * (1 + 3.5 * (2 - 1))))
    none = sample(network, 2.0, x, steps=1, guidance=0.0, null=1.0, noise=torch.zeros_like(x))
    assert none.evaluations == 1
    assert torch.allclose(none.points, torch.full_like(x, -sigma))


class Scale(nn.Module):
    """ε̂ = w·x, or w₂·x at later times: tells which step a gradient comes from."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.later = nn.Parameter(torch.tensor(0.1)), nn.Parameter(torch.tensor(0.2))

    def forward(self, x: Tensor, condition: Any, t: Tensor) -> Tensor:
        return (self.first if int(t[0]) == 999 else self.later) * x


@pytest.mark.parametrize("sampler", ["local", pytest.param("vp_reference", marks=pytest.mark.oracle)])
def test_the_last_step_alone_carries_gradient(sampler: str) -> None:
    network = Scale()
    x = torch.ones(1, 4, 3)
    result = sample(network, None, x, steps=2, sampler=sampler, grad="last")  # type: ignore[arg-type]
    loss = result.points.square().mean()
    assert_gradient(loss, network.later)
    assert torch.autograd.grad(loss, network.first, allow_unused=True)[0] is None
    assert not sample(network, None, x, steps=2, sampler=sampler).points.requires_grad  # type: ignore[arg-type]


def test_the_same_noise_gives_the_same_cloud() -> None:
    x = scan(50).float()
    runs = [
        sample(Scale(), None, x, steps=4, eta=1.0, generator=torch.Generator().manual_seed(7)).points
        for _ in range(2)
    ]
    assert torch.equal(runs[0], runs[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "ddim"}, "sampler is"),
        ({"guidance": 2.0}, "needs null"),
        ({"steps": 0}, "steps is"),
        ({"eta": 1.5}, "eta is"),
        ({"grad": "all"}, "grad is"),
        ({"process": VPProcess()}, "does not go with"),
        ({"sampler": "vp_reference", "process": VPProcess()}, "does not go with"),
        ({"noise": torch.zeros(1, 2, 3)}, "noise has shape"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(Scale(), None, torch.ones(1, 4, 3), **{"steps": 1, **options})


def test_wrong_clouds_are_refused() -> None:
    with pytest.raises(ValueError, match="x_init has shape"):
        sample(Scale(), None, torch.ones(4, 3), steps=1)
    with pytest.raises(ValueError, match="NaN"):
        sample(Scale(), None, torch.full((1, 4, 3), float("nan")), steps=1)


def test_what_the_reference_keeps_of_a_cloud() -> None:
    flat = torch.zeros(100, 3)
    flat[:, 0] = torch.linspace(0, 60, 100)
    flat[0, 2] = -5.0
    kept = keep_scene(flat, torch.tensor([[0.0, 0.0, 1.0]]))
    assert not kept[0]  # below mean − 2 std
    assert torch.equal(kept[1:], flat[1:].norm(dim=1) < 50)
    assert not keep_scene(flat, torch.tensor([[0.0, 0.0, -1.0]]))[1:].any()
