"""A model and the small one that guesses for it, in one memory."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from octavo_engine.config import EngineConfig
from octavo_engine.errors import ConfigError
from octavo_engine.loader.load import Phases, load_runner, read_model
from octavo_engine.messages import LoadProgress
from octavo_engine.runner.interface import ModelRunner
from octavo_engine.runner.torch_runner import TorchModelRunner
from octavo_engine.speculation.draft_model import check_vocabulary
from octavo_engine.storage import resolve
from octavo_engine.tokenizer.load import load_tokenizer

_PROBE = "The year 2024: 1,5 \u00b5m of na\u00efve caf\u00e9s\n\tdef f(x): return x**2  # \u4f60\u597d \U0001f600"


def load_with_draft(
    config: EngineConfig, on_progress: Callable[[LoadProgress], None]
) -> tuple[ModelRunner, TorchModelRunner]:
    """(model, draft model). The KV memory is divided so that both hold the same number of blocks.

    Raises `ModelLoadError` or `ConfigError`, the latter also for a draft model that writes other tokens.
    """
    draft_config = msgspec.structs.replace(
        config,
        model=config.speculative_model,
        speculative_model="",
        revision=None,
        quantization="auto",
        task="generate",
        max_model_len=0,
        enable_lora=False,
        lora_modules={},
        lora_root="",
    )
    phases = Phases(on_progress)
    with phases.run("resolve"):
        path = resolve(draft_config.model, on_progress=phases.report)
    with phases.run("weights"):
        draft = read_model(draft_config, path, phases, None)
    runner = load_runner(config, on_progress, draft.info.kv_bytes_per_token)
    check_vocabulary(draft.info, runner.info)
    _check_tokens(draft.info.path, runner.info.path)
    draft.allocate_kv_cache(runner.info.kv_blocks_total)
    draft.warm_up()
    return runner, draft


def _check_tokens(draft: str, model: str) -> None:
    if draft == model:
        return
    ids = [load_tokenizer(path).encode(_PROBE, add_special_tokens=False) for path in (draft, model)]
    if ids[0] != ids[1]:
        raise ConfigError(
            "speculative_model: writes text in other tokens than the model; use a smaller model of the same family"
        )
