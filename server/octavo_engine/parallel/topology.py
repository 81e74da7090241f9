"""How ranks divide a model between them, as plain arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from octavo_engine.errors import ConfigError
from octavo_engine.models.config import ModelConfig
from octavo_engine.parallel.sections import Section, share, whole


@dataclass(frozen=True, slots=True)
class Topology:
    """tensor: ranks that share every layer. pipeline: stages, each with some of the layers. expert: whether experts
    stay whole, spread over the tensor ranks, instead of each being cut in `tensor` parts.

    Ranks of one stage are neighbours: rank = stage * tensor + tensor rank.
    """

    tensor: int = 1
    pipeline: int = 1
    expert: bool = False

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline

    def place(self, rank: int) -> tuple[int, int]:
        """(stage, tensor rank)."""
        return divmod(rank, self.tensor)

    def layers(self, num_layers: int, stage: int) -> range:
        """The layers of a stage; uneven rests go to the first, for the last has the head."""
        section = share(num_layers, stage, self.pipeline)
        return range(section.start, section.stop)

    def describe(self) -> str:
        """For the backend line: `tensor 2, pipeline 2`."""
        parts = [
            f"{name} {count}" for name, count in (("tensor", self.tensor), ("pipeline", self.pipeline)) if count > 1
        ]
        return ", ".join(parts + ["experts apart"] * self.expert)


def heads_of(num_heads: int, num_kv_heads: int, index: int, count: int) -> tuple[Section, Section]:
    """(query heads, key-value heads) of a tensor rank; key-value heads fewer than ranks are held by several."""
    query = share(num_heads, index, count)
    if num_kv_heads >= count:
        return query, share(num_kv_heads, index, count)
    head = index * num_kv_heads // count
    return query, Section(num_kv_heads, head, head + 1)


def experts_of(num_experts: int, topology: Topology, tensor_rank: int) -> Section:
    """The experts a rank holds, whole or in part."""
    return share(num_experts, tensor_rank, topology.tensor) if topology.expert else whole(num_experts)


def check_topology(model: ModelConfig, topology: Topology) -> None:
    """Raise `ConfigError` with what would fit where a model cannot be divided so."""
    if topology.pipeline > model.num_layers:
        raise ConfigError(
            f"pipeline_parallel_size: {topology.pipeline} stages for the model's {model.num_layers} layers; "
            f"use at most {model.num_layers}"
        )
    experts = {layer.moe.num_experts for layer in model.layers if layer.moe is not None}
    if topology.expert and not experts:
        raise ConfigError(f"enable_expert_parallel: {model.architecture} has no experts; leave it off")
    if topology.expert and topology.tensor > min(experts):
        raise ConfigError(
            f"enable_expert_parallel: {min(experts)} experts cannot be spread over {topology.tensor} ranks; "
            f"use tensor_parallel_size up to {min(experts)}"
        )
    if not _divides(model, topology.tensor, topology.expert):
        possible = [n for n in range(1, model.num_heads + 1) if _divides(model, n, topology.expert)]
        raise ConfigError(
            f"tensor_parallel_size: {topology.tensor} does not divide {_sizes(model)}; "
            f"use {', '.join(map(str, possible))}, or pipeline_parallel_size"
        )


def _divides(model: ModelConfig, count: int, expert: bool) -> bool:
    heads, kv_heads = model.num_heads, model.num_kv_heads
    widths = {model.intermediate_size} | {
        layer.moe.intermediate_size for layer in model.layers if layer.moe is not None and not expert
    }
    return (
        heads % count == 0
        and (kv_heads % count == 0 or count % kv_heads == 0)
        and all(width % count == 0 for width in widths)
    )


def _sizes(model: ModelConfig) -> str:
    return (
        f"the model's {model.num_heads} heads ({model.num_kv_heads} for keys and values) "
        f"and its MLP of {model.intermediate_size}"
    )
