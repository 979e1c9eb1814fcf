"""Scores of kidney-stone identification: retrieval, classification, fused views, new and unknown classes."""

from __future__ import annotations

from ._interval import share_interval as share_interval
from .evaluate import accuracy_difference as accuracy_difference
from .evaluate import calibration_scores as calibration_scores
from .evaluate import evaluate_embeddings as evaluate_embeddings
from .evaluate import prototype_correct as prototype_correct
from .evaluate import prototype_logits as prototype_logits
from .fewshot import kshot_new_class as kshot_new_class
from .fusion import FUSIONS as FUSIONS
from .fusion import Fused as Fused
from .fusion import fuse_views as fuse_views
from .novelty import unknown_detection as unknown_detection
from .retrieval import RETRIEVAL as RETRIEVAL
from .retrieval import class_prototypes as class_prototypes
from .retrieval import clustering as clustering
from .retrieval import euclidean as euclidean
from .retrieval import kmeans_labels as kmeans_labels
from .retrieval import nearest as nearest
from .retrieval import retrieval as retrieval
from .retrieval import retrieval_per_query as retrieval_per_query
from .retrieval import vote as vote
