"""What the trainer reads: standardised, reproducible from seeds, labels hidden where they are hidden."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stillhouse.kidney.data import (
    Augment,
    Collection,
    Item,
    PatchDataset,
    SimulateConfig,
    collate,
    read_folder,
    resize_square,
    simulate,
    split_collection,
    standardise_channels,
)
from stillhouse.kidney.data import items as items_module


@pytest.fixture(scope="module")
def stones() -> Collection:
    return simulate(SimulateConfig(stones_per_class=3, classes=("WW", "UA")))


def test_samples_are_standardised_float32_of_the_size(stones: Collection) -> None:
    for size in (32, 64, 80):
        image = PatchDataset(stones, stones.classes, size=size)[3]["image"]
        assert image.shape == (3, size, size)
        assert image.dtype == torch.float32
        assert image.is_contiguous()
        torch.testing.assert_close(image.mean((1, 2)), torch.zeros(3), atol=1e-4, rtol=0)
        torch.testing.assert_close(image.std((1, 2), correction=0), torch.ones(3), atol=1e-4, rtol=0)


def test_without_a_seed_it_is_the_image_itself(stones: Collection) -> None:
    dataset = PatchDataset(stones, stones.classes, size=64, augment=Augment())
    wanted = standardise_channels(stones.items[5].load()).transpose(2, 0, 1)
    np.testing.assert_allclose(dataset[5]["image"].numpy(), wanted, atol=1e-4)
    assert torch.equal(dataset[5]["image"], dataset[5 - len(dataset)]["image"])


def test_with_a_seed_it_is_augmented_reproducibly_and_standardised(stones: Collection) -> None:
    first, second = (PatchDataset(stones, stones.classes, size=32, augment=Augment()) for _ in range(2))
    assert first.seeded
    for seed in (1, 2**62):
        torch.manual_seed(seed % 7)
        image = first[(5, seed)]["image"]
        assert torch.equal(image, second[(5, seed)]["image"])
        assert not torch.allclose(image, first[5]["image"], atol=0.1)
        torch.testing.assert_close(image.std((1, 2), correction=0), torch.ones(3), atol=1e-4, rtol=0)
    assert not torch.equal(first[(5, 1)]["image"], first[(5, 2**62)]["image"])
    plain = PatchDataset(stones, stones.classes, size=32)
    assert torch.equal(plain[(5, 1)]["image"], plain[5]["image"])


def test_labels_follow_the_given_classes_and_hidden_ones_are_minus_one(stones: Collection) -> None:
    parts = split_collection(stones, test=0.3, shots=1)
    swapped = PatchDataset(parts["train"], ("UA", "WW"), size=16)
    assert [s["label"] for s in map(swapped.__getitem__, range(len(swapped)))] == [
        ("UA", "WW").index(item.label) for item in parts["train"].items
    ]
    hidden = PatchDataset(parts["unlabelled"], stones.classes, size=16)
    assert {hidden[i]["label"] for i in range(len(hidden))} == {-1}
    other = PatchDataset(stones, ("WW",), size=16)
    assert {other[i]["label"] for i in range(len(other))} == {0, -1}


def test_groups_are_stones_and_views_are_numbered(stones: Collection) -> None:
    dataset = PatchDataset(stones, stones.classes, size=16)
    for i, item in enumerate(stones.items):
        sample = dataset[i]
        assert stones.stones[sample["group"]] == item.stone
        assert stones.views[sample["view"]] == item.view
        assert sample["index"] == i


def numbered(height: int, width: int) -> Collection:
    """One image whose red and green are its own row and column."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.mgrid[:height, :width]
    pixels[..., 2] = np.random.default_rng(0).integers(0, 256, (height, width))
    item = Item(path=None, array=pixels, label="a", view="v", stone="s", name="n")
    return Collection(items=(item,), classes=("a",), views=("v",), stone_known=True, name="x")


def test_crops_cover_the_image_evenly_without_a_seed_and_move_with_one() -> None:
    collection = numbered(40, 60)
    dataset = PatchDataset(collection, ("a",), size=20, crops=6)
    assert len(dataset) == 6
    pixels = collection.items[0].load()
    wanted = [(y, x) for y in (0, 20) for x in (0, 20, 40)]
    for n, (y, x) in enumerate(wanted):
        crop = standardise_channels(pixels[y : y + 20, x : x + 20]).transpose(2, 0, 1)
        np.testing.assert_allclose(dataset[n]["image"].numpy(), crop, atol=1e-4)
        assert dataset[n]["index"] == 0
        assert dataset.item_index(n) == 0
    moved = {dataset[(0, seed)]["image"].numpy().tobytes() for seed in range(30)}
    assert len(moved) > 20
    assert torch.equal(dataset[(0, 4)]["image"], dataset[(0, 4)]["image"])


def test_every_crop_place_is_reached() -> None:
    """The augmentation draws from the same seed; the place must not be tied to a few values."""
    dataset = PatchDataset(numbered(12, 12), ("a",), size=8, crops=2)
    assert len({dataset[(0, seed)]["image"].numpy().tobytes() for seed in range(400)}) == 25


def test_a_crop_larger_than_the_image_is_an_error_that_names_it() -> None:
    with pytest.raises(ValueError, match="n: is 12 × 12, smaller than the crop of 16"):
        PatchDataset(numbered(12, 12), ("a",), size=16, crops=2)[0]


def test_resize_square_cuts_the_middle_and_keeps_constants() -> None:
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = 200
    assert (resize_square(pixels, 10) == 200).all()
    assert (resize_square(pixels, 7) == 200).all()
    wave = np.where(np.arange(64)[None, :, None] % 2, 255, 0).astype(np.uint8).repeat(64, 0).repeat(3, 2)
    small = resize_square(wave, 16).astype(float)
    assert abs(small - 127.5).max() < 20  # antialiased: the pattern averages out


def test_images_are_decoded_once_while_they_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(4):
        path = tmp_path / "WW" / f"{n}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (16, 16), (n, 9, 9)).save(path)
    collection = read_folder(tmp_path)
    decoded: list[Path] = []
    real = items_module.load_image

    def count(path: Path) -> np.ndarray:
        decoded.append(path)
        return real(path)

    monkeypatch.setattr(items_module, "load_image", count)
    for limit, expected in ((10**9, 4), (2 * 16 * 16 * 3, 2 + 2 * 3), (0, 4 * 3)):
        dataset = PatchDataset(collection, ("WW",), size=16, cache_bytes=limit)
        decoded.clear()
        for _ in range(3):
            for n in range(4):
                dataset[n]
        assert len(decoded) == expected


def test_batches_and_workers_see_the_same(stones: Collection) -> None:
    dataset = PatchDataset(stones, stones.classes, size=16, augment=Augment())
    keys = [(n, 100 + n) for n in range(6)]
    again = pickle.loads(pickle.dumps(dataset))
    batch = collate([dataset[key] for key in keys])
    other = collate([again[key] for key in keys])
    assert batch["image"].shape == (6, 3, 16, 16)
    assert batch["label"].dtype == torch.int64
    assert all(torch.equal(batch[key], other[key]) for key in batch)
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size=3,
        sampler=keys,
        collate_fn=collate,
        num_workers=2,  # type: ignore[arg-type]
    )
    together = torch.cat([part["image"] for part in loader])
    torch.testing.assert_close(together, batch["image"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("wrong", [{"size": 4}, {"crops": 0}, {"cache_bytes": -1}, {"classes": ("WW", "WW")}])
def test_arguments_are_checked(stones: Collection, wrong: dict[str, object]) -> None:
    arguments = {"classes": stones.classes, "size": 16, **wrong}
    with pytest.raises(ValueError, match=next(iter(wrong))):
        PatchDataset(stones, **arguments)  # type: ignore[arg-type]


def test_index_out_of_range_ends_iteration(stones: Collection) -> None:
    dataset = PatchDataset(stones, stones.classes, size=16)
    with pytest.raises(IndexError, match="out of range"):
        dataset[len(dataset)]
    assert sum(1 for _ in dataset) == len(dataset)
    with pytest.raises(ValueError, match="samples: is empty"):
        collate([])
