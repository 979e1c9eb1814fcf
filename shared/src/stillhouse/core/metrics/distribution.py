"""How far one set of samples is from another: MMD², sliced Wasserstein, Fréchet, modes, precision and recall.

Samples are arrays `[N, D]`; tensors are taken as well. Compare a student with samples of its *teacher* at
many steps, over several seeds, beside the floor that two draws of the teacher give.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
_BLOCK = 8_000_000  # entries of a block of distances: 64 MB


def mmd2(x: npt.ArrayLike, y: npt.ArrayLike, *, bandwidths: Sequence[float] = (0.25, 0.5, 1.0, 2.0)) -> float:
    """Unbiased squared maximum mean discrepancy with a mean of Gaussian kernels.

    E k(x, x′) + E k(y, y′) − 2·E k(x, y) over distinct pairs, k = mean_h exp(−‖x − y‖²/(2h²)). It is 0 in the
    mean where the distributions agree, and may be a little below 0 then.

    Args:
        x: `[N, D]`, N ≥ 2.
        y: `[M, D]`, M ≥ 2.
        bandwidths: h > 0, in the units of the data; they have to fit the scale of what is looked for.

    Returns:
        The estimate, about −1 … 2.

    Source: Gretton et al., A Kernel Two-Sample Test, JMLR 2012, equation 3.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> x, y = rng.normal(size=(500, 2)), rng.normal(size=(500, 2))
        >>> abs(mmd2(x, y)) < 0.005 < mmd2(x, y + 1)
        True
    """
    a, b = _pair(x, y, least=2)
    if not bandwidths or min(bandwidths) <= 0:
        raise ValueError(f"bandwidths is {bandwidths!r}; give numbers > 0")
    n, m = len(a), len(b)
    within = (_kernel_sum(a, a, bandwidths) - n) / (n * (n - 1))
    other = (_kernel_sum(b, b, bandwidths) - m) / (m * (m - 1))
    return float(within + other - 2 * _kernel_sum(a, b, bandwidths) / (n * m))


def sliced_wasserstein(x: npt.ArrayLike, y: npt.ArrayLike, *, projections: int = 256, seed: int = 0) -> float:
    """Root of the mean squared Wasserstein-2 distance of random one-dimensional projections.

    Args:
        x: `[N, D]`.
        y: `[M, D]`; M may differ from N, the step functions are then matched exactly.
        projections: number of directions.
        seed: of the directions.

    Returns:
        Distance in the units of the data, ≥ 0. Its floor at finite N is far from 0.

    Source: Bonneel et al., Sliced and Radon Wasserstein Barycenters, 2015.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(100, 1))
        >>> round(sliced_wasserstein(x, x + 3), 6)
        3.0
    """
    a, b = _pair(x, y, least=1)
    if projections < 1:
        raise ValueError(f"projections is {projections}; give at least 1")
    directions = np.random.default_rng(seed).normal(size=(a.shape[1], projections))
    directions /= np.linalg.norm(directions, axis=0, keepdims=True)
    p, q = np.sort(a @ directions, axis=0), np.sort(b @ directions, axis=0)
    n, m = len(p), len(q)
    if n == m:
        return float(np.sqrt(np.mean((p - q) ** 2)))
    # both quantile functions are constant between consecutive levels of either
    levels = np.unique(np.concatenate([np.arange(n + 1) * m, np.arange(m + 1) * n]))  # in units of 1/(n·m)
    widths = np.diff(levels) / (n * m)
    left = levels[:-1]
    gaps = (p[left // m] - q[left // n]) ** 2
    return float(np.sqrt(np.mean(widths @ gaps)))


def frechet_distance(x: npt.ArrayLike, y: npt.ArrayLike) -> float:
    """‖μ_x − μ_y‖² + tr(Σ_x + Σ_y − 2·(Σ_x·Σ_y)^½) of Gaussian fits: the FID's formula, on any features.

    Args:
        x: `[N, D]`, N ≥ 2.
        y: `[M, D]`, M ≥ 2.

    Returns:
        Squared distance in the units of the data squared, ≥ 0; biased upwards when N is small beside D.

    Source: Heusel et al., 2017.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(100, 3))
        >>> round(frechet_distance(x, x + [1, 2, 0]), 6)
        5.0
    """
    a, b = _pair(x, y, least=2)
    first, second = np.atleast_2d(np.cov(a.T)), np.atleast_2d(np.cov(b.T))
    # tr (ΣΣ′)^½ = Σ √eigenvalues of Σ^½·Σ′·Σ^½, which is symmetric, so that rounding gives nothing complex
    spread, axes = np.linalg.eigh(first)
    root = (axes * np.sqrt(np.clip(spread, 0, None))) @ axes.T
    values = np.linalg.eigvalsh(root @ second @ root)
    trace = np.sqrt(np.clip(values, 0, None)).sum()
    gap = a.mean(0) - b.mean(0)
    return float(max(gap @ gap + np.trace(first) + np.trace(second) - 2 * trace, 0.0))


@dataclass(frozen=True, slots=True)
class ModeCoverage:
    """Which known modes the samples visit.

    Attributes:
        covered: modes with at least the demanded share of what they should have.
        modes: number of modes K.
        histogram: share of samples nearest to each centre, `[K]`.
        kl: KL(histogram ‖ expected), ≥ 0.
        within: share of samples inside 3 standard deviations of their centre.
    """

    covered: int
    modes: int
    histogram: Floats
    kl: float
    within: float


def mode_coverage(
    x: npt.ArrayLike,
    centres: npt.ArrayLike,
    *,
    std: float,
    weights: npt.ArrayLike | None = None,
    share: float = 0.1,
) -> ModeCoverage:
    """Assign each sample to its nearest centre and compare the histogram with the expected weights.

    Args:
        x: `[N, D]`.
        centres: `[K, D]`.
        std: standard deviation of a mode on one axis, > 0.
        weights: expected shares `[K]`, normalised; None for equal ones.
        share: a mode counts as covered from this part of its expected share on.

    Returns:
        A `ModeCoverage`.

    Example:
        >>> found = mode_coverage([[0.1], [0.0], [0.2]], [[0.0], [5.0]], std=0.1)
        >>> found.covered, round(found.kl, 4)
        (1, 0.6931)
    """
    from scipy.spatial import cKDTree

    a, c = _pair(x, centres, least=1, names=("x", "centres"))
    if not std > 0:
        raise ValueError(f"std is {std}; it must be > 0")
    expected = np.full(len(c), 1 / len(c)) if weights is None else np.asarray(weights, dtype=np.float64)
    if expected.shape != (len(c),) or expected.min() <= 0:
        raise ValueError(f"weights must be {len(c)} numbers > 0, one a centre")
    expected = expected / expected.sum()
    distance, which = cKDTree(c).query(a)
    histogram = np.bincount(which, minlength=len(c)) / len(a)
    seen = histogram > 0
    return ModeCoverage(
        covered=int((histogram >= share * expected).sum()),
        modes=len(c),
        histogram=histogram,
        kl=float((histogram[seen] * np.log(histogram[seen] / expected[seen])).sum()),
        within=float((distance <= 3 * std).mean()),
    )


@dataclass(frozen=True, slots=True)
class PrecisionRecall:
    """Share of generated samples on the real manifold, and of real ones on the generated manifold."""

    precision: float
    recall: float


def knn_precision_recall(generated: npt.ArrayLike, real: npt.ArrayLike, *, k: int = 3) -> PrecisionRecall:
    """Improved precision and recall: a manifold is the union of balls up to each sample's k-th neighbour.

    Args:
        generated: `[N, D]`, N > k.
        real: `[M, D]`, M > k.
        k: neighbours.

    Returns:
        Precision (quality) and recall (diversity), each in [0, 1].

    Source: Kynkäänniemi et al., 2019.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(50, 2))
        >>> knn_precision_recall(x, x)
        PrecisionRecall(precision=1.0, recall=1.0)
    """
    if k < 1:
        raise ValueError(f"k is {k}; give at least 1")
    a, b = _pair(generated, real, least=k + 1, names=("generated", "real"))
    return PrecisionRecall(precision=_inside(a, b, k), recall=_inside(b, a, k))


def _inside(points: Floats, manifold: Floats, k: int) -> float:
    """Share of points in some ball of the manifold."""
    from scipy.spatial import cKDTree
    from scipy.spatial.distance import cdist

    radii = cKDTree(manifold).query(manifold, k=k + 1)[0][:, k]
    rows = max(1, _BLOCK // len(manifold))
    hits = [(cdist(points[i : i + rows], manifold) <= radii).any(axis=1) for i in range(0, len(points), rows)]
    return float(np.concatenate(hits).mean())


def _kernel_sum(a: Floats, b: Floats, bandwidths: Sequence[float]) -> float:
    from scipy.spatial.distance import cdist

    rows = max(1, _BLOCK // len(b))
    total = 0.0
    for start in range(0, len(a), rows):
        square = cdist(a[start : start + rows], b, "sqeuclidean")
        total += sum(float(np.exp(square / (-2 * h * h)).sum()) for h in bandwidths)
    return total / len(bandwidths)


def _pair(
    x: npt.ArrayLike, y: npt.ArrayLike, *, least: int, names: tuple[str, str] = ("x", "y")
) -> tuple[Floats, Floats]:
    found = []
    for name, value in zip(names, (x, y), strict=True):
        array = np.asarray(value, dtype=np.float64)
        if array.ndim != 2 or len(array) < least or array.shape[1] < 1:
            raise ValueError(f"{name} has shape {list(array.shape)}; give [N, D] with N ≥ {least}")
        if not np.isfinite(array).all():
            raise ValueError(f"{name} holds NaN or infinite numbers")
        found.append(array)
    if found[0].shape[1] != found[1].shape[1]:
        raise ValueError(f"{names[0]} has {found[0].shape[1]} columns, {names[1]} {found[1].shape[1]}")
    return found[0], found[1]
