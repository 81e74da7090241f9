"""A whole decoder step as one native call: the plan a model describes itself with, and who may compile it.

A model whose decoder is the usual stack (norm, attention, norm, gated MLP; residual around both, perhaps a norm of what
joins it) returns a `DecoderPlan`: plain structs of weights and numbers. A backend that can run such a plan registers a
compiler:

    @register_step_compiler("cpu")
    def compile_step(plan: DecoderPlan) -> CompiledStep: ...   # raises UnsupportedPlanError(reason)

The runner asks `compile_step(plan)` once after the weights are loaded and packed and the KV cache is allocated, and
otherwise runs the model's own layers, op by op. Both must give the same logits.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from octavo_kernels.batch import AttentionBatch, PagedKVCache
from octavo_kernels.registry import backend_order, load_backend
from octavo_kernels.weights import Weight

_log = logging.getLogger(__name__)


class Activation(enum.StrEnum):
    """Gated activations by the name of their op."""

    SILU = "silu_and_mul"
    GELU = "gelu_and_mul"


@dataclass(frozen=True, slots=True)
class DecoderLayerPlan:
    """One layer. Weights are [out, in]; a fused projection is a tuple of parts whose outputs are concatenated
    (one part where all share a storage format, else several, as in mixed GGUF files).

    qkv: query, key and value projections, in that order; gate_up: gate then up. cos_sin: [max_positions, rotary_dim]
    float32 as in `ops.rope_and_store_kv`, None turns nothing. q_norm, k_norm: [head_dim] of each head, or over all
    heads together, [heads * head_dim]. input_norm, post_attention_norm: before a block, None for none.
    attention_out_norm, mlp_out_norm: of a block's output before it joins the residual stream. soft_cap (0: none),
    sinks ([num_heads]): as in `ops.paged_attention`.
    """

    input_norm: torch.Tensor | None
    qkv: tuple[Weight, ...]
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    output: Weight
    output_bias: torch.Tensor | None
    attention_out_norm: torch.Tensor | None
    post_attention_norm: torch.Tensor | None
    gate_up: tuple[Weight, ...]
    gate_up_bias: torch.Tensor | None
    down: Weight
    down_bias: torch.Tensor | None
    mlp_out_norm: torch.Tensor | None
    cos_sin: torch.Tensor | None
    sliding_window: int
    soft_cap: float
    sinks: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class DecoderPlan:
    """A whole decoder: `x = embedding[ids] * embedding_scale`, layers, final norm, `logits = x @ lm_head.T`.

    max_positions: beyond the last position that may be asked for. dtype: of activations between ops.
    final_soft_cap: `cap * tanh(logits / cap)`, 0 for none.
    """

    dtype: torch.dtype
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    attention_scale: float
    activation: Activation
    max_positions: int
    embedding: Weight
    embedding_scale: float
    layers: tuple[DecoderLayerPlan, ...]
    final_norm: torch.Tensor
    lm_head: Weight
    final_soft_cap: float


class UnsupportedPlanError(Exception):
    """A backend cannot compile this plan; the message says which part."""


class Projection(enum.Enum):
    """A layer's projections, fused as in `DecoderLayerPlan`, that adapters may change."""

    QKV = 0
    OUTPUT = 1
    GATE_UP = 2
    DOWN = 3


@dataclass(frozen=True, slots=True)
class LowRankChange:
    """What an adapter adds to outputs first .. first + rows - 1 of a projection: scale * up @ (down @ x).

    down: [rank, in_features]; up: [rows, rank].
    """

    layer: int
    projection: Projection
    first: int
    down: torch.Tensor
    up: torch.Tensor
    scale: float


class CompiledStep(Protocol):
    """Runs one step natively. Tokens may each have an adapter of their own, kept in numbered slots."""

    def __call__(
        self,
        token_ids: torch.Tensor,
        batch: AttentionBatch,
        caches: Sequence[PagedKVCache],
        logits_indices: torch.Tensor,
        adapter_slots: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """token_ids: [T] int64; caches: one for each layer; logits_indices: [L] int64 rows of the flat batch whose
        logits are wanted; adapter_slots: [T] int32, -1 for a token without adapter, None for a batch without. An empty
        slot changes nothing. Writes the caches and returns [L, vocab_size] float32."""

    def place_adapter(self, slot: int, changes: Sequence[LowRankChange]) -> None:
        """Put an adapter into a slot, in place of what was there. Raises `ValueError` for shapes that do not fit."""


StepCompiler = Callable[[DecoderPlan], CompiledStep]
_compilers: dict[str, StepCompiler] = {}


def register_step_compiler(backend: str) -> Callable[[StepCompiler], StepCompiler]:
    """Decorator: the decorated function compiles plans for `backend`."""

    def add(compiler: StepCompiler) -> StepCompiler:
        _compilers[backend] = compiler
        return compiler

    return add


def compile_step(plan: DecoderPlan) -> tuple[str, CompiledStep] | None:
    """(backend, step) from the first backend of the plan's device that can compile it, or None."""
    for name in backend_order(plan.final_norm.device.type):
        if not load_backend(name).available or name not in _compilers:
            continue
        try:
            return name, _compilers[name](plan)
        except UnsupportedPlanError as reason:
            _log.info("backend %s does not run whole steps of this model: %s", name, reason)
    return None
