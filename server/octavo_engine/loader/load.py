"""From an engine's configuration to a runner that is ready to serve."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import torch

from octavo_engine.config import EngineConfig
from octavo_engine.errors import ConfigError
from octavo_engine.kv.sizing import activation_bytes, num_host_blocks, num_kv_blocks
from octavo_engine.layers.classifier import Classifier, YesOrNo
from octavo_engine.loader.checkpoint import Checkpoint, open_checkpoint
from octavo_engine.loader.costs import with_costs
from octavo_engine.loader.pooling_config import is_embedding_checkpoint, read_pooling
from octavo_engine.loader.quantization import OnTheFly
from octavo_engine.loader.weights import WeightLoader
from octavo_engine.lora.layers import AdaptedModel
from octavo_engine.messages import LoadProgress, ModelInfo
from octavo_engine.models.classification import labels
from octavo_engine.models.config import ModelConfig
from octavo_engine.models.decoder import Decoder
from octavo_engine.models.interface import Model
from octavo_engine.models.registry import find_architecture
from octavo_engine.parallel.host import RankHost, backend_for, topology_of
from octavo_engine.parallel.rank import SINGLE
from octavo_engine.parallel.topology import check_topology
from octavo_engine.runner.interface import ModelRunner
from octavo_engine.runner.machine import choose_device, choose_dtype, choose_kv_dtype, free_memory_bytes, usable_cpus
from octavo_engine.runner.pooling import Pool, Pooling, PoolingMethod
from octavo_engine.runner.torch_runner import TorchModelRunner
from octavo_engine.scheduler.limits import limits_for
from octavo_engine.storage import resolve
from octavo_engine.tokenizer.load import load_tokenizer

OnProgress = Callable[[LoadProgress], None]

_LONGEST_UNASKED = 1 << 17
_log = logging.getLogger(__name__)


def load_runner(config: EngineConfig, on_progress: OnProgress, kv_bytes_beside: int = 0) -> ModelRunner:
    """Resolve, read and place the model, allocate its KV cache and run the first steps.

    `on_progress` hears of the phases resolve, weights, kv_cache and warmup. With more than one rank this process is
    the first and starts the others of this machine. kv_bytes_beside: KV bytes of each token in a second model that gets
    as many blocks. Raises `ModelLoadError` or `ConfigError`.
    """
    config.validate()
    phases = Phases(on_progress)
    with phases.run("resolve"):
        path = resolve(config.model, revision=config.revision, on_progress=phases.report)
    if config.num_ranks == 1:
        torch.set_num_threads(config.num_threads or usable_cpus())
        return load_rank(config, path, phases, None, kv_bytes_beside)
    _check_ranks(config, path)
    from octavo_engine.parallel.leader import lead

    return lead(config, path, phases)


def _check_ranks(config: EngineConfig, path: Path) -> None:
    """Raise `ConfigError` where the model cannot be divided as asked, before any rank is started."""
    raw = open_checkpoint(path).config
    architecture, model_class = find_architecture(raw)
    if not issubclass(model_class, Decoder):
        raise ConfigError(f"tensor_parallel_size: {architecture} runs on one device; use data_parallel_size")
    check_topology(model_class.configure(raw, architecture), topology_of(config))
    backend_for(config, choose_device(config.device))


def load_rank(
    config: EngineConfig, path: Path, phases: Phases, host: RankHost | None = None, kv_bytes_beside: int = 0
) -> TorchModelRunner:
    """This rank's part of the model, warm. host: its rank and machine; the number of blocks is agreed on."""
    with phases.run("weights"):
        runner = read_model(config, path, phases, host)
    if runner.info.task == "generate":
        with phases.run("kv_cache"):
            info = runner.info
            sized = msgspec.structs.replace(info, kv_bytes_per_token=info.kv_bytes_per_token + kv_bytes_beside)
            blocks = _num_blocks(config, sized, runner.model.config, 1 if host is None else host.ranks_here)
            runner.allocate_kv_cache(blocks if host is None else host.control.minimum(blocks))
            if config.kv_host_memory_bytes:
                blocks = num_host_blocks(config, runner.info, free_memory_bytes(torch.device("cpu")))
                runner.allocate_host_cache(blocks if host is None else host.control.minimum(blocks))
    with phases.run("warmup"):
        runner.warm_up()
    runner.record_phases(phases.seconds)
    return runner


def read_model(config: EngineConfig, path: Path, phases: Phases, host: RankHost | None) -> TorchModelRunner:
    device = choose_device(config.device) if host is None else host.device
    checkpoint = open_checkpoint(path)
    quantize_to = on_the_fly(config, checkpoint)
    quantized = checkpoint.is_quantized or quantize_to is not None
    dtype = choose_dtype(config.dtype, device, quantized=quantized)
    kv_dtype = choose_kv_dtype(config.kv_cache_dtype, dtype)
    architecture, model_class = find_architecture(checkpoint.config)
    model_config = model_class.configure(checkpoint.config, architecture)
    max_model_len = max_model_len_of(config, model_config)
    rank = SINGLE if host is None else host.rank
    weights = WeightLoader(
        checkpoint, dtype, device, lambda done: phases.report(done, checkpoint.path.name), quantize_to, rank
    )
    model = model_class(model_config, weights, max_model_len)
    weights.finish(model.ignored_tensors)
    task = _task(config, checkpoint, model)
    judges = task == "classify" and model.classifier is None
    names = ("yes",) if judges else labels(checkpoint.config) if task == "classify" else ()
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
        kv_bytes_per_token=model.cache_layout.bytes_per_token(kv_dtype),
        num_ranks=config.num_ranks,
        labels=list(names),
        judges_by_yes=judges,
    )
    info = with_costs(info, model_config, can_generate=model.can_generate)
    adapted = None
    if config.enable_lora and task != "generate":
        raise ConfigError(f"enable_lora: adapters are for models that generate; this one is served to {task}")
    if config.enable_lora:
        max_num_tokens = limits_for(config, device.type).max_num_batched_tokens
        adapted = AdaptedModel(model, dtype, config.max_loras, config.max_lora_rank, max_num_tokens)
        info = msgspec.structs.replace(info, adapter_bytes=adapted.nbytes)
    return TorchModelRunner(model, info, kv_dtype, _pool(task, path, model), adapted)


def _pool(task: str, path: Path, model: Model) -> Pool:
    """From token states to what a text is answered with."""
    if task != "classify":
        return read_pooling(path, PoolingMethod.LAST if model.can_generate else PoolingMethod.MEAN)
    if model.classifier is not None:
        return model.classifier
    tokenizer = load_tokenizer(str(path))
    words = [tokenizer.encode(word, add_special_tokens=False) for word in ("yes", "no")]
    if any(len(word) != 1 for word in words):
        raise ConfigError(f"task: {path.name} has no tokens for yes and no, so it cannot classify; use task=generate")
    last = Pooling(PoolingMethod.LAST, normalize=False)
    judge = YesOrNo(words[0][0], words[1][0]) if model.rank.tensor_rank == 0 else _first_column
    return Classifier(last, (model.logits,), judge)


def _first_column(logits: torch.Tensor) -> torch.Tensor:
    """Of ranks that share a head only the first sees all of it; nobody reads what the others say."""
    return logits[:, :1]


def on_the_fly(config: EngineConfig, checkpoint: Checkpoint) -> OnTheFly | None:
    """The format to bring a dense checkpoint to; a quantized one is served as it is."""
    if config.quantization in ("auto", "none"):
        return None
    if checkpoint.is_quantized:
        raise ConfigError(
            f"quantization: {checkpoint.path.name} is quantized already and cannot be brought to "
            f"{config.quantization}; use quantization=auto"
        )
    return OnTheFly(config.quantization)


def max_model_len_of(config: EngineConfig, model: ModelConfig) -> int:
    """Positions to serve: as asked for; else the model's own, up to a length whose tables any machine can hold."""
    longest = model.max_position_embeddings
    if config.max_model_len > longest:
        raise ConfigError(f"max_model_len: {config.max_model_len} is beyond the {longest} positions of the model")
    if not config.max_model_len and longest > _LONGEST_UNASKED:
        _log.warning("serving %d of the model's %d positions; set max_model_len for more", _LONGEST_UNASKED, longest)
    return config.max_model_len or min(longest, _LONGEST_UNASKED)


def _num_blocks(config: EngineConfig, info: ModelInfo, model: ModelConfig, ranks_here: int) -> int:
    """ranks_here: the ranks that share this machine's memory; GPUs have their own."""
    device = torch.device(info.device)
    free = free_memory_bytes(device)
    if device.type != "cuda":
        return num_kv_blocks(config, info, free // ranks_here)
    tokens = limits_for(config, device.type).max_num_batched_tokens
    itemsize = getattr(torch, info.dtype).itemsize
    return num_kv_blocks(config, info, free, activation_bytes(config, model, itemsize, tokens))


def _task(config: EngineConfig, checkpoint: Checkpoint, model: Model) -> str:
    """`auto` classifies where there is a head for it, and embeds where the model cannot generate or where
    sentence-transformers laid the checkpoint out. A language model asked to classify judges by yes and no."""
    asked, name = config.task, model.config.architecture
    if model.classifier is not None:
        if asked not in ("auto", "classify"):
            raise ConfigError(f"task: {name} is a classifier; use task=classify or auto")
        return "classify"
    if asked == "classify" and not model.can_generate:
        raise ConfigError(f"task: {name} has no head to classify with; use task=embed or auto")
    if asked == "generate" and not model.can_generate:
        raise ConfigError(f"task: {name} is an embedding model; use task=embed or auto")
    if asked != "auto":
        return asked
    return "embed" if not model.can_generate or is_embedding_checkpoint(checkpoint.path) else "generate"


class Phases:
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
