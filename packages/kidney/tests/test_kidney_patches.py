"""Patches lie inside the mask and do not overlap too much; a folder of them appears whole or never."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from stillhouse.core.errors import DataError
from stillhouse.kidney.data import (
    Collection,
    Item,
    balance,
    extract_folder,
    extract_patches,
    load_image,
    read_collection,
)
from stillhouse.kidney.data.patches import patch_corners


def blob(seed: int, height: int, width: int) -> np.ndarray:
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal((height, width)), 9)
    return noise > np.quantile(noise, 0.35)


def overlap(a: tuple[int, int], b: tuple[int, int], size: int) -> int:
    """Width of the strip two squares share; 0 where they share none."""
    return max(0, size - max(abs(a[0] - b[0]), abs(a[1] - b[1])))


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    height=st.integers(10, 90),
    width=st.integers(10, 90),
    size=st.integers(1, 30),
    share=st.floats(0, 0.99),
)
def test_inside_the_mask_and_apart(seed: int, height: int, width: int, size: int, share: float) -> None:
    mask = blob(seed, height, width)
    limit = int(share * (size - 1))
    corners = patch_corners(mask, size=size, max_overlap=limit)
    assert corners == sorted(corners)
    for top, left in corners:
        assert mask[top : top + size, left : left + size].all()
        assert mask[top : top + size, left : left + size].shape == (size, size)
    for a, b in itertools.combinations(corners[:60], 2):
        assert overlap(a, b, size) <= limit


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000), size=st.integers(4, 20), limit=st.integers(0, 3))
def test_at_least_as_many_as_a_fixed_grid_at_any_offset(seed: int, size: int, limit: int) -> None:
    mask = blob(seed, 70, 80)
    found = len(patch_corners(mask, size=size, max_overlap=limit))
    step = size - limit
    inside = np.lib.stride_tricks.sliding_window_view(mask, (size, size)).all(axis=(2, 3))
    assert found >= max(int(inside[y::step, x::step].sum()) for y in range(step) for x in range(step))
    assert (found > 0) == bool(inside.any())


def test_rows_are_optimal_by_exhaustive_search() -> None:
    """On a strip as high as a patch the count must be that of the best choice of positions."""
    rng = np.random.default_rng(3)
    for _ in range(20):
        mask = rng.random((3, 16)) > 0.08
        valid = [x for x in range(14) if mask[:, x : x + 3].all()]
        best = max(
            len(c)
            for n in range(len(valid) + 1)
            for c in itertools.combinations(valid, n)
            if all(b - a >= 2 for a, b in itertools.pairwise(c))
        )
        assert len(patch_corners(mask, size=3, max_overlap=1)) == best


def test_patches_are_the_pixels_of_the_image_and_own_their_memory() -> None:
    image = np.random.default_rng(0).integers(0, 256, (60, 70, 3), dtype=np.uint8)
    patches = extract_patches(image, np.ones((60, 70), bool), size=20, max_overlap=5)
    assert len(patches) == 3 * 4
    for patch in patches:
        assert np.array_equal(patch.image, image[patch.top : patch.top + 20, patch.left : patch.left + 20])
        assert not np.shares_memory(patch.image, image)


def test_too_small_a_fragment_gives_none() -> None:
    image = np.zeros((60, 70, 3), np.uint8)
    mask = np.zeros((60, 70), bool)
    assert extract_patches(image, mask, size=20, max_overlap=5) == []
    mask[10:29, 10:29] = True
    assert extract_patches(image, mask, size=20, max_overlap=5) == []
    assert extract_patches(image, mask) == []


def test_arguments_are_checked() -> None:
    image, mask = np.zeros((9, 9, 3), np.uint8), np.ones((9, 9), bool)
    with pytest.raises(ValueError, match="image: is float64"):
        extract_patches(image.astype(float), mask, size=3, max_overlap=0)
    with pytest.raises(ValueError, match="mask: is uint8"):
        extract_patches(image, mask.astype(np.uint8), size=3, max_overlap=0)
    with pytest.raises(ValueError, match="mask: is bool"):
        extract_patches(image, mask[:-1], size=3, max_overlap=0)
    with pytest.raises(ValueError, match="max_overlap: 3"):
        extract_patches(image, mask, size=3, max_overlap=3)
    with pytest.raises(ValueError, match="size: 0"):
        extract_patches(image, mask, size=0, max_overlap=0)


def test_balance_keeps_at_most_so_many_of_each_class_and_view() -> None:
    pixels = np.zeros((4, 4, 3), np.uint8)
    items = tuple(
        Item(path=None, array=pixels, label=label, view=view, stone=str(n), name=f"{label}{view}{n}")
        for label, view, count in (("a", "x", 9), ("a", "y", 2), ("b", "x", 5))
        for n in range(count)
    )
    full = Collection(items=items, classes=("a", "b"), views=("x", "y"), stone_known=True, name="set")
    kept = balance(full, per_class=4, seed=1)
    assert kept.counts() == {"a": {"x": 4, "y": 2}, "b": {"x": 4, "y": 0}}
    assert any("a y: 2 images" in note for note in kept.notes)
    assert kept.items == balance(full, per_class=4, seed=1).items
    assert kept.items != balance(full, per_class=4, seed=2).items
    order = [items.index(item) for item in kept.items]
    assert order == sorted(order)
    with pytest.raises(ValueError, match="per_class"):
        balance(full, per_class=0)


@pytest.fixture
def fragments(tmp_path: Path) -> tuple[Path, Path]:
    """Four images with masks: two views and two classes."""
    rng = np.random.default_rng(0)
    for n, place in enumerate(("SUR/WW/s1", "SUR/UA/s2", "SEC/WW/s1", "SEC/UA/s2")):
        mask = np.zeros((50, 60), np.uint8)
        mask[5:45, 5 : 45 + 3 * n] = 255
        for folder, array in (("images", rng.integers(0, 256, (50, 60, 3), dtype=np.uint8)), ("masks", mask)):
            path = tmp_path / folder / f"{place}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(path)
    return tmp_path / "images", tmp_path / "masks"


def test_extract_folder_writes_patches_and_a_table(fragments: tuple[Path, Path], tmp_path: Path) -> None:
    images, masks = fragments
    out = tmp_path / "new" / "patches"
    seen: list[tuple[int, int]] = []
    written = extract_folder(
        images,
        masks,
        out,
        size=20,
        max_overlap=2,
        stone_pattern=r"s\d",
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen[-1] == (4, 4)
    assert written.stone_known
    assert written.views == ("surface", "section")
    assert len(written) == 16
    assert set(written.stones) == {"s1", "s2"}
    assert read_collection(out).items == written.items
    with open(out / "manifest.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        top, left = int(row["top"]), int(row["left"])
        source = load_image(images / row["source"])[top : top + 20, left : left + 20]
        assert np.array_equal(load_image(out / row["path"]), source)
    assert [p.name for p in out.parent.iterdir()] == ["patches"]


def test_extract_folder_is_deterministic_and_balances(fragments: tuple[Path, Path], tmp_path: Path) -> None:
    for name in ("a", "b"):
        extract_folder(*fragments, tmp_path / name, size=20, max_overlap=2, per_class=2, seed=5)
    first, second = (
        {p.relative_to(tmp_path / n): p.read_bytes() for p in (tmp_path / n).rglob("*") if p.is_file()}
        for n in ("a", "b")
    )
    assert first == second
    assert len(first) == 4 * 2 + 1
    assert not read_collection(tmp_path / "a").stone_known


def no_output(tmp_path: Path) -> bool:
    return not any(p.name not in ("images", "masks") for p in tmp_path.iterdir())


def test_problems_are_found_before_anything_is_written(fragments: tuple[Path, Path], tmp_path: Path) -> None:
    images, masks = fragments
    with pytest.raises(DataError, match="give a smaller size"):
        extract_folder(images, masks, tmp_path / "out", size=48)
    (masks / "SUR/WW/s1.png").rename(masks / "SUR/WW/gone.png")
    with pytest.raises(DataError, match=r"the mask of SUR/WW/s1\.png is missing"):
        extract_folder(images, masks, tmp_path / "out", size=20, max_overlap=2)
    Image.new("L", (9, 9), 255).save(masks / "SUR/WW/s1_mask.png")
    with pytest.raises(DataError, match=r"is 9 × 9, its image .* is 60 × 50"):
        extract_folder(images, masks, tmp_path / "out", size=20, max_overlap=2)
    assert no_output(tmp_path)


def test_output_folder_must_be_new_or_empty(fragments: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    extract_folder(*fragments, tmp_path / "out", size=20, max_overlap=2)
    with pytest.raises(DataError, match="not empty"):
        extract_folder(*fragments, tmp_path / "out", size=20, max_overlap=2)
    with pytest.raises(DataError, match="not a folder"):
        extract_folder(fragments[0], tmp_path / "none", tmp_path / "out2")


def test_two_images_that_would_give_the_same_file_are_refused(tmp_path: Path) -> None:
    for name in ("WW/s.png", "WW/s.bmp"):
        for folder in ("images", "masks"):
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB" if folder == "images" else "L", (30, 30), "white").save(path)
    with pytest.raises(DataError, match="same name"):
        extract_folder(tmp_path / "images", tmp_path / "masks", tmp_path / "out", size=20, max_overlap=2)
    assert no_output(tmp_path)


def test_an_interruption_leaves_nothing(
    fragments: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", stop)
    with pytest.raises(KeyboardInterrupt):
        extract_folder(*fragments, tmp_path / "out", size=20, max_overlap=2)
    assert no_output(tmp_path)
