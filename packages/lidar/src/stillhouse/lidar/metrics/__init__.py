"""How near a completed cloud is to the ground truth, in two conventions.

`convention="reference"` is what the published evaluation code computes, and what printed numbers can be
compared with; `convention="correct"` is what the names say. They differ in the completion IoU, the
Jensen-Shannon term, the EMD and what is called RMSE.
"""

from __future__ import annotations

from ._chamfer import PrecisionRecall as PrecisionRecall
from ._chamfer import chamfer as chamfer
from ._chamfer import nearest_distances as nearest_distances
from ._chamfer import precision_recall as precision_recall
from ._chamfer import rmse as rmse
from ._check import Convention as Convention
from ._emd import emd as emd
from ._evaluate import evaluate_cloud as evaluate_cloud
from ._jsd import jsd as jsd
from ._occupancy import CompletionIoU as CompletionIoU
