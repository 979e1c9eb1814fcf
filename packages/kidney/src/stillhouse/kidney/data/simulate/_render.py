"""From a material to an endoscope's picture: outline, light, tissue behind, and the faults of the optics."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from ._noise import Field, band_noise
from ._textures import Texture, Traits, tint


def frame(rng: np.random.Generator, size: int) -> tuple[Field, Field]:
    """Pixel coordinates in the stone's frame: turned at random, scaled by 0.85 to 1.2, and slightly bent."""
    grid = np.arange(size, dtype=np.float32) - np.float32((size - 1) / 2)
    x, y = np.meshgrid(grid, grid)
    angle, scale = rng.uniform(0, 2 * np.pi), np.exp(rng.uniform(np.log(0.85), np.log(1.2)))
    c, s = np.float32(np.cos(angle) / scale), np.float32(np.sin(angle) / scale)
    bend = rng.uniform(0.5, 2.5)
    u = c * x + s * y + np.float32(bend) * band_noise(rng, (size, size), 30, 120)
    v = c * y - s * x + np.float32(bend) * band_noise(rng, (size, size), 30, 120)
    return u, v


def outline(rng: np.random.Generator, size: int, *, broken: bool) -> NDArray[np.bool_]:
    """Mask bool [size, size] of a fragment: a rounded blob; `broken` ones have straight breaks."""
    grid = np.linspace(-1, 1, size, dtype=np.float32)
    x, y = np.meshgrid(grid, grid)
    x, y = x - np.float32(rng.uniform(-0.05, 0.05)), y - np.float32(rng.uniform(-0.05, 0.05))
    turn = np.arctan2(y, x)
    edge = rng.uniform(0.8, 0.9) * np.ones_like(x)
    for k in (2, 3, 4, 5, 7, 11):
        edge += rng.normal(0, 0.09 / k) * np.cos(k * turn + rng.uniform(0, 2 * np.pi))
    mask = np.hypot(x, y) < np.minimum(edge, 0.95)
    if broken:
        for _ in range(rng.integers(1, 4)):
            angle = rng.uniform(0, 2 * np.pi)
            uneven = 0.02 * band_noise(rng, (size, size), 10, 60)
            mask &= x * np.cos(angle) + y * np.sin(angle) + uneven < rng.uniform(0.62, 0.85)
    pieces, count = ndimage.label(mask)
    if count > 1:
        mask = pieces == 1 + int(np.argmax(np.bincount(pieces.ravel())[1:]))
    return ndimage.binary_fill_holes(mask)


def tissue(rng: np.random.Generator, size: int) -> NDArray[np.float32]:
    """What lies behind the stone, float32 [size, size, 3]: mucosa with vessels, brightly lit or dark."""
    folds = band_noise(rng, (size, size), 20, 160, slope=0.5)
    vessels = np.exp(-((band_noise(rng, (size, size), 18, 60) / 0.08) ** 2)) * rng.uniform(0.1, 0.35)
    bright = rng.uniform(0.12, 0.5)
    base = bright * np.array([1.0, rng.uniform(0.42, 0.62), rng.uniform(0.36, 0.52)], dtype=np.float32)
    grey = 1 + 0.18 * folds
    wall = base * grey[..., None]
    wall[..., 1:] *= (1 - vessels)[..., None]
    wall[..., 0] *= 1 - 0.4 * vessels
    return np.clip(wall, 0, 1).astype(np.float32)


def photograph(
    rng: np.random.Generator, texture: Texture, stone: Traits, size: int, *, broken: bool
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Take one picture: uint8 [size, size, 3], and the fragment's mask, bool [size, size]."""
    shape = (size, size)
    mask = outline(rng, size, broken=broken)
    x, y = frame(rng, size)
    material = texture(rng, stone, x, y)
    depth = ndimage.distance_transform_edt(mask).astype(np.float32)
    # A whole stone is a dome; a broken face is flat with a rounded rim.
    rim = 0.16 * size if broken else 0.38 * size
    body = np.sqrt(np.clip(1 - (1 - np.minimum(depth / rim, 1)) ** 2, 0, 1)) * rim * (0.35 if broken else 0.5)
    rough = band_noise(rng, shape, 3, 24, slope=0.6)
    height = stone.relief * material.height + stone.roughness * 0.8 * rough + body
    height = ndimage.gaussian_filter(height, 0.6)

    slope_y, slope_x = np.gradient(height)
    length = np.sqrt(1 + slope_x**2 + slope_y**2)
    # The lamp sits beside the lens: light comes from the front, a little from one side.
    azimuth, tilt = rng.uniform(0, 2 * np.pi), rng.uniform(0.25, 0.6)
    lamp = np.array([np.cos(azimuth) * np.sin(tilt), np.sin(azimuth) * np.sin(tilt), np.cos(tilt)])
    facing = np.clip((lamp[2] - lamp[0] * slope_x - lamp[1] * slope_y) / length, 0, 1)
    if material.soft:
        facing = 0.5 * facing + 0.5 * ndimage.gaussian_filter(facing, material.soft)
    # Half vector between lamp and lens (which looks along z).
    half = lamp + np.array([0.0, 0.0, 1.0])
    half /= np.linalg.norm(half)
    mirror = np.clip((half[2] - half[0] * slope_x - half[1] * slope_y) / length, 0, 1)
    glint = material.gloss * stone.gloss * mirror ** rng.uniform(35, 70)

    stain = band_noise(rng, shape, 25, 120, slope=0.4)
    shade = 0.5 + 0.38 * stone.contrast * material.albedo + 0.10 * stain + 0.06 * stone.roughness * rough
    shade = np.clip(shade, 0, 1)[..., None]
    colour = np.array(stone.dark) * (1 - shade) + np.array(stone.light) * shade
    hollow = np.clip(height - ndimage.gaussian_filter(height, 5), -3, 0) / 3
    lit = colour * (facing * (1 + 0.45 * hollow))[..., None] + 0.30 * glint[..., None]

    behind = tissue(rng, size)
    shadow = ndimage.gaussian_filter(mask.astype(np.float32), 6)
    behind = behind * (1 - 0.6 * shadow)[..., None]
    edge = ndimage.gaussian_filter(mask.astype(np.float32), 0.7)[..., None]
    scene = lit * edge + behind * (1 - edge)
    return _optics(rng, scene.astype(np.float32)), mask


def _optics(rng: np.random.Generator, scene: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Lamp fall-off, colour cast, blur, exposure, noise, and 8 bits."""
    size = scene.shape[0]
    grid = np.linspace(-1, 1, size, dtype=np.float32)
    x, y = np.meshgrid(grid, grid)
    off = rng.uniform(-0.3, 0.3, 2)
    falloff = 1 / (1 + rng.uniform(0.25, 0.7) * ((x - off[0]) ** 2 + (y - off[1]) ** 2))
    cast = tint(rng, 0.05).astype(np.float32)
    scene = scene * falloff[..., None] * cast
    blur = rng.uniform(0.3, 1.0)
    scene = ndimage.gaussian_filter(scene, (blur, blur, 0))
    gain = rng.uniform(0.95, 1.45)
    picture = np.clip(scene * gain, 0, None)
    picture = picture / (1 + 0.18 * picture**2)
    noise = rng.standard_normal(scene.shape, dtype=np.float32)
    picture = picture + rng.uniform(0.006, 0.02) * noise * np.sqrt(picture + 0.05)
    return (np.clip(picture, 0, 1) ** (1 / 1.25) * 255).round().astype(np.uint8)
