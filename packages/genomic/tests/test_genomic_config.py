"""The configuration: presets, what is refused, and that each refusal names the field."""

from __future__ import annotations

from typing import Any

import pytest

from stillhouse.core.config import list_presets, load_config, to_dict
from stillhouse.core.errors import ConfigError
from stillhouse.genomic.config import GenomicConfig
from stillhouse.genomic.student import build_student

PRESETS = "stillhouse.genomic.configs"


@pytest.mark.parametrize("name", ["demo", "genomes_1pct", "hg38_had_paper"])
def test_every_preset_is_a_configuration(name: str) -> None:
    assert name in list_presets(PRESETS)
    config = load_config(GenomicConfig, name, presets=PRESETS)
    again = load_config(GenomicConfig, to_dict(config))
    assert again == config


def test_the_paper_preset_has_the_lineages_numbers_and_a_student_of_about_a_million() -> None:
    config = load_config(GenomicConfig, "hg38_had_paper", presets=PRESETS)
    assert (config.train.steps, config.optim.lr, config.optim.weight_decay) == (10_000, 8e-3, 0.1)
    assert config.optim.betas == (0.9, 0.95)
    assert config.optim.warmup_steps == config.train.steps // 10
    assert config.optim.lr * config.optim.min_lr_ratio == pytest.approx(1e-4)
    assert config.data.length * config.distill.batch == 2**20  # tokens a step
    count = sum(p.numel() for p in build_student(config.model).parameters())
    assert 1.0e6 < count < 1.15e6


def test_the_small_preset_has_a_student_fifty_times_smaller_than_its_teacher() -> None:
    from stillhouse.genomic.teacher import KmerTransformer

    config = load_config(GenomicConfig, "genomes_1pct", presets=PRESETS)
    student = sum(p.numel() for p in build_student(config.model).parameters())
    teacher = sum(p.numel() for p in KmerTransformer(config.teacher.network()).parameters())
    assert teacher / student >= 50


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"length": 4}}, "data.length is 4"),
        ({"data": {"length": 3000, "block": 5000}}, "data.block 5000"),
        ({"data": {"test": 0.0}}, "data.test 0.0"),
        ({"data": {"test": 0.6, "validation": 0.4}}, "together below 1"),
        (
            {"data": {"fasta": ["a.fa", "b.fa"], "annotation": ["a.gff3"]}},
            "data.annotation has 1 entries for 2",
        ),
        ({"data": {"letters": 1.5}}, "data.letters is 1.5"),
        ({"data": {"stride": 0}}, "data.stride is 0"),
        ({"model": {"kind": "mamba"}}, "mamba"),
        ({"teacher": {"lr": 0.0}}, "teacher.lr is 0.0"),
        ({"teacher": {"width": 33, "heads": 4}}, "teacher.width is 33"),
        ({"teacher": {"ratio": 0.0}}, "teacher.ratio is 0.0"),
        ({"distill": {"method": "hda"}}, "distill.method: expected one of"),
        ({"distill": {"mask_ratio": 1.0}}, "distill.mask_ratio is 1.0"),
        ({"distill": {"mask_ratio": float("nan")}}, "must be a finite number"),
        ({"distill": {"temperature": 0.0}}, "distill.temperature is 0.0"),
        ({"distill": {"layers": []}}, "distill.layers is empty"),
        ({"distill": {"layers": [9]}}, "distill.layers has 9"),
        ({"distill": {"decoder_width": 30, "decoder_heads": 4}}, "distill.decoder_width is 30"),
        ({"distill": {"soft_weight": 1.2}}, "distill.soft_weight is 1.2"),
        ({"evaluate": {"tasks": ["exons"]}}, "'exons'"),
        ({"evaluate": {"decoys": "cruel"}}, "evaluate.decoys: expected one of"),
        ({"distill": {"lambda": 1.0}}, "distill.lambda"),
    ],
)
def test_what_cannot_be_is_refused_with_its_field(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(GenomicConfig, changes)


def test_layers_of_a_teacher_that_is_read_are_not_known_beforehand() -> None:
    settings = {"teacher": {"source": "somewhere"}, "distill": {"layers": [20, -1]}}
    assert load_config(GenomicConfig, settings).distill.layers == (20, -1)
