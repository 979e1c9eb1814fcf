"""The networks: noise net with its partial encoder, refinement net, single-pass student."""

from __future__ import annotations

from ._condition import Condition as Condition
from ._condition import PartialEncoder as PartialEncoder
from ._config import NetworkConfig as NetworkConfig
from ._memory import MemoryEstimate as MemoryEstimate
from ._memory import memory_estimate as memory_estimate
from ._noise import NoiseNet as NoiseNet
from ._noise import time_embedding as time_embedding
from ._refine import RefineNet as RefineNet
from ._single import SinglePassNet as SinglePassNet
from ._tiling import Tiling as Tiling
from ._tiling import tile_by_distance as tile_by_distance
