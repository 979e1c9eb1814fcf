"""What may listen to a run, and the progress bar."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from .contract import Distiller
    from .trainer import FitResult, Trainer


class Callback:
    """Hooks of a run, all of them empty; override those you need. They are called on every rank.

    Example:
        >>> class Count(Callback):
        ...     steps = 0
        ...     def on_step_end(self, trainer, step):
        ...         self.steps += 1
    """

    def on_fit_start(self, trainer: Trainer, distiller: Distiller) -> None:
        """Networks, optimizers and a resumed state are in place; the first step comes next."""

    def on_step_end(self, trainer: Trainer, step: int) -> None:
        """All roles of a step were updated; `step` is the number of finished steps."""

    def on_evaluate(self, trainer: Trainer, step: int, metrics: Mapping[str, float]) -> None:
        """`evaluate` returned these metrics after `step` finished steps."""

    def on_checkpoint(self, trainer: Trainer, path: Path) -> None:
        """A checkpoint is on the disk."""

    def on_fit_end(self, trainer: Trainer, result: FitResult) -> None:
        """The run is done; not called when it failed."""


class ProgressBar(Callback):
    """A progress bar with the newest total of each role; appears when a run has lasted `patience` seconds.

    Args:
        patience: seconds before it appears.
        console: where it appears; standard error when None.
    """

    def __init__(self, patience: float = 2.0, *, console: Console | None = None) -> None:
        self.patience = patience
        self._console = console
        self._bar: Progress | None = None
        self._total = 0
        self._due = 0.0

    def on_fit_start(self, trainer: Trainer, distiller: Distiller) -> None:
        """Start the clock."""
        self._total = trainer.config.steps
        self._due = time.monotonic() + self.patience

    def on_step_end(self, trainer: Trainer, step: int) -> None:
        """Show or move the bar, at most ten times a second."""
        now = time.monotonic()
        if now < self._due:
            return
        self._due = now + 0.1
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            note = TextColumn("{task.fields[note]}", markup=False)
            console = self._console or Console(file=sys.stderr)
            self._bar = Progress(*columns, note, console=console, transient=True)
            self._bar.add_task("training", total=self._total, note="")
            self._bar.start()
        note_text = "  ".join(f"{role} {value:.4g}" for role, value in trainer.log.newest.items())
        self._bar.update(self._bar.task_ids[0], completed=step, note=note_text)

    def close(self) -> None:
        """Take the bar away; also after a failure."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
