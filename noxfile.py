"""Sessions of the workspace; `nox --list` names them. Arguments after `--` go to the session.

nox -s demo                     train, distil and report on embedded data (`-- kidney --seed 1` chooses)
nox -s tests                    every package's tests in one environment (`-- --run-slow -k losses`)
nox -s "package(kidney)"        one domain in a fresh environment of its own
nox -s lint types docs build    what a change must pass besides
nox -s oracles bench            compare with, and measure against, independent libraries
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import nox

ROOT = Path(__file__).parent
DOMAINS = sorted(
    folder.name for folder in (ROOT / "packages").iterdir() if (folder / "pyproject.toml").is_file()
)
APPS = sorted(folder.name for folder in (ROOT / "apps").glob("*/") if any(folder.glob("test*.py")))
CONSTRAINTS = ROOT / "constraints.txt"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
FOLDERS = [ROOT / "shared", *(ROOT / "packages" / domain for domain in DOMAINS)]

nox.needs_version = ">=2024.10"
nox.options.default_venv_backend = "virtualenv"
nox.options.sessions = ["tests", "package"]
nox.options.error_on_external_run = True


def pinned(name: str) -> str:
    """Return the line of constraints.txt that pins a distribution."""
    for line in CONSTRAINTS.read_text(encoding="utf-8").splitlines():
        if line.lower().startswith(f"{name.lower()}=="):
            return line.strip()
    raise ValueError(f"constraints.txt has no line for {name}")


def install_torch(session: nox.Session) -> None:
    """Install the CPU build of torch, unless STILLHOUSE_TORCH names another requirement.

    The configured index is tried first, then PyTorch's own for the CPU: on Linux, PyPI's build brings CUDA
    along.
    """
    wanted = os.environ.get("STILLHOUSE_TORCH")
    if wanted:
        session.install(wanted)
        return
    plain = pinned("torch")
    if sys.platform == "darwin":
        session.install(plain)
        return
    cpu = f"{plain}+cpu"
    command = ("python", "-m", "pip", "install", "--quiet", "-c", str(CONSTRAINTS), cpu)
    session.run(*command, success_codes=[0, 1], silent=True)
    if not installed(session, "torch"):
        session.log(f"the configured index has no {cpu}: asking {CPU_INDEX}")
        session.run(*command, "--extra-index-url", CPU_INDEX)


def installed(session: nox.Session, module: str) -> bool:
    """Say whether the session's environment has a module."""
    code = f"import importlib.util as u; print(u.find_spec({module!r}) is not None)"
    return str(session.run("python", "-c", code, silent=True)).strip() == "True"


def prepare(session: nox.Session, *requirements: str, torch: bool = True) -> None:
    """Install requirements under constraints.txt; skipped where the same were installed by an earlier run."""
    sources = [CONSTRAINTS, *(folder / "pyproject.toml" for folder in FOLDERS)]
    text = json.dumps([requirements, torch, [path.read_text(encoding="utf-8") for path in sources]])
    digest = hashlib.sha256(text.encode()).hexdigest()
    stamp = Path(session.virtualenv.location) / "stillhouse-installed.txt"
    if stamp.is_file() and stamp.read_text() == digest:
        session.log("the environment is up to date")
        return
    if torch:
        install_torch(session)
    session.install("-c", str(CONSTRAINTS), *requirements)
    stamp.write_text(digest)


def editable(extras: str = "test") -> list[str]:
    """Return the arguments that install the core and every domain in editable mode."""
    arguments: list[str] = []
    for folder in FOLDERS:
        declared = (folder / "pyproject.toml").read_text(encoding="utf-8")
        wanted = [extra for extra in extras.split(",") if f"\n{extra} = [" in declared]
        suffix = f"[{','.join(wanted)}]" if wanted else ""
        arguments += ["-e", f"./{folder.relative_to(ROOT)}{suffix}"]
    return arguments


def one_thread(session: nox.Session) -> None:
    """Give each test process one thread: the processes themselves use the cores.

    yapf, which mmengine imports, writes a cache at its first import: once, before they start together.
    """
    session.run("python", "-c", "import yapf.yapflib.yapf_api", silent=True)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        session.env[name] = "1"


def workers(session: nox.Session) -> list[str]:
    """Return pytest's `-n` unless the caller gave one or looks at single tests."""
    given = any(argument.startswith(("-n", "--pdb", "--numprocesses")) for argument in session.posargs)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return [] if given or cores < 2 else ["-n", str(min(cores, 8))]


@nox.session(reuse_venv=True)
def tests(session: nox.Session) -> None:
    """Run every package's tests and the cross-package tests in one environment."""
    tools = ["pytest-xdist", "import-linter", "hatchling", "pot", "geomloss"]
    prepare(session, *editable("test,onnx"), *tools)
    one_thread(session)
    session.run("pytest", *workers(session), *session.posargs)


@nox.session(reuse_venv=False)
@nox.parametrize("domain", DOMAINS, ids=DOMAINS)
def package(session: nox.Session, domain: str) -> None:
    """Install the core and one domain, not editable, in a fresh environment; run that domain's tests."""
    install_torch(session)
    session.install("-c", str(CONSTRAINTS), "./shared", f"./packages/{domain}[test]", "pytest-xdist")
    siblings = [name for name in DOMAINS if name != domain]
    code = (
        "import importlib.util as u, sys\n"
        f"found = [name for name in {siblings!r} if u.find_spec('stillhouse.' + name)]\n"
        "sys.exit(f'importable besides the package: {found}' if found else 0)"
    )
    session.run("python", "-c", code)
    origin = "import stillhouse.core, sys; sys.exit(0 if 'site-packages' in stillhouse.core.__file__ else 1)"
    session.run("python", "-c", origin)
    session.run(f"stillhouse-{domain}", "--help", silent=True)
    one_thread(session)
    session.run("pytest", *workers(session), f"packages/{domain}/tests", *session.posargs)


@nox.session(reuse_venv=True)
def demo(session: nox.Session) -> None:
    """Run a domain's demo: `nox -s demo -- kidney --out runs/first`; kidney where none is named."""
    arguments = list(session.posargs)
    domain = arguments.pop(0) if arguments and not arguments[0].startswith("-") else "kidney"
    if domain not in DOMAINS:
        session.error(f"no domain {domain!r}; there are: {', '.join(DOMAINS)}")
    prepare(session, "-e", "./shared", "-e", f"./packages/{domain}")
    session.run(f"stillhouse-{domain}", "demo", *arguments)


@nox.session(reuse_venv=True)
def lint(session: nox.Session) -> None:
    """Check style and format with ruff."""
    prepare(session, "ruff", torch=False)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session(reuse_venv=True)
def types(session: nox.Session) -> None:
    """Check the types of every package's source with mypy."""
    prepare(session, *editable("test,onnx"), "mypy")
    session.run("mypy", *(str((folder / "src").relative_to(ROOT)) for folder in FOLDERS), *session.posargs)


@nox.session(reuse_venv=True)
def docs(session: nox.Session) -> None:
    """Build the documentation; a broken link or reference is an error. `-- serve` shows it."""
    prepare(session, "mkdocs-material", "mkdocstrings-python", "ruff", torch=False)
    session.env["NO_MKDOCS_2_WARNING"] = "1"
    if session.posargs:
        session.run("mkdocs", *session.posargs)
        return
    session.run("mkdocs", "build", "--strict", "--site-dir", str(ROOT / "site"))


@nox.session(reuse_venv=True)
def build(session: nox.Session) -> None:
    """Build every wheel and sdist into dist/ and check what is inside."""
    prepare(session, "hatchling", "pytest", torch=False)
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    for folder in FOLDERS:
        with session.chdir(folder):
            session.run("python", "-m", "hatchling", "build", "--directory", str(ROOT / "dist"))
    session.env["STILLHOUSE_DIST"] = str(ROOT / "dist")
    session.run("pytest", "--run-slow", "tests/test_workspace_wheels.py", *session.posargs)


@nox.session(reuse_venv=True)
def bench(session: nox.Session) -> None:
    """Run the benchmarks whose names hold one of the words given; all of them without."""
    prepare(session, *editable("test,onnx"), *PEERS)
    found = sorted(path for folder in FOLDERS for path in (folder / "benchmarks").glob("bench_*.py"))
    words = session.posargs
    chosen = [path for path in found if not words or any(word in path.name for word in words)]
    if not chosen:
        session.error(f"no benchmark named so; there are: {', '.join(path.stem for path in found) or 'none'}")
    for path in chosen:
        session.run("python", str(path.relative_to(ROOT)))


PEERS = ("pot", "geomloss", "pytorch-metric-learning", "scipy", "scikit-learn", "spconv", "diffusers")
HEAVY_PEERS = ("trl",)
BARE_PEERS = ("torchdistill", "liger-kernel")  # their requirements hold torchvision and CUDA: taken without


@nox.session(reuse_venv=True)
def oracles(session: nox.Session) -> None:
    """Compare with independent libraries; fails where a comparison is skipped or has vanished."""
    prepare(session, *editable("test,onnx"), "pytest-xdist", *PEERS, *HEAVY_PEERS)
    session.install("--no-deps", "-c", str(CONSTRAINTS), *BARE_PEERS)
    one_thread(session)
    report = Path(session.create_tmp()) / "oracles.xml"
    session.run("pytest", "-m", "oracle", "--run-slow", f"--junitxml={report}", *session.posargs)
    suite = next(ElementTree.parse(report).iter("testsuite"))
    ran = int(suite.get("tests", 0)) - int(suite.get("skipped", 0))
    wanted = int((ROOT / "tests" / "oracles.txt").read_text(encoding="utf-8").split()[0])
    session.log(f"{ran} comparisons with independent libraries ran; {wanted} are on record")
    if int(suite.get("skipped", 0)):
        session.error(f"{suite.get('skipped')} comparisons were skipped")
    if ran < wanted and not session.posargs:
        session.error(f"{wanted - ran} comparisons have vanished")


if APPS:

    @nox.session(reuse_venv=False)
    @nox.parametrize("app", APPS, ids=APPS)
    def apps(session: nox.Session, app: str) -> None:
        """Install one app as its README says and run its test."""
        prepare(session, "-r", f"apps/{app}/requirements.txt", "pytest")
        session.run("pytest", f"apps/{app}", *session.posargs)
