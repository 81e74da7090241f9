"""From an engine's configuration to a runner that is ready to serve."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from octavo_engine.config import EngineConfig
from octavo_engine.errors import ConfigError
from octavo_engine.kv.sizing import num_kv_blocks
from octavo_engine.loader.checkpoint import Checkpoint, open_checkpoint
from octavo_engine.loader.pooling_config import is_embedding_checkpoint, read_pooling
from octavo_engine.loader.quantization import OnTheFly
from octavo_engine.loader.weights import WeightLoader
from octavo_engine.messages import LoadProgress, ModelInfo
from octavo_engine.models.config import ModelConfig
from octavo_engine.models.interface import Model
from octavo_engine.models.registry import find_architecture
from octavo_engine.runner.kv_cache import kv_bytes_per_token
from octavo_engine.runner.machine import choose_device, choose_dtype, choose_kv_dtype, free_memory_bytes, usable_cpus
from octavo_engine.runner.pooling import PoolingMethod
from octavo_engine.runner.torch_runner import TorchModelRunner
from octavo_engine.storage import resolve

OnProgress = Callable[[LoadProgress], None]

_LONGEST_UNASKED = 1 << 17
_log = logging.getLogger(__name__)


def load_runner(config: EngineConfig, on_progress: OnProgress) -> TorchModelRunner:
    """Resolve, read and place the model, allocate its KV cache and run the first steps.

    `on_progress` hears of the phases resolve, weights, kv_cache and warmup. Raises `ModelLoadError` or `ConfigError`.
    """
    config.validate()
    phases = _Phases(on_progress)
    torch.set_num_threads(config.num_threads or usable_cpus())
    with phases.run("resolve"):
        path = resolve(
            config.model,
            revision=config.revision,
            on_progress=phases.report,
        )
    with phases.run("weights"):
        runner = _read_model(config, path, phases)
    if runner.info.task == "generate":
        with phases.run("kv_cache"):
            runner.allocate_kv_cache(_num_blocks(config, runner.info))
    with phases.run("warmup"):
        runner.warm_up()
    runner.record_phases(phases.seconds)
    return runner


def _read_model(config: EngineConfig, path: Path, phases: _Phases) -> TorchModelRunner:
    device = choose_device(config.device)
    checkpoint = open_checkpoint(path)
    quantize_to = _on_the_fly(config, checkpoint)
    quantized = checkpoint.is_quantized or quantize_to is not None
    dtype = choose_dtype(config.dtype, device, quantized=quantized)
    kv_dtype = choose_kv_dtype(config.kv_cache_dtype, dtype)
    architecture, model_class = find_architecture(checkpoint.config)
    model_config = model_class.configure(checkpoint.config, architecture)
    max_model_len = _max_model_len(config, model_config)
    weights = WeightLoader(
        checkpoint, dtype, device, lambda done: phases.report(done, checkpoint.path.name), quantize_to
    )
    model = model_class(model_config, weights, max_model_len)
    weights.finish(model.ignored_tensors)
    task = _task(config, checkpoint, model)
    info = ModelInfo(
        name=config.served_model_names[0] if config.served_model_names else path.stem,
        path=str(path),
        architecture=architecture,
        task=task,
        max_model_len=max_model_len,
        vocab_size=model_config.vocab_size,
        hidden_size=model_config.hidden_size,
        eos_token_ids=list(model_config.eos_token_ids),
        dtype=str(dtype).removeprefix("torch."),
        quantization=weights.describe_formats(),
        device=str(device),
        backend="",
        num_parameters=weights.num_parameters,
        weight_bytes=weights.weight_bytes,
        kv_block_size=config.block_size,
        kv_blocks_total=0,
        kv_bytes_per_token=kv_bytes_per_token(
            model_config.num_layers, model_config.num_kv_heads, model_config.head_dim, kv_dtype
        ),
    )
    default = PoolingMethod.LAST if model.can_generate else PoolingMethod.MEAN
    return TorchModelRunner(model, info, kv_dtype, read_pooling(path, default))


def _on_the_fly(config: EngineConfig, checkpoint: Checkpoint) -> OnTheFly | None:
    """The format to bring a dense checkpoint to; a quantized one is served as it is."""
    if config.quantization in ("auto", "none"):
        return None
    if checkpoint.is_quantized:
        raise ConfigError(
            f"quantization: {checkpoint.path.name} is quantized already and cannot be brought to "
            f"{config.quantization}; use quantization=auto"
        )
    return OnTheFly(config.quantization)


def _max_model_len(config: EngineConfig, model: ModelConfig) -> int:
    """What was asked for; else what the model allows, up to a length whose tables any machine can hold."""
    longest = model.max_position_embeddings
    if config.max_model_len > longest:
        raise ConfigError(f"max_model_len: {config.max_model_len} is beyond the {longest} positions of the model")
    if not config.max_model_len and longest > _LONGEST_UNASKED:
        _log.warning("serving %d of the model's %d positions; set max_model_len for more", _LONGEST_UNASKED, longest)
    return config.max_model_len or min(longest, _LONGEST_UNASKED)


def _num_blocks(config: EngineConfig, info: ModelInfo) -> int:
    return num_kv_blocks(config, info, free_memory_bytes(torch.device(info.device)))


def _task(config: EngineConfig, checkpoint: Checkpoint, model: Model) -> str:
    """`auto` embeds where the model cannot generate or sentence-transformers laid the checkpoint out."""
    if config.task == "generate" and not model.can_generate:
        raise ConfigError(f"task: {model.config.architecture} is an embedding model; use task=embed or auto")
    if config.task != "auto":
        return config.task
    return "embed" if not model.can_generate or is_embedding_checkpoint(checkpoint.path) else "generate"


class _Phases:
    """Names, times and reports the phases of start-up."""

    def __init__(self, on_progress: OnProgress) -> None:
        self.seconds: dict[str, float] = {}
        self._on_progress = on_progress
        self._phase = ""

    @contextmanager
    def run(self, phase: str) -> Iterator[None]:
        self._phase = phase
        started = time.monotonic()
        self.report(0.0)
        yield
        self.seconds[phase] = time.monotonic() - started
        self.report(1.0)

    def report(self, fraction: float, detail: str = "") -> None:
        self._on_progress(LoadProgress(phase=self._phase, fraction=fraction, detail=detail))
