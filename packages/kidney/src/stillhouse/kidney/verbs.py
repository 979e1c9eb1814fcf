"""The verbs of the trade: identify, gallery, patches, leakage, simulate. Imported for `--help`, so light."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stillhouse.core.cli import DeviceOption, JsonOption, OutOption, SeedOption, VerboseOption, speaking
from stillhouse.core.errors import ConfigError, DataError
from stillhouse.core.run import ProgressHandle, Run

if TYPE_CHECKING:
    from .store import FinishedStudent

ModelOption = Annotated[
    Path,
    typer.Option(
        "--model", "-m", metavar="DIR", help="Folder of a finished student, or of the run that made it."
    ),
]
StoneOption = Annotated[
    str | None,
    typer.Option(
        "--stone-pattern",
        metavar="REGEX",
        help="Finds the stone in a path, for example 'stone_(\\d+)'.",
        show_default="unknown",
    ),
]
ImagesArgument = Annotated[list[Path], typer.Argument(metavar="IMAGE…", help="Images, or folders of images.")]


def add_verbs(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    _add_identify(app)
    app.add_typer(_gallery_app(), name="gallery")
    app.add_typer(_patches_app(), name="patches")
    _add_leakage(app)
    _add_simulate(app)


def _add_identify(app: typer.Typer) -> None:
    @app.command(help="Name the class of images, or of stones with `--fuse`.")
    def identify(
        images: ImagesArgument,
        model: ModelOption,
        top: Annotated[int, typer.Option("--top", min=1, max=100, help="Nearest references to show.")] = 3,
        fuse: Annotated[
            str | None,
            typer.Option(
                "--fuse", metavar="HOW", help="One answer a stone, its views joined: max, mean or concat."
            ),
        ] = None,
        stone_pattern: StoneOption = None,
        device: DeviceOption = "auto",
        json: JsonOption = False,
        verbose: VerboseOption = False,
    ) -> None:
        run = Run(out=Path("."), device=device, json=json, verbose=verbose)
        with speaking(run):
            from .predict import UNKNOWN, collect_images, identification_table
            from .predict import identify as identify_images

            student = _load(model, run)
            collection = collect_images(images, stone_pattern=stone_pattern)
            with run.progress("Identifying", total=len(collection)) as bar:
                rows = identify_images(student, collection, top=top, fuse=fuse, progress=_bar_to(bar))
            if not json:
                run.console.print(identification_table(rows))
        if json:
            _print_json(
                {
                    "model": str(student.artifact.folder),
                    "digest": student.artifact.digest,
                    "fuse": fuse,
                    "unknown": sum(row.label == UNKNOWN for row in rows),
                    "results": [row.to_dict() for row in rows],
                }
            )


def _gallery_app() -> typer.Typer:
    gallery = typer.Typer(
        help="List the classes a student knows, or add one without training.", no_args_is_help=True
    )

    @gallery.command("list", help="List the classes with their images and stones.")
    def list_(model: ModelOption, json: JsonOption = False, verbose: VerboseOption = False) -> None:
        run = Run(out=Path("."), json=json, verbose=verbose)
        with speaking(run):
            found = _load(model, run).gallery
        table = {
            "classes": [
                {"class": name, "images": images, "stones": stones, "added": name in found.added}
                for name, (images, stones) in found.counts.items()
            ],
            "threshold": found.threshold,
            "statement": found.calibration.statement,
        }
        if json:
            _print_json(table)
        else:
            _show_gallery(run, table)

    @gallery.command(
        help="Add a class from a few images of it; `--extend` adds images to a class that is there."
    )
    def add(
        name: Annotated[str, typer.Argument(metavar="CLASS", help="Name of the class.")],
        images: ImagesArgument,
        model: ModelOption,
        stone_pattern: StoneOption = None,
        extend: Annotated[
            bool, typer.Option("--extend", help="The class is in the gallery already.")
        ] = False,
        device: DeviceOption = "auto",
        json: JsonOption = False,
        verbose: VerboseOption = False,
    ) -> None:
        run = Run(out=Path("."), device=device, json=json, verbose=verbose)
        with speaking(run):
            result = _add_class(run, model, name, images, stone_pattern, extend=extend)
        if json:
            _print_json(result)
            return
        run.say(
            f"{result['class']}: {result['images']} images added; {result['classes']} classes in the gallery"
        )
        for note in result["notes"]:
            run.say(note)
        run.say(result["model"])

    return gallery


def _add_class(
    run: Run, model: Path, name: str, images: list[Path], stone_pattern: str | None, *, extend: bool
) -> dict[str, Any]:
    from .gallery import class_name, replace_gallery
    from .predict import collect_images, embed, thumbnails

    try:
        name = class_name(name)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    student = _load(model, run)
    gallery = student.gallery
    if name in gallery.classes and not extend:
        raise ConfigError(f"the class {name!r} is in the gallery already; --extend adds images to it")
    collection = collect_images(images, stone_pattern=stone_pattern)
    repeated = sorted(set(gallery.names) & {item.title for item in collection.items})
    if repeated:
        raise DataError(f"{repeated[0]}: is in the gallery already; leave it out or give it another name")
    embeddings = embed(
        student.network,
        collection,
        size=student.network.config.image_size,
        crops=student.crops,
        zoom=student.zoom,
    )
    side = 64 if gallery.thumbnails is None else gallery.thumbnails.shape[1]
    try:
        larger = gallery.add(
            name,
            embeddings,
            stones=[item.stone for item in collection.items] if collection.stone_known else None,
            views=[item.view for item in collection.items],
            names=[item.title for item in collection.items],
            thumbnails=thumbnails(collection, side=side),
            extend=extend,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    change = (
        f"{'extended' if name in gallery.classes else 'added'} the class {name} with {len(collection)} images"
    )
    artifact = replace_gallery(student.artifact, larger, change=change)
    notes = [larger.calibration.statement]
    if name in larger.weak:
        notes.insert(
            0, f"{name} rests on {larger.counts[name][0]} images; five or more make a steadier prototype."
        )
    return {
        "class": name,
        "images": len(collection),
        "classes": len(larger.classes),
        "threshold": larger.threshold,
        "notes": notes,
        "model": str(artifact.folder),
        "digest": artifact.digest,
    }


def _show_gallery(run: Run, table: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=None, pad_edge=False, header_style="bold")
    shown.add_column("class")
    for heading in ("images", "stones"):
        shown.add_column(heading, justify="right")
    shown.add_column("")
    for row in table["classes"]:
        shown.add_row(
            Text(row["class"]),
            str(row["images"]),
            str(row["stones"]),
            "added after training" if row["added"] else "",
        )
    run.console.print(shown)
    run.say(table["statement"])


def _patches_app() -> typer.Typer:
    patches = typer.Typer(help="Cut patches out of images of whole fragments.", no_args_is_help=True)

    @patches.command(
        help="Cut square patches that lie inside the masks, with a table of where they come from."
    )
    def extract(
        images: Annotated[
            Path, typer.Argument(metavar="IMAGES", help="Folder or CSV table of fragment images.")
        ],
        masks: Annotated[
            Path, typer.Argument(metavar="MASKS", help="Folder of their masks, white on the stone.")
        ],
        out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to make.")],
        size: Annotated[int, typer.Option("--size", min=8, help="Side of a patch, pixels.")] = 256,
        max_overlap: Annotated[
            int, typer.Option("--max-overlap", min=0, help="Widest strip that two patches share, pixels.")
        ] = 20,
        per_class: Annotated[
            int | None,
            typer.Option("--per-class", min=1, help="Most patches of a class and view.", show_default="all"),
        ] = None,
        stone_pattern: StoneOption = None,
        seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the choice for --per-class.")] = 0,
        json: JsonOption = False,
        verbose: VerboseOption = False,
    ) -> None:
        run = Run(out=out, seed=seed, json=json, verbose=verbose)
        if max_overlap >= size:
            raise ConfigError(f"--max-overlap {max_overlap}: must be less than --size {size}")
        with speaking(run):
            from .data import extract_folder

            with run.progress("Cutting patches") as bar:
                made = extract_folder(
                    images,
                    masks,
                    out,
                    size=size,
                    max_overlap=max_overlap,
                    per_class=per_class,
                    stone_pattern=stone_pattern,
                    seed=seed,
                    progress=_bar_to(bar),
                )
        if not json:
            run.say(made.summary())
        run.finish({"patches": len(made), "classes": len(made.classes), "notes": made.notes})

    return patches


def _add_leakage(app: typer.Typer) -> None:
    @app.command(help="Look for stones and pictures that are in two sets; exit 1 where there are any.")
    def leakage(
        train: Annotated[
            Path, typer.Argument(metavar="TRAIN", help="Folder or CSV table of the training images.")
        ],
        test: Annotated[Path, typer.Argument(metavar="TEST", help="Folder or CSV table of the test images.")],
        stone_pattern: StoneOption = None,
        threshold: Annotated[
            float,
            typer.Option(
                "--threshold", min=0.5, max=1.0, help="Smallest correlation of two repeated pictures."
            ),
        ] = 0.9,
        json: JsonOption = False,
        verbose: VerboseOption = False,
    ) -> None:
        run = Run(out=Path("."), json=json, verbose=verbose)
        with speaking(run):
            from .data import read_collection
            from .data.leakage import check_leakage
            from .report import leakage_table

            parts = [
                read_collection(path, stone_pattern=stone_pattern, check=False) for path in (train, test)
            ]
            with run.progress("Reading", total=len(parts[0]) + len(parts[1])) as bar:
                found = check_leakage(*parts, threshold=threshold, progress=_bar_to(bar))
        if json:
            _print_json(leakage_table(found))
        else:
            run.say(found.summary())
        if not found.ok:
            raise typer.Exit(1)


def _add_simulate(app: typer.Typer) -> None:
    @app.command(help="Write simulated stones to try the other verbs on. They say nothing about patients.")
    def simulate(
        out: OutOption = None,
        stones: Annotated[int, typer.Option("--stones", min=1, help="Stones of each class.")] = 12,
        fragments: Annotated[
            bool, typer.Option("--fragments", help="Whole fragments with masks, for `patches extract`.")
        ] = False,
        seed: SeedOption = None,
        json: JsonOption = False,
        verbose: VerboseOption = False,
    ) -> None:
        run = Run.start("kidney", "simulated", out=out, seed=seed or 0, json=json, verbose=verbose)
        with speaking(run):
            from .data import SimulateConfig
            from .write import write_simulated

            config = SimulateConfig(stones_per_class=stones, seed=run.seed)
            with run.progress("Simulating") as bar:
                count = write_simulated(config, run.out, fragments=fragments, progress=_bar_to(bar))
        table = run.out / "images" / "manifest.csv" if fragments else run.out / "manifest.csv"
        run.finish({"images": count, "classes": len(config.classes), "manifest": str(table)})


def _bar_to(bar: ProgressHandle) -> Callable[[int, int], None]:
    """A progress function `(done, total)` that moves a bar."""
    seen = 0

    def move(done: int, total: int) -> None:
        nonlocal seen
        bar.advance(done - seen)
        seen = done

    return move


def _load(model: Path, run: Run) -> FinishedStudent:
    from .store import load_student

    return load_student(model, device=str(run.torch_device()))


def _print_json(value: dict[str, Any]) -> None:
    import json

    from stillhouse.core.run import jsonable

    print(json.dumps(jsonable(value), ensure_ascii=False, allow_nan=False), flush=True)
