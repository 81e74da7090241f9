"""`octavo serve`: run one engine replica with its network faces."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from octavo_engine.errors import ConfigError, OctavoError

if TYPE_CHECKING:
    from octavo_engine.client import EngineClient
    from octavo_engine.config import EngineConfig

_MODEL, _MEMORY, _SCHEDULING, _ADAPTERS, _SERVER = "Model", "KV cache", "Scheduling", "Adapters", "Server"
_PARALLEL = "Several devices"


def _option(*names: str, help: str, panel: str, **extra: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, show_default=False, **extra)


def serve(
    model_argument: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="Path or URI: file:// pypi:// hf:// https:// pvc://", show_default=False),
    ] = None,
    model: Annotated[str | None, _option("--model", help="The same as the argument.", panel=_MODEL)] = None,
    served_model_name: Annotated[
        list[str] | None, _option("--served-model-name", help="Name to answer to; repeatable.", panel=_MODEL)
    ] = None,
    revision: Annotated[str | None, _option("--revision", help="Branch, tag or commit.", panel=_MODEL)] = None,
    task: Annotated[str | None, _option("--task", help="auto, generate, embed or classify.", panel=_MODEL)] = None,
    dtype: Annotated[str | None, _option("--dtype", help="auto, float32, bfloat16 or float16.", panel=_MODEL)] = None,
    quantization: Annotated[
        str | None, _option("--quantization", help="auto, none, int8, int4 or fp8.", panel=_MODEL)
    ] = None,
    device: Annotated[str | None, _option("--device", help="auto, cpu or cuda.", panel=_MODEL)] = None,
    max_model_len: Annotated[
        int | None, _option("--max-model-len", help="Context length; 0: the model's own.", panel=_MODEL)
    ] = None,
    seed: Annotated[int | None, _option("--seed", help="Seed of requests without one.", panel=_MODEL)] = None,
    tensor_parallel_size: Annotated[
        int | None, _option("--tensor-parallel-size", help="Processes that share every layer.", panel=_PARALLEL)
    ] = None,
    pipeline_parallel_size: Annotated[
        int | None, _option("--pipeline-parallel-size", help="Stages of some layers each.", panel=_PARALLEL)
    ] = None,
    data_parallel_size: Annotated[
        int | None, _option("--data-parallel-size", help="Whole engines behind this server.", panel=_PARALLEL)
    ] = None,
    enable_expert_parallel: Annotated[
        bool | None,
        _option(
            "--enable-expert-parallel/--no-enable-expert-parallel",
            help="Whole experts on the tensor ranks, not parts of each.",
            panel=_PARALLEL,
        ),
    ] = None,
    distributed_backend: Annotated[
        str | None, _option("--distributed-backend", help="auto, nccl or gloo.", panel=_PARALLEL)
    ] = None,
    num_threads: Annotated[
        int | None, _option("--num-threads", help="CPU threads; 0: one per core.", panel=_MODEL)
    ] = None,
    chat_template: Annotated[
        str | None, _option("--chat-template", help="Jinja file that replaces the model's template.", panel=_MODEL)
    ] = None,
    batch_folder: Annotated[
        str | None,
        _option("--batch-folder", help="Folder for /v1/files and /v1/batches; without it they are off.", panel=_SERVER),
    ] = None,
    model_repository: Annotated[
        str | None,
        _option("--model-repository", help="Folder of NAME/VERSION/model.onnx or .pt2, served over v2.", panel=_MODEL),
    ] = None,
    generation_config: Annotated[
        str | None,
        _option("--generation-config", help="auto: the checkpoint's sampling defaults; or none.", panel=_MODEL),
    ] = None,
    tool_call_parser: Annotated[
        str | None,
        _option(
            "--tool-call-parser",
            help="auto, none, hermes, llama3_json, mistral, phi4_mini_json, harmony or gemma.",
            panel=_MODEL,
        ),
    ] = None,
    reasoning_parser: Annotated[
        str | None, _option("--reasoning-parser", help="auto, none or think.", panel=_MODEL)
    ] = None,
    block_size: Annotated[int | None, _option("--block-size", help="Tokens per KV block.", panel=_MEMORY)] = None,
    num_kv_blocks: Annotated[
        int | None, _option("--num-kv-blocks", help="KV blocks; 0: from memory.", panel=_MEMORY)
    ] = None,
    kv_cache_memory_bytes: Annotated[
        int | None, _option("--kv-cache-memory-bytes", help="Memory for KV blocks; 0: by fraction.", panel=_MEMORY)
    ] = None,
    kv_cache_memory_fraction: Annotated[
        float | None, _option("--kv-cache-memory-fraction", help="Share of free memory for KV.", panel=_MEMORY)
    ] = None,
    kv_cache_dtype: Annotated[
        str | None, _option("--kv-cache-dtype", help="auto, float32, bfloat16, float16, int8, fp8.", panel=_MEMORY)
    ] = None,
    enable_prefix_caching: Annotated[
        bool | None,
        _option("--enable-prefix-caching/--no-enable-prefix-caching", help="Reuse shared prefixes.", panel=_MEMORY),
    ] = None,
    kv_host_memory_bytes: Annotated[
        int | None, _option("--kv-host-memory-bytes", help="Host memory below the KV blocks; 0: none.", panel=_MEMORY)
    ] = None,
    preemption_mode: Annotated[
        str | None, _option("--preemption-mode", help="auto (the cheaper), recompute or swap.", panel=_MEMORY)
    ] = None,
    kv_events_endpoint: Annotated[
        str | None, _option("--kv-events-endpoint", help="ZeroMQ address for KV events.", panel=_MEMORY)
    ] = None,
    kv_events_replay_endpoint: Annotated[
        str | None, _option("--kv-events-replay-endpoint", help="ZeroMQ address to replay them from.", panel=_MEMORY)
    ] = None,
    kv_events_topic: Annotated[str | None, _option("--kv-events-topic", help="Their topic.", panel=_MEMORY)] = None,
    kv_events_token_ids: Annotated[
        bool | None,
        _option("--kv-events-token-ids/--no-kv-events-token-ids", help="Tell the blocks' tokens, too.", panel=_MEMORY),
    ] = None,
    prefix_cache_tenant_share: Annotated[
        float | None,
        _option("--prefix-cache-tenant-share", help="Most of the cache one tenant keeps.", panel=_MEMORY),
    ] = None,
    priority_ageing_s: Annotated[
        float | None,
        _option("--priority-ageing-s", help="Wait after which worse priorities get a share.", panel=_SCHEDULING),
    ] = None,
    max_num_seqs: Annotated[
        int | None, _option("--max-num-seqs", help="Sequences running at once.", panel=_SCHEDULING)
    ] = None,
    max_num_batched_tokens: Annotated[
        int | None, _option("--max-num-batched-tokens", help="Tokens per step; 0: automatic.", panel=_SCHEDULING)
    ] = None,
    max_num_partial_prefills: Annotated[
        int | None, _option("--max-num-partial-prefills", help="Prompts in chunks at once.", panel=_SCHEDULING)
    ] = None,
    max_queued_requests: Annotated[
        int | None, _option("--max-queued-requests", help="Waiting sequences before 429.", panel=_SCHEDULING)
    ] = None,
    max_queued_tokens: Annotated[
        int | None, _option("--max-queued-tokens", help="Waiting prompt tokens before 429.", panel=_SCHEDULING)
    ] = None,
    itl_target_s: Annotated[
        float | None,
        _option("--itl-target-s", help="Inter-token latency prefills keep to; 0: 3 x idle.", panel=_SCHEDULING),
    ] = None,
    async_scheduling: Annotated[
        str | None,
        _option(
            "--async-scheduling",
            help="Launch steps ahead: auto (on for one GPU and stages), on, off.",
            panel=_SCHEDULING,
        ),
    ] = None,
    num_speculative_tokens: Annotated[
        int | None,
        _option("--num-speculative-tokens", help="Tokens guessed ahead while that pays; 0: off.", panel=_SCHEDULING),
    ] = None,
    speculative_model: Annotated[
        str | None,
        _option("--speculative-model", help="Small model that guesses; else prompt lookup does.", panel=_SCHEDULING),
    ] = None,
    enable_lora: Annotated[
        bool | None, _option("--enable-lora/--no-enable-lora", help="Serve LoRA adapters too.", panel=_ADAPTERS)
    ] = None,
    max_loras: Annotated[
        int | None, _option("--max-loras", help="Adapters mixed in one batch (4).", panel=_ADAPTERS)
    ] = None,
    max_lora_rank: Annotated[int | None, _option("--max-lora-rank", help="Largest rank (64).", panel=_ADAPTERS)] = None,
    max_cpu_loras: Annotated[
        int | None, _option("--max-cpu-loras", help="Adapters kept in memory; 0: 4 x max-loras.", panel=_ADAPTERS)
    ] = None,
    lora_modules: Annotated[
        list[str] | None, _option("--lora-modules", help="NAME=PATH of an adapter; repeatable.", panel=_ADAPTERS)
    ] = None,
    lora_root: Annotated[
        str | None, _option("--lora-root", help="Folder to load adapters from at run time.", panel=_ADAPTERS)
    ] = None,
    host: Annotated[str | None, _option("--host", help="Address to listen on (127.0.0.1).", panel=_SERVER)] = None,
    port: Annotated[int | None, _option("--port", help="HTTP port (8000); 0: any free one.", panel=_SERVER)] = None,
    grpc_port: Annotated[int | None, _option("--grpc-port", help="gRPC port; 0: none.", panel=_SERVER)] = None,
    drain_propagation: Annotated[
        float | None,
        _option("--drain-propagation", help="Seconds to keep accepting after SIGTERM (5).", panel=_SERVER),
    ] = None,
    drain_timeout: Annotated[
        float | None, _option("--drain-timeout", help="Seconds for running requests to end (20).", panel=_SERVER)
    ] = None,
    request_timeout: Annotated[
        float | None, _option("--request-timeout", help="Seconds one request may take (3600).", panel=_SERVER)
    ] = None,
    max_body_bytes: Annotated[
        int | None, _option("--max-body-bytes", help="Largest request body (8 MiB).", panel=_SERVER)
    ] = None,
    log_level: Annotated[
        str | None, _option("--log-level", help="debug, info, warning or error.", panel=_SERVER)
    ] = None,
    log_format: Annotated[str | None, _option("--log-format", help="text or json.", panel=_SERVER)] = None,
    otlp_endpoint: Annotated[
        str | None, _option("--otlp-endpoint", help="OTLP/HTTP collector for traces.", panel=_SERVER)
    ] = None,
    debug_routes: Annotated[
        bool | None,
        _option("--debug-routes/--no-debug-routes", help="Answer GET /debug/scheduler.", panel=_SERVER),
    ] = None,
    config: Annotated[
        str | None, _option("--config", help="YAML file of these settings; flags win.", panel=_SERVER)
    ] = None,
) -> None:
    """Run one engine replica with its HTTP faces.

    Settings come from defaults, then --config, then OCTAVO_* variables, then flags. The server listens at once:
    /health/live answers while the model loads, /health/ready when it serves. SIGTERM drains, a second one leaves.
    """
    given = {name: value for name, value in locals().items() if value is not None}
    given.pop("config", None)
    raise typer.Exit(_serve(given, config))


def _serve(given: dict[str, Any], config: str | None) -> int:
    from octavo_server.settings import load_settings, pairs

    argument = given.pop("model_argument", None)
    names = given.pop("served_model_name", None)
    try:
        if argument is not None and given.setdefault("model", argument) != argument:
            raise ConfigError(f"model: given twice, as {argument!r} and as {given['model']!r}")
        if names:
            given["served_model_names"] = names
        if "lora_modules" in given:
            given["lora_modules"] = pairs(given["lora_modules"], "lora_modules")
        settings = load_settings(given, config_file=config, environment=os.environ)
    except ConfigError as error:
        typer.echo(f"octavo serve: {_with_flag(str(error), given)}", err=True)
        return 2

    from octavo_engine.parallel.node import is_follower_node, run_node
    from octavo_engine.tokenizer.load import load_tokenizer
    from octavo_server.serving import run_replica

    engine = settings.engine_config()
    try:
        if is_follower_node(engine):
            return run_node(engine)
        return run_replica(settings, _make_client, load_tokenizer)
    except OctavoError as error:
        typer.echo(f"octavo serve: {_with_flag(str(error), given)}", err=True)
        return 2


def _make_client(config: EngineConfig) -> EngineClient:
    if config.data_parallel_size == 1:
        from octavo_engine.process import EngineProcessClient

        return EngineProcessClient(config)
    from octavo_engine.process.data_parallel import DataParallelClient

    return DataParallelClient(config)


def _with_flag(message: str, given: dict[str, Any]) -> str:
    """Name the flag instead of the setting when the value came from the command line."""
    message = message.removeprefix("command line: ")
    name, separator, rest = message.partition(": ")
    flag = "--served-model-name" if name == "served_model_names" else f"--{name.replace('_', '-')}"
    return f"{flag}: {rest}" if separator and name in given else message
