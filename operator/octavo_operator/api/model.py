"""`spec.model` and `spec.engine`: which model is served, in which form, with which knobs."""

from __future__ import annotations

import enum
import re
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field

from octavo_operator.api.base import Part, Rule
from octavo_operator.api.kubernetes import EnvVar, LocalObjectRef, SecretKeyRef
from octavo_operator.api.quantity import Fraction, Quantity

ModelName = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9]([-A-Za-z0-9._:/]*[A-Za-z0-9])?$")]

CLUSTER_SCHEMES = ("hf", "s3", "gs", "oci", "pvc", "https", "modelscope", "pypi")
LOCAL_SCHEMES = (*CLUSTER_SCHEMES, "file")
_CLUSTER_URI = rf"^({'|'.join(CLUSTER_SCHEMES)})://.+"
StorageUri = Annotated[str, Field(max_length=2048)]


class Task(enum.StrEnum):
    """What a model is asked to do."""

    GENERATE = "Generate"
    EMBED = "Embed"
    SCORE = "Score"
    TRANSCRIBE = "Transcribe"


class ModelFormat(enum.StrEnum):
    """How a model is stored."""

    SAFETENSORS = "safetensors"
    GGUF = "gguf"
    ONNX = "onnx"
    TORCHSCRIPT = "torchscript"
    TENSORRT_LLM = "tensorrt-llm"
    TRITON_REPOSITORY = "triton-repository"


class WeightQuantization(enum.StrEnum):
    """How weights are held in memory."""

    AUTO = "Auto"
    NONE = "None"
    FP8 = "FP8"
    INT8 = "Int8"
    INT4 = "Int4"


class KVCacheQuantization(enum.StrEnum):
    """How keys and values are held in the cache."""

    AUTO = "Auto"
    NONE = "None"
    FP8 = "FP8"
    INT8 = "Int8"


class DType(enum.StrEnum):
    """Number format of computation."""

    AUTO = "Auto"
    FLOAT32 = "Float32"
    BFLOAT16 = "BFloat16"
    FLOAT16 = "Float16"


def storage_rules(field: str, value: Callable[[Any], str | None]) -> tuple[Rule, Rule]:
    """Which addresses a model may be stored at: any known scheme locally, all but file:// on a cluster."""

    def known(part: Any, schemes: tuple[str, ...]) -> bool:
        uri = value(part)
        return uri is None or bool(re.match(rf"^({'|'.join(schemes)})://.+", uri))

    def names(schemes: tuple[str, ...]) -> str:
        return ", ".join(f"{scheme}://" for scheme in schemes)

    return (
        Rule(None, f"must start with one of {names(LOCAL_SCHEMES)}", lambda p: known(p, LOCAL_SCHEMES), field),
        Rule(
            f"!has(self.{field}) || self.{field}.matches('{_CLUSTER_URI}')",
            f"must start with one of {names(CLUSTER_SCHEMES)}; file:// works in local mode only",
            lambda p: known(p, CLUSTER_SCHEMES) or not known(p, LOCAL_SCHEMES),
            field,
            cluster_only=True,
        ),
    )


class FormatRef(Part):
    """Format of a stored model."""

    name: ModelFormat
    """safetensors, gguf, onnx, torchscript, tensorrt-llm or triton-repository."""
    version: Annotated[str, Field(max_length=32)] | None = None
    """Version of the format, where a runtime tells them apart."""


class Quantization(Part):
    """How weights and cache are held in memory. Auto keeps what the checkpoint says."""

    weights: WeightQuantization = WeightQuantization.AUTO
    """Auto keeps the checkpoint's own format; Int8, Int4 and FP8 quantize while loading."""
    kv_cache: KVCacheQuantization = KVCacheQuantization.AUTO
    """Format of keys and values; Int8 and FP8 halve the memory of a token."""


class Speculative(Part):
    """Speculative decoding with a small draft model. The output distribution is unchanged."""

    rules = storage_rules("draftStorageUri", lambda s: s.draft_storage_uri)

    draft_storage_uri: StorageUri
    """Where the draft model is stored."""
    num_tokens: Annotated[int, Field(ge=1, le=16)] = 4
    """Tokens drafted per step."""


class Adapter(Part):
    """One LoRA adapter, addressed by clients as a model of its own."""

    rules = storage_rules("storageUri", lambda a: a.storage_uri)

    name: ModelName
    """Name that clients send as `model`."""
    storage_uri: StorageUri
    """Where the adapter is stored."""
    pinned: bool = False
    """Keep the adapter in memory even when others are used more."""


class Adapters(Part):
    """LoRA adapters served beside the base model; they come and go without a restart."""

    rules = (
        Rule(
            None,
            "adapter names must be unique",
            lambda a: len({item.name for item in a.items}) == len(a.items),
            field="items",
        ),
    )

    items: Annotated[list[Adapter], Field(max_length=128, json_schema_extra={"x-list-map-keys": ["name"]})] = []
    """The adapters, by name."""
    max_loaded: Annotated[int, Field(ge=1, le=1024)] = 8
    """How many adapters one replica holds in accelerator memory at once."""
    max_rank: Annotated[int, Field(ge=1, le=512)] = 64
    """Largest rank among the adapters."""


class ModelSpec(Part):
    """The model: what it is called, where it is stored, how it is held in memory."""

    rules = (
        *storage_rules("storageUri", lambda m: m.storage_uri),
        Rule("self.task == oldSelf.task", "task cannot be changed; make another InferenceService", None, field="task"),
        Rule(
            "!has(self.quantization) || self.quantization.weights in ['Auto', 'None'] "
            "|| !has(self.format) || self.format.name != 'gguf'",
            "a GGUF file already carries its quantization: use Auto or None, or start from safetensors",
            lambda m: (
                m.format is None
                or m.format.name is not ModelFormat.GGUF
                or m.quantization.weights in (WeightQuantization.AUTO, WeightQuantization.NONE)
            ),
            field="quantization.weights",
        ),
        Rule(
            "!has(self.speculative) || self.task == 'Generate'",
            "only models with task Generate can decode speculatively",
            lambda m: m.speculative is None or m.task is Task.GENERATE,
            field="speculative",
        ),
    )

    name: ModelName | None = None
    """Name that clients send as `model`; metadata.name when omitted."""
    aliases: Annotated[list[ModelName], Field(max_length=16, json_schema_extra={"x-list-type": "set"})] = []
    """Further names of the same model."""
    storage_uri: StorageUri
    """Where the model is stored: hf://ORG/NAME, s3://BUCKET/PATH, gs://, oci://IMAGE, pvc://CLAIM/PATH, https://,
    modelscope://, pypi://PACKAGE/FILE, or file:///PATH (local mode only)."""
    revision: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    """Branch, tag or commit of the repository. A commit makes every replica load the same bytes."""
    format: FormatRef | None = None
    """Format of the stored model; told from the address when omitted."""
    task: Task = Task.GENERATE
    """What the model is asked to do. Cannot be changed."""
    credentials_secret_ref: SecretKeyRef | None = None
    """Token or key to read the storage with; kept by reference."""
    cache_ref: LocalObjectRef | None = None
    """A ModelCache of the same namespace that holds the model, so that each cluster downloads it once."""
    max_model_len: Annotated[int, Field(ge=16, le=16_777_216)] | None = None
    """Longest prompt plus answer, in tokens; what the model was trained for when omitted."""
    dtype: DType = DType.AUTO
    """Number format of computation; Auto chooses by model and device."""
    quantization: Quantization = Quantization()
    """How weights and cache are held in memory."""
    speculative: Speculative | None = None
    """Speculative decoding with a draft model."""
    adapters: Adapters | None = None
    """LoRA adapters served beside the base model."""


class KVOffload(Part):
    """Where blocks of the KV cache go when accelerator memory is full."""

    cpu: Quantity
    """Host memory per replica for offloaded blocks."""


class EngineSpec(Part):
    """Portable knobs of the engine; each runtime maps them to its own flags, and refuses those it has not."""

    max_num_seqs: Annotated[int, Field(ge=1, le=65_536)] | None = None
    """Most sequences computed in one step."""
    max_batched_tokens: Annotated[int, Field(ge=1, le=4_194_304)] | None = None
    """Most tokens computed in one step."""
    max_partial_prefills: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Most long prompts that are prefilled at the same time."""
    kv_cache_memory: Quantity | None = None
    """Memory for the KV cache, as an amount."""
    kv_cache_memory_fraction: Fraction | None = None
    """Memory for the KV cache, as a fraction of what the weights leave free."""
    block_size: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Tokens per block of the KV cache."""
    num_kv_blocks: Annotated[int, Field(ge=1, le=2_147_483_647)] | None = None
    """Blocks of the KV cache; decided from memory when omitted."""
    prefix_caching: bool | None = None
    """Reuse the keys and values of equal prompt beginnings."""
    kv_offload: KVOffload | None = None
    """Where blocks of the KV cache go when accelerator memory is full."""
    max_queued_requests: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Most requests that wait inside one replica; more are answered 429."""
    max_queued_tokens: Annotated[int, Field(ge=1, le=2_147_483_647)] | None = None
    """Most prompt tokens that wait inside one replica; more are answered 429."""
    num_threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Threads that compute on a CPU; those of the CPU limit when omitted."""
    seed: Annotated[int, Field(ge=0, le=2_147_483_647)] | None = None
    """Seed of requests that bring none."""
    log_level: Annotated[str, Field(pattern="^(debug|info|warning|error)$")] | None = None
    """debug, info, warning or error."""
    extra_args: Annotated[list[Annotated[str, Field(max_length=1024)]], Field(max_length=64)] = []
    """Arguments appended to the engine's command line as they are."""
    env: Annotated[list[EnvVar], Field(max_length=64, json_schema_extra={"x-list-map-keys": ["name"]})] = []
    """Environment variables of the engine."""

    rules = (
        Rule(
            "!(has(self.kvCacheMemory) && has(self.kvCacheMemoryFraction))",
            "give kvCacheMemory or kvCacheMemoryFraction, not both",
            lambda e: e.kv_cache_memory is None or e.kv_cache_memory_fraction is None,
            field="kvCacheMemoryFraction",
        ),
        Rule(
            None,
            "names of environment variables must be unique",
            lambda e: len({v.name for v in e.env}) == len(e.env),
            field="env",
        ),
    )
