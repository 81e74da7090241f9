"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini: Llama with fused projections in the file and long-rope."""

from __future__ import annotations

from octavo_engine.models.config import ModelConfig, decoder_config, uniform_layers
from octavo_engine.models.decoder import Decoder
from octavo_engine.models.raw_config import RawConfig
from octavo_engine.parallel.sections import Rows


class Phi3ForCausalLM(Decoder):
    """Query, key and value, and gate and up, are one matrix each in the checkpoint."""

    @classmethod
    def configure(cls, raw: RawConfig, architecture: str) -> ModelConfig:
        window = raw.integer("sliding_window", 0, low=0)
        return decoder_config(raw, architecture, uniform_layers(raw, sliding_window=window))

    def qkv_outputs(self, prefix: str) -> dict[str, Rows]:
        return {f"{prefix}.qkv_proj": sum(super().qkv_outputs(prefix).values(), ())}

    def gate_up_outputs(self, prefix: str) -> dict[str, Rows]:
        return {f"{prefix}.gate_up_proj": sum(super().gate_up_outputs(prefix).values(), ())}
