"""What the runner asks of a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from octavo_engine.layers.classifier import Classifier
from octavo_engine.loader.weights import WeightLoader
from octavo_engine.models.config import ModelConfig
from octavo_engine.models.raw_config import RawConfig
from octavo_engine.parallel.rank import SINGLE, Rank
from octavo_engine.runner.kv_cache import CacheLayout
from octavo_kernels.batch import AttentionBatch, PagedKVCache
from octavo_kernels.step import DecoderPlan


class Model(ABC):
    """A loaded model: the constructor reads the weights, which never change afterwards."""

    config: ModelConfig
    rank: Rank = SINGLE
    can_generate: bool = True
    classifier: Classifier | None = None
    has_token_types: bool = False
    ignored_tensors: tuple[str, ...] = ()  # parts of names in checkpoints that this model has no use for

    @abstractmethod
    def __init__(self, config: ModelConfig, weights: WeightLoader, max_positions: int) -> None: ...

    @classmethod
    @abstractmethod
    def configure(cls, raw: RawConfig, architecture: str) -> ModelConfig:
        """The model's settings from its configuration file."""

    @abstractmethod
    def forward(
        self, token_ids: torch.Tensor, batch: AttentionBatch, caches: Sequence[PagedKVCache | None]
    ) -> torch.Tensor:
        """[T] int64 -> final hidden states [T, hidden_size]; caches: one for each layer held, None without a cache.

        What a stage before the last returns means nothing: its result has gone to the next stage.
        """

    @abstractmethod
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[L, hidden_size] -> [L, vocab_size] float32; of ranks that share the head, the first gets the whole."""

    @property
    def cache_layout(self) -> CacheLayout:
        """What this rank keeps of each token."""
        config = self.config
        return CacheLayout(config.num_layers, config.num_kv_heads, config.head_dim, config.head_dim)

    @abstractmethod
    def plan(self) -> DecoderPlan | None:
        """The whole step as plain structs for a backend to compile, or None where the layers are particular."""
