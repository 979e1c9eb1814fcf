"""Simulated stones: the same bytes for a seed; types that show in structure alone, learnable, not trivial."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from scipy import ndimage
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from stillhouse.kidney.data import Collection, SimulateConfig, simulate, simulate_fragments, split_collection
from stillhouse.kidney.simulate import CLASSES, VIEWS

Parts = dict[str, tuple[np.ndarray, np.ndarray]]


def digest(collection: Collection) -> str:
    h = hashlib.sha256()
    for item in collection.items:
        assert item.array is not None
        h.update(item.name.encode() + item.array.tobytes())
    return h.hexdigest()


def test_same_seed_same_bytes_and_other_seed_other_bytes() -> None:
    config = SimulateConfig(stones_per_class=2, classes=("WW", "BRU"))
    assert digest(simulate(config)) == digest(simulate(config))
    other = SimulateConfig(stones_per_class=2, classes=("WW", "BRU"), seed=1)
    assert digest(simulate(config)) != digest(simulate(other))


def test_more_stones_views_or_classes_leave_the_others_as_they_are() -> None:
    few = {
        f.name: f.image.tobytes()
        for f in simulate_fragments(SimulateConfig(stones_per_class=1, classes=("UA",), views=("section",)))
    }
    many = {
        f.name: f.image.tobytes()
        for f in simulate_fragments(SimulateConfig(stones_per_class=2, classes=("CYS", "UA")))
    }
    assert few.items() <= many.items()
    assert len(many) == 8


def test_every_type_and_view_renders_a_fragment_on_tissue() -> None:
    for f in simulate_fragments(SimulateConfig(stones_per_class=1, seed=5)):
        assert f.image.shape == (192, 192, 3)
        assert f.image.dtype == np.uint8
        assert f.mask.dtype == np.bool_
        assert 0.35 < f.mask.mean() < 0.9
        assert not f.mask[[0, -1]].any()
        assert ndimage.label(f.mask)[1] == 1
        stone = f.image[f.mask].astype(float)
        assert stone.std() > 8
        assert (stone.max(axis=1) == 255).mean() < 0.25  # not burnt out
        assert 30 < stone.mean() < 220


def test_collection_has_stones_views_and_says_that_it_is_simulated() -> None:
    seen: list[tuple[int, int]] = []
    collection = simulate(SimulateConfig(stones_per_class=2), progress=lambda a, b: seen.append((a, b)))
    assert collection.classes == CLASSES
    assert collection.views == VIEWS
    assert collection.stone_known
    assert len(collection.stones) == 12
    assert any("simulated" in note for note in collection.notes)
    assert seen[-1] == (24, 24)
    for stone in collection.stones:
        members = [i for i in collection.items if i.stone == stone]
        assert {i.view for i in members} == set(VIEWS)
        assert len({i.label for i in members}) == 1
        assert len(members) <= 8
    assert len({i.name for i in collection.items}) == len(collection)
    assert all(i.array is not None and i.array.shape == (64, 64, 3) for i in collection.items)


def texture_statistics(image: np.ndarray) -> list[float]:
    """Energy, skewness, kurtosis and direction of the grey image at four scales."""
    grey = image.astype(np.float32).mean(axis=2)
    grey = (grey - grey.mean()) / grey.std()
    out = [float((grey**3).mean()), float((grey**4).mean())]
    for s in (0.7, 1.4, 2.8, 5.6):
        near = ndimage.gaussian_filter(grey, s)
        band = near - ndimage.gaussian_filter(grey, 2 * s)
        spread = band.std()
        gy, gx = np.gradient(near)
        xx, yy, xy = (ndimage.gaussian_filter(t, 4 * s) for t in (gx * gx, gy * gy, gx * gy))
        direction = np.sqrt((xx - yy) ** 2 + 4 * xy**2) / (xx + yy + 1e-9)
        z = band / spread
        out += [np.log(spread), float((z**3).mean()), np.log((z**4).mean())]
        out += [float(direction.mean()), float(direction.std()), np.log((gx**2 + gy**2).mean())]
    return out


@pytest.fixture(scope="module")
def parts() -> dict[str, Collection]:
    return split_collection(simulate(SimulateConfig(stones_per_class=12, seed=3)), test=0.33, seed=3)


def score(parts: dict[str, Collection], describe, model) -> float:  # type: ignore[no-untyped-def]
    train, test = ([describe(i.array) for i in parts[p].items] for p in ("train", "test"))
    model.fit(np.array(train), parts["train"].labels)
    return float(balanced_accuracy_score(parts["test"].labels, model.predict(np.array(test))))


def test_nearest_pixels_do_not_tell_the_types(parts: dict[str, Collection]) -> None:
    assert score(parts, lambda a: a.astype(np.float32).ravel(), KNeighborsClassifier(1)) < 0.35


def test_colour_alone_does_not_do(parts: dict[str, Collection]) -> None:
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=3000))
    assert score(parts, lambda a: np.r_[a.mean((0, 1)), a.std((0, 1))], model) < 0.5


def test_structure_tells_the_types_of_new_stones(parts: dict[str, Collection]) -> None:
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=3000))
    assert score(parts, texture_statistics, model) > 0.6


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"stones_per_class": 0}, "stones_per_class: 0"),
        ({"patches_per_fragment": 0}, "patches_per_fragment: 0"),
        ({"views": ()}, "views"),
        ({"views": ("inside",)}, "views"),
        ({"classes": ("WW", "WW")}, "classes"),
        ({"patch_size": 8}, "patch_size: 8"),
        ({"fragment_size": 100}, "fragment_size: 100"),
        ({"max_overlap": 64}, "max_overlap: 64"),
        ({"colour": 1.5}, "colour: 1.5"),
        ({"seed": -1}, "seed: -1"),
    ],
)
def test_config_is_checked(wrong: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SimulateConfig(**wrong)  # type: ignore[arg-type]
