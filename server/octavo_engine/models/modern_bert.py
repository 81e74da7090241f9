"""ModernBERT: an encoder with rotary positions, gated MLPs, and layers that see a window beside ones that see all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional

from octavo_engine.errors import InvalidRequestError
from octavo_engine.layers.attention import Attention
from octavo_engine.layers.classifier import Classifier
from octavo_engine.layers.embedding import Embedding
from octavo_engine.layers.linear import Linear
from octavo_engine.layers.norm import LayerNorm
from octavo_engine.layers.rope import cos_sin_table
from octavo_engine.loader.weights import WeightLoader
from octavo_engine.models.classification import SUFFIX, activation, labels
from octavo_engine.models.config import ModelConfig, num_layers, sliding_layers
from octavo_engine.models.interface import Model
from octavo_engine.models.raw_config import RawConfig
from octavo_engine.models.rope_config import RopeConfig, head_layout, rope_config
from octavo_engine.runner.pooling import Pooling, PoolingMethod
from octavo_kernels.batch import AttentionBatch, PagedKVCache
from octavo_kernels.step import DecoderPlan


@dataclass(frozen=True, slots=True)
class ModernBertLayer:
    """Pre-norm; the first layer has no norm before its attention."""

    attention_norm: LayerNorm | None
    attention: Attention
    mlp_norm: LayerNorm
    gate_up: Linear
    down: Linear

    def __call__(self, x: torch.Tensor, batch: AttentionBatch) -> torch.Tensor:
        normed = x if self.attention_norm is None else self.attention_norm(x)
        x = x + self.attention(normed, batch, None)
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(functional.gelu(gate) * up)


class ModernBertModel(Model):
    """Embeds or classifies, never generates."""

    can_generate = False
    ignored_tensors: tuple[str, ...] = ("decoder.",)

    def __init__(self, config: ModelConfig, weights: WeightLoader, max_positions: int) -> None:
        self.config = config
        raw = weights.checkpoint.config
        self._norm_bias = raw.flag("norm_bias", False)
        classifies = config.architecture.endswith(SUFFIX)
        start = "model." if any(name.startswith("model.layers.") for name in weights.checkpoint.names) else ""
        table = weights.rows(f"{start}embeddings.tok_embeddings.weight", config.vocab_size, config.hidden_size)
        self._embedding = Embedding(table, weights.dtype)
        self._norm = self._layer_norm(weights, f"{start}embeddings.norm")
        self._tables = {
            rope: cos_sin_table(rope, max_positions, weights.device)
            for rope in {layer.rope for layer in config.layers if layer.rope is not None}
        }
        self._layers = tuple(
            self._make_layer(weights, f"{start}layers.{index}", index) for index in range(config.num_layers)
        )
        self._final_norm = self._layer_norm(weights, f"{start}final_norm")
        if classifies:
            self.classifier = self._make_classifier(weights, raw)
        else:
            self.ignored_tensors = ("decoder.", "head.")

    @classmethod
    def configure(cls, raw: RawConfig, architecture: str) -> ModelConfig:
        if raw.text("hidden_activation", "gelu") != "gelu":
            raise raw.wrong("hidden_activation", "gelu")
        heads, _, head_dim = head_layout(raw)
        every = raw.integer("global_attn_every_n_layers", 3)
        local, full = _ropes(raw)
        window = raw.integer("local_attention", 128) // 2 + 1  # to each side, the token itself included
        is_local = [bool(index % every) for index in range(num_layers(raw))]
        return ModelConfig(
            architecture=architecture,
            hidden_size=raw.integer("hidden_size"),
            intermediate_size=raw.integer("intermediate_size"),
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=head_dim,
            vocab_size=raw.integer("vocab_size"),
            max_position_embeddings=raw.integer("max_position_embeddings"),
            norm_eps=raw.number("norm_eps", 1e-5, low=0.0, high=1.0),
            attention_scale=head_dim**-0.5,
            layers=sliding_layers(raw, window, is_local, full_rope=full, local_rope=local),
            tie_word_embeddings=True,
            qkv_bias=raw.flag("attention_bias", False),
            mlp_bias=raw.flag("mlp_bias", False),
        )

    def forward(
        self, token_ids: torch.Tensor, batch: AttentionBatch, caches: Sequence[PagedKVCache | None]
    ) -> torch.Tensor:
        x = self._norm(self._embedding(token_ids))
        for layer in self._layers:
            x = layer(x, batch)
        return self._final_norm(x)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        raise InvalidRequestError(f"{self.config.architecture} is an encoder and cannot generate text", "model")

    def plan(self) -> DecoderPlan | None:
        return None

    def _make_layer(self, weights: WeightLoader, prefix: str, index: int) -> ModernBertLayer:
        config, hidden, layer = self.config, self.config.hidden_size, self.config.layers[index]
        attention = Attention(
            weights.linear({f"{prefix}.attn.Wqkv": 3 * hidden}, hidden, bias=config.qkv_bias),
            weights.linear({f"{prefix}.attn.Wo": hidden}, hidden, bias=config.qkv_bias),
            config.num_heads,
            config.num_heads,
            config.head_dim,
            config.attention_scale,
            None if layer.rope is None else self._tables[layer.rope],
            sliding_window=layer.sliding_window,
            causal=False,
        )
        width = config.intermediate_size
        return ModernBertLayer(
            self._layer_norm(weights, f"{prefix}.attn_norm") if index else None,
            attention,
            self._layer_norm(weights, f"{prefix}.mlp_norm"),
            weights.linear({f"{prefix}.mlp.Wi": 2 * width}, hidden, bias=config.mlp_bias),
            weights.linear({f"{prefix}.mlp.Wo": hidden}, width, bias=config.mlp_bias),
        )

    def _make_classifier(self, weights: WeightLoader, raw: RawConfig) -> Classifier:
        hidden, count = self.config.hidden_size, len(labels(raw))
        pooled = {"cls": PoolingMethod.CLS, "mean": PoolingMethod.MEAN}.get(raw.text("classifier_pooling", "cls"))
        if pooled is None or raw.text("classifier_activation", "gelu") != "gelu":
            raise raw.wrong("classifier_pooling", "cls or mean, with a gelu head")
        steps = (
            weights.linear({"head.dense": hidden}, hidden, bias=raw.flag("classifier_bias", False), exact=True),
            partial(functional.gelu),
            self._layer_norm(weights, "head.norm"),
            weights.linear({"classifier": count}, hidden, bias=True, exact=True),
        )
        return Classifier(Pooling(pooled, normalize=False), steps, activation(raw))

    def _layer_norm(self, weights: WeightLoader, prefix: str) -> LayerNorm:
        shape = (self.config.hidden_size,)
        bias = weights.tensor(f"{prefix}.bias", shape) if self._norm_bias else None
        return LayerNorm(weights.tensor(f"{prefix}.weight", shape), bias, self.config.norm_eps)


def _ropes(raw: RawConfig) -> tuple[RopeConfig, RopeConfig]:
    """(of layers with a window, of those that see all), in the present form or the former one."""
    ropes = raw.section("rope_parameters") or RawConfig({}, raw.origin)
    found = []
    for kind, key, theta in (
        ("sliding_attention", "local_rope_theta", 10_000.0),
        ("full_attention", "global_rope_theta", 160_000.0),
    ):
        section = ropes.section(kind) or RawConfig({"rope_theta": raw.number(key, theta)}, raw.origin)
        found.append(rope_config(raw, section))
    return found[0], found[1]
