"""A fine-tuned classifier on disk: encoder, head and classes in one artefact.

```
classifier/
  model.safetensors    encoder.* and head.*
  config.json          the student's settings, head, classes, convention of the metric
  training.json        configuration of the run that made the student
  README.md            model card; terms of the student's teacher and data are carried over
  artifact.json metrics.json provenance.json SHA256SUMS
```
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from stillhouse.core.artifact import Artifact, Licence
from stillhouse.core.errors import ConfigError, DataError
from stillhouse.core.files import replacing
from stillhouse.core.run import Run, jsonable

from ..heads import Classifier, Head
from ..metrics import Metric, metric
from ..student import StudentConfig, build_student
from ..student.store import TRAINING, front_matter
from ..tokenizers import CharacterTokenizer
from ._config import FinetuneConfig

KIND = "genomic.classifier"
FOLDER = "classifier"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedClassifier:
    """A classifier read from disk, in evaluation mode.

    Attributes:
        classifier: letters uint8 [B, L] in, logits [B, C] out.
        classes: names of the C classes, in the order of the logits.
        conjoin: whether the logits of both strands were averaged when it was scored.
        scorer: the metric it was scored by.
        length: longest sequence it was trained on.
        card: text of README.md.
        artifact: the folder, with metrics, provenance and licences.
    """

    classifier: Classifier
    classes: tuple[str, ...]
    conjoin: bool
    scorer: Metric
    length: int
    card: str
    artifact: Artifact


def save_classifier(
    folder: str | os.PathLike[str],
    classifier: Classifier,
    classes: Sequence[str],
    config: FinetuneConfig,
    *,
    length: int,
    card: str = "# A classifier of DNA\n",
    licence: str = "unknown",
    licences: Sequence[Licence | Mapping[str, Any]] = (),
    training: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Artifact:
    """Write a classifier, atomically.

    Args:
        folder: where to; an artefact that lies there is replaced.
        classifier: on an encoder that `build_student` made.
        classes: names, in the order of the logits.
        config: how it was fine-tuned; pooling, strands and the convention of the metric are kept.
        length: longest sequence it was trained on.
        card: Markdown of the model card, without front matter.
        licence: of these weights, for the card's front matter; non-commercial terms among `licences` take
            its place.
        licences: terms that it inherits: of the student, and of the labelled sequences.
        training: configuration of the run that made the student.
        metrics: what was measured.
        provenance: data and student.

    Returns:
        The artefact, of the kind "genomic.classifier".

    Raises:
        ValueError: the names of the classes do not fit the head, or repeat.
        DataError: the folder holds something that is no artefact.
    """
    head = classifier.head
    count = head.linear.out_features
    if len(classes) != count or len(set(classes)) != count:
        raise ValueError(f"classes is {list(classes)}; the head has {count}, give each another name")
    entries = [asdict(one) if isinstance(one, Licence) else dict(one) for one in licences]
    binding = next((str(one["licence"]) for one in entries if one.get("commercial") is False), licence)
    terms = [
        f"**{one['name']}: {one['licence']}.** {one.get('terms', '')}".strip()
        for one in entries
        if one.get("commercial") is False
    ]
    scorer = config.scorer()
    return Artifact.save(
        folder,
        kind=KIND,
        tensors=classifier.state_dict(),
        config={
            "student": asdict(classifier.encoder.config),  # type: ignore[call-overload]
            "head": {"pool": head.pool, "compat": head.compat, "bias": head.linear.bias is not None},
            "classes": list(classes),
            "conjoin": config.conjoin,
            "metric": {"key": scorer.key, "convention": scorer.convention, "task": scorer.task},
            "length": int(length),
            "finetune": asdict(config),
        },
        metrics=dict(metrics or {}),
        card=front_matter(binding, library="stillhouse-genomic")
        + "\n\n".join([card.strip(), *terms, _USAGE]),
        provenance={**(provenance or {}), "licences": entries},
        files={TRAINING: (json.dumps(dict(training or {}), indent=1, sort_keys=True) + "\n").encode()},
    )


_USAGE = """\
## Use

```bash
stillhouse-genomic predict classifier sequences.fa --out predictions.tsv
```

```python
from stillhouse.genomic.finetune import load_classifier

loaded = load_classifier("classifier")
logits = loaded.classifier.conjoined(windows)  # letters, uint8 [B, L]; without both strands: classifier(…)
```
"""


def load_classifier(source: str | os.PathLike[str] | Artifact, *, device: str = "cpu") -> LoadedClassifier:
    """Read a classifier's folder.

    Args:
        source: its folder, the folder of the fine-tuning that holds it as `classifier`, or the artefact.
        device: where the network goes.

    Returns:
        See `LoadedClassifier`.

    Raises:
        DataError: there is no artefact, it is of another kind, a file is missing, added or changed.
    """
    artifact = source if isinstance(source, Artifact) else Artifact.load(find_classifier(Path(source)))
    artifact.expect(KIND)
    given = artifact.config
    try:
        classes = tuple(map(str, given["classes"]))
        encoder = build_student(StudentConfig(**given["student"]))
        head = Head(encoder.width, len(classes), **given["head"])
        classifier = Classifier(encoder, head, CharacterTokenizer())
        classifier.load_state_dict(dict[str, Tensor](artifact.tensors()))
        scorer = metric(given["metric"]["key"], given["metric"]["convention"], given["metric"]["task"])
        conjoin, length = bool(given["conjoin"]), int(given["length"])
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{artifact.folder / 'config.json'}: does not describe the weights beside it ({reason}); "
            "fine-tune again"
        ) from error
    return LoadedClassifier(
        classifier=classifier.to(device).eval(),
        classes=classes,
        conjoin=conjoin,
        scorer=scorer,
        length=length,
        card=artifact.card,
        artifact=artifact,
    )


def evaluate_classifier(artifact: Path, data: Path | None, run: Run, *, batch: int = 64) -> dict[str, Any]:
    """Score a classifier on labelled sequences, as it was scored when it was made.

    Args:
        artifact: its folder.
        data: a table or FASTA of labelled sequences; of a table with a column `split` the rows `test`.
        run: where `evaluation.json` goes, and the device.
        batch: sequences at a time.

    Returns:
        `metric`, its label; `sequences`; `scores`, metric → estimate and interval over groups; and the
        estimates as flat entries.

    Raises:
        ConfigError: no data.
        DataError: classifier or data cannot be used, or there is a label that the classifier does not know.
    """
    from ..data import read_labelled
    from ..metrics import score
    from ._fit import groups_of, probabilities_of
    from ._verb import own_columns

    if data is None:
        raise ConfigError(f"--data: {artifact} is a classifier; name the labelled sequences to score it on")
    loaded = load_classifier(artifact, device=str(run.torch_device()))
    items = read_labelled(data, classes=loaded.classes, **own_columns(data))
    if items.split is not None and "test" in items.split:
        items = items.part("test")
    if len(items) < 2:
        raise DataError(f"{data}: {len(items)} sequence to score on; it takes at least 2")
    found = score(
        items.labels,
        probabilities_of(loaded.classifier, items, conjoin=loaded.conjoin, batch=batch),
        keys=tuple(dict.fromkeys(("accuracy", "mcc", "auroc", loaded.scorer.key))),
        groups=groups_of(items),
        resamples=500,
        seed=run.seed,
    )
    scores = {key: {"estimate": v.estimate, "low": v.low, "high": v.high} for key, v in found.items()}
    result = {"metric": loaded.scorer.label, "sequences": len(items), "scores": scores}
    with replacing(run.path("evaluation.json")) as work:
        work.write_text(json.dumps(jsonable(result), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return {**result, **{key: value["estimate"] for key, value in scores.items()}}


def find_classifier(folder: Path) -> Path:
    """The folder itself, or `classifier` in it where it is that of a fine-tuning."""
    inside = folder / FOLDER
    whole = (folder / "artifact.json").is_file() or not (inside / "artifact.json").is_file()
    return folder if whole else inside


def is_classifier(folder: Path) -> bool:
    """Whether a folder holds a classifier, as far as its manifest says; nothing is verified."""
    try:
        manifest = json.loads((find_classifier(folder) / "artifact.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and manifest.get("kind") == KIND
