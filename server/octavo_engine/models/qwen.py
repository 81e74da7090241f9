"""Qwen2 and 2.5 (biased query, key and value), Qwen3 (normed query and key heads), and their mixtures of experts."""

from __future__ import annotations

from dataclasses import replace

from octavo_engine.layers.mlp import GATED, GatedMLP
from octavo_engine.layers.moe import SharedExpert
from octavo_engine.loader.weights import WeightLoader
from octavo_engine.models.config import LayerConfig, ModelConfig, decoder_config, num_layers, sliding_layers
from octavo_engine.models.decoder import Decoder
from octavo_engine.models.moe_decoder import MoEDecoder, moe_config
from octavo_engine.models.raw_config import RawConfig


class Qwen2ForCausalLM(Decoder):
    """Biases on query, key and value; layers from `max_window_layers` on may have a window."""

    @classmethod
    def configure(cls, raw: RawConfig, architecture: str) -> ModelConfig:
        return decoder_config(raw, architecture, _layers(raw), qkv_bias=True)


class Qwen3ForCausalLM(Decoder):
    """RMSNorm on each query and key head before the rotation, no biases."""

    @classmethod
    def configure(cls, raw: RawConfig, architecture: str) -> ModelConfig:
        bias = raw.flag("attention_bias", False)
        return decoder_config(raw, architecture, _layers(raw), qkv_bias=bias, output_bias=bias, qk_norm=True)


class Qwen3MoeForCausalLM(MoEDecoder):
    """Qwen3 with experts in all layers that `decoder_sparse_step` and `mlp_only_layers` leave."""

    @classmethod
    def configure(cls, raw: RawConfig, architecture: str) -> ModelConfig:
        return _with_experts(raw, Qwen3ForCausalLM.configure(raw, architecture))


class Qwen2MoeForCausalLM(MoEDecoder):
    """Qwen2 with experts and one more that all tokens share behind a sigmoid gate."""

    shared_size: int

    def __init__(self, config: ModelConfig, weights: WeightLoader, max_positions: int) -> None:
        self.shared_size = weights.checkpoint.config.integer("shared_expert_intermediate_size")
        super().__init__(config, weights, max_positions)

    @classmethod
    def configure(cls, raw: RawConfig, architecture: str) -> ModelConfig:
        return _with_experts(raw, Qwen2ForCausalLM.configure(raw, architecture))

    def make_shared_expert(self, weights: WeightLoader, prefix: str) -> SharedExpert:
        hidden, width, inner = self.config.hidden_size, self.rank.share(self.shared_size), f"{prefix}.shared_expert"
        mlp = GatedMLP(
            weights.linear({f"{inner}.gate_proj": (width,), f"{inner}.up_proj": (width,)}, hidden),
            weights.linear({f"{inner}.down_proj": hidden}, width, reduce=False),
            GATED[self.config.activation],
        )
        return SharedExpert(mlp, weights.linear({f"{prefix}.shared_expert_gate": 1}, hidden, exact=True))


def _layers(raw: RawConfig) -> tuple[LayerConfig, ...]:
    window = raw.integer("sliding_window", 0, low=0) if raw.flag("use_sliding_window", False) else 0
    first = raw.integer("max_window_layers", 0, low=0)
    return sliding_layers(raw, window, [index >= first for index in range(num_layers(raw))])


def _with_experts(raw: RawConfig, plain: ModelConfig) -> ModelConfig:
    moe = moe_config(raw, "moe_intermediate_size", renormalize=raw.flag("norm_topk_prob", False))
    step = raw.integer("decoder_sparse_step", 1)
    dense = {int(index) for index in raw.numbers("mlp_only_layers", ())}
    layers = tuple(
        replace(layer, moe=None if index in dense or (index + 1) % step else moe)
        for index, layer in enumerate(plain.layers)
    )
    return replace(plain, layers=layers)
