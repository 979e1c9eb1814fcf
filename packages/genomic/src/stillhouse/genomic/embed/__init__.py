"""Embeddings: of windows in memory, and of whole FASTA files to Parquet or safetensors."""

from __future__ import annotations

from ._file import Embedded as Embedded
from ._file import check_options as check_options
from ._file import embed_file as embed_file
from ._source import Piece as Piece
from ._source import tiles_of as tiles_of
from ._windows import embed_windows as embed_windows
