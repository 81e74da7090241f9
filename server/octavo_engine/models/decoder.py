"""The decoder most families share: norm, attention, norm, MLP, a residual around both.

A family subclasses `Decoder` and overrides what is particular to it: `configure` (which settings its files hold),
`make_mlp`, `make_attention`, or the layer itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from octavo_engine.errors import InvalidRequestError
from octavo_engine.layers.attention import Attention
from octavo_engine.layers.embedding import Embedding, LMHead
from octavo_engine.layers.fused_moe import FusedMoE
from octavo_engine.layers.mlp import GATED, GatedMLP
from octavo_engine.layers.moe import MoE
from octavo_engine.layers.norm import RMSNorm
from octavo_engine.layers.rope import cos_sin_table
from octavo_engine.loader.weights import WeightLoader
from octavo_engine.models.config import LayerConfig, ModelConfig
from octavo_engine.models.interface import Model
from octavo_engine.models.rope_config import RopeConfig
from octavo_kernels.batch import AttentionBatch, PagedKVCache
from octavo_kernels.step import DecoderLayerPlan, DecoderPlan
from octavo_kernels.weights import Weight

Residual = torch.Tensor | None
MLP = GatedMLP | MoE | FusedMoE


class Layer(Protocol):
    """One layer: takes its input and the residual stream beside it, returns both."""

    def __call__(
        self, x: torch.Tensor, residual: Residual, batch: AttentionBatch, cache: PagedKVCache | None
    ) -> tuple[torch.Tensor, Residual]: ...


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """Pre-norm layer; the residual sum is folded into the norm that follows it."""

    input_norm: RMSNorm
    attention: Attention
    post_attention_norm: RMSNorm
    mlp: MLP

    def __call__(
        self, x: torch.Tensor, residual: Residual, batch: AttentionBatch, cache: PagedKVCache | None
    ) -> tuple[torch.Tensor, Residual]:
        x, residual = self.input_norm.add(x, residual)
        x = self.attention(x, batch, cache)
        x, residual = self.post_attention_norm.add(x, residual)
        return self.mlp(x), residual


class Decoder(Model):
    """A causal language model. `mlp_name`: what a layer's MLP is called in the checkpoint."""

    mlp_name = "mlp"

    def __init__(self, config: ModelConfig, weights: WeightLoader, max_positions: int) -> None:
        self.config = config
        self._ropes: dict[RopeConfig, torch.Tensor] = {}
        self._max_positions = max_positions
        scale = float(torch.tensor(config.embedding_scale, dtype=weights.dtype))
        table = weights.rows("model.embed_tokens.weight", (config.vocab_size, config.hidden_size))
        self.can_generate = not config.architecture.endswith("Model")
        table, head = self._tie_or_read_head(weights, table)
        self.embedding = Embedding(table, weights.dtype, scale)
        self.lm_head = None if head is None else LMHead(head, config.final_soft_cap)
        self.layers = tuple(self.make_layer(weights, index) for index in range(config.num_layers))
        self.final_norm = self.make_norm(weights, "model.norm")

    def forward(
        self, token_ids: torch.Tensor, batch: AttentionBatch, caches: Sequence[PagedKVCache | None]
    ) -> torch.Tensor:
        x, residual = self.embedding(token_ids), None
        for layer, cache in zip(self.layers, caches, strict=True):
            x, residual = layer(x, residual, batch, cache)
        return self.final_norm.add(x, residual)[0]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.lm_head is None:
            raise InvalidRequestError(f"{self.config.architecture} has no head and cannot generate text", "model")
        return self.lm_head(hidden)

    def plan(self) -> DecoderPlan | None:
        layers = tuple(
            _layer_plan(layer, config) for layer, config in zip(self.layers, self.config.layers, strict=True)
        )
        plain = [layer for layer in layers if layer is not None]
        config = self.config
        if self.lm_head is None or len(plain) != len(layers) or config.final_soft_cap or len(self._ropes) > 1:
            return None
        cos_sin = next(iter(self._ropes.values()), self.final_norm.weight.new_zeros((0, 0), dtype=torch.float32))
        return DecoderPlan(
            dtype=self.embedding.dtype,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            vocab_size=config.vocab_size,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            rms_norm_eps=config.norm_eps,
            attention_scale=config.attention_scale,
            activation=config.activation,
            cos_sin=cos_sin,
            embedding=self.embedding.weight,
            embedding_scale=self.embedding.scale,
            layers=tuple(plain),
            final_norm=self.final_norm.weight,
            lm_head=self.lm_head.weight,
        )

    def _tie_or_read_head(self, weights: WeightLoader, table: Weight) -> tuple[Weight, Weight | None]:
        """(embedding, output head); no head for a checkpoint that was saved without one."""
        if not self.can_generate:
            return table, None
        if self.config.tie_word_embeddings:
            self.ignored_tensors = (*self.ignored_tensors, "lm_head.weight")  # some tools write the copy too
            return weights.tie(table)
        return table, weights.head("lm_head.weight", (self.config.vocab_size, self.config.hidden_size))

    def make_layer(self, weights: WeightLoader, index: int) -> Layer:
        prefix, config = f"model.layers.{index}", self.config.layers[index]
        return DecoderLayer(
            self.make_norm(weights, f"{prefix}.input_layernorm"),
            self.make_attention(weights, f"{prefix}.self_attn", config),
            self.make_norm(weights, f"{prefix}.post_attention_layernorm"),
            self.make_mlp(weights, f"{prefix}.{self.mlp_name}", config),
        )

    def make_attention(self, weights: WeightLoader, prefix: str, layer: LayerConfig) -> Attention:
        config = self.config
        q_size = config.num_heads * config.head_dim
        return Attention(
            weights.linear(self.qkv_outputs(prefix), config.hidden_size, bias=config.qkv_bias),
            weights.linear({f"{prefix}.o_proj": config.hidden_size}, q_size, bias=config.output_bias),
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            config.attention_scale,
            self.rope_table(layer.rope, weights.device),
            self.head_norm(weights, f"{prefix}.q_norm") if config.qk_norm else None,
            self.head_norm(weights, f"{prefix}.k_norm") if config.qk_norm else None,
            norm_eps=config.norm_eps,
            sliding_window=layer.sliding_window,
            soft_cap=config.attention_soft_cap,
        )

    def make_mlp(self, weights: WeightLoader, prefix: str, layer: LayerConfig) -> MLP:
        config = self.config
        return GatedMLP(
            weights.linear(self.gate_up_outputs(prefix), config.hidden_size, bias=config.mlp_bias),
            weights.linear({f"{prefix}.down_proj": config.hidden_size}, config.intermediate_size, bias=config.mlp_bias),
            GATED[config.activation],
        )

    def qkv_outputs(self, prefix: str) -> dict[str, int]:
        """The projections that make query, key and value, with their sizes."""
        q_size, kv_size = (heads * self.config.head_dim for heads in (self.config.num_heads, self.config.num_kv_heads))
        return {f"{prefix}.q_proj": q_size, f"{prefix}.k_proj": kv_size, f"{prefix}.v_proj": kv_size}

    def gate_up_outputs(self, prefix: str) -> dict[str, int]:
        """The projections that make gate and up, with their sizes."""
        return {f"{prefix}.{name}_proj": self.config.intermediate_size for name in ("gate", "up")}

    def make_norm(self, weights: WeightLoader, prefix: str) -> RMSNorm:
        weight = weights.vector(f"{prefix}.weight", self.config.hidden_size, offset=self.config.norm_offset)
        return RMSNorm(weight, self.config.norm_eps)

    def head_norm(self, weights: WeightLoader, prefix: str) -> torch.Tensor:
        return weights.vector(f"{prefix}.weight", self.config.head_dim, offset=self.config.norm_offset)

    def rope_table(self, rope: RopeConfig | None, device: torch.device) -> torch.Tensor | None:
        """Layers with equal settings share one table."""
        if rope is None:
            return None
        if rope not in self._ropes:
            self._ropes[rope] = cos_sin_table(rope, self._max_positions, device)
        return self._ropes[rope]


def _layer_plan(layer: Layer, config: LayerConfig) -> DecoderLayerPlan | None:
    if not isinstance(layer, DecoderLayer) or not isinstance(layer.mlp, GatedMLP):
        return None
    attention, mlp = layer.attention, layer.mlp
    if attention.soft_cap or attention.sinks is not None or mlp.gate_up.bias is not None or mlp.down.bias is not None:
        return None
    return DecoderLayerPlan(
        input_norm=layer.input_norm.weight,
        qkv=attention.qkv.parts,
        qkv_bias=attention.qkv.bias,
        q_norm=attention.q_norm,
        k_norm=attention.k_norm,
        output=attention.output.weight,
        output_bias=attention.output.bias,
        post_attention_norm=layer.post_attention_norm.weight,
        gate_up=mlp.gate_up.parts,
        down=mlp.down.weight,
        sliding_window=config.sliding_window,
        use_rope=config.rope is not None,
    )
