"""The command line as a user has it: what is written, what is said, and that bad input writes nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from stillhouse.core.artifact import Artifact
from stillhouse.lidar.cli import main
from stillhouse.lidar.domain import DOMAIN
from stillhouse.lidar.io import read_scan, write_cloud


def call(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def fails(capsys: pytest.CaptureFixture[str], code: int, *arguments: object) -> str:
    """Run, check the code, and return the one line on the standard error."""
    assert call(*arguments) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    if captured.err.startswith("error: "):
        assert captured.err.count("\n") == 1, captured.err
    else:
        assert code == 2, captured.err  # the usage box of a wrong option
    return " ".join(captured.err.split())


def result(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    """Run with --json and return the one object on the standard output."""
    capsys.readouterr()
    assert call(*arguments, "--json") == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


# ---- help


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom stillhouse.lidar.cli import main\ncode = main(['--help'])\n"
        "heavy = {'torch', 'open3d', 'scipy', 'diffusers', 'matplotlib', 'numpy', 'PIL', 'ot'} & "
        "set(sys.modules)\n"
        "assert not heavy, heavy\nsys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for verb in ("complete", "view", "aggregate", "simulate", "demo", "train", "evaluate", "doctor"):
        assert verb in done.stdout


def test_module_and_domain_agree() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "stillhouse.lidar", "complete", "--help"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "--keep-input" in done.stdout
    assert DOMAIN.formats == ("artifact",)


# ---- complete


@pytest.mark.parametrize("suffix", ["ply", "pcd", "bin"])
def test_complete_one_sweep(
    suffix: str,
    student_original: Path,
    drive_original: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sweep, out = drive_original / "velodyne" / "000001.bin", tmp_path / "new" / f"scene.{suffix}"
    assert call("complete", sweep, "-m", student_original, "-o", out) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "3 network evaluations" in said  # two steps, and the refinement
    assert names(out.parent) == [out.name]
    points = read_scan(out).points
    assert f"→ {len(points)} points" in said
    again = tmp_path / f"again.{suffix}"
    assert call("complete", sweep, "-m", student_original, "-o", again) == 0
    assert again.read_bytes() == out.read_bytes()
    assert call("complete", sweep, "-m", student_original, "-o", again, "--seed", 1) == 0
    assert again.read_bytes() != out.read_bytes()


def test_complete_a_sequence(
    student_original: Path, drive_original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scenes"
    found = result(
        capsys, "complete", drive_original, "-m", student_original.parent, "-o", out, "--steps", 3,
        "--guidance", 2, "--format", "bin", "--pictures",
    )  # fmt: skip
    rows = found["results"]
    assert [Path(row["out"]).name for row in rows] == ["000000.bin", "000001.bin", "000002.bin"]
    for row in rows:
        assert row["evaluations"] == 7
        assert len(read_scan(row["out"])) == row["points"]
        assert row["input"] == len(read_scan(row["scan"]))
        assert row["seconds"] > 0
        assert len(row["pictures"]) == 4
        for picture in row["pictures"]:
            with Image.open(picture) as image:
                assert image.width == 1080
    assert len(names(out)) == 3 + 12


def test_complete_files_and_folders_keeping_the_sweep(
    student_original: Path, drive_original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "other" / "velodyne"
    folder.mkdir(parents=True)
    first = drive_original / "velodyne" / "000000.bin"
    (folder / "000000.bin").write_bytes(first.read_bytes())
    out = tmp_path / "scenes"
    found = result(
        capsys, "complete", first, folder, "-m", student_original, "-o", out, "--keep-input"
    )["results"]  # fmt: skip
    assert names(out) == ["00-velodyne-000000.ply", "other-velodyne-000000.ply"]  # two of one name
    for row in found:
        points = read_scan(row["out"]).points
        np.testing.assert_array_equal(points[-row["input"] :], read_scan(row["scan"]).points)
    assert (out / names(out)[0]).read_bytes() == (out / names(out)[1]).read_bytes()


def damaged(kind: str, path: Path) -> None:
    """Write a sweep of one kind of damage."""
    good = np.random.default_rng(0).uniform(-15, 15, (200, 4)).astype("<f4")
    if kind == "size":
        path.write_bytes(good.tobytes()[:-3])
    elif kind in ("nan", "inf"):
        good[7, 1] = np.nan if kind == "nan" else np.inf
        path.write_bytes(good.tobytes())
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "byte order":
        path.write_bytes(good.astype(">f4").tobytes())
    elif kind == "far":
        path.write_bytes((good + np.float32(500)).tobytes())
    elif kind == "huge count":
        head = "ply\nformat binary_little_endian 1.0\nelement vertex 4000000000\n"
        head += "property float x\nproperty float y\nproperty float z\nend_header\n"
        path.write_bytes(head.encode() + good[:, :3].tobytes())


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("size", "bad.bin", "3,197 bytes are no multiple of 16"),
        ("nan", "bad.bin", "1 of 200 points hold NaN or Inf"),
        ("inf", "bad.bin", "1 of 200 points hold NaN or Inf"),
        ("empty", "bad.bin", "holds no points"),
        ("byte order", "bad.bin", "wrong format, unit or byte order"),
        ("far", "bad.bin", "no point is left between 3.5 and 20.0 m"),
        ("huge count", "bad.ply", "declares 4,000,000,000 points, which need 48,000,000,000 bytes"),
    ],
)
@pytest.mark.parametrize("alone", [True, False])
def test_a_bad_sweep_is_one_line_and_nothing_is_written(
    kind: str,
    name: str,
    message: str,
    alone: bool,
    student_original: Path,
    drive_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bad = drive_folder / "velodyne" / f"zz-{name}"
    damaged(kind, bad)
    source, out = (bad, tmp_path / "out.ply") if alone else (drive_folder, tmp_path / "new" / "out")
    before = names(tmp_path)
    assert message in fails(capsys, 1, "complete", source, "-m", student_original, "-o", out, "--pictures")
    assert names(tmp_path) == before
    if kind != "far":
        assert message in fails(capsys, 1, "view", source, "-o", tmp_path / "pictures")
        assert names(tmp_path) == before


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (lambda a: {**a, "scan": "none.bin"}, 1, "none.bin: does not exist"),
        (lambda a: {**a, "scan": __file__}, 1, "has an unknown format"),
        (lambda a: {**a, "model": "nowhere"}, 1, "there is no artefact folder here"),
        (lambda a: {**a, "out": "scene.las"}, 2, "must be a folder, or a file that ends in"),
        (lambda a: {**a, "out": a["scan"]}, 2, "would overwrite the sweep"),
        (lambda a: {**a, "more": ("--format", "las")}, 2, "--format las: allowed are ply, pcd, bin"),
        (lambda a: {**a, "more": ("--steps", "0")}, 2, "--steps"),
        (lambda a: {**a, "more": ("--steps", "1000")}, 2, "steps is 1000; the student's noise schedule"),
        (lambda a: {**a, "more": ("--guidance", "-1")}, 2, "--guidance"),
        (lambda a: {**a, "more": ("--guidance", "nan")}, 2, "--guidance"),
        (lambda a: {**a, "more": ("--guidance", "inf")}, 2, "guidance is inf; it must be a finite number"),
        (lambda a: {**a, "more": ("--device", "tpu")}, 2, "none of auto, cpu, cuda"),
    ],
)
def test_wrong_use_writes_nothing(
    change: Callable[[dict[str, Any]], dict[str, Any]],
    code: int,
    message: str,
    student_original: Path,
    drive_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    scan = drive_folder / "velodyne" / "000000.bin"
    a = change({"scan": scan, "model": student_original, "out": "scene.ply", "more": ()})
    before, content = names(tmp_path), scan.read_bytes()
    said = fails(capsys, code, "complete", a["scan"], "-m", a["model"], "-o", a["out"], *a["more"])
    assert message in said.replace("│ ", "").replace(" │", "")
    assert names(tmp_path) == before
    assert scan.read_bytes() == content


def test_one_file_for_many_sweeps_and_a_file_in_the_way(
    student_original: Path, drive_original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = fails(capsys, 2, "complete", drive_original, "-m", student_original, "-o", tmp_path / "a.ply")
    assert "is one file, there are 3 sweeps; give a folder" in one
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "inside"):
        fails(capsys, 2, "complete", drive_original, "-m", student_original, "-o", out)
    assert (tmp_path / "file").read_text() == "mine"
    assert names(tmp_path) == ["file"]


def test_a_damaged_or_wrong_model_is_named(
    student_folder: Path, drive_original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = student_folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    sweep = drive_original / "velodyne" / "000000.bin"
    said = fails(capsys, 1, "complete", sweep, "-m", student_folder, "-o", tmp_path / "a.ply")
    assert "model.safetensors" in said
    Artifact.save(tmp_path / "stones", kind="kidney.student", tensors={}, config={}, metrics={}, card="# x")
    said = fails(capsys, 1, "complete", sweep, "-m", tmp_path / "stones", "-o", tmp_path / "a.ply")
    assert "is a 'kidney.student' where a 'lidar.completer' is needed" in said
    assert "a.ply" not in names(tmp_path)


def test_export_copies_the_artefact(
    student_original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = result(capsys, "export", student_original, "--out", tmp_path / "copy")
    assert found["format"] == "artifact"
    assert Artifact.load(tmp_path / "copy").digest == found["digest"]
    said = fails(capsys, 2, "export", student_original, "--format", "onnx", "--out", tmp_path / "onnx")
    assert "allowed are artifact" in said
    assert names(tmp_path) == ["copy"]


# ---- view, aggregate, simulate


def test_view(drive_original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = result(
        capsys, "view", drive_original, "-o", tmp_path / "pictures", "--width", 128, "--extent", 15
    )
    assert len(found["pictures"]) == 6
    for name in found["pictures"]:
        with Image.open(name) as image:
            assert image.width == 128
            assert len(np.unique(np.asarray(image).reshape(-1, 3), axis=0)) > 5


def test_a_window_needs_a_display(
    drive_original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Open3D itself is stood in for: without a display it says no, with one the window is run and closed."""
    from stillhouse.lidar import io

    class Window:
        opened, did = False, []  # type: ignore[var-annotated]

        def create_window(self, **_: object) -> bool:
            return self.opened

        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda *_: self.did.append(name)

    class Open3d:
        class visualization:
            Visualizer = Window

        class geometry:
            @staticmethod
            def PointCloud(points: object) -> object:
                return type("Cloud", (), {})()

        class utility:
            @staticmethod
            def Vector3dVector(values: np.ndarray) -> np.ndarray:
                return values

    monkeypatch.setattr(io, "import_open3d", lambda purpose: Open3d)
    sweep = drive_original / "velodyne" / "000000.bin"
    said = fails(capsys, 1, "view", sweep, "--window", "-o", tmp_path / "none")
    assert "there is no display here; leave --window out" in said
    Window.opened = True
    assert call("view", sweep, "--window", "-o", tmp_path / "none") == 0
    assert Window.did == ["add_geometry", "run", "destroy_window"]
    assert names(tmp_path) == []


@pytest.mark.parametrize("suffix", ["ply", "npy"])
def test_aggregate(
    suffix: str, drive_original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "maps" / f"map.{suffix}"
    found = result(capsys, "aggregate", drive_original, "-o", out, "--voxel", 0.2, "--max-range", 30)
    assert found["scans"] == 3
    points = np.load(out) if suffix == "npy" else read_scan(out).points
    assert points.shape == (found["points"], 3)
    assert points.dtype == np.float32
    moving = result(
        capsys, "aggregate", drive_original, "-o", out, "--voxel", 0.2, "--max-range", 30, "--moving"
    )
    assert moving["points"] >= found["points"]
    assert names(out.parent) == [out.name]


def test_aggregate_with_icp(drive_original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = result(capsys, "aggregate", drive_original, "-o", tmp_path / "map.bin", "--icp")
    assert found["icp"] is True
    assert len(read_scan(tmp_path / "map.bin")) == found["points"] > 1000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: (d / "poses.txt").write_text("1 0 0 0 0 1 0 0 0 0 1 0\n"), "needs number 2"),
        (lambda d: (d / "poses.txt").write_text("1 0 0\n"), "has 3 numbers; a pose has 12"),
        (lambda d: (d / "poses.txt").write_text("nan " * 12 + "\n"), "is no rigid motion"),
        (lambda d: (d / "poses.txt").unlink(), "has no poses.txt"),
        (lambda d: (d / "calib.txt").write_text("P0: 1 2 3\n"), "has no line `Tr:`"),
        (lambda d: (d / "labels" / "000001.label").unlink(), "000001.label: is missing"),
        (lambda d: (d / "labels" / "000001.label").write_bytes(b"\0" * 40), "has 10 labels for"),
        (lambda d: (d / "labels" / "000001.label").write_bytes(b"\0" * 41), "no multiple of 4"),
        (lambda d: damaged("size", d / "velodyne" / "000002.bin"), "no multiple of 16"),
        (lambda d: damaged("nan", d / "velodyne" / "000002.bin"), "hold NaN or Inf"),
    ],
)
def test_a_bad_sequence_is_one_line_and_nothing_is_written(
    change: Callable[[Path], object],
    message: str,
    drive_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    change(drive_folder)
    before = names(tmp_path)
    assert message in fails(capsys, 1, "aggregate", drive_folder, "-o", tmp_path / "new" / "map.ply")
    assert names(tmp_path) == before


def test_wrong_use_of_aggregate(
    drive_original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for out, more, message in (
        ("map.txt", (), "must end in .ply, .pcd, .bin or .npy"),
        ("map.ply", ("--max-range", "2"), "--max-range 2.0: must be above --min-range (3.5)"),
        ("map.ply", ("--voxel", "0"), "--voxel"),
    ):
        assert message in fails(capsys, 2, "aggregate", drive_original, "-o", tmp_path / out, *more)
    assert "is no folder" in fails(capsys, 1, "aggregate", tmp_path / "no", "-o", tmp_path / "map.ply")
    assert names(tmp_path) == []


def test_simulate_writes_drives_that_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "drives"
    arguments = ("simulate", "--streets", 2, "--scans", 1, "--rings", 8, "--azimuths", 64, "--out")
    found = result(capsys, *arguments, out, "--seed", 4)
    assert [Path(path).name for path in found["sequences"]] == ["00", "01"]
    for folder in map(Path, found["sequences"]):
        assert names(folder) == ["README.txt", "calib.txt", "labels", "map.npy", "poses.txt", "velodyne"]
        merged = result(capsys, "aggregate", folder, "-o", tmp_path / "map.npy")
        assert merged["scans"] == 1
    first, second = (Path(path) / "velodyne" / "000000.bin" for path in found["sequences"])
    assert first.read_bytes() != second.read_bytes()
    one = tuple(1 if part == 2 else part for part in arguments)
    again = result(capsys, *one, tmp_path / "again", "--seed", 4)["sequences"]
    assert (Path(again[0]) / "velodyne" / "000000.bin").read_bytes() == first.read_bytes()
    assert "is not empty" in fails(capsys, 1, *arguments, out)
    assert "--out is required" in fails(capsys, 2, "simulate")


# ---- doctor, and Open3D that is missing


def test_doctor_names_the_libraries_of_open3d(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("doctor", "--json") in (0, 1)
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    for name in ("open3d", "libusb-1.0.so.0", "libGL.so.1", "libEGL.so.1", "libgomp.so.1"):
        assert name in checks


BLOCKED = """
import importlib.abc, sys

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "open3d":
            raise ImportError("libusb-1.0.so.0: cannot open shared object file: No such file or directory")

sys.meta_path.insert(0, Missing())
from stillhouse.lidar.cli import main
"""


def without_open3d(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BLOCKED + code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_bin_to_bin_metrics_and_training_need_no_open3d(
    student_original: Path, drive_original: Path, tmp_path: Path
) -> None:
    code = """
import numpy as np, torch
torch.set_num_threads(1)
scan, model, out = sys.argv[1:]
assert main(["complete", scan, "-m", model, "-o", out, "--pictures"]) == 0
import stillhouse.lidar.distiller, stillhouse.lidar.fit, stillhouse.lidar.pairs, stillhouse.lidar.run
from stillhouse.lidar.io import read_scan
from stillhouse.lidar.metrics import evaluate_cloud
points = read_scan(out).points
assert evaluate_cloud(points, points)["chamfer"] == 0
assert "open3d" not in sys.modules
"""
    scan = drive_original / "velodyne" / "000000.bin"
    done = without_open3d(code, scan, student_original, tmp_path / "scene.bin")
    assert done.returncode == 0, done.stderr
    assert names(tmp_path) == ["scene-after-above.png", "scene-after-oblique.png", "scene-before-above.png",
                               "scene-before-oblique.png", "scene.bin"]  # fmt: skip


def test_what_needs_open3d_names_the_packages(
    student_original: Path, drive_original: Path, tmp_path: Path
) -> None:
    write_cloud(tmp_path / "sweep.ply", read_scan(drive_original / "velodyne" / "000000.bin").points)
    code = """
import contextlib, io, json
answers = []
for command in json.loads(sys.argv[1]):
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = main(command)
    answers.append((code, said.getvalue()))
print(json.dumps(answers))
"""
    commands = [
        ("complete", tmp_path / "sweep.ply", "-m", student_original, "-o", tmp_path / "scene.ply"),
        ("view", tmp_path / "sweep.ply", "-o", tmp_path / "pictures"),
        ("simulate", "--streets", 1, "--scans", 1, "--out", tmp_path / "drives"),
        ("aggregate", drive_original, "--icp", "-o", tmp_path / "map.npy"),
    ]
    done = without_open3d(code, json.dumps([list(map(str, command)) for command in commands]))
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    assert len(answers) == len(commands)
    for command, (exit_code, said) in zip(commands, answers, strict=True):
        assert exit_code == 1, (command, said)
        assert said.count("\n") == 1, said
        assert "apt-get install libusb-1.0-0 libgl1 libegl1 libgomp1" in said
        assert "libusb-1.0.so.0" in said
    assert names(tmp_path) == ["sweep.ply"]
