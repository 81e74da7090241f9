"""gpt-oss checkpoints keep their experts in MXFP4; ours stands for the same numbers, block by block."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from models.tiny_checkpoints import (
    SIZES,
    load,
    paged_logits,
    random_prompts,
    reference_logits,
    relative_error,
    write_checkpoint,
)

CONFIG = {
    **SIZES,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "sliding_window": 6,
}
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # E2M1, the sign in the highest bit


def random_mxfp4(experts: int, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(blocks [experts, rows, columns / 32, 16], scales [experts, rows, columns / 32], dense), a code at a time."""
    codes = torch.randint(0, 16, (experts, rows, columns // 32, 32), dtype=torch.uint8)
    scales = torch.randint(122, 126, (experts, rows, columns // 32), dtype=torch.uint8)
    magnitude = torch.tensor(VALUES)[(codes & 7).long()]
    signed = torch.where(codes >= 8, -magnitude, magnitude)
    dense = (signed * 2.0 ** (scales.float() - 127).unsqueeze(-1)).flatten(2)
    return codes[..., 0::2] | (codes[..., 1::2] << 4), scales, dense


def test_experts_in_mxfp4_equal_the_dense_model(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path, hf.GptOssForCausalLM, hf.GptOssConfig(**CONFIG))
    tensors = load_file(tmp_path / "model.safetensors")
    for layer in range(3):
        experts = model.model.layers[layer].mlp.experts
        for name in ("gate_up_proj", "down_proj"):
            stem = f"model.layers.{layer}.mlp.experts.{name}"
            count, columns, rows = tensors.pop(stem).shape
            blocks, scales, dense = random_mxfp4(count, rows, columns)
            tensors |= {f"{stem}_blocks": blocks, f"{stem}_scales": scales}
            with torch.no_grad():
                getattr(experts, name).copy_(dense.transpose(1, 2))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "mxfp4"}}))
    prompts = random_prompts((3, 25))

    runner = load(tmp_path)

    assert "MXFP4" in runner.info.quantization
    for ours, theirs in zip(paged_logits(runner, prompts), reference_logits(model, prompts), strict=True):
        assert relative_error(ours, theirs) < 1e-4
