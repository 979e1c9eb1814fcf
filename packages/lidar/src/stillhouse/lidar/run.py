"""The verbs of the command line: train, evaluate, report, export."""

from __future__ import annotations

import json
import math
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from stillhouse.core.config import load_config, save_config, to_dict
from stillhouse.core.errors import ConfigError, DataError
from stillhouse.core.metrics import bootstrap_interval
from stillhouse.core.provenance import redact, timestamp
from stillhouse.core.run import Run, jsonable, rank

from .config import LidarConfig
from .fit import (
    FEW_STEP,
    Prepared,
    Teacher,
    fit_few_step,
    fit_single,
    fit_teacher,
    memory_lines,
    network_config,
    pair_config,
    prepare,
    training_set,
)
from .networks import SinglePassNet
from .samplers import keep_scene
from .scoring import REFINED, TITLES, Scored, contenders_of, scene_pairs, score

if TYPE_CHECKING:
    from .io import ScanSource
    from .pairs import Pair
    from .report import PictureGroup, RowResult
    from .store import CompleterSettings

_CONFIG, _ARTIFACT, _TEACHER = "config.json", "student", "teacher/artifact"
_LIBRARIES = ("stillhouse-lidar", "stillhouse-core", "torch", "open3d", "diffusers", "scipy")
_SIMULATED, _SUMMARY = "simulated streets", ("chamfer", "jsd_bev", "jsd_3d")


def train(config: LidarConfig, run: Run) -> dict[str, Any]:
    """Train teacher and students, score them, write artefacts and report.

    Everything in the data is checked before the first file is written. Under `torchrun` all processes train
    and the first one evaluates and writes. A run that was cut short goes on from its checkpoints when it is
    given the same `--out`.

    Args:
        config: the configuration.
        run: where to write, seed, device.

    Returns:
        `artifact`, `report`, and the Chamfer distance of each row in metres.

    Raises:
        DataError: drives or a teacher's artefact that cannot be used.
    """
    config = _on_device(config, run)
    with run.progress("Reading drives") as bar:
        data = prepare(config, progress=lambda done, total: bar.advance())
        dataset = training_set(config, data)
    _say(run, data.summary())
    for note in data.notes:
        _say(run, f"  note: {note}")
    memory = memory_lines(config)
    for line in memory:
        _say(run, f"  memory: {line}")
    given = None if config.teacher.weights is None else load_teacher(Path(config.teacher.weights), config)
    if rank() == 0:
        save_config(config, run.path(_CONFIG))
    quiet = None if run.interactive else True
    if given is None:
        _say(run, f"training the teacher: {config.teacher.steps} steps")
        teacher, facts = fit_teacher(config, dataset, seed=run.seed, out=run.path("teacher"), quiet=quiet)
        if rank() == 0:
            _save_teacher(config, teacher, run)
    else:
        teacher, facts = given, {}
    students: dict[str, nn.Module] = {}
    for method in config.distill.students:
        _say(run, f"training the {TITLES[method]}")
        out = run.path(method)
        if method in FEW_STEP:
            students[method], facts[TITLES[method]] = fit_few_step(
                config, dataset, teacher, method, seed=run.seed, out=out, quiet=quiet
            )
        else:
            guide = teacher if method == "single_pass" else None
            students[method], facts[TITLES[method]] = fit_single(
                config, dataset, guide, seed=run.seed, out=out, quiet=quiet
            )
    if rank() != 0:
        return {}
    return _finish(config, data, run, teacher, students, facts, memory)


def _finish(
    config: LidarConfig,
    data: Prepared,
    run: Run,
    teacher: Teacher,
    students: Mapping[str, nn.Module],
    facts: Mapping[str, Mapping[str, Any]],
    memory: Sequence[str],
) -> dict[str, Any]:
    """Score, save the student, write results and report."""
    from .report import LidarResults, save_results, write_report

    begun = time.perf_counter()
    pairs = scene_pairs(config, data.test)
    device = next(teacher.noise.parameters()).device
    for network in (*teacher.networks().values(), *students.values()):
        network.to(device).eval()
    with run.progress("Scoring", total=len(pairs)) as bar:
        rows = score(
            contenders_of(config, teacher, students),
            pairs,
            config,
            seed=run.seed,
            device=device,
            progress=lambda done, total: bar.advance(),
        )
    name = _SIMULATED if data.simulated else ", ".join(source.name for source in data.test)
    table = table_of(rows, config)
    if config.distill.students:
        settings, networks = _completer(config, teacher, students)
        chosen = config.distill.students[0]
        artifact = _save_student(config, run, settings, networks, table, data, chosen)
    else:
        artifact = run.path(_TEACHER)
    results = LidarResults(
        data=name,
        simulated=data.simulated,
        tables={name: table},
        command=_command(sys.argv),
        made=timestamp(),
        seed=run.seed,
        convention=config.evaluate.convention,
        scans={name: [f"{drive}, {len(pair.full):,} points of ground truth" for drive, pair in pairs]},
        intervals="drives" if len({drive for drive, _ in pairs}) > 1 else "",
        pictures=_pictures(config, run, pairs, rows),
        differences={name: differences(rows, config)},
        preference=_preference(rows, facts),
        preference_note=_PREFERENCE,
        log=_logs(config, run),
        memory={line.split(",")[0]: line for line in memory},
        poses=["the poses were refined by ICP before the maps were merged"] if config.data.icp else [],
        notes=list(data.notes),
        seeds=[run.seed],
        timings={
            **{title: float(found["seconds"]) for title, found in facts.items()},
            "scoring": time.perf_counter() - begun,
        },
        timing_note=f"{device.type}, {torch.get_num_threads()} threads; all rows in turns on the same sweeps",
        config=to_dict(config),
        versions={library: version(library) for library in _LIBRARIES},
    )
    save_results(results, run.create())
    page = write_report(run.create(), results)
    chamfer = {row.name: row.scores["chamfer"]["estimate"] for row in table}
    return {
        "artifact": str(artifact),
        "report": str(page),
        "chamfer": chamfer,
        **{f"Chamfer distance, {title}, m": value for title, value in chamfer.items()},
    }


_PREFERENCE = (
    "In a Gaussian model with ideal auxiliary networks the loser's term only widens a student; whether it "
    "helps one that is not ideal is a question to the numbers."
)


def table_of(rows: Sequence[Scored], config: LidarConfig) -> list[RowResult]:
    """Rows of the report's table, the intervals over drives."""
    from .report import RowResult

    slowest = rows[0]
    found = []
    for row in rows:
        contender = row.contender
        single = contender.family == "single_pass"
        ratios = np.asarray(slowest.seconds) / np.asarray(row.seconds)
        found.append(
            RowResult(
                name=contender.title,
                family=contender.family,
                steps=None if single else contender.steps,
                guidance=None if single else contender.guidance,
                parameters=contender.parameters,
                evaluations=row.evaluations,
                seconds=float(np.median(row.seconds)),
                speedup=float(np.median(ratios)),
                scores={
                    metric: row.interval(metric, resamples=config.evaluate.resamples) for metric in row.values
                },
                model=contender.name,
                undistilled=contender.name.startswith(TITLES["single_pass_alone"]),
            )
        )
    return found


def differences(rows: Sequence[Scored], config: LidarConfig) -> dict[str, dict[str, float | None]]:
    """Paired differences: each student against the teacher, and against its baseline."""
    by_title = {row.contender.title: row for row in rows}
    teacher = [row for row in rows if row.contender.family == "teacher"]
    alone = by_title.get(TITLES["single_pass_alone"])
    plain = {row.contender.steps: row for row in rows if row.contender.name == TITLES["vsd"]}
    found = {}
    for row in rows:
        contender = row.contender
        if contender.family == "teacher":
            continue
        others = [teacher[0]] if teacher else []
        if contender.family == "few_step":
            others += [other for other in teacher[1:] if other.contender.steps == contender.steps]
            if contender.name != TITLES["vsd"] and contender.steps in plain:
                others.append(plain[contender.steps])
        elif alone is not None and row is not alone:
            others.append(alone)
        for other in others:
            for metric in ("chamfer", "jsd_bev"):
                title = f"{metric}: {contender.title} − {other.contender.title}"
                found[title] = _difference(row, other, metric, config.evaluate.resamples)
    return found


def _difference(row: Scored, other: Scored, metric: str, resamples: int) -> dict[str, float | None]:
    mine, theirs = np.asarray(row.values[metric]), np.asarray(other.values[metric])
    if len(set(row.groups)) < 2:
        return {"estimate": float(np.mean(mine - theirs)), "low": None, "high": None}
    interval = bootstrap_interval(
        mine, paired_with=theirs, groups=np.asarray(row.groups), resamples=resamples
    )
    return {"estimate": interval.estimate, "low": interval.low, "high": interval.high}


def evaluate(artifact: Path, data: Path | None, config: LidarConfig, run: Run) -> dict[str, Any]:
    """Score a finished student.

    Args:
        artifact: the student's folder, or a run's.
        data: a sequence folder with poses, or a folder of such; None takes the test drives of the run that
            made the student.
        config: says how to cut the ground truth; `data.icp` refines the poses first.
        run: where `evaluation.json` goes.

    Raises:
        DataError: data or artefact cannot be used.
    """
    from .complete import load_completer
    from .metrics import CompletionIoU, evaluate_cloud

    completer = load_completer(artifact, device=str(run.torch_device()))
    sources = prepare(config).test if data is None else _sources(data)
    pairs = scene_pairs(config, sources)
    pooled = CompletionIoU(config.evaluate.levels, convention=config.evaluate.convention)
    values: dict[str, list[float]] = {}
    seconds, evaluations = [], 0
    with run.progress("Completing", total=len(pairs)) as bar:
        for number, (_, pair) in enumerate(pairs):
            begun = time.perf_counter()
            partial = torch.from_numpy(pair.partial)
            generator = torch.Generator().manual_seed(run.seed * 100_003 + number)
            points, evaluations = completer.complete(partial[None], generator=generator)
            cloud = points[0].cpu()
            seconds.append(time.perf_counter() - begun)
            found = evaluate_cloud(
                cloud[keep_scene(cloud, partial, max_range=config.data.max_range)].numpy(),
                pair.full,
                convention=config.evaluate.convention,
                levels=config.evaluate.levels,
                iou=pooled,
            )
            for metric, value in found.items():
                if value is not None:
                    values.setdefault(metric, []).append(float(value))
            bar.advance()
    groups = np.asarray([drive for drive, _ in pairs])
    scores: dict[str, Any] = {}
    for metric, numbers in values.items():
        if len(set(groups)) > 1 and all(map(math.isfinite, numbers)):
            scores[metric] = asdict(bootstrap_interval(numbers, groups=groups))
        else:
            scores[metric] = {"estimate": float(np.mean(numbers)), "low": None, "high": None}
    table = {
        "data": [drive for drive, _ in pairs],
        "convention": config.evaluate.convention,
        "scans": len(pairs),
        "scores": scores,
        "pooled_iou": {f"{level:g}": value for level, value in pooled.compute().items()},
        "evaluations": evaluations,
        "seconds": float(np.median(seconds)),
    }
    run.path("evaluation.json").write_text(
        json.dumps(jsonable(table), indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    return {"chamfer": scores["chamfer"]["estimate"], "seconds": table["seconds"], **table}


def _sources(folder: Path) -> list[ScanSource]:
    from .io import read_sequence

    if (folder / "sequences").is_dir():
        folder = folder / "sequences"
    inside = (
        [sub for sub in sorted(folder.iterdir()) if (sub / "velodyne").is_dir()] if folder.is_dir() else []
    )
    return [read_sequence(sub) for sub in (inside or [folder])]


def report(folder: Path, run: Run) -> dict[str, Any]:
    """Build the report of a finished run again from its results."""
    from .report import load_results, write_report

    return {"report": str(write_report(folder, load_results(folder), out=run.out))}


def export(artifact: Path, format: str, run: Run) -> dict[str, Any]:
    """Export a finished student."""
    from .complete import load_completer
    from .store import export_completer

    return export_completer(load_completer(artifact), format, run.out)


# ---- parts of a run


def _completer(
    config: LidarConfig, teacher: Teacher, students: Mapping[str, nn.Module]
) -> tuple[CompleterSettings, dict[str, nn.Module]]:
    """Settings and networks of the artefact: the first student, with the refinement net if there is one."""
    chosen = config.distill.students[0]
    student = students[chosen]
    networks: dict[str, nn.Module] = (
        {"single": student}
        if isinstance(student, SinglePassNet)
        else {"noise": student, "encoder": teacher.encoder}
    )
    if teacher.refine is not None:
        networks["refine"] = teacher.refine
    return completer_settings(
        config, single="single" in networks, refine=teacher.refine is not None
    ), networks


def completer_settings(
    config: LidarConfig, *, single: bool = False, refine: bool = False, teacher: bool = False
) -> CompleterSettings:
    """How an artefact of this configuration completes a sweep."""
    from .store import CompleterSettings

    evaluate, model, settings = config.evaluate, config.model, config.teacher
    return CompleterSettings(
        kind="single_pass" if single else "diffusion",
        pairs=pair_config(config, augment=False),
        sampler=evaluate.sampler,
        steps=max(evaluate.teacher_steps) if teacher else evaluate.steps,
        guidance=evaluate.teacher_guidance if teacher else evaluate.student_guidance,
        process={
            "beta_start": settings.beta_start,
            "beta_end": settings.beta_end,
            "steps": settings.timesteps,
        },
        network=None if single else network_config(config, model.channels),
        single=network_config(config, model.single_channels) if single else None,
        refine=network_config(config, model.refine_channels) if refine else None,
    )


def _save_teacher(config: LidarConfig, teacher: Teacher, run: Run) -> None:
    from .store import save_completer

    settings = completer_settings(config, refine=teacher.refine is not None, teacher=True)
    card = f"# LiDAR scene completion: teacher\n\n{_card_data(config)}\n"
    save_completer(
        run.path(_TEACHER), teacher.networks(), settings, config=to_dict(config), metrics={}, card=card
    )


def load_teacher(folder: Path, config: LidarConfig) -> Teacher:
    """A teacher that an earlier run saved under `teacher/artifact`.

    Raises:
        DataError: there is none, or it is a single-pass network.
        ConfigError: its widths or voxel are not those of the configuration.
    """
    from .store import load_completer

    if (folder / _TEACHER).is_dir():
        folder = folder / _TEACHER
    completer = load_completer(folder)
    networks = completer.networks
    if "noise" not in networks:
        raise DataError(f"{folder}: is a single-pass network; a teacher is needed in teacher.weights")
    wanted = network_config(config, config.model.channels)
    if completer.settings.network != wanted:
        raise ConfigError(
            f"teacher.weights: {folder} has other sizes than the configuration's model section; take the "
            f"config.json beside it"
        )
    return Teacher(
        noise=networks["noise"],  # type: ignore[arg-type]
        encoder=networks["encoder"],  # type: ignore[arg-type]
        process=completer.settings.make_process(),
        refine=networks.get("refine"),  # type: ignore[arg-type]
    )


def _save_student(
    config: LidarConfig,
    run: Run,
    settings: CompleterSettings,
    networks: Mapping[str, nn.Module],
    table: Sequence[RowResult],
    data: Prepared,
    chosen: str,
) -> Path:
    from .store import save_completer

    suffix = REFINED if "refine" in networks else ""
    mine = [row for row in table if row.model == TITLES[chosen] + suffix]
    row = min(mine, key=lambda found: abs((found.steps or 1) - config.evaluate.steps))
    numbers = {metric: row.scores[metric] for metric in _SUMMARY}
    lines = [f"- {metric}: {value['estimate']:.3f}" for metric, value in numbers.items()]
    card = "\n".join(
        (
            f"# LiDAR scene completion: {TITLES[chosen]}",
            "",
            _card_data(config),
            "",
            f"{row.name} on {_SIMULATED if data.simulated else 'the test sequences'}:",
            "",
            *lines,
            "",
        )
    )
    artifact = save_completer(
        run.path(_ARTIFACT),
        networks,
        settings,
        config=to_dict(config),
        metrics=jsonable(numbers),
        card=card,
        provenance={"data": _card_data(config), "seed": run.seed},
    )
    return artifact.folder


def _card_data(config: LidarConfig) -> str:
    if config.data.path is None:
        return "Trained on simulated streets: it shows that the method works, and knows no real road."
    return (
        "Trained on the drives named in config.json. Where these are KITTI's or SemanticKITTI's, their "
        "licence (CC BY-NC-SA 3.0, non-commercial) goes with the weights."
    )


def _pictures(
    config: LidarConfig, run: Run, pairs: Sequence[tuple[str, Pair]], rows: Sequence[Scored]
) -> list[PictureGroup]:
    """Pictures of the first sweep of the first two drives."""
    from .report import save_scene_pictures

    groups: list[PictureGroup] = []
    shown = _shown(rows, config)
    seen: list[str] = []
    for drive, pair in pairs:
        if drive in seen or len(seen) == 2:
            continue
        seen.append(drive)
        clouds = {"thinned sweep": pair.partial}
        clouds |= {row.contender.title: row.clouds[drive] for row in shown}
        clouds["ground truth"] = pair.full
        groups += save_scene_pictures(run.create(), drive, clouds, config.data.max_range)
    return groups


def _shown(rows: Sequence[Scored], config: LidarConfig) -> list[Scored]:
    """The teacher at most steps, each student as it is used; refined where there is a refinement net."""
    found = []
    for row in rows:
        contender = row.contender
        most = contender.family == "teacher" and contender.steps == max(config.evaluate.teacher_steps)
        used = contender.family == "few_step" and contender.steps == config.evaluate.steps
        if most or used or contender.family == "single_pass":
            found.append(row)
    sharp = [row for row in found if row.contender.name.endswith(REFINED)]
    return sharp or found


def _preference(rows: Sequence[Scored], facts: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Distillation-DPO beside plain VSD at the same steps; empty where one of them was not trained."""
    names = (TITLES["vsd"], TITLES["distillation_dpo"])
    if not all(any(row.contender.name == name for row in rows) for name in names):
        return []
    table = []
    for row in rows:
        if row.contender.name in names:
            terms = facts.get(row.contender.name, {}).get("terms", {})
            table.append(
                {
                    "objective": row.contender.title,
                    "Chamfer, m": row.interval("chamfer"),
                    "JSD-BEV": row.interval("jsd_bev"),
                    "pairs that flip": terms.get("flip"),
                }
            )
    return table


def _logs(config: LidarConfig, run: Run) -> dict[str, str]:
    folders = {"teacher": "teacher/noise", "teacher by preference": "teacher/preference"}
    folders |= {"refinement": "teacher/refine"}
    folders |= {TITLES[method]: method for method in config.distill.students}
    return {
        title: f"{folder}/log.jsonl"
        for title, folder in folders.items()
        if (run.out / folder / "log.jsonl").is_file()
    }


def _command(argv: list[str]) -> str:
    """The command line as one would type it again: without the folder of the program, secrets blanked."""
    program = Path(argv[0])
    name = "python -m stillhouse.lidar" if program.name == "__main__.py" else program.name
    return " ".join((name, *map(shlex.quote, redact(argv[1:]))))


def _on_device(config: LidarConfig, run: Run) -> LidarConfig:
    """Put the command's device and seed into the configuration, which is saved."""
    device = run.torch_device() if run.device != "auto" else None
    if device is not None and device.index:
        raise ConfigError(
            f"--device {run.device}: training takes the first devices that are visible; set "
            f"CUDA_VISIBLE_DEVICES={device.index}"
        )
    accelerator = config.train.accelerator if device is None else device.type
    return replace(config, train=replace(config.train, seed=run.seed, accelerator=accelerator))


def _say(run: Run, text: str) -> None:
    """Say something once, however many processes run."""
    if rank() == 0:
        run.say(text)


def config_of(folder: Path) -> LidarConfig:
    """The configuration that a finished run was made with.

    Raises:
        DataError: the folder is no run.
    """
    path = Path(folder) / _CONFIG
    if not path.is_file():
        raise DataError(f"{path}: is missing; give the folder of a finished run")
    return load_config(LidarConfig, path)
