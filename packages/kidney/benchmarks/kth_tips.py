"""The four rows of the package README on KTH-TIPS with five labelled images a class, and the shuffled
teacher.

python packages/kidney/benchmarks/kth_tips.py --data DIR --out runs/kth --seed 0     one seed (ten minutes
on a core) python packages/kidney/benchmarks/kth_tips.py --data DIR --out runs/kth --seed 0 --new-classes
python packages/kidney/benchmarks/kth_tips.py --out runs/kth --table --write         tables of the seeds
that are there

DIR holds the ten class folders. Each seed draws another split, other labelled images, other weights. A row
that is in the out folder is not trained again. `--write` puts the tables into RESULTS.md beside this file
and into the README.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stillhouse.core.config import load_config
from stillhouse.core.metrics import bootstrap_interval
from stillhouse.kidney.config import KidneyConfig
from stillhouse.kidney.fit import Prepared, fit_classifier, fit_student, fit_teacher, prepare
from stillhouse.kidney.metrics import kshot_new_class
from stillhouse.kidney.scoring import Scored, embeddings_of, labels_of, score_classifier, score_embedding

PRESET = "kth_tips_small"
TEACHER, GUIDED = "teacher GEMINI", "guided student"
UNGUIDED, CLASSIFIER, SHUFFLED = (
    "metric learning without distillation",
    "cross-entropy classifier",
    "shuffled teacher",
)
ROWS = (CLASSIFIER, UNGUIDED, GUIDED, TEACHER, SHUFFLED)
NEW = ("cotton", "cracker", "sponge")
HERE = Path(__file__).parent
MADE_BY = """KTH-TIPS grey textures (810 images, ten classes) stand in for stones, of which none are public:
class = texture, view = distance, group = one light and pose at all nine distances. Made by

```bash
# preset: kth_tips_small
study="python packages/kidney/benchmarks/kth_tips.py --out runs/kth"
for seed in 0 1 2; do
    $study --data kth_tips_gray --seed $seed
    $study --data kth_tips_gray --seed $seed --new-classes
done
$study --table --write
```"""
SHOTS = 5


def main() -> None:
    """Train one seed, or print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--new-classes", action="store_true", help="hold three classes out of training")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    if given.table:
        show(given.out, write=given.write)
        return
    if given.data is None:
        parser.error("--data is required to train")
    torch.set_num_threads(given.threads)
    overrides = [f"data.path={given.data}", f"train.threads={given.threads}", *given.overrides]
    if given.new_classes:
        overrides += [f"data.new_classes={json.dumps(NEW)}", "teacher.steps=300", "train.steps=500"]
    config = load_config(KidneyConfig, PRESET, presets="stillhouse.kidney.configs", overrides=overrides)
    study(config, given.out / ("new" if given.new_classes else "rows"), given.seed)


def study(config: KidneyConfig, out: Path, seed: int) -> None:
    """Train and score every row of one seed; each is written as soon as it is there."""
    out.mkdir(parents=True, exist_ok=True)
    data = prepare(config, seed=seed)
    names = ROWS if data.new is None else (UNGUIDED, GUIDED, TEACHER)
    teacher = None
    for name in (TEACHER, *(n for n in names if n != TEACHER)):
        target = out / f"{name.replace(' ', '-')}-{seed}.json"
        if target.exists() and name != TEACHER:
            continue
        begun = time.perf_counter()
        network, scored = _row(name, config, data, teacher, seed)
        if name == TEACHER:
            teacher = network
        row: dict[str, Any] = {
            "row": name,
            "seed": seed,
            "seconds": round(time.perf_counter() - begun, 1),
            "parameters": sum(p.numel() for p in network.parameters()),
            "groups": [item.stone for item in data.test.items],
            "image": scored.correct.tolist(),
            "patch": scored.patches_correct.tolist(),
            "map_at_r": scored.scores["map_at_r"]["estimate"],
            "nearest": scored.scores["precision_at_1"]["estimate"],
            "macro_f1": scored.scores["macro_f1"],
            "fused": scored.scores.get("fused", {}).get("accuracy"),
            "images": {"train": len(data.train), "pool": len(data.pool), "test": len(data.test)},
        }
        if data.new is not None:
            row["new_class"] = kshot_new_class(
                embeddings_of(config, network, data.new),
                labels_of(data.new, config.data.new_classes),
                shots=SHOTS,
                groups=[item.stone for item in data.new.items],
            )
        target.write_text(json.dumps(row) + "\n")
        print(
            f"seed {seed}: {name}: image {np.mean(row['image']):.3f}, patch {np.mean(row['patch']):.3f}",
            flush=True,
        )


def _row(
    name: str, config: KidneyConfig, data: Prepared, teacher: Any, seed: int
) -> tuple[torch.nn.Module, Scored]:
    common: dict[str, Any] = {"seed": seed, "out": None, "quiet": True}
    if name == CLASSIFIER:
        network, _ = fit_classifier(config, data, **common)
        return network, score_classifier(config, network, data.train, data.test, data.classes)
    tau = config.distill.tau
    if name == TEACHER:
        trained, _ = fit_teacher(config, data, **common)
        tau = config.teacher.tau
        return trained, score_embedding(config, trained, data.train, data.test, data.classes, tau=tau)
    ways: dict[str, Callable[[], Any]] = {
        UNGUIDED: lambda: replace(config.distill, method="none"),
        GUIDED: lambda: config.distill,
        SHUFFLED: lambda: replace(config.distill, shuffle_teacher=True),
    }
    own = replace(config, distill=ways[name]())
    student, _ = fit_student(own, data, None if name == UNGUIDED else teacher, **common)
    return student, score_embedding(own, student, data.train, data.test, data.classes, tau=tau)


# ---- tables


def show(out: Path, *, write: bool) -> None:
    """Print the tables, and write them where asked."""
    text = "\n\n".join(
        part for part in (_rows_table(_read(out / "rows")), _new_table(_read(out / "new"))) if part
    )
    text = f"{MADE_BY}\n\n{text}"
    print(text)
    if not write:
        return
    (HERE / "RESULTS.md").write_text(
        "# KTH-TIPS grey, five labelled images a class\n\n" + text + "\n", encoding="utf-8"
    )
    readme = HERE.parent / "README.md"
    page = readme.read_text(encoding="utf-8")
    head, rest = page.split("<!-- results -->", 1)
    tail = rest.split("<!-- /results -->", 1)[1] if "<!-- /results -->" in rest else rest
    readme.write_text(f"{head}<!-- results -->\n{text}\n<!-- /results -->{tail}", encoding="utf-8")


def _read(folder: Path) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.json")):
        row = json.loads(path.read_text())
        found.setdefault(row["row"], []).append(row)
    return found


def _mean(rows: list[dict[str, Any]], key: str, other: list[dict[str, Any]] | None = None) -> str:
    """Mean with a 95 % bootstrap interval over the image groups of all seeds; paired where other is given."""
    values = np.concatenate([np.array(row[key]) for row in rows])
    groups = [
        f"{r['seed']}/{g}" for r in rows for g in np.repeat(r["groups"], len(r[key]) // len(r["groups"]))
    ]
    paired = None if other is None else np.concatenate([np.array(row[key]) for row in other])
    got = bootstrap_interval(values, groups=groups, paired_with=paired, resamples=2000, seed=0)
    if other is None:
        return f"{100 * got.estimate:.1f} [{100 * got.low:.1f}, {100 * got.high:.1f}]"
    return f"{100 * got.estimate:+.1f} [{100 * got.low:+.1f}, {100 * got.high:+.1f}]"


def _rows_table(found: dict[str, list[dict[str, Any]]]) -> str:
    if not found:
        return ""
    seeds = sorted({row["seed"] for rows in found.values() for row in rows})
    head = (
        "row",
        "accuracy, single patches",
        "accuracy, image (4 patches)",
        "nine scales fused",
        "MAP@R",
        "parameters",
    )
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for name in ROWS:
        if name not in found:
            continue
        rows = found[name]
        fused = [row["fused"]["estimate"] for row in rows if row["fused"]]
        each = f"{100 * np.mean(fused):.1f}" if fused else "–"
        shown = f"*ablation: {name}*" if name == SHUFFLED else name
        lines.append(
            f"| {shown} | {_mean(rows, 'patch')} | {_mean(rows, 'image')} | {each} | "
            f"{np.mean([row['map_at_r'] for row in rows]):.3f} | {rows[0]['parameters'] / 1e6:.2f} M |"
        )
    lines += ["", "| guided student minus | single patches, points | images, points |", "|---|---|---|"]
    guided = {row["seed"]: row for row in found.get(GUIDED, [])}
    for name in ROWS:
        other = [row for row in found.get(name, []) if row["seed"] in guided]
        if name == GUIDED or not other:
            continue
        mine = [guided[row["seed"]] for row in other]
        lines.append(f"| {name} | {_mean(mine, 'patch', other)} | {_mean(mine, 'image', other)} |")
    counts = next(iter(found.values()))[0]["images"]
    by_seed = {name: [f"{100 * np.mean(row['image']):.1f}" for row in rows] for name, rows in found.items()}
    per_seed = ", ".join(f"{name} {' / '.join(by_seed[name])}" for name in ROWS if name in found)
    lines += [
        "",
        f"Seeds {', '.join(map(str, seeds))}: another split, other labelled images and other weights each. "
        f"{counts['train']} labelled images, {counts['pool']} training images without labels (seen by the "
        "guided student through the teacher, not by the other rows), "
        f"{counts['test']} test images of other groups. "
        "In percent; 95 % bootstrap intervals over the image groups of all seeds. Image accuracy by seed: "
        f"{per_seed}.",
    ]
    return "\n".join(lines)


def _new_table(found: dict[str, list[dict[str, Any]]]) -> str:
    if not found:
        return ""
    lines = [
        f"Classes never trained on ({', '.join(NEW)}), {SHOTS} images of each as references, queries "
        "from other groups (chance 33.3):",
        "",
        "| row | P@1 by seed | mean | nearest prototype, mean |",
        "|---|---|---|---|",
    ]
    for name in (UNGUIDED, GUIDED, TEACHER):
        rows = found.get(name, [])
        if not rows:
            continue
        first = [100 * row["new_class"]["precision_at_1"]["estimate"] for row in rows]
        near = [100 * row["new_class"]["accuracy"]["estimate"] for row in rows]
        each = " / ".join(f"{x:.1f}" for x in first)
        lines.append(f"| {name} | {each} | {np.mean(first):.1f} | {np.mean(near):.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
