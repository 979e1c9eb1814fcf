from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import matthews_corrcoef

from stillhouse.genomic.probe import linear_probe, paired_difference, split_groups


def windows(
    seed: int = 0, *, shift: float = 1.0, groups: int = 40, each: int = 5, classes: int = 2
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gaussian classes `shift` apart, in groups."""
    rng = np.random.default_rng(seed)
    marks = np.repeat(np.arange(groups), each)
    y = rng.integers(0, classes, len(marks))
    x = rng.normal(size=(len(marks), 6)) + shift * np.eye(classes, 6)[y]
    return x, y, marks


def test_a_probe_is_a_standardised_logistic_regression() -> None:
    x, y, marks = windows(classes=3)
    train, test = split_groups(marks, test=0.4, seed=1)
    found = linear_probe(x * 50 + 7, y, train=train, test=test, groups=marks, strengths=(0.1,))
    z = (x - x[train].mean(axis=0)) / x[train].std(axis=0)
    oracle = LogisticRegression(C=0.1, max_iter=1000).fit(z[train], y[train])
    np.testing.assert_allclose(found.probabilities, oracle.predict_proba(z[test]), atol=1e-4)
    assert found.mcc.estimate == pytest.approx(matthews_corrcoef(y[test], oracle.predict(z[test])))
    assert found.mcc.low <= found.mcc.estimate <= found.mcc.high
    assert found.to_dict()["groups"] == len(set(marks[test].tolist()))


def test_the_bayes_rate_is_reached() -> None:
    """Two unit Gaussians a distance D apart: the best accuracy is Φ(D/2)."""
    x, y, marks = windows(shift=2.0, groups=800)
    train, test = split_groups(marks, test=0.5)
    found = linear_probe(x, y, train=train, test=test, groups=marks)
    assert found.accuracy.estimate == pytest.approx(0.9214, abs=0.02)  # Φ(√2) = Φ(2·√2 / 2)


def test_noise_scores_chance() -> None:
    x, y, marks = windows(shift=0.0, groups=200)
    train, test = split_groups(marks, test=0.5)
    found = linear_probe(x, y, train=train, test=test, groups=marks)
    assert 0.0 in found.mcc
    assert 0.5 in found.auroc


def test_the_penalty_is_chosen_without_the_test_part() -> None:
    x, y, marks = windows(groups=60)
    train, test = split_groups(marks, test=0.5)
    first = linear_probe(x, y, train=train, test=test, groups=marks)
    turned = y.copy()
    turned[test] = 1 - turned[test]
    noisy = x.copy()
    second = linear_probe(noisy, turned, train=train, test=test, groups=marks)
    assert first.strength == second.strength
    assert first.validation == second.validation
    assert second.mcc.estimate == pytest.approx(-first.mcc.estimate)
    shifted = x.copy()
    shifted[test] += 100.0  # nor is it standardised with it
    third = linear_probe(shifted, y, train=train, test=test, groups=marks)
    assert third.strength == first.strength


def test_folds_hold_whole_groups() -> None:
    """Features that name the group are useless for new groups; leaky folds would trust them."""
    rng = np.random.default_rng(0)
    marks = np.repeat(np.arange(40), 6)
    y = rng.integers(0, 2, 40)[marks]  # a group has one class
    x = np.eye(40)[marks] * 5 + 0.01 * rng.normal(size=(240, 40))
    train, test = split_groups(marks, test=0.4)
    strengths = (1e-4, 1e-2, 1.0, 100.0)
    grouped = linear_probe(x, y, train=train, test=test, groups=marks, strengths=strengths)
    leaky = linear_probe(x, y, train=train, test=test, groups=None, strengths=strengths)
    assert leaky.validation < 0.1
    assert grouped.validation > 0.5


def test_a_constant_feature_is_no_feature() -> None:
    x, y, marks = windows()
    train, test = split_groups(marks, test=0.4)
    x[:, 3] = 12345.678
    x[test[0], 3] = 0.0
    found = linear_probe(x, y, train=train, test=test, groups=marks)
    assert np.isfinite(found.probabilities).all()


def test_paired_difference() -> None:
    x, y, marks = windows(shift=1.5, groups=100)
    train, test = split_groups(marks, test=0.5)
    good = linear_probe(x, y, train=train, test=test, groups=marks)
    poor = linear_probe(x[:, 2:], y, train=train, test=test, groups=marks)
    gain = paired_difference(good, poor, resamples=200)
    assert gain.estimate == pytest.approx(good.mcc.estimate - poor.mcc.estimate)
    assert gain.low > 0
    assert paired_difference(good, good, key="auroc", resamples=200).estimate == 0.0
    other = linear_probe(x, y, train=test, test=train, groups=marks)
    with pytest.raises(ValueError, match="different windows"):
        paired_difference(good, other)


def test_split_groups_keeps_groups_whole() -> None:
    marks = np.array(["a", "b", "b", "c", "d", "d", "e"])
    for seed in range(5):
        train, test = split_groups(marks, test=0.4, seed=seed)
        assert not set(marks[train]) & set(marks[test])
        assert sorted([*train, *test]) == list(range(7))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": [0, 1]}, "share windows"),
        ({"groups": np.zeros(200)}, "share 1 groups"),
        ({"test": [500]}, "different indices"),
        ({"test": []}, "at least one index"),
        ({"strengths": ()}, "strengths"),
        ({"features": np.full((200, 2), np.nan)}, "not finite"),
        ({"labels": np.zeros(3, int)}, "labels"),
        ({"labels": np.r_[np.zeros(100, int), np.ones(100, int)]}, "no window of class 1"),
    ],
)
def test_wrong_probes_are_said(change: dict, message: str) -> None:
    x, y, marks = windows()
    arguments = {
        "features": x,
        "labels": y,
        "groups": marks,
        "train": np.arange(100),
        "test": np.arange(100, 200) if "train" not in change else np.arange(100),
    }
    arguments.update(change)
    with pytest.raises(ValueError, match=message):
        linear_probe(arguments.pop("features"), arguments.pop("labels"), **arguments)
