from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stillhouse.core.artifact import Artifact
from stillhouse.kidney.cli import main
from stillhouse.kidney.data import read_collection
from stillhouse.kidney.domain import DOMAIN
from stillhouse.kidney.gallery import load_gallery

STONE = r"([A-Z]+-\d+)_s"


def call(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def fails(capsys: pytest.CaptureFixture[str], code: int, *arguments: object) -> str:
    """Run, check the code, and return the one line on the standard error."""
    assert call(*arguments) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    if code == 1:
        assert captured.err.count("\n") == 1, captured.err
        assert captured.err.startswith("error: ")
    assert "Traceback" not in captured.err
    return " ".join(captured.err.split())


# ---- help


def test_help_loads_no_torch() -> None:
    code = (
        "import sys\nfrom stillhouse.kidney.cli import main\ncode = main(['--help'])\n"
        "heavy = {'torch', 'monai', 'sklearn', 'matplotlib', 'numpy', 'PIL', 'pytorch_metric_learning'} & "
        "set(sys.modules)\n"
        "assert not heavy, heavy\nsys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for verb in (
        "identify",
        "gallery",
        "patches",
        "leakage",
        "simulate",
        "demo",
        "train",
        "export",
        "doctor",
    ):
        assert verb in done.stdout


def test_module_and_domain_agree() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "stillhouse.kidney", "identify", "--help"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "--stone-pattern" in done.stdout
    assert DOMAIN.formats == ("torch", "onnx", "monai")


@pytest.mark.parametrize(
    "arguments",
    [
        ("identify",),
        ("identify", "x.png"),
        ("identify", "x.png", "--model", "m", "--top", "0"),
        ("gallery", "add", "STR"),
        ("leakage", "one"),
        ("patches", "extract", "a", "b"),
        ("patches", "extract", "a", "b", "--out", "c", "--size", "20"),
        ("nonsense",),
    ],
)
def test_wrong_usage_is_two(
    arguments: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    fails(capsys, 2, *arguments)
    assert list(tmp_path.iterdir()) == []


# ---- identify


def test_identify_as_json(
    student_original: Path, image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("identify", image_folder, "--model", student_original, "--json", "--top", 2) == 0
    result = json.loads(capsys.readouterr().out)
    assert len(result["results"]) == len(list(image_folder.rglob("*.png")))
    row = result["results"][0]
    assert len(row["neighbours"]) == 2
    assert Path(row["name"]).stem == row["neighbours"][0]["name"]
    assert result["digest"] == Artifact.load(student_original).digest


def test_identify_for_people_and_fused(
    student_original: Path, image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = next(image_folder.rglob("*.png"))
    assert call("identify", picture, "--model", student_original.parent) == 0
    assert "nearest references" in capsys.readouterr().out
    assert (
        call(
            "identify",
            image_folder,
            "-m",
            student_original,
            "--fuse",
            "max",
            "--stone-pattern",
            STONE,
            "--json",
        )
        == 0
    )
    rows = json.loads(capsys.readouterr().out)["results"]
    assert len(rows) == 9
    assert rows[0]["views"] == ["section", "surface"]


def png16(path: Path) -> None:
    """A 16-bit RGB PNG, which Pillow cannot write."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = b"".join(b"\0" + bytes(16 * 6) for _ in range(16))
    head = struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def bad_image(kind: str, path: Path, good: Path) -> Path:
    """Write one of the files that no verb may take."""
    if kind == "truncated":
        path.write_bytes(good.read_bytes()[:-200])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "16-bit":
        png16(path)
    elif kind == "16-bit grey":
        Image.fromarray(np.zeros((32, 32), dtype=np.uint16)).save(path)
    elif kind == "cmyk":
        path = path.with_suffix(".jpg")
        Image.new("CMYK", (32, 32)).save(path)
    elif kind == "text":
        path.write_text("not a picture")
    elif kind == "bomb":
        path.write_bytes(
            good.read_bytes()[:16] + struct.pack(">II", 100_000, 100_000) + good.read_bytes()[24:]
        )
    return path


BAD = ("truncated", "empty", "16-bit", "16-bit grey", "cmyk", "text", "bomb", "missing")


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("verb", ["identify", "add"])
def test_a_bad_image_is_one_line_and_changes_nothing(
    kind: str,
    verb: str,
    student_folder: Path,
    image_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    good = next(image_folder.rglob("*.png"))
    bad = bad_image(kind, tmp_path / "bad.png", good)
    before = Artifact.load(student_folder).digest
    head = ("identify",) if verb == "identify" else ("gallery", "add", "STR")
    line = fails(capsys, 1, *head, good, bad, "--model", student_folder)
    assert bad.name in line
    assert Artifact.load(student_folder).digest == before


def test_identify_names_what_is_wrong_with_the_model(
    image_folder: Path, student_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "there is no artefact folder here" in fails(
        capsys, 1, "identify", image_folder, "--model", tmp_path / "no"
    )
    path = student_folder / "gallery.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(bytes(raw))
    line = fails(capsys, 1, "identify", image_folder, "--model", student_folder)
    assert "gallery.safetensors" in line
    assert "checksum" in line


def test_fusing_without_a_pattern_is_a_usage_error(
    student_original: Path, image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "give --stone-pattern" in fails(
        capsys, 2, "identify", image_folder, "--model", student_original, "--fuse", "max"
    )
    assert "choose one of" in fails(
        capsys, 2, "identify", image_folder, "-m", student_original, "--fuse", "sum", "--stone-pattern", STONE
    )


# ---- gallery


def test_add_a_class_then_recognise_it(
    student_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = tmp_path / "new"
    new.mkdir()
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::8] = 255
    for index in range(3):
        Image.fromarray(np.roll(stripes, index, axis=1)).save(new / f"s{index}.png")
    assert call("gallery", "add", "STR", new, "--model", student_folder, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["classes"] == 4
    assert any("rests on 3 images" in note for note in result["notes"])
    assert load_gallery(student_folder).added == ("STR",)
    assert Artifact.load(student_folder).provenance["gallery_changes"] == [
        "added the class STR with 3 images"
    ]
    assert call("identify", new / "s1.png", "--model", student_folder, "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)["results"]
    assert row["nearest_class"] == "STR"
    assert call("gallery", "list", "--model", student_folder) == 0
    assert "added after training" in capsys.readouterr().out


def test_class_names_have_rules(
    student_folder: Path, image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = Artifact.load(student_folder).digest
    other = image_folder / "surface" / "WW"
    assert "is in the gallery already" in fails(
        capsys, 2, "gallery", "add", "WW", other, "--model", student_folder
    )
    assert "by case alone" in fails(capsys, 2, "gallery", "add", "ww", other, "--model", student_folder)
    assert "no class" in fails(capsys, 2, "gallery", "add", "unknown", other, "--model", student_folder)
    assert Artifact.load(student_folder).digest == before


def test_the_same_image_is_not_added_twice(
    student_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = tmp_path / "one.png"
    Image.new("RGB", (32, 32), (10, 200, 30)).save(one)
    assert call("gallery", "add", "STR", one, "--model", student_folder) == 0
    capsys.readouterr()
    line = fails(capsys, 1, "gallery", "add", "STR", one, "--extend", "--model", student_folder)
    assert "is in the gallery already" in line


# ---- data


def test_simulate_writes_a_collection_that_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "stones"
    assert call("simulate", "--out", out, "--stones", 1, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    found = read_collection(out)
    assert len(found) == result["images"]
    assert found.stone_known
    assert "nothing about patients" in " ".join((out / "README.txt").read_text().split())
    line = fails(capsys, 1, "simulate", "--out", out)
    assert "exists and is not empty" in line


def test_fragments_are_cut_to_patches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert call("simulate", "--fragments", "--out", whole, "--stones", 1) == 0
    options = ("--out", cut, "--size", 48, "--max-overlap", 8, "--json")
    capsys.readouterr()
    assert call("patches", "extract", whole / "images", whole / "masks", *options) == 0
    result = json.loads(capsys.readouterr().out)
    found = read_collection(cut)
    assert len(found) == result["patches"] > 12
    assert {item.load().shape for item in found.items} == {(48, 48, 3)}
    assert found.stone_known


@pytest.fixture
def fragment(tmp_path: Path) -> tuple[Path, Path]:
    """One fragment of class WW and its mask."""
    images, masks = tmp_path / "f" / "images", tmp_path / "f" / "masks"
    for root, colour in ((images, (90, 60, 30)), (masks, (255, 255, 255))):
        (root / "WW").mkdir(parents=True)
        picture = (
            np.random.default_rng(0).integers(0, 60, (80, 80, 3), dtype=np.uint8) if root is images else None
        )
        Image.fromarray(picture if picture is not None else np.full((80, 80, 3), colour, np.uint8)).save(
            root / "WW" / "a.png"
        )
    return images, masks


@pytest.mark.parametrize(
    "case", ["mask of another size", "mask is missing", "mask is black", "image is broken"]
)
def test_bad_fragments_leave_nothing(
    case: str, fragment: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, masks = fragment
    mask = masks / "WW" / "a.png"
    if case == "mask of another size":
        Image.new("L", (40, 40), 255).save(mask)
    elif case == "mask is missing":
        mask.unlink()
    elif case == "mask is black":
        Image.new("L", (80, 80), 0).save(mask)
    else:
        (images / "WW" / "a.png").write_bytes(b"")
    out = tmp_path / "out"
    line = fails(capsys, 1, "patches", "extract", images, masks, "--out", out, "--size", 32)
    assert "a.png" in line
    assert not out.exists()


def test_leakage_is_exit_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    assert call("simulate", "--out", first, "--stones", 1, "--seed", 1) == 0
    assert call("simulate", "--out", second, "--stones", 1, "--seed", 1) == 0
    capsys.readouterr()
    assert call("leakage", first, second, "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is False
    assert len(found["shared_stones"]) == 6
    assert len(found["duplicate_images"]) >= len(read_collection(first))


@pytest.mark.parametrize("row", ["../outside.png,WW", "/etc/hostname,WW", "missing.png,WW"])
def test_a_table_that_leads_outside_is_refused(
    row: str, tmp_path: Path, image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "table"
    root.mkdir()
    good = next(image_folder.rglob("*.png"))
    for name in ("good.png", "../outside.png"):
        (root / name).write_bytes(good.read_bytes())
    (root / "manifest.csv").write_text(f"path,class\ngood.png,WW\n{row}\n")
    line = fails(capsys, 1, "leakage", root, image_folder)
    assert row.split(",")[0] in line


def test_a_folder_without_classes_is_refused(
    tmp_path: Path, image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "none").mkdir()
    assert "holds no images" in fails(capsys, 1, "leakage", tmp_path / "none", image_folder)
    assert "nowhere" in fails(capsys, 1, "leakage", tmp_path / "nowhere", image_folder)


# ---- the common verbs


def test_an_unknown_configuration_key_is_two_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.json").write_text('{"trian": {"steps": 1}}')
    line = fails(capsys, 2, "train", "--config", "mine.json")
    assert "trian" in line
    assert [path.name for path in tmp_path.iterdir()] == ["mine.json"]


SMALL = (
    "data.image_size=32",
    "data.new_classes=[]",
    "model.width=4",
    "model.teacher_width=4",
    "teacher.steps=2",
    "train.steps=2",
    "evaluate.resamples=100",
)


def cannot_train(
    capsys: pytest.CaptureFixture[str], code: int, out: Path, *settings: str, config: str = "demo"
) -> str:
    """Train, and see that it fails with one line and makes no folder."""
    chosen = [word for setting in (*SMALL, *settings) for word in ("--set", setting)]
    line = fails(capsys, code, "train", "--config", config, *chosen, "--out", out)
    assert not out.exists()
    assert list(out.parent.glob(".*")) == []
    return line


@pytest.mark.parametrize("kind", sorted(set(BAD) - {"missing", "bomb", "text", "16-bit grey"}))
def test_a_bad_image_stops_a_training_before_it_writes(
    kind: str, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = next(image_folder.rglob("*.png"))
    bad = bad_image(kind, good.with_name("WW-9_s_bad.png"), good)
    line = cannot_train(capsys, 1, tmp_path / "out", f"data.path={image_folder}")
    assert bad.name in line


@pytest.mark.parametrize("kind", ["empty", "missing", "one class", "one image", "no image"])
def test_a_folder_that_cannot_be_cut_stops_a_training(
    kind: str, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, said = image_folder / "surface", "UA"
    if kind == "empty":
        root, said = tmp_path / "empty", "holds no images"
        root.mkdir()
    elif kind == "missing":
        root, said = tmp_path / "nowhere", "does not exist"
    elif kind == "one class":
        for name in ("UA", "CYS"):
            shutil.rmtree(root / name)
        said = "it takes 2 classes; add images of another"
    else:
        for path in list((root / "UA").iterdir())[1 if kind == "one image" else 0 :]:
            path.unlink()
        said = "class 'UA' has one image" if kind == "one image" else "fill the folder or remove it"
    line = cannot_train(capsys, 1, tmp_path / "out", f"data.path={root}", f"data.stone_pattern={STONE}")
    assert said in line


def test_a_folder_that_may_not_be_read_is_named(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A class behind a closed folder must not be missing without a word."""
    real, closed = os.scandir, str(image_folder / "surface" / "UA")

    def scandir(path: str) -> object:
        if str(path) == closed:
            raise PermissionError(13, "Permission denied", closed)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    line = cannot_train(capsys, 1, tmp_path / "out", f"data.path={image_folder}")
    assert closed in line
    assert "Permission denied" in line


@pytest.mark.parametrize(
    ("code", "setting", "said"),
    [
        (1, 'data.new_classes=["UA", "CYS"]', "it takes 2 classes; hold out fewer in data.new_classes"),
        (1, 'data.new_classes=["STR"]', "has no class 'STR'"),
        (1, 'data.views=["top"]', "has no view 'top'"),
        (1, "data.split=given", "have no split"),
        (1, "data.layout=kth_tips", "im_I_grey.png"),
        (1, "model.weights=nowhere.safetensors", "nowhere.safetensors: no such file"),
        (2, "data.stone_pattern=(", "is no regular expression"),
        (2, "trian.steps=3", "did you mean 'train'"),
        (2, "teacher.tau=nan", "teacher.tau is nan"),
        (2, "teacher.smoothing=1", "teacher.smoothing is 1"),
        (2, "data.zoom=inf", "data.zoom is inf"),
        (2, "data.window=[nan, 1]", "data.window"),
        (2, "distill.weight=nan", "distill.weight is nan"),
        (2, "optim.lr=nan", "optim.lr is nan"),
        (2, "evaluate.false_unknown=nan", "evaluate.false_unknown is nan"),
        (2, "data.test=0", "data.test is 0"),
        (2, "data.test=0.9", "below 1"),
        (2, "data.shots=0", "data.shots is 0"),
    ],
)
def test_a_setting_that_cannot_be_stops_a_training(
    code: int,
    setting: str,
    said: str,
    image_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = cannot_train(
        capsys,
        code,
        tmp_path / "out",
        f"data.path={image_folder}",
        f"data.stone_pattern={STONE}",
        setting,
    )
    assert said in line


@pytest.mark.parametrize(
    ("name", "text"), [("mine.py", "data = dict(\n"), ("mine.json", "{"), ("mine.yaml", "a: [")]
)
def test_a_file_that_is_no_configuration_is_named(
    name: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text(text)
    assert name in cannot_train(capsys, 2, tmp_path / "out", config=str(tmp_path / name))


def test_cuda_without_a_gpu_is_a_usage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "out"
    assert "no CUDA device" in fails(capsys, 2, "train", "--config", "demo", "--out", out, "--device", "cuda")
    assert not out.exists()


@pytest.mark.parametrize("format", ["torch", "nonsense"])
def test_export_of_nothing_writes_nothing(
    format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code = 2 if format == "nonsense" else 1
    fails(capsys, code, "export", tmp_path / "no-model", "--format", format, "--out", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
