"""The train loop: one iteration of the Runner is one optimizer step, with all its micro-batches.

mmengine's own loop draws one batch an iteration, sleeps two seconds at the end of an epoch, and on a resume
draws and drops the batches that were used. Here the data go on where the checkpoint says.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mmengine.hooks import Hook
from mmengine.registry import LOOPS
from mmengine.runner import IterBasedTrainLoop, Runner
from torch import nn

from ...train.data import Feed
from ...train.roles import frozen_in_eval
from ...train.seeding import seed_everything
from .model import unwrapped


@dataclass(slots=True)
class StepBatch:
    """What one step sees: `(batch, zero-based epoch)` of each of its micro-batches."""

    micro: list[tuple[Any, int]]


class StepData:
    """The data of a run, one `StepBatch` an iteration, without end.

    Args:
        data: a `SeededLoader` of *global* batches, or any iterable of batches that can be started over.
        accumulate: micro-batches per step.
        rank: index of this process.
        world_size: number of processes.
        pin_memory: hand batches over in page-locked memory.

    Attributes:
        dataset: what mmengine's hooks look at; the object itself.
        metainfo: empty; mmengine warns where a dataset has none.
    """

    def __init__(
        self,
        data: Iterable[Any],
        *,
        accumulate: int = 1,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
    ) -> None:
        self._feed = Feed(data, rank, world_size, pin_memory=pin_memory)
        self._length = len(data) if isinstance(data, Sized) else 0
        self.accumulate = accumulate
        self.metainfo: dict[str, Any] = {}

    @property
    def dataset(self) -> StepData:
        """The object itself."""
        return self

    def __len__(self) -> int:
        """Steps of one epoch; 0 where the data do not know their length."""
        return self._length // self.accumulate

    def __iter__(self) -> Iterator[StepBatch]:
        """Steps without end, from where `load_state_dict` put the data."""
        while True:
            yield StepBatch([(self._feed.next(), self._feed.epoch) for _ in range(self.accumulate)])

    def state_dict(self) -> dict[str, Any]:
        """Position in the data."""
        return self._feed.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position."""
        self._feed.load_state_dict(state)


@LOOPS.register_module()
class DistillLoop(IterBasedTrainLoop):
    """Trains a `DistillModel` to `max_iters` steps.

    Args:
        runner: the runner.
        dataloader: a `StepData`.
        max_iters: optimizer steps.
        seed: seeds python, numpy and torch before the first step, as `Trainer` does.
    """

    def __init__(self, runner: Runner, dataloader: StepData, max_iters: int, seed: int = 0) -> None:
        super().__init__(runner, dataloader, max_iters)
        self.seed = seed

    def run(self) -> nn.Module:
        """Train; the hooks of an epoch are called once around the whole run."""
        runner = self.runner
        model = unwrapped(runner.model)
        seed_everything(self.seed, runner.rank)
        with frozen_in_eval(model.distiller.frozen()), closing(runner.hooks):
            runner.call_hook("before_train")  # a resume moves data, counters and generators
            runner.call_hook("before_train_epoch")
            batches = iter(self.dataloader)
            while self._iter < self._max_iters and not self.stop_training:
                self.run_iter(next(batches))
            runner.call_hook("after_train_epoch")
            runner.call_hook("after_train")
        return runner.model


@contextmanager
def closing(hooks: Iterable[Hook]) -> Iterator[None]:
    """Call `close()` of the hooks that have it, also after a failure, of which mmengine tells no hook."""
    try:
        yield
    finally:
        for hook in hooks:
            if hasattr(hook, "close"):
                hook.close()
