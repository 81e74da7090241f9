"""Mistral and Mixtral: Llama with a sliding window; Mixtral's MLPs are experts."""

from __future__ import annotations

from dataclasses import replace

from octavo_engine.models.config import ModelConfig, decoder_config, uniform_layers
from octavo_engine.models.decoder import Decoder
from octavo_engine.models.moe_decoder import MoEDecoder, moe_config
from octavo_engine.models.raw_config import RawConfig


class MistralForCausalLM(Decoder):
    """Every layer sees at most `sliding_window` tokens back, where the configuration names one."""

    @classmethod
    def configure(cls, raw: RawConfig, architecture: str) -> ModelConfig:
        window = raw.integer("sliding_window", 0, low=0)
        return decoder_config(raw, architecture, uniform_layers(raw, sliding_window=window))


class MixtralForCausalLM(MoEDecoder):
    """Two of eight experts a token, weighed by a softmax over the two."""

    expert_names = ("w1", "w3", "w2")
    mlp_name = "block_sparse_moe"

    @classmethod
    def configure(cls, raw: RawConfig, architecture: str) -> ModelConfig:
        plain = MistralForCausalLM.configure(raw, architecture)
        moe = moe_config(raw, "intermediate_size", renormalize=True)
        return replace(plain, layers=tuple(replace(layer, moe=moe) for layer in plain.layers))
