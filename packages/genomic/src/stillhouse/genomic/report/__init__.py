"""The report of a genomic run: its results as plain data, and the page built from them."""

from __future__ import annotations

from ._finetune import finetune_report as finetune_report
from ._page import build_report as build_report
from ._page import write_report as write_report
from ._results import GenomicResults as GenomicResults
from ._results import ModelRow as ModelRow
from ._results import TaskRow as TaskRow
from ._results import embedding_points as embedding_points
from ._results import load_results as load_results
from ._results import save_results as save_results
