"""What this package tells `stillhouse` about itself. Light: nothing of it is imported before it is used."""

from __future__ import annotations

from stillhouse.core.doctor import python_library
from stillhouse.core.domain import Domain

DOMAIN = Domain(
    name="genomic",
    title="Genomic encoders: a small student of a frozen 6-mer teacher, from FASTA to embeddings.",
    config="stillhouse.genomic.config:GenomicConfig",
    configs="stillhouse.genomic.configs",
    train="stillhouse.genomic.run:train",
    evaluate="stillhouse.genomic.run:evaluate",
    report="stillhouse.genomic.run:report",
    export="stillhouse.genomic.run:export",
    formats=("huggingface",),
    distribution="stillhouse-genomic",
    doctor=(
        python_library("flash-linear-attention>=0.3", required=False, install="stillhouse-genomic[cuda]"),
    ),
    verbs="stillhouse.genomic.verbs:add_verbs",
)
