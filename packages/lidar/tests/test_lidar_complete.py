"""Students as artefacts, and completing with them: round trips, damage, determinism, evaluations."""

from __future__ import annotations

import doctest
import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stillhouse.core.artifact import Artifact
from stillhouse.core.errors import ConfigError, DataError
from stillhouse.lidar import complete, store
from stillhouse.lidar.complete import Completer, find_scans
from stillhouse.lidar.io import Scan
from stillhouse.lidar.networks import NetworkConfig
from stillhouse.lidar.pairs import farthest_points, partial_points
from stillhouse.lidar.process import VPProcess, tile
from stillhouse.lidar.samplers import keep_scene, sample
from stillhouse.lidar.simulate import SimulatedSequence
from stillhouse.lidar.store import (
    KIND,
    SETTINGS,
    CompleterSettings,
    export_completer,
    load_completer,
    save_completer,
)

SMALL = NetworkConfig(channels=(8, 8, 8, 8, 8), voxel=0.5, blocks=1, time_channels=8, point_offsets=True)
PAIRS = {"points": 60, "factor": 4, "max_range": 20.0}
REST: dict[str, Any] = {"config": {}, "metrics": {}, "card": "# nobody"}


@pytest.fixture(scope="module")
def sweep(small_drive: SimulatedSequence) -> Scan:
    return small_drive[0]


def diffusion(**changes: Any) -> Completer:
    torch.manual_seed(0)
    settings = CompleterSettings(**({"pairs": PAIRS, "steps": 2, "network": SMALL} | changes))
    return Completer(settings.build(), settings)


def single(**changes: Any) -> Completer:
    torch.manual_seed(0)
    settings = CompleterSettings(kind="single_pass", pairs=PAIRS, single=SMALL, **changes)
    return Completer(settings.build(), settings)


def test_doctests() -> None:
    for module in (complete, store):
        assert doctest.testmod(module).failed == 0, module.__name__


# ---- the artefact


@pytest.mark.parametrize("refine", [None, SMALL])
@pytest.mark.parametrize("kind", ["diffusion", "single_pass"])
def test_round_trip_completes_alike(
    kind: str, refine: NetworkConfig | None, sweep: Scan, tmp_path: Path
) -> None:
    made = single(refine=refine) if kind == "single_pass" else diffusion(refine=refine)
    saved = save_completer(tmp_path / "run" / "student", made.networks, made.settings, **REST)
    assert saved.kind == KIND
    for source in (tmp_path / "run" / "student", tmp_path / "run", saved):
        read = load_completer(source)
        assert read.settings == made.settings
        assert read.artifact is not None
        assert not any(network.training for network in read.networks.values())
    np.testing.assert_array_equal(read(sweep, seed=3).points, made(sweep, seed=3).points)
    assert read.parameters == made.parameters == sum(t.numel() for t in _weights(read))


def _weights(completer: Completer) -> list[torch.Tensor]:
    return [p for network in completer.networks.values() for p in network.parameters()]


def test_settings_round_trip_from_mappings() -> None:
    given = CompleterSettings(
        pairs=dict(PAIRS), sampler="lidpm", guidance=3.5, network=asdict(SMALL), refine=asdict(SMALL)
    )
    assert given.network == SMALL
    again = CompleterSettings.from_dict(json.loads(json.dumps(given.to_dict())))
    assert again == given
    assert isinstance(again.make_process(), VPProcess)
    assert again.roles == ("noise", "encoder", "refine")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "gan"}, "kind is 'gan'; allowed: 'diffusion', 'single_pass'"),
        ({"kind": "single_pass"}, "single is None"),
        ({"network": None}, "network is None"),
        ({"sampler": "euler"}, "sampler is 'euler'"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": 1000}, "steps is 1000; it must be an integer in 1 … 999"),
        ({"steps": True}, "steps is True"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"process": {"beta_start": 0.1}}, "process has"),
        ({"process": {"beta_start": 0.1, "beta_end": 0.01, "steps": 10}}, "process is"),
    ],
)
def test_settings_refuse(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CompleterSettings(**({"network": SMALL} | changes))


def test_settings_refuse_unknown_fields() -> None:
    with pytest.raises(TypeError, match="PairConfig has no field 'point'"):
        CompleterSettings(network=SMALL, pairs={"point": 3})
    with pytest.raises(TypeError, match="is neither a NetworkConfig nor a mapping"):
        CompleterSettings(network=3)  # type: ignore[arg-type]


def test_networks_must_be_those_of_the_settings(tmp_path: Path) -> None:
    made = diffusion()
    with pytest.raises(ValueError, match=r"networks has \['noise'\]"):
        save_completer(tmp_path / "a", {"noise": made.networks["noise"]}, made.settings, **REST)
    other = replace(made.settings, network=replace(SMALL, voxel=0.25))
    with pytest.raises(ValueError, match=r"networks\['noise'\] was built from other sizes"):
        save_completer(tmp_path / "a", made.networks, other, **REST)
    with pytest.raises(ValueError, match="needed are"):
        Completer({}, made.settings)
    assert not (tmp_path / "a").exists()


def _reseal(folder: Path, name: str) -> None:
    """Make the checksums fit a changed file again, as someone who rewrites a folder would."""
    manifest = json.loads((folder / "artifact.json").read_text())
    manifest["files"][name] = (folder / name).stat().st_size
    (folder / "artifact.json").write_text(json.dumps(manifest))
    sums = {
        line.split("  ")[1]: line.split("  ")[0] for line in (folder / "SHA256SUMS").read_text().splitlines()
    }
    for changed in (name, "artifact.json"):
        sums[changed] = hashlib.sha256((folder / changed).read_bytes()).hexdigest()
    (folder / "SHA256SUMS").write_text("".join(f"{sums[key]}  {key}\n" for key in sorted(sums)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.pop("format"), "it is not the settings of a completer"),
        (lambda table: table.update(schema=7), "it has schema 7 where 1 is known"),
        (lambda table: table.pop("steps"), "missing entry 'steps'"),
        (lambda table: table.update(temperature=1), "unknown entry 'temperature'"),
        (lambda table: table["network"].update(voxel=-1), "voxel is -1"),
        (lambda table: table["network"].update(channels=[8, 8, 16, 8, 8]), "size mismatch|Error"),
        (lambda table: table.update(refine=None), "belongs to none of its networks"),
        (lambda table: table.update(kind="single_pass"), "single is None"),
    ],
)
def test_settings_that_do_not_fit_the_weights(change: Any, message: str, student_folder: Path) -> None:
    path = student_folder / SETTINGS
    table = json.loads(path.read_text())
    change(table)
    path.write_text(json.dumps(table))
    with pytest.raises(DataError, match=f"{SETTINGS}: the content does not match|bytes where"):
        load_completer(student_folder)
    _reseal(student_folder, SETTINGS)
    with pytest.raises(DataError, match=message) as raised:
        load_completer(student_folder)
    assert "\n" not in str(raised.value)
    assert "train again" in str(raised.value)


def test_damage_is_named(student_folder: Path, tmp_path: Path) -> None:
    weights = student_folder / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(bytes(raw))
    with pytest.raises(DataError, match=r"model\.safetensors: the content does not match its checksum"):
        load_completer(student_folder)
    weights.unlink()
    with pytest.raises(DataError, match=r"model\.safetensors: missing"):
        load_completer(student_folder)
    with pytest.raises(DataError, match="there is no artefact folder here"):
        load_completer(tmp_path / "nothing")
    Artifact.save(tmp_path / "other", kind="kidney.student", tensors={}, **REST)
    with pytest.raises(DataError, match=r"is a 'kidney.student' where a 'lidar.completer' is needed"):
        load_completer(tmp_path / "other")


def test_export_is_a_verified_copy(student_original: Path, tmp_path: Path) -> None:
    completer = load_completer(student_original)
    found = export_completer(completer, "artifact", tmp_path / "copy")
    assert completer.artifact is not None
    assert found["digest"] == completer.artifact.digest == load_completer(tmp_path / "copy").artifact.digest  # type: ignore[union-attr]
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]
    with pytest.raises(DataError, match="is not empty"):
        export_completer(completer, "artifact", tmp_path / "copy")
    with pytest.raises(DataError, match="lies inside the artefact"):
        export_completer(completer, "artifact", student_original / "copy")
    with pytest.raises(ConfigError, match="--format onnx: allowed are artifact"):
        export_completer(completer, "onnx", tmp_path / "onnx")
    with pytest.raises(ValueError, match="not loaded from an artefact"):
        export_completer(diffusion(), "artifact", tmp_path / "b")


# ---- completing


def test_is_what_an_evaluation_does(sweep: Scan) -> None:
    """The same as its parts put together by hand."""
    completer = diffusion(steps=3, guidance=2.0)
    points = partial_points(sweep, completer.pairs)
    partial = torch.from_numpy(points[farthest_points(points, 60)].astype(np.float32))
    with torch.no_grad():
        condition = completer.networks["encoder"](partial[None])
        result = sample(
            completer.networks["noise"],
            condition,
            tile(partial[None], 240),
            steps=3,
            guidance=2.0,
            null=condition.null(),
            generator=torch.Generator().manual_seed(5),
        )
    cloud = result.points[0]
    wanted = cloud[keep_scene(cloud, partial, max_range=20.0)].numpy()
    done = completer(sweep, seed=5)
    np.testing.assert_array_equal(done.points, wanted)
    assert done.points.dtype == np.float32
    assert done.seconds > 0
    assert np.linalg.norm(done.points, axis=1).max() < completer.max_range == 20.0
    assert done.points[:, 2].max() < partial[:, 2].max()


@pytest.mark.parametrize("make", [diffusion, single])
def test_the_seed_decides(make: Any, sweep: Scan) -> None:
    completer = make()
    first = completer(sweep, seed=1).points
    torch.manual_seed(99)  # the global state has no say
    np.testing.assert_array_equal(completer(sweep, seed=1).points, first)
    other = completer(sweep, seed=2).points
    assert other.shape != first.shape or not np.array_equal(other, first)


@pytest.mark.parametrize(
    ("settings", "options", "evaluations"),
    [
        ({}, {}, 2),
        ({}, {"steps": 5}, 5),
        ({}, {"steps": 5, "guidance": 2.0}, 10),
        ({"guidance": 2.0}, {"guidance": 1.0, "steps": 1}, 1),
        ({"refine": SMALL}, {"steps": 4}, 5),
        ({"sampler": "vp_reference"}, {"steps": 3}, 3),
        ({"sampler": "lidpm"}, {"steps": 3}, 3),
    ],
)
def test_evaluations_are_counted(
    settings: dict[str, Any], options: dict[str, Any], evaluations: int, sweep: Scan
) -> None:
    completer = diffusion(**settings)
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    for role in {"noise", "refine"} & set(completer.networks):
        completer.networks[role].register_forward_hook(count)
    assert completer(sweep, **options).evaluations == evaluations == calls


def test_a_single_pass_is_one_evaluation_and_has_no_steps(sweep: Scan) -> None:
    completer = single()
    assert completer(sweep).evaluations == 1
    assert completer(sweep, steps=1, guidance=1.0).evaluations == 1
    assert single(refine=SMALL)(sweep).evaluations == 2
    for wrong in ({"steps": 2}, {"guidance": 2.0}):
        with pytest.raises(ConfigError, match="single pass"):
            completer(sweep, **wrong)


def test_refinement_makes_six_of_one() -> None:
    partial = torch.randn(1, 60, 3, generator=torch.Generator().manual_seed(0)) * 5
    for make, count in ((diffusion, 240), (single, 240)):
        assert make().complete(partial)[0].shape == (1, count, 3)
        assert make(refine=SMALL).complete(partial)[0].shape == (1, 6 * count, 3)


def test_options_that_the_schedule_does_not_have(sweep: Scan) -> None:
    completer = diffusion()
    for steps in (0, 1000):
        with pytest.raises(
            ConfigError, match=f"steps is {steps}; the student's noise schedule allows 1 to 999"
        ):
            completer(sweep, steps=steps)
    with pytest.raises(ConfigError, match="guidance is inf"):
        completer(sweep, guidance=float("inf"))


def test_what_cannot_be_completed(sweep: Scan) -> None:
    far = Scan(sweep.points + np.array([500.0, 0, 0], np.float32), name="far away")
    with pytest.raises(DataError, match="far away: no point is left"):
        diffusion()(far)
    completer = diffusion(steps=1)
    with torch.no_grad():
        for parameter in completer.networks["noise"].parameters():
            parameter.mul_(1e18)
    with pytest.raises(DataError, match=r"the student diverged|nothing is left"):
        completer(sweep)


def test_a_sweep_with_fewer_points_than_the_student_wants() -> None:
    few = Scan(np.array([[5.0, 0, -1], [6, 2, 0], [7, -3, 1]], np.float32))
    prepared = diffusion().prepare(few)
    assert prepared.shape == (60, 3)
    assert len(np.unique(prepared, axis=0)) == 3


# ---- finding sweeps


def test_find_scans(drive_folder: Path, tmp_path: Path) -> None:
    names = ["000000.bin", "000001.bin", "000002.bin"]
    assert [path.name for path in find_scans([drive_folder])] == names
    assert [path.name for path in find_scans([str(drive_folder / "velodyne")])] == names
    second = drive_folder / "velodyne" / "000001.bin"
    assert find_scans([second, drive_folder])[0] == second
    assert len(find_scans([second, drive_folder])) == 3  # each once
    (drive_folder / "velodyne" / ".hidden.bin").write_bytes(b"")
    (drive_folder / "velodyne" / "notes.txt").write_text("")
    assert [path.name for path in find_scans([drive_folder])] == names
    with pytest.raises(DataError, match="does not exist"):
        find_scans([tmp_path / "none.bin"])
    with pytest.raises(DataError, match=r"notes\.txt: has an unknown format"):
        find_scans([drive_folder / "velodyne" / "notes.txt"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no sweeps"):
        find_scans([tmp_path / "empty"])
    with pytest.raises(DataError, match="no sweep is named"):
        find_scans([])
