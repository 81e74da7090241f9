"""DeepSeek V2 and V3: latent attention, a dense start, then many experts beside some that all tokens share."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from octavo_engine.errors import ConfigError
from octavo_engine.layers.latent_attention import LatentAttention
from octavo_engine.layers.linear import Linear
from octavo_engine.layers.mlp import GATED, GatedMLP
from octavo_engine.layers.norm import RMSNorm
from octavo_engine.loader.weights import WeightLoader
from octavo_engine.models.config import LayerConfig, ModelConfig, MoEConfig, decoder_config, num_layers, uniform_layers
from octavo_engine.models.decoder import DecoderLayer
from octavo_engine.models.moe_decoder import MoEDecoder
from octavo_engine.models.raw_config import RawConfig
from octavo_engine.parallel.sections import Section
from octavo_engine.runner.kv_cache import CacheLayout


class _CompressedQuery:
    """Down, norm, up."""

    def __init__(self, down: Linear, norm: RMSNorm, up: Linear) -> None:
        self._down, self._norm, self._up = down, norm, up

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._up(self._norm(self._down(x)))


class DeepseekV2ForCausalLM(MoEDecoder):
    """Softmax router; groups of experts are ranked by their best."""

    def __init__(self, config: ModelConfig, weights: WeightLoader, max_positions: int) -> None:
        raw = weights.checkpoint.config
        self._latent, self._query_rank = raw.integer("kv_lora_rank"), raw.integer("q_lora_rank", 0, low=0)
        self._plain, self._value = raw.integer("qk_nope_head_dim"), raw.integer("v_head_dim")
        self._pairs = raw.flag("rope_interleave", True)
        self._shared_size = raw.integer("moe_intermediate_size") * raw.integer("n_shared_experts", 0, low=0)
        for index in range(raw.integer("num_nextn_predict_layers", 0, low=0)):  # they guess further tokens
            weights.leave(f"model.layers.{config.num_layers + index}.")
        super().__init__(config, weights, max_positions)

    @classmethod
    def configure(cls, raw: RawConfig, architecture: str) -> ModelConfig:
        # What turns of a head is all that `head_dim` means to the rotary settings.
        raw = RawConfig({**raw.values, "head_dim": raw.integer("qk_rope_head_dim")}, raw.origin)
        scale = (raw.integer("qk_nope_head_dim") + raw.integer("qk_rope_head_dim")) ** -0.5 * _sharpening(raw) ** 2
        if raw.flag("attention_bias", False):
            raise raw.wrong("attention_bias", "false")
        if raw.integer("moe_layer_freq", 1) != 1:
            raise raw.wrong("moe_layer_freq", "1")
        dense, moe = raw.integer("first_k_dense_replace", 0, low=0), cls._experts(raw)
        layers = tuple(
            layer if index < dense else replace(layer, moe=moe) for index, layer in enumerate(uniform_layers(raw))
        )
        return decoder_config(raw, architecture, layers[: num_layers(raw)], attention_scale=scale)

    @classmethod
    def _experts(cls, raw: RawConfig) -> MoEConfig:
        method = raw.text("topk_method", "greedy")
        if method not in ("greedy", "group_limited_greedy") or raw.flag("norm_topk_prob", False):
            raise raw.wrong("topk_method", "greedy or group_limited_greedy, without norm_topk_prob")
        grouped = method == "group_limited_greedy"
        return replace(
            _moe_config(raw),
            num_groups=raw.integer("n_group", 1) if grouped else 1,
            top_groups=raw.integer("topk_group", 1) if grouped else 1,
            groups_by_best=True,
        )

    @property
    def cache_layout(self) -> CacheLayout:
        """One vector a token, the same for all heads and on all ranks of a stage."""
        return CacheLayout(len(self.layers), 1, self._latent + self.config.head_dim, 0)

    def make_layer(self, weights: WeightLoader, index: int) -> DecoderLayer:
        prefix, layer = f"model.layers.{index}", self.config.layers[index]
        return DecoderLayer(
            self.make_norm(weights, f"{prefix}.input_layernorm"),
            self._make_latent_attention(weights, f"{prefix}.self_attn", layer),
            self.make_norm(weights, f"{prefix}.post_attention_layernorm"),
            self.make_mlp(weights, f"{prefix}.mlp", layer),
        )

    def _make_latent_attention(self, weights: WeightLoader, prefix: str, layer: LayerConfig) -> LatentAttention:
        config, hidden, rope = self.config, self.config.hidden_size, self.config.head_dim
        heads, _ = self.rank.heads(config.num_heads, config.num_heads)
        compress = {f"{prefix}.kv_a_proj_with_mqa": self._latent + rope}
        up = weights.dense_matrix(
            f"{prefix}.kv_b_proj.weight", (heads * (self._plain + self._value),), self._latent
        ).view(heads.length, self._plain + self._value, self._latent)
        return LatentAttention(
            self._make_query(weights, prefix, heads),
            weights.linear(compress, hidden),
            RMSNorm(weights.vector(f"{prefix}.kv_a_layernorm.weight", self._latent), config.norm_eps),
            up[:, : self._plain].contiguous(),
            up[:, self._plain :].contiguous(),
            weights.linear({f"{prefix}.o_proj": hidden}, heads * self._value),
            rope,
            config.attention_scale,
            self.rope_table(layer.rope, weights.device),
            self._pairs,
        )

    def _make_query(self, weights: WeightLoader, prefix: str, heads: Section) -> Linear | _CompressedQuery:
        hidden, rank = self.config.hidden_size, self._query_rank
        rows = (heads * (self._plain + self.config.head_dim),)
        if not rank:
            return weights.linear({f"{prefix}.q_proj": rows}, hidden)
        return _CompressedQuery(
            weights.linear({f"{prefix}.q_a_proj": rank}, hidden),
            RMSNorm(weights.vector(f"{prefix}.q_a_layernorm.weight", rank), self.config.norm_eps),
            weights.linear({f"{prefix}.q_b_proj": rows}, rank),
        )

    def make_shared_expert(self, weights: WeightLoader, prefix: str) -> GatedMLP | None:
        if not self._shared_size:
            return None
        hidden, width, inner = self.config.hidden_size, self.rank.share(self._shared_size), f"{prefix}.shared_experts"
        return GatedMLP(
            weights.linear({f"{inner}.gate_proj": (width,), f"{inner}.up_proj": (width,)}, hidden),
            weights.linear({f"{inner}.down_proj": hidden}, width, reduce=False),
            GATED[self.config.activation],
        )


class DeepseekV3ForCausalLM(DeepseekV2ForCausalLM):
    """Sigmoid router whose learned bias takes part in the choice only; groups are ranked by their two best."""

    @classmethod
    def _experts(cls, raw: RawConfig) -> MoEConfig:
        if raw.text("scoring_func", "sigmoid") != "sigmoid" or raw.text("topk_method", "noaux_tc") != "noaux_tc":
            raise raw.wrong("topk_method", "noaux_tc, with sigmoid scores")
        return replace(
            _moe_config(raw),
            renormalize=raw.flag("norm_topk_prob", True),
            sigmoid=True,
            correction_bias="gate.e_score_correction_bias",
            num_groups=raw.integer("n_group", 1),
            top_groups=raw.integer("topk_group", 1),
        )


def _moe_config(raw: RawConfig) -> MoEConfig:
    count = raw.integer("n_routed_experts", high=4096)
    top_k = raw.integer("num_experts_per_tok", high=count)
    groups = raw.integer("n_group", 1)
    if count % groups or raw.integer("topk_group", 1) > groups:
        raise ConfigError(f"{raw.origin}: n_group: {groups} groups do not divide {count} experts")
    width = raw.integer("moe_intermediate_size")
    return MoEConfig(count, top_k, width, False, scale=raw.number("routed_scaling_factor", 1.0))


def _sharpening(raw: RawConfig) -> float:
    """How much YaRN sharpens these models' scores, beside what it does to the rotation."""
    rope = raw.section("rope_parameters") or raw.section("rope_scaling")
    if rope is None or rope.text("rope_type", rope.text("type", "default")) == "default":
        return 1.0
    weight, factor = rope.number("mscale_all_dim", 0.0, low=0.0, high=100.0), rope.number("factor", 1.0, low=1e-3)
    return 0.1 * weight * math.log(factor) + 1.0 if weight and factor > 1 else 1.0
