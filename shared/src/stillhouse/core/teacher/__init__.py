"""Teachers: frozen for good, asked through one method, alone or several together.

A `TeacherSource` turns inputs or sample ids into a `TeacherSignal`: `OnlineTeacher` runs a network,
`CachedTeacher` reads what was stored before, `ServedTeacher` asks a callable, `MultiTeacher` combines
several.

    teacher = OnlineTeacher(network)                  # eval for good, no gradient
    signal = teacher.signal(images)                   # DenseSignal(logits=[N, V])
    loss = forward_kl(student(images), signal.logits, temperature=4.0)
"""

from __future__ import annotations

from ._frozen import FrozenTeacher as FrozenTeacher
from ._frozen import assert_frozen as assert_frozen
from ._frozen import freeze as freeze
from ._frozen import weight_hash as weight_hash
from ._multi import MultiTeacher as MultiTeacher
from ._multi import combine_logits as combine_logits
from ._signals import DenseSignal as DenseSignal
from ._signals import EmbeddingSignal as EmbeddingSignal
from ._signals import HiddenSignal as HiddenSignal
from ._signals import RelationSignal as RelationSignal
from ._signals import SparseTeacher as SparseTeacher
from ._signals import TeacherSignal as TeacherSignal
from ._signals import to_device as to_device
from ._sources import CachedTeacher as CachedTeacher
from ._sources import OnlineTeacher as OnlineTeacher
from ._sources import ServedTeacher as ServedTeacher
from ._sources import TeacherSource as TeacherSource
