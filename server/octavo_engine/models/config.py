"""One typed description of a model, whatever file format it came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from octavo_engine.errors import ModelLoadError
from octavo_engine.models.raw_config import RawConfig
from octavo_engine.models.rope_config import RopeConfig, head_layout, rope_config
from octavo_kernels.step import Activation


@dataclass(frozen=True, slots=True)
class MoEConfig:
    """Experts of a layer: each token goes to `top_k` of `num_experts`.

    renormalize: the chosen probabilities are scaled to sum to one. correction_bias: what the layer calls it, if it has
    one. The fields after it are those of `layers.routing.Routing`.
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    renormalize: bool
    correction_bias: str = ""
    sigmoid: bool = False
    num_groups: int = 1
    top_groups: int = 1
    groups_by_best: bool = False
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """What may differ from layer to layer. sliding_window 0 sees everything; rope None turns nothing."""

    sliding_window: int
    rope: RopeConfig | None
    moe: MoEConfig | None = None


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder as its layers need to know it (field names as in Hugging Face's configurations).

    norm_offset: added to RMSNorm weights at load time (1.0 for Gemma, whose files store weight - 1).
    attention_scale: scores are multiplied by it. soft caps of 0 are none.
    """

    architecture: str
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    norm_eps: float
    attention_scale: float
    layers: tuple[LayerConfig, ...]
    tie_word_embeddings: bool
    activation: Activation = Activation.SILU
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    attention_soft_cap: float = 0.0
    final_soft_cap: float = 0.0
    embedding_scale: float = 1.0
    norm_offset: float = 0.0
    eos_token_ids: tuple[int, ...] = ()

    @property
    def num_layers(self) -> int:
        return len(self.layers)


def decoder_config(
    raw: RawConfig,
    architecture: str,
    layers: tuple[LayerConfig, ...],
    *,
    tie_by_default: bool = False,
    attention_scale: float | None = None,
    default_activation: Activation = Activation.SILU,
    **particular: object,
) -> ModelConfig:
    """The fields every decoder shares, read under their usual names; `particular` ones are the family's own."""
    heads, kv_heads, dim = head_layout(raw)
    name = "hidden_activation" if raw.has("hidden_activation") else "hidden_act"
    activation = _ACTIVATIONS.get(raw.text(name)) if raw.has(name) else default_activation
    if activation is None:
        raise raw.wrong(name, f"one of {', '.join(_ACTIVATIONS)}")
    config = ModelConfig(
        architecture=architecture,
        hidden_size=raw.integer("hidden_size"),
        intermediate_size=raw.integer("intermediate_size"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        vocab_size=raw.integer("vocab_size"),
        max_position_embeddings=raw.integer("max_position_embeddings"),
        norm_eps=raw.number("rms_norm_eps", 1e-6, low=0.0, high=1.0),
        attention_scale=dim**-0.5 if attention_scale is None else attention_scale,
        layers=layers,
        tie_word_embeddings=raw.flag("tie_word_embeddings", tie_by_default),
        activation=activation,
        eos_token_ids=raw.token_ids("eos_token_id"),
        **particular,  # type: ignore[arg-type]
    )
    if config.vocab_size * config.hidden_size > 1 << 40:
        raise ModelLoadError(f"{raw.origin}: an embedding of {config.vocab_size} x {config.hidden_size} is absurd")
    return config


_ACTIVATIONS = {
    "silu": Activation.SILU,
    "swish": Activation.SILU,
    "gelu_pytorch_tanh": Activation.GELU,
    "gelu_tanh": Activation.GELU,
}


def num_layers(raw: RawConfig) -> int:
    return raw.integer("num_hidden_layers", high=1024)


def uniform_layers(raw: RawConfig, *, sliding_window: int = 0) -> tuple[LayerConfig, ...]:
    """All layers alike, with the rope of the configuration."""
    return (LayerConfig(sliding_window, rope_config(raw)),) * num_layers(raw)


def sliding_layers(
    raw: RawConfig,
    window: int,
    is_local: Sequence[bool],
    *,
    full_rope: RopeConfig | None = None,
    local_rope: RopeConfig | None = None,
) -> tuple[LayerConfig, ...]:
    """Layers some of which see a window only: those `layer_types` names, or `is_local` where it is absent.

    The ropes of both kinds are the configuration's own unless given.
    """
    kinds = raw.texts("layer_types", tuple("sliding_attention" if local else "full_attention" for local in is_local))
    if len(kinds) != len(is_local) or not set(kinds) <= {"sliding_attention", "full_attention"}:
        raise raw.wrong("layer_types", f"{len(is_local)} of sliding_attention and full_attention")
    full = LayerConfig(0, full_rope or rope_config(raw))
    local = LayerConfig(window, local_rope or full.rope)
    return tuple(local if kind == "sliding_attention" else full for kind in kinds)
