"""Adapters as PEFT writes them, and what PEFT says a model with them answers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch


def write_adapter(base: torch.nn.Module, path: Path, seed: int, **config: Any) -> torch.nn.Module:
    """Save a random adapter of `base` under `path`; returns the model with its weights merged, float32."""
    import peft  # here: it imports Triton, which must not happen before the kernels' tests chose its interpreter

    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **config}
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
    model.save_pretrained(path)
    merged: torch.nn.Module = model.merge_and_unload().eval()
    return merged
