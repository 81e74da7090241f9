"""What fits a device, and the smallest changes that make fit what does not. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from octavo_engine.config import EngineConfig
from octavo_engine.errors import ConfigError
from octavo_engine.kv.sizing import CPU_HEADROOM_BYTES, GIB, activation_bytes, num_kv_blocks
from octavo_engine.messages import ModelInfo
from octavo_engine.planning.measuring import Footprint, Measure
from octavo_engine.scheduler.limits import limits_for

CONTEXT_BYTES = {"cuda": 600 << 20, "cpu": 0}  # of a process, before it holds a weight; a CPU's is not free memory
MAX_FIXES = 3
_TYPICAL_TOKENS = 1_024


class DevicePlan(msgspec.Struct, frozen=True, kw_only=True):
    """Memory of one device in bytes, and what it is for. concurrency: sequences of full length at once, in all."""

    model: str
    architecture: str
    device: str
    num_devices: int
    memory_bytes: int
    dtype: str
    quantization: str
    max_model_len: int
    context_bytes: int
    weight_bytes: int
    embedding_bytes: int
    activation_bytes: int
    kv_bytes_per_token: int
    kv_block_size: int
    kv_blocks: int
    concurrency_full_length: float
    concurrency_1k_tokens: int

    @property
    def kv_bytes(self) -> int:
        return self.kv_blocks * self.kv_block_size * self.kv_bytes_per_token


class Fix(msgspec.Struct, frozen=True, kw_only=True):
    """A change of settings with which the model fits."""

    setting: str
    why: str


class DoesNotFitError(ConfigError):
    """Need, have, and fixes, the smallest first."""

    def __init__(self, need_bytes: int, have_bytes: int, what: str, fixes: Sequence[Fix]) -> None:
        self.need_bytes = need_bytes
        self.have_bytes = have_bytes
        self.fixes = list(fixes)
        ways = "; ".join(f"{fix.setting} ({fix.why})" for fix in fixes) or "a device with more memory"
        super().__init__(
            f"does not fit: needs {need_bytes / GIB:.2f} GiB a device for {what}, have {have_bytes / GIB:.2f} GiB; "
            f"use {ways}"
        )


def plan_device(model: str, config: EngineConfig, footprint: Footprint, device: str, memory_bytes: int) -> DevicePlan:
    """memory_bytes: of one GPU, or free on a CPU machine. Raises `DoesNotFitError` without fixes."""
    context = CONTEXT_BYTES[device]
    tokens_a_step = limits_for(config, device).max_num_batched_tokens
    activations = activation_bytes(config, footprint.config, footprint.dtype.itemsize, tokens_a_step)
    held = context + footprint.weight_bytes + footprint.embedding_bytes
    free = memory_bytes - held
    blocks = 0
    one = -(-footprint.max_model_len // config.block_size) * config.block_size * footprint.kv_bytes_per_token
    if footprint.can_generate:
        info = _info(config, footprint, device)
        try:
            blocks = num_kv_blocks(config, info, max(0, free), activations)
        except ConfigError:
            what = f"weights and one sequence of {footprint.max_model_len} tokens"
            raise DoesNotFitError(held + activations + one, memory_bytes, what, ()) from None
    cache = blocks * config.block_size * footprint.kv_bytes_per_token
    reserve = CPU_HEADROOM_BYTES if device == "cpu" else 0
    if held + cache + max(activations, reserve) > memory_bytes:
        what = f"weights, {blocks} KV blocks and a step's activations"
        raise DoesNotFitError(held + cache + max(activations, reserve), memory_bytes, what, ())
    tokens = blocks * config.block_size
    longest = min(footprint.max_model_len, tokens) if blocks else footprint.max_model_len  # as the engine cuts it
    return DevicePlan(
        model=model,
        architecture=footprint.architecture,
        device=device,
        num_devices=config.num_ranks,
        memory_bytes=memory_bytes,
        dtype=str(footprint.dtype).removeprefix("torch."),
        quantization=footprint.quantization,
        max_model_len=longest,
        context_bytes=context,
        weight_bytes=footprint.weight_bytes,
        embedding_bytes=footprint.embedding_bytes,
        activation_bytes=activations,
        kv_bytes_per_token=footprint.kv_bytes_per_token,
        kv_block_size=config.block_size,
        kv_blocks=blocks,
        concurrency_full_length=min(config.max_num_seqs, tokens / longest),
        concurrency_1k_tokens=min(config.max_num_seqs, tokens // min(_TYPICAL_TOKENS, longest)),
    )


def plan_with_fixes(model: str, config: EngineConfig, measure: Measure, device: str, memory_bytes: int) -> DevicePlan:
    """As `plan_device`; what does not fit is refused with up to three changes that do, the smallest first."""

    def attempt(changed: EngineConfig) -> DevicePlan:
        return plan_device(model, changed, measure(changed), device, memory_bytes)

    try:
        return attempt(config)
    except DoesNotFitError as error:
        fixes = find_fixes(config, attempt, device)
        what = str(error).partition(" a device for ")[2].partition(", have ")[0]
        raise DoesNotFitError(error.need_bytes, error.have_bytes, what, fixes) from None


def find_fixes(config: EngineConfig, attempt: Callable[[EngineConfig], DevicePlan], device: str) -> list[Fix]:
    """Changes in the order of what they cost a user: cache precision, context, fewer sequences, weights, devices."""
    candidates: list[tuple[str, str, EngineConfig]] = []

    def add(why: str, **settings: object) -> None:
        flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in settings.items())
        candidates.append((flags, why, msgspec.structs.replace(config, **settings)))

    if config.num_kv_blocks or config.kv_cache_memory_bytes:
        add("as many blocks as fit", num_kv_blocks=0, kv_cache_memory_bytes=0)
    if config.kv_cache_dtype not in ("int8", "fp8"):
        add("half the cache of 16 bits", kv_cache_dtype="int8")
    for length in (32_768, 8_192, 4_096, 2_048):
        if not config.max_model_len or length < config.max_model_len:
            add("a shorter context", max_model_len=length)
    for kind in ("int8", "int4"):
        if config.quantization in ("auto", "none"):
            add("smaller weights", quantization=kind)
    if device == "cuda":
        for count in (2, 4, 8, 16):
            if count > config.tensor_parallel_size:
                add("weights and cache over more GPUs", tensor_parallel_size=count)
    found: list[Fix] = []
    kinds: set[str] = set()
    for flags, why, changed in candidates:
        if why in kinds:
            continue
        try:
            attempt(changed)
        except ConfigError:
            continue
        kinds.add(why)
        found.append(Fix(setting=flags, why=why))
    return found[:MAX_FIXES]


def _info(config: EngineConfig, footprint: Footprint, device: str) -> ModelInfo:
    """What the engine's own sizing wants to know."""
    return ModelInfo(
        name="",
        path="",
        architecture=footprint.architecture,
        task="generate",
        max_model_len=footprint.max_model_len,
        vocab_size=footprint.config.vocab_size,
        hidden_size=footprint.config.hidden_size,
        eos_token_ids=[],
        dtype="",
        quantization="",
        device=device,
        backend="",
        num_parameters=0,
        weight_bytes=footprint.weight_bytes,
        kv_block_size=config.block_size,
        kv_blocks_total=0,
        kv_bytes_per_token=footprint.kv_bytes_per_token,
    )
