"""ServingRuntime and ClusterServingRuntime: how an engine is run, probed, drained and measured, as data."""

from __future__ import annotations

import enum
from typing import Annotated, Literal

from pydantic import Field

from octavo_operator.api.base import API_VERSION, Part, Rule
from octavo_operator.api.kubernetes import EnvVar, ObjectMeta
from octavo_operator.api.model import KVCacheQuantization, ModelFormat, Task, WeightQuantization

HttpPath = Annotated[str, Field(min_length=1, max_length=512, pattern=r"^/")]
MetricName = Annotated[str, Field(min_length=1, max_length=256, pattern=r"^[a-zA-Z_:][a-zA-Z0-9_:]*$")]
ModelSourceKind = Annotated[str, Field(pattern="^(Uri|HuggingFaceId|Path)$")]
Argument = Annotated[str, Field(max_length=1024)]


class SupportedFormat(Part):
    """A model format that the runtime loads."""

    name: ModelFormat
    """Name of the format."""
    version: Annotated[str, Field(max_length=32)] | None = None
    """Version of the format."""
    auto_select: bool = False
    """May be chosen for services that name no runtime."""
    priority: Annotated[int, Field(ge=0, le=1_000)] = 1
    """Among several, the highest is chosen."""


class AdapterSupport(enum.StrEnum):
    NONE = "None"
    STATIC = "Static"
    DYNAMIC = "Dynamic"


class Supports(Part):
    """What the runtime can do; a service that asks for more is refused with a condition."""

    tasks: Annotated[list[Task], Field(min_length=1, max_length=4, json_schema_extra={"x-list-type": "set"})] = [
        Task.GENERATE
    ]
    """Tasks."""
    quantization: Annotated[
        list[WeightQuantization], Field(max_length=8, json_schema_extra={"x-list-type": "set"})
    ] = []
    """Weight quantizations besides Auto and None."""
    kv_cache_quantization: Annotated[
        list[KVCacheQuantization], Field(max_length=8, json_schema_extra={"x-list-type": "set"})
    ] = []
    """KV-cache quantizations besides Auto and None."""
    adapters: AdapterSupport = AdapterSupport.NONE
    """LoRA adapters: None, Static (a change restarts replicas) or Dynamic."""
    multi_node: bool = False
    """A replica may span nodes."""
    tensor_parallel: bool = False
    """Tensor parallelism."""
    speculative: bool = False
    """Speculative decoding with a draft model."""
    cpu: bool = False
    """Runs without an accelerator."""


class FlagMapping(Part):
    """How one portable field of an InferenceService becomes arguments of this engine."""

    rules = (
        Rule(
            "has(self.flag) || size(self.values) > 0",
            "give flag, values or both",
            lambda f: f.flag is not None or bool(f.values),
        ),
    )

    field: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[a-zA-Z.]+$")]
    """Path below spec, such as engine.maxNumSeqs. A field of the service that is not listed is refused."""
    flag: Argument | None = None
    """Arguments with {} for the value, separated by spaces, such as "--max-num-seqs {}"."""
    values: Annotated[dict[str, Argument], Field(max_length=32)] = {}
    """Words of this engine for the field's values; without flag, the arguments themselves. Others are refused."""


class Container(Part):
    """The engine's container."""

    image: Annotated[str, Field(min_length=1, max_length=512)]
    """Image; pin it by digest."""
    command: Annotated[list[Argument], Field(max_length=32)] = []
    """Command. $(MODEL_URI), $(MODEL_PATH), $(MODEL_NAME), $(MODEL_ALIASES), $(HOST) and $(PORT) are filled
    in."""
    args: Annotated[list[Argument], Field(max_length=64)] = []
    """Arguments, filled in the same way."""
    flags: Annotated[list[FlagMapping], Field(max_length=64, json_schema_extra={"x-list-map-keys": ["field"]})] = []
    """Further arguments, by portable field."""
    env: Annotated[list[EnvVar], Field(max_length=64, json_schema_extra={"x-list-map-keys": ["name"]})] = []
    """Environment variables."""
    run_as_user: Annotated[int, Field(ge=1, le=2_147_483_647)] = 65_532
    """User of the process; never root."""
    writable_root: bool = False
    """The engine writes outside /tmp and its caches. The root file system is read-only otherwise."""


class Probe(Part):
    """One HTTP probe."""

    path: HttpPath
    """Path that answers 200."""
    period_seconds: Annotated[int, Field(ge=1, le=3_600)] = 5
    """Seconds between probes."""
    timeout_seconds: Annotated[int, Field(ge=1, le=300)] = 5
    """Seconds one probe may take."""
    failure_threshold: Annotated[int, Field(ge=1, le=10_000)] = 3
    """Failures in a row that count."""


class StartupProbe(Part):
    """The probe of a starting replica."""

    path: HttpPath
    """Path that answers 200 once the model is loaded."""
    period_seconds: Annotated[int, Field(ge=1, le=3_600)] = 5
    """Seconds between probes."""
    timeout_seconds: Annotated[int, Field(ge=10, le=86_400)] = 1_800
    """Seconds that starting may take in all."""


class Probes(Part):
    """Liveness must never depend on load: a busy engine is alive."""

    startup: StartupProbe
    """Startup."""
    readiness: Probe
    """Readiness."""
    liveness: Probe
    """Liveness."""


class DrainMethod(enum.StrEnum):
    """How the engine is told to finish."""

    SIGTERM = "Sigterm"
    PRE_STOP_SLEEP = "PreStopSleep"


class RuntimeDrain(Part):
    """How the engine ends."""

    method: DrainMethod = DrainMethod.PRE_STOP_SLEEP
    """Sigterm: on SIGTERM the engine itself keeps accepting for the propagation time and then finishes its requests.
    PreStopSleep: the pod sleeps for the propagation time before SIGTERM."""


class AcceleratorVariant(Part):
    """The image for one kind of device."""

    resource: Annotated[str, Field(min_length=1, max_length=128)]
    """Resource name of the device, such as nvidia.com/gpu, or cpu."""
    image: Annotated[str, Field(min_length=1, max_length=512)] | None = None
    """Another image."""
    image_suffix: Annotated[str, Field(max_length=64)] = ""
    """Appended to the image's tag."""


class MetricSource(Part):
    """One way to read a signal from the engine's metrics page."""

    rules = (
        Rule(
            "[has(self.gauge), has(self.rate), has(self.ratio), has(self.info), has(self.histogram)]"
            ".filter(x, x).size() == 1",
            "name exactly one of gauge, rate, ratio, info, histogram",
            lambda m: sum(v is not None for v in (m.gauge, m.rate, m.ratio, m.info, m.histogram)) == 1,
        ),
    )

    gauge: MetricName | None = None
    """Sum of a gauge's samples."""
    rate: MetricName | None = None
    """Increase per second of a counter: with a counter of seconds, the mean number by Little's law."""
    ratio: Annotated[list[MetricName], Field(min_length=2, max_length=2)] | None = None
    """One gauge divided by another."""
    info: MetricName | None = None
    """An info metric whose labels carry the numbers."""
    histogram: MetricName | None = None
    """A histogram, by its base name."""
    labels: Annotated[dict[str, str], Field(max_length=8)] = {}
    """Only samples with these labels."""
    multiply: Annotated[list[Annotated[str, Field(max_length=64)]], Field(max_length=4)] = []
    """Labels of an info metric whose product is the value."""
    scale: Annotated[str, Field(max_length=16, pattern=r"^[0-9.]+(e-?[0-9]+)?$")] | None = None
    """Factor applied to the value, such as "1e-6" for microseconds."""


Sources = Annotated[list[MetricSource], Field(max_length=8)]


class MetricMap(Part):
    """Where the engine's metrics say what the autoscaler and the router need. The first source present counts."""

    path: HttpPath = "/metrics"
    """Path of the metrics page."""
    port: Annotated[int, Field(ge=1, le=65_535)] | None = None
    """Port of the metrics page; the serving port when omitted."""
    queue_depth: Sources = []
    """Requests that wait."""
    running: Sources = []
    """Requests that run."""
    kv_cache_utilization: Sources = []
    """Fraction of KV blocks that live requests use."""
    kv_capacity_tokens: Sources = []
    """Tokens that the KV cache holds."""
    max_model_len: Sources = []
    """Longest prompt plus answer of a request, in tokens."""
    queued_kv_tokens: Sources = []
    """Tokens of KV cache that the waiting requests will need."""
    ttft_seconds: Sources = []
    """Histogram of the time to first token."""
    request_seconds: Sources = []
    """Histogram of the time of whole requests."""
    queue_seconds: Sources = []
    """Histogram of the part of it that they waited; omit when requestSeconds leaves waiting out."""
    generated_tokens: Sources = []
    """Counter of generated tokens."""


class MultiNode(Part):
    """Further arguments where a replica spans nodes. Every node has MASTER_ADDR, MASTER_PORT, NODE_RANK and NNODES in
    its environment, and $(NAME) in an argument is replaced by them."""

    leader_args: Annotated[list[Argument], Field(max_length=32)] = []
    """For the first node, which serves."""
    worker_args: Annotated[list[Argument], Field(max_length=32)] = []
    """For the others."""


class AdapterApi(Part):
    """Where an engine takes and gives up LoRA adapters while it runs; for supports.adapters Dynamic."""

    source: ModelSourceKind | None = None
    """What it reads adapters from, as modelSource says of models; the same when omitted."""
    at_start: Argument | None = None
    """Arguments that load one when the engine starts, with {name} and {path}; local mode uses them."""
    load: HttpPath = "/v1/load_lora_adapter"
    """POST {"lora_name": ..., "lora_path": ...} here loads one."""
    unload: HttpPath = "/v1/unload_lora_adapter"
    """POST {"lora_name": ...} here unloads one."""
    list: HttpPath = "/v1/models"
    """GET here lists the names that the engine serves."""


class RuntimeScaling(Part):
    """Who sets the number of engine workers."""

    owned_by_runtime: bool = False
    """The runtime scales itself (Ray Serve); Octavo then keeps one replica and never runs a second loop."""


class ServingRuntimeSpec(Part):
    """How an engine is run, probed, drained and measured."""

    disabled: bool = False
    """Not used for services that do not name it."""
    engine: Annotated[str, Field(min_length=1, max_length=63)]
    """Name of the engine, such as octavo or vllm."""
    supported_model_formats: Annotated[list[SupportedFormat], Field(min_length=1, max_length=16)]
    """Formats that the runtime loads."""
    supports: Supports = Supports()
    """What the runtime can do."""
    protocols: Annotated[list[Annotated[str, Field(max_length=32)]], Field(max_length=8)] = ["openai-v1"]
    """Protocols it speaks: openai-v1, v2, grpc-v2."""
    model_source: ModelSourceKind = "Uri"
    """What $(MODEL_URI) holds: the address as written, the repository id of hf:// addresses, or only local paths."""
    container: Container
    """The engine's container."""
    port: Annotated[int, Field(ge=1, le=65_535)] = 8_000
    """Port that serves HTTP."""
    grpc_port: Annotated[int, Field(ge=1, le=65_535)] | None = None
    """Port that serves gRPC."""
    probes: Probes
    """Probes."""
    drain: RuntimeDrain = RuntimeDrain()
    """How the engine ends."""
    accelerators: Annotated[
        list[AcceleratorVariant], Field(max_length=16, json_schema_extra={"x-list-map-keys": ["resource"]})
    ] = []
    """Images by device."""
    scaling: RuntimeScaling = RuntimeScaling()
    """Who sets the number of engine workers."""
    multi_node: MultiNode = MultiNode()
    """Further arguments where a replica spans nodes."""
    adapter_api: AdapterApi = AdapterApi()
    """Where the engine takes LoRA adapters while it runs."""
    metrics: MetricMap = MetricMap()
    """Where the engine's metrics say what the autoscaler and the router need."""


class ServingRuntime(Part):
    """ServingRuntime says how one engine is run, probed, drained and measured, for the services of its namespace."""

    api_version: Literal["serving.octavo.dev/v1alpha1"] = API_VERSION  # type: ignore[assignment]
    kind: Literal["ServingRuntime"] = "ServingRuntime"
    metadata: ObjectMeta
    spec: ServingRuntimeSpec
    """How the engine is run."""


class ClusterServingRuntime(Part):
    """ClusterServingRuntime says how one engine is run, probed, drained and measured, for every namespace."""

    api_version: Literal["serving.octavo.dev/v1alpha1"] = API_VERSION  # type: ignore[assignment]
    kind: Literal["ClusterServingRuntime"] = "ClusterServingRuntime"
    metadata: ObjectMeta
    spec: ServingRuntimeSpec
    """How the engine is run."""
