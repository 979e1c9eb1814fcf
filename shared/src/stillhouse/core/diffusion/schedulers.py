"""Schedulers of the diffusers library in this package's terms: their schedule, and their sampling loop.

diffusers is imported on use. What it does well (DPM-Solver++ of higher order, SDE variants) is not written
again here: `sample_with_scheduler` runs its schedulers with any `Denoiser`.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch
from torch import Tensor

from ..errors import MissingDependencyError
from .denoiser import Denoiser
from .evaluations import count_evaluations
from .prediction import Prediction
from .sampler import Sample
from .schedules import DiscreteVP, NoiseSchedule, RectifiedFlow

_KINDS = {
    "epsilon": Prediction.EPS,
    "sample": Prediction.X0,
    "v_prediction": Prediction.V,
    "flow_prediction": Prediction.FLOW,
}


def require_diffusers() -> Any:
    """The diffusers module.

    Raises:
        MissingDependencyError: it is not installed; the message holds the pip line.
    """
    try:
        import diffusers
    except ImportError as error:
        raise MissingDependencyError(
            f'this needs diffusers, which cannot be imported ({error}); pip install "diffusers>=0.30"'
        ) from error
    return diffusers


def schedule_of(scheduler: Any) -> NoiseSchedule:
    """The noise schedule of a diffusers scheduler.

    Args:
        scheduler: one with `alphas_cumprod` (DDIM, DDPM, DPM-Solver++, Euler, UniPC, …), or a flow-matching
            one.

    Returns:
        `DiscreteVP` over the same indices; or `RectifiedFlow` on [0, 1] without a shift, since such a
        scheduler shifts its steps and not its path.

    Raises:
        TypeError: no schedule is known for it.
    """
    table = getattr(scheduler, "alphas_cumprod", None)
    if isinstance(table, Tensor):
        return DiscreteVP(table)
    if "FlowMatch" in type(scheduler).__name__:
        return RectifiedFlow()
    raise TypeError(f"no schedule is known for a {type(scheduler).__name__}; it has no alphas_cumprod")


@torch.no_grad()
def sample_with_scheduler(
    scheduler: Any,
    denoiser: Denoiser,
    z: Tensor,
    steps: int,
    *,
    cond: Any = None,
    generator: torch.Generator | None = None,
    return_path: bool = False,
) -> Sample:
    """Run a diffusers scheduler with a denoiser of this package.

    Args:
        scheduler: any diffusers scheduler whose `set_timesteps(n)` and `step` are the common ones.
        denoiser: of the schedule that `schedule_of(scheduler)` gives; guided ones count two evaluations.
        z: standard normal noise `[B, *S]`; it is multiplied by the scheduler's `init_noise_sigma`.
        steps: number of inference steps.
        cond: condition of the denoiser.
        generator: for stochastic schedulers.
        return_path: keep the states.

    Returns:
        A `Sample`.

    Raises:
        ValueError: the scheduler wants a kind of prediction that is not known here.
    """
    require_diffusers()
    flow = "FlowMatch" in type(scheduler).__name__
    name = "flow_prediction" if flow else scheduler.config.prediction_type
    if name not in _KINDS:
        raise ValueError(f"prediction_type is {name!r}; known: {', '.join(map(repr, _KINDS))}")
    set_timesteps(scheduler, steps, z.device)
    x = z * float(getattr(scheduler, "init_noise_sigma", 1.0))
    path = [x]
    scale = scheduler.config.num_train_timesteps if flow else 1
    with count_evaluations() as made:
        for t in scheduler.timesteps:
            scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            out = denoiser(scaled, float(t) / scale, cond, out=_KINDS[name])
            x = scheduler.step(out, t, x, **_noise(scheduler, generator)).prev_sample
            if return_path:
                path.append(x)
    return Sample(x, made.count, path if return_path else [])


def set_timesteps(scheduler: Any, steps: int, device: torch.device) -> None:
    """Call the scheduler's `set_timesteps` without what NumPy 2 says of its conversions."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
        scheduler.set_timesteps(steps, device=device)


def _noise(scheduler: Any, generator: torch.Generator | None) -> dict[str, Any]:
    """The generator for those schedulers that take one."""
    takes = "generator" in inspect.signature(scheduler.step).parameters
    return {"generator": generator} if takes else {}
