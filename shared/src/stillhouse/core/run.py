"""One run of a command: where it writes, its seed and device, and how it speaks to the person in front of it.

Nothing is written before `Run.create` (or `Run.path`), so that a command which finds its data unusable leaves
no folder behind. With `json=True` the standard output carries one JSON object and nothing else; everything
else goes to the standard error.
"""

from __future__ import annotations

import contextlib
import json as _json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

from rich.console import Console

from .errors import ConfigError, DataError

if TYPE_CHECKING:
    import torch
    from rich.progress import Progress, TaskID

T = TypeVar("T")


def default_folder(domain: str, preset: str, *, now: datetime | None = None) -> Path:
    """Return `runs/<domain>/<preset>-<time>`, relative to the working directory.

    >>> default_folder("kidney", "demo", now=datetime(2026, 3, 1, 12, 30, 5)).as_posix()
    'runs/kidney/demo-20260301-123005'
    """
    moment = datetime.now() if now is None else now
    return Path("runs") / domain / f"{preset}-{moment:%Y%m%d-%H%M%S}"


def world_size() -> int:
    """Return how many processes run together, as torchrun or SLURM says; 1 without them."""
    return int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or 1)


def rank() -> int:
    """Return the number of this process among those that run together; 0 is the one that speaks."""
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)


def jsonable(value: Any) -> Any:
    """Return `value` with everything that strict JSON does not know replaced.

    Paths become strings, tuples and sets lists, numbers of NumPy and scalar tensors Python numbers, arrays
    nested lists, and non-finite floats None.

    >>> jsonable({"out": Path("a"), "auc": float("nan"), "shape": (1, 2)})
    {'out': 'a', 'auc': None, 'shape': [1, 2]}
    """
    from ._json import jsonable as convert  # NumPy with it: not before there is a result

    return convert(value, where="the result", nonfinite="null", keys="text")


class ProgressHandle:
    """What `Run.progress` yields: call `advance` after each piece of work."""

    def __init__(self, run: Run, description: str, total: int | None) -> None:
        self._run = run
        self._description = description
        self._total = total
        self._done = 0
        self._note = ""
        self._begun = time.monotonic()
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def advance(self, count: int = 1, *, note: str = "") -> None:
        """Count `count` more pieces as done; `note` is shown beside the bar, for example the loss."""
        self._done += count
        self._note = note or self._note
        if (
            self._bar is None
            and self._run.interactive
            and time.monotonic() - self._begun > self._run.patience
        ):
            self._start()
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self._done, note=self._note)

    def _start(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(
            *columns, TextColumn("{task.fields[note]}"), console=self._run.console, transient=True
        )
        self._task = self._bar.add_task(self._description, total=self._total, note=self._note)
        self._bar.start()

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


@dataclass
class Run:
    """One run of a command.

    Args:
        out: folder that the run writes to; made by `create` on the first write.
        seed: seed of everything random in the run.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`; `torch_device` resolves it.
        console: where text for people goes; made to fit `json` when left out.
        json: print the result as one JSON object on the standard output.
        verbose: say more, and show tracebacks.
        patience: seconds after which work shows a progress bar.
        unique: where `out` exists already, make `out-2`, `out-3`, … instead of writing into it.

    Example:
        >>> import tempfile
        >>> run = Run(out=Path(tempfile.mkdtemp()) / "new", json=True)
        >>> run.out.exists()
        False
        >>> run.path("tables/scores.csv").parent.is_dir()
        True
    """

    out: Path
    seed: int = 0
    device: str = "auto"
    console: Console = None  # type: ignore[assignment]  # filled in __post_init__
    json: bool = False
    verbose: bool = False
    patience: float = 2.0
    unique: bool = False
    _created: bool = field(default=False, init=False, repr=False)
    _stream: TextIO = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.out = Path(self.out)
        self._stream = sys.stdout
        if self.console is None:
            self.console = Console(stderr=self.json)
        if self.out.is_file():
            raise ConfigError(f"--out {self.out}: is a file; give a folder")

    @classmethod
    def start(
        cls,
        domain: str,
        preset: str,
        *,
        out: Path | None = None,
        seed: int = 0,
        device: str = "auto",
        json: bool = False,
        verbose: bool = False,
    ) -> Run:
        """Begin a run in `out`, or in a fresh `runs/<domain>/<preset>-<time>` where `out` is None.

        Raises:
            ConfigError: several processes run together and `out` is None: each would name a folder of its
                own.
        """
        if out is None and world_size() > 1:
            raise ConfigError(
                "--out is required where several processes run together, for example under torchrun"
            )
        folder = default_folder(domain, preset) if out is None else out
        return cls(out=folder, seed=seed, device=device, json=json, verbose=verbose, unique=out is None)

    @property
    def interactive(self) -> bool:
        """Whether a person watches a terminal: progress bars are shown only then."""
        return self.console.is_terminal

    def create(self) -> Path:
        """Make the folder on the first call and return it.

        Raises:
            DataError: the folder cannot be made; the message names it and the reason.
        """
        if not self._created:
            try:
                self._make()
            except OSError as error:
                reason = error.strerror or str(error)
                raise DataError(
                    f"{self.out}: the folder cannot be made ({reason}); give another --out"
                ) from error
            self._created = True
        return self.out

    def _make(self) -> None:
        if not self.unique:
            self.out.mkdir(parents=True, exist_ok=True)
            return
        wanted, count = self.out, 1
        while True:
            try:
                self.out.mkdir(parents=True, exist_ok=False)
                return
            except FileExistsError:
                count += 1
                self.out = wanted.with_name(f"{wanted.name}-{count}")

    def path(self, name: str) -> Path:
        """Return the path of `name` in the run's folder, making the folder and the parents of the file.

        Raises:
            ValueError: `name` leads out of the folder.
        """
        inside = Path(name)
        if inside.is_absolute() or ".." in inside.parts:
            raise ValueError(f"name must stay inside the run's folder, got {name!r}")
        target = self.create() / inside
        target.parent.mkdir(parents=True, exist_ok=True)
        return target

    @contextlib.contextmanager
    def progress(self, description: str, total: int | None = None) -> Iterator[ProgressHandle]:
        """Show a bar for work that lasts longer than `patience` seconds; silent where no terminal watches.

        Args:
            description: what is done, for example "Extracting patches".
            total: number of pieces, None where unknown.

        Example:
            >>> with Run(out=Path("unused")).progress("Reading", total=3) as handle:
            ...     for _ in range(3):
            ...         handle.advance()
        """
        handle = ProgressHandle(self, description, total)
        try:
            yield handle
        finally:
            handle.close()

    def track(self, items: Iterable[T], description: str, *, total: int | None = None) -> Iterator[T]:
        """Iterate over `items` under a progress bar; `total` defaults to their length where they have one."""
        if total is None and isinstance(items, Sized):
            total = len(items)
        with self.progress(description, total) as handle:
            for item in items:
                yield item
                handle.advance()

    def say(self, text: str) -> None:
        """Print a line for people (on the standard error with `--json`); the text is not read as markup."""
        self.console.print(text, markup=False, highlight=False)

    def detail(self, text: str) -> None:
        """Print a line for people only where `verbose` is set."""
        if self.verbose:
            self.say(text)

    def torch_device(self) -> torch.device:
        """Resolve `device`: `auto` is CUDA where there is one, else the CPU.

        Raises:
            ConfigError: the device named is not there.
        """
        import torch

        name = self.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.device(name)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ConfigError(
                f"--device {self.device}: no CUDA device is usable; use --device cpu or see `doctor`"
            )
        if device.type == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
            raise ConfigError(f"--device {self.device}: there are {torch.cuda.device_count()} CUDA devices")
        if device.type == "mps" and not torch.backends.mps.is_available():
            raise ConfigError(f"--device {self.device}: no MPS device is usable; use --device cpu")
        return device

    def finish(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """Print the end of the run and return the full result.

        With `json` this is one object on the standard output: `out` and the entries of `result`. Without, the
        last lines are the folder and, where the result has a `report`, the path of its HTML page. Of several
        processes only the first speaks.
        """
        full: dict[str, Any] = {"out": str(self.out) if self._created or self.out.exists() else None}
        full.update(jsonable(result))
        if rank() != 0:
            return full
        if self.json:
            print(_json.dumps(full, ensure_ascii=False, allow_nan=False), file=self._stream, flush=True)
            return full
        for key, value in full.items():
            if key not in ("out", "report") and isinstance(value, int | float | str):
                shown = f"{value:.4g}" if isinstance(value, float) else value
                self.say(f"{key.replace('_', ' ')}: {shown}")
        if full["out"] is not None:
            self._last(full["out"])
        if full.get("report"):
            self._last(full["report"])
        return full

    def _last(self, path: str) -> None:
        self.console.print(path, markup=False, highlight=False, soft_wrap=True)
