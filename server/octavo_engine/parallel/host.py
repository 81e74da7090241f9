"""What one rank's process has to work with."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from octavo_engine.config import EngineConfig
from octavo_engine.errors import ConfigError
from octavo_engine.parallel.communicator import Communicator
from octavo_engine.parallel.rank import Rank
from octavo_engine.parallel.topology import Topology
from octavo_engine.runner.machine import choose_device


@dataclass(frozen=True, slots=True)
class Nodes:
    """The machines of one engine, as environment variables describe them.

    MASTER_ADDR and MASTER_PORT: where the first node listens; NODE_RANK of NNODES: this one. Without them there is one.
    """

    address: str = "127.0.0.1"
    port: int = 0
    index: int = 0
    count: int = 1

    def ranks_here(self, world_size: int) -> range:
        """The ranks of this node; nodes are filled in order."""
        each = world_size // self.count
        return range(self.index * each, (self.index + 1) * each)


@dataclass(frozen=True, slots=True)
class RankHost:
    """rank: its place in the model. device: where it computes. ranks_here: how many share this machine.

    control: all ranks, over gloo; the first tells the others what to do.
    """

    rank: Rank
    device: torch.device
    ranks_here: int
    control: Communicator


def topology_of(config: EngineConfig) -> Topology:
    return Topology(config.tensor_parallel_size, config.pipeline_parallel_size, config.enable_expert_parallel)


def read_nodes(config: EngineConfig, environment: Mapping[str, str] = os.environ) -> Nodes:
    """The nodes the environment names. Raises `ConfigError` where they cannot hold the ranks."""
    count = _number(environment, "NNODES", 1)
    if count == 1 or config.num_ranks == 1:
        return Nodes()
    index, port = _number(environment, "NODE_RANK", 0), _number(environment, "MASTER_PORT", 0)
    address = environment.get("MASTER_ADDR", "")
    if not address or not 0 < port < 65_536:
        raise ConfigError(f"MASTER_ADDR and MASTER_PORT: must name where the first of {count} nodes listens")
    if not 0 <= index < count:
        raise ConfigError(f"NODE_RANK: must be between 0 and {count - 1}, got {index}")
    if config.num_ranks % count:
        raise ConfigError(
            f"NNODES: {count} nodes cannot hold {config.num_ranks} ranks evenly "
            "(tensor_parallel_size times pipeline_parallel_size)"
        )
    return Nodes(address, port, index, count)


def rank_device(config: EngineConfig, local_rank: int) -> torch.device:
    """The GPU of a rank, or the CPU. With gloo ranks may share a GPU; NCCL wants one for each."""
    device = choose_device(config.device)
    if device.type != "cuda":
        return device
    gpus = torch.cuda.device_count()
    if local_rank >= gpus and config.distributed_backend != "gloo":
        raise ConfigError(
            f"tensor_parallel_size: rank {local_rank} of this machine needs a GPU of its own, have {gpus}; "
            "use fewer ranks, or more nodes"
        )
    return torch.device("cuda", local_rank % gpus)


def backend_for(config: EngineConfig, device: torch.device) -> str:
    """nccl or gloo."""
    if config.distributed_backend == "nccl" and device.type != "cuda":
        raise ConfigError("distributed_backend: nccl needs GPUs; use gloo")
    if config.distributed_backend != "auto":
        return config.distributed_backend
    return "nccl" if device.type == "cuda" else "gloo"


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, "")
    if not text:
        return default
    if not text.isdecimal():
        raise ConfigError(f"{name}: must be a number, got {text!r}")
    return int(text)
