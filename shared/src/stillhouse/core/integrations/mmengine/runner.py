"""A Runner that trains what `Trainer` trains.

    runner = runner_for(distiller, SeededLoader(dataset, batch_size=64), OptimConfig(lr=1e-3),
                        TrainConfig(steps=1000, ema=0.999), out=Path("runs/kd"))
    runner.train()
    result = fit_result(runner)

The same program runs alone and under `torchrun --nproc-per-node N`, on GPUs or on a CPU.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner

from ...errors import ConfigError
from ...train.contract import Distiller, TrainConfig
from ...train.optim import OptimConfig
from ...train.trainer import FitResult
from .checkpoint import DistillCheckpointHook
from .hooks import DistillEMAHook, DistillEvaluateHook, DistillLogHook, Evaluate, hook_of
from .loop import StepData
from .model import RoleParallel, as_mm_model
from .optim import optim_wrappers

_NUMBERS = itertools.count()


def start_processes(accelerator: str = "auto") -> torch.device:
    """Join the process group that `torchrun` describes, gloo on a CPU and nccl on GPUs; return the device.

    mmengine's own start selects a GPU whatever the backend, and fails where there is none. Call this before
    any Runner is built (`runner_for` does): it then takes the group that is there. Alone it starts nothing.

    Args:
        accelerator: "auto", "cpu" or "cuda".

    Raises:
        ConfigError: another accelerator, or "cuda" without a GPU.
    """
    if accelerator not in ("auto", "cpu", "cuda", "gpu"):
        raise ConfigError(f'accelerator is "{accelerator}"; under mmengine it is "auto", "cpu" or "cuda"')
    gpu = accelerator != "cpu" and torch.cuda.is_available()
    if accelerator in ("cuda", "gpu") and not gpu:
        raise ConfigError(f'accelerator is "{accelerator}" and torch finds no GPU; use "auto" or "cpu"')
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    many = int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ
    if many and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if gpu else "gloo")
    return device


def runner_for(
    distiller: Distiller,
    data: Iterable[Any],
    optim: OptimConfig | Mapping[str, OptimConfig],
    config: TrainConfig,
    *,
    out: str | Path,
    evaluate: Evaluate | None = None,
    resume: bool | str | Path = True,
    hooks: Sequence[Hook | dict[str, Any]] = (),
    quiet: bool = False,
) -> Runner:
    """Build the Runner of a distillation; `runner.train()` runs it and returns its model.

    Weights, log rows and checkpoints are those of `Trainer(config, out=out).fit(distiller, data, optim)`, bit
    for bit on a CPU, and each goes on from the other's checkpoints. With `config.ema` the networks hold the
    averaged weights after the training.

    Args:
        distiller: the method.
        data: a `SeededLoader` of *global* batches, or any iterable of batches that can be started over.
        optim: one configuration for all roles, or one for each.
        config: settings of the run; precision "32-true" or "bf16-mixed", no "fsdp2". Processes are started by
            `torchrun`, not here.
        out: folder of the run: `checkpoints/`, `log.jsonl`, `tensorboard/`, and mmengine's own log.
        evaluate: `evaluate(distiller, finished_steps)` → metrics, see `DistillEvaluateHook`.
        resume: see `DistillCheckpointHook`.
        hooks: further hooks.
        quiet: mmengine prints warnings alone.

    Raises:
        ConfigError: settings that cannot be had under mmengine; the message says which and what to do.
    """
    _check(config)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = start_processes(config.accelerator)
    many = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank, world = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if many else (0, 1)
    model = RoleParallel(as_mm_model(distiller, steps=config.steps), device, config.find_unused)
    own: list[Hook | dict[str, Any]] = [
        DistillLogHook(every=config.log_every),
        DistillCheckpointHook(config, resume=resume),
    ]
    if config.ema is not None:
        own.append(DistillEMAHook(config.ema))
    if evaluate is not None:
        own.append(DistillEvaluateHook(evaluate, every=config.evaluate_every))
    if many:  # mmengine sets and warns of what is not set
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ.setdefault(name, str(torch.get_num_threads()))
    pin_memory = device.type == "cuda"
    return Runner(
        model=model,
        work_dir=str(out),
        train_dataloader=StepData(
            data, accumulate=config.accumulate, rank=rank, world_size=world, pin_memory=pin_memory
        ),
        train_cfg={"type": "DistillLoop", "max_iters": config.steps, "seed": config.seed},
        optim_wrapper=optim_wrappers(distiller, optim, config),
        default_hooks={
            "logger": {"type": "LoggerHook", "interval": config.log_every},
            "param_scheduler": None,  # schedules are stepped with their role
            "sampler_seed": None,
            "checkpoint": None,
        },
        custom_hooks=[*own, *hooks],
        launcher="pytorch" if many else "none",
        env_cfg={"mp_cfg": {"mp_start_method": multiprocessing.get_start_method()}},  # leave it as it is
        log_processor={"by_epoch": False, "window_size": config.log_every, "mean_pattern": r".*"},
        log_level="WARNING" if quiet else "INFO",
        visualizer={"type": "Visualizer", "vis_backends": []},
        randomness={"seed": config.seed},
        # names are global in mmengine, and two runners of one second would share theirs
        experiment_name=f"{Path(out).name}-{os.getpid()}-{next(_NUMBERS)}",
    )


def fit_result(runner: Runner) -> FitResult:
    """What `Trainer.fit` would have returned, of a runner that `runner_for` built and that has trained."""
    log, checkpoint = hook_of(runner, DistillLogHook), hook_of(runner, DistillCheckpointHook)
    if log is None or checkpoint is None:
        raise ValueError("the runner lacks DistillLogHook or DistillCheckpointHook; build it with runner_for")
    return FitResult(runner.iter, log.log.rows, log.seconds, checkpoint.newest)


def _check(config: TrainConfig) -> None:
    if config.strategy == "fsdp2":
        raise ConfigError(
            'train.strategy is "fsdp2", which the Trainer has and this Runner has not; use "ddp"'
        )
    started = int(os.environ.get("WORLD_SIZE", "1"))
    wanted = config.devices * config.nodes if isinstance(config.devices, int) else 1
    if wanted > 1 and started != wanted:
        raise ConfigError(
            f"train.devices × train.nodes is {wanted} and {started} process runs; under mmengine start it "
            f"with torchrun --nproc-per-node {config.devices}"
        )
