"""The networks: noise net with its partial encoder, refinement net, single-pass student.

Parameters (a test holds the numbers):

| config | noise net | partial encoder | refinement net | single pass |
|---|---|---|---|---|
| `NetworkConfig()`, full width | 24,354,003 | 8,497,952 | 21,722,926 | – |
| `NetworkConfig.reduced()` | 2,200,711 | 1,012,896 | 1,923,978 | 2,223,598 |
| `NetworkConfig.reduced(stages=3)` | 1,504,911 | 537,120 | 1,298,090 | 1,653,806 |
| `NetworkConfig.single()` | – | – | – | 1,996,462 |

The single-pass network at its own width has 6.1 % of the teacher's (noise net and encoder).
"""

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
