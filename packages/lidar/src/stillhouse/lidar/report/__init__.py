"""The report of a lidar run: its results as plain data, and the page built from them."""

from __future__ import annotations

from ._page import build_report as build_report
from ._page import write_report as write_report
from ._pictures import save_scene_pictures as save_scene_pictures
from ._results import LidarResults as LidarResults
from ._results import PictureGroup as PictureGroup
from ._results import RowResult as RowResult
from ._results import load_results as load_results
from ._results import save_results as save_results
