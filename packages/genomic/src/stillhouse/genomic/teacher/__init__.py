"""Frozen teachers over k-mers: one that is trained here, and masked language models of Hugging Face.

    tokens = KmerTokenizer().encode(windows)                        # uint8 [B, L]
    teacher = load_teacher("runs/genomic/teacher")                  # or HuggingFaceTeacher.from_pretrained(…)
    last, middle = teacher.features(tokens, visible=seen, layers=(-1, 2))
    log_probs = teacher.nucleotide_log_probs(tokens)                # [B, L, 4], A C G T

`RandomTeacher` and `ShuffledTeacher` are the controls of an ablation; `cached_features` keeps what a teacher
says about a fixed set of windows on disk. transformers is imported by `HuggingFaceTeacher.from_pretrained`
only.
"""

from __future__ import annotations

from ._ablation import RandomTeacher as RandomTeacher
from ._ablation import ShuffledTeacher as ShuffledTeacher
from ._cached import CachedTeacher as CachedTeacher
from ._cached import cached_features as cached_features
from ._evaluate import evaluate_teacher as evaluate_teacher
from ._huggingface import HuggingFaceTeacher as HuggingFaceTeacher
from ._kmer_teacher import KmerTeacher as KmerTeacher
from ._kmer_transformer import KmerTransformer as KmerTransformer
from ._kmer_transformer import KmerTransformerConfig as KmerTransformerConfig
from ._licence import NTV2_LICENCE as NTV2_LICENCE
from ._licence import find_licence as find_licence
from ._licence import licence_terms as licence_terms
from ._marginal import nucleotide_marginals as nucleotide_marginals
from ._masked_language import Corrupted as Corrupted
from ._masked_language import MaskedLanguageDistiller as MaskedLanguageDistiller
from ._masked_language import corrupt as corrupt
from ._protocol import Teacher as Teacher
from ._store import load_teacher as load_teacher
from ._store import save_teacher as save_teacher
