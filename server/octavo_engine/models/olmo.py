"""OLMo 2: each block's output is normed before it joins the residual stream, queries and keys over all their heads."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from octavo_engine.layers.attention import Attention
from octavo_engine.layers.linear import Linear
from octavo_engine.layers.norm import RMSNorm, SharedRMSNorm
from octavo_engine.loader.weights import WeightLoader
from octavo_engine.models.config import LayerConfig, ModelConfig, decoder_config, uniform_layers
from octavo_engine.models.decoder import MLP, Decoder, Layer, Residual, block_plan
from octavo_engine.models.raw_config import RawConfig
from octavo_engine.parallel.sections import Section
from octavo_kernels.batch import AttentionBatch, PagedKVCache
from octavo_kernels.step import DecoderLayerPlan


@dataclass(frozen=True, slots=True)
class NormedQKV:
    """Query, key and value projections with a norm over all heads of the first two."""

    projection: Linear
    query_norm: SharedRMSNorm
    key_norm: SharedRMSNorm

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        sizes = [len(self.query_norm.weight), len(self.key_norm.weight), len(self.key_norm.weight)]
        query, key, value = torch.split(self.projection(x), sizes, dim=-1)
        return torch.cat((self.query_norm(query), self.key_norm(key), value), dim=-1)


@dataclass(frozen=True, slots=True)
class Olmo2Layer:
    """No norm before a block, one after it."""

    attention: Attention
    post_attention_norm: RMSNorm
    mlp: MLP
    post_feedforward_norm: RMSNorm

    def __call__(
        self, x: torch.Tensor, residual: Residual, batch: AttentionBatch, cache: PagedKVCache | None
    ) -> tuple[torch.Tensor, Residual]:
        x = x if residual is None else x + residual
        x = x + self.post_attention_norm(self.attention(x, batch, cache))
        return self.post_feedforward_norm(self.mlp(x)), x


class Olmo2ForCausalLM(Decoder):
    """Otherwise a Llama."""

    @classmethod
    def configure(cls, raw: RawConfig, architecture: str) -> ModelConfig:
        bias = raw.flag("attention_bias", False)
        return decoder_config(raw, architecture, uniform_layers(raw), qkv_bias=bias, output_bias=bias)

    def make_layer(self, weights: WeightLoader, index: int) -> Olmo2Layer:
        prefix, layer = f"model.layers.{index}", self.config.layers[index]
        return Olmo2Layer(
            self.make_attention(weights, f"{prefix}.self_attn", layer),
            self.make_norm(weights, f"{prefix}.post_attention_layernorm"),
            self.make_mlp(weights, f"{prefix}.mlp", layer),
            self.make_norm(weights, f"{prefix}.post_feedforward_layernorm"),
        )

    def make_attention(self, weights: WeightLoader, prefix: str, layer: LayerConfig) -> Attention:
        plain = super().make_attention(weights, prefix, layer)
        assert isinstance(plain.qkv, Linear)  # noqa: S101 (as the base class makes it)
        query, kv = self.rank.heads(self.config.num_heads, self.config.num_kv_heads)
        norms = (self._norm(weights, f"{prefix}.q_norm", query), self._norm(weights, f"{prefix}.k_norm", kv))
        return replace(plain, qkv=NormedQKV(plain.qkv, *norms))

    def layer_plan(self, layer: Layer) -> DecoderLayerPlan | None:
        if not isinstance(layer, Olmo2Layer) or not isinstance(layer.attention.qkv, NormedQKV):
            return None
        normed = layer.attention.qkv
        attention = replace(
            layer.attention,
            qkv=normed.projection,
            q_norm=normed.query_norm.weight,
            k_norm=normed.key_norm.weight,
        )
        plan = block_plan(None, attention, None, layer.mlp)
        if plan is None:
            return None
        out_norms = (layer.post_attention_norm.weight, layer.post_feedforward_norm.weight)
        return replace(plan, attention_out_norm=out_norms[0], mlp_out_norm=out_norms[1])

    def _norm(self, weights: WeightLoader, prefix: str, heads: Section) -> SharedRMSNorm:
        held = heads * self.config.head_dim
        weight = weights.vector(f"{prefix}.weight", held.size)[held.start : held.stop]
        return SharedRMSNorm(weight, self.config.norm_eps, held.length * self.rank.topology.tensor, self.rank.reduce)
