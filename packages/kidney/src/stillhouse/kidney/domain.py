"""What this package tells `stillhouse` about itself. Light: nothing of it is imported before it is used."""

from __future__ import annotations

from stillhouse.core.doctor import python_library
from stillhouse.core.domain import Domain

DOMAIN = Domain(
    name="kidney",
    title="Kidney-stone identification: a small student distilled from a multi-branch few-shot teacher.",
    config="stillhouse.kidney.config:KidneyConfig",
    configs="stillhouse.kidney.configs",
    train="stillhouse.kidney.run:train",
    evaluate="stillhouse.kidney.run:evaluate",
    report="stillhouse.kidney.run:report",
    export="stillhouse.kidney.run:export",
    formats=("torch", "onnx", "monai"),
    distribution="stillhouse-kidney",
    doctor=tuple(
        python_library(name, required=False, install="stillhouse-kidney[onnx]")
        for name in ("onnx>=1.17", "onnxscript>=0.5", "onnxruntime>=1.20")
    ),
    verbs="stillhouse.kidney.verbs:add_verbs",
)
