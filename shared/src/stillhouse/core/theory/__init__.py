"""Distillation that can be solved exactly: a self-test of one's understanding, and of this installation.

`krr` iterates self-distillation in kernel ridge regression, `operators` iterates it on probability
distributions. ``python -m stillhouse.core.theory`` prints the known values beside the computed ones.
"""

from __future__ import annotations

from .krr import MOBAHI_X as MOBAHI_X
from .krr import MOBAHI_Y as MOBAHI_Y
from .krr import SelfDistillation as SelfDistillation
from .krr import rbf_kernel as rbf_kernel
from .operators import DistillationOperator as DistillationOperator
from .operators import GeometricAnchoring as GeometricAnchoring
from .operators import LinearAnchoring as LinearAnchoring
from .operators import Temperature as Temperature
from .operators import combine_anchors as combine_anchors
from .operators import iterate as iterate
from .operators import kl_divergence as kl_divergence
from .operators import resample as resample
