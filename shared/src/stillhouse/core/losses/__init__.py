"""Knowledge-distillation objectives as pure functions over tensors, one family a file.

Conventions, the same everywhere: the student is the first argument and the teacher the second; the direction of a divergence
is named teacher first (`forward_kl` is KL(teacher ‖ student)); the teacher is detached inside; logits are [..., V], a mask is
bool [...] with True for what counts; values are computed and returned in float32 (float64 for float64 inputs), under
autocast too; `reduction` is "token_mean" unless said otherwise. Nothing here knows of a trainer.
"""

from __future__ import annotations

from ._reduction import Reduction as Reduction
from ._reduction import reduce as reduce
