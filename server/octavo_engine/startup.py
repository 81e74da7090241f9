"""From settings to a warm engine core; the same in an engine process and in a script."""

from __future__ import annotations

from collections.abc import Callable

from octavo_engine.config import EngineConfig
from octavo_engine.engine import EngineCore
from octavo_engine.messages import LoadProgress
from octavo_engine.roofline import Roofline, measure_limits
from octavo_engine.runner.interface import ModelRunner

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
        runner = _real_loader()(config, on_progress)
        core = EngineCore(runner, config, roofline=Roofline(runner.info, measure_limits(runner.info)))
    _load_adapters(core, config)
    return core


def _load_adapters(core: EngineCore, config: EngineConfig) -> None:
    for name, uri in config.lora_modules.items():
        if core.adapters is not None:
            core.adapters.load_at_start(name, uri)


def _real_loader() -> LoadRunner:
    from octavo_engine.loader.load import load_runner

    return load_runner
