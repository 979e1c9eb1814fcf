from __future__ import annotations

import builtins
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from stillhouse.core.errors import ConfigError, DataError, MissingDependencyError
from stillhouse.kidney.data import Collection, PatchDataset
from stillhouse.kidney.export import ExportedStudent, ParityError, export_student
from stillhouse.kidney.export import _export as module_under_test
from stillhouse.kidney.predict import collect_images, identify
from stillhouse.kidney.store import FinishedStudent, load_student


@pytest.fixture
def student(student_original: Path) -> FinishedStudent:
    return load_student(student_original)


def images_of(stones: Collection, count: int = 4) -> torch.Tensor:
    """Images in [0, 1] as the export takes them [count, 3, 32, 32]."""
    from stillhouse.kidney.data import resize_square

    pixels = [torch.from_numpy(resize_square(item.load(), 32).copy()) for item in stones.items[:count]]
    return torch.stack(pixels).permute(0, 3, 1, 2).float() / 255


def check_against_identify(student: FinishedStudent, stones: Collection, outputs: Any) -> None:
    rows = identify(student, stones.with_items(stones.items[:4]))
    probabilities, distance, embedding = (torch.as_tensor(value) for value in outputs)
    for at, row in enumerate(rows):
        assert distance[at].item() == pytest.approx(row.distance, abs=1e-4)
        for name, p in zip(student.gallery.classes, probabilities[at].tolist(), strict=True):
            assert p == pytest.approx(row.probabilities[name], abs=1e-4)
    torch.testing.assert_close(embedding.norm(dim=1), torch.ones(4))


def test_the_module_takes_plain_images_and_standardises_them(
    student: FinishedStudent, stones: Collection
) -> None:
    module = ExportedStudent(student).eval()
    with torch.inference_mode():
        check_against_identify(student, stones, module(images_of(stones)))
        dataset = PatchDataset(stones, stones.classes, size=32)
        direct = student.network(torch.stack([dataset[i]["image"] for i in range(4)]))
        torch.testing.assert_close(module(images_of(stones))[2], direct)
        brighter = module(images_of(stones) * 0.5 + 0.25)[2]
    torch.testing.assert_close(
        brighter, direct, rtol=1e-3, atol=1e-4
    )  # standardisation takes scale and shift away


def test_torch_export_runs_without_this_package(
    student: FinishedStudent, stones: Collection, tmp_path: Path
) -> None:
    result = export_student(student, "torch", tmp_path / "out")
    assert set(result["files"]) == {"student.pt2", "export.json"}
    assert [row["batch"] for row in result["parity"]] == [1, 2, 5]
    assert all(
        row[name] <= 1e-4 for row in result["parity"] for name in ("probabilities", "distance", "embedding")
    )
    program = torch.export.load(tmp_path / "out" / "student.pt2").module()
    with torch.inference_mode():
        check_against_identify(student, stones, program(images_of(stones)))
    table = json.loads((tmp_path / "out" / "export.json").read_text())
    assert table["classes"] == list(student.gallery.classes)
    assert table["unknown_threshold"] == student.gallery.threshold
    assert table["student"]["digest"] == student.artifact.digest
    assert table["parity"] == result["parity"]


def test_crops_are_inside(student: FinishedStudent, stones: Collection) -> None:
    """A student that averages crops of a zoomed image exports to one that does so by itself."""
    from stillhouse.kidney.data import resize_square

    several = dataclasses.replace(student, crops=4, zoom=1.5)
    module = ExportedStudent(several).eval()
    assert module.side == 48
    pixels = torch.stack([torch.from_numpy(resize_square(i.load(), 48).copy()) for i in stones.items[:4]])
    with torch.inference_mode():
        check_against_identify(several, stones, module(pixels.permute(0, 3, 1, 2).float() / 255))
    one = dataclasses.replace(student, crops=1, zoom=1.5)
    with torch.inference_mode():
        check_against_identify(
            one, stones, ExportedStudent(one).eval()(pixels.permute(0, 3, 1, 2).float() / 255)
        )
    with pytest.raises(ConfigError, match=r"train with data\.zoom"):
        ExportedStudent(dataclasses.replace(student, crops=4))


@pytest.mark.oracle
def test_onnx_runs_in_onnxruntime(student: FinishedStudent, stones: Collection, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    result = export_student(student, "onnx", tmp_path / "out")
    assert set(result["files"]) == {"student.onnx", "export.json"}
    session = runtime.InferenceSession(tmp_path / "out" / "student.onnx", providers=["CPUExecutionProvider"])
    outputs = session.run(["probabilities", "distance", "embedding"], {"images": images_of(stones).numpy()})
    check_against_identify(student, stones, outputs)


def test_monai_bundle_runs_on_files(student: FinishedStudent, image_folder: Path, tmp_path: Path) -> None:
    """The bundle, run as MONAI runs it, answers as `identify` does on the same files."""
    from monai.bundle import ConfigWorkflow

    bundle = tmp_path / "bundle"
    result = export_student(student, "monai", bundle)
    for name in (
        "configs/metadata.json",
        "configs/inference.json",
        "models/model.pt2",
        "models/model.pt",
        "LICENSE",
    ):
        assert name in result["files"]
    folder = image_folder / "surface" / "WW"
    (folder / "wide.png").write_bytes(_picture((40, 90)))
    workflow = ConfigWorkflow(
        config_file=str(bundle / "configs" / "inference.json"),
        meta_file=str(bundle / "configs" / "metadata.json"),
        logging_file=False,
        workflow_type="infer",
        bundle_root=str(bundle),
        dataset_dir=str(folder),
        output_dir=str(tmp_path / "predictions"),
    )
    workflow.initialize()
    assert workflow.check_properties() == []
    workflow.run()
    workflow.finalize()
    rows = json.loads((tmp_path / "predictions" / "predictions.json").read_text())
    wanted = identify(student, collect_images([folder]))
    assert [row["image"] for row in rows] == [row.name for row in wanted]
    for got, ours in zip(rows, wanted, strict=True):
        assert got["class"] == ours.label
        assert got["nearest_class"] == ours.nearest_class
        assert got["distance"] == pytest.approx(ours.distance, abs=1e-4)
        assert got["probabilities"] == pytest.approx(ours.probabilities, abs=1e-4)


def test_monai_bundle_with_crops(student: FinishedStudent, image_folder: Path, tmp_path: Path) -> None:
    result = export_student(dataclasses.replace(student, crops=2, zoom=2.0), "monai", tmp_path / "bundle")
    meta = json.loads((tmp_path / "bundle" / "configs" / "metadata.json").read_text())
    assert meta["network_data_format"]["inputs"]["image"]["spatial_shape"] == [64, 64]
    assert all(row["embedding"] <= 1e-4 for row in result["parity"])


def test_monai_bundle_keeps_its_convention(student: FinishedStudent, tmp_path: Path) -> None:
    export_student(student, "monai", tmp_path / "bundle")
    meta = json.loads((tmp_path / "bundle" / "configs" / "metadata.json").read_text())
    for key in (
        "version",
        "monai_version",
        "pytorch_version",
        "numpy_version",
        "task",
        "description",
        "authors",
    ):
        assert meta[key], key
    outputs = meta["network_data_format"]["outputs"]["pred"]
    assert list(outputs["channel_def"].values()) == list(student.gallery.classes)
    weights = torch.load(tmp_path / "bundle" / "models" / "model.pt", weights_only=True)
    for name, value in student.network.state_dict().items():
        assert torch.equal(weights[name], value)
    assert "Apache-2.0" in (tmp_path / "bundle" / "LICENSE").read_text()
    assert "not a medical device" in (tmp_path / "bundle" / "docs" / "README.md").read_text()


def _picture(shape: tuple[int, int]) -> bytes:
    import io

    import numpy as np
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)).save(
        buffer, "PNG"
    )
    return buffer.getvalue()


# ---- what must not be kept


def test_an_export_that_computes_something_else_is_not_kept(
    student: FinishedStudent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = module_under_test._write_torch

    def off(module: ExportedStudent, student: FinishedStudent, work: Path) -> Any:
        run = honest(module, student, work)
        return lambda images: (run(images)[0], run(images)[1] + 1e-3, run(images)[2])

    monkeypatch.setitem(module_under_test._WRITERS, "torch", off)
    with pytest.raises(
        ParityError, match=r"distance: the export differs from the student by 0\.001 at batch size 1"
    ):
        export_student(student, "torch", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("broken", ["nan", "shape"])
def test_nan_and_wrong_shapes_fail_the_check(
    student: FinishedStudent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def write(module: ExportedStudent, student: FinishedStudent, work: Path) -> Any:
        def run(images: torch.Tensor) -> Any:
            with torch.inference_mode():
                p, d, e = module(images)
            return (p, d * float("nan"), e) if broken == "nan" else (p[:, :1], d, e)

        return run

    monkeypatch.setitem(module_under_test._WRITERS, "torch", write)
    with pytest.raises(ParityError):
        export_student(student, "torch", tmp_path / "out")


def test_missing_onnx_names_the_pip_line(
    student: FinishedStudent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **options: Any) -> Any:
        if name == "onnx":
            raise ImportError("No module named 'onnx'", name="onnx")
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingDependencyError, match=r"pip install 'stillhouse-kidney\[onnx\]'"):
        export_student(student, "onnx", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_unknown_formats_and_files_in_the_way(student: FinishedStudent, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="allowed are torch, onnx, monai"):
        export_student(student, "tflite", tmp_path / "out")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DataError, match="is a file"):
        export_student(student, "torch", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_second_export_replaces_the_first_and_leaves_the_rest(
    student: FinishedStudent, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    for _ in range(2):
        export_student(student, "torch", out)
    assert {path.name for path in out.iterdir()} == {"notes.txt", "student.pt2", "export.json"}
    assert (out / "notes.txt").read_text() == "mine"
