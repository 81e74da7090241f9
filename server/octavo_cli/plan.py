"""`octavo plan`: what a model needs and how many requests fit, before anything is started."""

from __future__ import annotations

import re
from typing import Annotated, Any

import msgspec
import torch
import typer
from rich.console import Console
from rich.table import Table

from octavo_engine.config import EngineConfig
from octavo_engine.errors import ConfigError, OctavoError
from octavo_engine.planning.capacity import DevicePlan, DoesNotFitError
from octavo_engine.planning.checkpoint_plan import plan_checkpoint
from octavo_engine.runner.machine import choose_device, free_memory_bytes
from octavo_engine.storage import resolve
from octavo_operator.plan.accelerators import find_product

GIB = 1 << 30
_MEMORY = re.compile(r"(\d+(?:\.\d+)?)\s*GiB", re.IGNORECASE)


def plan(
    model: Annotated[str, typer.Argument(help="Path or URI of the model.")],
    gpu: Annotated[
        str | None, typer.Option("--gpu", help="GPU it is meant for: a name (H100, L4) or its memory (24GiB).")
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype")] = "auto",
    quantization: Annotated[str, typer.Option("--quantization", help="auto, none, int8, int4 or fp8.")] = "auto",
    kv_cache_dtype: Annotated[str, typer.Option("--kv-cache-dtype")] = "auto",
    max_model_len: Annotated[int, typer.Option("--max-model-len", help="0: the model's own.")] = 0,
    max_num_seqs: Annotated[int, typer.Option("--max-num-seqs")] = 128,
    max_num_batched_tokens: Annotated[int, typer.Option("--max-num-batched-tokens")] = 0,
    block_size: Annotated[int, typer.Option("--block-size")] = 16,
    num_kv_blocks: Annotated[int, typer.Option("--num-kv-blocks")] = 0,
    kv_cache_memory_fraction: Annotated[float, typer.Option("--kv-cache-memory-fraction")] = 0.90,
    tensor_parallel_size: Annotated[int, typer.Option("--tensor-parallel-size")] = 1,
    pipeline_parallel_size: Annotated[int, typer.Option("--pipeline-parallel-size")] = 1,
    enable_expert_parallel: Annotated[bool, typer.Option("--enable-expert-parallel")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Predict weights, cache and concurrency of a model on a GPU, or on this machine without --gpu.

    Reads the headers of the checkpoint and a few rows of each matrix. Exit code 1: it does not fit, and what would.
    """
    settings: dict[str, Any] = {key: value for key, value in locals().items() if key not in ("gpu", "as_json")}
    try:
        config = EngineConfig(**settings)
        config.validate()
        made = _plan(config, gpu)
    except DoesNotFitError as error:
        if as_json:
            refusal = {"fits": False, "need_bytes": error.need_bytes, "have_bytes": error.have_bytes}
            typer.echo(msgspec.json.encode({**refusal, "fixes": error.fixes}).decode())
        else:
            typer.echo(f"octavo plan: {error}", err=True)
        raise typer.Exit(1) from error
    except OctavoError as error:
        typer.echo(f"octavo plan: {error}", err=True)
        raise typer.Exit(2) from error
    if as_json:
        typer.echo(msgspec.json.encode({"fits": True, **msgspec.structs.asdict(made)}).decode())
    else:
        _print(made)


def _plan(config: EngineConfig, gpu: str | None) -> DevicePlan:
    path = resolve(config.model)
    device = choose_device(config.device) if gpu is None else torch.device("cuda")
    memory = free_memory_bytes(device) if gpu is None else gpu_memory_bytes(gpu)
    return plan_checkpoint(path, config, device, memory, elsewhere=device.type == "cuda")


def gpu_memory_bytes(name: str) -> int:
    """Of a product's name, or of a size such as 24GiB. Raises `ConfigError`."""
    size = _MEMORY.fullmatch(name)
    if size:
        return int(float(size[1]) * GIB)
    product = find_product(name)
    if product is None:
        raise ConfigError(f"gpu: {name!r} is not known; give its memory instead, such as 24GiB")
    return product.memory_gib * GIB


def _print(made: DevicePlan) -> None:
    many = f", {made.num_devices} devices" if made.num_devices > 1 else ""
    table = Table(title=f"{made.model} ({made.architecture}) on {made.device}{many}", title_justify="left")
    table.add_column("each device")
    table.add_column("GiB", justify="right")
    table.add_column("")
    rows = (
        ("memory", made.memory_bytes, "free now" if made.device == "cpu" else "of the GPU"),
        ("process", made.context_bytes, ""),
        ("weights", made.weight_bytes + made.embedding_bytes, f"{made.dtype}, quantization: {made.quantization}"),
        ("activations", made.activation_bytes, "largest step"),
        ("KV cache", made.kv_bytes, f"{made.kv_blocks} blocks of {made.kv_block_size} tokens"),
    )
    for name, size, note in rows:
        table.add_row(name, f"{size / GIB:.2f}", note)
    console = Console()
    console.print(table)
    if made.kv_blocks:
        console.print(
            f"{made.concurrency_full_length:.1f} sequences of {made.max_model_len} tokens at once, "
            f"{made.concurrency_1k_tokens} of 1,024"
        )
