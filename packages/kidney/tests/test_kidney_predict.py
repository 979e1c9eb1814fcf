from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch.nn.functional import normalize

from stillhouse.core.artifact import Artifact
from stillhouse.core.errors import ConfigError, DataError
from stillhouse.kidney.data import Collection
from stillhouse.kidney.predict import collect_images, embed, identification_table, identify, thumbnails
from stillhouse.kidney.store import load_student

STONE = r"([A-Z]+-\d+)_s"


def test_every_reference_is_its_own_nearest_neighbour(student_original: Path, image_folder: Path) -> None:
    student = load_student(student_original)
    collection = collect_images([image_folder])
    rows = identify(student, collection, top=2)
    assert len(rows) == len(student.gallery.names)
    for row in rows:
        first, second = row.neighbours
        assert first.name == Path(row.name).stem
        assert first.distance < 1e-4
        assert first.distance <= second.distance
        assert first.view in row.name
        assert sum(row.probabilities.values()) == pytest.approx(1, abs=1e-5)
        assert list(row.probabilities.values()) == sorted(row.probabilities.values(), reverse=True)
        assert row.confidence == row.probabilities[row.nearest_class]
    json.dumps([row.to_dict() for row in rows], allow_nan=False)


def test_answers_follow_from_the_embeddings(student_original: Path, stones: Collection) -> None:
    student = load_student(student_original)
    rows = identify(student, stones)
    embeddings = embed(student.network, stones, size=32).double().numpy()
    labels = np.array([stones.classes.index(item.label) for item in stones.items])
    centres = np.stack([embeddings[labels == c].mean(axis=0) for c in range(3)])
    distances = np.linalg.norm(embeddings[:, None] - centres[None], axis=2)
    assert [row.nearest_class for row in rows] == [stones.classes[c] for c in distances.argmin(axis=1)]
    np.testing.assert_allclose([row.distance for row in rows], distances.min(axis=1), atol=1e-5)
    limit = student.gallery.threshold
    assert limit is not None
    assert [row.label == "unknown" for row in rows] == (distances.min(axis=1) > limit).tolist()


def test_batches_and_mode_do_not_matter(student_original: Path, stones: Collection) -> None:
    student = load_student(student_original)
    student.network.train()
    whole = embed(student.network, stones, size=32, batch_size=64)
    assert student.network.training
    torch.testing.assert_close(embed(student.network, stones, size=32, batch_size=5), whole)


def test_crops_average_to_a_unit_embedding(student_original: Path, stones: Collection) -> None:
    student = load_student(student_original)
    embeddings = embed(student.network, stones, size=32, crops=4)
    assert embeddings.shape == (len(stones), 16)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(len(stones)))
    single = embed(student.network, stones.with_items(stones.items[:1]), size=32, crops=4)
    torch.testing.assert_close(embeddings[:1], single)
    assert not torch.allclose(normalize(embeddings), embed(student.network, stones, size=32))


@pytest.mark.parametrize("how", ["max", "mean", "concat"])
def test_fused_answers_are_one_a_stone(student_original: Path, image_folder: Path, how: str) -> None:
    student = load_student(student_original)
    collection = collect_images([image_folder], stone_pattern=STONE)
    rows = identify(student, collection, fuse=how, top=1)
    assert [row.name for row in rows] == sorted({item.stone for item in collection.items})
    for row in rows:
        assert row.views == ("section", "surface")
        assert row.neighbours[0].name == row.name  # the gallery holds the same stone, fused the same way
        assert row.neighbours[0].distance < 1e-3


def test_fusing_needs_stones_and_known_views(
    student_original: Path, image_folder: Path, tmp_path: Path
) -> None:
    student = load_student(student_original)
    with pytest.raises(ConfigError, match="give --stone-pattern"):
        identify(student, collect_images([image_folder]), fuse="max")
    with pytest.raises(ConfigError, match="choose one of max, mean, concat"):
        identify(student, collect_images([image_folder]), fuse="sum")
    plain = tmp_path / "x-1.png"
    shutil.copy(next(image_folder.rglob("*.png")), plain)
    with pytest.raises(DataError, match="shows the view ''"):
        identify(student, collect_images([plain], stone_pattern=r"x-\d+"), fuse="max")


def test_views_are_read_from_folders_and_names(image_folder: Path, tmp_path: Path) -> None:
    source = next(image_folder.rglob("*.png"))
    (tmp_path / "SEC").mkdir()
    for name in ("SEC/a.png", "stone_surface_1.png", "other.png"):
        shutil.copy(source, tmp_path / name)
    found = collect_images(
        [tmp_path / "SEC" / "a.png", tmp_path / "stone_surface_1.png", tmp_path / "other.png"]
    )
    assert [item.view for item in found.items] == ["section", "surface", ""]


def test_an_image_named_twice_counts_once(image_folder: Path) -> None:
    one = next(image_folder.rglob("*.png"))
    assert len(collect_images([one, one])) == 1
    assert len(collect_images([image_folder, one])) == len(list(image_folder.rglob("*.png")))


def test_missing_empty_and_wrong_sources(tmp_path: Path, image_folder: Path) -> None:
    with pytest.raises(DataError, match="no image is given"):
        collect_images([])
    with pytest.raises(DataError, match=r"nothing\.png"):
        collect_images([tmp_path / "nothing.png"])
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match="holds no images"):
        collect_images([empty])
    with pytest.raises(ConfigError, match="no regular expression"):
        collect_images([image_folder], stone_pattern="(")
    with pytest.raises(DataError, match="finds no id"):
        collect_images([image_folder], stone_pattern="never")


def test_images_of_any_size_are_taken(student_original: Path, tmp_path: Path) -> None:
    student = load_student(student_original)
    for index, shape in enumerate([(8, 200), (33, 31), (256, 256)]):
        pixels = np.random.default_rng(index).integers(0, 256, (*shape, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    rows = identify(student, collect_images([tmp_path]))
    assert len(rows) == 3
    assert all(np.isfinite(row.distance) for row in rows)


def test_a_uniform_image_is_no_nan(student_original: Path, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), (120, 90, 60)).save(tmp_path / "flat.png")
    (row,) = identify(load_student(student_original), collect_images([tmp_path]))
    assert np.isfinite(row.distance)
    assert np.isfinite(row.confidence)


def test_the_table_reads(student_original: Path, stones: Collection) -> None:
    rows = identify(load_student(student_original), stones.with_items(stones.items[:2]), top=1)
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(identification_table(rows))
    text = console.export_text()
    assert stones.items[0].title in text
    assert "nearest references" in text
    console.file.close()


def test_thumbnails(stones: Collection) -> None:
    pictures = thumbnails(stones, side=24)
    assert pictures.shape == (len(stones), 24, 24, 3)
    assert pictures.dtype == torch.uint8


# ---- the artefact


def test_a_student_comes_back_as_it_was(student_original: Path, stones: Collection) -> None:
    first, second = (
        load_student(student_original),
        load_student(student_original.parent),
    )  # the run's folder will do
    torch.testing.assert_close(
        embed(first.network, stones, size=32), embed(second.network, stones, size=32), rtol=0, atol=0
    )
    assert not first.network.training
    assert first.gallery.calibration == second.gallery.calibration


def resave(folder: Path, files: dict[str, bytes], kind: str = "kidney.student") -> Artifact:
    """Save an artefact again with changed files, so that its checksums fit."""
    old = Artifact.load(folder)
    kept = {
        name: old.file(name).read_bytes() for name in ("student.json", "gallery.json", "gallery.safetensors")
    }
    return Artifact.save(
        folder, kind=kind, tensors=old.tensors(), config={}, metrics={}, card="x", files={**kept, **files}
    )


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        b'{"network": {"widht": 8}, "preprocessing": {"crops": 1}}',
        b'{"network": {"width": 4, "dim": 16, "image_size": 32}, "preprocessing": {"crops": 1}}',
        b'{"network": {"width": 8, "dim": 16, "image_size": 32}, "preprocessing": {"crops": 0}}',
        b"\xff\xfe",
    ],
)
def test_settings_that_do_not_fit_are_one_clear_error(student_folder: Path, content: bytes) -> None:
    artifact = resave(student_folder, {"student.json": content})
    with pytest.raises(DataError, match=r"student\.json: does not describe the weights"):
        load_student(artifact)


def test_another_kind_is_refused(student_folder: Path) -> None:
    artifact = resave(student_folder, {}, kind="genomic.student")
    with pytest.raises(DataError, match=r"is a 'genomic\.student' where a 'kidney\.student' is needed"):
        load_student(artifact)


def test_no_artefact_says_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no artefact folder here"):
        load_student(tmp_path / "nothing")
