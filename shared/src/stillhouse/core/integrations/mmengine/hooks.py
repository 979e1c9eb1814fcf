"""Hooks of a distillation under mmengine: averaged weights, the log, evaluation."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor

from ...train.contract import Distiller
from ...train.ema import EMA
from ...train.logs import RunLog
from ...train.seeding import rng_untouched
from .model import Update, unwrapped

RESUMED = "stillhouse_resumed_step"  # in the message hub: the step that DistillCheckpointHook goes on from
Evaluate = Callable[[Distiller, int], Mapping[str, float]]


def hook_of(runner: Runner, kind: type) -> Any:
    """The runner's hook of a class; None where it has none."""
    return next((hook for hook in runner.hooks if isinstance(hook, kind)), None)


def due(runner: Runner, every: int) -> bool:
    """Whether the step that ends now is the last one or a multiple of `every` (0: the last one alone)."""
    finished = runner.iter + 1
    return finished == runner.max_iters or (every > 0 and finished % every == 0)


@HOOKS.register_module()
class DistillEMAHook(Hook):
    """Averages the weights of each role, at each update of that role; the networks hold them after training.

    Args:
        decay: of the average, strictly between 0 and 1.

    Attributes:
        averages: the `EMA` of each role, from `before_train` on.
    """

    priority = "NORMAL"

    def __init__(self, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"decay is {decay}; it must lie strictly between 0 and 1")
        self.decay = decay
        self.averages: dict[str, EMA] = {}

    def before_train(self, runner: Runner) -> None:
        """Start at the networks' weights."""
        model = unwrapped(runner.model)
        self.averages = {name: EMA(network, self.decay) for name, network in model.networks.items()}
        model.listeners.append(self._take)

    def _take(self, update: Update) -> None:
        self.averages[update.role].update()

    def after_train(self, runner: Runner) -> None:
        """Give the networks the averaged weights."""
        unwrapped(runner.model).listeners.remove(self._take)
        for average in self.averages.values():
            average.copy_to_network()

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The networks have the averaged weights inside the block."""
        with ExitStack() as stack:
            for average in self.averages.values():
                stack.enter_context(average.applied())
            yield


@HOOKS.register_module()
class DistillLogHook(Hook):
    """Writes `log.jsonl` and TensorBoard events of the unweighted terms, as `Trainer` does.

    It also warns of a distillation term that is too small to matter, and stops a run whose loss is not
    finite.

    Args:
        out: folder, the Runner's `work_dir` where None.
        every: steps between rows, which hold means.

    Attributes:
        log: the `RunLog`, with all rows.
        seconds: wall time of this training.
    """

    priority = "LOW"

    def __init__(self, out: str | Path | None = None, *, every: int = 10) -> None:
        if every < 1:
            raise ValueError(f"every is {every}; it must be ≥ 1")
        self.out, self.every = out, every
        self.log = RunLog(None)
        self.seconds = 0.0
        self._started = 0.0
        self._lr: dict[str, float] = {}

    def before_train(self, runner: Runner) -> None:
        """Open the files; rows beyond the step that the run goes on from are dropped."""
        self._started = time.perf_counter()
        out = Path(self.out or runner.work_dir) if runner.rank == 0 else None
        step = int(runner.message_hub.get_info(RESUMED, runner.iter))
        self.log = RunLog(out, step=step, reduce=_mean)
        self._lr = dict.fromkeys(unwrapped(runner.model).updates, 0.0)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Remember the step's values; make a row where one is due.

        Raises:
            NonFiniteLossError: a value was NaN or infinite.
        """
        finished = runner.iter + 1
        for update in unwrapped(runner.model).last:
            self.log.add(finished, update.role, update.values, update.weights, update.task)
            self._lr[update.role] = update.lr
        self.seconds = time.perf_counter() - self._started
        if due(runner, self.every):
            seconds = round(self.seconds, 3)
            self.log.flush(finished, {name: {"lr": lr, "seconds": seconds} for name, lr in self._lr.items()})

    def close(self) -> None:
        """Close the files; the loop calls it at the end and after a failure."""
        self.log.close()

    def state_dict(self) -> dict[str, Any]:
        """The unfinished row and the warnings given."""
        return self.log.state_dict()

    def restore(self, state: Mapping[str, Any], lr: Mapping[str, float]) -> None:
        """Go on with a saved row and the rates of the last updates."""
        self.log.load_state_dict(state)
        self._lr.update(lr)

    @property
    def lr(self) -> dict[str, float]:
        """Rate of each role's last update."""
        return dict(self._lr)


@HOOKS.register_module()
class DistillEvaluateHook(Hook):
    """Calls `evaluate(distiller, finished_steps)` on every rank, in eval mode and with averaged weights.

    Nothing that it draws changes the training. The metrics go to the log and, as `val/…`, to the message hub.

    Args:
        evaluate: returns metrics by name.
        every: steps between calls; 0 calls it at the end alone.
    """

    priority = 75  # after the log, before the checkpoint

    def __init__(self, evaluate: Evaluate, *, every: int = 0) -> None:
        self.evaluate, self.every = evaluate, every

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Evaluate where it is due."""
        if not due(runner, self.every):
            return
        model = unwrapped(runner.model)
        ema = hook_of(runner, DistillEMAHook)
        finished = runner.iter + 1
        with rng_untouched(next(model.parameters()).device), ExitStack() as stack:
            if ema is not None:
                stack.enter_context(ema.applied())
            model.eval()
            stack.callback(model.train)
            with torch.no_grad():
                metrics = self.evaluate(model.distiller, finished)
        for name, value in metrics.items():
            runner.message_hub.update_scalar(f"val/{name}", float(value))
        log = hook_of(runner, DistillLogHook)
        if log is not None:
            log.log.evaluation(finished, metrics)


def _mean(values: Tensor) -> Tensor:
    """Mean over the ranks."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)
        values /= torch.distributed.get_world_size()
    return values
