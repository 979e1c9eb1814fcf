"""Students: bidirectional Gated DeltaNet with one attention layer, a dilated CNN, a Transformer.

    student = build_student(preset("gdn_1m"))
    features = student(ids)                                  # ids int64 [B, L] → [B, L, d]
    features = student(ids, attend=ids != pad_id)            # padding neither reads nor writes anything

`MaskedDecoder` reconstructs masked letters in training; `RcEquivariant` shares weights between the strands;
`conjoin` averages a prediction over them. The recurrence itself is in `ops`.
"""

from __future__ import annotations

from ._config import StudentConfig as StudentConfig
from ._config import preset as preset
from .decoder import MaskedDecoder as MaskedDecoder
from .encoder import Encoder as Encoder
from .encoder import build_student as build_student
from .gdn import BiGatedDeltaNet as BiGatedDeltaNet
from .gdn import GatedDeltaNet as GatedDeltaNet
from .ops import gated_delta_chunked as gated_delta_chunked
from .ops import gated_delta_recurrent as gated_delta_recurrent
from .rc import RcEquivariant as RcEquivariant
from .rc import RcHead as RcHead
from .rc import conjoin as conjoin
