"""From settings to a warm engine core; the same in an engine process and in a script."""

from __future__ import annotations

from collections.abc import Callable

from octavo_engine.config import EngineConfig
from octavo_engine.engine import EngineCore
from octavo_engine.messages import LoadProgress
from octavo_engine.roofline import Roofline, measure_limits
from octavo_engine.runner.interface import ModelRunner
from octavo_engine.runner.machine import return_freed_memory, torch_threads, usable_cpus

OnProgress = Callable[[LoadProgress], None]
LoadRunner = Callable[[EngineConfig, OnProgress], ModelRunner]


def build_engine(config: EngineConfig, on_progress: OnProgress, load: LoadRunner | None = None) -> EngineCore:
    """Load a model and return a core that can step. Raises `ConfigError` or `ModelLoadError`.

    `load` returns a runner that is warm and has its KV cache; without one the real loader is used.
    """
    config.validate()
    if load is not None:
        core = EngineCore(load(config, on_progress), config)
    else:
        runner, draft = _load(config, on_progress)
        with torch_threads(config.num_threads or usable_cpus()):  # native steps leave torch one thread
            roofline = Roofline(runner.info, measure_limits(runner.info))
        core = EngineCore(runner, config, roofline=roofline, draft=draft)
    _load_adapters(core, config)
    return_freed_memory()
    return core


def _load_adapters(core: EngineCore, config: EngineConfig) -> None:
    for name, uri in config.lora_modules.items():
        if core.adapters is not None:
            core.adapters.load_at_start(name, uri)


def _load(config: EngineConfig, on_progress: OnProgress) -> tuple[ModelRunner, ModelRunner | None]:
    """(model, draft model if there is one)."""
    from octavo_engine.planning.shortage import shortage_explained

    with shortage_explained(config):
        if config.speculative_model:
            from octavo_engine.loader.draft import load_with_draft

            return load_with_draft(config, on_progress)
        from octavo_engine.loader.load import load_runner

        return load_runner(config, on_progress), None
