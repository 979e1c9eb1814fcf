"""The report of a kidney run: its results as plain data, and the page built from them."""

from __future__ import annotations

from ._page import build_report as build_report
from ._page import write_report as write_report
from ._results import KidneyResults as KidneyResults
from ._results import ModelRow as ModelRow
from ._results import Retrieved as Retrieved
from ._results import embedding_points as embedding_points
from ._results import leakage_table as leakage_table
from ._results import load_results as load_results
from ._results import save_results as save_results
from ._results import save_retrieval as save_retrieval
