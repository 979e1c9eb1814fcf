"""Reading what happens inside a network, and bringing student and teacher layers together.

    with FeatureTap(student, {"mid": "layer2", "head_in": "fc:in"}) as tap:
        logits = student(images)
        features = tap.pop()                    # {"mid": [N, C, H, W], "head_in": [N, D]}

`LayerMap` says which student layer learns from which teacher layer, `Projector` makes their widths agree.
"""

from __future__ import annotations

from ._layers import LayerMap as LayerMap
from ._layers import similarity_matrix as similarity_matrix
from ._projector import Projector as Projector
from ._qkv import QKV as QKV
from ._qkv import QKVTap as QKVTap
from ._qkv import tap_qkv as tap_qkv
from ._tap import FeatureTap as FeatureTap
from ._tap import find_module as find_module
