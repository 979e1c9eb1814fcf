"""The training loop: everything of a run that does not depend on the method.

    trainer = Trainer(TrainConfig(steps=1000, ema=0.999), out=Path("runs/kd"))
    result = trainer.fit(distiller, SeededLoader(dataset, batch_size=64), OptimConfig(lr=1e-3))

One step draws `accumulate` micro-batches, asks the distiller who is updated (`roles`), and for each of these
roles computes its loss on every micro-batch, clips, steps its optimizer and schedule, and moves its average.
The same program runs alone, under `torchrun --nproc-per-node N` and under SLURM.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .callbacks import Callback, ProgressBar
from .checkpoint import Checkpoint, latest_checkpoint, load_checkpoint, save_checkpoint
from .contract import Distiller, Losses, Step, TrainConfig
from .data import Feed
from .ema import EMA
from .launch import launch
from .logs import RunLog, scalar
from .optim import OptimConfig
from .roles import (
    Call,
    Role,
    RoleModule,
    check_networks,
    evaluating,
    frozen_in_eval,
    load_optimizer,
    load_own_state,
    load_weights,
    own_state,
    warn_of_untrained,
)
from .seeding import rng_states, rng_untouched, seed_everything, set_rng_state
from .sharding import exchange_gradients, gathered

_LOG = logging.getLogger(__name__)
Evaluate = Callable[[Distiller, int], Mapping[str, float]]
_FREE = {"accelerator", "devices", "nodes", "strategy", "threads", "keep", "log_every", "checkpoint_every"}


@dataclass(slots=True)
class FitResult:
    """What a fit leaves.

    Attributes:
        step: finished steps.
        history: rows of the log, `{"step", "role", "total", "terms", "lr", …}` and `{"step", "evaluate"}`,
            those before a resume included.
        seconds: wall time of this call.
        checkpoint: the newest checkpoint, None without a folder.
    """

    step: int
    history: list[dict[str, Any]]
    seconds: float
    checkpoint: Path | None


class Trainer:
    """Runs a `Distiller`: devices, precision, accumulation, clipping, EMA, checkpoints, resume, logs.

    With `config.ema` the averaged weights are what `evaluate` sees and what the networks hold after `fit`;
    the weights under training are in the checkpoint. `evaluate` never changes the course of the training.

    Args:
        config: settings of the run.
        out: folder for `checkpoints/`, `log.jsonl` and `tensorboard/`, or None to write nothing (and never
            resume).
        callbacks: listeners, called in order.
        quiet: no progress bar; None shows one when standard error is a terminal.

    Attributes:
        config, out: as given.
        step: finished steps.
        role_updates: finished updates of each role.
        log: the `RunLog` of the present run.

    Example:
        >>> from stillhouse.core.testing import ToyDistiller, toy_data
        >>> from stillhouse.core.train import OptimConfig, SeededLoader, TrainConfig, Trainer
        >>> distiller = ToyDistiller()
        >>> data = SeededLoader(toy_data(64), batch_size=16)
        >>> result = Trainer(TrainConfig(steps=60), out=None).fit(distiller, data, OptimConfig(lr=1e-2))
        >>> result.step, result.history[-1]["total"] < result.history[0]["total"]
        (60, True)
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        out: Path | None,
        callbacks: Sequence[Callback] = (),
        quiet: bool | None = None,
    ) -> None:
        self.config = config
        self.out = None if out is None else Path(out)
        self._callbacks = list(callbacks)
        self._bar = None if (quiet if quiet is not None else not sys.stderr.isatty()) else ProgressBar()
        self.step = 0
        self.log = RunLog(None)
        self._roles: dict[str, Role] = {}
        self._active: str | None = None
        self._checkpoint: Path | None = None

    @property
    def role_updates(self) -> dict[str, int]:
        """Finished updates of each role."""
        return {name: role.updates for name, role in self._roles.items()}

    def weights(self, role: str) -> dict[str, Tensor]:
        """State dict of a role's network in full, also when it is sharded (then call it on every rank)."""
        return gathered(self._roles[role].network.state_dict())

    def fit(
        self,
        distiller: Distiller,
        data: Iterable[Any],
        optim: OptimConfig | Mapping[str, OptimConfig],
        *,
        evaluate: Evaluate | None = None,
        resume: bool | Path = True,
    ) -> FitResult:
        """Train to `config.steps`.

        Args:
            distiller: the method.
            data: a `SeededLoader` of *global* batches, or any iterable of batches that can be started over.
            optim: one configuration for all roles, or one for each.
            evaluate: `evaluate(distiller, finished_steps)` → metrics; called on every rank with the networks
                in eval mode, averaged weights and no gradient, every `evaluate_every` steps and at the end.
            resume: True goes on from the newest good checkpoint in `out`, if there is one; a path goes on
                from that checkpoint; False starts anew and refuses a folder that holds checkpoints.

        Raises:
            ConfigError: `optim` lacks a role or names another, or `resume=False` meets checkpoints.
            DataError: the checkpoint named by `resume` is broken.
            NonFiniteLossError: a loss became NaN or infinite.
        """
        started = time.perf_counter()
        check_networks(distiller.trainable(), distiller.frozen())
        updates = self._plan(distiller, optim)
        if self.config.threads is not None:
            torch.set_num_threads(self.config.threads)
        self._fabric = launch(self.config)
        device, rank, world = self._fabric.device, self._fabric.global_rank, self._fabric.world_size
        if world > 1:
            self.out = self._fabric.broadcast(self.out)
        found = self._find(resume)
        seed_everything(self.config.seed, rank)
        self._feed = Feed(data, rank, world, pin_memory=device.type == "cuda")
        with frozen_in_eval(distiller.frozen()):
            try:
                self._set_up(distiller, optim, updates)
                out = self.out if rank == 0 else None
                self.log = RunLog(out, step=found.step if found else 0, reduce=self._mean)
                if found:
                    self._restore(distiller, found)
                self._tell("on_fit_start", distiller)
                if found:
                    self._restore_rng(found)
                while self.step < self.config.steps:
                    self._one_step(distiller)
                    self._after_step(distiller, evaluate, time.perf_counter() - started)
                for role in self._roles.values():
                    if role.ema is not None:
                        role.ema.copy_to_network()
                result = FitResult(self.step, self.log.rows, time.perf_counter() - started, self._checkpoint)
                self._tell("on_fit_end", result)
                return result
            finally:
                self._activate(None)
                self.log.close()
                if self._bar is not None:
                    self._bar.close()

    # -- before the loop -------------------------------------------------------------------------------------

    def _plan(self, distiller: Distiller, optim: OptimConfig | Mapping[str, OptimConfig]) -> dict[str, int]:
        """Updates of each role in the whole run, which its schedule needs; checks the names on the way."""
        names = distiller.trainable().keys()
        if not isinstance(optim, OptimConfig) and optim.keys() != names:
            raise ConfigError(f"optim names the roles {sorted(optim)}, the distiller trains {sorted(names)}")
        updates = Counter(dict.fromkeys(names, 0))
        for step in range(self.config.steps):
            for role in distiller.roles(step):
                if role not in names:
                    raise ValueError(f"roles({step}) names {role!r}; trainable() has {sorted(names)}")
                updates[role] += 1
        return dict(updates)

    def _set_up(
        self, distiller: Distiller, optim: OptimConfig | Mapping[str, OptimConfig], updates: Mapping[str, int]
    ) -> None:
        fabric, device = self._fabric, self._fabric.device
        precision = fabric.strategy.precision
        self._roles, self._active, self.step, self._checkpoint = {}, None, 0, None
        # true half and double precision have inputs to convert; autocast takes care of its own
        true_precision = self.config.precision in ("bf16-true", "16-true", "64-true")
        self._convert = precision.convert_input if true_precision else None
        if isinstance(distiller, nn.Module):
            distiller.to(device)
        for teacher in distiller.frozen().values():
            precision.convert_module(teacher.to(device))
        networks = distiller.trainable()
        warn_of_untrained(distiller)
        for name, network in networks.items():
            module = fabric.setup_module(RoleModule(name, network.to(device).train(), distiller))
            config = optim if isinstance(optim, OptimConfig) else optim[name]
            try:
                optimizer, scheduler = config.build(network.parameters(), max(updates[name], 1))
            except ValueError as error:
                raise ValueError(f"role {name!r}: {error}") from None
            ema = None if self.config.ema is None else EMA(network, self.config.ema)
            fabric_optimizer = fabric.setup_optimizers(optimizer)
            self._roles[name] = Role(name, network, module, fabric_optimizer, scheduler, ema, [])
        for name, network in networks.items():
            own = {id(p) for p in network.parameters()}
            others = (p for other, net in networks.items() if other != name for p in net.parameters())
            ended = {id(p): p for p in others if p.requires_grad and id(p) not in own}
            # fsdp2 keeps the flag of the first forward; there, zero_grad drops what reaches the other roles
            self._roles[name].others = [] if self.config.strategy == "fsdp2" else list(ended.values())

    # -- the loop --------------------------------------------------------------------------------------------

    def _one_step(self, distiller: Distiller) -> None:
        batches = [(self._feed.next(), self._feed.epoch) for _ in range(self.config.accumulate)]
        num_items = self._count(distiller, [batch for batch, _ in batches])
        for name in distiller.roles(self.step):
            role = self._roles[name]
            self._activate(name)
            for other in self._roles.values():
                other.optimizer.zero_grad(set_to_none=True)
            values: dict[str, Tensor] = {}
            for micro, (batch, epoch) in enumerate(batches):
                step = Step(
                    index=self.step,
                    total=self.config.steps,
                    epoch=epoch,
                    role=name,
                    micro=micro,
                    accumulate=len(batches),
                    num_items=num_items,
                    device=self._fabric.device,
                    rank=self._fabric.global_rank,
                    world_size=self._fabric.world_size,
                    update=role.updates,
                )
                losses = self._micro(role, batch, step, values)
            self._update(role, values, losses)
            if hasattr(distiller, "after_update"):
                distiller.after_update(name, step)

    def _micro(self, role: Role, batch: Any, step: Step, values: dict[str, Tensor]) -> Losses:
        """Loss and backward of one micro-batch; its values are added to `values`."""
        fabric = self._fabric
        if fabric.device.type != "cpu":
            batch = fabric.to_device(batch)
        if self._convert is not None:
            batch = self._convert(batch)
        # DDP and FSDP2 average over ranks: a sum over all items has to be scaled up again
        scale = 1 / step.accumulate if step.num_items is None else float(step.world_size)
        call = Call(batch, step)
        with self._syncing(role, step):
            total = role.module(call)
            fabric.backward(total if scale == 1 else total * scale)
        losses = call.losses
        assert losses is not None  # RoleModule.forward sets it or raises
        for name, value in (*losses.terms.items(), ("total", losses.total)):
            value = scalar(name, value)
            value = value if scale == 1 else value * scale
            values[name] = values[name] + value if name in values else value
        return losses

    def _syncing(self, role: Role, step: Step) -> AbstractContextManager[Any]:
        """Ranks exchange gradients on the last micro-batch only."""
        last = step.micro + 1 == step.accumulate
        if step.accumulate > 1 and self.config.strategy == "fsdp2":
            # Fabric's context leaves it off: another role's backward would pile up what no zero_grad reaches
            exchange_gradients(role.network, last)
        elif step.accumulate > 1:
            return self._fabric.no_backward_sync(role.module, enabled=not last)
        return nullcontext()

    def _update(self, role: Role, values: dict[str, Tensor], losses: Losses) -> None:
        if self.config.clip_norm is not None:
            norm = self._fabric.clip_gradients(
                role.module, role.optimizer, max_norm=self.config.clip_norm, error_if_nonfinite=False
            )
            assert norm is not None  # max_norm was given
            values["grad_norm"] = gathered(norm)
        role.lr = role.optimizer.param_groups[0]["lr"]
        role.optimizer.step()
        role.scheduler.step()
        role.updates += 1
        if role.ema is not None:
            role.ema.update()
        self.log.add(self.step + 1, role.name, values, losses.weights, losses.task)

    def _activate(self, name: str | None) -> None:
        """Let gradients end in the parameters of one role alone; None lets them end in all again."""
        if name == self._active:
            return
        if self._active is not None:
            for parameter in self._roles[self._active].others:
                parameter.requires_grad_(True)
        if name is not None:
            for parameter in self._roles[name].others:
                parameter.requires_grad_(False)
        self._active = name

    def _count(self, distiller: Distiller, batches: Sequence[Any]) -> int | None:
        """Items that count in the whole step, over micro-batches and ranks."""
        if not hasattr(distiller, "num_items"):
            return None
        count = sum(int(distiller.num_items(batch)) for batch in batches)
        if self._fabric.world_size > 1:
            total = torch.tensor(count, device=self._fabric.device)
            torch.distributed.all_reduce(total)
            count = int(total)
        return max(count, 1)  # nothing counts: the sum is 0 whatever it is divided by

    def _mean(self, values: Tensor) -> Tensor:
        """Mean over the ranks."""
        if self._fabric.world_size > 1:
            torch.distributed.all_reduce(values)
            values /= self._fabric.world_size
        return values

    # -- after a step ----------------------------------------------------------------------------------------

    def _after_step(self, distiller: Distiller, evaluate: Evaluate | None, seconds: float) -> None:
        config = self.config
        self.step += 1
        done = self.step == config.steps
        if done or self.step % config.log_every == 0:
            self.log.flush(
                self.step,
                {name: {"lr": role.lr, "seconds": round(seconds, 3)} for name, role in self._roles.items()},
            )
        self._tell("on_step_end", self.step)
        if evaluate and (done or (config.evaluate_every and self.step % config.evaluate_every == 0)):
            with rng_untouched(self._fabric.device):
                with evaluating(self._roles):
                    metrics = evaluate(distiller, self.step)
                self.log.evaluation(self.step, metrics)
                self._tell("on_evaluate", self.step, metrics)
        if self.out and (done or (config.checkpoint_every and self.step % config.checkpoint_every == 0)):
            self.log.drain()  # weights that a NaN has reached must not become the last good checkpoint
            self._save(distiller)

    def _tell(self, hook: str, *args: Any) -> None:
        for callback in (*self._callbacks, *([self._bar] if self._bar is not None else [])):
            getattr(callback, hook)(self, *args)

    # -- checkpoints -----------------------------------------------------------------------------------------

    def _save(self, distiller: Distiller) -> None:
        fabric = self._fabric
        parts: dict[str, Any] = {
            "run": {
                "config": dataclasses.asdict(self.config),
                "precision": fabric.strategy.precision.state_dict(),
                "roles": {n: {"updates": r.updates, "lr": r.lr} for n, r in self._roles.items()},
                "schedules": {n: r.scheduler.state_dict() for n, r in self._roles.items()},
                "data": self._feed.state_dict(),
                "log": self.log.state_dict(),
            },
            "distiller": own_state(distiller),
            "rng": rng_states(fabric.device, fabric.world_size),
        }
        for name, role in self._roles.items():
            parts[f"weights.{name}"] = gathered(role.network.state_dict())
            parts[f"optimizer.{name}"] = gathered(role.optimizer.optimizer.state_dict())
            if role.ema is not None:
                parts[f"ema.{name}"] = role.ema.state_dict()
        assert self.out is not None  # the caller asked
        path = None
        if fabric.global_rank == 0:
            path = save_checkpoint(self.out / "checkpoints", self.step, parts, keep=self.config.keep)
        self._checkpoint = fabric.broadcast(path) if fabric.world_size > 1 else path
        with rng_untouched(fabric.device):
            self._tell("on_checkpoint", self._checkpoint)

    def _find(self, resume: bool | Path) -> Checkpoint | None:
        """The checkpoint to go on from; every rank reads it, rank 0 says which."""
        folder = None if self.out is None else self.out / "checkpoints"
        if not isinstance(resume, bool):
            return load_checkpoint(Path(resume))
        if folder is None:
            return None
        if not resume:
            if folder.is_dir() and any(folder.glob("step-*")):
                raise ConfigError(f"{folder}: holds an earlier run; give another folder, or let it resume")
            return None
        path = latest_checkpoint(folder) if self._fabric.global_rank == 0 else None
        if self._fabric.world_size > 1:
            path = self._fabric.broadcast(path)
        return None if path is None else load_checkpoint(path)

    def _restore(self, distiller: Distiller, found: Checkpoint) -> None:
        run, parts = found.parts["run"], found.parts
        if run["roles"].keys() != self._roles.keys():
            raise ConfigError(
                f"{found.path}: trained the roles {sorted(run['roles'])}, not {sorted(self._roles)}"
            )
        now = dataclasses.asdict(self.config)
        changed = [k for k, v in run["config"].items() if k not in _FREE and now.get(k) != v]
        if changed or len(parts["rng"]) != self._fabric.world_size:
            what = ", ".join([*changed] or ["the number of ranks"])
            _LOG.warning("resuming with another %s: the run is not the one an uninterrupted run makes", what)
        for name, role in self._roles.items():
            load_weights(role.network, parts[f"weights.{name}"])
            load_optimizer(role.optimizer.optimizer, parts[f"optimizer.{name}"])
            role.scheduler.load_state_dict(run["schedules"][name])
            role.updates, role.lr = run["roles"][name]["updates"], run["roles"][name]["lr"]
            if role.ema is not None:
                # an average switched on after the fact starts at the weights of the checkpoint
                averaged = parts.get(f"ema.{name}", dict(role.network.named_parameters()))
                role.ema.load_state_dict({k: v for k, v in averaged.items() if k in role.ema.names})
        if parts["distiller"] is not None:
            load_own_state(distiller, parts["distiller"])
        self._fabric.strategy.precision.load_state_dict(run["precision"])
        self._feed.load_state_dict(run["data"])
        self.log.load_state_dict(run["log"])
        self.step, self._checkpoint = found.step, found.path

    def _restore_rng(self, found: Checkpoint) -> None:
        states, rank = found.parts["rng"], self._fabric.global_rank
        if rank < len(states):
            set_rng_state(states[rank], self._fabric.device)
        else:  # a rank that the saved run did not have
            seed_everything((self.config.seed + found.step) % 2**32, rank)
