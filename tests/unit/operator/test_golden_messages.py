"""The exact words in which a service's status says what is wrong: what, why, with which numbers, and what to do.

`golden/messages.json` holds them for review; a change of wording is a change of that file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from octavo_operator.faults import find_fault
from octavo_operator.observation import observe
from unit.operator.test_fit import LLAMA_8B, LLAMA_8B_BYTES, LLAMA_70B, LLAMA_70B_BYTES, SMOLLM2, gpu, planned, shape
from unit.operator.test_status import FAULTS, deployment

GOLDEN: dict[str, str] = json.loads((Path(__file__).parent / "golden" / "messages.json").read_text())
SMOLLM2_BYTES = 269_060_552

FITS: dict[str, tuple[dict[str, Any], int, dict[str, Any]]] = {
    "fit: it does": (LLAMA_8B, LLAMA_8B_BYTES, gpu("NVIDIA-H100-80GB-HBM3")),
    "fit: the cache of one request": (
        LLAMA_8B, LLAMA_8B_BYTES, gpu("NVIDIA-L4") | {"model": {"maxModelLen": 131_072}},
    ),
    "fit: weights": (LLAMA_70B, LLAMA_70B_BYTES, gpu("NVIDIA-H100-80GB-HBM3") | {"model": {"maxModelLen": 8_192}}),
    "fit: nothing helps": (
        LLAMA_70B, LLAMA_70B_BYTES,
        gpu("NVIDIA-L4") | {"model": {"maxModelLen": 8_192, "quantization": {"weights": "Int4", "kvCache": "FP8"}},
                            "parallelism": {"tensor": 2}, "resources": {"limits": {"nvidia.com/gpu": 2}}},
    ),
    "fit: a machine without a GPU": (SMOLLM2, SMOLLM2_BYTES, {"resources": {"limits": {"cpu": 2, "memory": "512Mi"}}}),
}  # fmt: skip


@pytest.mark.parametrize("name", FITS)
def test_whether_a_model_fits_is_told_in_these_words(name: str) -> None:
    config, weight_bytes, spec = FITS[name]

    fit = planned(shape(config, weight_bytes), **spec).fit

    assert fit is not None
    assert fit.message == GOLDEN[name]
    assert fit.fits == (name == "fit: it does")


@pytest.mark.parametrize(("name", "seen"), [(f"fault: {name}", seen) for name, seen, *_ in FAULTS])
def test_each_fault_is_told_in_these_words(name: str, seen: dict[str, Any]) -> None:
    fault = find_fault(observe(seen, []) if "spec" in seen else observe(deployment(), [seen]))

    assert fault is not None
    assert fault.message == GOLDEN[name]


def test_the_file_holds_no_other_words() -> None:
    assert sorted(GOLDEN) == sorted([*FITS, *(f"fault: {name}" for name, *_ in FAULTS)])
