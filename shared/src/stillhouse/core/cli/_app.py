"""The verbs that every domain has, built from its `Domain`; each loads the domain's parts when it runs."""

from __future__ import annotations

import json as _json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .. import doctor as _doctor
from ..config import describe_preset, list_presets, load_config, resolve, to_dict
from ..domain import Domain, load_object
from ..errors import ConfigError
from ..run import Run
from ._options import (
    ConfigOption,
    DeviceOption,
    JsonOption,
    OutOption,
    SeedOption,
    SetOption,
    VerboseOption,
    speaking,
)

ArtifactArgument = Annotated[Path, typer.Argument(metavar="ARTIFACT", help="Folder of a finished student.")]
DataOption = Annotated[Path | None, typer.Option("--data", metavar="PATH", help="Data to evaluate on.")]
FormatOption = Annotated[str, typer.Option("--format", "-f", metavar="FORMAT", help="What to write.")]


def build_app(domain: Domain) -> typer.Typer:
    """Build a domain's command line: `demo train evaluate report export configs doctor` and its own verbs.

    Nothing of the domain is imported but the module of its `verbs`.
    """
    app = typer.Typer(
        help=domain.title,
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode="markdown",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    _add_training(app, domain)
    _add_use(app, domain)
    app.add_typer(_configs_app(domain), name="configs")
    _add_doctor(app, domain)
    if domain.verbs is not None:
        load_object(domain.verbs)(app)
    return app


def load_for(
    domain: Domain,
    source: str | Path | Any,
    *,
    overrides: Sequence[str] = (),
    seed: int | None = None,
    device: str = "auto",
) -> tuple[Any, int]:
    """Load a domain's configuration as a verb does, and the seed of the run.

    `--seed` sets the field `train.seed` and `--device` the field `train.accelerator` where the configuration
    has them, so that the configuration saved beside an artefact says what was run.

    Returns:
        The configuration, and the seed: the given one, else that of the configuration, else 0.

    Raises:
        ConfigError: the configuration is wrong, or training is asked to run on one CUDA device by number.
    """
    cls = domain.load("config")
    config = load_config(cls, source, overrides=overrides, presets=domain.configs)
    train: Any = getattr(config, "train", None)
    changes: dict[str, Any] = {}
    if seed is not None and hasattr(train, "seed"):
        changes["seed"] = seed
    if device != "auto" and hasattr(train, "accelerator"):
        kind, _, index = device.partition(":")
        if index:
            raise ConfigError(
                f"--device {device}: training counts its devices; use CUDA_VISIBLE_DEVICES={index}"
            )
        changes["accelerator"] = kind
    if changes:
        try:
            config = replace(config, train=replace(train, **changes))
        except ValueError as error:
            raise ConfigError(f"train: {error}") from error
    if seed is None:
        seed = getattr(train, "seed", 0)
    return config, seed


def _add_training(app: typer.Typer, domain: Domain) -> None:
    def fit(
        source: str,
        out: Path | None,
        seed: int | None,
        device: str,
        settings: list[str] | None,
        json: bool,
        verbose: bool,
    ) -> None:
        config, chosen = load_for(domain, source, overrides=settings or (), seed=seed, device=device)
        name = Path(source).stem
        run = Run.start(domain.name, name, out=out, seed=chosen, device=device, json=json, verbose=verbose)
        with speaking(run):
            result = domain.load("train")(config, run)
        run.finish(result)

    @app.command(help=f"Run the preset `{domain.demo}` end to end on data that ships with the package.")
    def demo(
        out: OutOption = None,
        settings: SetOption = None,
        seed: SeedOption = None,
        device: DeviceOption = "auto",
        json: JsonOption = False,
        verbose: VerboseOption = False,
    ) -> None:
        fit(domain.demo, out, seed, device, settings, json, verbose)

    @app.command(help="Train a student and write its artefact and report.")
    def train(
        config: ConfigOption = None,
        settings: SetOption = None,
        out: OutOption = None,
        seed: SeedOption = None,
        device: DeviceOption = "auto",
        json: JsonOption = False,
        verbose: VerboseOption = False,
    ) -> None:
        if config is None:
            names = ", ".join(list_presets(domain.configs))
            raise ConfigError(f"--config is required: one of {names}, or a file")
        fit(config, out, seed, device, settings, json, verbose)


def _add_use(app: typer.Typer, domain: Domain) -> None:
    @app.command(help="Evaluate a finished student, on other data where `--data` is given.")
    def evaluate(
        artifact: ArtifactArgument,
        data: Annotated[
            Path | None, typer.Option("--data", metavar="PATH", help="Data to evaluate on.")
        ] = None,
        config: ConfigOption = None,
        settings: SetOption = None,
        out: OutOption = None,
        seed: SeedOption = None,
        device: DeviceOption = "auto",
        json: JsonOption = False,
        verbose: VerboseOption = False,
    ) -> None:
        source: Any = config if config is not None else _config_of(artifact)
        loaded, chosen = load_for(domain, source, overrides=settings or (), seed=seed)
        run = Run.start(
            domain.name, "evaluate", out=out, seed=chosen, device=device, json=json, verbose=verbose
        )
        with speaking(run):
            result = domain.load("evaluate")(artifact, data, loaded, run)
        run.finish(result)

    @app.command(help="Write the report of a run again.")
    def report(
        folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of a run.")],
        out: OutOption = None,
        json: JsonOption = False,
        verbose: VerboseOption = False,
    ) -> None:
        if not folder.is_dir():
            raise ConfigError(f"{folder}: no such folder")
        run = Run(out=folder if out is None else out, json=json, verbose=verbose)
        with speaking(run):
            result = domain.load("report")(folder, run)
        run.finish(result)

    @app.command(help=f"Export a finished student: {', '.join(domain.formats)}.")
    def export(
        artifact: ArtifactArgument,
        format: FormatOption = domain.formats[0],
        out: OutOption = None,
        device: DeviceOption = "auto",
        json: JsonOption = False,
        verbose: VerboseOption = False,
    ) -> None:
        if format not in domain.formats:
            raise ConfigError(f"--format {format}: allowed are {', '.join(domain.formats)}")
        run = Run.start(domain.name, "export", out=out, device=device, json=json, verbose=verbose)
        with speaking(run):
            result = domain.load("export")(artifact, format, run)
        run.finish(result)


def _config_of(artifact: Path) -> dict[str, Any]:
    """Configuration that a student was made with: its own folder, or the folder of a run that holds it.

    An artefact whose `config.json` is read by another library keeps the run's configuration in
    `training.json`.
    """
    import json

    from ..artifact import Artifact

    inside = [path.parent for path in sorted(artifact.glob("*/artifact.json"))]
    if len(inside) > 1:  # a run that saved its teacher as well
        inside = [folder for folder in inside if folder.name == "student"]
    whole = len(inside) != 1 or (artifact / "artifact.json").exists()
    found = Artifact.load(artifact if whole else inside[0])
    if not (found.folder / "training.json").is_file():
        return dict(found.config)
    return dict(json.loads(found.file("training.json").read_text(encoding="utf-8")))


def _configs_app(domain: Domain) -> typer.Typer:
    configs = typer.Typer(help="List the shipped presets, or show one in full.")

    def print_list(json: bool) -> None:
        presets = list_presets(domain.configs)
        if json:
            rows = [{"name": name, "about": describe_preset(path)} for name, path in presets.items()]
            print(_json.dumps(rows, ensure_ascii=False))
            return
        table = Table(box=None, pad_edge=False, show_header=False)
        for name, path in presets.items():
            table.add_row(Text(name, style="bold"), Text(describe_preset(path)))
        Console().print(table)

    @configs.callback(invoke_without_command=True)
    def configs_root(context: typer.Context) -> None:
        if context.invoked_subcommand is None:
            print_list(json=False)

    @configs.command("list", help="List the shipped presets.")
    def list_(json: JsonOption = False, verbose: VerboseOption = False) -> None:
        print_list(json)

    @configs.command(help="Show every field of a preset or a file, as `--set` would write it.")
    def show(
        source: Annotated[str, typer.Argument(metavar="NAME|FILE")],
        settings: SetOption = None,
        json: JsonOption = False,
        verbose: VerboseOption = False,
    ) -> None:
        path = resolve(source, domain.configs)
        config = to_dict(load_config(domain.load("config"), path, overrides=settings or ()))
        if json:
            print(_json.dumps(config, indent=2, ensure_ascii=False))
            return
        for line in _lines(config):
            print(line)

    return configs


def _lines(values: dict[str, Any], prefix: str = "") -> list[str]:
    """Return `section.field=value` lines that `--set` reads back."""
    lines: list[str] = []
    for key, value in values.items():
        if isinstance(value, dict) and value:
            lines.extend(_lines(value, f"{prefix}{key}."))
        elif isinstance(value, str):
            lines.append(f"{prefix}{key}={value}")
        else:
            lines.append(f"{prefix}{key}={_json.dumps(value, ensure_ascii=False)}")
    return lines


def _add_doctor(app: typer.Typer, domain: Domain) -> None:
    @app.command(help="Check libraries, GPU, memory and disk, and say what to install.")
    def doctor(json: JsonOption = False, verbose: VerboseOption = False) -> None:
        names = (
            ("stillhouse-core",) if domain.distribution is None else (domain.distribution, "stillhouse-core")
        )
        libraries = [check for name in names for check in _doctor.requirements_of(name)]
        show_doctor((*libraries, *domain.doctor, *_doctor.machine()), json=json)


def show_doctor(checks: Sequence[_doctor.Check], *, json: bool) -> None:
    """Run checks, each name once, print them, and exit with 1 where something required is missing."""
    results = _doctor.run_checks({check.name: check for check in reversed(checks)}.values())[::-1]
    if json:
        print(_json.dumps(_doctor.as_dict(results), ensure_ascii=False))
    else:
        console = Console()
        console.print(_doctor.as_table(results))
        for result in results:
            if result.required and result.remedy:
                console.print(f"to do: {result.remedy}", markup=False, highlight=False, soft_wrap=True)
    if not _doctor.healthy(results):
        raise typer.Exit(1)
