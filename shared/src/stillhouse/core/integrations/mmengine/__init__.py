"""Any `Distiller` under mmengine's `Runner`: model, optimizers, loop, hooks; one process or many, CPU or GPU.

`runner_for` builds a `Runner` that trains what `Trainer` trains, to the bit on a CPU, and either resumes what
the other began. The parts also work by themselves in a configuration of one's own: `as_mm_model` as its
model, `RoleParallel` as its model wrapper, `PlainStateHook` for mmengine's own checkpoints.

Importing this package raises `MissingDependencyError` where the Runner's libraries are missing.
"""

from __future__ import annotations

from ._require import require_runner

require_runner()  # before the modules below, whose classes derive from mmengine's

from .checkpoint import DistillCheckpointHook as DistillCheckpointHook  # noqa: E402
from .checkpoint import PlainStateHook as PlainStateHook  # noqa: E402
from .hooks import DistillEMAHook as DistillEMAHook  # noqa: E402
from .hooks import DistillEvaluateHook as DistillEvaluateHook  # noqa: E402
from .hooks import DistillLogHook as DistillLogHook  # noqa: E402
from .loop import DistillLoop as DistillLoop  # noqa: E402
from .loop import StepBatch as StepBatch  # noqa: E402
from .loop import StepData as StepData  # noqa: E402
from .model import DistillModel as DistillModel  # noqa: E402
from .model import RoleParallel as RoleParallel  # noqa: E402
from .model import as_mm_model as as_mm_model  # noqa: E402
from .optim import RoleOptimWrapper as RoleOptimWrapper  # noqa: E402
from .optim import optim_wrappers as optim_wrappers  # noqa: E402
from .runner import fit_result as fit_result  # noqa: E402
from .runner import runner_for as runner_for  # noqa: E402
from .runner import start_processes as start_processes  # noqa: E402
