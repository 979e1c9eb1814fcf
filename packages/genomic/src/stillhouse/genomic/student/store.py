"""A finished student on disk: an artefact that is a Hugging Face model folder as well.

```
student/
  config.json          what AutoConfig reads; the settings of both parts under "student" and "decoder"
  model.safetensors    all weights
  tokenizer.json …     the character tokenizer
  training.json        configuration of the run that made it
  README.md            model card with front matter
  artifact.json metrics.json provenance.json SHA256SUMS
```

`load_student` verifies every checksum. `transformers.AutoModel.from_pretrained(folder)` reads the folder too,
after `import stillhouse.genomic.huggingface` and without `trust_remote_code`. This module itself imports
transformers only where it writes the tokenizer's files.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from stillhouse.core.artifact import Artifact, Licence
from stillhouse.core.errors import DataError

from ..tokenizers import CharacterTokenizer
from ._config import StudentConfig
from .decoder import MaskedDecoder
from .encoder import Encoder, build_student
from .rc import RcEquivariant

KIND = "genomic.student"
MODEL_TYPE = "stillhouse-genomic-student"
TRAINING = "training.json"
BASE, MASKED = "StudentModel", "StudentForMaskedLM"
PREFIX = "student."  # of the encoder's weights where a decoder lies beside them


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A student read from disk, in evaluation mode.

    Attributes:
        encoder: the network.
        decoder: what reconstructs masked letters, or None where none was saved.
        tokenizer: of its letters.
        config: the encoder's settings.
        card: text of README.md.
        training: configuration of the run that made it.
        artifact: the folder, with metrics, provenance and licences.
    """

    encoder: Encoder | RcEquivariant
    decoder: MaskedDecoder | None
    tokenizer: CharacterTokenizer
    config: StudentConfig
    card: str
    training: dict[str, Any]
    artifact: Artifact


def save_student(
    folder: str | os.PathLike[str],
    encoder: Encoder | RcEquivariant,
    decoder: MaskedDecoder | None,
    tokenizer: CharacterTokenizer,
    *,
    card: str = "# A student of DNA\n",
    licence: str = "unknown",
    licences: Sequence[Licence] = (),
    training: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes | Path] | None = None,
) -> Artifact:
    """Write a student, atomically.

    Args:
        folder: where to; an artefact that lies there is replaced.
        encoder: what `build_student` made.
        decoder: its decoder, or None; without one there is no masked language model in the folder.
        tokenizer: of its letters.
        card: Markdown of the model card, without front matter.
        licence: of these weights, for the card's front matter. Non-commercial terms among `licences` take its
            place, since the student inherits them.
        licences: terms of the teacher and of the data.
        training: configuration of the run.
        metrics: what was measured.
        provenance: data and teacher; its "licences" are joined with `licences`.
        files: further files, name → bytes or path.

    Returns:
        The artefact, of the kind "genomic.student".

    Raises:
        ValueError: the decoder is of another width, or the card brings front matter of its own.
        DataError: the folder holds something that is no artefact.
    """
    if decoder is not None and decoder.options["width"] != encoder.width:
        raise ValueError(
            f"decoder reads {decoder.options['width']} channels and the encoder makes {encoder.width}; "
            "they are not of one training"
        )
    if card.lstrip().startswith("---"):
        raise ValueError("card begins with front matter; it is written here, give the text alone")
    facts = dict(provenance or {})
    entries = [*facts.get("licences", ()), *(asdict(entry) for entry in licences)]
    if entries:
        facts["licences"] = entries
    binding = next((str(entry["licence"]) for entry in entries if entry.get("commercial") is False), licence)
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        own = {path.name: path.read_bytes() for path in sorted(Path(scratch).iterdir())}
    own[TRAINING] = (json.dumps(dict(training or {}), indent=1, sort_keys=True) + "\n").encode()
    return Artifact.save(
        folder,
        kind=KIND,
        tensors=weights(encoder, decoder),
        config=describe(encoder, decoder, tokenizer),
        metrics=dict(metrics or {}),
        card=front_matter(binding) + card.strip() + "\n\n" + _usage(masked=decoder is not None),
        provenance=facts,
        files={**own, **dict(files or {})},
    )


def load_student(source: str | os.PathLike[str] | Artifact, *, device: str = "cpu") -> Loaded:
    """Read a student's folder.

    Args:
        source: its folder, a run's folder that holds it as `student`, or the artefact.
        device: where the networks go.

    Returns:
        See `Loaded`.

    Raises:
        DataError: there is no artefact, it is of another kind, a file is missing, added or changed.
    """
    artifact = (source if isinstance(source, Artifact) else Artifact.load(_find(Path(source)))).expect(KIND)
    path = artifact.folder / "config.json"
    try:
        given = artifact.config["decoder"]
        config = StudentConfig(**artifact.config["student"])
        encoder, decoder = build_student(config), None if given is None else MaskedDecoder(**given)
        tensors = artifact.tensors()
        if set(tensors) != set(weights(encoder, decoder)):
            raise ValueError("it names other weights")
        prefix = "encoder." if decoder is None else PREFIX + "encoder."
        encoder.load_state_dict(_below(tensors, prefix))
        if decoder is not None:
            decoder.load_state_dict(_below(tensors, "decoder."))
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path}: does not describe the weights beside it ({reason}); train again") from error
    try:
        training = json.loads(artifact.file(TRAINING).read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(
            f"{artifact.folder / TRAINING}: is no JSON ({error}); save the student again"
        ) from error
    return Loaded(
        encoder=encoder.to(device).eval(),
        decoder=None if decoder is None else decoder.to(device).eval(),
        tokenizer=CharacterTokenizer.from_pretrained(artifact.folder),
        config=config,
        card=artifact.card,
        training=training,
        artifact=artifact,
    )


def weights(encoder: Encoder | RcEquivariant, decoder: MaskedDecoder | None) -> dict[str, Tensor]:
    """Name → tensor, as the classes of `stillhouse.genomic.huggingface` name them."""
    prefix = "encoder." if decoder is None else PREFIX + "encoder."
    named = {prefix + name: tensor for name, tensor in encoder.state_dict().items()}
    if decoder is not None:
        named.update({"decoder." + name: tensor for name, tensor in decoder.state_dict().items()})
    return named


def describe(
    encoder: Encoder | RcEquivariant, decoder: MaskedDecoder | None, tokenizer: CharacterTokenizer
) -> dict[str, Any]:
    """What config.json holds."""
    return {
        "architectures": [BASE if decoder is None else MASKED],
        "model_type": MODEL_TYPE,
        "dtype": str(next(encoder.parameters()).dtype).removeprefix("torch."),
        "student": asdict(encoder.config),
        "decoder": None if decoder is None else dict(decoder.options),
        "mask_token_id": tokenizer.mask_id,
        "pad_token_id": tokenizer.pad_id,
    }


def front_matter(licence: str, *, library: str = "transformers") -> str:
    """YAML that opens a model card: licence, library, tags.

    Args:
        licence: SPDX identifier or name; written in lower case, as the hub's identifiers are.
        library: what reads the model.

    Example:
        >>> print(front_matter("CC-BY-NC-SA-4.0").splitlines()[1])
        license: cc-by-nc-sa-4.0
    """
    name = licence.strip().lower()
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", name):  # a name in words is not an identifier
        name = "other\nlicense_name: " + json.dumps(licence.strip(), ensure_ascii=False)
    tags = "".join(f"- {tag}\n" for tag in ("genomics", "dna", "knowledge-distillation"))
    return f"---\nlicense: {name}\nlibrary_name: {library}\ntags:\n{tags}---\n\n"


def licence_of(loaded: Loaded) -> str:
    """The licence that a student's card states; "unknown" where it states none."""
    from ..teacher import find_licence

    return find_licence(loaded.card, {}, ()) or "unknown"


def _usage(*, masked: bool) -> str:
    lines = [
        "## Use",
        "",
        "```python",
        "import stillhouse.genomic.huggingface  # registers the classes; no remote code",
        "from transformers import AutoModel, AutoTokenizer",
        "",
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        "model = AutoModel.from_pretrained(folder)",
        'batch = tokenizer(["ACGT"], return_tensors="pt", padding=True, add_special_tokens=False)',
        'features = model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state',
        "```",
        "",
        "Special tokens other than `[MASK]` were not seen in training: leave them out.",
    ]
    if masked:
        lines.append("`AutoModelForMaskedLM` gives the letters at `[MASK]`.")
    return "\n".join(lines) + "\n"


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _find(folder: Path) -> Path:
    inside = folder / "student"
    return (
        inside
        if not (folder / "artifact.json").is_file() and (inside / "artifact.json").is_file()
        else folder
    )
