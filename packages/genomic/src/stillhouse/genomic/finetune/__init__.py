"""Fine-tuning on labelled sequences, with the protocol and the metrics of the field's benchmarks."""

from __future__ import annotations

from ._config import FinetuneConfig as FinetuneConfig
from ._config import preset_config as preset_config
from ._fit import FinetuneResult as FinetuneResult
from ._fit import SeedResult as SeedResult
from ._fit import finetune as finetune
from ._store import LoadedClassifier as LoadedClassifier
from ._store import evaluate_classifier as evaluate_classifier
from ._store import is_classifier as is_classifier
from ._store import load_classifier as load_classifier
from ._store import save_classifier as save_classifier
from ._verb import finetune_student as finetune_student
