"""Gemma 2 and 3: norms before and after each block, tanh-GELU, scaled embeddings, alternating windows."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from octavo_engine.layers.attention import Attention
from octavo_engine.layers.norm import RMSNorm
from octavo_engine.loader.weights import WeightLoader
from octavo_engine.models.config import LayerConfig, ModelConfig, decoder_config, num_layers, sliding_layers
from octavo_engine.models.decoder import MLP, Decoder, Layer, Residual, block_plan
from octavo_engine.models.raw_config import RawConfig
from octavo_engine.models.rope_config import RopeConfig, rope_config
from octavo_kernels.batch import AttentionBatch, PagedKVCache
from octavo_kernels.step import Activation, DecoderLayerPlan


@dataclass(frozen=True, slots=True)
class GemmaLayer:
    """The output of each block is normed once more before it joins the residual stream."""

    input_norm: RMSNorm
    attention: Attention
    post_attention_norm: RMSNorm
    pre_feedforward_norm: RMSNorm
    mlp: MLP
    post_feedforward_norm: RMSNorm

    def __call__(
        self, x: torch.Tensor, residual: Residual, batch: AttentionBatch, cache: PagedKVCache | None
    ) -> tuple[torch.Tensor, Residual]:
        x, residual = self.input_norm.add(x, residual)
        x = self.post_attention_norm(self.attention(x, batch, cache))
        x, residual = self.pre_feedforward_norm.add(x, residual)
        return self.post_feedforward_norm(self.mlp(x)), residual


class Gemma2ForCausalLM(Decoder):
    """Soft caps on attention scores and logits; every other layer has a window."""

    @classmethod
    def configure(cls, raw: RawConfig, architecture: str) -> ModelConfig:
        window = raw.integer("sliding_window", 4096)
        layers = sliding_layers(raw, window, [index % 2 == 0 for index in range(num_layers(raw))])
        return _gemma_config(
            raw,
            architecture,
            layers,
            attention_soft_cap=raw.number("attn_logit_softcapping", 0.0, low=0.0),
            final_soft_cap=raw.number("final_logit_softcapping", 0.0, low=0.0),
        )

    def make_layer(self, weights: WeightLoader, index: int) -> GemmaLayer:
        prefix, layer = f"model.layers.{index}", self.config.layers[index]
        return GemmaLayer(
            self.make_norm(weights, f"{prefix}.input_layernorm"),
            self.make_attention(weights, f"{prefix}.self_attn", layer),
            self.make_norm(weights, f"{prefix}.post_attention_layernorm"),
            self.make_norm(weights, f"{prefix}.pre_feedforward_layernorm"),
            self.make_mlp(weights, f"{prefix}.mlp", layer),
            self.make_norm(weights, f"{prefix}.post_feedforward_layernorm"),
        )

    def layer_plan(self, layer: Layer) -> DecoderLayerPlan | None:
        if not isinstance(layer, GemmaLayer):
            return None
        plan = block_plan(layer.input_norm, layer.attention, layer.pre_feedforward_norm, layer.mlp)
        if plan is None:
            return None
        out_norms = (layer.post_attention_norm.weight, layer.post_feedforward_norm.weight)
        return replace(plan, attention_out_norm=out_norms[0], mlp_out_norm=out_norms[1])


class Gemma3ForCausalLM(Gemma2ForCausalLM):
    """Normed query and key heads, no soft caps; windowed layers have a rope of their own, every sixth sees all."""

    @classmethod
    def configure(cls, raw: RawConfig, architecture: str) -> ModelConfig:
        if raw.has("use_bidirectional_attention") and raw.flag("use_bidirectional_attention"):
            raise raw.wrong("use_bidirectional_attention", "false: a text model that generates")
        window, pattern = raw.integer("sliding_window", 4096), raw.integer("sliding_window_pattern", 6)
        is_local = [bool((index + 1) % pattern) for index in range(num_layers(raw))]
        local, full = _ropes(raw)
        layers = sliding_layers(raw, window, is_local, full_rope=full, local_rope=local)
        return _gemma_config(
            raw,
            architecture,
            layers,
            qk_norm=True,
            attention_soft_cap=raw.number("attn_logit_softcapping", 0.0, low=0.0),
            final_soft_cap=raw.number("final_logit_softcapping", 0.0, low=0.0),
        )


def _gemma_config(
    raw: RawConfig, architecture: str, layers: tuple[LayerConfig, ...], **particular: object
) -> ModelConfig:
    return decoder_config(
        raw,
        architecture,
        layers,
        tie_by_default=True,
        attention_scale=raw.number("query_pre_attn_scalar", 256.0, low=1.0) ** -0.5,
        default_activation=Activation.GELU,
        embedding_scale=raw.integer("hidden_size") ** 0.5,
        norm_offset=1.0,
        **particular,
    )


def _ropes(raw: RawConfig) -> tuple[RopeConfig, RopeConfig]:
    """(of windowed layers, of full ones), in the present form or as `rope_local_base_freq` beside `rope_theta`."""
    ropes = raw.section("rope_parameters")
    if ropes is not None and ropes.has("full_attention"):
        return rope_config(raw, ropes.section("sliding_attention")), rope_config(raw, ropes.section("full_attention"))
    theta = raw.number("rope_local_base_freq", 10_000.0)
    local = RawConfig({"rope_theta": theta, "rope_type": "default"}, raw.origin)
    return rope_config(raw, local), rope_config(raw, default_theta=1e6)
