"""The `Distiller` contract, and the `Trainer` that runs one on one device or many, and resumes exactly."""

from __future__ import annotations

from .callbacks import Callback as Callback
from .callbacks import ProgressBar as ProgressBar
from .checkpoint import Checkpoint as Checkpoint
from .checkpoint import latest_checkpoint as latest_checkpoint
from .checkpoint import load_checkpoint as load_checkpoint
from .checkpoint import save_checkpoint as save_checkpoint
from .contract import Distiller as Distiller
from .contract import Losses as Losses
from .contract import NonFiniteLossError as NonFiniteLossError
from .contract import Step as Step
from .contract import TrainConfig as TrainConfig
from .data import SeededLoader as SeededLoader
from .data import sample_seed as sample_seed
from .ema import EMA as EMA
from .logs import RunLog as RunLog
from .optim import OptimConfig as OptimConfig
from .seeding import rng_state as rng_state
from .seeding import seed_everything as seed_everything
from .seeding import set_rng_state as set_rng_state
from .trainer import FitResult as FitResult
from .trainer import Trainer as Trainer
