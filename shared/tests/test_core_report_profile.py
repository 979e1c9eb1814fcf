from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from stillhouse.core.report import (
    Report,
    compare_profiles,
    profile,
)


class Clock:
    """A clock that models advance by what they cost; a busy neighbour makes it jump between slices."""

    def __init__(self, slice_ms: float = float("inf"), stolen_ms: float = 0.0) -> None:
        self.now, self.used, self.slice, self.stolen = 0.0, 0.0, slice_ms / 1000, stolen_ms / 1000

    def spend(self, seconds: float) -> None:
        before = self.used // self.slice
        self.used += seconds
        self.now += seconds + (self.used // self.slice - before) * self.stolen

    def __call__(self) -> float:
        return self.now


class Costly(nn.Module):
    def __init__(self, clock: Clock, milliseconds: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.clock, self.seconds, self.calls = clock, milliseconds / 1000, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert not self.training
        assert torch.is_inference_mode_enabled()
        self.calls += 1
        self.clock.spend(self.seconds)
        return x


def test_latencies_are_those_of_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    teacher, student = Costly(clock, 50.0), Costly(clock, 2.0)
    measured = compare_profiles({"teacher": teacher, "student": student}, torch.zeros(3, 2), runs=4, warmup=2)
    for name, ms, passes in (("teacher", 50.0, 1), ("student", 2.0, 25)):
        latency = measured.profiles[name].latency
        assert (latency.median, latency.p10, latency.p90) == pytest.approx((ms, ms, ms))
        assert (latency.runs, latency.passes) == (4, passes)
    assert (teacher.calls, student.calls) == (2 + 4, 2 + 4 * 25)
    assert measured.ratio("student", "latency") == pytest.approx(0.04)
    assert measured.stable("student")
    assert measured.profiles["student"].batch == 3


def test_a_busy_machine_does_not_flatter_the_small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A neighbour takes 12 ms after every 4 ms of ours; single passes make 1/25 look like 1/100 or less."""
    clock = Clock(slice_ms=4.0, stolen_ms=12.0)
    monkeypatch.setattr(time, "perf_counter", clock)
    models = {"teacher": Costly(clock, 2.5), "student": Costly(clock, 0.1)}
    naive = []
    for _ in range(31):
        marks = [clock()]
        for seconds in (0.0025, 0.0001):
            clock.spend(seconds)
            marks.append(clock())
        naive.append((marks[1] - marks[0]) / (marks[2] - marks[1]))
    assert float(np.median(naive)) > 100
    measured = compare_profiles(models, torch.zeros(1, 2), runs=31, warmup=3)
    assert 1 / measured.ratio("student", "latency") == pytest.approx(25, rel=0.35)


def test_sizes_count_what_is_shared_once() -> None:
    model = nn.Sequential(nn.Linear(10, 10), nn.BatchNorm1d(10), nn.Linear(10, 10))
    model[2].weight = model[0].weight
    model[1].eval()
    made = profile(model, torch.zeros(4, 10), name="m", runs=2, warmup=1, flops=True)
    assert made.parameters == 100 + 10 + 10 + 20
    assert made.bytes == 4 * (140 + 20) + 8  # running mean and variance; the int64 counter
    assert made.flops == 2 * (2 * 4 * 10 * 10)
    assert made.batch == 4
    assert (model.training, model[0].training, model[1].training) == (True, True, False)
    assert made.disk is None


def test_inputs_as_tuples_and_mappings(tmp_path: Path) -> None:
    class Two(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
            return scale * (a @ b)

    (tmp_path / "weights").write_bytes(b"x" * 123)
    a, b = torch.zeros(5, 3), torch.zeros(3, 2)
    by_place = profile(Two(), (a, b), name="m", runs=2, warmup=1, flops=True, disk=tmp_path)
    by_name = profile(Two(), {"b": b, "a": a, "scale": 2.0}, name="m", runs=2, warmup=1, flops=True)
    assert by_place.flops == by_name.flops == 2 * 5 * 3 * 2
    assert by_place.disk == 123
    assert by_place.parameters == by_place.bytes == 0


def test_comparisons_make_table_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    models = {"teacher": Costly(clock, 40.0), "student": Costly(clock, 10.0)}
    measured = compare_profiles(models, torch.zeros(1, 2), runs=2, warmup=1)
    section = (
        Report("t").section("s").table(measured.rows(), formats=measured.formats(), best={"latency": "min"})
    )
    shown = [[cell["shown"].replace("\u202f", " ") for cell in row] for row in section.blocks[0]["shown"]]
    assert shown == [
        ["teacher", "2", "8 B", "40.0 ms [40.0, 40.0]", "1", "1"],
        ["student", "2", "8 B", "10.0 ms [10.0, 10.0]", "1", "1/4"],
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"baseline": "big"}, "baseline is 'big'; give one of 'm'"),
        ({"runs": 1}, "runs is 1"),
        ({"warmup": 0}, "warmup is 0"),
        ({"disk": {"m": Path("/nonexistent")}}, "does not exist"),
        ({"disk": {"other": Path(__file__)}}, "disk names 'other'"),
    ],
)
def test_wrong_profiles(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare_profiles({"m": nn.Identity()}, torch.zeros(1), **{"baseline": "m", **options})
