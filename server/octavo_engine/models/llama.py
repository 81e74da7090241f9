"""Llama 2 and 3, SmolLM2, TinyLlama and the many models that share their architecture."""

from __future__ import annotations

from octavo_engine.models.config import ModelConfig, decoder_config, uniform_layers
from octavo_engine.models.decoder import Decoder
from octavo_engine.models.raw_config import RawConfig


class LlamaForCausalLM(Decoder):
    """The plain decoder: grouped-query attention, rotary positions, SwiGLU, RMSNorm before each block."""

    @classmethod
    def configure(cls, raw: RawConfig, architecture: str) -> ModelConfig:
        bias = raw.flag("attention_bias", False)
        return decoder_config(
            raw,
            architecture,
            uniform_layers(raw),
            qkv_bias=bias,
            output_bias=bias,
            mlp_bias=raw.flag("mlp_bias", False),
        )
