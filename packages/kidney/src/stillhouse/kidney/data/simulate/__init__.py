"""Simulated stones: pictures of fragments whose type shows in their structure and not in their colour.

Endoscopic stone images are not public. The simulator gives the demo and the tests something to work on: six
types after their morphological descriptions in words, two views, masks, and stone ids. It is no model of
any clinical set, and a score on it says nothing about patients.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from ..items import Collection, Item, Progress
from ..patches import extract_patches
from ._render import photograph
from ._textures import COLOURS, TEXTURES, draw_traits

CLASSES = tuple(COLOURS)
"""The six types: whewellite, weddellite, uric acid, struvite, brushite, cystine."""

VIEWS = ("surface", "section")
"""The outside of a stone, and a broken face."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulateConfig:
    """What to simulate.

    Args:
        stones_per_class: stones of each type, at least 1.
        views: views of each stone, one fragment picture each.
        classes: types, any of `CLASSES`.
        fragment_size: side of the fragment pictures in pixels, at least twice `patch_size`.
        patch_size: side of the patches in pixels, at least 16.
        patches_per_fragment: most patches that are kept of one fragment.
        max_overlap: widest strip that two patches of a fragment may share, in pixels.
        colour: how far colour follows the type, 0 (not at all) to 1 (fully). Small by default: a colour
            histogram must not do.
        seed: the same seed gives the same bytes. Stones are drawn independently: more stones leave the
            first as they are.

    Raises:
        ValueError: an argument out of range, or an unknown class or view.
    """

    stones_per_class: int = 20
    views: tuple[str, ...] = VIEWS
    classes: tuple[str, ...] = CLASSES
    fragment_size: int = 192
    patch_size: int = 64
    patches_per_fragment: int = 4
    max_overlap: int = 8
    colour: float = 0.15
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("stones_per_class", "patches_per_fragment"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} must be at least 1")
        for name, allowed in (("views", VIEWS), ("classes", CLASSES)):
            chosen = getattr(self, name)
            if not chosen or len(set(chosen)) != len(chosen) or not set(chosen) <= set(allowed):
                raise ValueError(f"{name}: {chosen} must be some of {allowed}, each once")
        if self.patch_size < 16:
            raise ValueError(f"patch_size: {self.patch_size} must be at least 16")
        if self.fragment_size < 2 * self.patch_size:
            raise ValueError(
                f"fragment_size: {self.fragment_size} must be at least twice patch_size "
                f"({2 * self.patch_size})"
            )
        if not 0 <= self.max_overlap < self.patch_size:
            raise ValueError(f"max_overlap: {self.max_overlap} must be at least 0 and below patch_size")
        if not 0 <= self.colour <= 1:
            raise ValueError(f"colour: {self.colour} must be from 0 to 1")
        if self.seed < 0:
            raise ValueError(f"seed: {self.seed} must not be negative")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fragment:
    """A picture of one fragment: `image` uint8 [S, S, 3], `mask` bool [S, S], True on the stone."""

    image: np.ndarray = field(repr=False)
    mask: np.ndarray = field(repr=False)
    label: str
    view: str
    stone: str

    @property
    def name(self) -> str:
        """Stone and view, as a name."""
        return f"{self.stone}_{self.view}"


def simulate_fragments(config: SimulateConfig) -> Iterator[Fragment]:
    """Render the fragments one after the other: class by class, stone by stone, view by view.

    Example:
        >>> fragment = next(simulate_fragments(SimulateConfig(stones_per_class=1)))
        >>> fragment.name, fragment.image.shape, fragment.mask.shape
        ('WW-000_surface', (192, 192, 3), (192, 192))
    """
    for label in config.classes:
        for number in range(config.stones_per_class):
            key = (config.seed, CLASSES.index(label), number)
            stone = draw_traits(np.random.default_rng(key), label, config.colour)
            for view in config.views:
                rng = np.random.default_rng((*key, 1 + VIEWS.index(view)))
                image, mask = photograph(
                    rng, TEXTURES[label, view], stone, config.fragment_size, broken=view == "section"
                )
                yield Fragment(image=image, mask=mask, label=label, view=view, stone=f"{label}-{number:03d}")


def simulate(config: SimulateConfig, *, progress: Progress | None = None) -> Collection:
    """Simulate stones and cut patches out of their fragments.

    Args:
        config: what to simulate.
        progress: called with (done, total) fragments.

    Returns:
        Collection: patches uint8 [patch_size, patch_size, 3] in memory, with stone ids; a note says that
        they are simulated.

    Example:
        >>> stones = simulate(SimulateConfig(stones_per_class=2, views=("section",), classes=("WW", "CYS")))
        >>> stones.classes, len(stones.stones), stones.items[0].array.shape
        (('WW', 'CYS'), 4, (64, 64, 3))
    """
    total = len(config.classes) * config.stones_per_class * len(config.views)
    items = []
    for done, fragment in enumerate(simulate_fragments(config), start=1):
        patches = extract_patches(
            fragment.image, fragment.mask, size=config.patch_size, max_overlap=config.max_overlap
        )
        # Spread the choice over the fragment: every k-th of the patches in reading order.
        step = max(1.0, len(patches) / config.patches_per_fragment)
        kept = [patches[int(i * step)] for i in range(min(len(patches), config.patches_per_fragment))]
        items += [
            Item(
                path=None,
                array=patch.image,
                label=fragment.label,
                view=fragment.view,
                stone=fragment.stone,
                name=f"{fragment.name}_{patch.top}_{patch.left}",
            )
            for patch in kept
        ]
        if progress is not None:
            progress(done, total)
    return Collection(
        items=tuple(items),
        classes=config.classes,
        views=config.views,
        stone_known=True,
        name="simulated stones",
        notes=("the images are simulated: scores on them say nothing about patients",),
    )
