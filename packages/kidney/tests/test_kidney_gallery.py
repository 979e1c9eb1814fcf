from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from stillhouse.core.artifact import Artifact
from stillhouse.core.errors import DataError
from stillhouse.kidney.gallery import (
    Gallery,
    HeldOut,
    class_name,
    gallery_files,
    hierarchical_quantile,
    load_gallery,
    replace_gallery,
    save_gallery,
)

CLASSES = ("WW", "UA", "CYS")


def make(stones: int = 6, images: int = 4, noise: float = 0.2, seed: int = 0, **options: object) -> Gallery:
    embeddings, labels, names = sample(stones, images, noise, seed)
    views = ["surface", "section"] * (len(labels) // 2)
    return Gallery.build(embeddings, labels, classes=CLASSES, stones=names, views=views, **options)  # type: ignore[arg-type]


def sample(stones: int, images: int, noise: float, seed: int) -> tuple[torch.Tensor, list[int], list[str]]:
    generator = torch.Generator().manual_seed(seed)
    labels = [c for c in range(3) for _ in range(stones * images)]
    names = [f"{seed}-{c}-{s}" for c in range(3) for s in range(stones) for _ in range(images)]
    offsets = torch.randn(3 * stones, 16, generator=generator).repeat_interleave(images, 0)
    spread = torch.randn(len(labels), 16, generator=generator)
    return normalize(torch.eye(3, 16)[labels] + noise * (offsets + 0.5 * spread), dim=1), labels, names


# ---- calibration


@pytest.mark.parametrize("rate", [0.05, 0.2, 0.5])
def test_hierarchical_quantile_is_the_conformal_order_statistic_for_one_image_a_stone(rate: float) -> None:
    values = np.random.default_rng(0).random(99)
    index = math.ceil((1 - rate) * 100)
    assert hierarchical_quantile(values, np.arange(99), rate) == np.sort(values)[index - 1]


def test_hierarchical_quantile_weighs_stones_alike() -> None:
    # one stone of 1000 images and nine of one, 1/11 of the weight each: the sixth stone passes one half
    values = np.concatenate([np.full(1000, 1.0), np.arange(2.0, 11.0)])
    groups = np.concatenate([np.zeros(1000), np.arange(1, 10)])
    assert hierarchical_quantile(values, groups, 0.5) == 6.0
    assert hierarchical_quantile(values, groups, 0.05) == math.inf


def test_false_unknown_rate_holds_on_new_stones() -> None:
    """Over draws of the gallery, new stones of known classes are called unknown at about the asked rate."""
    rates = []
    for seed in range(25):
        gallery = make(stones=12, images=3, seed=seed, rate=0.1)
        fresh, _, _ = sample(12, 3, 0.2, seed + 1000)
        rates.append(float(gallery.match(fresh).unknown.float().mean()))
    assert 0.04 < np.mean(rates) < 0.14


def test_held_out_images_decide_where_they_exist() -> None:
    gallery = make(noise=0.05)
    other, labels, stones = sample(8, 2, 0.5, 7)
    held = HeldOut(
        embeddings=other, labels=torch.tensor(labels), stones=tuple(stones), views=("surface",) * len(stones)
    )
    wide = gallery.calibrate(held_out=held)
    assert wide.threshold is not None
    assert gallery.threshold is not None
    assert (
        wide.threshold > 1.5 * gallery.threshold
    )  # training references are too near; held-out stones are not
    assert wide.calibration.stones == 24
    expected = hierarchical_quantile(wide.match(other).distance.double().numpy(), np.array(stones), 0.05)
    assert wide.threshold == pytest.approx(
        expected if math.isfinite(expected) else float(wide.match(other).distance.max())
    )


def test_few_stones_are_said_to_be_few() -> None:
    gallery = make(stones=2)
    assert gallery.calibration.stones == 6
    assert (
        "6 stones cannot support a false-unknown rate of 5\u202f% (that takes 19), only one of about "
        "14.3\u202f%" in gallery.calibration.statement
    )
    enough = make(stones=7)
    assert "expected beyond it" in enough.calibration.statement
    assert enough.calibration.low is not None
    assert enough.calibration.low <= enough.calibration.threshold <= enough.calibration.high  # type: ignore[operator]


def test_single_stone_classes_take_no_part_and_one_stone_each_gives_no_threshold() -> None:
    embeddings, labels, stones = sample(4, 2, 0.1, 0)
    stones[-8:] = ["only"] * 8
    gallery = Gallery.build(embeddings, labels, classes=CLASSES, stones=stones)
    assert gallery.calibration.left_out == ("CYS",)
    assert gallery.calibration.images == 16
    alone = Gallery.build(torch.eye(3), [0, 1, 2], classes=CLASSES, stones=["a", "b", "c"])
    assert alone.threshold is None
    assert not alone.match(torch.full((1, 3), -9.0)).unknown.any()
    assert "No unknown threshold" in alone.calibration.statement


def test_unknown_stones_are_said_to_be_unknown() -> None:
    gallery = Gallery.build(torch.eye(3).repeat(4, 1), [0, 1, 2] * 4, classes=CLASSES)
    assert gallery.guessed == CLASSES
    assert "optimistic" in gallery.calibration.statement
    with pytest.raises(ValueError, match="does not know which images are of one stone"):
        gallery.fused()


def test_temperature_is_fitted_by_likelihood() -> None:
    gallery = make(stones=10, noise=0.6)
    fresh, labels, _ = sample(40, 4, 0.6, 99)
    found = gallery.match(fresh)
    accuracy = float((found.nearest_class == torch.tensor(labels)).float().mean())
    assert accuracy < 0.9
    assert abs(float(found.probabilities.max(dim=1).values.mean()) - accuracy) < 0.08


def test_rate_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"rate is 0\.9"):
        make(rate=0.9)


# ---- new classes


def test_a_new_class_is_known_at_once_and_old_answers_stay() -> None:
    gallery = make()
    new = normalize(
        torch.eye(16)[5:6] + 0.05 * torch.randn(6, 16, generator=torch.Generator().manual_seed(3)), dim=1
    )
    assert gallery.match(new).unknown.all()
    larger = gallery.add("STR", new[:3], stones=["n1", "n2", "n3"])
    found = larger.match(new[3:])
    assert [larger.classes[i] for i in found.nearest_class] == ["STR"] * 3
    assert not found.unknown.any()
    assert larger.added == ("STR",)
    assert larger.weak == ("STR",)
    torch.testing.assert_close(larger.prototypes[:3], gallery.prototypes)
    assert gallery.classes == CLASSES  # the old gallery is as it was


def test_names_of_classes_have_rules() -> None:
    gallery, one = make(), torch.eye(16)[:1]
    with pytest.raises(ValueError, match="'WW' is in the gallery already"):
        gallery.add("WW", one)
    with pytest.raises(ValueError, match="'ww' differs from 'WW' by case alone"):
        gallery.add("ww", one)
    with pytest.raises(ValueError, match="is the answer for images of no class"):
        gallery.add("Unknown", one)
    for bad in ("", "  ", "a\nb", "x" * 101):
        with pytest.raises(ValueError, match="class"):
            gallery.add(bad, one)
    assert class_name(" BRU ") == "BRU"
    with pytest.raises(ValueError, match="differ at most by case"):
        Gallery.build(torch.eye(2), [0, 1], classes=("a", "A"))


def test_extending_a_class_moves_its_prototype() -> None:
    gallery = make(stones=2, images=2)
    more = gallery.add("UA", torch.eye(16)[9:10], extend=True)
    assert more.classes == CLASSES
    assert more.counts["UA"] == (5, 3)
    expected = (gallery.prototypes[1] * 4 + torch.eye(16)[9]) / 5
    torch.testing.assert_close(more.prototypes[1], expected)


@pytest.mark.parametrize(
    ("embeddings", "message"),
    [
        (torch.zeros(0, 16), "at least one"),
        (torch.zeros(1, 4), "of 16 dimensions"),
        (torch.full((1, 16), float("inf")), "NaN or infinity"),
    ],
)
def test_bad_embeddings_are_refused(embeddings: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make().add("STR", embeddings)


def test_a_class_without_references_is_refused() -> None:
    with pytest.raises(ValueError, match="no reference of CYS"):
        Gallery.build(torch.eye(2), [0, 1], classes=CLASSES)


def test_match_names_neighbours_in_order() -> None:
    gallery = Gallery.build(
        torch.tensor([[0.0], [1.0], [5.0]]), [0, 0, 1], classes=("A", "B"), names=("p", "q", "r")
    )
    found = gallery.match(torch.tensor([[0.9]]), k=9)
    assert [gallery.names[i] for i in found.neighbours[0]] == ["q", "p", "r"]
    torch.testing.assert_close(found.neighbour_distances[0], torch.tensor([0.1, 0.9, 4.1]))
    assert found.distance.item() == pytest.approx(0.4)
    tau = gallery.temperature
    assert found.probabilities[0, 0].item() == pytest.approx(
        1 / (1 + math.exp((0.4**2 - 4.1**2) / tau)), rel=1e-4
    )


def test_fused_gallery_has_one_reference_per_stone() -> None:
    gallery = make(stones=5, images=4)
    fused = gallery.fused("max")
    assert len(fused.names) == 15
    assert {images for images, _ in fused.counts.values()} == {5}
    assert fused.calibration.stones == 15
    torch.testing.assert_close(fused.embeddings.norm(dim=1), torch.ones(15))
    assert fused.match(fused.embeddings).nearest_class.tolist() == fused.labels.tolist()


# ---- on disk


def equal(a: Gallery, b: Gallery) -> None:
    torch.testing.assert_close(a.embeddings, b.embeddings, rtol=0, atol=0)
    assert a.labels.tolist() == b.labels.tolist()
    for name in ("classes", "stones", "views", "names", "calibration", "added", "guessed"):
        assert getattr(a, name) == getattr(b, name)
    assert (a.held_out is None) == (b.held_out is None)
    assert (a.thumbnails is None) == (b.thumbnails is None)
    if a.thumbnails is not None and b.thumbnails is not None:
        assert torch.equal(a.thumbnails, b.thumbnails)


def full_gallery() -> Gallery:
    pictures = torch.randint(
        0, 256, (72, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    other, labels, stones = sample(3, 2, 0.3, 5)
    held = HeldOut(
        embeddings=other, labels=torch.tensor(labels), stones=tuple(stones), views=("surface",) * 18
    )
    return make(thumbnails=pictures, held_out=held).add("STR µ", torch.eye(16)[7:9])


def test_round_trip_as_a_folder(tmp_path: Path) -> None:
    gallery = full_gallery()
    assert gallery.thumbnails is not None
    assert gallery.thumbnails.shape == (74, 8, 8, 3)
    folder = save_gallery(gallery, tmp_path / "gallery")
    equal(load_gallery(folder), gallery)
    save_gallery(gallery.add("BRU", torch.eye(16)[3:4]), folder)
    assert load_gallery(folder).classes[-1] == "BRU"


def student(folder: Path, gallery: Gallery) -> Artifact:
    return Artifact.save(
        folder,
        kind="kidney.student",
        tensors={"weight": torch.eye(3)},
        config={"dim": 16},
        metrics={"accuracy": 0.5},
        card="# Card\n\nText.",
        provenance={
            "licences": [{"what": "data", "name": "x", "licence": "CC-BY-4.0"}],
            "data": {"name": "stones"},
        },
        files={**gallery_files(gallery), "notes.txt": b"kept"},
    )


def test_replacing_the_gallery_keeps_the_student(tmp_path: Path) -> None:
    gallery = make()
    before = student(tmp_path / "student", gallery)
    equal(load_gallery(before), gallery)
    after = replace_gallery(before, gallery.add("STR", torch.eye(16)[5:6]), change="added STR")
    after = replace_gallery(after, load_gallery(after).add("BRU", torch.eye(16)[6:7]), change="added BRU")
    assert load_gallery(tmp_path / "student").classes == (*CLASSES, "STR", "BRU")
    assert after.tensors()["weight"].tolist() == torch.eye(3).tolist()
    assert after.file("notes.txt").read_bytes() == b"kept"
    assert after.provenance["gallery_changes"] == ["added STR", "added BRU"]
    assert after.provenance["trained"]["created"] == before.created
    assert after.provenance["data"] == {"name": "stones"}
    assert after.card.count("## Licences and terms") == after.card.count("## Contents") == 1
    assert after.card.startswith("# Card\n\nText.")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.update(format="other"), "is not a gallery"),
        (lambda t: t.update(schema=99), "has schema 99"),
        (lambda t: t["stones"].pop(), "stones has 71 names where 72 belong"),
        (lambda t: t.pop("views"), "the gallery is damaged"),
        (lambda t: t["calibration"].update(extra=1), "the gallery is damaged"),
        (lambda t: t.update(classes=[1, 2, 3]), "classes is no list of names"),
    ],
)
def test_damaged_tables_are_one_clear_error(tmp_path: Path, edit: object, message: str) -> None:
    files = gallery_files(make())
    table = json.loads(files["gallery.json"])
    edit(table)  # type: ignore[operator]
    files["gallery.json"] = json.dumps(table).encode()
    saved = Artifact.save(
        tmp_path / "s", kind="kidney.student", tensors={}, config={}, metrics={}, card="x", files=files
    )
    with pytest.raises(DataError, match=message):
        load_gallery(saved)


@pytest.mark.parametrize("content", [b"", b"\xff" * 40, b"\x00" * 8])
def test_damaged_tensors_are_one_clear_error(tmp_path: Path, content: bytes) -> None:
    files = {**gallery_files(make()), "gallery.safetensors": content}
    saved = Artifact.save(
        tmp_path / "s", kind="kidney.student", tensors={}, config={}, metrics={}, card="x", files=files
    )
    with pytest.raises(DataError, match="cannot be read as a gallery"):
        load_gallery(saved)


def test_an_artefact_without_a_gallery_says_so(tmp_path: Path) -> None:
    saved = Artifact.save(tmp_path / "s", kind="kidney.student", tensors={}, config={}, metrics={}, card="x")
    with pytest.raises(DataError, match=r"has no file 'gallery\.safetensors'"):
        load_gallery(saved)
