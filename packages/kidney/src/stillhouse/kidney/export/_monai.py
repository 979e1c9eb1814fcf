"""A MONAI bundle that runs with torch and MONAI alone: `python -m monai.bundle run --config_file
configs/inference.json`.

The network is a torch.export program, not pickled code. `models/model.pt` is the state dict that the bundle
convention asks for; it loads with `weights_only=True`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stillhouse.core.errors import StillhouseError

from ..store import FinishedStudent
from ._module import ExportedStudent

SCHEMA = (
    "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
)


def write_bundle(module: ExportedStudent, student: FinishedStudent, work: Path) -> Any:
    """Write the bundle and return a function that runs its network as MONAI does."""
    from ._export import describe, export_program

    for folder in ("configs", "models", "docs"):
        (work / folder).mkdir()
    size = module.side
    torch.export.save(export_program(module), work / "models" / "model.pt2")
    torch.save(student.network.state_dict(), work / "models" / "model.pt")
    facts = describe(module, student)
    texts = {
        "configs/metadata.json": json.dumps(_metadata(student, facts, size), indent=2, ensure_ascii=False)
        + "\n",
        "configs/inference.json": json.dumps(_inference(facts, size), indent=2, ensure_ascii=False) + "\n",
        "configs/logging.conf": _LOGGING,
        "docs/README.md": _readme(student, facts),
        "LICENSE": _licence(student),
    }
    for name, text in texts.items():
        (work / name).write_text(text, encoding="utf-8")
    weights = torch.load(work / "models" / "model.pt", weights_only=True)
    for name, value in student.network.state_dict().items():
        if not torch.equal(weights[name], value):
            raise StillhouseError(f"models/model.pt: {name} does not read back as it was written")
    return _runner(work)


def _runner(work: Path) -> Any:
    from monai.bundle import ConfigParser

    parser = ConfigParser()
    parser.read_config(str(work / "configs" / "inference.json"))
    parser.read_meta(str(work / "configs" / "metadata.json"))
    parser["bundle_root"] = str(work)
    parser["device"] = "$torch.device('cpu')"
    network = parser.get_parsed_content("network_def")
    inferer = parser.get_parsed_content("inferer")

    def run(images: Tensor) -> Sequence[Tensor]:
        with torch.inference_mode():
            return tuple(inferer(images, network))

    return run


def _metadata(student: FinishedStudent, facts: dict[str, Any], size: int) -> dict[str, Any]:
    classes = facts["classes"]
    licences = [
        str(entry.get("licence", "unknown")) for entry in student.artifact.provenance.get("licences", [])
    ]
    return {
        "schema": SCHEMA,
        "version": "0.1.0",
        "changelog": {"0.1.0": "exported by stillhouse-kidney"},
        "monai_version": version("monai").split("+")[0],
        "pytorch_version": torch.__version__.split("+")[0],
        "numpy_version": np.__version__,
        "required_packages_version": {"pillow": version("pillow")},
        "name": "Kidney-stone identification, distilled student",
        "task": "Kidney-stone identification",
        "description": "Embeds patches of kidney stones and names the class of the nearest prototype.",
        "authors": "Made with stillhouse-kidney",
        "copyright": "see LICENSE",
        "data_type": "png, jpeg or bmp",
        "image_classes": "RGB patches of stone fragments",
        "label_classes": ", ".join(classes),
        "pred_classes": ", ".join(classes),
        "eval_metrics": {},
        "intended_use": "Research. This is not a medical device.",
        "references": [
            "Gonzalez-Zapata et al., arXiv 2307.07046",
            "data licences: " + (", ".join(licences) or "not stated"),
        ],
        "network_data_format": {
            "inputs": {
                "image": {
                    "type": "image",
                    "format": "RGB",
                    "modality": "endoscopy",
                    "num_channels": 3,
                    "spatial_shape": [size, size],
                    "dtype": "float32",
                    "value_range": [0, 1],
                    "is_patch_data": True,
                    "channel_def": {"0": "red", "1": "green", "2": "blue"},
                }
            },
            "outputs": {
                "pred": {
                    "type": "probabilities",
                    "format": "classes",
                    "num_channels": len(classes),
                    "spatial_shape": [],
                    "dtype": "float32",
                    "value_range": [0, 1],
                    "is_patch_data": False,
                    "channel_def": {str(index): name for index, name in enumerate(classes)},
                }
            },
        },
    }


def _inference(facts: dict[str, Any], size: int) -> dict[str, Any]:
    """The bundle's configuration; its preprocessing is that of the package, step by step."""
    square = (
        "$lambda x: x[:, (x.shape[1] - min(x.shape[1:])) // 2 :, (x.shape[2] - min(x.shape[1:])) // 2 :]"
        "[:, : min(x.shape[1:]), : min(x.shape[1:])]"
    )
    resize = (
        f"$lambda x: x if x.shape[1] == {size} else torch.nn.functional.interpolate(x[None], ({size}, "
        f"{size}), "
        "mode='bilinear', align_corners=False, antialias=True)[0].round().clamp(0, 255)"
    )
    limit = facts["unknown_threshold"]
    past = "False" if limit is None else f"float(d) > {limit!r}"
    row = (
        "{'image': f, 'class': 'unknown' if "
        + past
        + " else @classes[int(p.argmax())], 'nearest_class': @classes[int(p.argmax())], "
        "'confidence': float(p.max()), "
        "'distance': float(d), 'probabilities': dict(zip(@classes, p.tolist()))}"
    )
    return {
        "imports": ["$import glob", "$import json", "$import os", "$import pathlib", "$import torch"],
        "bundle_root": ".",
        "dataset_dir": "$@bundle_root + '/images'",
        "output_dir": "$@bundle_root + '/predictions'",
        "device": "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')",
        "batch_size": 16,
        "classes": facts["classes"],
        "files": (
            "$sorted(f for f in glob.glob(@dataset_dir + '/**/*', recursive=True) "
            "if f.lower().endswith(('.png', '.jpg', '.jpeg', '.bmp')))"
        ),
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [
                {
                    "_target_": "LoadImaged",
                    "keys": "image",
                    "reader": {
                        "_target_": "PILReader",
                        "converter": "$lambda image: image.convert('RGB')",
                        "reverse_indexing": False,
                    },
                    "image_only": True,
                    "ensure_channel_first": True,
                },
                {"_target_": "EnsureTyped", "keys": "image", "track_meta": False, "dtype": "$torch.float32"},
                {"_target_": "Lambdad", "keys": "image", "func": square},
                {"_target_": "Lambdad", "keys": "image", "func": resize},
                {"_target_": "Lambdad", "keys": "image", "func": "$lambda x: x / 255"},
            ],
        },
        "dataset": {
            "_target_": "Dataset",
            "data": "$[{'image': f} for f in @files]",
            "transform": "@preprocessing",
        },
        "dataloader": {
            "_target_": "DataLoader",
            "dataset": "@dataset",
            "batch_size": "@batch_size",
            "num_workers": 0,
        },
        "network_def": "$torch.export.load(@bundle_root + '/models/model.pt2').module().to(@device)",
        "inferer": {"_target_": "SimpleInferer"},
        "outputs": (
            "$[[o.detach().cpu() for o in @inferer(b['image'].to(@device), @network_def)] "
            "for b in @dataloader]"
        ),
        "predictions": (
            f"$[{row} for f, p, d in "
            "zip(@files, (p for b in @outputs for p in b[0]), (d for b in @outputs for d in b[1]))]"
        ),
        "evaluator": "@predictions",
        "initialize": ["$print(len(@files), 'images in', @dataset_dir)"],
        "run": [
            "$os.makedirs(@output_dir, exist_ok=True)",
            "$pathlib.Path(@output_dir, 'predictions.json').write_text("
            "json.dumps(@predictions, indent=1), encoding='utf-8')",
            "indent=1))",
        ],
    }


def _readme(student: FinishedStudent, facts: dict[str, Any]) -> str:
    classes = "\n".join(f"- {name}" for name in facts["classes"])
    return f"""# Kidney-stone identification, distilled student

A MONAI bundle written by stillhouse-kidney. It names the class of patches of kidney stones by the nearest
prototype of an embedding, or answers "unknown" where the nearest prototype is too far.

Research only; this is not a medical device.

## Run it

Put PNG, JPEG or BMP patches into `images/` and run, in this folder (`pip install monai fire pillow`):

```bash
python -m monai.bundle run --config_file configs/inference.json --meta_file configs/metadata.json
python -m monai.bundle run --config_file configs/inference.json --dataset_dir /path/to/images --output_dir out
```

`predictions/predictions.json` holds one row an image. EXIF orientation is not applied; 16-bit images are not
supported.

## Classes

{classes}

{facts["unknown"]}

## Files

- `models/model.pt2`: the network with standardisation and prototypes, a torch.export program.
- `models/model.pt`: the network's weights alone, a state dict; load it with `weights_only=True`.
- `export.json`: inputs, outputs, threshold, and how far the export differs from the student on random images.

The student's own card follows.

---

{student.artifact.card}"""


def _licence(student: FinishedStudent) -> str:
    lines = [
        "The configuration files of this bundle: Apache-2.0, http://www.apache.org/licenses/LICENSE-2.0",
        "",
        "The weights were trained on data, and by a teacher, with terms of their own, which they inherit:",
    ]
    entries = student.artifact.provenance.get("licences", [])
    lines += [
        f"- {e.get('what')}: {e.get('name')}: {e.get('licence')} {e.get('terms', '')}".rstrip()
        for e in entries
    ]
    if not entries:
        lines.append("- none was stated at training; ask whoever trained them before you pass them on")
    return "\n".join(lines) + "\n"


_LOGGING = """[loggers]
keys=root

[handlers]
keys=consoleHandler

[formatters]
keys=fullFormatter

[logger_root]
level=INFO
handlers=consoleHandler

[handler_consoleHandler]
class=StreamHandler
level=INFO
formatter=fullFormatter
args=(sys.stdout,)

[formatter_fullFormatter]
format=%(asctime)s - %(name)s - %(levelname)s - %(message)s
"""
