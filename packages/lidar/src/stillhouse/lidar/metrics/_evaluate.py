"""`evaluate_cloud`: all metrics of one completed scan."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ._chamfer import _chamfer, areas, nearest_distances, root_mean_square
from ._check import Convention, check_convention
from ._emd import emd as earth_mover
from ._jsd import jsd
from ._occupancy import CompletionIoU


def evaluate_cloud(
    pred: np.ndarray,
    gt: np.ndarray,
    *,
    convention: Convention = "correct",
    levels: Sequence[float] = (0.5, 0.2, 0.1),
    emd: bool = False,
    iou: CompletionIoU | None = None,
) -> dict[str, float | None]:
    """Compare a completed cloud with the ground truth.

    Args:
        pred: [N, 3], metres, in the frame of the sensor.
        gt: [M, 3].
        convention: "correct" or "reference", see the single metrics.
        levels: voxel sides of the completion IoU, metres.
        emd: compute the earth mover's distance as well; slow, and None on large clouds.
        iou: accumulator to which this pair's voxels are added, for the pooled value of a set; must have the
            same levels and convention.

    Returns:
        `chamfer` (m), `precision`, `recall`, `f_score` (percent), `rmse` (m), `jsd_3d`, `jsd_bev`, `iou_0.5`
        and so on (0 to 1, of this pair alone; NaN where neither cloud has a voxel in the range), and `emd`
        (m) where it is asked for.

    Raises:
        ValueError: a cloud that cannot be used, or an accumulator of another convention.

    Example:
        >>> cloud = np.random.default_rng(0).uniform(-5, 5, (200, 3))
        >>> scores = evaluate_cloud(cloud, cloud)
        >>> scores["chamfer"], scores["jsd_3d"], scores["iou_0.1"]
        (0.0, 0.0, 1.0)
    """
    check_convention(convention)
    there, back = nearest_distances(pred, gt)
    curves = areas(there, back)
    own = CompletionIoU(levels, convention=convention)
    own.update(pred, gt)
    if iou is not None:
        iou.merge(own)
    scores: dict[str, float | None] = {
        "chamfer": _chamfer(there, back, False),
        "precision": curves.precision,
        "recall": curves.recall,
        "f_score": curves.f_score,
        "rmse": root_mean_square(there, convention),
        "jsd_3d": jsd(pred, gt, kind="3d", convention=convention),
        "jsd_bev": jsd(pred, gt, kind="bev", convention=convention),
    }
    scores |= {f"iou_{level:g}": value for level, value in own.compute().items()}
    if emd:
        scores["emd"] = earth_mover(pred, gt, convention=convention)
    return scores
