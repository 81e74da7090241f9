"""SmolLM3: Llama whose every fourth layer turns nothing (NoPE)."""

from __future__ import annotations

from dataclasses import replace

from octavo_engine.models.config import ModelConfig, decoder_config, num_layers, sliding_layers
from octavo_engine.models.decoder import Decoder
from octavo_engine.models.raw_config import RawConfig


class SmolLM3ForCausalLM(Decoder):
    """`no_rope_layers` holds a one for each layer with rotary positions; windows, if any, are on the others."""

    @classmethod
    def configure(cls, raw: RawConfig, architecture: str) -> ModelConfig:
        interval, count = raw.integer("no_rope_layer_interval", 4), num_layers(raw)
        turning = raw.numbers("no_rope_layers", tuple(float((index + 1) % interval != 0) for index in range(count)))
        if len(turning) != count:
            raise raw.wrong("no_rope_layers", f"a list of {count} zeros and ones")
        window = raw.integer("sliding_window", 0, low=0) if raw.flag("use_sliding_window", False) else 0
        layers = sliding_layers(raw, window, [not turns for turns in turning])
        layers = tuple(
            layer if turns else replace(layer, rope=None) for layer, turns in zip(layers, turning, strict=True)
        )
        bias = raw.flag("attention_bias", False)
        return decoder_config(
            raw,
            architecture,
            layers,
            tie_by_default=True,
            qkv_bias=bias,
            output_bias=bias,
            mlp_bias=raw.flag("mlp_bias", False),
        )
