"""Metrics that say how sure they are: bootstrap intervals, calibration, distances of distributions."""

from __future__ import annotations

from .bootstrap import Interval as Interval
from .bootstrap import bootstrap_interval as bootstrap_interval
from .bootstrap import proportion_interval as proportion_interval
from .bootstrap import seed_interval as seed_interval
from .calibration import ReliabilityCurve as ReliabilityCurve
from .calibration import brier_score as brier_score
from .calibration import expected_calibration_error as expected_calibration_error
from .calibration import fit_temperature as fit_temperature
from .calibration import negative_log_likelihood as negative_log_likelihood
from .calibration import reliability_curve as reliability_curve
from .distribution import ModeCoverage as ModeCoverage
from .distribution import PrecisionRecall as PrecisionRecall
from .distribution import frechet_distance as frechet_distance
from .distribution import knn_precision_recall as knn_precision_recall
from .distribution import mmd2 as mmd2
from .distribution import mode_coverage as mode_coverage
from .distribution import sliced_wasserstein as sliced_wasserstein
