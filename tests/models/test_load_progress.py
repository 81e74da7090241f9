"""Whoever waits for a model hears how far it is."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

import transformers as hf

from models.tiny_checkpoints import SIZES, write_checkpoint
from octavo_engine.config import EngineConfig
from octavo_engine.loader.load import load_runner
from octavo_engine.messages import LoadProgress


def test_phases_come_in_order_and_each_runs_from_nothing_to_done(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, hf.LlamaForCausalLM, hf.LlamaConfig(**SIZES))
    heard: list[LoadProgress] = []

    load_runner(EngineConfig(model=str(tmp_path), device="cpu", num_kv_blocks=8, num_threads=1), heard.append)

    by_phase = {phase: [p.fraction for p in told] for phase, told in groupby(heard, key=lambda p: p.phase)}
    assert list(by_phase) == ["resolve", "weights", "kv_cache", "warmup"]
    for fractions in by_phase.values():
        assert fractions == sorted(fractions)
        assert (fractions[0], fractions[-1]) == (0.0, 1.0)
    assert len(by_phase["weights"]) > 10
