"""The exact words of every refusal for want of memory: what is needed, what there is, what to change.

`golden/memory_errors.json` holds them for review; a change of wording is a change of that file.
"""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from models.test_capacity_plan import MODELS, write_sparse_checkpoint
from octavo_cli.plan import gpu_memory_bytes
from octavo_engine.config import EngineConfig
from octavo_engine.errors import ConfigError
from octavo_engine.kv.sizing import GIB, num_host_blocks, num_kv_blocks
from octavo_engine.messages import ModelInfo
from octavo_engine.planning.capacity import plan_with_fixes
from octavo_engine.planning.measuring import measure
from octavo_engine.process.client import describe_exit
from octavo_operator.faults import meaning_of

GOLDEN: dict[str, str] = json.loads((Path(__file__).parent / "golden" / "memory_errors.json").read_text())
CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture(scope="module")
def eight_billion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sparse") / "8B"
    write_sparse_checkpoint(path, MODELS["8B"])
    return path


def reason(said: str) -> str:
    """What the operator puts into a service's status when its engine ends with these words."""
    told = meaning_of(f"octavo serve: {said}")
    assert told is not None
    return told[0]


def refusal(act: Callable[[], Any]) -> str:
    with pytest.raises(ConfigError) as refused:
        act()
    return str(refused.value)


PLANS: dict[str, tuple[torch.device, int, dict[str, Any]]] = {
    "plan: the cache of one request": (CUDA, gpu_memory_bytes("24GiB"), {"max_model_len": 131_072}),
    "plan: weights": (CUDA, gpu_memory_bytes("16GiB"), {"max_model_len": 4_096}),
    "plan: as many blocks as were asked for": (CUDA, gpu_memory_bytes("L4"), {"num_kv_blocks": 100_000}),
    "plan: bytes of cache that were asked for": (CUDA, gpu_memory_bytes("L4"), {"kv_cache_memory_bytes": 20 * GIB}),
    "plan: everything is small already": (
        CUDA,
        GIB,
        {"max_model_len": 512, "kv_cache_dtype": "int8", "quantization": "int4", "tensor_parallel_size": 8},
    ),
    "plan: a machine without a GPU": (CPU, 12 * GIB, {"max_model_len": 4_096}),
}


@pytest.mark.parametrize("name", PLANS)
def test_what_cannot_be_planned_is_refused_in_these_words(name: str, eight_billion: Path) -> None:
    device, memory, settings = PLANS[name]
    config = EngineConfig(model="m", dtype="bfloat16", **settings)

    def attempt(of: EngineConfig) -> Any:
        return plan_with_fixes(
            "m", of, lambda c: measure(eight_billion, c, device, elsewhere=True), device.type, memory
        )

    said = refusal(lambda: attempt(config))

    assert said == GOLDEN[name]
    assert reason(said) == "DoesNotFit"
    for setting in re.findall(r"(--\S+ [^(]+) \(", said):  # whoever follows any of them gets further
        words = setting.replace("--", "").replace("-", "_").split()
        changed = {
            name: int(value) if value.isdigit() else value for name, value in zip(words[::2], words[1::2], strict=True)
        }
        assert attempt(EngineConfig(model="m", **{"dtype": "bfloat16", **settings, **changed}))


def info(device: str) -> ModelInfo:
    """An 8B model at 32k tokens."""
    return ModelInfo(
        name="", path="", architecture="", task="generate", max_model_len=32_768, vocab_size=0, hidden_size=0,
        eos_token_ids=[], dtype="", quantization="", device=device, backend="", num_parameters=0, weight_bytes=0,
        kv_block_size=16, kv_blocks_total=0, kv_bytes_per_token=131_072,
    )  # fmt: skip


ENGINES: dict[str, Callable[[], Any]] = {
    "engine: the cache after the weights": lambda: num_kv_blocks(
        EngineConfig(model="m", max_model_len=32_768), info("cuda:0"), 4 * GIB, GIB
    ),
    "engine: a cache that was limited": lambda: num_kv_blocks(
        EngineConfig(model="m", max_model_len=32_768, kv_cache_memory_bytes=GIB), info("cpu"), 64 * GIB
    ),
    "engine: more host memory than there is": lambda: num_host_blocks(
        EngineConfig(model="m", kv_host_memory_bytes=64 * GIB), info("cuda:0"), 16 * GIB
    ),
    "engine: less host memory than a block": lambda: num_host_blocks(
        EngineConfig(model="m", kv_host_memory_bytes=1_024), info("cuda:0"), 16 * GIB
    ),
}


@pytest.mark.parametrize("name", ENGINES)
def test_what_an_engine_cannot_hold_is_refused_in_these_words(name: str) -> None:
    said = refusal(ENGINES[name])

    assert said == GOLDEN[name]
    assert reason(said) == "DoesNotFit"


def test_a_killed_engine_is_suspected_of_too_much_memory() -> None:
    assert describe_exit(-signal.SIGKILL) == GOLDEN["engine: killed"]


def test_the_file_holds_no_other_words() -> None:
    assert sorted(GOLDEN) == sorted([*PLANS, *ENGINES, "engine: killed"])
