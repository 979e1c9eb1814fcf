"""Schedules for weights, temperatures and interpolation coefficients.

A schedule is called with the optimizer step and returns a number; calling it changes nothing. The adaptive
ones learn from what they are shown through `update`, which the training step calls once per optimizer step
(never a forward pass: gradient accumulation and validation would advance them). Each has a JSON-able
`state_dict`.

    weight = Warmup(Cosine(1.0, 0.1, steps=10_000), steps=500)
    weight(0), weight(500)                # 0.0, then on the cosine
    t = TaidAdaptive(total=10_000, start=0.4)
    t.update(loss=2.31, step=0)           # after the optimizer step
"""

from __future__ import annotations

from ._adaptive import AdaptiveThreshold as AdaptiveThreshold
from ._adaptive import TaidAdaptive as TaidAdaptive
from ._per_sample import CWSM as CWSM
from ._per_sample import FLSW as FLSW
from ._per_sample import PerSampleTemperature as PerSampleTemperature
from ._scalar import Constant as Constant
from ._scalar import Cosine as Cosine
from ._scalar import Exponential as Exponential
from ._scalar import Linear as Linear
from ._scalar import Piecewise as Piecewise
from ._scalar import Schedule as Schedule
from ._scalar import Warmup as Warmup
from ._scalar import as_schedule as as_schedule
