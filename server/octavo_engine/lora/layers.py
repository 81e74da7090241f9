"""A decoder whose projections add each token's own adapter."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from octavo_engine.errors import ConfigError
from octavo_engine.layers.attention import Attention
from octavo_engine.layers.linear import Linear
from octavo_engine.layers.mlp import GatedMLP
from octavo_engine.lora.adapter import Adapter, AdapterTarget
from octavo_engine.models.decoder import Decoder, Layer
from octavo_engine.models.interface import Model
from octavo_engine.parallel.sections import Rows, Section, as_rows, held_size, stored_size, whole
from octavo_kernels import ops
from octavo_kernels.step import LowRankChange, Projection

NO_ADAPTER = -1
_LEAST_TOKENS = 1_024  # more than any step of the warm-up has


class ActiveSlots:
    """The adapter slot of every token of the step that runs, -1 for none: set before the step, read by every layer.

    One buffer at a fixed address, so that captured graphs see what the next replay is about.
    """

    def __init__(self, max_num_tokens: int, device: torch.device) -> None:
        self._slots = torch.full((max(_LEAST_TOKENS, max_num_tokens),), NO_ADAPTER, dtype=torch.int32, device=device)

    def set(self, slots: torch.Tensor) -> None:
        """slots: [T] int32. What lies beyond T has no adapter."""
        count = slots.shape[0]
        self._slots[:count].copy_(slots)
        self._slots[count:].fill_(NO_ADAPTER)

    def first(self, num_tokens: int) -> torch.Tensor:
        return self._slots[:num_tokens]


@dataclass(frozen=True, slots=True)
class AdapterStack:
    """One projection's matrices of all slots. down: [slots, max_rank, in_features]; up: [slots, out_features,
    max_rank]; scales: [slots] float32. They change outputs `first .. first + out_features - 1` of a fused projection.
    A smaller rank fills up with zeros. rows, inputs: which of the projection's outputs and inputs this rank holds."""

    first: int
    rows: Rows
    inputs: Section
    down: torch.Tensor
    up: torch.Tensor
    scales: torch.Tensor

    def place(self, slot: int, adapter: Adapter, module: str) -> None:
        """Put an adapter's matrices into a slot; a projection it does not change gets zeros."""
        self.down[slot].zero_()
        self.up[slot].zero_()
        change = adapter.changes.get(module)
        self.scales[slot] = 0.0 if change is None else change.scale
        if change is not None:
            rank = change.down.shape[0]
            self.down[slot, :rank].copy_(change.down[:, self.inputs.start : self.inputs.stop])
            parts = torch.split(change.up, [section.size for section in self.rows])
            held = [part[rows.start : rows.stop] for part, rows in zip(parts, self.rows, strict=True)]
            self.up[slot, :, :rank].copy_(torch.cat(held))


@dataclass(frozen=True, slots=True)
class AdaptedLinear(Linear):
    """A projection, quantized or not, plus what the adapters of its tokens add.

    Where ranks hold parts of the inputs, each adds what its part gives, so that one sum covers both.
    """

    stacks: tuple[AdapterStack, ...] = ()
    active: ActiveSlots | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.active is None:
            return Linear.__call__(self, x)
        out = Linear.__call__(self, x) if self.reduce is None else ops.linear(x, self.weight)
        slots = self.active.first(x.shape[0])
        for stack in self.stacks:
            part = out[:, stack.first : stack.first + stack.up.shape[1]]
            ops.add_lora(part, x, stack.down, stack.up, slots, stack.scales)
        if self.reduce is None:
            return out
        out = self.reduce(out)
        return out if self.bias is None else out + self.bias


@dataclass(frozen=True, slots=True)
class _Place:
    """A projection, fused or not, that adapters may change: this rank's rows by module, and its inputs."""

    outputs: dict[str, Rows]
    inputs: Section


class AdaptedModel:
    """A decoder beside its base: the same weights, with room for `max_loras` adapters of up to `max_rank`.

    The base model's own layers stay as they are, so a batch without adapters costs nothing more than before. Raises
    `ConfigError` for a model whose layers adapters cannot reach.
    """

    def __init__(self, base: Model, dtype: torch.dtype, max_loras: int, max_rank: int, max_num_tokens: int) -> None:
        if not isinstance(base, Decoder):
            raise ConfigError(f"enable_lora: {base.config.architecture} takes no adapters")
        self.targets: dict[str, AdapterTarget] = {}
        self._stacks: dict[str, AdapterStack] = {}
        self._where: dict[str, tuple[int, Projection, int]] = {}  # layer, projection, its first output that is changed
        self._base = base
        self._shape = (max_loras, max_rank)
        self._device = base.final_norm.weight.device
        self._dtype = dtype
        self.active = ActiveSlots(max_num_tokens, self._device)
        self.model = copy.copy(base)
        for index in range(base.config.num_layers):
            for projection, place in _places(base, index).items():
                first = 0
                for module, rows in place.outputs.items():
                    self._where[module] = (index, projection, first)
                    self.targets[module] = AdapterTarget(place.inputs.size, stored_size(rows))
                    first += held_size(rows)
        held = base.rank.layers(base.config.num_layers)
        self.model.layers = tuple(
            self._adapted(base, layer, _places(base, index)) for index, layer in zip(held, base.layers, strict=True)
        )

    @property
    def dtype(self) -> torch.dtype:
        """What adapters' matrices are kept in."""
        return self._dtype

    @property
    def nbytes(self) -> int:
        """Memory that the slots take."""
        return sum(stack.down.nbytes + stack.up.nbytes + stack.scales.nbytes for stack in self._stacks.values())

    def release(self) -> None:
        """Let go of the slots, which a native step has no use for: it keeps the matrices that `changes` gives it."""
        self._stacks.clear()
        self.model = self._base

    def place(self, slot: int, adapter: Adapter) -> None:
        for module, stack in self._stacks.items():
            stack.place(slot, adapter, module)

    def changes(self, adapter: Adapter) -> list[LowRankChange]:
        """An adapter for a step that runs natively and keeps its matrices itself; on one device only."""
        return [
            LowRankChange(*self._where[module], change.down, change.up, change.scale)
            for module, change in adapter.changes.items()
        ]

    def _adapted(self, base: Decoder, layer: Layer, places: dict[Projection, _Place]) -> Layer:
        attention = getattr(layer, "attention", None)
        if not isinstance(attention, Attention) or not dataclasses.is_dataclass(layer) or isinstance(layer, type):
            raise ConfigError(f"enable_lora: {base.config.architecture} takes no adapters")
        if not isinstance(attention.qkv, Linear):
            raise ConfigError(f"enable_lora: {base.config.architecture} takes no adapters")
        changed: dict[str, Any] = {
            "attention": dataclasses.replace(
                attention,
                qkv=self._linear(attention.qkv, places[Projection.QKV]),
                output=self._linear(attention.output, places[Projection.OUTPUT]),
            )
        }
        mlp = getattr(layer, "mlp", None)
        if isinstance(mlp, GatedMLP):
            changed["mlp"] = dataclasses.replace(
                mlp,
                gate_up=self._linear(mlp.gate_up, places[Projection.GATE_UP]),
                down=self._linear(mlp.down, places[Projection.DOWN]),
            )
        return dataclasses.replace(layer, **changed)

    def _linear(self, base: Linear, place: _Place) -> AdaptedLinear:
        """`base` with a stack for each of the projections it fuses."""
        max_loras, max_rank = self._shape
        stacks = []
        first = 0
        for module, rows in place.outputs.items():
            out_features, in_features = held_size(rows), place.inputs.length
            stack = self._stacks[module] = AdapterStack(
                first,
                rows,
                place.inputs,
                torch.zeros((max_loras, max_rank, in_features), dtype=self._dtype, device=self._device),
                torch.zeros((max_loras, out_features, max_rank), dtype=self._dtype, device=self._device),
                torch.zeros(max_loras, dtype=torch.float32, device=self._device),
            )
            stacks.append(stack)
            first += out_features
        return AdaptedLinear(base.parts, base.bias, base.reduce, stacks=tuple(stacks), active=self.active)


def _places(base: Decoder, index: int) -> dict[Projection, _Place]:
    """What adapters may change in a layer, also in one that another stage holds. Experts have no adapters."""
    config, rank = base.config, base.rank
    prefix, hidden = f"model.layers.{index}", whole(config.hidden_size)
    queries, _ = rank.heads(config.num_heads, config.num_kv_heads)
    places = {
        Projection.QKV: _Place(base.qkv_outputs(f"{prefix}.self_attn"), hidden),
        Projection.OUTPUT: _Place(
            {f"{prefix}.self_attn.o_proj": as_rows(config.hidden_size)}, queries * config.head_dim
        ),
    }
    if config.layers[index].moe is None:
        name = f"{prefix}.{base.mlp_name}"
        places[Projection.GATE_UP] = _Place(base.gate_up_outputs(name), hidden)
        down = {f"{name}.down_proj": as_rows(config.hidden_size)}
        places[Projection.DOWN] = _Place(down, rank.share(config.intermediate_size))
    return places
