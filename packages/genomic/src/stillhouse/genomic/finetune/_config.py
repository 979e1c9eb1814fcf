"""How a classifier is fine-tuned, and the protocols that have a name."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from stillhouse.core.errors import ConfigError

from ..heads import Compat, Pool
from ..metrics import Convention, Kind, Metric, metric


@dataclass(kw_only=True, slots=True, frozen=True)
class FinetuneConfig:
    """Fine-tuning of an encoder with a linear head.

    AdamW, cosine with 1 % warm-up to 0.1 of the rate, gradient clipped at norm 1, weight decay 0.1; a random
    tenth of the training part, drawn by the seed, chooses the best epoch (source: kuleshov-group/caduceus
    scripts and configs, as for epochs, batches and rates of the presets).

    Attributes:
        epochs: passes over the training part.
        batch: sequences a step.
        lr: base learning rate.
        weight_decay: of AdamW.
        clip: largest gradient norm.
        warmup: share of the steps with linear warm-up, in [0, 1).
        min_lr_ratio: where the cosine ends, as a share of `lr`.
        validation: share of the training part that is held out, in (0, 1).
        patience: epochs without a better validation score after which training stops; None never stops early
            and still keeps the best epoch.
        seeds: trainings, with the seeds `seed`, `seed` + 1, …
        seed: the first.
        freeze: train the head alone.
        pool: how the head pools: "mean" or "center".
        compat: "reference" counts padding in the mean, see `heads.pooled`.
        augment: show a random half of the sequences as their reverse complement.
        conjoin: average the logits of both strands when evaluating.
        metric: "auto" takes that of the convention; or a name, see `metrics.metric`.
        convention: whose metrics.
        kind: the kind of task.
        accelerator: "auto", "cpu", "cuda", …
    """

    epochs: int = 5
    batch: int = 32
    lr: float = 1e-3
    weight_decay: float = 0.1
    clip: float = 1.0
    warmup: float = 0.01
    min_lr_ratio: float = 0.1
    validation: float = 0.1
    patience: int | None = None
    seeds: int = 3
    seed: int = 0
    freeze: bool = False
    pool: Pool = "mean"
    compat: Compat = "none"
    augment: bool = True
    conjoin: bool = True
    metric: str = "auto"
    convention: Convention = "plain"
    kind: Kind = "other"
    accelerator: str = "auto"

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "seeds"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} is {value!r}; it must be an integer ≥ 1")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise ConfigError(f"lr is {self.lr!r}; it must be a finite number > 0")
        if not 0 < self.validation < 1 or not 0 <= self.warmup < 1:
            raise ConfigError(
                f"validation is {self.validation} and warmup {self.warmup}; give shares below 1"
            )
        if self.patience is not None and self.patience < 1:
            raise ConfigError(f"patience is {self.patience}; give at least 1, or None")
        if self.pool not in ("mean", "center") or self.compat not in ("none", "reference"):
            raise ConfigError(
                f"pool is {self.pool!r}, compat {self.compat!r}; give mean or center, none or reference"
            )
        self.scorer()

    def scorer(self) -> Metric:
        """The metric that is reported, and that chooses the epoch."""
        return metric(self.metric, self.convention, self.kind)


_PRESETS: dict[str, dict[str, Any]] = {
    "quick": {},
    "ntb": {"epochs": 20, "batch": 128, "lr": 1e-3, "seeds": 10, "convention": "caduceus"},
    "gb": {"epochs": 10, "batch": 128, "lr": 1e-3, "seeds": 5, "convention": "caduceus", "kind": "gb"},
}


def preset_config(
    preset: str = "quick",
    *,
    epochs: int | None = None,
    batch: int | None = None,
    lr: float | None = None,
    seeds: int | None = None,
    seed: int = 0,
    freeze: bool = False,
    conjoin: bool = True,
    convention: str | None = None,
    kind: str | None = None,
    accelerator: str = "auto",
) -> FinetuneConfig:
    """Take a protocol by its name, with changes.

    Args:
        preset: "quick" (5 epochs, 3 seeds), "ntb" (Nucleotide Transformer benchmark: 20 epochs, batch 128 of
            {128, 512}, rate 1e-3 of {1e-3, 2e-3}, 10 seeds) or "gb" (Genomic Benchmarks: 10 epochs, batch 128
            of {128, 256}, rate 1e-3 of {1e-3, 2e-3}, 5 seeds).
        epochs, batch, lr, seeds, convention, kind: None keeps the preset's.
        seed, freeze, conjoin, accelerator: as in `FinetuneConfig`.

    Raises:
        ConfigError: an unknown preset, a value out of range, or "ntb" without a kind.
    """
    if preset not in _PRESETS:
        raise ConfigError(f"--preset {preset}: allowed are {', '.join(_PRESETS)}")
    given = {
        "epochs": epochs,
        "batch": batch,
        "lr": lr,
        "seeds": seeds,
        "convention": convention,
        "kind": kind,
    }
    chosen = _PRESETS[preset] | {name: value for name, value in given.items() if value is not None}
    if preset == "ntb" and kind is None:
        raise ConfigError(
            "--preset ntb needs --kind, which chooses the metric: histone, enhancer, promoter, splice or "
            "splice_all"
        )
    return FinetuneConfig(seed=seed, freeze=freeze, conjoin=conjoin, accelerator=accelerator, **chosen)
