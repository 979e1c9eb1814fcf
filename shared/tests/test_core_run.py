"""The run of a command: folders, JSON, progress, devices."""

from __future__ import annotations

import io
import json
import os
import sys
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from stillhouse.core import run as run_module
from stillhouse.core.errors import ConfigError, DataError
from stillhouse.core.run import Run, default_folder, jsonable


@pytest.fixture(autouse=True)
def single_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)


def test_nothing_is_written_before_the_first_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = Run.start("toy", "demo")
    assert run.out.parent == Path("runs/toy")
    assert list(tmp_path.iterdir()) == []
    target = run.path("tables/scores.csv")
    assert target == run.out / "tables" / "scores.csv"
    assert target.parent.is_dir()
    assert not target.exists()


def test_two_runs_of_one_second_get_two_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = default_folder("toy", "demo", now=datetime(2026, 1, 2, 3, 4, 5))
    runs = [Run(out=folder, unique=True) for _ in range(3)]
    made = [run.create().name for run in runs]
    assert made == ["demo-20260102-030405", "demo-20260102-030405-2", "demo-20260102-030405-3"]
    assert runs[1].create().name == made[1]


def test_a_given_folder_is_used_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "old.txt").write_text("kept")
    assert Run.start("toy", "demo", out=tmp_path).create() == tmp_path
    assert (tmp_path / "old.txt").read_text() == "kept"


def test_a_folder_that_cannot_be_made_is_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file; give a folder"):
        Run(out=tmp_path / "file")
    with pytest.raises(DataError, match=r"cannot be made .*; give another --out"):
        Run(out=tmp_path / "file" / "below").create()


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../b"])
def test_a_path_stays_inside_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="must stay inside"):
        Run(out=tmp_path / "new").path(name)
    assert not (tmp_path / "new").exists()


def test_json_is_one_object_on_the_standard_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(out=tmp_path, json=True)
    run.say("for people [bold]")
    run.finish({"report": tmp_path / "report.html", "auc": float("nan"), "sizes": (1, 2)})
    out, err = capsys.readouterr()
    expected = {"out": str(tmp_path), "report": str(tmp_path / "report.html"), "auc": None, "sizes": [1, 2]}
    assert json.loads(out) == expected
    assert out.count("\n") == 1
    assert "for people [bold]" in err


def test_the_last_lines_are_the_folder_and_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Run(out=tmp_path).finish({"report": tmp_path / "report.html", "accuracy": 0.123456, "top_k": 3})
    out, _ = capsys.readouterr()
    lines = out.splitlines()
    assert lines[:-2] == ["accuracy: 0.1235", "top k: 3"]
    assert lines[-2:] == [str(tmp_path), str(tmp_path / "report.html")]


def test_a_run_that_wrote_nothing_shows_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = Run(out=tmp_path / "never", json=True).finish({})
    assert result == {"out": None}
    assert json.loads(capsys.readouterr().out) == {"out": None}


def test_only_the_first_of_several_processes_speaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ConfigError, match="--out is required"):
        Run.start("toy", "demo")
    run = Run.start("toy", "demo", out=tmp_path, json=True)
    run.finish({"a": 1})
    assert capsys.readouterr().out == ""


def test_jsonable_takes_numpy_and_refuses_objects() -> None:
    numpy = pytest.importorskip("numpy")
    values = {"a": numpy.float32(0.5), "b": numpy.arange(3), "c": {1: numpy.array([numpy.inf])}}
    assert jsonable(values) == {"a": 0.5, "b": [0, 1, 2], "c": {"1": [None]}}
    with pytest.raises(TypeError, match=r"the result\.a is of type object"):
        jsonable({"a": object()})


class Clock:
    """A clock that moves only when told, so that no test waits or depends on the machine's speed."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("terminal", "seconds", "shown"), [(True, 1.0, True), (True, 0.1, False), (False, 9.0, False)]
)
def test_a_bar_appears_on_a_terminal_after_two_seconds(
    monkeypatch: pytest.MonkeyPatch, terminal: bool, seconds: float, shown: bool
) -> None:
    clock = Clock()
    monkeypatch.setattr(run_module, "time", SimpleNamespace(monotonic=clock.monotonic))
    stream = io.StringIO()
    run = Run(out=Path("unused"), console=Console(file=stream, force_terminal=terminal, width=100))
    seen = []
    for item in run.track([1, 2, 3, 4], "Reading"):
        seen.append(item)
        clock.now += seconds
    assert seen == [1, 2, 3, 4]
    assert ("Reading" in stream.getvalue()) is shown


def test_the_bar_is_taken_away_when_the_work_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(run_module, "time", SimpleNamespace(monotonic=clock.monotonic))
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    run = Run(out=Path("unused"), console=console)

    def work() -> None:
        with run.progress("Working", total=2) as handle:
            clock.now = 10.0
            handle.advance(note="half")
            assert handle._bar is not None
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        work()
    work_again = Run(out=Path("unused"), console=console)
    with work_again.progress("Second") as handle:  # a display left open would make this one fail
        clock.now = 20.0
        handle.advance()


def test_devices_resolve_or_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    assert Run(out=Path("x"), device="cpu").torch_device() == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Run(out=Path("x")).torch_device() == torch.device("cpu")
    with pytest.raises(ConfigError, match="no CUDA device is usable"):
        Run(out=Path("x"), device="cuda").torch_device()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert Run(out=Path("x")).torch_device() == torch.device("cuda")
    with pytest.raises(ConfigError, match="there are 1 CUDA devices"):
        Run(out=Path("x"), device="cuda:1").torch_device()


def test_importing_the_run_imports_no_torch() -> None:
    import subprocess

    code = "import sys, stillhouse.core.run; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    assert done.stdout.strip() == "False"
