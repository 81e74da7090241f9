"""What a token of a model costs, for the account of how near steps come to the device's limit."""

from __future__ import annotations

import msgspec

from octavo_engine.messages import ModelInfo
from octavo_engine.models.config import ModelConfig

_MATRICES = 3  # of a gated expert: gate, up, down


def with_costs(info: ModelInfo, config: ModelConfig, *, can_generate: bool) -> ModelInfo:
    """`info` with the parts of its parameters that not every token passes; each rank has its part of them."""
    mixtures = [layer.moe for layer in config.layers if layer.moe is not None]
    experts = sum(_MATRICES * moe.num_experts * moe.intermediate_size * config.hidden_size for moe in mixtures)
    head = config.vocab_size * config.hidden_size if can_generate else 0
    return msgspec.structs.replace(
        info,
        head_parameters=head // info.num_ranks,
        expert_parameters=experts // info.num_ranks,
        expert_share=mixtures[0].top_k / mixtures[0].num_experts if mixtures else 1.0,
        attention_operations=4 * config.num_heads * config.head_dim * config.num_layers // info.num_ranks,
    )
