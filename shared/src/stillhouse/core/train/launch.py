"""From a `TrainConfig` to a Fabric that is launched: devices, processes, precision, DDP or FSDP2."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import ConfigError
from .contract import TrainConfig

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def launch(config: TrainConfig) -> Fabric:
    """Make the Fabric of a run and start its processes.

    The same program runs alone, under `torchrun` and under SLURM: where a launcher made the processes, its
    numbers of devices and nodes are taken; otherwise Fabric starts `config.devices` processes of the same
    command.

    Raises:
        ConfigError: "16-mixed" without a GPU.
    """
    from lightning_fabric import Fabric

    gpu = config.accelerator not in ("cpu", "auto") or (config.accelerator == "auto" and _gpu())
    if config.precision in ("16-mixed", "16-true") and not gpu:
        raise ConfigError(
            f'train.precision is "{config.precision}", which needs a GPU; use "bf16-mixed" on a CPU'
        )
    devices, nodes = _processes(config)
    fabric = Fabric(
        accelerator=config.accelerator,
        devices=devices,
        num_nodes=nodes,
        strategy=_strategy(config, devices, nodes),
        precision=config.precision,
    )
    fabric.launch()
    return fabric


def _gpu() -> bool:
    return torch.cuda.is_available() or torch.backends.mps.is_available()


def _processes(config: TrainConfig) -> tuple[int | str, int]:
    """Devices of a node and nodes, from the launcher where there is one."""
    from lightning_fabric.plugins.environments import SLURMEnvironment

    if torch.distributed.is_available() and torch.distributed.is_torchelastic_launched():
        here = int(os.environ["LOCAL_WORLD_SIZE"])
        return here, int(os.environ["WORLD_SIZE"]) // here
    if SLURMEnvironment.detect():
        nodes = int(os.environ.get("SLURM_NNODES", "1"))
        return int(os.environ["SLURM_NTASKS"]) // nodes, nodes
    return config.devices, config.nodes


def _strategy(config: TrainConfig, devices: int | str, nodes: int) -> Any:
    from lightning_fabric.strategies import DDPStrategy, ModelParallelStrategy

    if config.strategy == "fsdp2":
        return ModelParallelStrategy(parallelize_fn=_shard)
    many = nodes > 1 or (torch.cuda.device_count() > 1 if devices == "auto" else int(devices) > 1)
    if config.strategy == "ddp" or (many and config.find_unused):
        return DDPStrategy(find_unused_parameters=config.find_unused)
    return "auto"


def _shard(module: nn.Module, mesh: Any) -> nn.Module:
    """Shard a role's network in place over all ranks, after giving every rank the weights of rank 0.

    Units of sharding are the entries of every `nn.ModuleList` (a transformer's blocks) and what remains as a
    whole.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    everyone = init_device_mesh(mesh.device_type, (torch.distributed.get_world_size(),))
    for tensor in (*module.parameters(), *module.buffers()):
        torch.distributed.broadcast(tensor.detach(), 0)
    units: list[nn.Module] = []
    for child in reversed(list(module.modules())):  # inner lists before outer ones
        if isinstance(child, nn.ModuleList):
            units += [entry for entry in child if not _is_container(entry)]
    for network in module.children():
        units += _roots(network)
    for unit in dict.fromkeys(units):
        if any(True for _ in unit.parameters()):
            fully_shard(unit, mesh=everyone)
    return module


def _is_container(module: nn.Module) -> bool:
    return type(module).forward is nn.Module.forward


def _roots(network: nn.Module) -> list[nn.Module]:
    """The network itself, or the members of a container that has no forward (`nn.ModuleDict`)."""
    if not _is_container(network):
        return [network]
    if next(network.parameters(recurse=False), None) is not None:
        raise ValueError(
            f"{type(network).__name__} holds parameters of its own and has no forward; under fsdp2 "
            "give them to a module that is called"
        )
    return [root for child in network.children() for root in _roots(child)]
