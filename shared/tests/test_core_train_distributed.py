from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stillhouse.core.testing import TinyMLP, ToyDistiller, TwoRoleDistiller, run_ranks, run_script, toy_data
from stillhouse.core.train import (
    Losses,
    NonFiniteLossError,
    OptimConfig,
    SeededLoader,
    Step,
    TrainConfig,
    Trainer,
    load_checkpoint,
)

State = dict[str, Tensor]


class Blocks(nn.Module):
    """A network with a `ModuleList`, so that fsdp2 has several units to shard."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(TinyMLP(8, 11, 8, seed=seed) for seed in (1, 2))
        self.head = TinyMLP(seed=3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


class Masked(ToyDistiller):
    """A sum over the samples that count, divided by how many count in the whole step."""

    def num_items(self, batch: Any) -> int:
        return int((batch[1] != 3).sum())

    def loss(self, role: str, batch: Any, step: Step) -> Losses:
        x, y = batch
        each = nn.functional.cross_entropy(self.student(x), y, reduction="none")
        assert step.num_items is not None
        ce = (each * (y != 3)).sum() / step.num_items
        return Losses(ce, {"ce": ce})


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "plain": (ToyDistiller, {}),
    "accumulated": (ToyDistiller, {"accumulate": 2, "clip_norm": 0.3, "ema": 0.8}),
    "alternating": (TwoRoleDistiller, {"accumulate": 2}),
    "counted": (Masked, {"accumulate": 2}),
    "blocks": (lambda: ToyDistiller(Blocks()), {"clip_norm": 0.3, "ema": 0.8}),
}


def train(case: str, strategy: str, world: int, out: Path | None = None, **values: Any) -> dict[str, Any]:
    make, settings = CASES[case]
    config = TrainConfig(
        **{
            "steps": 10,
            "strategy": strategy,
            "devices": world,
            "accelerator": "cpu",
            "log_every": 5,
            **settings,
            **values,
        }
    )
    distiller = make()
    trainer = Trainer(config, out=out)
    optim = OptimConfig(lr=1e-2, warmup_steps=2)
    result = trainer.fit(distiller, SeededLoader(toy_data(), batch_size=8, seed=1), optim)
    return {
        "weights": {role: trainer.weights(role) for role in distiller.trainable()},
        "rows": [(row["step"], row["role"], row["total"]) for row in result.history],
        "norms": [row.get("grad_norm", 0.0) for row in result.history],
        "checkpoint": result.checkpoint,
    }


def one_of_many(strategy: str, cases: list[str], world: int) -> dict[str, Any]:
    return {case: train(case, strategy, world) for case in cases}


def close(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a["weights"].keys() == b["weights"].keys()
    for role, state in a["weights"].items():
        for key, value in state.items():
            torch.testing.assert_close(
                value, b["weights"][role][key], rtol=1e-4, atol=2e-6, msg=f"{role}.{key}"
            )
    assert [row[:2] for row in a["rows"]] == [row[:2] for row in b["rows"]]
    assert [row[2] for row in a["rows"]] == pytest.approx([row[2] for row in b["rows"]], rel=1e-4)
    assert a["norms"] == pytest.approx(b["norms"], rel=1e-4)


@pytest.mark.parametrize(
    ("strategy", "cases"),
    [
        ("ddp", ["plain", "accumulated", "alternating", "counted"]),
        ("fsdp2", ["accumulated", "alternating", "blocks"]),
    ],
)
def test_two_processes_equal_one_on_the_same_global_batch(strategy: str, cases: list[str]) -> None:
    first, second = run_ranks(one_of_many, 2, strategy, cases, 2)
    for case in cases:
        alone = train(case, "auto", 1)
        close(first[case], alone)
        for role, state in first[case]["weights"].items():
            for key, value in state.items():
                assert torch.equal(value, second[case]["weights"][role][key])  # ranks agree to the bit


class Noisy(TwoRoleDistiller):
    """Dropout, so that each rank's generator matters; stops once where asked to; remembers its noise."""

    def __init__(self, stop: int | None = None) -> None:
        super().__init__(ratio=2, dropout=0.3)
        self.stop, self.noise = stop, torch.zeros(())

    def loss(self, role: str, batch: Any, step: Step) -> Losses:
        if step.index == self.stop:
            raise KeyboardInterrupt
        self.noise = torch.rand(())
        return super().loss(role, batch, step)


def interrupted(strategy: str, folder: Path) -> dict[str, Any]:
    def fit(name: str, stop: int | None = None) -> tuple[Noisy, Any]:
        distiller = Noisy(stop)
        config = TrainConfig(
            steps=8,
            strategy=strategy,
            devices=2,
            accelerator="cpu",
            checkpoint_every=3,
            ema=0.9,
            clip_norm=1.0,
        )
        data = SeededLoader(toy_data(), batch_size=8, seed=1)
        return distiller, Trainer(config, out=folder / name).fit(distiller, data, OptimConfig(lr=1e-2))

    whole, expected = fit("whole")
    try:
        fit("parted", stop=5)
    except KeyboardInterrupt:
        stopped = True
    _, result = fit("parted")
    return {"stopped": stopped, "noise": whole.noise, "ends": (expected.checkpoint, result.checkpoint)}


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_resume_on_two_processes_is_bit_equal(strategy: str, tmp_path: Path) -> None:
    first, second = run_ranks(interrupted, 2, strategy, tmp_path)
    assert first["stopped"]
    assert first["noise"] != second["noise"]  # ranks draw different noise
    assert first["ends"] == second["ends"]
    a, b = (load_checkpoint(path).parts for path in first["ends"])
    assert a.keys() == b.keys()
    assert {"weights.student", "optimizer.critic", "ema.student"} <= a.keys()
    for name in a:
        if name.split(".")[0] in ("weights", "optimizer", "ema"):
            assert repr_of(a[name]) == repr_of(b[name]), name
    assert len(a["rng"]) == 2
    assert torch.equal(a["rng"][1]["torch"], b["rng"][1]["torch"])
    assert not torch.equal(a["rng"][0]["torch"], a["rng"][1]["torch"])

    # what two processes wrote, one reads
    alone = TwoRoleDistiller(dropout=0.3)
    config = TrainConfig(steps=8, ema=0.9, clip_norm=1.0, threads=1)
    trainer = Trainer(config, out=None)
    trainer.fit(
        alone, SeededLoader(toy_data(), batch_size=8, seed=1), OptimConfig(lr=1e-2), resume=first["ends"][0]
    )
    for key, value in a["ema.student"].items():
        assert torch.equal(alone.student.state_dict()[key], value)


def repr_of(value: Any) -> Any:
    """A nest with tensors as bytes."""
    if isinstance(value, Tensor):
        return (str(value.dtype), tuple(value.shape), value.numpy().tobytes())
    if isinstance(value, dict):
        return {key: repr_of(item) for key, item in value.items()}
    return [repr_of(item) for item in value] if isinstance(value, list | tuple) else value


class OneBadRank(ToyDistiller):
    def loss(self, role: str, batch: Any, step: Step) -> Losses:
        losses = super().loss(role, batch, step)
        if step.rank == 1 and step.index == 2:
            losses.terms["kd"] = losses.terms["kd"] * float("nan")
        return losses


def bad_rank() -> str:
    config = TrainConfig(steps=10, strategy="ddp", devices=2, accelerator="cpu", log_every=4)
    try:
        Trainer(config, out=None).fit(OneBadRank(), SeededLoader(toy_data(), batch_size=8), OptimConfig())
    except NonFiniteLossError as error:
        return str(error)
    return "no error"


@pytest.mark.slow
def test_a_nan_on_one_rank_stops_all_of_them() -> None:
    for message in run_ranks(bad_rank, 2):
        assert "role 'student' is not finite at step 2: term 'kd'" in message


def fails(rank: str) -> None:
    if os.environ["RANK"] == rank:
        raise ValueError("on purpose")


def test_run_ranks_reports_the_rank_that_fails() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)rank 1 failed.*on purpose"):
        run_ranks(fails, 2, "1")
    with pytest.raises(ValueError, match="top level"):
        run_ranks(lambda: None, 2)


SCRIPT = """
import sys, torch
from pathlib import Path
from stillhouse.core.testing import ToyDistiller, toy_data
from stillhouse.core.train import OptimConfig, SeededLoader, TrainConfig, Trainer

distiller = ToyDistiller()
config = TrainConfig(steps=10, accelerator="cpu", devices=int(sys.argv[2]))
data = SeededLoader(toy_data(), batch_size=8, seed=1)
Trainer(config, out=Path(sys.argv[1])).fit(distiller, data, OptimConfig(lr=1e-2, warmup_steps=2))
"""


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "alone"])
def test_the_same_script_runs_under_torchrun_and_alone(launcher: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    arguments: list[str | Path] = [script, tmp_path / "out", "2" if launcher == "alone" else "1"]
    if launcher == "torchrun":
        arguments = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    result = run_script(arguments, env={"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    read = load_checkpoint(tmp_path / "out" / "checkpoints" / "step-00000010")
    assert len(read.parts["rng"]) == 2
    for key, value in train("plain", "auto", 1)["weights"]["student"].items():
        torch.testing.assert_close(read.parts["weights.student"][key], value, rtol=1e-4, atol=2e-6)


def on_gpus(strategy: str, precision: str, world: int, folder: Path) -> tuple[list[float], Path]:
    config = TrainConfig(
        steps=40,
        strategy=strategy,
        precision=precision,
        devices=world,
        accelerator="cuda",
        ema=0.9,
        log_every=1,
    )
    data = SeededLoader(toy_data(), batch_size=8 * world, workers=1)
    distiller = ToyDistiller(Blocks())
    result = Trainer(config, out=folder).fit(distiller, data, OptimConfig(lr=1e-2, schedule="constant"))
    return [row["total"] for row in result.history], result.checkpoint  # type: ignore[return-value]


@pytest.mark.gpu
@pytest.mark.parametrize("strategy", ["auto", "ddp", "fsdp2"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_every_strategy_trains_on_the_gpus_there_are(strategy: str, precision: str, tmp_path: Path) -> None:
    world = torch.cuda.device_count()
    for totals, path in run_ranks(on_gpus, world, strategy, precision, world, tmp_path):
        assert totals[-1] < 0.8 * totals[0]
        assert "cuda" in load_checkpoint(path).parts["rng"][0]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_resume_on_one_gpu_goes_on_where_it_stopped(precision: str, tmp_path: Path) -> None:
    def fit(steps: int, out: Path | None) -> State:
        distiller = ToyDistiller(dropout=0.2)
        config = TrainConfig(steps=steps, precision=precision, accelerator="cuda", clip_norm=1.0)  # type: ignore[arg-type]
        data = SeededLoader(toy_data(), batch_size=8)
        Trainer(config, out=out).fit(distiller, data, OptimConfig(lr=1e-2, schedule="constant"))
        return {key: value.cpu() for key, value in distiller.student.state_dict().items()}

    fit(7, tmp_path)
    parted, whole = fit(15, tmp_path), fit(15, None)
    for key, value in whole.items():
        torch.testing.assert_close(parted[key], value, rtol=1e-4, atol=1e-5)
