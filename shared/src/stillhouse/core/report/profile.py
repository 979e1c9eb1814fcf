"""Size and speed of models, measured so that two of them can be compared.

On a busy machine a long pass is interrupted far more often than a short one, so timing one pass of each
flatters the small model, without bound. Every model is therefore timed for as long as the others, over as
many passes as that takes, and the spread of the ratio between rounds tells whether the result can be relied
on.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..metrics import Interval

_WINDOW = 0.02  # seconds that a model is timed for in each round, at least


@dataclass(frozen=True, slots=True)
class Latency:
    """Time of one forward pass, in milliseconds.

    Attributes:
        median: Median over the timed rounds; a round's value is the mean over its passes.
        p10: 10th percentile over the rounds.
        p90: 90th percentile over the rounds.
        runs: Number of timed rounds.
        passes: Passes in each round.
        device: Where it ran, for example "cpu" or "cuda:0 (NVIDIA H100)".
        threads: Torch's intra-op threads, which matter on a CPU.
    """

    median: float
    p10: float
    p90: float
    runs: int
    passes: int
    device: str
    threads: int


@dataclass(frozen=True, slots=True)
class ModelProfile:
    """Size and speed of one model on one example input.

    Attributes:
        name: What reports call it.
        parameters: Number of parameters; shared ones count once.
        bytes: Memory of parameters and buffers, in bytes; shared storage counts once.
        disk: Bytes of the file or folder that `disk` named, or None.
        latency: Time of one forward pass.
        batch: Items in the example input: the length of its first tensor.
        flops: Floating-point operations of one forward pass, one multiply-add counted as two; None when not
            asked for. Operations that PyTorch's counter does not know count as zero.
    """

    name: str
    parameters: int
    bytes: int
    disk: int | None
    latency: Latency
    batch: int
    flops: int | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Several models timed in turns on the same input.

    Attributes:
        profiles: Name → profile.
        baseline: Name of the model that ratios refer to, usually the teacher.
        latency_ratios: Name → (median, p10, p90) over rounds of latency / latency of the baseline in the
            same round.
    """

    profiles: dict[str, ModelProfile]
    baseline: str
    latency_ratios: dict[str, tuple[float, float, float]]

    def stable(self, name: str) -> bool:
        """Whether the latency ratio can be quoted: its p10 and p90 differ by a factor below 1.5."""
        _, low, high = self.latency_ratios[name]
        return high < 1.5 * low

    def ratio(self, name: str, what: str) -> float | None:
        """Model / baseline of "parameters", "bytes", "disk", "flops" or "latency"; None when unknown."""
        if what == "latency":
            return self.latency_ratios[name][0]
        if what not in ("parameters", "bytes", "disk", "flops"):
            raise ValueError(f"what is {what!r}; give 'parameters', 'bytes', 'disk', 'flops' or 'latency'")
        mine, base = getattr(self.profiles[name], what), getattr(self.profiles[self.baseline], what)
        return mine / base if mine is not None and base else None

    def rows(self) -> list[dict[str, Any]]:
        """Return rows for `Section.table`, one a model, with each quantity and its ratio to the baseline.

        The latency is the median, with the 10th and 90th percentiles as its interval.
        """
        columns = {"parameters": "parameters", "bytes": "memory", "disk": "on disk", "flops": "FLOPs"}
        rows = []
        for name, p in self.profiles.items():
            row: dict[str, Any] = {"model": name}
            for what, heading in columns.items():
                if any(getattr(q, what) is not None for q in self.profiles.values()):
                    row[heading] = getattr(p, what)
            row["latency"] = Interval(
                p.latency.median,
                p.latency.p10,
                p.latency.p90,
                0.8,
                f"median, p10 and p90 of {p.latency.runs} rounds",
            )
            row["size ratio"] = self.ratio(name, "bytes")
            row["latency ratio"] = self.ratio(name, "latency")
            rows.append(row)
        return rows

    def formats(self) -> dict[str, str]:
        """Return the formats of the columns of `rows`, for `Section.table`."""
        forms = {
            "parameters": "count",
            "memory": "bytes",
            "on disk": "bytes",
            "FLOPs": "si",
            "latency": "ms",
            "size ratio": "ratio",
            "latency ratio": "ratio",
        }
        return {key: form for key, form in forms.items() if key in self.rows()[0]}


def profile(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...] | Mapping[str, Any],
    *,
    name: str,
    runs: int = 50,
    warmup: int = 10,
    flops: bool = False,
    disk: Path | None = None,
) -> ModelProfile:
    """Measure one model. To compare two, use `compare_profiles`, which times them in turns.

    Args:
        model: The model, on the device to measure; its training mode is restored afterwards.
        example_inputs: A tensor `[B, ...]`, a tuple of positional or a mapping of keyword arguments of
            `forward`; moved to the model's device.
        name: What reports call it.
        runs: Timed rounds, at least 2; each lasts about 20 ms, or one pass where that takes longer.
        warmup: Untimed passes before, at least 1.
        flops: Count floating-point operations as well.
        disk: A file or folder whose size is recorded, for example the artefact.

    Returns:
        The profile.

    Raises:
        ValueError: When runs or warmup are out of range, or `disk` does not exist.

    Example:
        >>> p = profile(nn.Linear(8, 4), torch.zeros(2, 8), name="student", runs=3, warmup=1, flops=True)
        >>> p.parameters, p.bytes, p.batch, p.flops   # 36 float32 parameters; 2·8·4 multiply-adds
        (36, 144, 2, 128)
    """
    disks = {} if disk is None else {name: disk}
    models = {name: model}
    return compare_profiles(
        models, example_inputs, baseline=name, runs=runs, warmup=warmup, flops=flops, disk=disks
    ).profiles[name]


def compare_profiles(
    models: Mapping[str, nn.Module],
    example_inputs: Tensor | tuple[Any, ...] | Mapping[str, Any],
    *,
    baseline: str = "teacher",
    runs: int = 50,
    warmup: int = 10,
    flops: bool = False,
    disk: Mapping[str, Path] | None = None,
) -> Comparison:
    """Measure several models on the same input, in turns, so that whatever slows the machine down hits all
    alike.

    Args:
        models: Name → model, all on the device to measure.
        example_inputs: As in `profile`, the same for all.
        baseline: The model that ratios refer to.
        runs: Rounds, at least 2. Each round times every model once, in an order that alternates, and each
            for as long as the slowest takes for one pass, at least 20 ms.
        warmup: Untimed passes of each before, at least 1; they also tell how many passes fill a round.
        flops: Count floating-point operations as well.
        disk: Name → file or folder whose size is recorded.

    Returns:
        Profiles and ratios.

    Raises:
        ValueError: When the baseline is not among the models, or runs, warmup or a disk path are wrong.
    """
    if baseline not in models:
        raise ValueError(f"baseline is {baseline!r}; give one of {', '.join(map(repr, models))}")
    if runs < 2 or warmup < 1:
        raise ValueError(f"runs is {runs} and warmup is {warmup}; give runs ≥ 2 and warmup ≥ 1")
    sizes = {name: _disk_bytes(path) for name, path in (disk or {}).items()}
    unknown = sorted(set(sizes) - set(models))
    if unknown:
        raise ValueError(
            f"disk names {unknown[0]!r}, which is not among the models {', '.join(map(repr, models))}"
        )
    times: dict[str, list[float]] = {name: [] for name in models}
    operations: dict[str, int | None] = dict.fromkeys(models)
    with contextlib.ExitStack() as stack:
        calls = {}
        for name, model in models.items():
            stack.enter_context(_evaluating(model))
            calls[name] = (model, *_arguments(example_inputs, _device(model)))
        stack.enter_context(torch.inference_mode())
        first = {name: min(_timed(*call) for _ in range(warmup)) for name, call in calls.items()}
        window = max(_WINDOW, *first.values())
        passes = {name: max(1, round(window / seconds)) for name, seconds in first.items()}
        for round_ in range(runs):
            order = list(models) if round_ % 2 == 0 else list(models)[::-1]
            for name in order:
                total = sum(_timed(*calls[name]) for _ in range(passes[name]))
                times[name].append(1000 * total / passes[name])
        if flops:
            operations = {name: _flops(*call) for name, call in calls.items()}
        batch = _batch(*calls[baseline][1:])
    profiles = {
        name: ModelProfile(
            name=name,
            parameters=sum(p.numel() for p in model.parameters()),
            bytes=_memory(model),
            disk=sizes.get(name),
            latency=_latency(times[name], passes[name], _device(model)),
            batch=batch,
            flops=operations[name],
        )
        for name, model in models.items()
    }
    base = np.array(times[baseline])
    ratios = {name: _quantiles(np.array(series) / base) for name, series in times.items()}
    return Comparison(profiles, baseline, ratios)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _device(model: nn.Module) -> torch.device:
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def _arguments(inputs: Any, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def move(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    if isinstance(inputs, Mapping):
        return (), {key: move(value) for key, value in inputs.items()}
    values = inputs if isinstance(inputs, tuple) else (inputs,)
    return tuple(move(value) for value in values), {}


def _batch(positional: tuple[Any, ...], named: Mapping[str, Any]) -> int:
    for value in (*positional, *named.values()):
        if isinstance(value, Tensor) and value.ndim:
            return int(value.shape[0])
    return 1


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _timed(model: nn.Module, positional: tuple[Any, ...], named: Mapping[str, Any]) -> float:
    device = _device(model)
    _synchronize(device)
    start = time.perf_counter()
    model(*positional, **named)
    _synchronize(device)
    return time.perf_counter() - start


def _flops(model: nn.Module, positional: tuple[Any, ...], named: Mapping[str, Any]) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        model(*positional, **named)
    return int(counter.get_total_flops())


def _memory(model: nn.Module) -> int:
    storages = {}
    for tensor in (*model.parameters(), *model.buffers()):
        storage = tensor.untyped_storage()
        storages[(tensor.device, storage.data_ptr())] = storage.nbytes()
    return sum(storages.values())


def _disk_bytes(path: Path) -> int:
    if path.is_dir():
        return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    if path.is_file():
        return path.stat().st_size
    raise ValueError(f"disk names {path}, which does not exist; give a file or folder")


def _quantiles(values: np.ndarray) -> tuple[float, float, float]:
    return (
        statistics.median(values.tolist()),
        float(np.quantile(values, 0.1)),
        float(np.quantile(values, 0.9)),
    )


def _latency(milliseconds: list[float], passes: int, device: torch.device) -> Latency:
    median, p10, p90 = _quantiles(np.array(milliseconds))
    where = f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
    return Latency(median, p10, p90, len(milliseconds), passes, where, torch.get_num_threads())


def profile_rows(comparison: Comparison, *, what: str = "item") -> tuple[list[dict[str, Any]], str]:
    """Size and latency of models as plain data for a results file, the baseline first.

    Args:
        comparison: of `compare_profiles`.
        what: one entry of the batch that was timed, in the singular: "image", "window".

    Returns:
        Rows with `model`, `parameters`, `memory` (bytes), `latency`, `p10`, `p90` (ms), `size_ratio` and
        `latency_ratio` to the baseline; and a sentence on how latency was measured.
    """
    base = comparison.profiles[comparison.baseline]
    rows = [
        {
            "model": name,
            "parameters": found.parameters,
            "memory": found.bytes,
            "latency": found.latency.median,
            "p10": found.latency.p10,
            "p90": found.latency.p90,
            "size_ratio": comparison.ratio(name, "bytes"),
            "latency_ratio": comparison.ratio(name, "latency"),
        }
        for name, found in sorted(
            comparison.profiles.items(), key=lambda pair: pair[0] != comparison.baseline
        )
    ]
    note = (
        f"One forward pass of {base.batch} {what}{'' if base.batch == 1 else 's'} on {base.latency.device}, "
        f"{base.latency.threads} thread{'' if base.latency.threads == 1 else 's'}; models timed in turns, "
        f"{base.latency.runs} runs each."
    )
    return rows, note
