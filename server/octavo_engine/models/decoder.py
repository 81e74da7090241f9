"""The decoder most families share: norm, attention, norm, MLP, a residual around both.

A family subclasses `Decoder` and overrides what is particular to it: `configure` (which settings its files hold),
`make_mlp`, `make_attention`, or the layer itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from octavo_engine.errors import InvalidRequestError
from octavo_engine.layers.attention import Attention
from octavo_engine.layers.classifier import Classifier
from octavo_engine.layers.embedding import Embedding, LMHead
from octavo_engine.layers.fused_moe import FusedMoE
from octavo_engine.layers.latent_attention import LatentAttention
from octavo_engine.layers.linear import Linear
from octavo_engine.layers.mlp import GATED, GatedMLP
from octavo_engine.layers.moe import MoE
from octavo_engine.layers.norm import RMSNorm
from octavo_engine.layers.rope import cos_sin_table
from octavo_engine.loader.weights import WeightLoader
from octavo_engine.models.classification import SUFFIX, activation, labels
from octavo_engine.models.config import LayerConfig, ModelConfig
from octavo_engine.models.interface import Model
from octavo_engine.models.rope_config import RopeConfig
from octavo_engine.parallel.sections import Rows
from octavo_engine.runner.kv_cache import CacheLayout
from octavo_engine.runner.pooling import Pooling, PoolingMethod
from octavo_kernels.batch import AttentionBatch, PagedKVCache
from octavo_kernels.step import DecoderLayerPlan, DecoderPlan

Residual = torch.Tensor | None
MLP = GatedMLP | MoE | FusedMoE


class Layer(Protocol):
    """One layer: takes its input and the residual stream beside it, returns both."""

    def __call__(
        self, x: torch.Tensor, residual: Residual, batch: AttentionBatch, cache: PagedKVCache | None
    ) -> tuple[torch.Tensor, Residual]: ...


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """Pre-norm layer; the residual sum is folded into the norm that follows it."""

    input_norm: RMSNorm
    attention: Attention | LatentAttention
    post_attention_norm: RMSNorm
    mlp: MLP

    def __call__(
        self, x: torch.Tensor, residual: Residual, batch: AttentionBatch, cache: PagedKVCache | None
    ) -> tuple[torch.Tensor, Residual]:
        x, residual = self.input_norm.add(x, residual)
        x = self.attention(x, batch, cache)
        x, residual = self.post_attention_norm.add(x, residual)
        return self.mlp(x), residual


class Decoder(Model):
    """A causal language model. `mlp_name`: what a layer's MLP is called in the checkpoint."""

    mlp_name = "mlp"

    def __init__(self, config: ModelConfig, weights: WeightLoader, max_positions: int) -> None:
        self.config = config
        self.rank = weights.rank
        self._ropes: dict[RopeConfig, torch.Tensor] = {}
        self._max_positions = max_positions
        self.can_generate = not config.architecture.endswith(("Model", SUFFIX))
        self.embedding, self.lm_head = self._read_ends(weights)
        held = self.rank.layers(config.num_layers)
        for index in set(range(config.num_layers)) - set(held):
            weights.leave(f"model.layers.{index}.")
        self.layers = tuple(self.make_layer(weights, index) for index in held)
        self.final_norm = self.make_norm(weights, "model.norm")
        if config.architecture.endswith(SUFFIX):
            self.classifier = self._make_classifier(weights)

    def forward(
        self, token_ids: torch.Tensor, batch: AttentionBatch, caches: Sequence[PagedKVCache | None]
    ) -> torch.Tensor:
        x, residual = self.enter(token_ids)
        for layer, cache in zip(self.layers, caches, strict=True):
            x, residual = layer(x, residual, batch, cache)
        if not self.rank.is_last_stage and residual is not None:
            self.rank.hand_on(x, residual)
            return x
        return self.final_norm.add(x, residual)[0]

    def enter(self, token_ids: torch.Tensor) -> tuple[torch.Tensor, Residual]:
        """What the first layer of this stage gets."""
        if self.embedding is not None:
            return self.embedding(token_ids), None
        shape = (token_ids.shape[0], self.config.hidden_size)
        return self.rank.take_over(shape, self._dtype, token_ids.device)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.lm_head is None:
            raise InvalidRequestError(f"{self.config.architecture} has no head and cannot generate text", "model")
        return self.lm_head(hidden)

    def layer_plan(self, layer: Layer) -> DecoderLayerPlan | None:
        """None where the layer is not of the usual kind."""
        if not isinstance(layer, DecoderLayer):
            return None
        return block_plan(layer.input_norm, layer.attention, layer.post_attention_norm, layer.mlp)

    @property
    def cache_layout(self) -> CacheLayout:
        config = self.config
        _, kv_heads = self.rank.heads(config.num_heads, config.num_kv_heads)
        return CacheLayout(len(self.layers), kv_heads.length, config.head_dim, config.head_dim)

    def plan(self) -> DecoderPlan | None:
        plans = [self.layer_plan(layer) for layer in self.layers]
        layers = tuple(plan for plan in plans if plan is not None)
        config = self.config
        if self.lm_head is None or len(layers) != len(plans):
            return None
        if self.embedding is None or self.rank.topology.world_size > 1:
            return None
        return DecoderPlan(
            dtype=self.embedding.dtype,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            vocab_size=config.vocab_size,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            rms_norm_eps=config.norm_eps,
            attention_scale=config.attention_scale,
            activation=config.activation,
            max_positions=self._max_positions,
            embedding=self.embedding.weight,
            embedding_scale=self.embedding.scale,
            layers=layers,
            final_norm=self.final_norm.weight,
            lm_head=self.lm_head.weight,
            final_soft_cap=config.final_soft_cap,
        )

    def _read_ends(self, weights: WeightLoader) -> tuple[Embedding | None, LMHead | None]:
        """The embedding, for the first stage, and the output head, for the last.

        There is no head in a checkpoint that was saved without one.
        """
        config, rank = self.config, self.rank
        self._dtype = weights.dtype
        vocabulary, name = rank.share(config.vocab_size), "model.embed_tokens.weight"
        if config.tie_word_embeddings:
            self.ignored_tensors = (*self.ignored_tensors, "lm_head.weight")  # some tools write the copy too
        wants_head = self.can_generate and rank.is_last_stage
        table = head = None
        if rank.is_first_stage or (wants_head and config.tie_word_embeddings):
            table = weights.rows(name, (vocabulary,), config.hidden_size)
        else:
            weights.leave(name)
        if wants_head and not config.tie_word_embeddings:
            head = weights.head("lm_head.weight", (vocabulary,), config.hidden_size)
        elif wants_head and table is not None:
            table, head = weights.tie(table)
        else:
            weights.leave("lm_head.")
        embedding = None
        if table is not None and rank.is_first_stage:
            scale = float(torch.tensor(config.embedding_scale, dtype=weights.dtype))
            embedding = Embedding(table, weights.dtype, scale, vocabulary.start, rank.reduce)
        return embedding, None if head is None else LMHead(head, config.final_soft_cap, self._gather_logits())

    def _make_classifier(self, weights: WeightLoader) -> Classifier:
        """A head over the last token's state."""
        raw = weights.checkpoint.config
        score = weights.linear({"score": len(labels(raw))}, self.config.hidden_size, exact=True)
        return Classifier(Pooling(PoolingMethod.LAST, normalize=False), (score,), activation(raw))

    def _gather_logits(self) -> Callable[[torch.Tensor], torch.Tensor] | None:
        if self.rank.tensor_group is None:
            return None
        return partial(self.rank.gather_columns, total=self.config.vocab_size)

    def make_layer(self, weights: WeightLoader, index: int) -> Layer:
        prefix, config = f"model.layers.{index}", self.config.layers[index]
        return DecoderLayer(
            self.make_norm(weights, f"{prefix}.input_layernorm"),
            self.make_attention(weights, f"{prefix}.self_attn", config),
            self.make_norm(weights, f"{prefix}.post_attention_layernorm"),
            self.make_mlp(weights, f"{prefix}.{self.mlp_name}", config),
        )

    def make_attention(self, weights: WeightLoader, prefix: str, layer: LayerConfig) -> Attention:
        config = self.config
        heads, kv_heads = self.rank.heads(config.num_heads, config.num_kv_heads)
        return Attention(
            weights.linear(self.qkv_outputs(prefix), config.hidden_size, bias=config.qkv_bias),
            weights.linear({f"{prefix}.o_proj": config.hidden_size}, heads * config.head_dim, bias=config.output_bias),
            heads.length,
            kv_heads.length,
            config.head_dim,
            config.attention_scale,
            self.rope_table(layer.rope, weights.device),
            self.head_norm(weights, f"{prefix}.q_norm") if config.qk_norm else None,
            self.head_norm(weights, f"{prefix}.k_norm") if config.qk_norm else None,
            norm_eps=config.norm_eps,
            sliding_window=layer.sliding_window,
            soft_cap=config.attention_soft_cap,
        )

    def make_mlp(self, weights: WeightLoader, prefix: str, layer: LayerConfig) -> MLP:
        config, width = self.config, self.rank.share(self.config.intermediate_size)
        return GatedMLP(
            weights.linear(self.gate_up_outputs(prefix), config.hidden_size, bias=config.mlp_bias),
            weights.linear({f"{prefix}.down_proj": config.hidden_size}, width, bias=config.mlp_bias),
            GATED[config.activation],
        )

    def qkv_outputs(self, prefix: str) -> dict[str, Rows]:
        """The projections that make query, key and value, with this rank's rows."""
        heads = self.rank.heads(self.config.num_heads, self.config.num_kv_heads)
        query, kv = (section * self.config.head_dim for section in heads)
        return {f"{prefix}.q_proj": (query,), f"{prefix}.k_proj": (kv,), f"{prefix}.v_proj": (kv,)}

    def gate_up_outputs(self, prefix: str) -> dict[str, Rows]:
        """The projections that make gate and up, with this rank's rows."""
        width = self.rank.share(self.config.intermediate_size)
        return {f"{prefix}.{name}_proj": (width,) for name in ("gate", "up")}

    def make_norm(self, weights: WeightLoader, prefix: str) -> RMSNorm:
        weight = weights.vector(f"{prefix}.weight", self.config.hidden_size, offset=self.config.norm_offset)
        return RMSNorm(weight, self.config.norm_eps)

    def head_norm(self, weights: WeightLoader, prefix: str) -> torch.Tensor:
        return weights.vector(f"{prefix}.weight", self.config.head_dim, offset=self.config.norm_offset)

    def rope_table(self, rope: RopeConfig | None, device: torch.device) -> torch.Tensor | None:
        """Layers with equal settings share one table."""
        if rope is None:
            return None
        if rope not in self._ropes:
            self._ropes[rope] = cos_sin_table(rope, self._max_positions, device)
        return self._ropes[rope]


def block_plan(
    input_norm: RMSNorm | None,
    attention: Attention | LatentAttention,
    post_attention_norm: RMSNorm | None,
    mlp: MLP,
) -> DecoderLayerPlan | None:
    """Two blocks, behind norms where there are any; None where a block is of a kind that plans cannot say."""
    if not isinstance(mlp, GatedMLP) or not isinstance(attention, Attention) or not isinstance(attention.qkv, Linear):
        return None
    return DecoderLayerPlan(
        input_norm=None if input_norm is None else input_norm.weight,
        qkv=attention.qkv.parts,
        qkv_bias=attention.qkv.bias,
        q_norm=attention.q_norm,
        k_norm=attention.k_norm,
        output=attention.output.weight,
        output_bias=attention.output.bias,
        attention_out_norm=None,
        post_attention_norm=None if post_attention_norm is None else post_attention_norm.weight,
        gate_up=mlp.gate_up.parts,
        gate_up_bias=mlp.gate_up.bias,
        down=mlp.down.weight,
        down_bias=mlp.down.bias,
        mlp_out_norm=None,
        cos_sin=attention.cos_sin,
        sliding_window=attention.sliding_window,
        soft_cap=attention.soft_cap,
        sinks=attention.sinks,
    )
