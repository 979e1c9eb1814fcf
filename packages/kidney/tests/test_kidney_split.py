"""Splits keep stones apart, or say that they do not."""

from __future__ import annotations

import warnings
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.core.errors import DataError
from stillhouse.kidney.data import Collection, Item, LeakageWarning, split_collection

PIXELS = np.zeros((4, 4, 3), np.uint8)


def make(
    spec: dict[str, list[dict[str, int]]], *, known: bool = True, splits: dict[str, str] | None = None
) -> Collection:
    """Class → stones → view → number of images."""
    items = []
    for label, stones in spec.items():
        for s, views in enumerate(stones):
            for view, count in views.items():
                for n in range(count):
                    stone = f"{label or 'none'}{s}"
                    items.append(
                        Item(
                            path=None,
                            array=PIXELS,
                            label=label,
                            view=view,
                            stone=stone,
                            split=(splits or {}).get(stone),
                            name=f"{stone}/{view}/{n}",
                        )
                    )
    return Collection(
        items=tuple(items),
        classes=tuple(label for label in spec if label),
        views=tuple(sorted({item.view for item in items})),
        stone_known=known,
        name="set",
    )


def names(part: Collection) -> list[str]:
    return [item.name for item in part.items]


BASIC = {label: [{"surface": 3, "section": 2}] * 10 for label in ("a", "b", "c")}


@settings(deadline=None, max_examples=60)
@given(
    stones=st.lists(st.lists(st.integers(1, 5), min_size=2, max_size=8), min_size=1, max_size=4),
    test=st.floats(0.01, 0.6),
    validation=st.sampled_from([0.0, 0.1, 0.3]),
    seed=st.integers(0, 99),
)
def test_by_stone_is_a_partition_without_shared_stones(
    stones: list[list[int]], test: float, validation: float, seed: int
) -> None:
    whole = make({f"c{k}": [{"surface": n} for n in counts] for k, counts in enumerate(stones)})
    parts = split_collection(whole, test=test, validation=validation, seed=seed)
    assert Counter(n for part in parts.values() for n in names(part)) == Counter(names(whole))
    owners: dict[str, set[str]] = {}
    for name, part in parts.items():
        for stone in part.stones:
            owners.setdefault(stone, set()).add(name)
    assert all(len(where) == 1 for where in owners.values())
    for label in whole.classes:
        assert label in parts["train"].labels
        assert label in parts["test"].labels
    assert all(part.split_level == "stone" for part in parts.values())
    again = split_collection(whole, test=test, validation=validation, seed=seed)
    assert all(names(again[key]) == names(parts[key]) for key in parts)


def test_shares_are_kept_class_by_class() -> None:
    parts = split_collection(make(BASIC), test=0.2, validation=0.1)
    for label in "abc":
        assert [sum(x == label for x in parts[p].labels) for p in ("train", "validation", "test")] == [
            35,
            5,
            10,
        ]
    assert {item.split for item in parts["validation"].items} == {"validation"}


def test_seeds_differ_and_order_of_items_is_kept() -> None:
    whole = make(BASIC)
    first, second = (split_collection(whole, seed=s)["test"] for s in (0, 1))
    assert names(first) != names(second)
    assert names(first) == [n for n in names(whole) if n in set(names(first))]


def test_rare_views_reach_both_parts() -> None:
    """Two stones of ten have a section: one goes to train and one to test."""
    spec = {"a": [{"surface": 4}] * 8 + [{"section": 2}] * 2, "b": [{"surface": 3, "section": 1}] * 5}
    for seed in range(5):
        parts = split_collection(make(spec), test=0.3, seed=seed)
        for part in parts.values():
            assert part.counts()["a"]["section"] > 0


def test_one_stone_stays_in_train_with_a_note_and_one_image_is_an_error() -> None:
    parts = split_collection(make({"a": [{"x": 5}], "b": [{"x": 1}] * 4}))
    assert set(parts["test"].labels) == {"b"}
    assert any("class 'a' has 1 stone:" in note for note in parts["test"].notes)
    with pytest.raises(DataError, match="class 'a' has one image"):
        split_collection(make({"a": [{"x": 1}], "b": [{"x": 1}] * 4}))
    with pytest.raises(DataError, match="class 'z' has no image"):
        split_collection(Collection(items=(), classes=("z",), views=(), stone_known=True, name="set"))


def test_no_test_part_takes_everything() -> None:
    parts = split_collection(make({"a": [{"x": 1}]}), test=0)
    assert len(parts["train"]) == 1
    assert len(parts["test"]) == 0


def test_by_patch_warns_and_shares_stones() -> None:
    with pytest.warns(LeakageWarning, match="patch-level"):
        parts = split_collection(make(BASIC), by="patch")
    assert set(parts["train"].stones) & set(parts["test"].stones)
    assert len(parts["test"]) == 30
    assert parts["train"].split_level == "patch"
    assert any("patch-level" in note for note in parts["test"].notes)


def test_unknown_stones_are_never_claimed_to_be_apart() -> None:
    with pytest.warns(LeakageWarning, match="no stone ids are known"):
        parts = split_collection(make(BASIC, known=False))
    assert all(part.split_level == "patch" for part in parts.values())
    assert any("no stone ids" in note for note in parts["test"].notes)


def test_a_stone_of_two_classes_goes_whole() -> None:
    items = [*make({"a": [{"x": 3}] * 6, "b": [{"x": 3}] * 6}).items]
    items += [
        Item(path=None, array=PIXELS, label=c, view="x", stone="both", name=f"both{c}{n}")
        for c in "ab"
        for n in (1, 2)
    ]
    whole = Collection(items=tuple(items), classes=("a", "b"), views=("x",), stone_known=True, name="set")
    for seed in range(8):
        parts = split_collection(whole, test=0.4, seed=seed)
        assert sum("both" in part.stones for part in parts.values()) == 1


def test_given() -> None:
    spec = {"a": [{"x": 2}] * 4, "b": [{"x": 2}] * 4}
    given_parts = {f"{c}{s}": "test" if s == 3 else "train" for c in "ab" for s in range(4)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parts = split_collection(make(spec, splits=given_parts), by="given", validation=0.3)
    assert set(parts["test"].stones) == {"a3", "b3"}
    assert len(parts["validation"].stones) == 2
    assert len(parts["train"].stones) == 4
    unknown = split_collection(make(spec, splits=given_parts, known=False), by="given")
    assert any("counts as patch-level" in note for note in unknown["test"].notes)


def test_given_that_shares_stones_warns_and_names_them() -> None:
    items = [
        Item(path=None, array=PIXELS, label="a", view="x", stone="s7", split=split, name=split)
        for split in ("train", "test")
    ]
    whole = Collection(items=tuple(items), classes=("a",), views=("x",), stone_known=True, name="set")
    with pytest.warns(LeakageWarning, match="1 stones both .*s7"):
        split_collection(whole, by="given")


def test_given_that_is_incomplete() -> None:
    spec = {"a": [{"x": 2}] * 2}
    with pytest.raises(DataError, match=r"4 images have no split, first a0/x/0"):
        split_collection(make(spec), by="given")
    with pytest.raises(DataError, match="has no test part"):
        split_collection(make(spec, splits={"a0": "train", "a1": "train"}), by="given")


@pytest.mark.parametrize("shots", [1, 3, 5])
def test_shots_come_from_different_stones_and_the_rest_loses_its_labels(shots: int) -> None:
    whole = make(BASIC)
    plain = split_collection(whole, seed=4)
    parts = split_collection(whole, seed=4, shots=shots)
    assert Counter(parts["train"].labels) == dict.fromkeys("abc", shots)
    for label in "abc":
        assert len(parts["train"].filter(labels=(label,)).stones) == shots
    assert set(parts["unlabelled"].labels) == {""}
    assert sorted(names(parts["train"]) + names(parts["unlabelled"])) == sorted(names(plain["train"]))
    assert names(parts["test"]) == names(plain["test"])


def test_more_shots_than_stones_take_views_in_turn() -> None:
    parts = split_collection(make({"a": [{"surface": 9, "section": 9}] * 3}), test=0.3, shots=4)
    counts = parts["train"].counts()["a"]
    assert counts == {"section": 2, "surface": 2}


def test_too_few_images_for_the_shots_are_noted() -> None:
    parts = split_collection(make({"a": [{"x": 1}] * 4}), shots=9)
    assert len(parts["train"]) == 3
    assert len(parts["unlabelled"]) == 0
    assert any("fewer than 9 shots" in note for note in parts["train"].notes)


def test_images_without_a_label_go_to_the_unlabelled_part_unless_their_stone_is_tested() -> None:
    whole = make({"a": [{"x": 2}] * 5, "": [{"x": 3}]})
    tested = split_collection(whole)["test"].stones[0]
    extra = Item(path=None, array=PIXELS, label="", view="x", stone=tested, name="extra")
    parts = split_collection(whole.with_items([*whole.items, extra]))
    assert names(parts["unlabelled"]) == ["none0/x/0", "none0/x/1", "none0/x/2"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"by": "patient"}, "by: 'patient'"),
        ({"test": 1.0}, "test: 1.0"),
        ({"validation": -0.1}, "validation: -0.1"),
        ({"test": 0.5, "validation": 0.5}, "leaves nothing"),
        ({"shots": 0}, "shots: 0"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        split_collection(make(BASIC), **arguments)  # type: ignore[arg-type]
