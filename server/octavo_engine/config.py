"""One typed object that configures an engine replica."""

from __future__ import annotations

import msgspec

from octavo_engine.errors import ConfigError

MAX_ADAPTER_NAME = 256


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of one engine replica; defaults suit a laptop CPU and a data-centre GPU alike.

    Zero means "decide from the model and the machine" for the sizes that allow it.
    """

    model: str  # a path, or a storage URI: file:// pypi:// hf:// https:// pvc://
    served_model_names: tuple[str, ...] = ()
    revision: str | None = None
    device: str = "auto"  # auto | cpu | cuda
    dtype: str = "auto"  # auto | float32 | bfloat16 | float16
    quantization: str = "auto"  # auto | none | int8 | int4 | fp8
    kv_cache_dtype: str = "auto"  # auto | float32 | bfloat16 | float16 | int8 | fp8
    task: str = "auto"  # auto | generate | embed | classify
    max_model_len: int = 0
    block_size: int = 16
    num_kv_blocks: int = 0
    kv_cache_memory_bytes: int = 0
    kv_cache_memory_fraction: float = 0.90  # of what is left after weights (GPU); of free memory capped (CPU)
    max_num_seqs: int = 128
    max_num_batched_tokens: int = 0
    max_num_partial_prefills: int = 4
    async_scheduling: str = "auto"  # auto: on for one GPU | on | off; the next step is launched while one is computed
    enable_prefix_caching: bool = True
    prefix_cache_tenant_share: float = 1.0  # of all blocks that one tenant's cached prefixes keep from others
    kv_host_memory_bytes: int = 0  # host memory for evicted prefixes and preempted sequences; 0: none
    preemption_mode: str = "auto"  # auto | recompute | swap
    kv_events_endpoint: str = ""  # ZeroMQ address to publish KV events on, such as tcp://*:5557; they hold token ids
    kv_events_replay_endpoint: str = ""
    kv_events_topic: str = ""
    kv_events_token_ids: bool = True  # False: events name blocks by their hashes alone
    enable_lora: bool = False
    max_loras: int = 4  # adapters that one batch can mix
    max_lora_rank: int = 64
    max_cpu_loras: int = 0  # adapters kept in host memory; 0: four times max_loras
    lora_modules: dict[str, str] = {}  # name -> path or storage URI, loaded at start
    lora_root: str = ""  # folder that adapters may be loaded from at run time; empty: none may
    num_speculative_tokens: int = 0  # tokens guessed ahead while that pays; 0: off
    speculative_model: str = ""  # a small model that guesses, path or storage URI; empty: prompt lookup
    itl_target_s: float = 0.0  # inter-token latency that prefill chunks beside decodes are cut for; 0: 3 x idle
    priority_ageing_s: float = 10.0  # after this wait, worse priorities get their share of admissions too
    tenant_weights: dict[str, float] = {}  # shares of tenants that compete; 1 for those not named
    max_queued_requests: int = 1_024
    max_queued_tokens: int = 1_000_000
    tensor_parallel_size: int = 1  # ranks that share every layer
    pipeline_parallel_size: int = 1  # stages, each with some of the layers
    data_parallel_size: int = 1  # whole engines behind one server
    enable_expert_parallel: bool = False  # experts whole, spread over the tensor ranks, instead of each cut in parts
    distributed_backend: str = "auto"  # auto: NCCL on GPUs, else gloo | nccl | gloo
    num_threads: int = 0
    seed: int = 0
    step_timeout_s: float = 25.0  # a step longer than this makes the replica unhealthy

    @property
    def num_ranks(self) -> int:
        """Processes of one engine."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    def validate(self) -> None:
        """Raise `ConfigError` naming the first setting that cannot work."""
        if not self.model:
            raise ConfigError("model: must name a path or a storage URI, got an empty string")
        if self.block_size < 1 or self.block_size > 1_024:
            raise ConfigError(f"block_size: must be between 1 and 1024, got {self.block_size}")
        if not 0.0 < self.kv_cache_memory_fraction <= 1.0:
            raise ConfigError(
                f"kv_cache_memory_fraction: must be above 0 and at most 1, got {self.kv_cache_memory_fraction}"
            )
        if not 0.0 < self.prefix_cache_tenant_share <= 1.0:
            raise ConfigError(
                f"prefix_cache_tenant_share: must be above 0 and at most 1, got {self.prefix_cache_tenant_share}"
            )
        positive = (
            *("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"),
            *("max_num_seqs", "max_num_partial_prefills", "max_queued_requests", "max_queued_tokens"),
            *("max_loras", "max_lora_rank"),
        )
        for field in positive:
            if getattr(self, field) < 1:
                raise ConfigError(f"{field}: must be at least 1, got {getattr(self, field)}")
        not_negative = (
            "max_model_len",
            "num_kv_blocks",
            "kv_cache_memory_bytes",
            "max_num_batched_tokens",
            "num_speculative_tokens",
            "max_cpu_loras",
            "kv_host_memory_bytes",
        )
        for field in not_negative:
            if getattr(self, field) < 0:
                raise ConfigError(f"{field}: must not be negative, got {getattr(self, field)}")
        for field in ("itl_target_s", "priority_ageing_s"):
            if getattr(self, field) < 0:
                raise ConfigError(f"{field}: must not be negative, got {getattr(self, field)}")
        for tenant, weight in self.tenant_weights.items():
            if weight <= 0:
                raise ConfigError(f"tenant_weights[{tenant}]: must be above 0, got {weight}")
        self._validate_lora()
        if self.speculative_model and not self.num_speculative_tokens:
            raise ConfigError("speculative_model: needs num_speculative_tokens, such as 4")
        if self.speculative_model and self.num_ranks > 1:
            raise ConfigError("speculative_model: needs a model that is whole on one device; prompt lookup does not")
        if self.kv_events_replay_endpoint and not self.kv_events_endpoint:
            raise ConfigError("kv_events_replay_endpoint: needs kv_events_endpoint")
        if self.preemption_mode == "swap" and not self.kv_host_memory_bytes:
            raise ConfigError("preemption_mode: swap needs kv_host_memory_bytes")
        choices = {
            "device": ("auto", "cpu", "cuda"),
            "dtype": ("auto", "float32", "bfloat16", "float16"),
            "quantization": ("auto", "none", "int8", "int4", "fp8"),
            "kv_cache_dtype": ("auto", "float32", "bfloat16", "float16", "int8", "fp8"),
            "task": ("auto", "generate", "embed", "classify"),
            "distributed_backend": ("auto", "nccl", "gloo"),
            "preemption_mode": ("auto", "recompute", "swap"),
            "async_scheduling": ("auto", "on", "off"),
        }
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise ConfigError(f"{field}: must be one of {', '.join(allowed)}, got {getattr(self, field)!r}")

    def _validate_lora(self) -> None:
        if not self.enable_lora:
            for field in ("lora_modules", "lora_root"):
                if getattr(self, field):
                    raise ConfigError(f"{field}: needs enable_lora")
            return
        kept = self.max_cpu_loras or 4 * self.max_loras
        if kept < self.max_loras:
            raise ConfigError(f"max_cpu_loras: must be at least max_loras ({self.max_loras}), got {kept}")
        if len(self.lora_modules) > kept:
            raise ConfigError(f"lora_modules: {len(self.lora_modules)} adapters, but max_cpu_loras is {kept}")
        for name in self.lora_modules:
            if not name or not name.isprintable() or len(name) > MAX_ADAPTER_NAME or name in self.served_model_names:
                raise ConfigError(
                    f"lora_modules: {name[:MAX_ADAPTER_NAME]!r} is no name for an adapter: it must be printable, at "
                    f"most {MAX_ADAPTER_NAME} characters, and no name of the model"
                )
