"""The verbs of the trade: pretrain, finetune, predict, embed, score variants, tasks, simulate; light."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stillhouse.core.cli import (
    ConfigOption,
    DeviceOption,
    JsonOption,
    OutOption,
    SeedOption,
    SetOption,
    VerboseOption,
    speaking,
)
from stillhouse.core.errors import ConfigError
from stillhouse.core.run import ProgressHandle, Run

if TYPE_CHECKING:
    from .student.store import Loaded

StudentArgument = Annotated[
    Path, typer.Argument(metavar="STUDENT", help="Folder of a finished student, or of the run that made it.")
]


def add_verbs(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    _add_pretrain(app)
    _add_finetune(app)
    _add_predict(app)
    _add_embed(app)
    _add_score(app)
    _add_tasks(app)
    _add_simulate(app)


def _add_pretrain(app: typer.Typer) -> None:
    @app.command(help="Pre-train a student on your own genomes: `train` with the files as options.")
    def pretrain(
        fasta: Annotated[
            list[Path],
            typer.Option(
                "--fasta", metavar="FILE", help="Genome: FASTA, plain, gz or bgzf; may be repeated."
            ),
        ],
        annotation: Annotated[
            list[Path] | None,
            typer.Option(
                "--annotation", metavar="FILE", help="GFF3 of each --fasta, in their order: probes need it."
            ),
        ] = None,
        bed: Annotated[
            Path | None, typer.Option("--bed", metavar="FILE", help="Tiles to train on, instead of all.")
        ] = None,
        config: ConfigOption = None,
        settings: SetOption = None,
        out: OutOption = None,
        seed: SeedOption = None,
        device: DeviceOption = "auto",
        json: JsonOption = False,
        verbose: VerboseOption = False,
    ) -> None:
        from stillhouse.core.cli import load_for

        from .domain import DOMAIN

        source = DOMAIN.demo if config is None else config
        overrides = [*_corpus(fasta, annotation, bed), *(settings or ())]
        loaded, chosen = load_for(DOMAIN, source, overrides=overrides, seed=seed, device=device)
        run = Run.start(
            DOMAIN.name,
            f"pretrain-{fasta[0].name.split('.')[0]}",
            out=out,
            seed=chosen,
            device=device,
            json=json,
            verbose=verbose,
        )
        with speaking(run):
            result = DOMAIN.load("train")(loaded, run)
        run.finish(result)


def _corpus(fasta: list[Path], annotation: list[Path] | None, bed: Path | None) -> list[str]:
    """The files as settings of the section `data`."""
    import json

    for path in (*fasta, *(annotation or ()), *([bed] if bed else ())):
        if not path.is_file():
            raise ConfigError(f"{path}: no such file")
    if annotation and len(annotation) != len(fasta):
        raise ConfigError(
            f"--annotation is given {len(annotation)} times for {len(fasta)} --fasta; give one for each, "
            "in their order"
        )
    settings = [f"data.fasta={json.dumps([str(path) for path in fasta])}"]
    if annotation:
        settings.append(f"data.annotation={json.dumps([str(path) for path in annotation])}")
    if bed:
        settings.append(f"data.bed={bed}")
    return settings


def _add_finetune(app: typer.Typer) -> None:
    @app.command(help="Fine-tune a student on labelled sequences and score it on the test part.")
    def finetune(
        student: StudentArgument,
        task: Annotated[
            Path,
            typer.Argument(
                metavar="TASK",
                help="Labelled sequences: CSV, TSV, Parquet or FASTA, with a column `split`, or see --test; "
                "or the folder of a benchmark’s task.",
            ),
        ],
        test: Annotated[
            Path | None, typer.Option("--test", metavar="FILE", help="Test part, where TASK has no splits.")
        ] = None,
        reference: Annotated[
            Path | None,
            typer.Option(
                "--reference",
                metavar="FASTA",
                help="Genome of TASK, a folder of Genomic Benchmarks’ intervals.",
            ),
        ] = None,
        preset: Annotated[
            str, typer.Option("--preset", metavar="NAME", help="Protocol: quick, ntb, gb.")
        ] = "quick",
        kind: Annotated[
            str | None,
            typer.Option(
                "--kind",
                metavar="KIND",
                help="Chooses the metric: histone, enhancer, promoter, splice, splice_all, gb, other.",
                show_default="the preset's",
            ),
        ] = None,
        convention: Annotated[
            str | None,
            typer.Option(
                "--convention",
                metavar="NAME",
                help="Metrics of: plain, caduceus, hyenadna, gue.",
                show_default="the preset's",
            ),
        ] = None,
        seeds: Annotated[
            int | None, typer.Option("--seeds", min=1, help="Trainings.", show_default="the preset's")
        ] = None,
        epochs: Annotated[
            int | None, typer.Option("--epochs", min=1, help="Passes.", show_default="the preset's")
        ] = None,
        batch: Annotated[
            int | None, typer.Option("--batch", min=1, help="Sequences a step.", show_default="the preset's")
        ] = None,
        lr: Annotated[
            float | None, typer.Option("--lr", help="Learning rate.", show_default="the preset's")
        ] = None,
        frozen: Annotated[bool, typer.Option("--frozen", help="Train the head alone.")] = False,
        conjoin: Annotated[
            bool, typer.Option("--conjoin/--no-conjoin", help="Average both strands when testing.")
        ] = True,
        scratch: Annotated[
            bool, typer.Option("--scratch", help="Forget the weights: the same network from random ones.")
        ] = False,
        out: OutOption = None,
        seed: SeedOption = None,
        device: DeviceOption = "auto",
        json: JsonOption = False,
        verbose: VerboseOption = False,
    ) -> None:
        run = Run.start(
            "genomic", "finetune", out=out, seed=seed or 0, device=device, json=json, verbose=verbose
        )
        with speaking(run):
            from .finetune import finetune_student, preset_config

            config = preset_config(
                preset,
                seeds=seeds,
                epochs=epochs,
                batch=batch,
                lr=lr,
                freeze=frozen,
                conjoin=conjoin,
                convention=convention,
                kind=kind,
                seed=run.seed,
            )
            result = finetune_student(
                student, task, config, run, test=test, reference=reference, scratch=scratch
            )
        run.finish(result)


def _add_predict(app: typer.Typer) -> None:
    @app.command(help="Class probabilities of sequences, from a fine-tuned classifier.")
    def predict(
        classifier: Annotated[
            Path,
            typer.Argument(
                metavar="CLASSIFIER", help="Folder of a classifier, or of the fine-tuning that made it."
            ),
        ],
        sequences: Annotated[
            list[Path],
            typer.Argument(
                metavar="SEQUENCES…",
                help="FASTA, plain, gz or bgzf; CSV, TSV or Parquet with a column `sequence`; BED with "
                "--reference.",
            ),
        ],
        out: Annotated[Path, typer.Option("--out", metavar="FILE", help="File to write: .tsv or .parquet.")],
        reference: Annotated[
            Path | None, typer.Option("--reference", metavar="FASTA", help="Genome of the BED.")
        ] = None,
        window: Annotated[
            int | None,
            typer.Option(
                "--window", min=8, help="Cut longer sequences into windows of this length, each a row."
            ),
        ] = None,
        overlap: Annotated[
            int, typer.Option("--overlap", min=0, help="Bases that neighbouring windows share.")
        ] = 0,
        batch: Annotated[int, typer.Option("--batch", min=1, help="Sequences at a time.")] = 32,
        conjoin: Annotated[
            bool | None,
            typer.Option(
                "--conjoin/--no-conjoin",
                help="Average the logits of both strands.",
                show_default="as the classifier was scored",
            ),
        ] = None,
        device: DeviceOption = "auto",
        json: JsonOption = False,
        verbose: VerboseOption = False,
    ) -> None:
        run = Run(out=out.parent, device=device, json=json, verbose=verbose)
        with speaking(run):
            from .finetune import load_classifier
            from .predict import check_options, predict_files

            check_options(out, sequences, window=window, overlap=overlap)
            if not classifier.is_dir():
                raise ConfigError(f"{classifier}: no such folder; give the folder of a classifier")
            loaded = load_classifier(classifier, device=str(run.torch_device()))
            with run.progress("Predicting") as bar:
                done = predict_files(
                    loaded,
                    sequences,
                    out,
                    reference=reference,
                    window=window,
                    overlap=overlap,
                    batch=batch,
                    conjoin=conjoin,
                    progress=lambda count: bar.advance(count),
                )
            if not json:
                run.say(done.summary())
        run.finish({"file": str(out), **done.to_dict()})


def _add_embed(app: typer.Typer) -> None:
    @app.command(help="Embed sequences: FASTA, or intervals of it, to Parquet or safetensors.")
    def embed(
        student: StudentArgument,
        fasta: Annotated[Path, typer.Argument(metavar="FASTA", help="Sequences: plain, gz or bgzf.")],
        out: Annotated[
            Path, typer.Option("--out", metavar="FILE", help="File to write: .parquet or .safetensors.")
        ],
        bed: Annotated[
            Path | None, typer.Option("--bed", metavar="FILE", help="Embed these intervals of the FASTA.")
        ] = None,
        length: Annotated[
            int, typer.Option("--length", min=8, help="Longest window, bp; longer sequences are tiled.")
        ] = 1024,
        overlap: Annotated[
            int, typer.Option("--overlap", min=0, help="Bases that neighbouring tiles share.")
        ] = 0,
        pool: Annotated[
            str,
            typer.Option(
                "--pool", metavar="HOW", help="mean or center: a vector a window; none: one a base."
            ),
        ] = "mean",
        batch: Annotated[int, typer.Option("--batch", min=1, help="Windows at a time.")] = 32,
        conjoin: Annotated[
            bool, typer.Option("--conjoin", help="Average with the embedding of the other strand.")
        ] = False,
        device: DeviceOption = "auto",
        json: JsonOption = False,
        verbose: VerboseOption = False,
    ) -> None:
        run = Run(out=out.parent, device=device, json=json, verbose=verbose)
        with speaking(run):
            from .embed import check_options, embed_file

            check_options(out, length=length, overlap=overlap, pool=pool)
            loaded = load(student, run)
            with run.progress("Embedding") as bar:
                done = embed_file(
                    loaded.encoder,
                    fasta,
                    out,
                    bed=bed,
                    length=length,
                    overlap=overlap,
                    pool=pool,  # type: ignore[arg-type]  # checked above
                    batch=batch,
                    conjoin=conjoin,
                    device=str(run.torch_device()),
                    model_name=student.name,
                    progress=lambda count: bar.advance(count),
                )
            if not json:
                run.say(done.summary())
        run.finish({"file": str(out), **done.to_dict()})


def _add_score(app: typer.Typer) -> None:
    @app.command(
        "score-variants",
        help="Score variants: log p(ALT) − log p(REF) of the masked position, in its context.",
    )
    def score(
        student: StudentArgument,
        vcf: Annotated[Path, typer.Argument(metavar="VCF", help="Variants, plain or gz.")],
        fasta: Annotated[Path, typer.Argument(metavar="FASTA", help="The reference they were called on.")],
        out: Annotated[Path, typer.Option("--out", metavar="FILE", help="File to write: .tsv or .parquet.")],
        window: Annotated[
            int, typer.Option("--window", min=16, help="Bases of context, the variant in the middle.")
        ] = 512,
        group: Annotated[
            int,
            typer.Option("--group", min=1, help="Bases hidden around the variant: 6 is a group of training."),
        ] = 6,
        batch: Annotated[int, typer.Option("--batch", min=1, help="Windows at a time.")] = 32,
        strands: Annotated[
            str, typer.Option("--strands", metavar="HOW", help="both (averaged) or forward.")
        ] = "both",
        skip_mismatches: Annotated[
            bool,
            typer.Option(
                "--skip-mismatches", help="Leave out variants whose REF is not what the reference has."
            ),
        ] = False,
        device: DeviceOption = "auto",
        json: JsonOption = False,
        verbose: VerboseOption = False,
    ) -> None:
        run = Run(out=out.parent, device=device, json=json, verbose=verbose)
        with speaking(run):
            from .variants import check_options, score_file

            check_options(out, window=window, group=group, strands=strands)
            loaded = load(student, run)
            with run.progress("Scoring") as bar:
                done = score_file(
                    loaded,
                    vcf,
                    fasta,
                    out,
                    window=window,
                    group=group,
                    batch=batch,
                    strands=strands,
                    skip_mismatches=skip_mismatches,
                    device=str(run.torch_device()),
                    progress=lambda count: bar.advance(count),
                )
            if not json:
                run.say(done.summary())
        run.finish({"file": str(out), **done.to_dict()})


def _add_tasks(app: typer.Typer) -> None:
    @app.command(help="Cut labelled windows out of an annotated genome: splice sites, regions, species.")
    def tasks(
        fasta: Annotated[
            list[Path], typer.Option("--fasta", metavar="FILE", help="Genome; repeat it for `species`.")
        ],
        annotation: Annotated[
            list[Path] | None,
            typer.Option("--annotation", metavar="FILE", help="GFF3 of each --fasta, in their order."),
        ] = None,
        task: Annotated[
            list[str] | None,
            typer.Option(
                "--task",
                metavar="NAME",
                help="donor, acceptor, regions or species; may be repeated.",
                show_default="all that the files allow",
            ),
        ] = None,
        length: Annotated[int, typer.Option("--length", min=16, help="Bases of a window.")] = 256,
        decoys: Annotated[
            str, typer.Option("--decoys", metavar="HOW", help="Negatives of the splice sites: easy or hard.")
        ] = "hard",
        limit: Annotated[
            int, typer.Option("--limit", min=1, help="Most windows of a class and genome.")
        ] = 2000,
        format: Annotated[
            str, typer.Option("--format", "-f", metavar="FORMAT", help="csv, tsv or parquet.")
        ] = "csv",
        out: OutOption = None,
        seed: SeedOption = None,
        json: JsonOption = False,
        verbose: VerboseOption = False,
    ) -> None:
        run = Run.start("genomic", "tasks", out=out, seed=seed or 0, json=json, verbose=verbose)
        with speaking(run):
            from .write import build_tasks, write_tasks

            _corpus(fasta, annotation, None)
            with run.progress("Cutting windows") as bar:
                made = build_tasks(
                    fasta,
                    annotation or (),
                    names=tuple(task or ()),
                    length=length,
                    decoys=decoys,
                    limit=limit,
                    seed=run.seed,
                    progress=_bar_to(bar),
                )
            rows = write_tasks(made, run.out, format=format)
            if not json:
                for row in rows:
                    counts = ", ".join(f"{count} {name}" for name, count in row["counts"].items())
                    run.say(f"{row['file']}: {row['windows']} windows of {row['bases']} bp: {counts}")
        run.finish({"tasks": rows})


def _add_simulate(app: typer.Typer) -> None:
    @app.command(help="Write two simulated genomes (FASTA and GFF3) to try the other verbs on.")
    def simulate(
        out: OutOption = None,
        kilobases: Annotated[
            int | None,
            typer.Option("--kilobases", min=40, help="Size of each genome.", show_default="the simulator's"),
        ] = None,
        seed: SeedOption = None,
        json: JsonOption = False,
        verbose: VerboseOption = False,
    ) -> None:
        run = Run.start("genomic", "simulated", out=out, seed=seed or 0, json=json, verbose=verbose)
        with speaking(run):
            from .write import write_simulated

            result = write_simulated(run.out, seed=run.seed, kilobases=kilobases)
        run.finish(result)


def _bar_to(bar: ProgressHandle) -> Callable[[int, int], None]:
    """A progress function `(done, total)` that moves a bar."""
    seen = 0

    def move(done: int, total: int) -> None:
        nonlocal seen
        bar.advance(done - seen)
        seen = done

    return move


def load(student: Path, run: Run) -> Loaded:
    """Load a finished student, given its folder or the folder of the run that made it."""
    from .student.store import load_student

    if not student.is_dir():
        raise ConfigError(f"{student}: no such folder; give the folder of a finished student")
    return load_student(student, device=str(run.torch_device()))
