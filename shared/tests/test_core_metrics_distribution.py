"""Distribution metrics: closed forms, POT as an oracle, and the calibration on a ring of Gaussians."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest

from stillhouse.core.metrics import (
    frechet_distance,
    knn_precision_recall,
    mmd2,
    mode_coverage,
    sliced_wasserstein,
)

COUNT = 2000
ANGLES = 2 * np.pi * np.arange(8) / 8
CENTRES = 2 * np.stack([np.cos(ANGLES), np.sin(ANGLES)], 1)
Floats = npt.NDArray[np.float64]


def ring(seed: int, *, without: tuple[int, ...] = (), std: float = 0.15, count: int = COUNT) -> Floats:
    rng = np.random.default_rng(seed)
    modes = [k for k in range(8) if k not in without]
    return CENTRES[rng.choice(modes, count)] + std * rng.normal(size=(count, 2))


def expected_mmd2(*, without: tuple[int, ...] = (), std: float = 0.15) -> float:
    """By E exp(−‖x − y‖²/2h²) = h²/(h² + s²)·exp(−‖μ − ν‖²/2(h² + s²)), s² the sum of both variances."""
    kept = [k for k in range(8) if k not in without]

    def mean(a: Floats, b: Floats, variance: float) -> float:
        square = ((a[:, None] - b[None]) ** 2).sum(2)
        terms = [
            h * h / (h * h + variance) * np.exp(-square / (2 * (h * h + variance))).mean()
            for h in (0.25, 0.5, 1, 2)
        ]
        return float(np.mean(terms))

    full, part = CENTRES, CENTRES[kept]
    return (
        mean(full, full, 2 * 0.15**2) + mean(part, part, 2 * std**2) - 2 * mean(full, part, 0.15**2 + std**2)
    )


CASES = {
    "one_missing": ({"without": (0,)}, 0.0129, 0.0138),
    "two_missing": ({"without": (0, 1)}, 0.038, 0.040),
    "blurred": ({"std": 0.30}, 0.0057, 0.0060),
    "sharp": ({"std": 0.05}, 0.0028, 0.0025),
}


@pytest.mark.parametrize("name", CASES)
def test_calibration_of_the_kernel_distance(name: str) -> None:
    """Closed form, the value recorded for it, and the estimate over four seeds."""
    options, closed, recorded = CASES[name]
    exact = expected_mmd2(**options)  # type: ignore[arg-type]
    assert exact == pytest.approx(closed, abs=6e-4)
    found = [mmd2(ring(seed), ring(seed + 100, **options)) for seed in range(4)]  # type: ignore[arg-type]
    assert abs(np.mean(found) - exact) < 5 * np.std(found, ddof=1) / math.sqrt(4)
    assert np.mean(found) == pytest.approx(recorded, rel=0.25)
    assert min(found) > 3 * 0.0004  # far above the floor


def test_opposite_missing_modes_weigh_less_than_neighbours() -> None:
    assert expected_mmd2(without=(0, 4)) == pytest.approx(0.025, abs=1e-3)


def test_floor_of_the_kernel_distance_is_unbiased() -> None:
    found = np.array([mmd2(ring(seed), ring(seed + 100)) for seed in range(8)])
    assert abs(found.mean()) < 2e-4
    assert found.std() < 4e-4
    assert found.min() < 0  # an unbiased estimate of 0


def test_sliced_wasserstein_sees_missing_modes_and_neither_blur_nor_sharpness() -> None:
    floor = np.array([sliced_wasserstein(ring(seed), ring(seed + 100)) for seed in range(8)])
    assert floor.mean() == pytest.approx(0.104, abs=0.03)
    missing = sliced_wasserstein(ring(0), ring(100, without=(0,)))
    assert missing == pytest.approx(0.36, abs=0.06)
    for std, recorded in ((0.30, 0.126), (0.05, 0.123)):
        found = np.mean([sliced_wasserstein(ring(s), ring(s + 100, std=std)) for s in range(3)])
        assert found == pytest.approx(recorded, abs=0.06)
        assert found < 0.6 * missing


def test_kernel_distance_equals_its_definition() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(7, 3)), rng.normal(size=(9, 3))

    def kernel(a: Floats, b: Floats) -> float:
        return float(np.mean([math.exp(-((a - b) ** 2).sum() / (2 * h * h)) for h in (0.5, 2.0)]))

    xx = [kernel(x[i], x[j]) for i in range(7) for j in range(7) if i != j]
    yy = [kernel(y[i], y[j]) for i in range(9) for j in range(9) if i != j]
    xy = [kernel(a, b) for a in x for b in y]
    expected = np.mean(xx) + np.mean(yy) - 2 * np.mean(xy)
    assert mmd2(x, y, bandwidths=(0.5, 2.0)) == pytest.approx(float(expected), abs=1e-12)


@pytest.mark.oracle
@pytest.mark.parametrize(("n", "m"), [(50, 50), (50, 30), (7, 64)])
def test_sliced_wasserstein_equals_pot_and_scipy(n: int, m: int) -> None:
    ot = pytest.importorskip("ot")
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(n, 3)), rng.normal(size=(m, 3)) + 0.5
    directions = np.random.default_rng(0).normal(size=(3, 256))
    directions /= np.linalg.norm(directions, axis=0, keepdims=True)
    squares = [ot.wasserstein_1d(x @ d, y @ d, p=2) for d in directions.T]
    assert sliced_wasserstein(x, y) == pytest.approx(math.sqrt(np.mean(squares)), rel=1e-9)


def test_frechet_is_exact_for_known_moments() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(size=(400, 3))
    base = (base - base.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(base.T))).T  # moments 0 and I
    a, b = base * [1.0, 2.0, 3.0], base * [2.0, 2.0, 1.0] + [1.0, 0.0, -1.0]
    expected = 2 + (1 - 2) ** 2 + 0 + (3 - 1) ** 2
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    assert frechet_distance(a @ turn, b @ turn) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-9)
    assert frechet_distance(a[:, :1], b[:, :1]) == pytest.approx(2.0, rel=1e-9)
    flat = a * [1.0, 1.0, 0.0]  # singular covariance
    assert frechet_distance(flat, flat) == pytest.approx(0.0, abs=1e-6)


def test_coverage_counts_modes_weights_and_strays() -> None:
    whole = mode_coverage(ring(0), CENTRES, std=0.15)
    assert (whole.covered, whole.modes) == (8, 8)
    assert whole.kl < 0.01
    assert whole.within == pytest.approx(1 - math.exp(-4.5), abs=0.01)  # Rayleigh
    part = mode_coverage(ring(0, without=(2, 5)), CENTRES, std=0.15)
    assert part.covered == 6
    assert part.kl == pytest.approx(math.log(8 / 6), abs=0.01)
    assert mode_coverage(ring(0, std=0.3), CENTRES, std=0.15).within < 0.75
    weights = np.arange(1, 9)
    assert mode_coverage(ring(0), CENTRES, std=0.15, weights=weights).kl > 0.1


def test_precision_sees_strays_and_recall_missing_modes() -> None:
    real = ring(0, count=800)
    good = knn_precision_recall(ring(1, count=800), real)
    assert good.precision > 0.9
    assert good.recall > 0.9
    missing = knn_precision_recall(ring(1, without=(0, 1), count=800), real)
    assert missing.precision > 0.9
    assert missing.recall == pytest.approx(0.75, abs=0.06)
    blurred = knn_precision_recall(ring(1, std=0.4, count=800), real)
    assert blurred.precision < 0.7


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = ring(0, count=300), ring(1, count=200)
    whole = mmd2(x, y), knn_precision_recall(x, y)
    monkeypatch.setattr("stillhouse.core.metrics.distribution._BLOCK", 1000)
    assert mmd2(x, y) == pytest.approx(whole[0], rel=1e-12)
    assert knn_precision_recall(x, y) == whole[1]


def test_bad_samples_are_named() -> None:
    good = np.zeros((4, 2))
    for function in (mmd2, sliced_wasserstein, frechet_distance):
        with pytest.raises(ValueError, match="x has shape"):
            function(good[:0], good)
        with pytest.raises(ValueError, match="y holds NaN"):
            function(good, good * np.nan)
        with pytest.raises(ValueError, match="columns"):
            function(good, good[:, :1])
    with pytest.raises(ValueError, match="bandwidths"):
        mmd2(good, good, bandwidths=(0.0,))
    with pytest.raises(ValueError, match="projections"):
        sliced_wasserstein(good, good, projections=0)
    with pytest.raises(ValueError, match="real has shape"):
        knn_precision_recall(good, good[:3])
    with pytest.raises(ValueError, match="weights"):
        mode_coverage(good, good, std=1.0, weights=[1.0])
