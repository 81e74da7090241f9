"""Prometheus metrics of one replica: Octavo's own names, and vLLM's beside them for existing dashboards and routers.

Gauges and counters are read from the engine's newest snapshot when scraped; only latencies are observed per request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from octavo_engine.messages import EngineStats, ModelInfo
from octavo_server.usage_log import UsageLog

# fmt: off
_TTFT_BUCKETS = (
    .001, .005, .01, .02, .04, .06, .08, .1, .25, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640,
)
_TPOT_BUCKETS = (
    .001, .002, .003, .005, .0075, .01, .015, .025, .05, .075, .1, .15, .2, .3, .4, .5, .75, 1, 2.5, 5, 10,
)
_LATENCY_BUCKETS = (
    .01, .05, .1, .3, .5, .8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 3840,
)
# fmt: on
_TOKEN_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000)

disable_created_metrics()  # type: ignore[no-untyped-call]  # a series per counter that no dashboard reads


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a scrape reads: the served name, the loaded model and the engine's newest stats."""

    name: str
    info: ModelInfo
    stats: EngineStats


SnapshotSource = Callable[[], Snapshot | None]


class Metrics:
    """The registry of one replica. `snapshot` gives what a scrape reads, None while loading. `max_loras` is 0 where
    adapters are off."""

    content_type = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(
        self, snapshot: SnapshotSource, version: str, max_num_seqs: int, usage: UsageLog, max_loras: int = 0
    ) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(snapshot, max_loras))
        self.registry.register(UsageCollector(usage))
        self._rejections = Counter(
            "octavo_http_rejections", "Requests answered with an error, by reason.", ["reason"], registry=self.registry
        )
        self._ignored_fields = Counter(
            "octavo_ignored_request_fields", "Unknown request fields that were ignored.", registry=self.registry
        )
        build_info = Gauge("octavo_build_info", "Always 1; the label tells.", ["version"], registry=self.registry)
        build_info.labels(version).set(1)
        capacity = Gauge("octavo_max_num_seqs", "Most sequences that run at once.", registry=self.registry)
        capacity.set(max_num_seqs)
        self._latencies: RequestLatencies | None = None

    def rejected(self, reason: str) -> None:
        """Count one request that ended in an error."""
        self._rejections.labels(reason).inc()

    def ignored_fields(self, count: int) -> None:
        self._ignored_fields.inc(count)

    def for_model(self, model_name: str) -> RequestLatencies:
        """The per-request histograms, made once the model's name is known."""
        if self._latencies is None:
            self._latencies = RequestLatencies(self.registry, model_name)
        return self._latencies

    def render(self) -> bytes:
        """The exposition in Prometheus' text format."""
        return generate_latest(self.registry)


class RequestLatencies:
    """Histograms observed as sequences run, under Octavo's and vLLM's names."""

    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        def histogram(name: str, alias: str, help_text: str, buckets: tuple[float, ...]) -> Observe:
            own = Histogram(f"octavo_{name}", help_text, ["model_name"], buckets=buckets, registry=registry)
            vllm = Histogram(f"vllm:{alias}", help_text, ["model_name", "engine"], buckets=buckets, registry=registry)
            return Observe(own.labels(model_name), vllm.labels(model_name, "0"))

        self.ttft = histogram(
            "time_to_first_token_seconds", "time_to_first_token_seconds",
            "From a request's arrival to its first token.", _TTFT_BUCKETS,
        )  # fmt: skip
        self.itl = histogram(
            "inter_token_latency_seconds", "inter_token_latency_seconds",
            "Between two outputs of one sequence.", _TPOT_BUCKETS,
        )  # fmt: skip
        self.tpot = histogram(
            "time_per_output_token_seconds", "request_time_per_output_token_seconds",
            "Mean time per output token after the first, per sequence.", _TPOT_BUCKETS,
        )  # fmt: skip
        self.e2e = histogram(
            "e2e_request_latency_seconds", "e2e_request_latency_seconds",
            "From a request's arrival to its last token.", _LATENCY_BUCKETS,
        )  # fmt: skip
        self.queue_time = histogram(
            "request_queue_time_seconds", "request_queue_time_seconds",
            "From the engine's receipt of a sequence to its first step.", _LATENCY_BUCKETS,
        )  # fmt: skip
        self.prompt_tokens = histogram(
            "request_prompt_tokens", "request_prompt_tokens", "Prompt tokens per sequence.", _TOKEN_BUCKETS
        )
        self.generation_tokens = histogram(
            "request_generation_tokens", "request_generation_tokens", "Generated tokens per sequence.", _TOKEN_BUCKETS
        )


class Observe:
    """One observation recorded under two names."""

    __slots__ = ("_alias", "_own")

    def __init__(self, own: Histogram, alias: Histogram) -> None:
        self._own = own
        self._alias = alias

    def __call__(self, value: float) -> None:
        self._own.observe(value)
        self._alias.observe(value)


class EngineCollector(Collector):
    """Reads the engine's snapshot at scrape time; empty while no model is loaded."""

    def __init__(self, snapshot: SnapshotSource, max_loras: int) -> None:
        self._snapshot = snapshot
        self._max_loras = max_loras

    def collect(self) -> Iterator[Metric]:
        current = self._snapshot()
        if current is None:
            return
        yield from _gauges(current.name, current.info, current.stats)
        yield from _counters(current.name, current.stats)
        yield from _finished(current.name, current.stats)
        yield from _steps(current.name, current.stats)
        yield from _model(current.name, current.info)
        yield from _adapters(current.stats, self._max_loras)


class UsageCollector(Collector):
    """What requests consumed, as their answers told or would have told: the sum of a gateway's ledger."""

    def __init__(self, usage: UsageLog) -> None:
        self._usage = usage

    def collect(self) -> Iterator[Metric]:
        tokens = CounterMetricFamily("octavo_usage_tokens", "Tokens of ended requests, as billed.", labels=["kind"])
        tokens.add_metric(["prompt"], self._usage.prompt_tokens)
        tokens.add_metric(["cached"], self._usage.cached_tokens)
        tokens.add_metric(["output"], self._usage.output_tokens)
        yield tokens


def _gauges(model: str, info: ModelInfo, stats: EngineStats) -> Iterator[Metric]:
    utilization = stats.kv_blocks_used / stats.kv_blocks_total if stats.kv_blocks_total else 0.0
    rows: list[tuple[str, str | None, str, float]] = [
        ("requests_waiting", "num_requests_waiting", "Sequences waiting for their first step.", stats.num_waiting),
        ("requests_running", "num_requests_running", "Sequences in the running batch.", stats.num_running),
        ("kv_cache_utilization", "kv_cache_usage_perc",
         "Share of KV blocks that live sequences hold (0 to 1); merely cached blocks are free.", utilization),
        ("queued_kv_tokens", None, "Prompt tokens that waiting sequences still need computed.",
         stats.num_waiting_tokens),
        ("queued_work_seconds", None, "Seconds of work that wait, by the learned step-time model.",
         stats.queued_work_s),
        ("kv_blocks", None, "KV blocks of this replica.", stats.kv_blocks_total),
        ("kv_cache_capacity_tokens", None, "Tokens that the KV blocks hold.",
         stats.kv_blocks_total * info.kv_block_size),
        ("weight_bytes", None, "Bytes of weights in memory.", info.weight_bytes),
        ("engine_step_seconds", None, "Duration of the newest engine step.", stats.step_time_s),
    ]  # fmt: skip
    for name, alias, help_text, value in rows:
        own = GaugeMetricFamily(f"octavo_{name}", help_text, labels=["model_name"])
        own.add_metric([model], value)
        yield own
        if alias is not None:
            vllm = GaugeMetricFamily(f"vllm:{alias}", help_text, labels=["model_name", "engine"])
            vllm.add_metric([model, "0"], value)
            yield vllm
    roofline = GaugeMetricFamily(
        "octavo_roofline_fraction",
        "Achieved share of the device's limit in steps that only decode and in those that prefill.",
        labels=["model_name", "phase"],
    )
    roofline.add_metric([model, "decode"], stats.roofline_decode)
    roofline.add_metric([model, "prefill"], stats.roofline_prefill)
    yield roofline


def _counters(model: str, stats: EngineStats) -> Iterator[Metric]:
    rows = [
        ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", stats.prefix_queries),
        ("prefix_cache_hits", "Prompt tokens found in the prefix cache.", stats.prefix_hits),
        ("num_preemptions", "Sequences preempted for want of KV blocks.", stats.num_preemptions),
        ("prompt_tokens", "Prompt tokens processed.", stats.prompt_tokens),
        ("generation_tokens", "Tokens generated.", stats.generation_tokens),
        ("spec_decode_num_drafts", "Sequences guessed ahead for, each step counted.", stats.spec_drafts),
        ("spec_decode_num_draft_tokens", "Tokens guessed ahead.", stats.spec_draft_tokens),
        ("spec_decode_num_accepted_tokens", "Guessed tokens that held.", stats.spec_accepted_tokens),
    ]
    for name, help_text, value in rows:
        own = CounterMetricFamily(f"octavo_{name}", help_text, labels=["model_name"])
        own.add_metric([model], value)
        yield own
        vllm = CounterMetricFamily(f"vllm:{name}", help_text, labels=["model_name", "engine"])
        vllm.add_metric([model, "0"], value)
        yield vllm
    yield from _host_tier(model, stats)
    yield from _speculation(model, stats)
    steps = CounterMetricFamily("octavo_engine_steps", "Engine steps.", labels=["model_name"])
    steps.add_metric([model], stats.step)
    yield steps


def _speculation(model: str, stats: EngineStats) -> Iterator[Metric]:
    """Where in a draft guesses held; absent while nothing guesses."""
    if not stats.spec_accepted_by_position:
        return
    help_text = "Guessed tokens that held, by their place in the draft."
    own = CounterMetricFamily(
        "octavo_spec_decode_num_accepted_tokens_per_pos", help_text, labels=["model_name", "position"]
    )
    vllm = CounterMetricFamily(
        "vllm:spec_decode_num_accepted_tokens_per_pos", help_text, labels=["model_name", "engine", "position"]
    )
    for position, count in stats.spec_accepted_by_position.items():
        own.add_metric([model, position], count)
        vllm.add_metric([model, "0", position], count)
    yield own
    yield vllm
    available = GaugeMetricFamily(
        "octavo_spec_decode_available", "0 once the draft model has failed.", labels=["model_name"]
    )
    available.add_metric([model], 0.0 if stats.spec_unavailable else 1.0)
    yield available


def _host_tier(model: str, stats: EngineStats) -> Iterator[Metric]:
    """KV blocks in host memory, and how sequences were preempted."""
    preempted = CounterMetricFamily(
        "octavo_preemptions", "Sequences preempted, by what became of their KV blocks.", labels=["model_name", "method"]
    )
    preempted.add_metric([model, "swap"], stats.num_preemptions_by_swap)
    preempted.add_metric([model, "recompute"], stats.num_preemptions - stats.num_preemptions_by_swap)
    yield preempted
    if not stats.host_blocks_total:
        return
    cached = CounterMetricFamily(
        "octavo_prompt_tokens_cached", "Tokens found in the prefix cache, by where.", labels=["model_name", "source"]
    )
    cached.add_metric([model, "device"], stats.prefix_hits - stats.host_hits)
    cached.add_metric([model, "host"], stats.host_hits)
    yield cached
    blocks = GaugeMetricFamily("octavo_host_kv_blocks", "KV blocks in host memory.", labels=["model_name", "state"])
    blocks.add_metric([model, "total"], stats.host_blocks_total)
    blocks.add_metric([model, "held"], stats.host_blocks_used)
    blocks.add_metric([model, "findable"], stats.host_blocks_cached)
    yield blocks
    copied = CounterMetricFamily(
        "octavo_host_kv_blocks_copied", "KV blocks copied to and from host memory.", labels=["model_name", "direction"]
    )
    copied.add_metric([model, "to_host"], stats.host_blocks_stored)
    copied.add_metric([model, "to_device"], stats.host_blocks_fetched)
    yield copied


def _steps(model: str, stats: EngineStats) -> Iterator[Metric]:
    """Whether steps are launched ahead, and what keeps others from it."""
    ahead = CounterMetricFamily(
        "octavo_engine_steps_ahead", "Steps launched before the one in front was over.", labels=["model_name"]
    )
    ahead.add_metric([model], stats.steps_ahead)
    yield ahead
    waits = CounterMetricFamily(
        "octavo_engine_step_waits", "Steps that waited for the one in front, by reason.",
        labels=["model_name", "reason"],
    )  # fmt: skip
    for reason, count in sorted(stats.step_waits.items()):
        waits.add_metric([model, reason], count)
    yield waits


def _finished(model: str, stats: EngineStats) -> Iterator[Metric]:
    help_text = "Sequences ended, by reason."
    own = CounterMetricFamily("octavo_request_success", help_text, labels=["model_name", "finished_reason"])
    vllm = CounterMetricFamily("vllm:request_success", help_text, labels=["model_name", "engine", "finished_reason"])
    for reason, count in sorted(stats.requests_finished.items()):
        own.add_metric([model, reason], count)
        vllm.add_metric([model, "0", reason], count)
    yield own
    yield vllm


def _model(model: str, info: ModelInfo) -> Iterator[Metric]:
    about = {
        "architecture": info.architecture, "dtype": info.dtype, "quantization": info.quantization,
        "device": info.device, "backend": info.backend,
    }  # fmt: skip
    own = GaugeMetricFamily("octavo_model_info", "Always 1; the labels tell.", labels=["model_name", *about])
    own.add_metric([model, *about.values()], 1)
    yield own
    longest = GaugeMetricFamily("octavo_max_model_len", "Longest prompt plus answer, in tokens.", labels=["model_name"])
    longest.add_metric([model], info.max_model_len)
    yield longest
    phases = GaugeMetricFamily(
        "octavo_startup_phase_seconds", "How long each phase of the start took.", labels=["model_name", "phase"]
    )
    for phase, seconds in info.phase_seconds.items():
        phases.add_metric([model, phase], seconds)
    yield phases
    cache = GaugeMetricFamily(
        "vllm:cache_config_info", "Always 1; the labels tell.",
        labels=["model_name", "engine", "block_size", "num_gpu_blocks"],
    )  # fmt: skip
    cache.add_metric([model, "0", str(info.kv_block_size), str(info.kv_blocks_total)], 1)
    yield cache


def _adapters(stats: EngineStats, max_loras: int) -> Iterator[Metric]:
    """vLLM's series, whose value is a time and whose labels carry the names, and a plain one for each adapter."""
    if not max_loras:
        return
    vllm = GaugeMetricFamily(
        "vllm:lora_requests_info", "Adapters in use; the value is when it was read.",
        labels=["max_lora", "waiting_lora_adapters", "running_lora_adapters"],
    )  # fmt: skip
    waiting = ",".join(adapter.name for adapter in stats.adapters if adapter.num_waiting)
    running = ",".join(adapter.name for adapter in stats.adapters if adapter.num_running)
    vllm.add_metric([str(max_loras), waiting, running], stats.time)
    yield vllm
    own = GaugeMetricFamily(
        "octavo_lora_requests", "Sequences of each loaded adapter.", labels=["adapter", "state", "resident"]
    )
    for adapter in stats.adapters:
        resident = "true" if adapter.is_resident else "false"
        own.add_metric([adapter.name, "running", resident], adapter.num_running)
        own.add_metric([adapter.name, "waiting", resident], adapter.num_waiting)
    yield own
