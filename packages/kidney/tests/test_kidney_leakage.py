"""Repeated stones and pictures are found; different ones are not taken for repeats."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from sklearn.metrics import balanced_accuracy_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from stillhouse.kidney.data import (
    Collection,
    Item,
    LeakageWarning,
    SimulateConfig,
    check_leakage,
    read_kth_tips,
    simulate,
    simulate_fragments,
    split_collection,
)


def of(arrays: Iterable[np.ndarray], prefix: str = "s", *, known: bool = True) -> Collection:
    items = tuple(
        Item(
            path=None,
            array=np.ascontiguousarray(a),
            label="a",
            view="v",
            stone=f"{prefix}{n}",
            name=f"{prefix}{n}",
        )
        for n, a in enumerate(arrays)
    )
    return Collection(items=items, classes=("a",), views=("v",), stone_known=known, name=prefix)


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    """128 × 128 out of the middle of 24 fragments, one of each stone, every type and view."""
    surface = SimulateConfig(stones_per_class=2, views=("surface",), seed=11)
    section = replace(surface, views=("section",), seed=12)
    return [f.image[32:160, 32:160] for c in (surface, section) for f in simulate_fragments(c)]


def shrink(a: np.ndarray, side: int) -> np.ndarray:
    return np.asarray(Image.fromarray(a).resize((side, side), Image.Resampling.BICUBIC))


def jpeg(a: np.ndarray, quality: int) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(a).save(buffer, format="JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


def test_shared_stones_are_named() -> None:
    stones = simulate(SimulateConfig(stones_per_class=2, classes=("WW", "UA"), views=("surface",)))
    a = stones.filter(stones=("WW-000", "UA-000", "UA-001"))
    b = stones.filter(stones=("WW-001", "UA-001"))
    report = check_leakage(a, b)
    assert report.shared_stones == ("UA-001",)
    assert not report.ok
    assert "UA-001" in report.summary()
    assert {d.kind for d in report.duplicates} == {"identical"}


def test_a_split_by_stone_is_clean_and_one_by_patch_is_not() -> None:
    stones = simulate(SimulateConfig(stones_per_class=5, seed=2))
    parts = split_collection(stones, test=0.4)
    report = check_leakage(parts["train"], parts["test"])
    assert report.ok
    assert report.pairs == len(parts["train"]) * len(parts["test"])
    assert "no stone is in both parts" in report.summary()
    with pytest.warns(LeakageWarning):
        parts = split_collection(stones, by="patch", test=0.4)
    assert not check_leakage(parts["train"], parts["test"]).ok


def test_unknown_stones_are_not_called_apart(pictures: list[np.ndarray]) -> None:
    report = check_leakage(of(pictures[:3], "p", known=False), of(pictures[3:6], "p", known=False))
    assert report.shared_stones == ()
    assert not report.stone_known
    assert "stone ids are unknown" in report.summary()


def test_identical_pictures(pictures: list[np.ndarray]) -> None:
    report = check_leakage(of(pictures, "a"), of(pictures[5:8], "b"))
    assert [(d.train_name, d.test_name, d.kind) for d in report.duplicates] == [
        ("a5", "b0", "identical"),
        ("a6", "b1", "identical"),
        ("a7", "b2", "identical"),
    ]
    assert "b0 = a5" in report.summary()


@pytest.mark.parametrize(
    "change",
    [
        lambda a: jpeg(a, 40),
        lambda a: shrink(a, 96),
        lambda a: shrink(a, 200),
        lambda a: jpeg(shrink(a, 80), 70),
        lambda a: np.clip(a.astype(float) * 1.25 + 8, 0, 255).astype(np.uint8),
        lambda a: a[:, ::-1],
        lambda a: np.rot90(a, 1),
        lambda a: np.rot90(a, 3)[::-1],
        lambda a: np.clip(a + np.random.default_rng(0).normal(0, 4, a.shape), 0, 255).astype(np.uint8),
    ],
    ids=["jpeg", "smaller", "larger", "both", "brighter", "mirrored", "turned", "turned+mirrored", "noisy"],
)
def test_changed_copies_are_found_and_nothing_else(pictures: list[np.ndarray], change) -> None:  # type: ignore[no-untyped-def]
    report = check_leakage(of(pictures, "a"), of([change(p) for p in pictures], "b"))
    pairs = {(d.train, d.test) for d in report.duplicates}
    assert all(a == b for a, b in pairs)
    assert len(pairs) >= len(pictures) - 1
    assert {d.kind for d in report.duplicates} <= {"copy", "overlap"}


@pytest.mark.parametrize(("side", "shift"), [(96, 16), (96, 31), (80, 37)])
def test_overlapping_crops_are_found_and_nothing_else(
    pictures: list[np.ndarray], side: int, shift: int
) -> None:
    left = [p[:side, :side] for p in pictures]
    right = [jpeg(p[shift // 2 : shift // 2 + side, shift : shift + side], 85) for p in pictures]
    report = check_leakage(of(left, "a"), of(right, "b"))
    pairs = {(d.train, d.test) for d in report.duplicates}
    assert all(a == b for a, b in pairs)
    assert len(pairs) >= 0.8 * len(pictures)


def test_crops_that_do_not_overlap_are_no_duplicates(pictures: list[np.ndarray]) -> None:
    report = check_leakage(of([p[:, :64] for p in pictures], "a"), of([p[:, 64:] for p in pictures], "b"))
    assert report.ok


def test_featureless_pictures_are_compared_byte_for_byte_only() -> None:
    grey = [np.full((40, 40, 3), v, np.uint8) for v in (10, 20, 30)]
    report = check_leakage(of(grey[:2], "a"), of(grey[1:], "b"))
    assert [(d.train, d.test, d.kind) for d in report.duplicates] == [(1, 0, "identical")]


def test_empty_parts_progress_and_arguments(pictures: list[np.ndarray]) -> None:
    assert check_leakage(of([], "a"), of(pictures[:1], "b")).ok
    seen: list[tuple[int, int]] = []
    check_leakage(of(pictures[:2], "a"), of(pictures[2:3], "b"), progress=lambda a, b: seen.append((a, b)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    with pytest.raises(ValueError, match="threshold: 0"):
        check_leakage(of([], "a"), of([], "b"), threshold=0)


def kth() -> Collection:
    root = os.environ.get("STILLHOUSE_TEST_DATA")
    if not root:
        pytest.skip("STILLHOUSE_TEST_DATA is not set")
    return read_kth_tips(
        Path(root) / "kidney" / "kth_tips_gray",
        views={"near": (2,), "middle": (5,), "far": (8,)},
        check=False,
    )


@pytest.mark.real_data
def test_real_overlapping_crops_are_found() -> None:
    """Crops of 128 out of 200 at random places: they share between a quarter and all of their area."""
    collection = kth()
    rng = np.random.default_rng(0)
    crops = []
    for _ in range(2):
        places = rng.integers(0, 73, (len(collection), 2))
        crops.append(
            collection.with_items(
                replace(item, path=None, array=item.load()[y : y + 128, x : x + 128].copy())
                for item, (y, x) in zip(collection.items, places, strict=True)
            )
        )
    duplicates = check_leakage(*crops).duplicates
    right = sum(d.train == d.test for d in duplicates)
    assert right > 0.8 * len(collection)
    # The set photographs one piece of each material: what else correlates is the same piece.
    assert all(collection.items[d.train].label == collection.items[d.test].label for d in duplicates)


def texture_statistics(image: np.ndarray) -> list[float]:
    grey = image[..., 0].astype(np.float32)
    grey = (grey - grey.mean()) / (grey.std() + 1e-6)
    out = []
    for s in (0.7, 1.4, 2.8, 5.6):
        band = ndimage.gaussian_filter(grey, s) - ndimage.gaussian_filter(grey, 2 * s)
        gy, gx = np.gradient(band)
        out += [np.log(band.std() + 1e-9), float((band**3).mean() / (band.std() + 1e-9) ** 3)]
        out += [np.log(np.square(gx).mean() + 1e-9), np.log(np.square(gy).mean() + 1e-9)]
    return out


@pytest.mark.real_data
def test_a_patch_level_split_of_overlapping_crops_scores_above_a_group_level_split() -> None:
    """If there were no gap, the grouping would not be grouping."""
    collection = kth()
    crops, features = [], []
    for item in collection.items:
        image = item.load()
        for y, x in ((0, 0), (0, 72), (72, 0), (72, 72), (36, 36)):
            crop = image[y : y + 128, x : x + 128]
            crops.append(replace(item, path=None, array=crop.copy(), name=f"{item.name}/{y}/{x}"))
            features.append(texture_statistics(crop))
    table = {item.name: row for item, row in zip(crops, features, strict=True)}
    whole = collection.with_items(crops)
    scores: dict[str, list[float]] = {"stone": [], "patch": []}
    for seed in range(3):
        for by in ("stone", "patch"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", LeakageWarning)
                parts = split_collection(whole, by=by, test=0.34, seed=seed)  # type: ignore[arg-type]
            x = {p: np.array([table[i.name] for i in parts[p].items]) for p in ("train", "test")}
            model = make_pipeline(StandardScaler(), KNeighborsClassifier(1)).fit(
                x["train"], parts["train"].labels
            )
            scores[by].append(balanced_accuracy_score(parts["test"].labels, model.predict(x["test"])))
            shared = set(parts["train"].stones) & set(parts["test"].stones)
            assert bool(shared) == (by == "patch")
    gaps = np.array(scores["patch"]) - np.array(scores["stone"])
    assert gaps.min() > 0.02
