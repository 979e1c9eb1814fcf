"""A trained k-mer teacher as an artefact."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stillhouse.core.artifact import Artifact
from stillhouse.core.errors import DataError

from ..tokenizers import KmerTokenizer
from ._kmer_teacher import KmerTeacher
from ._kmer_transformer import KmerTransformer, KmerTransformerConfig

KIND = "genomic.teacher"


def save_teacher(
    folder: str | os.PathLike[str],
    teacher: KmerTeacher,
    *,
    config: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    card: str = "# A k-mer teacher\n",
    provenance: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes | Path] | None = None,
) -> Artifact:
    """Write a teacher's artefact, atomically: weights, sizes, and its tokenizer as Hugging Face keeps it.

    Args:
        folder: where to; an artefact that lies there is replaced.
        teacher: the teacher.
        config: the resolved configuration of the run; the teacher's own sizes are kept under "network".
        metrics: what was measured.
        card: Markdown for README.md.
        provenance: data, licences.
        files: further files, name → bytes or path.

    Returns:
        The artefact, of the kind "genomic.teacher".
    """
    network = teacher.network
    with tempfile.TemporaryDirectory() as scratch:
        teacher.tokenizer.save_pretrained(scratch)
        own = {path.name: path.read_bytes() for path in sorted(Path(scratch).iterdir())}
    return Artifact.save(
        folder,
        kind=KIND,
        tensors=network.state_dict(),
        config={
            "network": asdict(network.config),
            "name": teacher.name,
            "licence": teacher.licence,
            "run": dict(config or {}),
        },
        metrics=dict(metrics or {}),
        card=card,
        provenance=provenance,
        files={**own, **dict(files or {})},
    )


def load_teacher(source: str | os.PathLike[str] | Artifact, *, device: str = "cpu") -> KmerTeacher:
    """Read a teacher's artefact.

    Args:
        source: its folder, or the artefact.
        device: where the network goes.

    Raises:
        DataError: there is no artefact, it is of another kind, or it is damaged.
    """
    artifact = (source if isinstance(source, Artifact) else Artifact.load(source)).expect(KIND)
    tokenizer = KmerTokenizer.from_pretrained(artifact.folder)
    try:
        config = KmerTransformerConfig(**artifact.config["network"])
        network = KmerTransformer(config, tokenizer=tokenizer)
        network.load_state_dict(artifact.tensors())
        name, licence = artifact.config["name"], artifact.config["licence"]
        return KmerTeacher(network.to(device), tokenizer, licence=licence, name=str(name))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"{artifact.folder}: config.json does not describe the weights beside it ({reason}); train again"
        ) from error
