"""What HAD's student knows of two real genomes, against its teacher, its ablations and its peers.

    python packages/genomic/benchmarks/genomes_1pct.py --data DIR --out runs/genomes_1pct
    python packages/genomic/benchmarks/genomes_1pct.py --out runs/genomes_1pct --table --write

DIR holds celegans_1pct.fa and .gff3, athaliana_1pct.fa and .gff3 (KorfLab/datacore2024, MIT) and
corynebacterium_NCTC11397.fna.gz (RefSeq). `--seeds 0,2` and `--seeds 1` in two processes use two cores; the
first process trains the teacher, the others wait for it. A row that is in the out folder is not made again.
`--part validation` scores on the validation blocks: every setting was chosen there, and the test blocks were
read once the settings stood.

Genomes are cut into blocks once. One teacher is trained on the training blocks and shared by all seeds; a
seed is other weights, batches and masks of the student. A probe is fitted on windows of training blocks and
scored on windows of test blocks; no network has seen those. Intervals resample seeds and groups of test
windows (stretches of 10 kb) together.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stillhouse.core.config import load_config, to_dict
from stillhouse.genomic.config import GenomicConfig
from stillhouse.genomic.corpus import Corpus, probe_tasks, read_corpus
from stillhouse.genomic.fit import fit_student, fit_teacher
from stillhouse.genomic.metrics import mcc
from stillhouse.genomic.scoring import ProbeTask, probe
from stillhouse.genomic.student import preset as student_preset
from stillhouse.genomic.student.store import load_student, save_student
from stillhouse.genomic.teacher import (
    KmerTeacher,
    Teacher,
    evaluate_teacher,
    load_teacher,
    save_teacher,
)
from stillhouse.genomic.tokenizers import CharacterTokenizer

PRESET = "genomes_1pct"
TEACHER, UNTRAINED = "teacher", "teacher before training"
RANDOM, RECONSTRUCT, DISTIL = "random weights", "reconstruction alone", "alignment alone"
LOGITS, HAD, SHUFFLED = "logit KD, no masking", "HAD", "HAD, shuffled teacher"
CNN, TRANSFORMER = "HAD, CNN student", "HAD, Transformer student"
ROWS = (RANDOM, RECONSTRUCT, DISTIL, LOGITS, HAD, SHUFFLED, CNN, TRANSFORMER, UNTRAINED, TEACHER)
DISTILL: dict[str, dict[str, Any]] = {
    RANDOM: {"method": "none"},
    RECONSTRUCT: {"method": "reconstruct_only"},
    DISTIL: {"method": "distill_only"},
    LOGITS: {"method": "logit_kd"},
    SHUFFLED: {"teacher": "shuffled"},
}
KIND = {CNN: "cnn", TRANSFORMER: "transformer"}
HERE, NONE = Path(__file__).parent, "-"
FILES = {
    "fasta": ("celegans_1pct.fa", "athaliana_1pct.fa", "corynebacterium_NCTC11397.fna.gz"),
    "annotation": ("celegans_1pct.gff3", "athaliana_1pct.gff3", NONE),
}
RESAMPLES = 2000
MADE_BY = """Made by

```bash
export OMP_NUM_THREADS=1  # preset: genomes_1pct
study="python packages/genomic/benchmarks/genomes_1pct.py --out runs/genomes_1pct"
$study --data DIR --seeds 0,2 & $study --data DIR --seeds 1 & wait
$study --table --write
```"""


def main() -> None:
    """Train and probe rows, or print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--rows", nargs="+", default=ROWS, choices=ROWS, metavar="NAME")
    parser.add_argument("--part", default="test", choices=("test", "validation"))
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    if given.table:
        show(given.out, write=given.write)
        return
    if given.data is None:
        parser.error("--data is required to train")
    torch.set_num_threads(1)
    files = [
        f"data.{key}={json.dumps([name if name == NONE else str(given.data / name) for name in names])}"
        for key, names in FILES.items()
    ]
    config = load_config(
        GenomicConfig,
        PRESET,
        presets="stillhouse.genomic.configs",
        overrides=[*files, "train.checkpoint_every=500", *given.overrides],
    )
    study(config, given.out, [int(s) for s in given.seeds.split(",")], list(given.rows), given.part)


def study(config: GenomicConfig, out: Path, seeds: list[int], rows: list[str], part: str) -> None:
    """Train and probe what is not there yet; each row is written as soon as it is done."""
    out.mkdir(parents=True, exist_ok=True)
    corpus = read_corpus(config)
    tasks, left_out = probe_tasks(corpus, config.evaluate, seed=0, part=part)  # type: ignore[arg-type]
    if left_out:
        raise SystemExit(f"tasks are missing: {left_out}")
    (out / "config.json").write_text(json.dumps({"config": to_dict(config), "parts": corpus.counts()}))
    teacher = the_teacher(config, corpus, out)
    for name in (UNTRAINED, TEACHER):
        target = out / f"{_slug(name)}-{part}.json"
        if name in rows and not target.exists():
            model = teacher if name == TEACHER else teacher.untrained(0)
            _record(target, name, 0, model, tasks, {}, part)
    for seed in seeds:
        for name in rows:
            target = out / f"{_slug(name)}-{seed}-{part}.json"
            if name in (UNTRAINED, TEACHER) or target.exists():
                continue
            encoder, facts = the_student(of_row(config, name), corpus, teacher, name, seed, out)
            _record(target, name, seed, encoder, tasks, facts, part)


def the_student(
    config: GenomicConfig, corpus: Corpus, teacher: Teacher, name: str, seed: int, out: Path
) -> tuple[Any, dict[str, Any]]:
    """The student of a row: trained and kept, or read where another part was scored before."""
    folder = out / "students" / f"{_slug(name)}-{seed}"
    if (folder / "artifact.json").is_file():
        loaded = load_student(folder)
        return loaded.encoder, dict(loaded.artifact.metrics)
    begun = time.process_time()
    encoder, decoder, found = fit_student(config, corpus, teacher, seed=seed, out=None, quiet=True)
    facts = {"steps": found["steps"], "terms": found.get("terms", {})}
    facts["cpu"] = round(time.process_time() - begun, 1)
    save_student(folder, encoder, decoder, CharacterTokenizer(), training=to_dict(config), metrics=facts)
    return encoder, facts


def of_row(config: GenomicConfig, name: str) -> GenomicConfig:
    """The configuration of a row: all rows share everything but what their name says."""
    distill = replace(config.distill, **DISTILL.get(name, {}))
    if name not in KIND:
        return replace(config, distill=distill)
    model = student_preset(f"{KIND[name]}_32")
    return replace(config, distill=distill, model=replace(model, width=peer_width(config, KIND[name])))


def peer_width(config: GenomicConfig, kind: str) -> int:
    """The width that gives a peer the parameters of the Bi-GDN student, or a little fewer."""
    from stillhouse.genomic.student import build_student

    def size(model: Any) -> int:
        return sum(p.numel() for p in build_student(model).parameters())

    goal, base = size(config.model), student_preset(f"{kind}_32")
    fitting = [w for w in range(8, 129, 4) if size(replace(base, width=w)) <= goal]
    return max(fitting)


def the_teacher(config: GenomicConfig, corpus: Corpus, out: Path) -> Teacher:
    """The teacher of all seeds: read, trained, or waited for while another process trains it."""
    folder, lock = out / "teacher", out / "teacher.lock"
    if config.teacher.source is not None:
        return fit_teacher(config, corpus, seed=0, out=None, quiet=True)[0]
    while not (folder / "artifact.json").is_file():
        try:
            lock.touch(exist_ok=False)
        except FileExistsError:
            print(f"waiting for {folder}; delete {lock} if no other process trains it", flush=True)
            time.sleep(20)
            continue
        begun = time.process_time()
        teacher, facts = fit_teacher(config, corpus, seed=0, out=out / "fit-teacher", quiet=True)
        held_out = corpus.tiles("validation", config.data.length)
        windows = np.stack([_letters(corpus, place) for place in held_out])
        quality = {"validation": evaluate_teacher(teacher, windows), "cpu": time.process_time() - begun}
        print(f"teacher: {facts['steps']} steps, {quality}", flush=True)
        assert isinstance(teacher, KmerTeacher)
        save_teacher(folder, teacher, config=to_dict(config), metrics=quality)
        lock.unlink()
    return load_teacher(folder)


def _letters(corpus: Corpus, place: Any) -> np.ndarray:
    genome, _, record = place.record.partition("/")
    whole = next(g for g in corpus.genomes if g.name == genome)
    return whole.records[record][place.start : place.end]


def _record(
    target: Path,
    name: str,
    seed: int,
    model: Any,
    tasks: list[ProbeTask],
    facts: Mapping[str, Any],
    part: str,
) -> None:
    """Probe a model and write what was counted: confusion counts of every group."""
    begun = time.process_time()
    scored: dict[str, Any] = {}
    for task in tasks:
        got = probe(model, task, seed=0, resamples=100)
        classes = len(task.classes)
        assert got.groups is not None  # every task of a corpus has groups
        counts = {
            str(group): np.bincount(
                classes * got.labels[rows] + got.predictions[rows], minlength=classes**2
            ).tolist()
            for group in dict.fromkeys(got.groups.tolist())
            if (rows := got.groups == group).any()
        }
        scored[task.name] = {
            "mcc": got.mcc.estimate,
            "accuracy": got.accuracy.estimate,
            "auroc": got.auroc.estimate,
            "strength": got.strength,
            "counts": counts,
            "windows": {"fit": got.train, "score": got.test},
        }
    sizes = (
        sum(p.numel() for p in model.parameters()) if isinstance(model, torch.nn.Module) else model.parameters
    )
    row = {
        "row": name,
        "seed": seed,
        "part": part,
        "parameters": int(sizes),
        "width": int(model.width),
        **facts,
        "probe_cpu": round(time.process_time() - begun, 1),
        "tasks": scored,
    }
    work = target.with_suffix(".part")
    work.write_text(json.dumps(row) + "\n")
    work.replace(target)
    shown = ", ".join(f"{task} {found['mcc']:.3f}" for task, found in scored.items())
    print(f"seed {seed}: {name} ({row['parameters']:,}): {shown}; {facts}", flush=True)


# ---- tables


def show(out: Path, *, write: bool) -> None:
    """Print the tables, and write them where asked."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(out.glob("*-test.json")):
        row = json.loads(path.read_text())
        found.setdefault(row["row"], []).append(row)
    if not found:
        raise SystemExit(f"{out}: holds no row")
    text = f"{MADE_BY}\n\n{tables(found)}"
    print(text)
    summary = {
        name: {task: _interval(_stacked(rows, task)) for task in rows[0]["tasks"]}
        for name, rows in found.items()
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    if not write:
        return
    readme = HERE.parent / "README.md"
    page = readme.read_text(encoding="utf-8")
    head, rest = page.split("<!-- results -->", 1)
    tail = rest.split("<!-- /results -->", 1)[1] if "<!-- /results -->" in rest else rest
    readme.write_text(f"{head}<!-- results -->\n{text}\n<!-- /results -->{tail}", encoding="utf-8")


def tables(found: Mapping[str, list[dict[str, Any]]]) -> str:
    """Scores of every row, and what separates HAD from the others."""
    first = next(iter(found.values()))[0]
    tasks = list(first["tasks"])
    lines = [f"| row | parameters | {' | '.join(tasks)} |", "|---|---|" + "---|" * len(tasks)]
    for name in ROWS:
        if name not in found:
            continue
        cells = [_shown(_interval(_stacked(found[name], task))) for task in tasks]
        lines.append(f"| {name} | {found[name][0]['parameters'] / 1e3:,.0f} k | {' | '.join(cells)} |")
    if HAD in found:
        lines += ["", f"| HAD minus | {' | '.join(tasks)} |", "|---|" + "---|" * len(tasks)]
        for name in ROWS:
            if name in found and name != HAD:
                cells = [_shown(_difference(found[HAD], found[name], task), signed=True) for task in tasks]
                lines.append(f"| {name} | {' | '.join(cells)} |")
    seeds = sorted({row["seed"] for row in found.get(HAD, [first])})
    sizes = "; ".join(
        f"{task} {found_['windows']['fit']} and {found_['windows']['score']}, {len(found_['counts'])} groups"
        for task, found_ in first["tasks"].items()
    )
    lines += [
        "",
        f"Matthews correlation in hundredths (guessing: 0), seeds {', '.join(map(str, seeds))}, 95 % "
        "intervals over seeds and groups of test windows; differences are paired. Windows to fit and to "
        f"score on: {sizes}.",
    ]
    return "\n".join(lines)


def _stacked(rows: list[dict[str, Any]], task: str) -> np.ndarray:
    """Confusion counts [seeds, groups, C, C]."""
    groups = sorted(rows[0]["tasks"][task]["counts"])
    table = np.array([[row["tasks"][task]["counts"][group] for group in groups] for row in rows])
    classes = round(table.shape[-1] ** 0.5)
    return table.reshape(len(rows), len(groups), classes, classes)


def _score(counts: np.ndarray) -> float:
    """Mean over seeds of the Matthews correlation of all groups together."""
    return float(np.mean([mcc(seed.sum(0)) for seed in counts]))


def _interval(counts: np.ndarray) -> tuple[float, float, float]:
    rng = np.random.default_rng(0)
    draws = [_score(counts[np.ix_(*_resampled(rng, len(counts), counts.shape[1]))]) for _ in range(RESAMPLES)]
    return (_score(counts), *np.quantile(draws, [0.025, 0.975]).tolist())


def _difference(
    mine: list[dict[str, Any]], other: list[dict[str, Any]], task: str
) -> tuple[float, float, float]:
    """HAD minus another row: the same groups for both, seeds paired where both have them."""
    one, two = _stacked(mine, task), _stacked(other, task)
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(RESAMPLES):
        seeds, groups = _resampled(rng, len(one), one.shape[1])
        theirs = seeds if len(two) == len(one) else rng.integers(len(two), size=len(two))
        draws.append(_score(one[np.ix_(seeds, groups)]) - _score(two[np.ix_(theirs, groups)]))
    return (_score(one) - _score(two), *np.quantile(draws, [0.025, 0.975]).tolist())


def _resampled(rng: np.random.Generator, seeds: int, groups: int) -> tuple[np.ndarray, np.ndarray]:
    return rng.integers(seeds, size=seeds), rng.integers(groups, size=groups)


def _shown(found: tuple[float, float, float], *, signed: bool = False) -> str:
    sign = "+" if signed else ""
    middle, low, high = (f"{100 * value:{sign}.1f}" for value in found)
    return f"{middle} [{low}, {high}]"


def _slug(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


if __name__ == "__main__":
    main()
