"""BERT-family encoders that embed or classify: MiniLM, E5, BGE, GTE (small and base); RoBERTa and XLM-R likewise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from octavo_engine.errors import InvalidRequestError
from octavo_engine.layers.attention import Attention
from octavo_engine.layers.classifier import Classifier, Step
from octavo_engine.layers.embedding import Embedding
from octavo_engine.layers.linear import Linear
from octavo_engine.layers.norm import LayerNorm
from octavo_engine.loader.weights import WeightLoader
from octavo_engine.models.classification import SUFFIX, activation, labels
from octavo_engine.models.config import LayerConfig, ModelConfig, num_layers
from octavo_engine.models.interface import Model
from octavo_engine.models.raw_config import RawConfig
from octavo_engine.models.rope_config import head_layout
from octavo_engine.runner.pair_batch import PairBatch
from octavo_engine.runner.pooling import Pooling, PoolingMethod
from octavo_kernels.batch import AttentionBatch, PagedKVCache
from octavo_kernels.step import DecoderPlan


@dataclass(frozen=True, slots=True)
class EncoderLayer:
    """Post-norm: each block's output joins its input and the sum is normed."""

    attention: Attention
    attention_norm: LayerNorm
    up: Linear
    down: Linear
    output_norm: LayerNorm

    def __call__(self, x: torch.Tensor, batch: AttentionBatch) -> torch.Tensor:
        x = self.attention_norm(x + self.attention(x, batch, None))
        return self.output_norm(x + self.down(functional.gelu(self.up(x))))


class BertModel(Model):
    """Bidirectional encoder with learned positions; embeds or classifies, never generates."""

    can_generate = False
    first_position = 0

    def __init__(self, config: ModelConfig, weights: WeightLoader, max_positions: int) -> None:
        self.config = config
        prefix = self._find_prefix(weights)
        words, hidden = f"{prefix}embeddings.word_embeddings.weight", config.hidden_size
        self._words = Embedding(weights.rows(words, config.vocab_size, hidden), weights.dtype)
        longest = config.max_position_embeddings + self.first_position
        self._positions = self._table(weights, f"{prefix}embeddings.position_embeddings.weight", longest)
        kinds = weights.checkpoint.config.integer("type_vocab_size", 2)
        self._token_types = self._table(weights, f"{prefix}embeddings.token_type_embeddings.weight", kinds)
        self.has_token_types = kinds > 1
        self._norm = self._layer_norm(weights, f"{prefix}embeddings.LayerNorm")
        self._layers = tuple(
            self._make_layer(weights, f"{prefix}encoder.layer.{index}") for index in range(config.num_layers)
        )
        if config.architecture.endswith(SUFFIX):
            raw = weights.checkpoint.config
            steps = self._head(weights, prefix, len(labels(raw)))
            self.classifier = Classifier(Pooling(PoolingMethod.CLS, normalize=False), steps, activation(raw))
        else:
            self.ignored_tensors = ("pooler.", "cls.", "lm_head.")  # heads of pre-training

    @classmethod
    def configure(cls, raw: RawConfig, architecture: str) -> ModelConfig:
        if raw.text("hidden_act", "gelu") != "gelu":
            raise raw.wrong("hidden_act", "gelu")
        if raw.text("position_embedding_type", "absolute") != "absolute":
            raise raw.wrong("position_embedding_type", "absolute")
        heads, _, head_dim = head_layout(raw)
        return ModelConfig(
            architecture=architecture,
            hidden_size=raw.integer("hidden_size"),
            intermediate_size=raw.integer("intermediate_size"),
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=head_dim,
            vocab_size=raw.integer("vocab_size"),
            max_position_embeddings=raw.integer("max_position_embeddings") - cls.first_position,
            norm_eps=raw.number("layer_norm_eps", 1e-12, low=0.0, high=1.0),
            attention_scale=head_dim**-0.5,
            layers=(LayerConfig(0, None),) * num_layers(raw),
            tie_word_embeddings=True,
        )

    def forward(
        self, token_ids: torch.Tensor, batch: AttentionBatch, caches: Sequence[PagedKVCache | None]
    ) -> torch.Tensor:
        types = batch.token_types if isinstance(batch, PairBatch) else None
        kinds = self._token_types[0] if types is None else self._token_types[types]
        x = self._norm(self._words(token_ids) + self._positions[batch.positions + self.first_position] + kinds)
        for layer in self._layers:
            x = layer(x, batch)
        return x

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        raise InvalidRequestError(f"{self.config.architecture} is an encoder and cannot generate text", "model")

    def plan(self) -> DecoderPlan | None:
        return None

    def _head(self, weights: WeightLoader, prefix: str, num_labels: int) -> tuple[Step, ...]:
        """From the first token's state to the labels' numbers."""
        hidden = self.config.hidden_size
        return (
            weights.linear({f"{prefix}pooler.dense": hidden}, hidden, bias=True, exact=True),
            torch.tanh,
            weights.linear({"classifier": num_labels}, hidden, bias=True, exact=True),
        )

    def _make_layer(self, weights: WeightLoader, prefix: str) -> EncoderLayer:
        config, hidden = self.config, self.config.hidden_size
        inner = f"{prefix}.attention"
        attention = Attention(
            weights.linear({f"{inner}.self.{n}": hidden for n in ("query", "key", "value")}, hidden, bias=True),
            weights.linear({f"{inner}.output.dense": hidden}, hidden, bias=True),
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            config.attention_scale,
            causal=False,
        )
        return EncoderLayer(
            attention,
            self._layer_norm(weights, f"{inner}.output.LayerNorm"),
            weights.linear({f"{prefix}.intermediate.dense": config.intermediate_size}, hidden, bias=True),
            weights.linear({f"{prefix}.output.dense": hidden}, config.intermediate_size, bias=True),
            self._layer_norm(weights, f"{prefix}.output.LayerNorm"),
        )

    def _layer_norm(self, weights: WeightLoader, prefix: str) -> LayerNorm:
        shape = (self.config.hidden_size,)
        return LayerNorm(
            weights.tensor(f"{prefix}.weight", shape), weights.tensor(f"{prefix}.bias", shape), self.config.norm_eps
        )

    def _table(self, weights: WeightLoader, name: str, rows: int) -> torch.Tensor:
        return weights.tensor(name, (rows, self.config.hidden_size))

    def _find_prefix(self, weights: WeightLoader) -> str:
        """Checkpoints with a head put the encoder under its family's name."""
        ending = "embeddings.word_embeddings.weight"
        return next((name.removesuffix(ending) for name in weights.checkpoint.names if name.endswith(ending)), "")


class RobertaModel(BertModel):
    """BERT whose positions start behind the padding token's."""

    first_position = 2

    def _head(self, weights: WeightLoader, prefix: str, num_labels: int) -> tuple[Step, ...]:
        hidden = self.config.hidden_size
        return (
            weights.linear({"classifier.dense": hidden}, hidden, bias=True, exact=True),
            torch.tanh,
            weights.linear({"classifier.out_proj": num_labels}, hidden, bias=True, exact=True),
        )
