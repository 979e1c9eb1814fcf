"""Checkpoints of a Runner that hold no pickled objects.

mmengine 0.10 stores objects of its own and NumPy arrays in its checkpoints and reads them with `torch.load`,
whose default since torch 2.6 refuses both: a run cannot be resumed. `DistillCheckpointHook` writes the
folders of `stillhouse.core.train` instead, whole or not there, which `Trainer` reads too. `PlainStateHook`
mends mmengine's own checkpoints, of any model.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer, print_log
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor

from ...errors import ConfigError
from ...train.checkpoint import Checkpoint, latest_checkpoint, load_checkpoint, save_checkpoint
from ...train.contract import TrainConfig
from ...train.roles import load_optimizer, load_own_state, load_weights, own_state
from ...train.seeding import rng_states, seed_everything, set_rng_state
from .hooks import RESUMED, DistillEMAHook, DistillLogHook, due, hook_of
from .model import DistillModel, unwrapped

_LOG = logging.getLogger(__name__)
# settings that do not change the course of a run
_FREE = {"accelerator", "devices", "nodes", "strategy", "threads", "keep", "log_every", "checkpoint_every"}


@HOOKS.register_module()
class DistillCheckpointHook(Hook):
    """Writes and resumes the checkpoints of `Trainer`: safetensors and JSON, with a digest of every file.

    Weights, optimizers, schedules, averages, counters, log, position in the data and the generators of every
    library are in it, so that a resumed run is the uninterrupted one. Teachers are not.

    Args:
        config: settings of the run; `checkpoint_every`, `keep` and `seed` are used, the rest is compared.
        out: folder of the run, the Runner's `work_dir` where None; checkpoints are in its `checkpoints/`.
        resume: True goes on from the newest good checkpoint, if there is one; a path from that one; False
            starts anew and refuses a folder that holds checkpoints.

    Attributes:
        newest: the newest checkpoint.
    """

    priority = "VERY_LOW"

    def __init__(
        self, config: TrainConfig, out: str | Path | None = None, *, resume: bool | str | Path = True
    ) -> None:
        self.config, self.out, self.resume = config, out, resume
        self.newest: Path | None = None
        self._found: Checkpoint | None = None

    def before_run(self, runner: Runner) -> None:
        """Look for the checkpoint to go on from.

        Raises:
            ConfigError: `resume` is False and the folder holds checkpoints.
            DataError: the checkpoint that `resume` names is broken.
        """
        self._found = self._find(runner)
        if self._found is not None:
            runner.message_hub.update_info(RESUMED, self._found.step, resumed=False)

    def before_train(self, runner: Runner) -> None:
        """Restore the run."""
        if self._found is not None:
            self._restore(runner, self._found)
            self._found = None

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Write a checkpoint where it is due."""
        if due(runner, self.config.checkpoint_every):
            log = hook_of(runner, DistillLogHook)
            if log is not None:
                log.log.drain()  # weights that a NaN has reached must not become the last good checkpoint
            self._save(runner)

    def _folder(self, runner: Runner) -> Path:
        return Path(self.out or runner.work_dir) / "checkpoints"

    def _find(self, runner: Runner) -> Checkpoint | None:
        folder = self._folder(runner)
        if not isinstance(self.resume, bool):
            return load_checkpoint(Path(self.resume))
        if not self.resume:
            if folder.is_dir() and any(folder.glob("step-*")):
                raise ConfigError(f"{folder}: holds an earlier run; give another folder, or let it resume")
            return None
        path = _from_first_rank(latest_checkpoint(folder) if runner.rank == 0 else None, runner.world_size)
        return None if path is None else load_checkpoint(path)

    def _save(self, runner: Runner) -> None:
        model, wrappers = unwrapped(runner.model), _wrappers(runner)
        log, ema = hook_of(runner, DistillLogHook), hook_of(runner, DistillEMAHook)
        lr = dict.fromkeys(model.updates, 0.0) if log is None else log.lr
        device = next(model.parameters()).device
        parts: dict[str, Any] = {
            "run": {
                "config": dataclasses.asdict(self.config),
                "precision": {},
                "roles": {n: {"updates": count, "lr": lr[n]} for n, count in model.updates.items()},
                "schedules": {n: wrapper.scheduler.state_dict() for n, wrapper in wrappers.items()},
                "data": runner.train_loop.dataloader.state_dict(),
                "log": {"sums": {}, "watches": {}, "warned": []} if log is None else log.state_dict(),
            },
            "distiller": own_state(model.distiller),
            "rng": rng_states(device, runner.world_size),
        }
        for name, network in model.networks.items():
            parts[f"weights.{name}"] = network.state_dict()
            parts[f"optimizer.{name}"] = wrappers[name].optimizer.state_dict()
            if ema is not None:
                parts[f"ema.{name}"] = ema.averages[name].state_dict()
        path = None
        if runner.rank == 0:
            path = save_checkpoint(self._folder(runner), runner.iter + 1, parts, keep=self.config.keep)
        self.newest = _from_first_rank(path, runner.world_size)

    def _restore(self, runner: Runner, found: Checkpoint) -> None:
        model, wrappers = unwrapped(runner.model), _wrappers(runner)
        run, parts = found.parts["run"], found.parts
        if run["roles"].keys() != model.updates.keys():
            raise ConfigError(
                f"{found.path}: trained the roles {sorted(run['roles'])}, not {sorted(model.updates)}"
            )
        self._tell_changes(run["config"], len(parts["rng"]), runner.world_size)
        for name, network in model.networks.items():
            load_weights(network, parts[f"weights.{name}"])
            load_optimizer(wrappers[name].optimizer, parts[f"optimizer.{name}"])
            wrappers[name].scheduler.load_state_dict(run["schedules"][name])
            model.updates[name] = run["roles"][name]["updates"]
        ema = hook_of(runner, DistillEMAHook)
        if ema is not None:
            for name, average in ema.averages.items():
                # an average switched on after the fact starts at the weights of the checkpoint
                averaged = parts.get(f"ema.{name}", dict(model.networks[name].named_parameters()))
                average.load_state_dict({k: v for k, v in averaged.items() if k in average.names})
        log = hook_of(runner, DistillLogHook)
        if log is not None:
            log.restore(run["log"], {name: role["lr"] for name, role in run["roles"].items()})
        if parts["distiller"] is not None:
            load_own_state(model.distiller, parts["distiller"])
        runner.train_loop.dataloader.load_state_dict(run["data"])
        model.index = runner.train_loop._iter = found.step
        self.newest = found.path
        device = next(model.parameters()).device
        if runner.rank < len(parts["rng"]):
            set_rng_state(parts["rng"][runner.rank], device)
        else:  # a rank that the saved run did not have
            seed_everything((self.config.seed + found.step) % 2**32, runner.rank)

    def _tell_changes(self, saved: dict[str, Any], ranks: int, world_size: int) -> None:
        now = dataclasses.asdict(self.config)
        changed = [key for key, value in saved.items() if key not in _FREE and now.get(key) != value]
        if changed or ranks != world_size:
            what = ", ".join(changed or ["the number of ranks"])
            _LOG.warning("resuming with another %s: the run is not the one an uninterrupted run makes", what)


@HOOKS.register_module()
class PlainStateHook(Hook):
    """Makes mmengine's own checkpoints readable with `weights_only=True`: resumable under torch ≥ 2.6.

    Histories of the message hub become lists when a checkpoint is written and histories again when it is
    read; what else is no tensor, number, string, list or dict in the message hub or the meta data is left
    out, with a warning. With a `DistillModel` the distiller's own state is stored as well. Works with any
    model and mmengine's `CheckpointHook`.
    """

    priority = "VERY_LOW"

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Turn a checkpoint into plain values."""
        hub = dict(checkpoint["message_hub"])
        hub["log_scalars"] = {
            key: {"log": value.data[0].tolist(), "count": value.data[1].tolist()}
            for key, value in hub["log_scalars"].items()
        }
        checkpoint["message_hub"] = _plain(hub, "message_hub")
        checkpoint["meta"] = _plain(checkpoint["meta"], "meta")
        model = runner.model.module if hasattr(runner.model, "module") else runner.model
        if isinstance(model, DistillModel):
            checkpoint["distiller"] = own_state(model.distiller)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Turn the plain values into what mmengine expects."""
        hub = checkpoint.get("message_hub")
        if isinstance(hub, dict):
            hub["log_scalars"] = {
                key: HistoryBuffer(value["log"], value["count"]) if isinstance(value, dict) else value
                for key, value in hub["log_scalars"].items()
            }
        model = runner.model.module if hasattr(runner.model, "module") else runner.model
        if isinstance(model, DistillModel) and checkpoint.get("distiller") is not None:
            load_own_state(model.distiller, checkpoint["distiller"])


_ODD = object()


def _plain(value: Any, where: str) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str | Tensor):
        return value
    if isinstance(value, list | tuple):
        items = [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
        kept = [item for item in items if item is not _ODD]
        return tuple(kept) if isinstance(value, tuple) else kept
    if isinstance(value, dict):
        items_of = {str(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
        return {key: item for key, item in items_of.items() if item is not _ODD}
    print_log(
        f"{where} is a {type(value).__name__}, which a checkpoint without pickled objects cannot hold: "
        "left out",
        logger="current",
        level=logging.WARNING,
    )
    return _ODD


def _wrappers(runner: Runner) -> Any:
    """The runner's `RoleOptimWrapper`s by role."""
    wrappers = getattr(runner.optim_wrapper, "optim_wrappers", {})
    lost = [name for name in unwrapped(runner.model).updates if not hasattr(wrappers.get(name), "scheduler")]
    if lost or not wrappers:
        raise ValueError(
            f"the optimizers of {lost} are no RoleOptimWrappers, whose schedules this checkpoint holds; make "
            "them with optim_wrappers(…), or use mmengine's CheckpointHook with PlainStateHook"
        )
    return wrappers


def _from_first_rank(path: Path | None, world_size: int) -> Path | None:
    if world_size == 1:
        return path
    found: list[Any] = [None if path is None else str(path)]
    torch.distributed.broadcast_object_list(found, src=0)
    return None if found[0] is None else Path(found[0])
