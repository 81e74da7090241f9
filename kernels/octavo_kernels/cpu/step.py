"""`DecoderPlan` to native structs, and the call that runs a whole step."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence

import torch

from octavo_kernels.batch import AttentionBatch, PagedKVCache
from octavo_kernels.cpu.attention import fill_batch, kv_struct
from octavo_kernels.cpu.bindings import (
    MAX_PARTS,
    Attention,
    KVCache,
    Layer,
    LowRank,
    Matrix,
    Model,
    NativeError,
    check,
    native,
)
from octavo_kernels.cpu.bindings import Batch as NativeBatch
from octavo_kernels.cpu.weights import PackedWeight, pack
from octavo_kernels.step import Activation, DecoderLayerPlan, DecoderPlan, LowRankChange, UnsupportedPlanError
from octavo_kernels.weights import Weight

PHASES = ("embedding", "norms", "qkv", "rope", "attention", "output", "gate_up", "down", "lm_head")


class NativeStep:
    """One decoder, run by the native library: one call for a step, no Python in between."""

    def __init__(self, plan: DecoderPlan) -> None:
        self._builder = _PlanBuilder(plan)  # keeps the tensors that the structs point to alive
        self._vocab_size = plan.vocab_size
        self._dtype = plan.dtype
        self._adapters: dict[int, list[PackedWeight]] = {}  # what the slots' structs point to
        self._head_shape = (plan.num_kv_heads, plan.head_dim)
        self._num_layers = len(plan.layers)
        handle = native.oct_step_create(ctypes.byref(self._builder.model))
        if not handle:
            raise UnsupportedPlanError(native.oct_last_error().decode())
        self._handle = handle
        weakref.finalize(self, native.oct_step_destroy, handle)
        self._caches: Sequence[PagedKVCache] | None = None
        self._cache_structs = (KVCache * self._num_layers)()
        self._batch = NativeBatch()

    def __call__(
        self,
        token_ids: torch.Tensor,
        batch: AttentionBatch,
        caches: Sequence[PagedKVCache],
        logits_indices: torch.Tensor,
        adapter_slots: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `octavo_kernels.step.CompiledStep`. One thread at a time."""
        if caches is not self._caches:
            self._use_caches(caches)
        held = fill_batch(self._batch, batch, caches[0], token_ids)
        slots = None if adapter_slots is None else adapter_slots.to(torch.int32).contiguous()
        if slots is not None and slots.shape != batch.positions.shape:
            raise ValueError(f"{slots.numel()} adapter slots for {batch.num_tokens} tokens")
        self._batch.adapter_slots = None if slots is None else slots.data_ptr()
        wanted = logits_indices.contiguous()
        count = wanted.shape[0]
        logits = torch.empty(count, self._vocab_size)
        check(
            native.oct_step_run(
                self._handle,
                ctypes.byref(self._batch),
                self._cache_structs,
                wanted.data_ptr(),
                count,
                logits.data_ptr(),
            )
        )
        del held, slots
        return logits

    def place_adapter(self, slot: int, changes: Sequence[LowRankChange]) -> None:
        """See `octavo_kernels.step.CompiledStep`. Not while a step runs."""
        kept: list[PackedWeight] = []
        structs = (LowRank * len(changes))()
        for struct, change in zip(structs, changes, strict=True):
            struct.layer, struct.place, struct.first = change.layer, change.projection.value, change.first
            struct.scale = change.scale
            down, up = (_pack_factor(factor) for factor in (change.down, change.up))
            struct.down, struct.up = down.multiplied_with(self._dtype), up.matrix  # packed for float32
            kept += (down, up)
        try:
            check(native.oct_step_place_adapter(self._handle, slot, structs, len(structs)))
        except NativeError as error:
            raise ValueError(str(error)) from error
        self._adapters[slot] = kept

    def profile(self, on: bool) -> dict[str, float]:
        """Seconds in each phase since the last call, seen by the first thread; switches the measuring on or off."""
        spent = (ctypes.c_int64 * len(PHASES))()
        native.oct_step_profile(self._handle, int(on), spent, len(PHASES))
        return {phase: nanoseconds * 1e-9 for phase, nanoseconds in zip(PHASES, spent, strict=True)}

    def _use_caches(self, caches: Sequence[PagedKVCache]) -> None:
        if len(caches) != self._num_layers:
            raise ValueError(f"the model has {self._num_layers} layers, got {len(caches)} caches")
        for i, cache in enumerate(caches):
            if (cache.key.shape[1], cache.key.shape[3]) != self._head_shape or cache.key.dtype != caches[0].key.dtype:
                raise ValueError(f"cache {i}: shape {tuple(cache.key.shape)} does not fit heads {self._head_shape}")
            self._cache_structs[i] = kv_struct(cache)
        self._caches = caches


def _pack_factor(factor: torch.Tensor) -> PackedWeight:
    """One matrix of an adapter; float16 has no native layout and is widened."""
    packed = pack(factor.float() if factor.dtype == torch.float16 else factor)
    if packed is None:
        raise ValueError(f"an adapter's matrix of shape {list(factor.shape)} and type {factor.dtype} cannot be packed")
    return packed


class _PlanBuilder:
    """Turns a plan into structs; holds on to every tensor and weight they point to."""

    def __init__(self, plan: DecoderPlan) -> None:
        self._plan = plan
        self._kept: list[torch.Tensor | PackedWeight] = []
        self._tables: dict[int, int | None] = {}
        self._refuse_unsupported()
        self._layers = (Layer * len(plan.layers))(*(self._layer(layer) for layer in plan.layers))
        self.model = Model(
            plan.hidden_size,
            plan.intermediate_size,
            plan.vocab_size,
            len(plan.layers),
            self._layers,
            self._matrix(plan.embedding),
            self._matrix(plan.lm_head),
            self._floats(plan.final_norm),
            plan.embedding_scale,
            plan.rms_norm_eps,
            int(plan.activation is Activation.GELU),
            plan.final_soft_cap,
        )

    def _refuse_unsupported(self) -> None:
        plan = self._plan
        if plan.head_dim % 16 or plan.head_dim > 512:
            raise UnsupportedPlanError(f"head_dim {plan.head_dim} is not a multiple of 16 up to 512")
        if plan.intermediate_size % 32:
            raise UnsupportedPlanError(f"intermediate_size {plan.intermediate_size} is not a multiple of 32")
        if plan.num_heads // plan.num_kv_heads > 64:
            raise UnsupportedPlanError(f"{plan.num_heads // plan.num_kv_heads} query heads share a KV head, above 64")
        for layer in plan.layers:
            if layer.cos_sin is not None and layer.cos_sin.shape[0] < plan.max_positions:
                raise UnsupportedPlanError(f"a rotary table ends before position {plan.max_positions}")
            self._refuse_head_norms(layer)
            if len(layer.qkv) > MAX_PARTS or len(layer.gate_up) not in (1, 2):
                raise UnsupportedPlanError("projections are split in more parts than q, k, v or gate, up")

    def _refuse_head_norms(self, layer: DecoderLayerPlan) -> None:
        """Norms of each head, of all heads together, or none: for queries and keys alike."""
        plan = self._plan
        found = tuple(None if norm is None else norm.shape[0] for norm in (layer.q_norm, layer.k_norm))
        whole = (plan.num_heads * plan.head_dim, plan.num_kv_heads * plan.head_dim)
        if found != whole and any(size not in (None, plan.head_dim) for size in found):
            raise UnsupportedPlanError(f"norms of queries and keys over {found} numbers, heads have {plan.head_dim}")

    def _layer(self, layer: DecoderLayerPlan) -> Layer:
        plan = self._plan
        attention = Attention(
            num_heads=plan.num_heads,
            num_kv_heads=plan.num_kv_heads,
            head_dim=plan.head_dim,
            rotary_dim=0 if layer.cos_sin is None else layer.cos_sin.shape[1],
            sliding_window=layer.sliding_window,
            bf16_products=int(plan.dtype == torch.bfloat16),
            max_positions=plan.max_positions,
            scale=plan.attention_scale,
            soft_cap=layer.soft_cap,
            eps=plan.rms_norm_eps,
            cos_sin=self._table(layer.cos_sin),
            row_norms=int(layer.q_norm is not None and layer.q_norm.shape[0] != plan.head_dim),
            q_norm=self._floats(layer.q_norm),
            k_norm=self._floats(layer.k_norm),
            sinks=self._floats(layer.sinks),
        )
        return Layer(
            attention=attention,
            input_norm=self._floats(layer.input_norm),
            post_attention_norm=self._floats(layer.post_attention_norm),
            attention_out_norm=self._floats(layer.attention_out_norm),
            mlp_out_norm=self._floats(layer.mlp_out_norm),
            qkv_bias=self._floats(layer.qkv_bias),
            output_bias=self._floats(layer.output_bias),
            gate_up_bias=self._floats(layer.gate_up_bias),
            down_bias=self._floats(layer.down_bias),
            qkv=self._parts(layer.qkv),
            output=self._matrix(layer.output),
            gate_up=self._parts(layer.gate_up),
            down=self._matrix(layer.down),
            num_qkv=len(layer.qkv),
            num_gate_up=len(layer.gate_up),
        )

    def _parts(self, weights: tuple[Weight, ...]) -> ctypes.Array[Matrix]:
        return (Matrix * MAX_PARTS)(*(self._matrix(weight) for weight in weights))

    def _matrix(self, weight: Weight) -> Matrix:
        packed = pack(weight)
        if packed is None:
            form = weight.dtype if isinstance(weight, torch.Tensor) else weight.format
            raise UnsupportedPlanError(f"weights stored as {form} have no native layout")
        self._kept.append(packed)
        return packed.multiplied_with(self._plan.dtype)

    def _table(self, cos_sin: torch.Tensor | None) -> int | None:
        """Layers share their tables: one is converted once."""
        if cos_sin is None:
            return None
        if cos_sin.data_ptr() not in self._tables:
            self._tables[cos_sin.data_ptr()] = self._floats(cos_sin)
        return self._tables[cos_sin.data_ptr()]

    def _floats(self, tensor: torch.Tensor | None) -> int | None:
        if tensor is None:
            return None
        wide = tensor.detach().to(torch.float32).contiguous()
        self._kept.append(wide)
        return wide.data_ptr()
