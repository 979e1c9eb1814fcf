"""What the six stone types look like: a relief and a pattern of light and dark for each type and view.

The shapes follow the morphological descriptions of stone types in words (laminated, spiculated, waxy,
crumbly …); the numbers are ours. Size of the grain, depth of the relief, roughness, contrast and colours
are drawn for each *stone* from distributions that all types share, so that only the structure tells the
types apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from ._noise import Field, band_noise, cells, profile, streaks


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """What is drawn once for each stone and shared by its views.

    Args:
        grain: size of the structure relative to the mean, about 0.75 to 1.35.
        relief: depth of the relief, relative.
        contrast: strength of the light and dark pattern, relative.
        roughness: share of relief that has nothing to do with the type.
        gloss: strength of highlights.
        light, dark: the two ends of the stone's colours, linear RGB in [0, 1].
    """

    grain: float
    relief: float
    contrast: float
    roughness: float
    gloss: float
    light: tuple[float, float, float]
    dark: tuple[float, float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    """A rendered structure: `height` in pixels and `albedo` about in [−1, 1], both float32 [H, W].

    `soft` is the blur, in pixels, of light that wanders through a translucent stone; `gloss` multiplies
    highlights.
    """

    height: Field
    albedo: Field
    soft: float = 0.0
    gloss: float = 1.0


Texture = Callable[[np.random.Generator, Traits, Field, Field], Material]
"""(random numbers, stone, x, y) → material; x and y are pixels in the stone's own frame."""


def _centre(rng: np.random.Generator, x: Field, y: Field) -> tuple[Field, Field]:
    """Polar coordinates about a growth centre somewhere off the middle, with an uneven outline."""
    reach = 0.5 * float(np.ptp(x))
    angle, far = rng.uniform(0, 2 * np.pi), reach * rng.uniform(0.05, 0.7)
    dx, dy = x - np.float32(far * np.cos(angle)), y - np.float32(far * np.sin(angle))
    radius = np.hypot(dx, dy * np.float32(rng.uniform(0.8, 1.2))).astype(np.float32)
    turn = np.arctan2(dy, dx).astype(np.float32)
    uneven = sum(rng.uniform(0, 0.05) * np.sin(k * turn + rng.uniform(0, 2 * np.pi)) for k in (2, 3, 5))
    return (radius * (1 + uneven)).astype(np.float32), turn


def _fan(rng: np.random.Generator, turn: Field, radius: Field, width: float) -> Field:
    """Fibres that run outward; as they part with the distance, finer ones come in between."""
    total = np.zeros_like(turn)
    for middle in (9.0, 18.0, 36.0, 72.0, 144.0):
        # Fibres of this family are `width` pixels wide at the distance `middle`.
        share = np.exp(-((np.log2(np.maximum(radius, 1) / middle) / 0.8) ** 2)).astype(np.float32)
        total += share * streaks(rng, turn * np.float32(middle), radius + 7 * middle, width, 16 * width)
    return total


def whewellite_surface(rng: np.random.Generator, stone: Traits, x: Field, y: Field) -> Material:
    """Mulberry: smooth round knobs that touch."""
    knobs = cells(rng, x, y, 13 * stone.grain, jitter=0.9)
    dome = np.sqrt(np.clip(1 - 1.3 * knobs.near**2, 0, None))
    return Material(height=7.0 * stone.grain * dome, albedo=0.9 * dome - 0.6 + 0.3 * (knobs.value - 0.5))


def whewellite_section(rng: np.random.Generator, stone: Traits, x: Field, y: Field) -> Material:
    """Compact concentric layers crossed by fine fibres that radiate from the centre."""
    radius, turn = _centre(rng, x, y)
    layers = profile(rng, radius, 11 * stone.grain, 0.45)
    fibres = _fan(rng, turn, radius, 3.0 * stone.grain)
    return Material(height=0.4 * fibres + 0.5 * layers, albedo=0.6 * layers + 0.5 * fibres)


def weddellite_surface(rng: np.random.Generator, stone: Traits, x: Field, y: Field) -> Material:
    """Sharp double pyramids that grow through one another."""
    crystals = cells(rng, x, y, 15 * stone.grain, pyramids=True)
    return Material(height=11 * stone.grain * crystals.peak, albedo=0.7 * (crystals.peak - 0.35), gloss=1.6)


def weddellite_section(rng: np.random.Generator, stone: Traits, x: Field, y: Field) -> Material:
    """A loose mosaic of angular crystals with dark gaps."""
    mosaic = cells(rng, x, y, 10 * stone.grain, jitter=1.0)
    gap = np.clip(1 - (mosaic.next - mosaic.near) / 0.22, 0, 1)
    tilt = (mosaic.value - 0.5) * 5 * (mosaic.dx + mosaic.dy * np.sin(40 * mosaic.value))
    return Material(
        height=stone.grain * (1.6 * tilt - 3 * gap), albedo=1.3 * (mosaic.value - 0.5) - 1.2 * gap, gloss=1.3
    )


def uric_acid_surface(rng: np.random.Generator, stone: Traits, x: Field, y: Field) -> Material:
    """Smooth, dense and finely pored."""
    pores = cells(rng, x, y, 8.5 * stone.grain, jitter=1.0)
    hole = np.exp(-((pores.near / 0.17) ** 2)) * (pores.value > 0.3) * (0.5 + 0.7 * pores.value)
    swell = band_noise(rng, x.shape, 26 * stone.grain, 90)
    return Material(height=2.0 * swell - 2.2 * stone.grain * hole, albedo=0.25 * swell - 0.9 * hole)


def uric_acid_section(rng: np.random.Generator, stone: Traits, x: Field, y: Field) -> Material:
    """Fine, even concentric layers, here and there parted by a crack that follows them."""
    radius, _ = _centre(rng, x, y)
    layers = profile(rng, radius, 7.5 * stone.grain, 0.15)
    broad = profile(rng, radius, 26 * stone.grain, 0.4)
    crack = np.clip(broad - 1.0, 0, 1) * 4
    return Material(height=0.4 * layers - 2 * crack, albedo=0.8 * layers + 0.25 * broad - 1.2 * crack)


def struvite_surface(rng: np.random.Generator, stone: Traits, x: Field, y: Field) -> Material:
    """Crumbs of every size with pits between them."""
    coarse = cells(rng, x, y, 15 * stone.grain, jitter=1.0)
    fine = cells(rng, x, y, 5.5 * stone.grain, jitter=1.0)
    lumps = np.clip(0.7 - coarse.near, 0, None) * (0.2 + 1.2 * coarse.value)
    crumbs = np.clip(0.65 - fine.near, 0, None) * 2 * fine.value
    gaps = np.clip(band_noise(rng, x.shape, 7, 26, slope=0.4) - 1.1, 0, 0.6)
    return Material(
        height=stone.grain * (8 * lumps + 4.5 * crumbs - 4 * gaps),
        albedo=0.8 * lumps + 1.2 * crumbs - 0.6 - 0.5 * gaps,
        gloss=0.5,
    )


def struvite_section(rng: np.random.Generator, stone: Traits, x: Field, y: Field) -> Material:
    """Loose grains and smooth putty side by side, with holes."""
    grains = cells(rng, x, y, 6.5 * stone.grain, jitter=1.0)
    smooth: Field = np.tanh(2 * band_noise(rng, x.shape, 26 * stone.grain, 80))
    where: Field = 0.5 + 0.5 * smooth
    holes: Field = np.clip(band_noise(rng, x.shape, 9 * stone.grain, 40) - 1.1, 0, 1)
    grain: Field = np.clip(0.7 - grains.near, 0, None) * (0.3 + grains.value) - 0.25
    return Material(
        height=stone.grain * (7 * grain * where - 6 * holes),
        albedo=1.9 * grain * where + 0.35 * where - holes,
        gloss=0.5,
    )


def brushite_surface(rng: np.random.Generator, stone: Traits, x: Field, y: Field) -> Material:
    """Bundles of rods that lie in different directions."""
    bundles = cells(rng, x, y, 26 * stone.grain, jitter=1.0)
    angle = (2 * np.pi * bundles.value).astype(np.float32)
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    rods = streaks(rng, across, along, 2.6 * stone.grain, 16 * stone.grain)
    seam = np.clip(1 - (bundles.next - bundles.near) / 0.1, 0, 1)
    return Material(height=1.5 * stone.grain * rods - 1.5 * seam, albedo=0.7 * rods - 0.5 * seam)


def brushite_section(rng: np.random.Generator, stone: Traits, x: Field, y: Field) -> Material:
    """Fans of fibres that spread from several centres and meet at seams."""
    fans = cells(rng, x, y, 44 * stone.grain, jitter=1.0)
    turn = (np.arctan2(fans.dy, fans.dx) + 30 * fans.value).astype(np.float32)
    fibres = _fan(rng, turn, 44 * stone.grain * fans.near, 3.0 * stone.grain)
    seam = np.clip(1 - (fans.next - fans.near) / 0.06, 0, 1)
    return Material(height=0.9 * fibres - seam, albedo=0.85 * fibres - 0.4 * seam)


def cystine_surface(rng: np.random.Generator, stone: Traits, x: Field, y: Field) -> Material:
    """Waxy, translucent, softly lumped, with bright highlights."""
    lumps = band_noise(rng, x.shape, 14 * stone.grain, 60 * stone.grain, slope=0.8)
    veil = band_noise(rng, x.shape, 24, 90)
    return Material(height=3.5 * stone.grain * lumps, albedo=0.2 * lumps + 0.25 * veil, soft=2.5, gloss=2.0)


def cystine_section(rng: np.random.Generator, stone: Traits, x: Field, y: Field) -> Material:
    """Even wax with a faint grain and scattered flat crystals that glint."""
    grain = band_noise(rng, x.shape, 5 * stone.grain, 13 * stone.grain)
    plates = cells(rng, x, y, 15 * stone.grain, jitter=1.0)
    square: Field = np.clip(1 - np.maximum(np.abs(plates.dx), np.abs(plates.dy)) / 0.2, 0, 1)
    glint: Field = np.where(plates.value > 0.55, square, np.float32(0))
    return Material(
        height=0.55 * grain + 1.6 * np.clip(glint, 0, 0.4),
        albedo=0.22 * grain + 0.7 * np.clip(3 * glint, 0, 1),
        soft=1.0,
        gloss=1.8,
    )


TEXTURES: Mapping[tuple[str, str], Texture] = {
    ("WW", "surface"): whewellite_surface,
    ("WW", "section"): whewellite_section,
    ("WD", "surface"): weddellite_surface,
    ("WD", "section"): weddellite_section,
    ("UA", "surface"): uric_acid_surface,
    ("UA", "section"): uric_acid_section,
    ("STR", "surface"): struvite_surface,
    ("STR", "section"): struvite_section,
    ("BRU", "surface"): brushite_surface,
    ("BRU", "section"): brushite_section,
    ("CYS", "surface"): cystine_surface,
    ("CYS", "section"): cystine_section,
}
"""Texture of each stone type and view."""

COLOURS: Mapping[str, tuple[float, float, float]] = {
    "WW": (0.42, 0.27, 0.17),
    "WD": (0.66, 0.52, 0.32),
    "UA": (0.68, 0.42, 0.23),
    "STR": (0.76, 0.70, 0.60),
    "BRU": (0.67, 0.57, 0.43),
    "CYS": (0.74, 0.60, 0.32),
}
"""Typical colour of each stone type, RGB in [0, 1]; a stone's own colour strays far from it."""


def tint(rng: np.random.Generator, strength: float) -> np.ndarray:
    """Random factors for red, green and blue, float64 [3]: from a little cold to warm, hardly ever green."""
    warm, green, _ = strength * rng.standard_normal(3).clip(-0.8, 2)
    return np.exp(warm * np.array([1.0, 0.0, -1.8]) + green * np.array([-0.12, 0.24, -0.12]))


def draw_traits(rng: np.random.Generator, label: str, colour: float) -> Traits:
    """Draw a stone; `colour` in [0, 1] is how far its colour follows the type's."""
    kinds = np.array(list(COLOURS.values()))
    anyone = kinds[rng.integers(len(kinds))] * rng.uniform(0.75, 1.2)
    base = colour * np.array(COLOURS[label]) + (1 - colour) * anyone
    base = base * tint(rng, 0.07)
    light = np.clip(base * rng.uniform(1.15, 1.4), 0, 1)
    dark = np.clip(base * rng.uniform(0.4, 0.65) * np.array([1.0, 0.92, 0.85]), 0, 1)
    return Traits(
        grain=float(np.exp(rng.uniform(np.log(0.75), np.log(1.35)))),
        relief=float(rng.uniform(0.55, 1.1)),
        contrast=float(rng.uniform(0.5, 1.1)),
        roughness=float(rng.uniform(0.2, 0.8)),
        gloss=float(rng.uniform(0.4, 1.2)),
        light=(float(light[0]), float(light[1]), float(light[2])),
        dark=(float(dark[0]), float(dark[1]), float(dark[2])),
    )
