"""The command line of a toy domain and the root command, in process and as a program."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from stillhouse.core.cli import build_app, build_root, main, run_app
from stillhouse.core.domain import Domain
from stillhouse.core.errors import MissingDependencyError, UndecidedError

CONFIG = """
from __future__ import annotations
from dataclasses import dataclass, field

@dataclass(kw_only=True, slots=True, frozen=True)
class Train:
    steps: int = 10
    seed: int = 7
    accelerator: str = "auto"

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")

@dataclass(kw_only=True, slots=True, frozen=True)
class Config:
    train: Train = field(default_factory=Train)
    fail: str = ""
"""

WORK = """
from stillhouse.core.config import to_dict
from stillhouse.core.errors import DataError, UndecidedError

def train(config, run):
    if config.fail == "data":
        raise DataError("scores.csv: no column 'label'")
    if config.fail == "undecided":
        raise UndecidedError("the interval [-0.1, 0.2] straddles 0")
    if config.fail == "bug":
        raise RuntimeError("a\\nbug")
    if config.fail == "interrupt":
        raise KeyboardInterrupt
    print("a library prints this")
    run.detail("a detail")
    path = run.path("report.html")
    path.write_text("<html>")
    return {"report": path, "config": to_dict(config), "seed": run.seed, "device": run.device}

def evaluate(artifact, data, config, run):
    return {"artifact": artifact, "data": data, "steps": config.train.steps}

def report(folder, run):
    return {"report": run.path("report.html")}

def export(artifact, format, run):
    return {"format": format, "file": run.path("model." + format)}

def add_verbs(app):
    @app.command(help="Say hello.")
    def identify(name: str) -> None:
        print("hello", name)
"""

DOMAIN = """
from stillhouse.core.domain import Domain
DOMAIN = Domain(
    name="toy", title="A toy domain", config="toycli.config:Config", configs="toycli.configs",
    train="toycli.work:train", evaluate="toycli.work:evaluate", report="toycli.work:report",
    export="toycli.work:export", formats=("torch", "onnx"), verbs="toycli.work:add_verbs",
)
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an installed toy domain and an installed broken one."""
    root = tmp_path_factory.mktemp("site")
    package = root / "toycli"
    (package / "configs").mkdir(parents=True)
    for name, text in {
        "__init__.py": "",
        "config.py": CONFIG,
        "work.py": WORK,
        "domain.py": DOMAIN,
        "configs/__init__.py": "",
        "configs/_base.py": "train = dict(steps=3)\n",
        "configs/demo.py": '"""Three steps."""\n_base_ = ["./_base.py"]\n',
        "configs/long.py": '"""Many steps."""\n_base_ = ["./_base.py"]\ntrain = dict(steps=1000)\n',
    }.items():
        (package / name).write_text(text)
    (root / "brokencli.py").write_text("raise ImportError('libfoo.so: cannot open')\n")
    for name, point in {"toy": "toycli.domain:DOMAIN", "bad": "brokencli:DOMAIN"}.items():
        info = root / f"stillhouse_{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: stillhouse-{name}\nVersion: 1.0\nSummary: The {name} one\n"
        )
        (info / "entry_points.txt").write_text(f"[stillhouse.domains]\n{name} = {point}\n")
    return root


@pytest.fixture
def domain(site: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Domain:
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    from toycli.domain import DOMAIN as loaded  # type: ignore[import-not-found]

    return loaded  # type: ignore[no-any-return]


def call(domain: Domain, *arguments: str) -> int:
    return run_app(build_app(domain), arguments, "stillhouse-toy")


def test_help_lists_every_verb(domain: Domain, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(domain, "--help") == 0
    out = capsys.readouterr().out
    for verb in ("demo", "train", "evaluate", "report", "export", "configs", "doctor", "identify"):
        assert verb in out
    assert "A toy domain" in out


def test_help_of_a_verb_through_the_runner(domain: Domain) -> None:
    result = CliRunner().invoke(build_app(domain), ["train", "--help"])
    assert result.exit_code == 0
    for option in ("--config", "--set", "--out", "--seed", "--device", "--json", "--verbose"):
        assert option in result.stdout


def test_train_prints_one_json_object(
    domain: Domain, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code = call(
        domain, "train", "--config", "demo", "--set", "train.steps=5", "--seed", "3", "--out", "o", "--json"
    )
    out, err = capsys.readouterr()
    assert code == 0
    result = json.loads(out)
    assert result["config"]["train"] == {"steps": 5, "seed": 3, "accelerator": "auto"}
    assert result["seed"] == 3
    assert result["out"] == "o"
    assert "a library prints this" in err
    assert (tmp_path / "o" / "report.html").is_file()


def test_the_seed_of_the_configuration_counts_without_the_option(
    domain: Domain, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(domain, "demo", "--json", "--device", "cpu") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["seed"] == 7
    assert result["config"]["train"] == {"steps": 3, "seed": 7, "accelerator": "cpu"}
    assert result["out"].startswith("runs/toy/demo-")


def test_people_see_the_folder_and_the_report_last(
    domain: Domain, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(domain, "demo", "--out", "o") == 0
    assert capsys.readouterr().out.splitlines()[-2:] == ["o", "o/report.html"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--set", "fail=data"], 1, "error: scores.csv: no column 'label'\n"),
        (["--set", "fail=undecided"], 3, "error: the interval [-0.1, 0.2] straddles 0\n"),
        (["--set", "fail=bug"], 1, "error: RuntimeError: a bug (-v shows the traceback)\n"),
        (["--set", "train.stpes=1"], 2, "did you mean 'steps'?"),
        (["--set", "train.steps=0"], 2, "train: steps must be at least 1, got 0\n"),
        (["--device", "tpu"], 2, "'tpu' is none of auto, cpu"),
        (["--device", "cuda:1"], 2, "CUDA_VISIBLE_DEVICES=1"),
        (["--seed", "x"], 2, "--seed"),
        (["--nonsense"], 2, "nonsense"),
    ],
)
def test_an_error_is_one_line_and_an_exit_code_and_leaves_nothing(
    domain: Domain,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    assert call(domain, "demo", *arguments) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []
    if err.startswith("error: "):
        assert err.count("\n") == 1


def test_verbose_shows_the_traceback(domain: Domain, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(domain, "demo", "--set", "fail=bug", "-v") == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.rstrip().endswith("error: RuntimeError: a bug")


def test_a_warning_is_one_clean_line(capsys: pytest.CaptureFixture[str]) -> None:
    app = typer.Typer()

    @app.command()
    def verb() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            for _ in range(2):
                warnings.warn("the split\n is by patch", UserWarning, stacklevel=1)

    before = warnings.showwarning
    assert run_app(app, [], "prog") == 0
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err == "warning: the split is by patch\n"
    assert warnings.showwarning is before


def test_an_interrupt_gives_130(domain: Domain) -> None:
    assert call(domain, "demo", "--set", "fail=interrupt") == 130


def test_train_without_a_configuration_lists_the_presets(
    domain: Domain, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(domain, "train") == 2
    assert "one of demo, long, or a file" in capsys.readouterr().err


def test_configs_are_listed_and_shown(domain: Domain, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(domain, "configs") == 0
    listed = capsys.readouterr().out
    assert "demo" in listed
    assert "Three steps." in listed
    assert call(domain, "configs", "list", "--json") == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == ["demo", "long"]
    assert call(domain, "configs", "show", "long", "--set", "train.seed=1", "--json") == 0
    assert json.loads(capsys.readouterr().out)["train"] == {"steps": 1000, "seed": 1, "accelerator": "auto"}
    assert call(domain, "configs", "show", "lnog") == 2
    assert "did you mean 'long'?" in capsys.readouterr().err


def test_what_configs_show_prints_can_be_set_again(
    domain: Domain, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(domain, "configs", "show", "long", "--set", "fail=a b=c") == 0
    lines = capsys.readouterr().out.splitlines()
    settings = [part for line in lines for part in ("--set", line)]
    assert call(domain, "configs", "show", "demo", *settings) == 0
    assert capsys.readouterr().out.splitlines() == lines


def test_evaluate_takes_the_configuration_given(
    domain: Domain, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert call(domain, "evaluate", str(tmp_path), "--config", "long", "--data", "d", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result == {"out": None, "artifact": str(tmp_path), "data": "d", "steps": 1000}


def test_evaluate_takes_the_configuration_of_the_artefact(
    domain: Domain, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch")
    from stillhouse.core.artifact import Artifact

    folder = tmp_path / "artefact"
    Artifact.save(
        folder,
        kind="toy",
        tensors={"weight": torch.zeros(2)},
        config={"train": {"steps": 44}},
        metrics={},
        card="# A toy\n",
    )
    assert call(domain, "evaluate", str(folder), "--json") == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 44
    assert call(domain, "evaluate", str(tmp_path), "--json") == 0  # the folder of the run will do
    assert json.loads(capsys.readouterr().out)["steps"] == 44
    assert call(domain, "evaluate", str(tmp_path / "nowhere"), "--json") == 1
    assert "nowhere" in capsys.readouterr().err


def test_report_and_export(domain: Domain, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert call(domain, "report", str(tmp_path), "--json") == 0
    assert json.loads(capsys.readouterr().out)["report"] == str(tmp_path / "report.html")
    assert call(domain, "report", "nowhere") == 2
    assert "nowhere: no such folder" in capsys.readouterr().err
    assert call(domain, "export", "a", "--format", "onnx", "--out", "e", "--json") == 0
    assert json.loads(capsys.readouterr().out)["format"] == "onnx"
    assert call(domain, "export", "a", "--format", "exe") == 2
    assert "allowed are torch, onnx" in capsys.readouterr().err


def test_doctor_fails_where_something_required_is_missing(
    domain: Domain, capsys: pytest.CaptureFixture[str]
) -> None:
    from dataclasses import replace

    from stillhouse.core.doctor import python_library

    assert call(domain, "doctor") == 0
    capsys.readouterr()
    sick = replace(domain, doctor=(python_library("surely-not-installed>=2"),))
    assert call(sick, "doctor", "--json") == 1
    result = json.loads(capsys.readouterr().out)
    assert result["ok"] is False
    assert result["install"] == ['pip install "surely-not-installed>=2"']
    assert call(sick, "doctor") == 1
    assert 'to do: pip install "surely-not-installed>=2"' in capsys.readouterr().out
    optional = replace(domain, doctor=(python_library("surely-not-installed", required=False),))
    assert call(optional, "doctor") == 0


def test_own_verbs_are_added(domain: Domain, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(domain, "identify", "you") == 0
    assert capsys.readouterr().out == "hello you\n"


# --- the root command
# -------------------------------------------------------------------------------------------------


def test_the_root_delegates_with_all_arguments(domain: Domain, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["toy", "demo", "--json", "--set", "train.steps=2", "--out", "o"]) == 0
    assert json.loads(capsys.readouterr().out)["config"]["train"]["steps"] == 2
    assert main(["toy", "--help"]) == 0
    assert "Usage: stillhouse toy" in capsys.readouterr().out
    assert main(["toy", "demo", "--set", "fail=undecided"]) == 3
    assert main(["toy", "nonsense"]) == 2
    assert main(["toy", "doctor"]) == 0


def test_a_broken_domain_is_shown_and_stops_nothing(
    domain: Domain, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "The toy one" in out
    assert "The bad one" in out
    assert main(["domains", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["toy"]["state"] == "ok"
    assert rows["bad"]["state"] == "broken"
    assert "libfoo.so" in rows["bad"]["what"]
    assert main(["domains"]) == 0
    assert "broken" in capsys.readouterr().out
    assert main(["bad", "demo"]) == 1
    assert "stillhouse-bad 1.0" in capsys.readouterr().err
    assert main(["toy", "identify", "you"]) == 0


def test_the_root_names_the_nearest_command(domain: Domain, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tyo"]) == 2
    assert "toy" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    from importlib.metadata import version

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"stillhouse {version('stillhouse-core')}\n"


def test_the_root_has_a_doctor_and_a_cache(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    names = [check["name"] for check in json.loads(capsys.readouterr().out)["checks"]]
    assert "torch" in names
    assert "memory" in names
    assert main(["cache", "--help"]) == 0
    assert "Usage: stillhouse cache" in capsys.readouterr().out
    assert CliRunner().invoke(build_root(), ["--help"]).exit_code == 0


# --- exit codes
# -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (None, 0),
        (UndecidedError("x"), 3),
        (MissingDependencyError("x"), 1),
        (OSError("x"), 1),
        (typer.Exit(5), 5),
        (typer.Abort(), 1),
        (KeyboardInterrupt(), 130),
        (SystemExit("text"), 1),
        (SystemExit(None), 0),
    ],
)
def test_run_app_returns_a_code_for_whatever_happens(raised: Any, code: int) -> None:
    app = typer.Typer()

    @app.command()
    def work() -> None:
        if raised is not None:
            raise raised

    assert run_app(app, [], "work") == code


# --- as a program
# -----------------------------------------------------------------------------------------------------


def program(site: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(site), "COLUMNS": "120"}
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS"):
        environment.pop(name, None)
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, check=False)


def test_the_program_keeps_its_standard_output_clean(site: Path, tmp_path: Path) -> None:
    root = ("-m", "stillhouse.core.cli")
    done = program(site, *root, "toy", "demo", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["config"]["train"]["steps"] == 3
    failed = program(site, *root, "toy", "demo", "--set", "fail=data", cwd=tmp_path)
    assert failed.returncode == 1
    assert failed.stdout == ""
    assert failed.stderr == "error: scores.csv: no column 'label'\n"


def test_help_and_listing_import_neither_torch_nor_the_readers(site: Path, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom stillhouse.core.cli import main\n"
        "codes = [main(['--help']), main(['toy', '--help']), main(['domains']), main(['toy', 'configs'])]\n"
        "heavy = ('torch', 'numpy', 'mmengine', 'matplotlib', 'lightning')\n"
        "print('LOADED', codes, [name for name in heavy if name in sys.modules])\n"
    )
    done = program(site, "-c", code, cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == "LOADED [0, 0, 0, 0] []", done.stderr
