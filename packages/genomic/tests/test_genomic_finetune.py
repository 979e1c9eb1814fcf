from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stillhouse.core.errors import ConfigError, DataError
from stillhouse.core.run import Run
from stillhouse.core.train import OptimConfig
from stillhouse.genomic.data import Sequences
from stillhouse.genomic.finetune import FinetuneConfig, finetune, finetune_student, preset_config
from stillhouse.genomic.student import Encoder, MaskedDecoder, StudentConfig, build_student
from stillhouse.genomic.student.store import save_student
from stillhouse.genomic.tokenizers import CharacterTokenizer

QUICK = FinetuneConfig(epochs=4, batch=16, lr=5e-3, seeds=1, accelerator="cpu")
CONFIG = StudentConfig(kind="cnn", width=16, conv_layers=1, attention_heads=2)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Small networks on a busy machine: more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    torch.manual_seed(0)
    return build_student(CONFIG)


def task(count: int, seed: int, *, length: int = 24) -> Sequences:
    """Class 1 has a G-rich half: composition alone tells it."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count)
    p = np.where(labels[:, None], [[0.1, 0.4, 0.4, 0.1]], [[0.4, 0.1, 0.1, 0.4]])
    x = np.stack([rng.choice(np.frombuffer(b"ACGT", np.uint8), length, p=row) for row in p])
    return Sequences(
        name="composition",
        sequences=x,
        lengths=np.full(count, length),
        labels=labels,
        classes=("AT", "GC"),
        groups=tuple(f"g{at // 2}" for at in range(count)),
        split=None,
    )


def test_a_task_is_learned_and_the_encoder_is_left_alone(encoder: Encoder) -> None:
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    found = finetune(encoder, task(160, 0), QUICK, test=task(100, 1))
    assert found.metric == "mcc (plain)"
    assert found.seeds[0].scores["mcc"].estimate > 0.7
    assert found.sizes == {"train": 144, "validation": 16, "test": 100}
    assert len(found.seeds[0].history) == 4
    assert found.seeds[0].validation == max(found.seeds[0].history)
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, before[name])
    moved = found.classifier.encoder.state_dict()
    assert any(not torch.equal(moved[name], before[name]) for name in before)


def test_without_a_signal_nothing_is_learned(encoder: Encoder) -> None:
    """Letters that do not depend on the label: a score above chance would be a leak."""
    rng = np.random.default_rng(5)
    train, test = (
        replace(data, sequences=np.frombuffer(b"ACGT", np.uint8)[rng.integers(0, 4, data.sequences.shape)])
        for data in (task(160, 0), task(200, 1))
    )
    found = finetune(encoder, train, QUICK, test=test)
    assert abs(found.seeds[0].scores["mcc"].estimate) < 0.25


def test_a_frozen_encoder_does_not_move(encoder: Encoder) -> None:
    found = finetune(encoder, task(64, 0), replace(QUICK, freeze=True, epochs=1), test=task(20, 1))
    moved = found.classifier.encoder.state_dict()
    assert all(torch.equal(moved[name], value) for name, value in encoder.state_dict().items())


def test_the_rates_of_the_recurrence_are_not_decayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The encoder is copied for each seed; weight decay still leaves its decay rates out."""
    groups: list[list[dict[str, Any]]] = []
    build = OptimConfig.build

    def spy(self: OptimConfig, parameters: Any, total_steps: int) -> Any:
        made = build(self, parameters, total_steps)
        groups.append(made[0].param_groups)
        return made

    monkeypatch.setattr(OptimConfig, "build", spy)
    model = build_student(StudentConfig(kind="gdn", width=16, gdn_layers=1, attention_heads=2))
    found = finetune(model, task(24, 0), replace(QUICK, epochs=1, seeds=2), test=task(10, 1))
    assert len(groups) == 2
    rates = {
        name: p for name, p in found.classifier.named_parameters() if name.endswith(("A_log", "dt_bias"))
    }
    assert len(rates) == 4
    for decayed, kept in groups:
        assert decayed["weight_decay"] == 0.1
        assert kept["weight_decay"] == 0.0
        assert len(kept["params"]) == 4
        assert len(decayed["params"]) + 4 == len(list(found.classifier.parameters()))
    assert any({id(p) for p in kept["params"]} == {id(p) for p in rates.values()} for _, kept in groups)


def test_the_best_epoch_is_kept_and_patience_stops(encoder: Encoder) -> None:
    train, test = task(100, 0), task(40, 1)
    config = replace(QUICK, epochs=30, patience=2)
    found = finetune(encoder, train, config, test=test)
    history = found.seeds[0].history
    assert len(history) < 30
    assert found.seeds[0].epoch == 1 + int(np.argmax(history))
    assert len(history) - found.seeds[0].epoch == 2


def test_seeds_differ_and_repeat(encoder: Encoder) -> None:
    config = replace(QUICK, epochs=1, seeds=2, seed=3)
    first, again = (finetune(encoder, task(64, 0), config, test=task(40, 1)) for _ in range(2))
    assert [one.seed for one in first.seeds] == [3, 4]
    np.testing.assert_array_equal(first.seeds[1].probabilities, again.seeds[1].probabilities)
    assert not np.array_equal(first.seeds[0].probabilities, first.seeds[1].probabilities)
    values = first.summary["mcc"]["values"]
    assert first.summary["mcc"]["half_range"] == pytest.approx((max(values) - min(values)) / 2)


def test_scratch_takes_a_function_of_the_seed() -> None:
    seen: list[int] = []

    def make(seed: int) -> Encoder:
        seen.append(seed)
        torch.manual_seed(seed)
        return build_student(CONFIG)

    finetune(
        make, task(40, 0), FinetuneConfig(epochs=1, batch=8, seeds=2, accelerator="cpu"), test=task(20, 1)
    )
    assert seen == [0, 1]


def test_given_validation_rows_are_used(encoder: Encoder) -> None:
    train = task(60, 0)
    marked = replace(train, split=("train",) * 40 + ("validation",) * 20)
    found = finetune(encoder, marked, replace(QUICK, epochs=1), test=task(20, 1))
    assert (found.sizes["train"], found.sizes["validation"]) == (40, 20)


def test_presets_are_the_protocols_of_the_field() -> None:
    ntb, gb = preset_config("ntb", kind="splice"), preset_config("gb")
    assert (ntb.epochs, ntb.batch, ntb.lr, ntb.seeds) == (20, 128, 1e-3, 10)
    assert (gb.epochs, gb.batch, gb.lr, gb.seeds) == (10, 128, 1e-3, 5)
    for config in (ntb, gb):
        assert (config.weight_decay, config.clip, config.warmup, config.min_lr_ratio, config.validation) == (
            0.1,
            1.0,
            0.01,
            0.1,
            0.1,
        )
    assert ntb.scorer().label == "f1_binary (caduceus)"
    assert gb.scorer().label == "accuracy (caduceus)"
    assert preset_config("ntb", kind="histone", lr=2e-3, seeds=2).lr == 2e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"preset": "nbt"}, "--preset nbt"),
        ({"preset": "ntb", "kind": "other"}, "does not score"),
        ({"preset": "ntb"}, "needs --kind"),
        ({"convention": "gue", "kind": "gb"}, "does not score"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"epochs": 0}, "epochs is 0"),
    ],
)
def test_impossible_protocols_are_one_line(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        preset_config(**change)


def test_parts_that_do_not_fit_are_one_line(encoder: Encoder) -> None:
    train, test = task(40, 0), task(20, 1)
    for mine, theirs, message in (
        (train, replace(test, classes=("x", "y")), "different classes"),
        (task(5, 0), test, "at least 10"),
        (replace(train, labels=np.zeros(40, int)), test, "no sequence of the class 'GC'"),
        (replace(train, classes=("a", "b", "c")), replace(test, classes=("a", "b", "c")), "the class 'c'"),
    ):
        with pytest.raises(DataError, match=message):
            finetune(encoder, mine, QUICK, test=theirs)


# ---- the verb


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory, encoder: Encoder) -> Path:
    folder = tmp_path_factory.mktemp("run") / "student"
    decoder = MaskedDecoder(width=16, heads=2)
    save_student(folder, encoder, decoder, CharacterTokenizer(), card="# A student of nobody\n")
    return folder


def table(path: Path, *, split: bool = True) -> Path:
    lines = ["sequence,label" + (",split" if split else "")]
    for part, count, seed in (("train", 60, 0), ("test", 30, 1)):
        data = task(count, seed)
        for row, label in zip(data.sequences, data.labels, strict=True):
            lines.append(f"{row.tobytes().decode()},{data.classes[label]}" + (f",{part}" if split else ""))
    path.write_text("\n".join(lines) + "\n")
    return path


def test_files_in_scores_and_a_report_out(student: Path, tmp_path: Path) -> None:
    run = Run(out=tmp_path / "out", device="cpu", json=True)
    result = finetune_student(student, table(tmp_path / "t.csv"), replace(QUICK, epochs=2, seeds=2), run)
    assert result["sizes"]["test"] == 30
    held = json.loads((tmp_path / "out" / "finetune.json").read_text())
    assert held["metric"] == "mcc (plain)"
    assert [one["seed"] for one in held["seeds"]] == [0, 1]
    predictions = (tmp_path / "out" / "predictions.tsv").read_text().splitlines()
    assert len(predictions) == 31
    page = Path(result["report"]).read_text(encoding="utf-8")
    assert "mcc (plain)" in page
    assert page.count("<svg") >= 3


def test_the_run_that_holds_a_student_will_do(student: Path, tmp_path: Path) -> None:
    run = Run(out=tmp_path / "out", device="cpu", json=True)
    both = table(tmp_path / "t.csv", split=False)
    config = replace(QUICK, epochs=1)
    result = finetune_student(student.parent, both, config, run, test=both, scratch=True)
    assert result["seeds"] == 1


def test_without_a_test_part_nothing_is_written(student: Path, tmp_path: Path) -> None:
    run = Run(out=tmp_path / "out", device="cpu", json=True)
    with pytest.raises(DataError, match="--test"):
        finetune_student(student, table(tmp_path / "t.csv", split=False), QUICK, run)
    assert not run.out.exists()
