"""The kidney run under mmengine's Runner instead of the core's Trainer; weights and report are the same.

    python -m stillhouse.kidney.mmengine_runner --config mmengine_demo --out runs/mm
    torchrun --nproc-per-node 2 -m stillhouse.kidney.mmengine_runner --config paper --out runs/mm

Any preset or file of `stillhouse-kidney train` works. It needs `pip install "stillhouse-core[mmengine]"`. A
run that was cut short goes on from its checkpoints when it is given the same `--out`, whichever of the two
began it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from stillhouse.core.cli import (
    ConfigOption,
    DeviceOption,
    JsonOption,
    OutOption,
    SeedOption,
    SetOption,
    VerboseOption,
    load_for,
    run_app,
    speaking,
)
from stillhouse.core.run import Run

from .domain import DOMAIN

if TYPE_CHECKING:
    from stillhouse.core.train import Distiller, FitResult, OptimConfig, SeededLoader, TrainConfig

PRESET = "mmengine_demo"
app = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})


def with_runner(
    distiller: Distiller,
    loader: SeededLoader,
    optim: OptimConfig,
    train: TrainConfig,
    out: Path | None,
    quiet: bool | None,
) -> FitResult:
    """Train one network with mmengine's Runner: an engine for `stillhouse.kidney.fit` and `run.train`.

    Args:
        distiller: the method.
        loader: global batches.
        optim: optimizer and schedule.
        train: settings of the training.
        out: folder of checkpoints and log; the Runner needs one.
        quiet: mmengine prints warnings alone.

    Raises:
        ValueError: `out` is None.
        MissingDependencyError: the Runner's libraries are not installed.
    """
    from stillhouse.core.integrations.mmengine import fit_result, runner_for

    if out is None:
        raise ValueError("out is None; mmengine's Runner needs a folder to write to")
    runner = runner_for(distiller, loader, optim, train, out=out, quiet=bool(quiet))
    runner.train()
    return fit_result(runner)


@app.command(help="Train, score and report the kidney run under mmengine's Runner.")
def train(
    config: ConfigOption = PRESET,
    settings: SetOption = None,
    out: OutOption = None,
    seed: SeedOption = None,
    device: DeviceOption = "auto",
    json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Run `stillhouse.kidney.run.train` with another engine; `--verbose` shows mmengine's own log."""
    source = config or PRESET
    loaded, chosen = load_for(DOMAIN, source, overrides=settings or (), seed=seed, device=device)
    run = Run.start(
        DOMAIN.name, Path(source).stem, out=out, seed=chosen, device=device, json=json, verbose=verbose
    )
    with speaking(run):
        import stillhouse.core.integrations.mmengine  # noqa: F401  a missing library is told before the work

        from .run import train as train_run

        try:
            result = train_run(loaded, run, engine=_engine(quiet=not verbose))
        finally:
            _leave()
    run.finish(result)


def _engine(*, quiet: bool) -> Callable[..., FitResult]:
    def engine(
        distiller: Distiller,
        loader: SeededLoader,
        optim: OptimConfig,
        train: TrainConfig,
        out: Path | None,
        _: bool | None,
    ) -> FitResult:
        return with_runner(distiller, loader, optim, train, out, quiet)

    return engine


def _leave() -> None:
    """Leave the process group, which torch warns of where nobody does."""
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_app(app, argv, "python -m stillhouse.kidney.mmengine_runner")


if __name__ == "__main__":
    sys.exit(main())
