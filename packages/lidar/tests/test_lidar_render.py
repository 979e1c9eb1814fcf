"""Pictures without a display: where points land, what hides what, how wide points are."""

from __future__ import annotations

import doctest
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stillhouse.lidar import render as module
from stillhouse.lidar.render import BACKGROUND, Camera, height_colours, render, save_views, views

RED, BLUE = (255, 0, 0), (0, 0, 255)


def drawn(picture: np.ndarray) -> np.ndarray:
    return (picture != BACKGROUND).any(axis=2)


def test_doctests() -> None:
    assert doctest.testmod(module).failed == 0


def test_above_ahead_is_up_and_left_is_left() -> None:
    camera = Camera(view="above", extent=10.0, width=200, height=200)
    for point, row, column in (((8.0, 0, 0), 20, 100), ((0, 8.0, 0), 100, 20), ((-8.0, -8.0, 0), 180, 180)):
        rows, columns = np.nonzero(drawn(render(np.array([point]), camera)))
        assert rows.mean() == pytest.approx(row, abs=1.5)
        assert columns.mean() == pytest.approx(column, abs=1.5)


def test_oblique_far_is_higher_and_closer_together() -> None:
    camera = Camera(view="oblique", extent=20.0, azimuth=0.0, width=400, height=300)
    ground = np.array([[-10.0, 3, -1.7], [-10, -3, -1.7], [15, 3, -1.7], [15, -3, -1.7]])
    column, row, depth = camera.project(ground)
    assert row[0] > row[2]
    assert depth[0] < depth[2]
    assert abs(column[0] - column[1]) > abs(column[2] - column[3]) > 0
    assert column[0] < column[1]  # y points left
    wall = camera.project(np.array([[5.0, 0, -1.7], [5, 0, 3.0]]))[1]
    assert wall[1] < wall[0]  # what is higher is higher
    middle = camera.project(np.array([[0.0, 0, -1.7]]))
    assert middle[0][0] == pytest.approx(200)
    assert camera.magnification(middle[2])[0] == pytest.approx(camera.scale)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("view", ["above", "oblique"])
def test_the_nearer_point_hides_the_other(view: str, order: tuple[int, int]) -> None:
    camera = Camera(view=view, extent=10.0, azimuth=0.0, width=100, height=100)  # type: ignore[arg-type]
    low, high = np.array([0.0, 0, 0]), np.array([0.0, 0, 2.0])
    if view == "oblique":  # along the line of sight
        pitch, low = np.radians(camera.elevation), np.array([0.0, 0, -1.7])
        high = low + 3.0 * np.array([-np.cos(pitch), 0, np.sin(pitch)])
        _, rows, depths = camera.project(np.array([low, high]))
        assert rows[0] == pytest.approx(rows[1])
        assert depths[0] - depths[1] == pytest.approx(3.0)
    points, colours = np.array([low, high]), np.array([BLUE, RED], np.uint8)
    picture = render(points[list(order)], camera, colours=colours[list(order)], size=3)
    seen = picture[drawn(picture)]
    assert (seen[:, 0] > seen[:, 2]).all()
    assert len(seen) == 9


def test_points_are_as_wide_as_their_gaps() -> None:
    camera = Camera(view="above", extent=10.0, width=400, height=400)  # 20 pixels a metre
    side = np.arange(-4, 4, 0.1)
    plane = np.stack([*np.meshgrid(side, side), np.zeros((80, 80))], axis=-1).reshape(-1, 3)
    inside = drawn(render(plane, camera))[140:260, 140:260]
    assert inside.all()  # sampled densely: closed
    sparse = plane[np.random.default_rng(0).permutation(len(plane))[:60]]
    share = drawn(render(sparse, camera)).mean() * 400**2 / 60
    assert 25 <= share <= 36  # at most 30 cm, 6 pixels, and some overlap
    assert drawn(render(sparse, camera, size=1)).sum() == 60


def test_what_is_behind_or_outside_is_left_out() -> None:
    camera = Camera(view="oblique", extent=10.0, azimuth=0.0, width=100, height=100)
    behind = np.array([[-500.0, 0, 0], [-1e5, 3, 0]])
    assert not drawn(render(behind, camera)).any()
    assert not drawn(render(np.array([[99.0, 0, 0]]), Camera(extent=10.0, width=64, height=64))).any()
    assert not drawn(render(np.zeros((0, 3)), camera)).any()


def test_colours_say_height() -> None:
    colours = height_colours(np.array([-5.0, -2.0, 1.0, 4.0, 9.0]))
    assert colours.dtype == np.uint8
    np.testing.assert_array_equal(colours[0], colours[1])  # clipped
    np.testing.assert_array_equal(colours[3], colours[4])
    assert len(np.unique(colours, axis=0)) == 3


def test_files(tmp_path: Path) -> None:
    points = np.random.default_rng(0).uniform(-9, 9, (500, 3))
    paths = save_views(points, tmp_path / "new", "cloud", extent=10.0, width=128)
    assert [path.name for path in paths] == ["cloud-above.png", "cloud-oblique.png"]
    shown = views(points, extent=10.0, width=128)
    for path, view in zip(paths, ("above", "oblique"), strict=True):
        with Image.open(path) as image:
            np.testing.assert_array_equal(np.asarray(image), shown[view])  # type: ignore[index]


def test_wrong_values() -> None:
    with pytest.raises(ValueError, match="view is 'below'"):
        Camera(view="below")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="extent is nan"):
        Camera(extent=float("nan"))
    with pytest.raises(ValueError, match="width and height are 8"):
        Camera(width=8)
    with pytest.raises(ValueError, match=r"points must be \[N, 3\]"):
        render(np.zeros((3, 2)))
    with pytest.raises(ValueError, match=r"colours must be \[2, 3\]"):
        render(np.zeros((2, 3)), colours=np.zeros((1, 3), np.uint8))
