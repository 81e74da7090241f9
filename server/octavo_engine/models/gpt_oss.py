"""gpt-oss: attention sinks, alternating windows, biased experts with a clamped SwiGLU, MXFP4 weights."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from octavo_engine.layers.attention import Attention
from octavo_engine.layers.linear import Linear
from octavo_engine.layers.mlp import GatedActivation, GatedMLP
from octavo_engine.loader.cutting import cut, cut_vector
from octavo_engine.loader.weights import WeightLoader
from octavo_engine.models.config import LayerConfig, ModelConfig, MoEConfig, decoder_config, num_layers, sliding_layers
from octavo_engine.models.moe_decoder import MoEDecoder, moe_config
from octavo_engine.models.raw_config import RawConfig
from octavo_engine.parallel.sections import Section, whole
from octavo_kernels import ops
from octavo_kernels.gguf_types import GGMLType
from octavo_kernels.weights import GGUFWeight, Weight

ALPHA, LIMIT = 1.702, 7.0


class GptOssForCausalLM(MoEDecoder):
    """Every head has a learned logit that takes part in the softmax and attends to nothing."""

    router_name = "router"
    moe_bias = True

    def __init__(self, config: ModelConfig, weights: WeightLoader, max_positions: int) -> None:
        raw = weights.checkpoint.config
        alpha, limit = raw.number("swiglu_alpha", ALPHA), raw.number("swiglu_limit", LIMIT)
        self._activation = partial(ops.clamped_swiglu_and_mul, alpha=alpha, limit=limit)
        super().__init__(config, weights, max_positions)

    @classmethod
    def configure(cls, raw: RawConfig, architecture: str) -> ModelConfig:
        window = raw.integer("sliding_window", 128)
        moe = moe_config(raw, "intermediate_size", renormalize=True)
        layers = sliding_layers(raw, window, [index % 2 == 0 for index in range(num_layers(raw))])
        bias = raw.flag("attention_bias", True)
        return decoder_config(
            raw,
            architecture,
            tuple(replace(layer, moe=moe) for layer in layers),
            qkv_bias=bias,
            output_bias=bias,
        )

    def make_attention(self, weights: WeightLoader, prefix: str, layer: LayerConfig) -> Attention:
        heads, _ = self.rank.heads(self.config.num_heads, self.config.num_kv_heads)
        sinks = weights.vector(f"{prefix}.sinks", self.config.num_heads)[heads.start : heads.stop]
        return replace(super().make_attention(weights, prefix, layer), sinks=sinks)

    def make_experts(self, weights: WeightLoader, prefix: str, moe: MoEConfig, held: Section) -> tuple[GatedMLP, ...]:
        if f"{prefix}.0.gate_proj.weight" in weights.checkpoint.names:  # GGUF: one matrix for each expert
            return super().make_experts(weights, prefix, moe, held)
        hidden, size = self.config.hidden_size, moe.intermediate_size
        width = self.rank.expert_width(size)
        gate_up = _read_experts(weights, f"{prefix}.gate_up_proj", moe.num_experts, 2 * size, hidden)
        gate_up_bias = weights.tensor(f"{prefix}.gate_up_proj_bias", (moe.num_experts, 2 * size))
        down = _read_experts(weights, f"{prefix}.down_proj", moe.num_experts, hidden, size)
        down_bias = weights.tensor(f"{prefix}.down_proj_bias", (moe.num_experts, hidden))
        adds_bias = width.is_whole or self.rank.tensor_rank == 0
        return tuple(
            GatedMLP(
                Linear(
                    (weights.pack(cut(_rows_apart(gate_up[e]), (width, width), whole(hidden), prefix)),),
                    cut_vector(_apart(gate_up_bias[e]), (width, width)),
                ),
                Linear(
                    (weights.pack(cut(down[e], (whole(hidden),), width, prefix)),), down_bias[e] if adds_bias else None
                ),
                self.expert_activation(),
            )
            for e in range(held.start, held.stop)
        )

    def expert_activation(self) -> GatedActivation:
        return self._activation


def _read_experts(weights: WeightLoader, name: str, count: int, rows: int, columns: int) -> list[Weight]:
    """One matrix [rows, columns] for each expert, from dense [count, columns, rows] or MXFP4 blocks and scales."""
    if f"{name}_blocks" not in weights.checkpoint.names:
        return [expert.t().contiguous() for expert in weights.dense(name, (count, columns, rows))]
    blocks = weights.raw(f"{name}_blocks", (count, rows, columns // 32, 16), torch.uint8)
    scales = weights.raw(f"{name}_scales", (count, rows, columns // 32), torch.uint8)
    return [GGUFWeight(_as_ggml(b, s), GGMLType.MXFP4, columns) for b, s in zip(blocks, scales, strict=True)]


def _as_ggml(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """MXFP4 with neighbours in a byte -> GGML's blocks: the scale, then 16 bytes of one value of each half.

    blocks: [rows, columns / 32, 16]; scales: [rows, columns / 32] -> [rows, columns / 32 * 17], all uint8.
    """
    codes = torch.stack((blocks & 0x0F, blocks >> 4), dim=-1).flatten(2)
    packed = codes[..., :16] | (codes[..., 16:] << 4)
    return torch.cat((scales.unsqueeze(-1), packed), dim=-1).flatten(1)


def _rows_apart(weight: Weight) -> Weight:
    """Gate rows, then up rows, from rows that alternate."""
    if isinstance(weight, GGUFWeight):
        return GGUFWeight(_apart(weight.data), weight.ggml_type, weight.in_features)
    assert isinstance(weight, torch.Tensor)  # noqa: S101 (the only other form `_read_experts` returns)
    return _apart(weight)


def _apart(x: torch.Tensor) -> torch.Tensor:
    return torch.cat((x[0::2], x[1::2]))
