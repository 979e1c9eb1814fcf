"""Teacher and students on held-out simulated streets and on a real sweep, over several seeds.

    python packages/lidar/benchmarks/streets.py --out runs/streets --seed 0 --kitti sequences/00
    python packages/lidar/benchmarks/streets.py --out runs/streets --table

The first form trains everything for one seed (weights, batches, noise; the streets are the same for all), in
a folder of its own, and goes on from its checkpoints when it was cut short. The second joins the seeds found
there into tables: means over seeds and sweeps; an interval resamples (seed, drive) as one. `--kitti` is a
sequence folder of KITTI odometry with velodyne/, poses.txt and calib.txt; sweep 0 is completed and compared
with the map of all sweeps that are there, their poses refined by ICP. Moving objects stay in that map: there
are no labels.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from stillhouse.core.config import load_config, to_dict
from stillhouse.core.metrics import bootstrap_interval
from stillhouse.lidar.config import LidarConfig
from stillhouse.lidar.fit import (
    FEW_STEP,
    Teacher,
    fit_few_step,
    fit_single,
    fit_teacher,
    prepare,
    training_set,
)
from stillhouse.lidar.io import read_sequence
from stillhouse.lidar.report import save_scene_pictures
from stillhouse.lidar.scoring import (
    TITLES,
    Contender,
    Scored,
    contenders_of,
    diffusion_contender,
    scene_pairs,
    score,
)

METRICS = ("chamfer", "jsd_3d", "jsd_bev", "iou_0.5", "iou_0.2", "iou_0.1")
HEADS = ("CD, m", "JSD-3D", "JSD-BEV", "IoU 0.5", "IoU 0.2", "IoU 0.1")
ABLATIONS = {"without the Chamfer term": {"data_weight": 0.0}}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--config", default="streets_small")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--kitti", type=Path)
    parser.add_argument(
        "--ablate", action="store_true", help="also train Distillation-DPO without its data term"
    )
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    if given.table:
        print(tables(given.out))
    elif given.seed is None:
        parser.error("give --seed N to train, or --table")
    else:
        study(given.out, given.seed, given.config, given.overrides, given.kitti, ablate=given.ablate)


def study(
    out: Path, seed: int, preset: str, overrides: list[str], kitti: Path | None, *, ablate: bool
) -> None:
    """Train and score everything for one seed."""
    config = load_config(LidarConfig, preset, overrides=overrides, presets="stillhouse.lidar.configs")
    folder = out / f"seed-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    data = prepare(config)
    dataset = training_set(config, data)
    times = {}
    teacher, facts = fit_teacher(config, dataset, seed=seed, out=folder / "teacher", quiet=True)
    times["teacher"] = sum(found["seconds"] for found in facts.values())
    say(f"teacher {times['teacher']:.0f} s")
    students: dict[str, Any] = {}
    for method in config.distill.students:
        if method in FEW_STEP:
            students[method], found = fit_few_step(
                config, dataset, teacher, method, seed=seed, out=folder / method, quiet=True
            )
        else:
            guide = teacher if method == "single_pass" else None
            students[method], found = fit_single(
                config, dataset, guide, seed=seed, out=folder / method, quiet=True
            )
        times[TITLES[method]] = found["seconds"]
        say(f"{method} {found['seconds']:.0f} s {found['terms']}")
    rows = contenders_of(config, teacher, students)
    if ablate:
        rows += ablations(config, dataset, teacher, seed, folder)
    result: dict[str, Any] = {"seed": seed, "config": to_dict(config), "times": times, "tables": {}}
    pairs = scene_pairs(config, data.test)
    scored = score(rows, pairs, config, seed=seed)
    result["tables"]["simulated streets"] = [plain(row) for row in scored]
    drive = pairs[0][0]
    clouds = {"thinned sweep": pairs[0][1].partial}
    clouds |= {row.contender.title: row.clouds[drive] for row in scored}
    save_scene_pictures(folder, drive, clouds | {"ground truth": pairs[0][1].full}, config.data.max_range)
    say("streets scored")
    if kitti is not None:
        refined = replace(config, data=replace(config.data, icp=True))
        real = scene_pairs(refined, [read_sequence(kitti)], scans=1)
        scored = score(rows, real, refined, seed=seed)
        result["tables"]["KITTI 00, sweep 0"] = [plain(row) for row in scored]
        clouds = {"thinned sweep": real[0][1].partial}
        clouds |= {row.contender.title: row.clouds[real[0][0]] for row in scored}
        save_scene_pictures(
            folder, "kitti", clouds | {"ground truth": real[0][1].full}, config.data.max_range
        )
    (folder / "scores.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    say("done")


def ablations(
    config: LidarConfig, dataset: Any, teacher: Teacher, seed: int, folder: Path
) -> list[Contender]:
    """Distillation-DPO with another weight of the loser."""
    rows = []
    for title, change in ABLATIONS.items():
        other = replace(config, distill=replace(config.distill, **change))
        student, found = fit_few_step(
            other,
            dataset,
            teacher,
            "distillation_dpo",
            seed=seed,
            out=folder / title.replace(" ", "-"),
            quiet=True,
        )
        say(f"{title} {found['seconds']:.0f} s")
        rows += [
            diffusion_contender(
                f"Distillation-DPO, {title}",
                "few_step",
                student,
                teacher,
                config,
                steps=steps,
                guidance=config.evaluate.student_guidance,
            )
            for steps in config.evaluate.student_steps
        ]
    return rows


def plain(row: Scored) -> dict[str, Any]:
    """A scored row as JSON."""
    contender = row.contender
    return {
        "title": contender.title,
        "name": contender.name,
        "family": contender.family,
        "steps": contender.steps,
        "parameters": contender.parameters,
        "evaluations": row.evaluations,
        "seconds": row.seconds,
        "groups": row.groups,
        "values": {metric: row.values[metric] for metric in METRICS},
    }


Part = dict[str, dict[str, Any]]  # the rows of one seed by title


def tables(out: Path) -> str:
    """Markdown of every data set, then the paired differences."""
    seeds = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob("seed-*/scores.json"))]
    if not seeds:
        raise SystemExit(f"{out}: no seed has finished")
    lines = [f"{len(seeds)} seeds: {', '.join(str(found['seed']) for found in seeds)}", ""]
    for name in seeds[0]["tables"]:
        parts: list[Part] = [{row["title"]: row for row in found["tables"][name]} for found in seeds]
        lines += [f"**{name}**", "", *table(parts), "", *gaps(parts), ""]
    return "\n".join(lines)


def table(parts: list[Part]) -> list[str]:
    """One table: a row for each contender, its scores over the seeds that have it."""
    lines = [
        f"| row | parameters | evaluations | s a sweep | faster | {' | '.join(HEADS)} |",
        "|" + "---|" * (5 + len(HEADS)),
    ]
    titles = list(dict.fromkeys(title for part in parts for title in part))
    slowest = titles[0]
    for title in titles:
        own = [part for part in parts if title in part]
        row = own[0][title]
        seconds = np.concatenate([part[title]["seconds"] for part in own])
        slow = np.concatenate([part[slowest]["seconds"] for part in own])
        cells = [interval(own, title, metric) for metric in METRICS]
        few = "" if len(own) == len(parts) else f" (seeds: {len(own)})"
        lines.append(
            f"| {title}{few} | {row['parameters'] / 1e6:.2f} M | {row['evaluations']} | "
            f"{np.median(seconds):.3f} | {np.median(slow / seconds):.1f}× | {' | '.join(cells)} |"
        )
    return lines


def clusters(parts: list[Part], title: str, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Values and their clusters: a seed's sweeps of one drive."""
    values = np.concatenate([part[title]["values"][metric] for part in parts])
    names = [f"{seed} {group}" for seed, part in enumerate(parts) for group in part[title]["groups"]]
    return values, np.asarray(names)


def interval(parts: list[Part], title: str, metric: str) -> str:
    """Mean with its interval, or without where there is one cluster alone."""
    values, groups = clusters(parts, title, metric)
    if len(set(groups)) < 2:
        return f"{values.mean():.3f}"
    found = bootstrap_interval(values, groups=groups)
    return f"{found.estimate:.3f} [{found.low:.3f}, {found.high:.3f}]"


def gaps(parts: list[Part]) -> list[str]:
    """Paired differences with the teacher at most steps, at equal steps, and of the single-pass networks."""
    rows = parts[0]
    teacher, alone, plain_vsd = next(iter(rows)), TITLES["single_pass_alone"], TITLES["vsd"]
    wanted = []
    for title, row in rows.items():
        steps = title.split(", ")[-1]
        if row["family"] == "few_step" and not row["name"].endswith(tuple(ABLATIONS)):
            wanted += [(title, teacher), (title, f"teacher, {steps}")]
            if row["name"] != plain_vsd:
                wanted.append((title, f"{plain_vsd}, {steps}"))
        elif row["family"] == "single_pass":
            wanted += [(title, teacher), (title, alone)]
    lines = ["| difference (negative: the first is better) | CD, m | JSD-BEV |", "|---|---|---|"]
    for title, other in dict.fromkeys(wanted):
        both = [part for part in parts if title in part and other in part]
        if title == other or not both:
            continue
        cells = []
        for metric in ("chamfer", "jsd_bev"):
            mine, groups = clusters(both, title, metric)
            theirs, _ = clusters(both, other, metric)
            if len(set(groups)) < 2:
                cells.append(f"{(mine - theirs).mean():+.3f}")
                continue
            found = bootstrap_interval(mine, paired_with=theirs, groups=groups)
            cells.append(f"{found.estimate:+.3f} [{found.low:+.3f}, {found.high:+.3f}]")
        lines.append(f"| {title} − {other} | {' | '.join(cells)} |")
    return lines


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


if __name__ == "__main__":
    main()
