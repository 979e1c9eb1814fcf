from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from stillhouse.kidney.metrics import (
    class_prototypes,
    euclidean,
    evaluate_embeddings,
    fuse_views,
    kshot_new_class,
    nearest,
    prototype_logits,
    retrieval,
    retrieval_per_query,
    unknown_detection,
    vote,
)


def ranked(hits: list[int]) -> tuple[torch.Tensor, list[int], torch.Tensor, list[int]]:
    """A query of class 1 at the origin and references at growing distance, of class 1 where `hits` is 1."""
    query = torch.zeros(1, 1)
    reference = torch.arange(1.0, len(hits) + 1)[:, None]
    return query, [1], reference, [1 if hit else 0 for hit in hits]


# ---- retrieval


def test_closed_case_of_the_specification() -> None:
    # ranked hits [1, 0, 1, …], R = 3: MAP@R (1 + 0 + 2/3)/3, R-precision 2/3, P@1 = 1
    found = retrieval(*ranked([1, 0, 1, 0, 0, 1]))
    assert found["mean_average_precision_at_r"] == pytest.approx((1 + 0 + 2 / 3) / 3)
    assert found["r_precision"] == pytest.approx(2 / 3)
    assert found["precision_at_1"] == 1.0


def test_a_miss_first_costs_precision_at_one_and_its_place_in_map() -> None:
    found = retrieval(*ranked([0, 1, 1, 0]))  # R = 2: only rank 2 counts, P@2 = 1/2
    assert found["precision_at_1"] == 0.0
    assert found["r_precision"] == pytest.approx(1 / 2)
    assert found["mean_average_precision_at_r"] == pytest.approx(1 / 4)


def test_identical_embeddings_within_a_class_are_perfect() -> None:
    centres = normalize(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    labels = torch.tensor([0, 0, 1, 1, 1, 2, 2, 2, 2, 3])  # class 3 is lone
    found = retrieval(centres[labels], labels)
    assert found["precision_at_1"] == found["mean_average_precision_at_r"] == found["r_precision"] == 1.0
    assert found["lone_labels"] == [3]
    for c in range(3):
        own = (labels == c).numpy()
        assert (found["per_query"]["mean_average_precision_at_r"][own] == 1).all()
    assert np.isnan(found["per_query"]["precision_at_1"][9])


@pytest.mark.oracle
@pytest.mark.parametrize("itself", [True, False])
@pytest.mark.parametrize("macro", [True, False])
def test_per_query_scores_average_to_the_accuracy_calculator(itself: bool, macro: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, 6, (60,), generator=generator)
    labels[0] = 6  # lone when searching itself, and without a reference otherwise
    query = normalize(torch.randn(60, 5, generator=generator) + 0.7 * torch.eye(7)[labels][:, :5], dim=1)
    other_labels = torch.randint(0, 6, (41,), generator=generator)
    other = normalize(torch.randn(41, 5, generator=generator), dim=1)
    found = (
        retrieval(query, labels, macro=macro)
        if itself
        else retrieval(query, labels, other, other_labels, macro=macro)
    )
    assert found["lone_labels"] == [6]
    for name, values in found["per_query"].items():
        if macro:
            mine = np.mean([values[(labels == c).numpy()].mean() for c in range(6)])
        else:
            mine = np.nanmean(values)
        assert found[name] == pytest.approx(float(mine), abs=1e-9)


def test_all_queries_lone_gives_nan() -> None:
    found = retrieval(torch.eye(2), [0, 1])
    assert np.isnan(found["precision_at_1"])
    assert found["lone_labels"] == [0, 1]


def test_too_few_neighbours_are_refused() -> None:
    with pytest.raises(ValueError, match="neighbour_labels has 1 columns; R goes up to 2"):
        retrieval_per_query(torch.tensor([[0]]), torch.tensor([0]), torch.tensor([2]))


def test_nearest_is_exact_and_stable() -> None:
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(50, 7, generator=generator), torch.randn(80, 7, generator=generator)
    distances, indices = nearest(a, b, 5)
    full = np.linalg.norm(a.numpy()[:, None] - b.numpy()[None], axis=2)
    assert (indices.numpy() == np.argsort(full, axis=1, kind="stable")[:, :5]).all()
    np.testing.assert_allclose(distances.numpy(), np.sort(full, axis=1)[:, :5], rtol=1e-5)
    same = torch.zeros(4, 3)
    assert nearest(same, same, 3, exclude_self=True)[1].tolist() == [
        [1, 2, 3],
        [0, 2, 3],
        [0, 1, 3],
        [0, 1, 2],
    ]
    with pytest.raises(ValueError, match="k is 9"):
        nearest(same, same, 9)


def test_euclidean_keeps_small_distances() -> None:
    base = normalize(torch.randn(60, 128, generator=torch.Generator().manual_seed(0)), dim=1)
    shifted = base.clone()
    shifted[:, 0] += 1e-4
    assert euclidean(base, shifted).diagonal() == pytest.approx(1e-4, rel=1e-2)


def test_vote_ties_go_to_the_nearer_class() -> None:
    neighbours = torch.tensor([[0, 1, 1, 0], [2, 1, 1, 2]])
    distances = torch.tensor([[0.1, 0.2, 0.3, 0.9], [0.1, 0.3, 0.4, 0.5]])
    assert vote(neighbours, distances, 3).tolist() == [1, 2]  # means .5 against .25; .3 against .35


def test_prototypes_are_plain_means_and_logits_are_scaled_squares() -> None:
    embeddings = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    present, prototypes = class_prototypes(embeddings, [3, 3, 5])
    assert present.tolist() == [3, 5]
    assert prototypes.tolist() == [[0.5, 0.5], [-1.0, 0.0]]
    logits = prototype_logits(embeddings[:1], prototypes, temperature=0.5)
    torch.testing.assert_close(logits, torch.tensor([[-1.0, -8.0]]))
    with pytest.raises(ValueError, match="temperature is 0"):
        prototype_logits(embeddings, prototypes, 0)


# ---- evaluation


def small_case() -> dict[str, object]:
    """Two classes on a line: gallery at 0 and 10; five queries of three stones, of which one goes wrong."""
    return {
        "query": torch.tensor([[0.0], [1.0], [9.0], [10.0], [8.0]]),
        "query_labels": [0, 0, 1, 1, 0],
        "gallery": torch.tensor([[0.0], [0.5], [10.0]]),
        "gallery_labels": [0, 0, 1],
        "classes": ("WW", "UA", "CYS"),
        "groups": ["a", "a", "b", "b", "c"],
    }


def test_evaluation_by_hand() -> None:
    result = evaluate_embeddings(**small_case(), k=3)  # type: ignore[arg-type]
    assert result["accuracy"]["estimate"] == pytest.approx(4 / 5)
    assert result["per_class"]["WW"] == {
        "recall": pytest.approx(2 / 3),
        "precision": 1.0,
        "items": 3,
        "stones": 2,
    }
    assert result["per_class"]["UA"] == {
        "recall": 1.0,
        "precision": pytest.approx(2 / 3),
        "items": 2,
        "stones": 1,
    }
    assert result["macro_f1"] == pytest.approx((0.8 + 0.8) / 2)
    assert result["confusion"] == {"classes": ["WW", "UA"], "counts": [[2, 1], [0, 2]]}
    assert result["accuracy_knn"]["estimate"] == pytest.approx(
        3 / 5
    )  # three neighbours are always two WW and one UA
    assert result["precision_at_1"]["estimate"] == pytest.approx(4 / 5)
    assert (result["items"], result["stones"], result["resampled"], result["lone"]) == (5, 3, "stones", [])
    assert result["accuracy"]["low"] <= 0.8 <= result["accuracy"]["high"]
    json.dumps(result, allow_nan=False)


def test_interval_over_stones_is_wider_than_over_images() -> None:
    rng = np.random.default_rng(0)
    stones = np.repeat(np.arange(12), 20)
    right = np.repeat(rng.random(12) < 0.7, 20)
    labels = np.zeros(240, dtype=np.int64)
    query = torch.tensor(np.where(right, 0.0, 1.0), dtype=torch.float32)[:, None]
    common = {"gallery": torch.tensor([[0.0], [1.0]]), "gallery_labels": [0, 1], "classes": ("A", "B")}
    width = {}
    for name, groups in (("stones", [str(s) for s in stones]), ("images", None)):
        got = evaluate_embeddings(query, labels, groups=groups, **common)  # type: ignore[arg-type]
        assert got["resampled"] == name
        width[name] = got["accuracy"]["high"] - got["accuracy"]["low"]
    assert width["stones"] > 3 * width["images"]


def test_lone_classes_leave_every_score() -> None:
    case = small_case()
    case["query"] = torch.cat([case["query"], torch.tensor([[20.0]])])  # type: ignore[list-item]
    case["query_labels"] = [*case["query_labels"], 2]  # type: ignore[misc]
    case["groups"] = [*case["groups"], "d"]  # type: ignore[misc]
    result = evaluate_embeddings(**case)  # type: ignore[arg-type]
    assert result["lone"] == ["CYS"]
    assert result["items"] == 5
    assert result["accuracy"]["estimate"] == pytest.approx(4 / 5)
    with pytest.raises(ValueError, match="no query class is in the gallery: CYS"):
        evaluate_embeddings(torch.zeros(1, 1), [2], torch.zeros(1, 1), [0], classes=("WW", "UA", "CYS"))


def test_one_class_asked_and_always_answered_is_a_matrix_of_one() -> None:
    gallery = torch.tensor([[0.0], [9.0]])
    scores = evaluate_embeddings(torch.tensor([[0.1], [0.2]]), [0, 0], gallery, [0, 1], classes=("A", "B"))
    assert scores["confusion"] == {"classes": ["A"], "counts": [[2]]}


def test_all_right_still_has_a_width_and_one_stone_has_no_interval() -> None:
    embeddings, labels = torch.eye(2).repeat(5, 1), [0, 1] * 5
    result = evaluate_embeddings(
        embeddings, labels, torch.eye(2), [0, 1], classes=("A", "B"), groups=[str(i) for i in range(10)]
    )
    assert result["accuracy"]["estimate"] == 1.0
    assert result["accuracy"]["high"] == pytest.approx(1.0)
    assert 0.6 < result["accuracy"]["low"] < 0.8  # Wilson for 10 of 10: 0.72
    alone = evaluate_embeddings(
        embeddings, labels, torch.eye(2), [0, 1], classes=("A", "B"), groups=["s"] * 10
    )
    assert alone["accuracy"] == {"estimate": 1.0, "low": None, "high": None}


def test_views_are_scored_apart_and_fused() -> None:
    # surface tells A from B by its sign, section says nothing; a stone's fused embedding is right again
    surface = {"A": [1.0, 0.0, 0.0], "B": [0.0, 1.0, 0.0]}
    section = [0.0, 0.0, 1.0]
    query, labels, stones, views = [], [], [], []
    for index, name in enumerate("AB"):
        for stone in range(3):
            for view in ("surface", "section"):
                query.append(surface[name] if view == "surface" else section)
                labels.append(index)
                stones.append(f"{name}{stone}")
                views.append(view)
    result = evaluate_embeddings(
        torch.tensor(query),
        labels,
        torch.tensor(query),
        labels,
        classes=("A", "B"),
        groups=stones,
        views=views,
        gallery_groups=[f"g{s}" for s in stones],
        gallery_views=views,
    )
    assert result["per_view"]["surface"]["accuracy"]["estimate"] == 1.0
    assert result["per_view"]["section"]["accuracy"]["estimate"] == 0.5
    assert result["fused"]["accuracy"]["estimate"] == 1.0
    assert (
        result["fused"]["items"],
        result["fused"]["complete_stones"],
        result["fused"]["mixed_stones"],
    ) == (6, 6, 0)
    json.dumps(result, allow_nan=False)


def test_a_stone_of_two_classes_is_not_fused() -> None:
    embeddings = torch.eye(2).repeat(3, 1)
    result = evaluate_embeddings(
        embeddings,
        [0, 1, 0, 0, 1, 1],
        embeddings,
        [0, 0, 1, 1, 1, 1],
        classes=("A", "B"),
        groups=["mixed", "mixed", "a", "a", "b", "b"],
        views=["v", "w"] * 3,
        gallery_groups=["x", "x", "y", "y", "y", "y"],
        gallery_views=["v", "w"] * 3,
    )
    assert (result["fused"]["items"], result["fused"]["mixed_stones"]) == (2, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.tensor([[0.0], [float("nan")], [0.0], [0.0], [0.0]])}, r"query\[1\] holds NaN"),
        ({"query_labels": [0, 1]}, "5 embeddings, 2 labels"),
        ({"query_labels": [0, 0, 1, 1, -1]}, "query_labels holds -1"),
        ({"gallery_labels": [0, 0, 7]}, "gallery_labels holds 7, but classes has 3"),
        ({"groups": ["a"]}, "groups must hold one name per embedding"),
        ({"gallery": torch.zeros(3, 2)}, "1 and 2 dimensions"),
    ],
)
def test_bad_arguments_name_themselves(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_embeddings(**{**small_case(), **change})  # type: ignore[arg-type]


# ---- fusion


def test_fusion_rules_by_hand() -> None:
    embeddings = torch.tensor([[3.0, 0.0], [1.0, 0.0], [0.0, 4.0], [0.0, 1.0]])
    stones, views = ["s", "s", "s", "t"], ["surface", "surface", "section", "section"]
    by = {how: fuse_views(embeddings, stones, views, how) for how in ("max", "mean", "concat")}
    # the two surface patches of s average to (2, 0); views in order section, surface
    torch.testing.assert_close(by["max"].embeddings[0], normalize(torch.tensor([2.0, 4.0]), dim=0))
    torch.testing.assert_close(by["mean"].embeddings[0], normalize(torch.tensor([1.0, 2.0]), dim=0))
    torch.testing.assert_close(
        by["concat"].embeddings[0], normalize(torch.tensor([0.0, 4.0, 2.0, 0.0]), dim=0)
    )
    torch.testing.assert_close(by["concat"].embeddings[1], torch.tensor([0.0, 1.0, 0.0, 0.0]))
    assert by["max"].stones == ("s", "t")
    assert by["max"].complete.tolist() == [True, False]
    assert by["max"].rows == ((0, 1, 2), (3,))


def test_fusion_does_not_depend_on_the_order_of_the_rows() -> None:
    generator = torch.Generator().manual_seed(5)
    embeddings = torch.randn(12, 4, generator=generator)
    stones, views = [f"s{i % 3}" for i in range(12)], ["a" if i % 2 else "b" for i in range(12)]
    order = torch.randperm(12, generator=generator).tolist()
    first = fuse_views(embeddings, stones, views, "concat")
    second = fuse_views(embeddings[order], [stones[i] for i in order], [views[i] for i in order], "concat")
    torch.testing.assert_close(first.embeddings, second.embeddings)


def test_fusion_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="how is 'sum'; choose one of max, mean, concat"):
        fuse_views(torch.eye(2), ["a", "b"], ["u", "v"], "sum")
    with pytest.raises(ValueError, match="'w', which is not one of u, v"):
        fuse_views(torch.eye(2), ["a", "b"], ["u", "w"], all_views=("u", "v"))


# ---- new classes


def cluster(
    centres: torch.Tensor, stones: int, images: int, noise: float
) -> tuple[torch.Tensor, list[int], list[str]]:
    generator = torch.Generator().manual_seed(0)
    labels = [c for c in range(len(centres)) for _ in range(stones * images)]
    names = [f"{c}/{s}" for c in range(len(centres)) for s in range(stones) for _ in range(images)]
    spread = torch.randn(len(labels), centres.shape[1], generator=generator)
    return normalize(centres[labels] + noise * spread, dim=1), labels, names


def test_new_classes_that_lie_apart_are_learnt_from_one_shot() -> None:
    embeddings, labels, stones = cluster(torch.eye(3, 8), 4, 3, 0.01)
    result = kshot_new_class(embeddings, labels, shots=1, groups=stones, episodes=20)
    assert result["accuracy"]["estimate"] == result["precision_at_1"]["estimate"] == 1.0
    assert result["accuracy"]["low"] < 1.0
    assert result["chance"] == pytest.approx(1 / 3)
    json.dumps(result, allow_nan=False)


def test_noise_alone_is_at_chance() -> None:
    embeddings, labels, stones = cluster(torch.zeros(4, 16), 8, 4, 1.0)
    result = kshot_new_class(embeddings, labels, shots=5, groups=stones, episodes=60)
    assert abs(result["accuracy"]["estimate"] - 0.25) < 0.06


def test_queries_never_share_a_stone_with_the_support() -> None:
    # images of a stone are identical and stones are random: knowing the stone would give 1.0
    generator = torch.Generator().manual_seed(2)
    per_stone = normalize(torch.randn(40, 32, generator=generator), dim=1)
    embeddings = per_stone.repeat_interleave(3, 0)
    labels = [0] * 60 + [1] * 60
    stones = [str(i) for i in range(40) for _ in range(3)]
    apart = kshot_new_class(embeddings, labels, shots=10, groups=stones, episodes=60)
    leaky = kshot_new_class(embeddings, labels, shots=10, episodes=60)
    assert apart["precision_at_1"]["estimate"] < 0.65
    assert leaky["precision_at_1"]["estimate"] > apart["precision_at_1"]["estimate"] + 0.1


def test_known_classes_compete() -> None:
    embeddings, labels, stones = cluster(torch.eye(2, 8), 4, 3, 0.01)
    far = kshot_new_class(embeddings, labels, shots=2, groups=stones, known=-torch.eye(2, 8), episodes=10)
    near = kshot_new_class(embeddings, labels, shots=2, groups=stones, known=embeddings, episodes=10)
    assert far["accuracy_among_all"]["estimate"] == 1.0
    assert near["accuracy_among_all"]["estimate"] == 0.0


def test_too_few_shots_say_what_is_missing() -> None:
    with pytest.raises(ValueError, match="class 1 has 3 images of 1 stones"):
        kshot_new_class(
            torch.eye(7), [0, 0, 0, 0, 1, 1, 1], shots=1, groups=["a", "b", "c", "d", "e", "e", "e"]
        )
    with pytest.raises(ValueError, match="two new classes"):
        kshot_new_class(torch.eye(3), [0, 0, 0], shots=1)


# ---- unknown classes


def test_auroc_by_hand() -> None:
    # distances known 0, 2, 4; unknown 1, 5: pairs in order are (0,1), (0,5), (2,5), (4,5) of six
    result = unknown_detection(
        torch.tensor([[0.0], [2.0], [4.0]]), torch.tensor([[1.0], [5.0]]), torch.zeros(1, 1), threshold=3.0
    )
    assert result["auroc"]["estimate"] == pytest.approx(4 / 6)
    assert result["auroc"]["low"] <= 4 / 6 <= result["auroc"]["high"]
    assert result["false_unknown_rate"] == pytest.approx(1 / 3)
    assert result["detected_rate"] == pytest.approx(1 / 2)
    assert result["fpr_at_95_tpr"] == pytest.approx(2 / 3)


def test_auroc_interval_covers_stones_and_ties_count_half() -> None:
    same = unknown_detection(torch.zeros(4, 1), torch.zeros(5, 1), torch.zeros(1, 1))
    assert same["auroc"] == {"estimate": 0.5, "low": 0.5, "high": 0.5}
    rng = np.random.default_rng(1)
    known = torch.tensor(np.repeat(rng.normal(0, 1, 10), 30), dtype=torch.float32).abs()[:, None]
    unknown = torch.tensor(np.repeat(rng.normal(1.5, 1, 10), 30), dtype=torch.float32).abs()[:, None]
    names = [str(i) for i in range(10) for _ in range(30)]
    by_image = unknown_detection(known, unknown, torch.zeros(1, 1))["auroc"]
    by_stone = unknown_detection(known, unknown, torch.zeros(1, 1), known_groups=names, unknown_groups=names)[
        "auroc"
    ]
    assert by_image["estimate"] == by_stone["estimate"]
    assert by_stone["high"] - by_stone["low"] > 2 * (by_image["high"] - by_image["low"])
    one = unknown_detection(known, unknown, torch.zeros(1, 1), unknown_groups=["u"] * 300)["auroc"]
    assert (one["low"], one["high"]) == (None, None)


def test_empty_sets_are_refused() -> None:
    with pytest.raises(ValueError, match="3 known and 0 unknown"):
        unknown_detection(torch.zeros(3, 1), torch.zeros(0, 1), torch.zeros(1, 1))
