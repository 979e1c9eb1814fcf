"""The verbs of the trade: complete, view, aggregate, simulate. Imported for `--help`, so light."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stillhouse.core.cli import DeviceOption, JsonOption, OutOption, SeedOption, VerboseOption, speaking
from stillhouse.core.errors import ConfigError, DataError
from stillhouse.core.run import Run

if TYPE_CHECKING:
    from .complete import Completer

CLOUDS = ("ply", "pcd", "bin")
_NOT_CLOUDS = ("npy", "npz", "txt", "csv", "xyz", "pts", "las", "laz", "obj", "e57", "png", "jpg", "json")

ModelOption = Annotated[
    Path,
    typer.Option(
        "--model", "-m", metavar="DIR", help="Folder of a finished student, or of the run that made it."
    ),
]
ScansArgument = Annotated[
    list[Path],
    typer.Argument(metavar="SCAN…", help="Sweeps (.bin, .ply, .pcd, .pcd.bin), or folders of sweeps."),
]


def add_verbs(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    _add_complete(app)
    _add_view(app)
    _add_aggregate(app)
    _add_simulate(app)


def _add_complete(app: typer.Typer) -> None:
    @app.command(help="Complete sweeps to dense scenes.")
    def complete(
        scans: ScansArgument,
        model: ModelOption,
        out: Annotated[
            Path,
            typer.Option("--out", "-o", metavar="FILE|DIR", help="A cloud (.ply, .pcd, .bin), or a folder."),
        ],
        format: Annotated[
            str,
            typer.Option("--format", "-f", metavar="FORMAT", help="Of clouds in a folder: ply, pcd or bin."),
        ] = "ply",
        steps: Annotated[
            int | None,
            typer.Option("--steps", min=1, max=1000, help="Sampler steps.", show_default="the student's"),
        ] = None,
        guidance: Annotated[
            float | None,
            typer.Option(
                "--guidance", min=0.0, help="w of the guidance; 1 is none.", show_default="the student's"
            ),
        ] = None,
        keep: Annotated[
            bool,
            typer.Option("--keep-input/--no-keep-input", help="Add the sweep's own points to the scene."),
        ] = False,
        pictures: Annotated[
            bool, typer.Option("--pictures", help="Write pictures before and after beside each cloud.")
        ] = False,
        seed: SeedOption = 0,
        device: DeviceOption = "auto",
        json: JsonOption = False,
        verbose: VerboseOption = False,
    ) -> None:
        run = Run(out=out.parent, seed=seed or 0, device=device, json=json, verbose=verbose)
        rows: list[dict[str, Any]] = []
        with speaking(run):
            from .complete import find_scans, load_completer

            found = find_scans(scans)
            targets = _targets(found, out, format)
            completer = load_completer(model, device=str(run.torch_device()))
            completer.check(steps=steps, guidance=guidance)
            _check_sweeps(run, completer, found)
            with run.progress("Completing", total=len(found)) as bar:
                for path, target in zip(found, targets, strict=True):
                    row = _complete(
                        run, completer, path, target, steps, guidance, keep=keep, pictures=pictures
                    )
                    rows.append(row)
                    bar.advance()
                    if not json:
                        run.say(
                            f"{row['scan']}: {row['input']} → {row['points']} points, {row['evaluations']} "
                            f"network evaluations, {row['seconds']:.2f} s → {row['out']}"
                        )
        if json:
            _print_json({"model": str(model), "results": rows})


def _targets(found: list[Path], out: Path, format: str) -> list[Path]:
    """Where each completed cloud goes.

    Raises:
        ConfigError: it would overwrite a sweep, is one file for many sweeps, or has an unknown format.
    """
    if format not in CLOUDS:
        raise ConfigError(f"--format {format}: allowed are {', '.join(CLOUDS)}")
    suffix = out.suffix.lower().removeprefix(".")
    if suffix in CLOUDS and not out.is_dir():
        if len(found) > 1:
            raise ConfigError(f"--out {out}: is one file, there are {len(found)} sweeps; give a folder")
        targets = [out]
    elif out.is_file() or suffix in _NOT_CLOUDS:
        raise ConfigError(f"--out {out}: must be a folder, or a file that ends in .ply, .pcd or .bin")
    else:
        targets = [out / f"{name}.{format}" for name in _names(found)]
    inputs = {path.resolve() for path in found}
    for target in targets:
        if target.resolve() in inputs:
            raise ConfigError(f"--out {out}: would overwrite the sweep {target}; give another place")
    return targets


def _check_sweeps(run: Run, completer: Completer, found: list[Path]) -> None:
    """Read every sweep before anything is written, so that a bad one leaves nothing behind."""
    from .io import read_scan
    from .pairs import partial_points

    with run.progress("Checking", total=len(found)) as bar:
        for path in found:
            partial_points(read_scan(path), completer.pairs)
            bar.advance()


def _complete(
    run: Run,
    completer: Completer,
    path: Path,
    target: Path,
    steps: int | None,
    guidance: float | None,
    *,
    keep: bool,
    pictures: bool,
) -> dict[str, Any]:
    import numpy as np

    from .io import read_scan, write_cloud

    scan = read_scan(path)
    done = completer(scan, steps=steps, guidance=guidance, seed=run.seed)
    points = np.concatenate([done.points, scan.points]) if keep else done.points
    _make(target.parent)
    write_cloud(target, points)
    row: dict[str, Any] = {
        "scan": str(path),
        "input": len(scan),
        "points": len(points),
        "evaluations": done.evaluations,
        "seconds": done.seconds,
        "out": str(target),
    }
    if pictures:
        row["pictures"] = _pictures(target, scan.points, points, completer.max_range)
    return row


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"{folder}: the folder cannot be made ({error.strerror}); give another --out"
        ) from error


def _pictures(target: Path, before: Any, after: Any, extent: float) -> list[str]:
    from .render import save_views

    written = save_views(before, target.parent, f"{target.stem}-before", extent=extent)
    written += save_views(after, target.parent, f"{target.stem}-after", extent=extent)
    return [str(path) for path in written]


def _names(paths: list[Path]) -> list[str]:
    """Names of the outputs: the sweep's own, with its folder's where two are the same."""
    stems = [path.name.split(".")[0] for path in paths]
    if len(set(stems)) == len(stems):
        return stems
    longer = ["-".join([*path.parts[-3:-1], stem]) for path, stem in zip(paths, stems, strict=True)]
    if len(set(longer)) == len(longer):
        return longer
    return [f"{index:06d}-{stem}" for index, stem in enumerate(stems)]


def _add_view(app: typer.Typer) -> None:
    @app.command(help="Draw clouds from above and obliquely; no display is needed.")
    def view(
        clouds: Annotated[list[Path], typer.Argument(metavar="CLOUD…", help="Clouds or sweeps.")],
        out: Annotated[
            Path, typer.Option("--out", "-o", metavar="DIR", help="Folder of the pictures.")
        ] = Path("."),
        extent: Annotated[
            float, typer.Option("--extent", min=1.0, help="Metres from the sensor to the edge.")
        ] = 25.0,
        width: Annotated[int, typer.Option("--width", min=64, max=8192, help="Of a picture, pixels.")] = 1080,
        window: Annotated[
            bool, typer.Option("--window", help="Open an interactive window; needs a display.")
        ] = False,
        json: JsonOption = False,
        verbose: VerboseOption = False,
    ) -> None:
        run = Run(out=out, json=json, verbose=verbose)
        written: list[str] = []
        with speaking(run):
            from .complete import find_scans
            from .io import read_scan
            from .render import save_views, show

            found = find_scans(clouds)
            for path in found:
                read_scan(path)  # nothing is written where one cannot be read
            for path, name in zip(found, _names(found), strict=True):
                points = read_scan(path).points
                if window:
                    show(points, title=path.name)
                    continue
                written += map(str, save_views(points, run.create(), name, extent=extent, width=width))
            for picture in [] if json else written:
                run.say(picture)
        if json:
            _print_json({"pictures": written})


def _add_aggregate(app: typer.Typer) -> None:
    @app.command(help="Merge the sweeps of a sequence into one map by their poses.")
    def aggregate(
        sequence: Annotated[
            Path, typer.Argument(metavar="SEQUENCE", help="Folder with velodyne/, poses.txt, calib.txt.")
        ],
        out: Annotated[
            Path, typer.Option("--out", "-o", metavar="FILE", help="The map: .ply, .pcd, .bin or .npy.")
        ],
        voxel: Annotated[
            float, typer.Option("--voxel", min=0.01, help="One point a voxel of this side, metres.")
        ] = 0.1,
        min_range: Annotated[
            float, typer.Option("--min-range", min=0.0, help="Nearer points are dropped.")
        ] = 3.5,
        max_range: Annotated[
            float | None, typer.Option("--max-range", help="Farther points are dropped.")
        ] = None,
        moving: Annotated[
            bool, typer.Option("--moving/--static", help="Keep points that are labelled as moving.")
        ] = False,
        icp: Annotated[bool, typer.Option("--icp", help="Refine the poses before merging.")] = False,
        json: JsonOption = False,
        verbose: VerboseOption = False,
    ) -> None:
        run = Run(out=out.parent, json=json, verbose=verbose)
        result: dict[str, Any] = {}
        with speaking(run):
            result = _aggregate(run, sequence, out, voxel, min_range, max_range, moving=moving, icp=icp)
            if not json:
                run.say(f"{result['scans']} sweeps → {result['points']} points → {result['map']}")
        if json:
            _print_json(result)


def _aggregate(
    run: Run,
    folder: Path,
    out: Path,
    voxel: float,
    min_range: float,
    max_range: float | None,
    *,
    moving: bool,
    icp: bool,
) -> dict[str, Any]:
    import numpy as np

    from .io import atomic_file, read_sequence, write_cloud
    from .mapping import aggregate as merge

    if out.suffix.lower() not in (".ply", ".pcd", ".bin", ".npy"):
        raise ConfigError(f"--out {out}: must end in .ply, .pcd, .bin or .npy")
    if max_range is not None and max_range <= min_range:
        raise ConfigError(f"--max-range {max_range}: must be above --min-range ({min_range})")
    if out.is_dir():
        raise ConfigError(f"--out {out}: is a folder; give the name of a file")
    found = read_sequence(folder)
    if found.poses is None:
        raise DataError(f"{folder}: has no poses.txt; sweeps cannot be merged without poses")
    with run.progress("Merging", total=len(found)) as bar:
        points = merge(
            found,
            found.poses,
            voxel=voxel,
            min_range=min_range,
            max_range=max_range,
            static=not moving,
            icp=icp,
            progress=lambda done, total: bar.advance(),
        )
    _make(out.parent)
    if out.suffix.lower() == ".npy":
        with atomic_file(out) as stream:
            np.save(stream, points)
    else:
        write_cloud(out, points)
    return {"map": str(out), "scans": len(found), "points": len(points), "voxel": voxel, "icp": icp}


def _add_simulate(app: typer.Typer) -> None:
    @app.command(help="Write simulated drives in SemanticKITTI's layout: sweeps, labels, poses, exact maps.")
    def simulate(
        streets: Annotated[int, typer.Option("--streets", min=1, max=1000, help="Drives to make.")] = 2,
        scans: Annotated[int, typer.Option("--scans", min=1, max=10_000, help="Sweeps of a drive.")] = 6,
        rings: Annotated[int, typer.Option("--rings", min=2, max=256, help="Lasers.")] = 64,
        azimuths: Annotated[
            int, typer.Option("--azimuths", min=8, max=8192, help="Rays of a laser in a turn.")
        ] = 1024,
        out: OutOption = None,
        seed: SeedOption = 0,
        json: JsonOption = False,
        verbose: VerboseOption = False,
    ) -> None:
        if out is None:
            raise ConfigError("--out is required: the folder to write the drives to")
        begin = seed or 0
        run = Run(out=out, seed=begin, json=json, verbose=verbose)
        written: list[str] = []
        with speaking(run):
            from .simulate import SimulateConfig, simulate_sequence, write_kitti

            if run.out.is_dir() and any(run.out.iterdir()):
                raise DataError(f"{run.out}: is not empty; give a new folder")
            with run.progress("Driving", total=streets) as bar:
                for index in range(streets):
                    config = SimulateConfig(seed=begin + index, scans=scans, rings=rings, azimuths=azimuths)
                    drive = simulate_sequence(config)
                    written.append(str(write_kitti(drive, run.create() / "sequences" / f"{index:02d}")))
                    bar.advance()
            if not json:
                run.say(f"{streets} drives of {scans} sweeps → {run.out}")
        if json:
            _print_json({"sequences": written, "out": str(run.out)})


def _print_json(result: dict[str, Any]) -> None:
    import json
    import sys

    from stillhouse.core.run import jsonable

    sys.stdout.write(json.dumps(jsonable(result), ensure_ascii=False, allow_nan=False) + "\n")
