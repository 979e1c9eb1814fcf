"""The doctor: each check finds what is there, names what is not, and never breaks itself."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from stillhouse.core import doctor
from stillhouse.core.doctor import Check, Finding, as_dict, as_table, healthy, run_checks


def distribution(folder: Path, name: str, version: str, extra: str = "") -> None:
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{extra}")


def test_a_python_library_is_compared_with_its_requirement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distribution(tmp_path, "doctor_sample", "2.1")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert doctor.python_library("doctor-sample>=2").probe() == Finding(status="ok", detail="2.1")
    old = doctor.python_library("doctor-sample>=3").probe()
    assert old.status == "unfit"
    assert old.remedy == 'pip install "doctor-sample>=3"'
    assert doctor.python_library("doctor-absent").probe().status == "missing"


def test_declared_requirements_become_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requires = (
        "Provides-Extra: onnx\nProvides-Extra: test\nRequires-Dist: packaging>=1\n"
        'Requires-Dist: gone>=1; python_version < "3"\n'
        'Requires-Dist: doctor-absent>=4; extra == "onnx"\nRequires-Dist: doctor-never; extra == "test"\n'
    )
    distribution(tmp_path, "doctor_declares", "1.0", requires)
    monkeypatch.syspath_prepend(str(tmp_path))
    results = run_checks(doctor.requirements_of("doctor-declares"))
    assert [(result.name, result.status, result.required) for result in results] == [
        ("packaging", "ok", True),
        ("doctor-absent", "missing", False),
    ]
    assert results[1].remedy == 'pip install "doctor-declares[onnx]"'
    assert healthy(results)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="system libraries are looked for on Linux")
def test_a_system_library_is_found_or_named_with_its_package() -> None:
    assert doctor.system_library("c", soname="libc.so.6", apt="libc6").probe().status == "ok"
    missing = doctor.system_library("surely_not", soname="libsurely_not.so.9", apt="libsurely").probe()
    assert missing == Finding(status="missing", detail="not found", remedy="apt-get install libsurely")


@pytest.mark.parametrize("check", [doctor.memory, doctor.disk])
def test_sizes_are_compared_with_what_is_asked(check: Callable[..., Check]) -> None:
    assert check(gib=1e-6).probe().status == "ok"
    small = check(gib=1e12).probe()
    assert small.status == "unfit"
    assert "needs 1e+12 GiB" in small.remedy


def test_disk_of_a_folder_that_does_not_exist_yet(tmp_path: Path) -> None:
    assert str(tmp_path) in doctor.disk(folder=tmp_path / "a" / "b", gib=0.0).probe().detail


def test_the_processor_has_at_least_one_core() -> None:
    assert int(doctor.processor().probe().detail.split()[0]) >= 1


def test_a_gpu_is_found_missing_or_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    assert doctor.gpu().probe().status == "unfit"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    card = SimpleNamespace(name="A card", total_memory=8 * 1024**3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    assert doctor.gpu(memory_gib=8).probe().status == "ok"
    assert doctor.gpu(memory_gib=16).probe().status == "unfit"


def test_a_probe_that_raises_is_a_finding() -> None:
    def broken() -> Finding:
        raise OSError("cannot\nopen")

    results = run_checks(
        [Check(name="x", probe=broken), Check(name="y", probe=lambda: Finding(status="ok", detail=""))]
    )
    assert (results[0].status, results[0].detail) == ("unfit", "OSError: cannot open")
    assert results[1].status == "ok"
    assert not healthy(results)
    assert as_dict(results)["ok"] is False
    assert as_table(results).row_count == 2
