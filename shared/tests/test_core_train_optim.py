from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from stillhouse.core.errors import ConfigError
from stillhouse.core.testing import ToyDistiller, toy_data
from stillhouse.core.train import OptimConfig, SeededLoader, TrainConfig, Trainer


def rates(config: OptimConfig, total: int) -> list[float]:
    layer = nn.Linear(2, 2)
    optimizer, scheduler = config.build(layer.parameters(), total)
    seen = []
    for _ in range(total):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def test_cosine_with_warmup_has_its_closed_form() -> None:
    config = OptimConfig(lr=0.4, schedule="cosine", warmup_steps=4, min_lr_ratio=0.1)
    expected = [0.1, 0.2, 0.3, 0.4]
    expected += [0.4 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * k / 16))) for k in range(16)]
    assert rates(config, 20) == pytest.approx(expected, rel=1e-12)


def test_linear_constant_and_multistep_have_their_closed_forms() -> None:
    assert rates(OptimConfig(lr=1.0, schedule="linear", min_lr_ratio=0.5), 4) == pytest.approx(
        [1, 0.875, 0.75, 0.625]
    )
    assert rates(OptimConfig(lr=0.3, schedule="constant", warmup_steps=2), 4) == pytest.approx(
        [0.15, 0.3, 0.3, 0.3]
    )
    stepped = OptimConfig(lr=1.0, schedule="multistep", milestones=(2, 4), gamma=0.1)
    assert rates(stepped, 6) == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"name": "adamax"}, "optim.name"),
        ({"lr": 0.0}, "optim.lr"),
        ({"lr": float("nan")}, "optim.lr"),
        ({"weight_decay": -1.0}, "optim.weight_decay"),
        ({"momentum": 1.0}, "optim.momentum"),
        ({"betas": (0.9, 1.0)}, "optim.betas"),
        ({"schedule": "multistep"}, "optim.milestones"),
        ({"milestones": (5, 5)}, "optim.milestones"),
        ({"warmup_steps": -1}, "optim.warmup_steps"),
        ({"min_lr_ratio": 1.5}, "optim.min_lr_ratio"),
    ],
)
def test_wrong_values_name_the_field(values: dict, field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        OptimConfig(**values)


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"steps": 0}, "train.steps"),
        ({"accumulate": True}, "train.accumulate"),
        ({"precision": "fp8"}, "train.precision"),
        ({"strategy": "deepspeed"}, "train.strategy"),
        ({"clip_norm": 0.0}, "train.clip_norm"),
        ({"ema": 1.0}, "train.ema"),
        ({"seed": -1}, "train.seed"),
        ({"devices": 0}, "train.devices"),
        ({"threads": 0}, "train.threads"),
    ],
)
def test_wrong_train_values_name_the_field(values: dict, field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        TrainConfig(**values)


def test_build_leaves_out_frozen_and_tied_parameters() -> None:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    first.bias.requires_grad_(False)
    optimizer, _ = OptimConfig().build([*first.parameters(), *second.parameters()], 1)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(first.weight), id(second.bias)]
    with pytest.raises(ValueError, match="needs a gradient"):
        OptimConfig().build([first.bias], 1)


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_twenty_steps_are_bit_equal_to_a_bare_loop(name: str, accumulate: int) -> None:
    optim = OptimConfig(name=name, lr=1e-2, weight_decay=0.01, schedule="cosine", warmup_steps=3)  # type: ignore[arg-type]
    trained, bare = ToyDistiller(dropout=0.2), ToyDistiller(dropout=0.2)
    config = TrainConfig(steps=20, accumulate=accumulate, clip_norm=0.5, seed=3, threads=1)
    Trainer(config, out=None).fit(trained, SeededLoader(toy_data(), batch_size=8, seed=3), optim)

    torch.manual_seed(3)
    kinds = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}
    extra = {"momentum": 0.9} if name == "sgd" else {}
    optimizer = kinds[name](bare.student.parameters(), lr=1e-2, weight_decay=0.01, **extra)
    batches = iter(SeededLoader(toy_data(), batch_size=8, seed=3))
    for step in range(20):
        warm = (step + 1) / 3 if step < 3 else 0.5 * (1 + math.cos(math.pi * (step - 3) / 17))
        optimizer.param_groups[0]["lr"] = 1e-2 * warm
        optimizer.zero_grad()
        for _ in range(accumulate):
            x, y = next(batches)
            logits = bare.student(x)
            kd = nn.functional.kl_div(
                logits.log_softmax(-1), bare.teacher(x).softmax(-1), reduction="batchmean"
            )
            loss = nn.functional.cross_entropy(logits, y) + kd
            (loss / accumulate).backward()
        nn.utils.clip_grad_norm_(bare.student.parameters(), 0.5)
        optimizer.step()
    for key, value in bare.student.state_dict().items():
        assert torch.equal(value, trained.student.state_dict()[key]), key


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_marked_parameters_are_not_decayed(name: str) -> None:
    layer = nn.Linear(2, 2)
    layer.bias._no_weight_decay = True  # type: ignore[attr-defined]
    with torch.no_grad():
        layer.bias.fill_(1.0)
    before = layer.weight.detach().clone()
    optimizer, _ = OptimConfig(name=name, lr=0.1, weight_decay=0.5).build(layer.parameters(), total_steps=4)  # type: ignore[arg-type]
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.equal(layer.bias, torch.ones(2))
    assert not torch.equal(layer.weight, before)
    plain, _ = OptimConfig(name=name, lr=0.1).build(layer.parameters(), total_steps=4)  # type: ignore[arg-type]
    assert len(plain.param_groups) == 1
