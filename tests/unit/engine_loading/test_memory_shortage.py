"""Memory that ends while a model is loaded is told as a plan tells it, not in an allocator's words."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import msgspec
import pytest
import torch
import transformers as hf

from models.tiny_checkpoints import SIZES, write_checkpoint
from octavo_engine.config import EngineConfig
from octavo_engine.errors import ConfigError
from octavo_engine.planning import shortage
from octavo_engine.startup import build_engine
from octavo_operator.faults import meaning_of


@pytest.fixture
def config(tmp_path: Path) -> EngineConfig:
    write_checkpoint(tmp_path, hf.LlamaForCausalLM, hf.LlamaConfig(**SIZES))
    return EngineConfig(model=str(tmp_path), device="cpu", max_model_len=64, max_num_seqs=2)


def more_than_there_is(*_: object) -> NoReturn:
    """The allocator's own error: no machine has an exbibyte."""
    torch.empty(1 << 60, dtype=torch.uint8)
    raise AssertionError("an exbibyte was had")


def test_a_model_that_is_too_large_is_refused_with_need_have_and_fixes(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("octavo_engine.loader.load.load_runner", more_than_there_is)
    monkeypatch.setattr(shortage, "free_memory_bytes", lambda _: 1 << 30)

    with pytest.raises(ConfigError, match=r"needs \d+\.\d\d GiB .*, have 1\.00 GiB; use --num-kv-blocks 0 ") as told:
        build_engine(msgspec.structs.replace(config, num_kv_blocks=10_000_000), lambda _: None)

    assert meaning_of(str(told.value)) is not None


def test_where_the_plan_says_that_it_fits_somebody_else_is_suspected(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("octavo_engine.loader.load.load_runner", more_than_there_is)

    with pytest.raises(ConfigError, match=r"does not fit: memory ended .* see what else takes memory"):
        build_engine(config, lambda _: None)


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("no")])
def test_other_errors_pass_as_they_are(error: Exception, config: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> NoReturn:
        raise error

    monkeypatch.setattr("octavo_engine.loader.load.load_runner", fail)

    with pytest.raises(type(error), match=str(error)):
        build_engine(config, lambda _: None)


def test_a_gpus_own_error_counts_too(config: EngineConfig) -> None:
    with pytest.raises(ConfigError, match="does not fit"), shortage.shortage_explained(config):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
