"""Everything that the report shows, as plain data that is saved with the run and read again."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from stillhouse.core.report import read_results, write_results

_STEPS = re.compile(r"[\s,·(]*\b\d+ steps?\)?$")

Family = Literal["teacher", "few_step", "single_pass"]
Score = Mapping[str, float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class RowResult:
    """One row of a table: a network with a number of steps.

    Attributes:
        name: what the table calls it, for example "teacher, 50 steps".
        family: "teacher"; "few_step" for a student that samples as the teacher does; "single_pass".
        steps: sampler steps; None for a single pass.
        guidance: w of the guidance; None for a single pass.
        parameters: number of parameters that take part.
        evaluations: network evaluations of one scene; a guided step counts two.
        seconds: median time of one scene.
        speedup: how many times faster than the teacher at its largest number of steps, both timed in turns in
            the same run; a number, an interval {estimate, low, high}, or None.
        scores: metric → {estimate, low, high}; the keys are those of `metrics.evaluate_cloud`, in its units.
            Ends that are None were not measured.
        note: what a reader needs to know, for example how it was trained.
        model: which rows are one network at several steps, and so one line of the curves; the name without
            ", N steps" where empty.
        undistilled: trained without the teacher: a baseline.
    """

    name: str
    family: Family
    steps: int | None
    guidance: float | None
    parameters: int
    evaluations: float
    seconds: float
    speedup: float | Score | None
    scores: Mapping[str, Score]
    note: str = ""
    model: str = ""
    undistilled: bool = False

    def __post_init__(self) -> None:
        if self.family not in get_args(Family):
            raise ValueError(f"family is {self.family!r}; allowed: {', '.join(get_args(Family))}")
        if not self.model:
            object.__setattr__(self, "model", _STEPS.sub("", self.name) or self.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureGroup:
    """Pictures of one scene from one place, side by side.

    Attributes:
        scene: what the scene is called.
        view: "above" or "oblique".
        tiles: (caption, path relative to the run's folder) of each, the sweep first.
    """

    scene: str
    view: str
    tiles: Sequence[tuple[str, str]]

    def __post_init__(self) -> None:
        object.__setattr__(self, "tiles", tuple((caption, path) for caption, path in self.tiles))


@dataclass(frozen=True, slots=True, kw_only=True)
class LidarResults:
    """The results of a run or of a study.

    Attributes:
        data: what to call the data, for example "simulated streets".
        simulated: whether the drives that the networks were trained on are simulated.
        tables: data set → its rows, in the order of the tables. The headline is about the first.
        command: the command line that made it.
        made: time, UTC, ISO 8601.
        seed: seed of the run.
        convention: of the metrics, "correct" or "reference".
        scans: data set → the names of the sweeps that were scored.
        intervals: what the intervals resample, for example "drives"; empty where there are none.
        pictures: of `save_scene_pictures`.
        differences: data set → {sentence → interval {estimate, low, high}} of paired differences, for example
            "chamfer, m: Distillation-DPO, 2 steps − teacher, 50 steps".
        preference: rows of the table of the preference ablation; the first column names the row, numbers and
            intervals {estimate, low, high} are shown as such.
        preference_note: a sentence on it.
        log: the trainer's logs, title → path relative to the run's folder.
        memory: network → the estimate before training, as text.
        poses: sentences on poses and their refinement.
        notes: sentences that a reader has to know.
        seeds: the seeds of trainings that the numbers are over.
        timings: what took how long: name → seconds.
        timing_note: on what the seconds were measured: device, threads.
        config: the resolved configuration, nested.
        versions: library → version.
    """

    data: str
    simulated: bool
    tables: Mapping[str, Sequence[RowResult]]
    command: str
    made: str
    seed: int
    convention: Literal["correct", "reference"] = "correct"
    scans: Mapping[str, Sequence[str]] = field(default_factory=dict)
    intervals: str = ""
    pictures: Sequence[PictureGroup] = ()
    differences: Mapping[str, Mapping[str, Score]] = field(default_factory=dict)
    preference: Sequence[Mapping[str, Any]] = ()
    preference_note: str = ""
    log: Mapping[str, str] = field(default_factory=dict)
    memory: Mapping[str, str] = field(default_factory=dict)
    poses: Sequence[str] = ()
    notes: Sequence[str] = ()
    seeds: Sequence[int] = ()
    timings: Mapping[str, float] = field(default_factory=dict)
    timing_note: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.convention not in ("correct", "reference"):
            raise ValueError(f"convention is {self.convention!r}; allowed: 'correct', 'reference'")
        for name in ("pictures", "preference", "poses", "notes", "seeds"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON has lists alone
        for name in ("tables", "scans"):
            value = {key: tuple(rows) for key, rows in getattr(self, name).items()}
            object.__setattr__(self, name, value)
        if not any(self.tables.values()):
            raise ValueError("tables holds no row; give at least one")
        for name, rows in self.tables.items():
            titles = [row.name for row in rows]
            if len(set(titles)) < len(titles):
                raise ValueError(f"tables[{name!r}] has two rows of one name; names must differ")

    @property
    def main(self) -> tuple[str, Sequence[RowResult]]:
        """The first table that has rows: (data set, rows)."""
        return next((name, rows) for name, rows in self.tables.items() if rows)


def save_results(results: LidarResults, folder: str | os.PathLike[str]) -> Path:
    """Write `results.json` into a run's folder, atomically, and return its path.

    Raises:
        TypeError: something in the results is no plain data.
    """
    return write_results(results, folder, domain="lidar")


def load_results(folder: str | os.PathLike[str]) -> LidarResults:
    """Read `results.json` of a run's folder.

    Raises:
        DataError: it is missing or not what `save_results` wrote.
    """
    return read_results(LidarResults, folder, domain="lidar", convert=_rows)


def _rows(table: dict[str, Any]) -> None:
    table["tables"] = {name: [RowResult(**row) for row in rows] for name, rows in table["tables"].items()}
    table["pictures"] = [
        PictureGroup(scene=group["scene"], view=group["view"], tiles=[(a, b) for a, b in group["tiles"]])
        for group in table.get("pictures", [])
    ]
