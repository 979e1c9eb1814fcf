"""Checks of the machine: libraries, system libraries, GPU, memory, disk; each says what to install.

A domain adds its own checks to `Domain.doctor`; the requirements that its distribution declares are checked
without being listed a second time. Importing this module costs nothing: torch is imported by the GPU check
alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import importlib.metadata
import os
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.table import Table

Status = Literal["ok", "missing", "unfit"]

_GIB = 1024**3


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What a probe found.

    Args:
        status: `ok`, `missing`, or `unfit` (there, but too old, too small or unusable).
        detail: what is there, for people.
        remedy: the line that mends it; empty where all is well.
    """

    status: Status
    detail: str
    remedy: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that must or may be on the machine.

    Args:
        name: what is looked for, as a person would call it.
        probe: looks for it; runs when the doctor runs, never on import.
        required: whether its absence stops the package from working.
    """

    name: str
    probe: Callable[[], Finding]
    required: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One line of the doctor's answer."""

    name: str
    status: Status
    detail: str
    remedy: str
    required: bool


def python_library(requirement: str, *, required: bool = True, install: str | None = None) -> Check:
    """Check an installed distribution against a requirement such as `"torch>=2.8"`.

    Args:
        requirement: a PEP 508 requirement.
        required: whether the package cannot work without it.
        install: what to give to `pip install`; the requirement itself where None.

    Example:
        >>> python_library("packaging>=20").probe().status
        'ok'
        >>> python_library("surely-not-installed").probe().remedy
        'pip install "surely-not-installed"'
    """
    from packaging.requirements import Requirement

    parsed = Requirement(requirement)
    wanted = f"{parsed.name}{parsed.specifier}"
    remedy = f'pip install "{install or wanted}"'

    def probe() -> Finding:
        try:
            version = importlib.metadata.version(parsed.name)
        except importlib.metadata.PackageNotFoundError:
            return Finding(status="missing", detail="not installed", remedy=remedy)
        if not parsed.specifier.contains(version, prereleases=True):
            return Finding(status="unfit", detail=f"{version}, needs {parsed.specifier}", remedy=remedy)
        return Finding(status="ok", detail=version)

    return Check(name=parsed.name, probe=probe, required=required)


def requirements_of(distribution: str) -> tuple[Check, ...]:
    """Return one check per requirement that an installed distribution declares.

    Requirements of its extras come last and are optional; the extra `test` is left out.

    Raises:
        importlib.metadata.PackageNotFoundError: the distribution is not installed.
    """
    from packaging.requirements import Requirement

    metadata = importlib.metadata.metadata(distribution)
    extras = [extra for extra in metadata.get_all("Provides-Extra") or [] if extra != "test"]
    needed, optional = [], []
    for line in importlib.metadata.requires(distribution) or []:
        parsed = Requirement(line)
        plain = f"{parsed.name}{parsed.specifier}"
        if parsed.marker is None or parsed.marker.evaluate({"extra": ""}):
            needed.append(python_library(plain))
            continue
        for extra in extras:
            if parsed.marker.evaluate({"extra": extra}):
                optional.append(python_library(plain, required=False, install=f"{distribution}[{extra}]"))
    return (*needed, *optional)


def system_library(name: str, *, soname: str, apt: str, required: bool = True) -> Check:
    """Check that a shared library of the system can be loaded.

    Args:
        name: as `ctypes.util.find_library` knows it, for example `"GL"`.
        soname: file that the loader looks for, for example `"libGL.so.1"`.
        apt: Debian and Ubuntu package that has it, for example `"libgl1"`.
        required: whether the package cannot work without it.
    """

    def probe() -> Finding:
        if not sys.platform.startswith("linux"):
            return Finding(status="ok", detail=f"not looked for on {sys.platform}")
        found = ctypes.util.find_library(name)
        if found is None:
            with contextlib.suppress(OSError):
                ctypes.CDLL(soname)
                found = soname
        if found is None:
            return Finding(status="missing", detail="not found", remedy=f"apt-get install {apt}")
        return Finding(status="ok", detail=found)

    return Check(name=soname, probe=probe, required=required)


def gpu(*, memory_gib: float = 0.0, required: bool = False) -> Check:
    """Check for a CUDA device that torch can use, with at least `memory_gib` GiB."""

    def probe() -> Finding:
        import torch

        driver = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None
        if not torch.cuda.is_available():
            if not driver:
                return Finding(status="missing", detail="no NVIDIA driver; training runs on the CPU")
            detail = f"the driver is there, torch {torch.__version__} cannot use it"
            remedy = "install a CUDA build of torch that fits the driver: https://pytorch.org/get-started"
            return Finding(status="unfit", detail=detail, remedy=remedy)
        devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        detail = ", ".join(f"{device.name} {device.total_memory / _GIB:.0f} GiB" for device in devices)
        detail = f"{detail}; CUDA {torch.version.cuda}"
        if max(device.total_memory for device in devices) < memory_gib * _GIB:
            remedy = f"use a GPU with {memory_gib:g} GiB or smaller batches"
            return Finding(status="unfit", detail=detail, remedy=remedy)
        return Finding(status="ok", detail=detail)

    return Check(name="GPU", probe=probe, required=required)


def processor() -> Check:
    """Say how many CPU cores this process may use."""

    def probe() -> Finding:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return Finding(status="ok", detail=f"{cores} core{'s' if cores > 1 else ''}")

    return Check(name="CPU", probe=probe)


def memory(*, gib: float = 2.0, required: bool = False) -> Check:
    """Check for at least `gib` GiB of memory, the limit of a container included."""

    def probe() -> Finding:
        try:
            total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, ValueError, OSError):
            return Finding(status="ok", detail="size unknown on this system")
        with contextlib.suppress(OSError, ValueError):  # no control group, or no limit ("max")
            total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
        detail = f"{total / _GIB:.1f} GiB"
        if total < gib * _GIB:
            return Finding(status="unfit", detail=detail, remedy=f"needs {gib:g} GiB; use smaller batches")
        return Finding(status="ok", detail=detail)

    return Check(name="memory", probe=probe, required=required)


def disk(*, gib: float = 1.0, folder: Path | None = None, required: bool = False) -> Check:
    """Check for at least `gib` GiB of free disk under `folder` (the working directory where None)."""

    def probe() -> Finding:
        place = Path.cwd() if folder is None else folder
        while not place.exists():
            place = place.parent
        free = shutil.disk_usage(place).free
        detail = f"{free / _GIB:.1f} GiB free under {place}"
        if free < gib * _GIB:
            remedy = f"needs {gib:g} GiB; free some or give another --out"
            return Finding(status="unfit", detail=detail, remedy=remedy)
        return Finding(status="ok", detail=detail)

    return Check(name="disk", probe=probe, required=required)


def machine() -> tuple[Check, ...]:
    """Return the checks of the machine itself: CPU, memory, GPU, disk; none is required."""
    return (processor(), memory(), gpu(), disk())


def run_checks(checks: Iterable[Check]) -> list[Result]:
    """Run checks in order; a probe that raises counts as unfit and does not stop the rest."""
    results = []
    for check in checks:
        try:
            found = check.probe()
        except Exception as error:  # the doctor reports what is broken, it does not break
            reason = " ".join(str(error).split())
            reason = " ".join(str(error).split())
            found = Finding(status="unfit", detail=f"{type(error).__name__}: {reason}")
        results.append(Result(name=check.name, required=check.required, **asdict(found)))
    return results


def healthy(results: Iterable[Result]) -> bool:
    """Say whether nothing required is missing or unfit."""
    return all(result.status == "ok" for result in results if result.required)


def as_dict(results: list[Result]) -> dict[str, Any]:
    """Return a JSON-able dict: `ok`, `checks`, and `install` with the lines of what is required."""
    install = [result.remedy for result in results if result.required and result.remedy]
    return {"ok": healthy(results), "checks": [asdict(result) for result in results], "install": install}


def as_table(results: Iterable[Result]) -> Table:
    """Return the results as a table for a terminal."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for column in ("", "what", "found", "to do"):
        table.add_column(column, overflow="fold")
    for result in results:
        bad = "✗" if result.required else "–"
        mark, style = (
            ("✓", "green") if result.status == "ok" else (bad, "red" if result.required else "yellow")
        )
        table.add_row(Text(mark, style=style), Text(result.name), Text(result.detail), Text(result.remedy))
    return table
