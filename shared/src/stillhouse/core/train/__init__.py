"""The `Distiller` contract and the `Trainer` that runs one."""

from .contract import Distiller as Distiller
from .contract import Losses as Losses
from .contract import NonFiniteLossError as NonFiniteLossError
from .contract import Step as Step
from .contract import TrainConfig as TrainConfig
from .data import SeededLoader as SeededLoader
from .data import sample_seed as sample_seed
from .optim import OptimConfig as OptimConfig
