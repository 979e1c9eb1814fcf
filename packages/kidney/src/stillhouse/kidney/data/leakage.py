"""Does the test part show what the training part has shown? Shared stones and pictures that repeat.

Three kinds of repetition are looked for in the pixels, whatever the ids say:

- `identical`: the same pixels, byte for byte after decoding;
- `copy`: the whole picture again, resized, compressed anew, brightened, mirrored or turned by a multiple of
  90°;
- `overlap`: two crops of one picture that share a part of it, at the same scale, not turned.

All pictures are made grey, shrunk to 64 × 64 and band-passed, so that light and shape of the stone at large
play no role. Copies are pairs of high correlation. Overlaps are found by matching descriptors of the
strongest corners and dots of either picture, then checked by the correlation of what would be the shared
part.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from .dataset import resize_square
from .items import Collection, Progress

_SIDE = 64
_POINTS = 16
_REACH = 6
_AROUND = 12
_SMALLEST = 0.2
_MATCH = 0.92
_STEP = 2048

Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Duplicate:
    """Two pictures that show the same thing.

    Args:
        train, test: places of the two in their collections.
        train_name, test_name: their names.
        kind: `identical`, `copy` or `overlap`.
        score: correlation of what they share, up to 1.
    """

    train: int
    test: int
    train_name: str
    test_name: str
    kind: Literal["identical", "copy", "overlap"]
    score: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LeakageReport:
    """What `check_leakage` found.

    Args:
        shared_stones: ids of stones in both parts.
        stone_known: whether the ids are of physical stones in both parts; if not, no shared id says nothing.
        duplicates: pairs of pictures that repeat, the surest first.
        pairs: number of pairs compared.
    """

    shared_stones: tuple[str, ...]
    stone_known: bool
    duplicates: tuple[Duplicate, ...]
    pairs: int

    @property
    def ok(self) -> bool:
        """True where nothing was found; with unknown stones this is no proof."""
        return not self.shared_stones and not self.duplicates

    def summary(self, limit: int = 5) -> str:
        """Return what was found as text, with the names of the first `limit` of each kind."""
        lines = []
        if not self.stone_known:
            lines.append("stone ids are unknown: only repeated pictures can be found")
        elif self.shared_stones:
            lines.append(
                f"{len(self.shared_stones)} stones are in both parts: {_some(self.shared_stones, limit)}"
            )
        else:
            lines.append("no stone is in both parts")
        for kind, words in (
            ("identical", "pictures of the test part are identical to one of the training part"),
            ("copy", "pictures of the test part are changed copies of one of the training part"),
            ("overlap", "pictures of the test part overlap with one of the training part"),
        ):
            found = {
                d.test: f"{d.test_name} = {d.train_name} ({d.score:.2f})"
                for d in self.duplicates
                if d.kind == kind
            }
            if found:
                lines.append(f"{len(found)} {words}: {_some(list(found.values()), limit)}")
        if not self.duplicates:
            lines.append(f"no repeated picture among {self.pairs:,} pairs")
        return "\n".join(lines)


def check_leakage(
    train: Collection, test: Collection, *, threshold: float = 0.9, progress: Progress | None = None
) -> LeakageReport:
    """Look for stones and pictures that are in both parts.

    Overlaps of less than about a fifth of the picture, crops at different scales and crops turned against
    each other are not found; smooth pictures without any structure cannot be told apart and are only
    compared byte for byte.

    Args:
        train: the training part (with its unlabelled images, if they are trained on).
        test: the part that scores are measured on.
        threshold: smallest correlation of a copy or of the shared part of an overlap, above 0 to 1.
        progress: called with (done, total) while images are read.

    Returns:
        LeakageReport: with `ok` and the names of what was found; for each test picture the surest match
        alone.

    Raises:
        DataError: an image that cannot be read.
        ValueError: `threshold` out of range.

    Example:
        >>> from stillhouse.kidney.data import SimulateConfig, simulate, split_collection
        >>> stones = simulate(SimulateConfig(stones_per_class=2, views=("surface",)))
        >>> parts = split_collection(stones, test=0.5)
        >>> check_leakage(parts["train"], parts["test"]).ok
        True
        >>> check_leakage(parts["train"], parts["train"]).ok
        False
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold: {threshold} must be above 0 and at most 1")
    total = len(train) + len(test)
    left = _read(train, progress, 0, total)
    right = _read(test, progress, len(train), total)
    found: dict[tuple[int, int], tuple[Literal["identical", "copy", "overlap"], float]] = {}
    if len(train) and len(test):
        for pair, score in _overlaps(left, right, threshold).items():
            found[pair] = ("overlap", score)
        for pair, score in _copies(left, right, threshold).items():
            found[pair] = ("copy", score)
        for pair in _identical(left.digests, right.digests):
            found[pair] = ("identical", 1.0)
    known = train.stone_known and test.stone_known
    order = {"identical": 0, "copy": 1, "overlap": 2}
    best: dict[int, Duplicate] = {}
    for (a, b), (kind, score) in found.items():
        candidate = Duplicate(
            train=a,
            test=b,
            train_name=train.items[a].title,
            test_name=test.items[b].title,
            kind=kind,
            score=score,
        )
        if b not in best or (order[kind], -score, a) < (order[best[b].kind], -best[b].score, best[b].train):
            best[b] = candidate
    return LeakageReport(
        shared_stones=tuple(sorted(set(train.stones) & set(test.stones))) if known else (),
        stone_known=known,
        duplicates=tuple(sorted(best.values(), key=lambda d: (order[d.kind], -d.score, d.test))),
        pairs=len(train) * len(test),
    )


@dataclass(frozen=True, slots=True)
class _Pictures:
    """`bands` float32 [n, 64, 64], `flat` bool [n], and descriptors of all points with picture and place."""

    digests: list[bytes]
    bands: Array
    flat: NDArray[np.bool_]
    descriptors: Array
    owners: NDArray[np.int64]
    places: NDArray[np.int64]


def _read(part: Collection, progress: Progress | None, before: int, total: int) -> _Pictures:
    digests = []
    grey = np.empty((len(part), _SIDE, _SIDE), np.float32)
    for n, item in enumerate(part.items):
        pixels = np.ascontiguousarray(item.load())
        digests.append(hashlib.sha256(str(pixels.shape).encode() + pixels.tobytes()).digest())
        grey[n] = resize_square(pixels, _SIDE).astype(np.float32) @ np.array(
            [0.299, 0.587, 0.114], np.float32
        )
        if progress is not None:
            progress(before + n + 1, total)
    bands = ndimage.gaussian_filter(grey, (0, 1, 1)) - ndimage.gaussian_filter(grey, (0, 5, 5))
    # Less than one grey level of structure is noise of the compression.
    flat = bands.std(axis=(1, 2)) < 0.7
    bands /= np.maximum(bands.std(axis=(1, 2), keepdims=True), 1e-6)
    return _Pictures(digests, bands, flat, *_describe(bands, flat))


def _describe(bands: Array, flat: NDArray[np.bool_]) -> tuple[Array, NDArray[np.int64], NDArray[np.int64]]:
    """The strongest extrema of each picture and a normalised 6 × 6 description of what is around each."""
    coarse = ndimage.gaussian_filter(bands, (0, 1, 1))
    strength = np.abs(coarse - ndimage.gaussian_filter(coarse, (0, 2, 2)))
    peaks = (strength == ndimage.maximum_filter(strength, (1, 5, 5))) & ~flat[:, None, None]
    peaks[:, :_REACH] = peaks[:, -_REACH:] = False
    peaks[:, :, :_REACH] = peaks[:, :, -_REACH:] = False
    owners, places = [], []
    for n in np.flatnonzero(peaks.any(axis=(1, 2))):
        rows, columns = np.nonzero(peaks[n])
        chosen = np.argsort(-strength[n, rows, columns], kind="stable")[:_POINTS]
        owners.append(np.full(len(chosen), n))
        places.append(np.stack([rows[chosen], columns[chosen]], axis=1))
    if not owners:
        return np.zeros((0, 36), np.float32), np.zeros(0, np.int64), np.zeros((0, 2), np.int64)
    owner, place = np.concatenate(owners), np.concatenate(places)
    offsets = np.arange(-5, 6, 2)
    around = coarse[
        owner[:, None, None],
        place[:, 0, None, None] + offsets[None, :, None],
        place[:, 1, None, None] + offsets[None, None, :],
    ].reshape(len(owner), -1)
    around -= around.mean(axis=1, keepdims=True)
    around /= np.maximum(np.linalg.norm(around, axis=1, keepdims=True), 1e-6)
    return around, owner.astype(np.int64), place.astype(np.int64)


def _identical(left: Sequence[bytes], right: Sequence[bytes]) -> list[tuple[int, int]]:
    where: dict[bytes, int] = {}
    for n, digest in enumerate(left):
        where.setdefault(digest, n)
    return [(where[digest], n) for n, digest in enumerate(right) if digest in where]


def _copies(left: _Pictures, right: _Pictures, threshold: float) -> dict[tuple[int, int], float]:
    """Pairs of whole pictures that correlate, in any of the eight positions of a square."""
    found: dict[tuple[int, int], float] = {}
    a = _unit(left.bands)
    a[left.flat] = 0
    for turns in range(4):
        for mirrored in (False, True):
            turned = np.rot90(right.bands, turns, axes=(1, 2))
            b = _unit(turned[:, :, ::-1] if mirrored else turned)
            b[right.flat] = 0
            for start in range(0, len(a), _STEP):
                scores = a[start : start + _STEP] @ b.T
                for i, j in np.argwhere(scores >= threshold):
                    pair = (int(start + i), int(j))
                    found[pair] = max(found.get(pair, 0.0), min(1.0, float(scores[i, j])))
    return found


def _unit(bands: Array) -> Array:
    flat = np.array(bands.reshape(len(bands), -1))
    flat -= flat.mean(axis=1, keepdims=True)
    return flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6)


def _overlaps(left: _Pictures, right: _Pictures, threshold: float) -> dict[tuple[int, int], float]:
    """Pairs of pictures with matching points whose shared part, laid over each other, correlates."""
    guesses: dict[tuple[int, int], tuple[float, int, int]] = {}
    for start in range(0, len(left.descriptors), _STEP):
        scores = left.descriptors[start : start + _STEP] @ right.descriptors.T
        hits = np.argwhere(scores >= _MATCH)
        a, b = hits[:, 0] + start, hits[:, 1]
        around = _surroundings(left, right, a, b)
        for n in np.flatnonzero(around >= 0.8 * threshold):
            pair = (int(left.owners[a[n]]), int(right.owners[b[n]]))
            down, across = (int(d) for d in left.places[a[n]] - right.places[b[n]])
            guesses[pair] = max(guesses.get(pair, (0.0, 0, 0)), (float(around[n]), down, across))
    found = {}
    for (i, j), (_, down, across) in guesses.items():
        score = _peak(left.bands[i], right.bands[j], down, across)
        if score >= threshold:
            found[i, j] = score
    return found


def _surroundings(
    left: _Pictures, right: _Pictures, a: NDArray[np.int64], b: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Correlation of what is around points `a` of `left` and `b` of `right`, as far as both reach."""
    reach = np.arange(-_AROUND, _AROUND + 1, 2)
    scores = np.empty(len(a), np.float32)
    for start in range(0, len(a), _STEP):
        part = slice(start, start + _STEP)
        cuts: list[Array] = []
        inside: NDArray[np.bool_] = np.ones((1, 1, 1), np.bool_)
        for pictures, points in ((left, a[part]), (right, b[part])):
            rows = pictures.places[points, 0, None] + reach
            columns = pictures.places[points, 1, None] + reach
            inside = (
                inside
                & ((rows >= 0) & (rows < _SIDE))[:, :, None]
                & ((columns >= 0) & (columns < _SIDE))[:, None, :]
            )
            rows, columns = rows.clip(0, _SIDE - 1), columns.clip(0, _SIDE - 1)
            owners = pictures.owners[points, None, None]
            cuts.append(pictures.bands[owners, rows[:, :, None], columns[:, None, :]])
        weight = inside / inside.sum(axis=(1, 2), keepdims=True)
        p, q = (cut - (cut * weight).sum(axis=(1, 2), keepdims=True) for cut in cuts)
        power = (p * p * weight).sum(axis=(1, 2)) * (q * q * weight).sum(axis=(1, 2))
        scores[part] = (p * q * weight).sum(axis=(1, 2)) / np.sqrt(np.maximum(power, 1e-12))
    return scores


def _peak(a: Array, b: Array, down: int, across: int) -> float:
    """Highest correlation near a shift, between the pixels too: crops lie at any distance."""
    scores: dict[tuple[int, int], float] = {}

    def at(y: int, x: int) -> float:
        if (y, x) not in scores:
            scores[y, x] = _shared(a, b, down + y, across + x)
        return scores[y, x]

    y, x = max(((y, x) for y in (0, -1, 1) for x in (0, -1, 1)), key=lambda place: at(*place))
    top = at(y, x)
    gain = 0.0
    for low, high in ((at(y - 1, x), at(y + 1, x)), (at(y, x - 1), at(y, x + 1))):
        # The top of the parabola through three neighbours, where the middle one is the highest.
        if top > 0 and -1 < low < top and -1 < high < top:
            gain += (high - low) ** 2 / (8 * (2 * top - low - high))
    return min(1.0, top + gain)


def _shared(a: Array, b: Array, down: int, across: int) -> float:
    """Correlation of the part that `a` shares with `b` when b[y, x] lies over a[y + down, x + across].

    −2 where the part is too small to say.
    """
    height, width = _SIDE - abs(down), _SIDE - abs(across)
    if height * width < _SMALLEST * _SIDE * _SIDE:
        return -2.0
    p = a[max(0, down) :, max(0, across) :][:height, :width]
    q = b[max(0, -down) :, max(0, -across) :][:height, :width]
    p, q = p - p.mean(), q - q.mean()
    return float((p * q).sum() / np.sqrt(max(float((p * p).sum() * (q * q).sum()), 1e-12)))


def _some(names: Sequence[str], limit: int) -> str:
    return ", ".join(names[:limit]) + (", …" if len(names) > limit else "")
