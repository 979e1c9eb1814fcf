"""Files: what is written comes back, and what is broken is refused in one line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from stillhouse.core.errors import DataError, MissingDependencyError
from stillhouse.lidar.io import (
    Scan,
    ScanSource,
    atomic_file,
    import_open3d,
    read_bin,
    read_calib,
    read_labels,
    read_poses,
    read_scan,
    read_sequence,
    write_cloud,
    write_labels,
    write_poses,
)


@pytest.fixture
def cloud() -> np.ndarray:
    return np.random.default_rng(0).uniform(-20, 20, (200, 3)).astype(np.float32)


def rigid(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    pose = np.eye(4)
    pose[:3, :3] = q * np.linalg.det(q)
    pose[:3, 3] = rng.normal(size=3)
    return pose


def one_line(call: Callable[[], object], *parts: str) -> None:
    with pytest.raises(DataError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize("suffix", [".bin", ".ply", ".pcd"])
def test_round_trip(tmp_path: Path, cloud: np.ndarray, suffix: str) -> None:
    remission = np.linspace(0, 1, len(cloud), dtype=np.float32)
    path = write_cloud(tmp_path / f"000007{suffix}", cloud, remission=remission)
    scan = read_scan(path)
    np.testing.assert_array_equal(scan.points, cloud)
    assert scan.remission is not None
    np.testing.assert_array_equal(scan.remission, remission)
    assert scan.name == "000007"
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.oracle
@pytest.mark.parametrize("suffix", [".ply", ".pcd"])
def test_colours_are_what_open3d_reads(tmp_path: Path, cloud: np.ndarray, suffix: str) -> None:
    colours = np.random.default_rng(1).integers(0, 256, (len(cloud), 3)).astype(np.uint8)
    path = write_cloud(tmp_path / f"c{suffix}", cloud, colours)
    read = import_open3d("a test").io.read_point_cloud(str(path))
    np.testing.assert_allclose(np.asarray(read.points), cloud, atol=1e-6)
    np.testing.assert_array_equal(np.round(np.asarray(read.colors) * 255), colours)


@pytest.mark.parametrize("encoding", ["ascii", "compressed", "big"])
def test_other_encodings(tmp_path: Path, cloud: np.ndarray, encoding: str) -> None:
    open3d = import_open3d("a test")
    path = tmp_path / ("a.pcd" if encoding == "compressed" else "a.ply")
    if encoding == "big":
        fields = "".join(f"property float {axis}\n" for axis in "xyz")
        header = f"ply\nformat binary_big_endian 1.0\nelement vertex {len(cloud)}\n{fields}end_header\n"
        path.write_bytes(header.encode() + cloud.astype(">f4").tobytes())
    else:
        made = open3d.geometry.PointCloud(open3d.utility.Vector3dVector(cloud.astype(float)))
        open3d.io.write_point_cloud(
            str(path), made, write_ascii=encoding == "ascii", compressed=encoding == "compressed"
        )
    np.testing.assert_allclose(read_scan(path).points, cloud, atol=1e-4)


def test_nuscenes_rows_of_five(tmp_path: Path, cloud: np.ndarray) -> None:
    rows = np.concatenate([cloud, np.full((200, 1), 255.0), np.full((200, 1), 31.0)], axis=1)
    path = tmp_path / "LIDAR_TOP.pcd.bin"
    path.write_bytes(rows.astype("<f4").tobytes())
    scan = read_scan(path)
    np.testing.assert_array_equal(scan.points, cloud)
    assert scan.remission is not None
    assert scan.remission.max() == 1.0
    assert scan.name == "LIDAR_TOP"


def test_labels_keep_the_low_half(tmp_path: Path) -> None:
    path = tmp_path / "a.label"
    path.write_bytes(np.array([40, (7 << 16) | 252, (3 << 16) | 10], "<u4").tobytes())
    assert read_labels(path, count=3).tolist() == [40, 252, 10]
    write_labels(tmp_path / "b.label", np.array([40, 252, 10]))
    assert read_labels(tmp_path / "b.label").tolist() == [40, 252, 10]


def test_poses_turn_to_the_lidar(tmp_path: Path) -> None:
    camera = np.stack([rigid(seed) for seed in range(3)])
    tr = rigid(9)
    write_poses(tmp_path / "poses.txt", camera)
    (tmp_path / "calib.txt").write_text(
        "P0: 1 2 3\nTr: " + " ".join(repr(float(v)) for v in tr[:3].ravel()) + "\n"
    )
    np.testing.assert_array_equal(read_poses(tmp_path / "poses.txt"), camera)
    expected = np.stack([np.linalg.inv(tr) @ pose @ tr for pose in camera])
    np.testing.assert_allclose(
        read_poses(tmp_path / "poses.txt", tmp_path / "calib.txt"), expected, atol=1e-12
    )


def test_bad_bin(tmp_path: Path, cloud: np.ndarray) -> None:
    rows = np.concatenate([cloud, np.zeros((200, 1), np.float32)], axis=1).astype("<f4")
    path = tmp_path / "a.bin"

    def holds(data: bytes) -> Path:
        path.write_bytes(data)
        return path

    one_line(lambda: read_scan(holds(rows.tobytes()[:-3])), "a.bin", "3,197", "16")
    one_line(lambda: read_scan(holds(b"")), "no points")
    one_line(lambda: read_scan(holds(rows.astype(">f4").tobytes())), "byte order")
    broken = rows.copy()
    broken[5, 1], broken[9, 0] = np.nan, np.inf
    one_line(lambda: read_scan(holds(broken.tobytes())), "2 of 200", "number 5")
    assert len(read_scan(path, drop_invalid=True)) == 198
    one_line(lambda: read_scan(tmp_path / "none.bin"), "does not exist")
    one_line(lambda: read_scan(tmp_path), "unknown format")
    (tmp_path / "folder.bin").mkdir()
    one_line(lambda: read_scan(tmp_path / "folder.bin"), "folder")
    with pytest.raises(ValueError, match="columns: 3"):
        read_bin(path, columns=3)


def test_bad_labels(tmp_path: Path, cloud: np.ndarray) -> None:
    scan = write_cloud(tmp_path / "a.bin", cloud)
    label = tmp_path / "a.label"
    write_labels(label, np.full(199, 40))
    one_line(lambda: read_scan(scan, labels=label), "a.label", "199", "200")
    label.write_bytes(b"123456")
    one_line(lambda: read_labels(label), "multiple of 4")
    label.write_bytes(np.full(200, 40, ">u4").tobytes())
    one_line(lambda: read_labels(label), "byte order")
    label.write_bytes(np.full(200, 9999, "<u4").tobytes())
    one_line(lambda: read_labels(label), "SemanticKITTI")


def test_invalid_points_go_with_their_labels(tmp_path: Path, cloud: np.ndarray) -> None:
    rows = np.concatenate([cloud, np.zeros((200, 1), np.float32)], axis=1).astype("<f4")
    rows[3] = np.nan
    (tmp_path / "a.bin").write_bytes(rows.tobytes())
    write_labels(tmp_path / "a.label", np.arange(200))
    scan = read_scan(tmp_path / "a.bin", labels=tmp_path / "a.label", drop_invalid=True)
    assert scan.labels is not None
    assert scan.labels.tolist() == [*range(3), *range(4, 200)]


def test_bad_poses(tmp_path: Path) -> None:
    path = tmp_path / "poses.txt"
    good = "1 0 0 0 0 1 0 0 0 0 1 0\n"
    for text, part in (
        ("", "no poses"),
        (good + "1 0 0 0 0 1 0 0 0 0 1\n", "line 2: has 11"),
        (good + "a b c\n", "line 2"),
        (good.replace("1 0 0 0", "nan 0 0 0", 1), "rigid"),
        ("9 9 9 9 9 9 9 9 9 9 9 9\n", "rigid"),
    ):
        path.write_text(text)
        one_line(lambda: read_poses(path), "poses.txt", part)
    path.write_bytes(bytes(range(128, 256)))
    one_line(lambda: read_poses(path), "no text file")
    path.write_text("P0: 1 0 0 0 0 1 0 0 0 0 1 0\n")
    one_line(lambda: read_calib(path), "Tr:")


@pytest.mark.parametrize("suffix", [".ply", ".pcd"])
def test_truncated_anywhere(tmp_path: Path, cloud: np.ndarray, suffix: str) -> None:
    data = write_cloud(tmp_path / f"a{suffix}", cloud).read_bytes()
    path = tmp_path / f"cut{suffix}"
    for end in [0, 1, 3, 20, 60, *range(100, len(data), 211), len(data) - 1]:
        path.write_bytes(data[:end])
        one_line(lambda: read_scan(path), f"cut{suffix}")


@pytest.mark.parametrize(("name", "options"), [
    ("a.ply", {"write_ascii": True}), ("a.pcd", {"write_ascii": True}), ("a.pcd", {"compressed": True}),
])  # fmt: skip
def test_other_encodings_truncated_anywhere(
    tmp_path: Path, cloud: np.ndarray, name: str, options: dict[str, bool]
) -> None:
    """Text and compressed bodies: what is missing is not filled with zeros."""
    open3d = import_open3d("a test")
    made = open3d.geometry.PointCloud(open3d.utility.Vector3dVector(cloud.astype(float)))
    open3d.io.write_point_cloud(str(tmp_path / name), made, **options)
    data = (tmp_path / name).read_bytes()
    path = tmp_path / f"cut-{name}"
    for end in [*range(150, len(data) - 40, 97), len(data) - 40]:
        path.write_bytes(data[:end])
        one_line(lambda: read_scan(path), path.name)


@pytest.mark.parametrize("suffix", [".ply", ".pcd"])
def test_damaged_bytes_raise_nothing_else(tmp_path: Path, cloud: np.ndarray, suffix: str) -> None:
    """Bytes changed at random: the file is read, or refused as data."""
    data = write_cloud(tmp_path / f"a{suffix}", cloud).read_bytes()
    rng = np.random.default_rng(0)
    path = tmp_path / f"b{suffix}"
    messages = []
    for _ in range(150):
        broken = bytearray(data)
        for place in rng.integers(0, 260, 3):
            broken[place] = rng.integers(256)
        path.write_bytes(bytes(broken))
        try:
            read_scan(path)
        except DataError as error:
            messages.append(str(error))
    assert len(messages) > 50
    assert not any("\n" in message for message in messages)


@pytest.mark.parametrize("encoding", ["ascii", "binary_little_endian"])
def test_huge_declared_count(tmp_path: Path, encoding: str) -> None:
    fields = "".join(f"property float {axis}\n" for axis in "xyz")
    path = tmp_path / "huge.ply"
    path.write_text(f"ply\nformat {encoding} 1.0\nelement vertex 4000000000000\n{fields}end_header\n1 2 3\n")
    one_line(lambda: read_scan(path), "4,000,000,000,000", "cut off")
    path.write_text(f"ply\nformat {encoding} 1.0\nelement vertex -5\n{fields}end_header\n1 2 3\n")
    one_line(lambda: read_scan(path), "element vertex -5")
    path.write_text(f"ply\nformat {encoding} 1.0\nelement vertex 0\n{fields}end_header\n")
    one_line(lambda: read_scan(path), "no points")
    path = tmp_path / "huge.pcd"
    head = "VERSION 0.7\nFIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nCOUNT 1 1 1\nWIDTH 9999999999\nHEIGHT 1\n"
    for kind in ("ascii", "binary", "binary_compressed"):
        path.write_text(f"{head}POINTS 9999999999\nDATA {kind}\n1 2 3\n")
        one_line(lambda: read_scan(path), "9,999,999,999")


def test_nan_in_a_cloud(tmp_path: Path, cloud: np.ndarray) -> None:
    path = write_cloud(tmp_path / "a.pcd", cloud)
    data = bytearray(path.read_bytes())
    data[-12:] = np.full(3, np.nan, "<f4").tobytes()
    path.write_bytes(bytes(data))
    one_line(lambda: read_scan(path), "1 of 200", "NaN")
    assert len(read_scan(path, drop_invalid=True)) == 199


def test_garbage_is_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for suffix in (".bin", ".ply", ".pcd"):
        for size in (1, 15, 64, 4096):
            path = tmp_path / f"x{suffix}"
            path.write_bytes(rng.bytes(size))
            one_line(lambda path=path: read_scan(path), str(path))
    one_line(lambda: read_scan(tmp_path / "x.txt"), "unknown format")


def test_writers_leave_nothing_behind(tmp_path: Path, cloud: np.ndarray) -> None:
    with pytest.raises(ValueError, match="NaN"):
        write_cloud(tmp_path / "a.ply", np.full((3, 3), np.nan))
    with pytest.raises(ValueError, match="at least 1"):
        write_cloud(tmp_path / "a.ply", np.zeros((0, 3)))
    with pytest.raises(ValueError, match="colours"):
        write_cloud(tmp_path / "a.bin", cloud, cloud)
    one_line(lambda: write_cloud(tmp_path / "a.xyz", cloud), "unknown format")
    (tmp_path / "kept.txt").write_text("old")
    one_line(lambda: write_cloud(tmp_path / "kept.txt" / "a.ply", cloud), "cannot be written")

    def fail_half_way() -> None:
        with atomic_file(tmp_path / "kept.txt") as file:
            file.write(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert (tmp_path / "kept.txt").read_text() == "old"
    assert os.listdir(tmp_path) == ["kept.txt"]


def test_sequence(tmp_path: Path, cloud: np.ndarray) -> None:
    (tmp_path / "07" / "velodyne").mkdir(parents=True)
    (tmp_path / "07" / "labels").mkdir()
    for index in (2, 3):
        write_cloud(tmp_path / "07" / "velodyne" / f"{index:06d}.bin", cloud + index)
        write_labels(tmp_path / "07" / "labels" / f"{index:06d}.label", np.full(200, 40 + index))
    poses = np.stack([rigid(seed) for seed in range(6)])
    write_poses(tmp_path / "07" / "poses.txt", poses)
    sequence = read_sequence(tmp_path / "07")
    assert isinstance(sequence, ScanSource)
    assert (sequence.name, len(sequence)) == ("07", 2)
    assert sequence.poses is not None
    np.testing.assert_array_equal(sequence.poses, poses[2:4])  # sweeps take the pose of their number
    labels = sequence[1].labels
    assert labels is not None
    assert set(labels.tolist()) == {43}
    assert [scan.name for scan in sequence] == ["000002", "000003"]
    with pytest.raises(IndexError):
        sequence[2]
    write_poses(tmp_path / "07" / "poses.txt", poses[:3])
    one_line(lambda: read_sequence(tmp_path / "07"), "poses.txt", "3 poses")
    (tmp_path / "07" / "labels" / "000003.label").unlink()
    write_poses(tmp_path / "07" / "poses.txt", poses)
    one_line(lambda: read_sequence(tmp_path / "07"), "000003.label", "missing")
    one_line(lambda: read_sequence(tmp_path / "nowhere"), "no folder")
    (tmp_path / "empty").mkdir()
    one_line(lambda: read_sequence(tmp_path / "empty"), "no sweeps")


def test_plain_folder_needs_one_pose_each(tmp_path: Path, cloud: np.ndarray) -> None:
    for name in ("left", "right"):
        write_cloud(tmp_path / f"{name}.bin", cloud)
    assert read_sequence(tmp_path).poses is None
    write_poses(tmp_path / "poses.txt", np.stack([rigid(seed) for seed in range(3)]))
    one_line(lambda: read_sequence(tmp_path), "3 poses", "2 sweeps")


def test_scan_checks() -> None:
    points = np.zeros((3, 3), np.float32)
    with pytest.raises(ValueError, match="labels must be"):
        Scan(points, labels=np.zeros(4, int))
    with pytest.raises(TypeError, match="integers"):
        Scan(points, labels=np.zeros(3))
    with pytest.raises(ValueError, match="NaN"):
        Scan(points * np.nan)
    with pytest.raises(ValueError, match="at least 1"):
        Scan(points[:0])
    with pytest.raises(TypeError, match="floating"):
        Scan(points.astype(int))


_PACKAGES = ("libusb-1.0-0", "libgl1", "libegl1", "libgomp1", "apt-get install")
_WITHOUT_OPEN3D = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "open3d":
            raise ImportError("libusb-1.0.so.0: cannot open shared object file: No such file")
sys.meta_path.insert(0, Refuse())
from pathlib import Path
from stillhouse.core.errors import MissingDependencyError
from stillhouse.lidar.io import read_scan, read_sequence, write_cloud
from stillhouse.lidar.metrics import evaluate_cloud
from stillhouse.lidar.pairs import PairConfig, PairDataset
from stillhouse.lidar.simulate import simulate_sequence
folder = Path(sys.argv[1])
dataset = PairDataset([read_sequence(folder)], PairConfig(points=50, factor=2, max_range=30.0))
pair = dataset[(0, 1)]
assert evaluate_cloud(pair["full"].numpy(), pair["full"].numpy())["chamfer"] == 0.0
path = write_cloud(folder / "out.ply", pair["full"].numpy())
for call in (lambda: read_scan(path), simulate_sequence):
    try:
        call()
    except MissingDependencyError as error:
        print(error)
"""


def test_without_open3d(tmp_path: Path, cloud: np.ndarray) -> None:
    """Sweeps, pairs and metrics work; a cloud file and the simulator say what to install."""
    (tmp_path / "velodyne").mkdir()
    for index in range(2):
        write_cloud(tmp_path / "velodyne" / f"{index:06d}.bin", cloud)
    write_poses(tmp_path / "poses.txt", np.stack([np.eye(4)] * 2))
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_OPEN3D, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert all(word in line for word in (*_PACKAGES, "libusb-1.0.so.0"))


@pytest.mark.parametrize(
    ("failure", "wanted"),
    [
        (OSError("libGL.so.1: cannot open"), (*_PACKAGES, "libGL.so.1")),
        (ModuleNotFoundError("no module", name="open3d"), ("pip install", "open3d")),
        (ModuleNotFoundError("no module", name="addict"), ("pip install addict",)),
    ],
)
def test_what_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, failure: Exception, wanted: tuple[str, ...]
) -> None:
    class Refuse:
        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            if name == "open3d":
                raise failure

    monkeypatch.delitem(sys.modules, "open3d", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Refuse(), *sys.meta_path])
    with pytest.raises(MissingDependencyError) as caught:
        import_open3d("a test")
    assert all(word in str(caught.value) for word in ("a test", *wanted))
    assert "\n" not in str(caught.value)


def test_doctor_names_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    import ctypes
    import ctypes.util

    from stillhouse.core.doctor import as_dict, run_checks
    from stillhouse.lidar.domain import DOMAIN

    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: None)
    monkeypatch.setattr(ctypes, "CDLL", missing)
    answer = as_dict(run_checks(DOMAIN.doctor))
    assert not answer["ok"]
    assert answer["install"] == [
        f"apt-get install {package}" for package in ("libusb-1.0-0", "libgl1", "libegl1")
    ]
    assert any("libgomp1" in check["remedy"] for check in answer["checks"])


@pytest.mark.real_data
def test_semantickitti_sample() -> None:
    folder = os.environ.get("STILLHOUSE_TEST_DATA")
    if not folder:
        pytest.skip("STILLHOUSE_TEST_DATA is not set")
    formats = Path(folder, "lidar", "formats")
    scan = read_scan(formats / "semantickitti_50pts.bin", labels=formats / "semantickitti_50pts.label")
    assert len(scan) == 50
    assert scan.labels is not None
    assert {50, 70, 71, 52, 0} <= set(scan.labels.tolist())
    first = read_sequence(Path(folder, "lidar", "sequences", "00"))[0]
    assert len(first) == 124_668
