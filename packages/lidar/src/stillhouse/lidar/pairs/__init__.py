"""Training pairs and the ground truth of an evaluation, cut from sweeps and maps."""

from __future__ import annotations

from ._dataset import PairDataset as PairDataset
from ._maps import MapCache as MapCache
from ._maps import TiledMap as TiledMap
from ._pair import Pair as Pair
from ._pair import PairConfig as PairConfig
from ._pair import evaluation_pair as evaluation_pair
from ._pair import evaluation_truth as evaluation_truth
from ._pair import make_pair as make_pair
from ._pair import partial_points as partial_points
from ._sample import farthest_points as farthest_points
from ._sample import fill as fill
