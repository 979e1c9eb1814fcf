"""The method on real textures (KTH-TIPS): what the acceptance of the method asks for, over three seeds."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from stillhouse.core.config import load_config
from stillhouse.kidney.config import KidneyConfig
from stillhouse.kidney.fit import fit_student, fit_teacher, prepare
from stillhouse.kidney.metrics import kshot_new_class
from stillhouse.kidney.scoring import embeddings_of, labels_of, score_embedding

SMALL = (
    "model.teacher_width=16",
    'teacher.branches=("class","class")',
    "teacher.steps=250",
    "train.steps=300",
    "train.threads=1",
)


def _config(*overrides: str) -> KidneyConfig:
    folder = Path(os.environ["STILLHOUSE_TEST_DATA"]) / "kidney" / "kth_tips_gray"
    return load_config(
        KidneyConfig,
        "kth_tips_small",
        presets="stillhouse.kidney.configs",
        overrides=[f"data.path={folder}", *SMALL, *overrides],
    )


@pytest.mark.slow
@pytest.mark.real_data
def test_a_shuffled_teacher_is_worse_than_none_and_a_true_one_better() -> None:
    config = _config()
    found: dict[str, list[float]] = {"shuffled": [], "none": [], "guided": []}
    for seed in range(3):
        data = prepare(config, seed=seed)
        teacher, _ = fit_teacher(config, data, seed=seed, out=None, quiet=True)
        ways = {
            "shuffled": replace(config.distill, shuffle_teacher=True),
            "none": replace(config.distill, method="none"),
            "guided": config.distill,
        }
        for name, distill in ways.items():
            own = replace(config, distill=distill)
            student, _ = fit_student(
                own, data, None if name == "none" else teacher, seed=seed, out=None, quiet=True
            )
            row = score_embedding(own, student, data.train, data.test, data.classes, tau=distill.tau)
            found[name].append(row.patches["estimate"])
    means = {name: float(np.mean(values)) for name, values in found.items()}
    assert means["shuffled"] < means["none"] - 0.02, found
    assert means["none"] < means["guided"] - 0.02, found


@pytest.mark.slow
@pytest.mark.real_data
def test_guidance_helps_with_classes_that_nobody_trained_on() -> None:
    config = _config('data.new_classes=("cotton","cracker","sponge")')
    found: dict[str, list[float]] = {"none": [], "guided": []}
    for seed in range(3):
        data = prepare(config, seed=seed)
        assert data.new is not None
        teacher, _ = fit_teacher(config, data, seed=seed, out=None, quiet=True)
        for name in found:
            distill = config.distill if name == "guided" else replace(config.distill, method="none")
            own = replace(config, distill=distill)
            student, _ = fit_student(
                own, data, teacher if name == "guided" else None, seed=seed, out=None, quiet=True
            )
            score = kshot_new_class(
                embeddings_of(own, student, data.new),
                labels_of(data.new, config.data.new_classes),
                shots=5,
                groups=[item.stone for item in data.new.items],
            )
            found[name].append(score["precision_at_1"]["estimate"])
    assert np.mean(found["guided"]) > np.mean(found["none"]), found
