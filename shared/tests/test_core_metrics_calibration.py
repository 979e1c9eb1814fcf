from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax

from stillhouse.core.metrics import (
    brier_score,
    expected_calibration_error,
    fit_temperature,
    negative_log_likelihood,
    reliability_curve,
)


def sample(items: int, classes: int, *, scale: float = 2.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and labels drawn from their softmax: calibrated at temperature 1."""
    rng = np.random.default_rng(seed)
    logits = scale * rng.normal(size=(items, classes))
    labels = (softmax(logits, axis=1).cumsum(axis=1) < rng.random((items, 1))).sum(axis=1)
    return logits, labels.clip(max=classes - 1)


def slow_error(p: np.ndarray, y: np.ndarray, bins: int) -> float:
    total = 0.0
    for k in range(bins):
        inside = [i for i in range(len(y)) if k / bins < p[i].max() <= (k + 1) / bins]
        if inside:
            right = sum(int(p[i].argmax() == y[i]) for i in inside) / len(inside)
            total += len(inside) / len(y) * abs(right - sum(p[i].max() for i in inside) / len(inside))
    return total


def test_a_case_by_hand() -> None:
    p = np.array([[0.95, 0.05], [0.85, 0.15], [0.3, 0.7], [0.45, 0.55]])
    y = np.array([0, 1, 1, 0])
    curve = reliability_curve(p, y, bins=5)  # (0.4, 0.6]: wrong; (0.6, 0.8]: right; (0.8, 1]: one of two
    np.testing.assert_allclose(curve.confidence, [0.55, 0.7, 0.9])
    np.testing.assert_allclose(curve.accuracy, [0, 1, 0.5])
    assert curve.count.tolist() == [1, 1, 2]
    np.testing.assert_allclose(curve.edges, [[0.4, 0.6], [0.6, 0.8], [0.8, 1.0]])
    assert curve.error == pytest.approx(0.25 * 0.55 + 0.25 * 0.3 + 0.5 * 0.4)
    assert curve.worst == pytest.approx(0.55)
    assert expected_calibration_error(p, y, bins=1) == pytest.approx(
        abs(0.5 - (0.95 + 0.85 + 0.7 + 0.55) / 4)
    )
    mass = reliability_curve(p, y, bins=2, scheme="mass")
    np.testing.assert_allclose(mass.confidence, [0.625, 0.9])
    np.testing.assert_allclose(mass.edges, [[0.55, 0.7], [0.85, 0.95]])


@pytest.mark.parametrize("bins", [1, 7, 15])
def test_equal_width_is_the_definition_written_out(bins: int) -> None:
    logits, labels = sample(500, 4)
    p = softmax(1.7 * logits, axis=1)
    assert expected_calibration_error(p, labels, bins=bins) == pytest.approx(
        slow_error(p, labels, bins), abs=1e-12
    )


@pytest.mark.oracle
@pytest.mark.parametrize(("scheme", "strategy"), [("width", "uniform"), ("mass", "quantile")])
def test_scikit_learn_draws_the_same_curve(scheme: str, strategy: str) -> None:
    from sklearn.calibration import calibration_curve

    logits, labels = sample(1500, 3, seed=2)
    p = softmax(logits, axis=1)
    accuracy, confidence = calibration_curve(p.argmax(1) == labels, p.max(1), n_bins=15, strategy=strategy)
    curve = reliability_curve(p, labels, bins=15, scheme=scheme)
    np.testing.assert_allclose(curve.accuracy, accuracy, atol=1e-12)
    np.testing.assert_allclose(curve.confidence, confidence, atol=1e-12)


@pytest.mark.oracle
def test_scikit_learn_gives_the_same_scores() -> None:
    from sklearn.metrics import brier_score_loss, log_loss

    logits, labels = sample(400, 3, seed=3)
    p = softmax(logits, axis=1)
    one_class = [brier_score_loss(labels == c, p[:, c]) for c in range(3)]
    assert brier_score(p, labels) == pytest.approx(sum(one_class), rel=1e-12)
    two = softmax(logits[:, :2], axis=1)
    right = (labels == 1).astype(int)
    assert brier_score(two, right) == pytest.approx(2 * brier_score_loss(right, two[:, 1]), rel=1e-12)
    assert negative_log_likelihood(logits, labels) == pytest.approx(log_loss(labels, p), rel=1e-9)
    cooled = softmax(logits / 2.5, axis=1)
    assert negative_log_likelihood(logits, labels, temperature=2.5) == pytest.approx(
        log_loss(labels, cooled), rel=1e-9
    )


@pytest.mark.parametrize("scheme", ["width", "mass"])
def test_calibrated_predictions_have_no_error_and_overconfident_ones_do(scheme: str) -> None:
    logits, labels = sample(60_000, 5)
    assert expected_calibration_error(softmax(logits, axis=1), labels, scheme=scheme) < 0.01
    assert expected_calibration_error(softmax(3 * logits, axis=1), labels, scheme=scheme) > 0.1


def test_extremes() -> None:
    sure = np.eye(3)
    assert brier_score(sure, [0, 1, 2]) == 0.0
    assert brier_score(sure, [1, 2, 0]) == 2.0
    assert expected_calibration_error(sure, [1, 2, 0]) == 1.0
    assert expected_calibration_error(sure, [0, 1, 2]) == 0.0
    ruled_out = np.array([[0.0, -np.inf], [1000.0, -1000.0]])
    assert negative_log_likelihood(ruled_out, [0, 0]) == 0.0
    assert negative_log_likelihood(ruled_out, [1, 0]) == np.inf
    few = reliability_curve(np.array([[0.9, 0.1], [0.6, 0.4]]), [0, 0], bins=15, scheme="mass")
    assert few.count.tolist() == [1, 1]


@settings(max_examples=50, deadline=None)
@given(st.floats(0.3, 12.0), st.integers(51, 98))
def test_temperature_of_two_classes_in_closed_form(gap: float, right: int) -> None:
    """All margins equal `gap` and `right` of 100 are right: σ(gap / T) = right / 100."""
    logits = np.tile([gap, 0.0], (100, 1))
    labels = np.array([0] * right + [1] * (100 - right))
    expected = gap / np.log(right / (100 - right))
    fitted = fit_temperature(logits, labels, low=1e-3, high=1e4)
    assert fitted == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("true", [0.4, 1.0, 3.0])
def test_the_temperature_that_made_the_labels_is_found(true: float) -> None:
    logits, labels = sample(40_000, 6)
    fitted = fit_temperature(logits * true, labels)
    assert fitted == pytest.approx(true, rel=0.03)
    p = softmax(logits * true / fitted, axis=1)
    assert expected_calibration_error(p, labels) < 0.01


@pytest.mark.oracle
def test_a_numerical_minimiser_finds_nothing_better() -> None:
    logits, labels = sample(300, 4, seed=9)
    logits = 2.3 * logits
    fitted = fit_temperature(logits, labels)
    found = scipy.optimize.minimize_scalar(
        lambda t: negative_log_likelihood(logits, labels, temperature=t),
        bounds=(0.05, 20),
        method="bounded",
        options={"xatol": 1e-10},
    )
    assert fitted == pytest.approx(found.x, rel=1e-5)
    assert negative_log_likelihood(logits, labels, temperature=fitted) <= found.fun + 1e-14


def test_ruled_out_classes_do_not_disturb_the_temperature() -> None:
    logits, labels = sample(200, 3, seed=4)
    wider = np.concatenate([2 * logits, np.full((200, 2), -np.inf)], axis=1)
    assert fit_temperature(wider, labels) == pytest.approx(fit_temperature(2 * logits, labels), rel=1e-10)
    shifted = 2 * logits + 1e4 * np.random.default_rng(0).normal(size=(200, 1))
    assert fit_temperature(shifted, labels) == pytest.approx(fit_temperature(2 * logits, labels), rel=1e-6)


def test_a_bound_is_returned_with_a_warning() -> None:
    right, wrong = np.array([[3.0, 0.0], [0.0, 2.0]]), np.array([[0.0, 3.0], [2.0, 0.0]])
    with pytest.warns(UserWarning, match=r"below 0\.05"):
        assert fit_temperature(right, [0, 1]) == 0.05
    with pytest.warns(UserWarning, match="above 20"):
        assert fit_temperature(wrong, [0, 1]) == 20.0


GOOD = [[0.5, 0.5], [0.2, 0.8]]


@pytest.mark.parametrize(
    ("probabilities", "labels", "options", "message"),
    [
        ([[0.5, 0.6]], [0], {}, "miss 1 by up to 0.1"),
        ([[2.0, -1.0]], [0], {}, "outside"),
        ([[np.nan, 0.5]], [0], {}, "outside"),
        ([0.5, 0.5], [0], {}, r"shape \(2,\)"),
        (np.zeros((0, 2)), [], {}, r"shape \(0, 2\)"),
        (GOOD, [0], {}, r"labels has shape \(1,\)"),
        (GOOD, [0.0, 1.0], {}, "give integers"),
        (GOOD, [0, 2], {}, "run from 0 to 2; with 2 classes"),
        (GOOD, [-1, 0], {}, "run from -1"),
        (GOOD, [0, 1], {"bins": 0}, "bins is 0"),
        (GOOD, [0, 1], {"scheme": "depth"}, "'width' or 'mass'"),
    ],
)
def test_wrong_probabilities(probabilities: object, labels: object, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expected_calibration_error(probabilities, labels, **options)


@pytest.mark.parametrize(
    ("logits", "labels", "options", "message"),
    [
        ([[np.nan, 0.0]], [0], {}, "NaN"),
        ([[np.inf, 0.0]], [0], {}, "inf"),
        ([[-np.inf, -np.inf]], [0], {}, "alone"),
        ([[-np.inf, 0.0]], [0], {}, "at the label"),
        ([[1.0, 1.0], [2.0, 2.0]], [0, 1], {}, "constant in every row"),
        ([[1.0, 0.0]], [0], {"low": 2.0, "high": 1.0}, "0 < low < high"),
    ],
)
def test_wrong_logits(logits: object, labels: object, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_temperature(logits, labels, **options)
    with pytest.raises(ValueError, match="temperature is 0"):
        negative_log_likelihood([[1.0, 0.0]], [0], temperature=0)
