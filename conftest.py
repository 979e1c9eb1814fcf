"""Which tests run: `--run-slow` brings the slow ones; GPU and real-data tests run where there is one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--run-slow`."""
    parser.addoption("--run-slow", action="store_true", help="run the tests marked slow")


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what this machine or this call does not run, each with its reason."""
    skips: list[tuple[str, pytest.MarkDecorator]] = []
    if not config.getoption("--run-slow"):
        skips.append(("slow", pytest.mark.skip(reason="slow: --run-slow runs it")))
    data = os.environ.get("STILLHOUSE_TEST_DATA")
    if not data:
        skips.append(("real_data", pytest.mark.skip(reason="STILLHOUSE_TEST_DATA is not set")))
    elif not Path(data).is_dir():
        raise pytest.UsageError(f"STILLHOUSE_TEST_DATA names {data}, which is no folder")
    if any(item.get_closest_marker("gpu") for item in items) and not _has_cuda():
        skips.append(("gpu", pytest.mark.skip(reason="no CUDA device")))
    for item in items:
        for marker, skip in skips:
            if item.get_closest_marker(marker):
                item.add_marker(skip)
