"""Random fields that textures are made of; all float32 [H, W] over pixel coordinates."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Field = NDArray[np.float32]


def band_noise(
    rng: np.random.Generator, shape: tuple[int, int], shortest: float, longest: float, slope: float = 0.0
) -> Field:
    """Gaussian noise with wavelengths between `shortest` and `longest` pixels and mean 0, deviation 1.

    `slope` is the exponent of the amplitude over the wavelength: 0 gives all wavelengths alike, 1 a
    natural, cloudy look. The field is periodic at its edges.
    """
    height, width = shape
    rows = np.fft.fftfreq(height).astype(np.float32)[:, None]
    columns = np.fft.rfftfreq(width).astype(np.float32)[None, :]
    frequency = np.sqrt(rows * rows + columns * columns)
    frequency[0, 0] = 1.0
    gain = (
        1
        / (1 + np.exp(np.clip(12 * (frequency * shortest - 1), -30, 30)))
        / (1 + np.exp(np.clip(12 * (1 - frequency * longest), -30, 30)))
    )
    gain *= frequency ** -(1.0 + slope)
    gain[0, 0] = 0.0
    white = rng.standard_normal((2, *gain.shape), dtype=np.float32)
    field = np.fft.irfft2((white[0] + 1j * white[1]) * gain, s=shape).astype(np.float32)
    return (field - field.mean()) / max(float(field.std()), 1e-9)


def profile(rng: np.random.Generator, at: Field, period: float, irregular: float) -> Field:
    """Layers: a function of one coordinate, with the given mean period and uneven thickness, about in [−1,
    1].

    The phase is the coordinate plus smoothed one-dimensional noise; `irregular` of 0 is a pure wave.
    """
    low, high = float(at.min()), float(at.max())
    knots = max(8, int((high - low) / period) + 2)
    steps = np.exp(irregular * rng.standard_normal(knots))
    phase = np.concatenate([[0.0], np.cumsum(1 / steps)])
    phase *= (high - low) / period / phase[-1]
    strengths = rng.uniform(0.35, 1.0, knots + 1)
    where = np.linspace(low, high, knots + 1)
    turned = np.interp(at, where, phase)
    wave = np.sin(2 * np.pi * turned) + 0.35 * np.sin(4 * np.pi * turned + 1.0)
    return (wave * np.interp(at, where, strengths)).astype(np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cells:
    """Nearest points of a jittered grid, for each pixel.

    `near` and `next` are the distances to the nearest and second nearest point and `dx`, `dy` the offset
    from the nearest, all in units of the spacing; `value` is a random number in [0, 1) that is the same all
    over a cell. `peak` is the highest of the pyramids that stand on the points, 1 at a tip of mean height.
    """

    near: Field
    next: Field
    dx: Field
    dy: Field
    value: Field
    peak: Field


def cells(
    rng: np.random.Generator,
    x: Field,
    y: Field,
    spacing: float,
    *,
    jitter: float = 0.85,
    pyramids: bool = False,
) -> Cells:
    """Find the two nearest points of a jittered grid with the given spacing (Worley's cellular noise)."""
    size = 64
    table = rng.random((5, size, size), dtype=np.float32)
    u, v = x / spacing, y / spacing
    column, row = np.floor(u).astype(np.int64), np.floor(v).astype(np.int64)
    far = np.full(x.shape, 9.0, np.float32)
    near, after = far.copy(), far.copy()
    dx, dy, value, peak = (np.zeros(x.shape, np.float32) for _ in range(4))
    peak -= 9.0
    for i in (-1, 0, 1):
        for j in (-1, 0, 1):
            a, b = (row + i) % size, (column + j) % size
            du = u - (column + j) - (0.5 + jitter * (table[0, a, b] - 0.5))
            dv = v - (row + i) - (0.5 + jitter * (table[1, a, b] - 0.5))
            distance = np.sqrt(du * du + dv * dv)
            closer = distance < near
            after = np.where(closer, near, np.minimum(after, distance))
            near = np.where(closer, distance, near)
            dx, dy = np.where(closer, du, dx), np.where(closer, dv, dy)
            value = np.where(closer, table[2, a, b], value)
            if pyramids:
                angle = np.float32(np.pi) * table[3, a, b]
                c, s = np.cos(angle), np.sin(angle)
                stretch = 0.6 + 0.9 * table[4, a, b]
                sides = np.abs(c * du + s * dv) * stretch + np.abs(c * dv - s * du) / stretch
                peak = np.maximum(peak, 0.7 + 0.6 * table[2, a, b] - 1.1 * sides)
    return Cells(
        near=near.astype(np.float32),
        next=after.astype(np.float32),
        dx=dx.astype(np.float32),
        dy=dy.astype(np.float32),
        value=value.astype(np.float32),
        peak=peak.astype(np.float32),
    )


def streaks(rng: np.random.Generator, across: Field, along: Field, width: float, length: float) -> Field:
    """Fibres: noise stretched along one coordinate; `across` and `along` are in pixels. Deviation about 1."""
    size = 128
    table = rng.standard_normal((size, size), dtype=np.float32)
    p, q = across / width, along / length
    i, j = np.floor(p).astype(np.int64), np.floor(q).astype(np.int64)
    f, g = (p - i).astype(np.float32), (q - j).astype(np.float32)
    f, g = f * f * (3 - 2 * f), g * g * (3 - 2 * g)
    i0, i1, j0, j1 = i % size, (i + 1) % size, j % size, (j + 1) % size
    low = table[i0, j0] * (1 - f) + table[i1, j0] * f
    high = table[i0, j1] * (1 - f) + table[i1, j1] * f
    return ((low * (1 - g) + high * g) * np.float32(1.5)).astype(np.float32)
