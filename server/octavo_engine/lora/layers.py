"""A decoder whose projections add each token's own adapter."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
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
from octavo_engine.parallel.sections import Rows, as_rows, held_size
from octavo_kernels import ops

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
    A smaller rank fills up with zeros."""

    first: int
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
            self.down[slot, :rank].copy_(change.down)
            self.up[slot, :, :rank].copy_(change.up)


@dataclass(frozen=True, slots=True)
class AdaptedLinear(Linear):
    """A projection, quantized or not, plus what the adapters of its tokens add."""

    stacks: tuple[AdapterStack, ...] = ()
    active: ActiveSlots | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        out = Linear.__call__(self, x)
        if self.active is None:
            return out
        slots = self.active.first(x.shape[0])
        for stack in self.stacks:
            part = out[:, stack.first : stack.first + stack.up.shape[1]]
            ops.add_lora(part, x, stack.down, stack.up, slots, stack.scales)
        return out


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
        self._shape = (max_loras, max_rank)
        self._device = base.final_norm.weight.device
        self._dtype = dtype
        self.active = ActiveSlots(max_num_tokens, self._device)
        self.model = copy.copy(base)
        self.model.layers = tuple(self._adapted(base, index, layer) for index, layer in enumerate(base.layers))

    @property
    def dtype(self) -> torch.dtype:
        """What adapters' matrices are kept in."""
        return self._dtype

    @property
    def nbytes(self) -> int:
        """Memory that the slots take."""
        return sum(stack.down.nbytes + stack.up.nbytes + stack.scales.nbytes for stack in self._stacks.values())

    def place(self, slot: int, adapter: Adapter) -> None:
        for module, stack in self._stacks.items():
            stack.place(slot, adapter, module)

    def _adapted(self, base: Decoder, index: int, layer: Layer) -> Layer:
        prefix = f"model.layers.{index}"
        attention = getattr(layer, "attention", None)
        if not isinstance(attention, Attention) or not dataclasses.is_dataclass(layer) or isinstance(layer, type):
            raise ConfigError(f"enable_lora: {base.config.architecture} takes no adapters")
        if not isinstance(attention.qkv, Linear):
            raise ConfigError(f"enable_lora: {base.config.architecture} takes no adapters")
        config = base.config
        attended = config.num_heads * config.head_dim
        changed: dict[str, Any] = {
            "attention": dataclasses.replace(
                attention,
                qkv=self._linear(attention.qkv, base.qkv_outputs(f"{prefix}.self_attn"), config.hidden_size),
                output=self._linear(attention.output, {f"{prefix}.self_attn.o_proj": config.hidden_size}, attended),
            )
        }
        mlp = getattr(layer, "mlp", None)
        if isinstance(mlp, GatedMLP):  # experts of a mixture have no adapters
            name = f"{prefix}.{base.mlp_name}"
            down = {f"{name}.down_proj": config.hidden_size}
            changed["mlp"] = dataclasses.replace(
                mlp,
                gate_up=self._linear(mlp.gate_up, base.gate_up_outputs(name), config.hidden_size),
                down=self._linear(mlp.down, down, config.intermediate_size),
            )
        return dataclasses.replace(layer, **changed)

    def _linear(self, base: Linear, outputs: Mapping[str, int | Rows], in_features: int) -> AdaptedLinear:
        """`base` with a stack for each of the projections it fuses."""
        max_loras, max_rank = self._shape
        stacks = []
        first = 0
        for module, rows in outputs.items():
            out_features = held_size(as_rows(rows))
            self.targets[module] = AdapterTarget(in_features, out_features)
            stack = self._stacks[module] = AdapterStack(
                first,
                torch.zeros((max_loras, max_rank, in_features), dtype=self._dtype, device=self._device),
                torch.zeros((max_loras, out_features, max_rank), dtype=self._dtype, device=self._device),
                torch.zeros(max_loras, dtype=torch.float32, device=self._device),
            )
            stacks.append(stack)
            first += out_features
        return AdaptedLinear(base.parts, base.bias, stacks=tuple(stacks), active=self.active)
