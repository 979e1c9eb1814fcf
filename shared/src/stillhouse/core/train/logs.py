"""What a run writes down: means of the unweighted terms, as JSON lines and TensorBoard events.

Values stay on the device between log rows, so that a step never waits for the GPU; the check for NaN and
infinity and the warning about negligible distillation terms happen when a row is made.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..losses.term import RatioWatch
from .contract import NonFiniteLossError

if TYPE_CHECKING:
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

_LOG = logging.getLogger(__name__)


def scalar(name: str, value: Tensor) -> Tensor:
    """A logged term without its graph; raises ValueError where it is no scalar."""
    if not isinstance(value, Tensor):
        return torch.tensor(float(value))
    if value.dim():
        raise ValueError(f"term {name!r} has shape {tuple(value.shape)}; terms are scalars, reduce it first")
    return value.detach()


class _Entry(NamedTuple):
    """One update of one role."""

    order: int
    step: int
    values: list[Tensor]
    weights: Mapping[str, float]
    task: str | None


class RunLog:
    """Collects the values of each step, and turns them into rows.

    A training row is `{"step", "role", "total", "terms": {name: mean}, "lr", "seconds", …}`, an evaluation
    row `{"step", "evaluate": {name: value}}`; `step` counts finished steps. `NaN` in a file is written as
    null.

    Args:
        out: folder of `log.jsonl` and `tensorboard/`; None keeps rows in memory only.
        step: finished steps of the resumed run; rows beyond it are dropped from the files.
        reduce: mean of a tensor over the ranks.

    Attributes:
        rows: all rows of the run, those before a resume included.
        newest: last mean total of each role.
    """

    def __init__(
        self, out: Path | None, *, step: int = 0, reduce: Callable[[Tensor], Tensor] = lambda values: values
    ) -> None:
        self.rows: list[dict[str, Any]] = []
        self.newest: dict[str, float] = {}
        self._reduce = reduce
        self._window: dict[tuple[str, tuple[str, ...]], list[_Entry]] = {}
        self._order = 0
        self._sums: dict[str, dict[str, tuple[float, int]]] = {}
        self._watches: dict[str, RatioWatch] = {}
        self._warned: set[tuple[str, str]] = set()
        self._file = None
        self._board: EventFileWriter | None = None
        if out is not None:
            from tensorboard.summary.writer.event_file_writer import EventFileWriter

            path = out / "log.jsonl"
            self.rows = _rows_until(path, step)
            out.mkdir(parents=True, exist_ok=True)
            kept = path.with_name(".log.jsonl.partial")
            kept.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")
            kept.replace(path)
            self._file = path.open("a", encoding="utf-8")
            self._board = EventFileWriter(str(out / "tensorboard"))
            if step:
                self._board.add_event(_purge_after(step))

    def add(
        self, step: int, role: str, values: dict[str, Tensor], weights: Mapping[str, float], task: str | None
    ) -> None:
        """Remember the values of one update without looking at them.

        Args:
            step: finished steps, this one included.
            role: the role updated.
            values: detached scalars; "total" and the unweighted terms, and "grad_norm" when gradients are
                clipped.
            weights: weight of each term.
            task: the task term.
        """
        self._order += 1
        entry = _Entry(self._order, step, list(values.values()), weights, task)
        self._window.setdefault((role, tuple(values)), []).append(entry)

    def drain(self) -> None:
        """Bring the remembered values over from the device, check them and add them up for the next row.

        Raises:
            NonFiniteLossError: a total or a term was NaN or infinite.
        """
        window, self._window, self._order = self._window, {}, 0
        lines: list[tuple[_Entry, str, dict[str, float]]] = []
        for (role, names), entries in window.items():
            device = entries[0].values[-1].device  # the total's
            rows = [torch.stack([v.to(device, torch.float32) for v in entry.values]) for entry in entries]
            for entry, line in zip(entries, self._reduce(torch.stack(rows)).tolist(), strict=True):
                lines.append((entry, role, dict(zip(names, line, strict=True))))
        for entry, role, values in sorted(
            lines, key=lambda line: line[0].order
        ):  # the first NaN is the cause
            self._check(entry.step, role, values)
            self._watch(role, values, entry)
            sums = self._sums.setdefault(role, {})
            for name, value in values.items():
                total, count = sums.get(name, (0.0, 0))
                sums[name] = (total + value, count + 1)

    def flush(self, step: int, extra: Mapping[str, Mapping[str, float]]) -> None:
        """Make a row of each role's values since the last one.

        Args:
            step: finished steps.
            extra: by role, further numbers of the row ("lr", "seconds", …).

        Raises:
            NonFiniteLossError: a total or a term was NaN or infinite.
        """
        self.drain()
        sums, self._sums = self._sums, {}
        for role, columns in sums.items():
            mean = {name: total / count for name, (total, count) in columns.items()}
            self.newest[role] = total = mean.pop("total")
            row: dict[str, Any] = {"step": step, "role": role, "total": total}
            if "grad_norm" in mean:
                row["grad_norm"] = mean.pop("grad_norm")
            self._write({**row, "terms": mean, **extra.get(role, {})})

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the row of an evaluation."""
        self._write({"step": step, "evaluate": {name: float(value) for name, value in metrics.items()}})

    def close(self) -> None:
        """Close the files."""
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()

    def state_dict(self) -> dict[str, Any]:
        """The unfinished row, how long each distillation term has been small, and which were warned of."""
        return {
            "sums": self._sums,
            "watches": {role: watch.state_dict() for role, watch in self._watches.items()},
            "warned": [list(pair) for pair in sorted(self._warned)],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._sums = {role: dict(columns) for role, columns in state["sums"].items()}
        for role, counts in state["watches"].items():
            self._watches[role] = RatioWatch()
            self._watches[role].load_state_dict(counts)
        self._warned = {(role, name) for role, name in state["warned"]}

    def _check(self, step: int, role: str, values: dict[str, float]) -> None:
        bad = [name for name, value in values.items() if name != "grad_norm" and not math.isfinite(value)]
        if bad:
            term = next((name for name in bad if name != "total"), "total")
            raise NonFiniteLossError(
                f"the loss of role {role!r} is not finite at step {step - 1}: term {term!r} is "
                f"{values[term]}; the last checkpoint is kept. Lower the learning rate, clip the gradient "
                "or look at that term's inputs"
            )

    def _watch(self, role: str, values: dict[str, float], entry: _Entry) -> None:
        task = entry.task
        if task is None:
            return
        watch = self._watches.setdefault(role, RatioWatch())
        weighted = {name: values[name] for name in entry.weights if name in values}
        for name in watch.update(weighted, entry.weights, task=task):
            if (role, name) not in self._warned:
                self._warned.add((role, name))
                _LOG.warning("role %r: %s", role, watch.message(name, task))

    def _write(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if self._file is not None:
            self._file.write(json.dumps(_without_nan(row), allow_nan=False) + "\n")
            self._file.flush()
        if self._board is not None:
            prefix = row.get("role", "evaluate")
            numbers = {**row.get("evaluate", {}), **row.get("terms", {})}
            numbers.update({k: v for k, v in row.items() if k != "step" and isinstance(v, float)})
            self._board.add_event(_scalars(row["step"], {f"{prefix}/{k}": v for k, v in numbers.items()}))


def _scalars(step: int, values: Mapping[str, float]) -> Any:
    """One TensorBoard event for a whole row: each event costs a hand-over to the writer's thread."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
    return Event(wall_time=time.time(), step=step, summary=summary)


def _purge_after(step: int) -> Any:
    """The event that tells TensorBoard to forget what a killed run wrote after a step."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    return Event(wall_time=time.time(), step=step + 1, session_log=SessionLog(status=SessionLog.START))


def _rows_until(path: Path, step: int) -> list[dict[str, Any]]:
    """Rows of an earlier part of the run up to a step; a last line cut by a kill is left out."""
    if step == 0 or not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int) and row["step"] <= step:
            rows.append(row)
    return rows


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
