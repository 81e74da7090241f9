"""What is particular to models that cache one compressed vector a token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as hf
from torch.nn import functional

from models.test_decoder_architectures import CASES
from models.tiny_checkpoints import load, random_prompts, reference_logits, relative_error, write_checkpoint
from octavo_engine.errors import ConfigError
from octavo_engine.runner.interface import SequenceSlice

PROMPTS = random_prompts((9, 21))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    path = tmp_path_factory.mktemp("deepseek")
    model_type, config = CASES["deepseek v3"]
    return path, write_checkpoint(path, model_type, config())


def test_a_token_costs_its_compressed_vector_only(model: tuple[Path, torch.nn.Module]) -> None:
    runner = load(model[0])

    assert runner.info.kv_bytes_per_token == 3 * (16 + 8) * 4  # layers, latent and rotated part, float32


def test_copied_blocks_hold_what_was_copied(model: tuple[Path, torch.nn.Module]) -> None:
    path, reference = model
    runner = load(path)
    prompt = PROMPTS[1]
    runner.forward([SequenceSlice(prompt[:20], 0, range(6))])

    runner.copy_blocks([(block, block + 10) for block in range(5)])
    found = runner.forward([SequenceSlice(prompt[20:], 20, range(10, 16))])

    assert relative_error(found[-1], reference_logits(reference, [prompt])[0][-1]) < 1e-4


def test_texts_are_embedded_without_a_cache(model: tuple[Path, torch.nn.Module]) -> None:
    path, reference = model
    assert isinstance(reference, hf.DeepseekV3ForCausalLM)

    found = load(path, task="embed").embed(PROMPTS)

    with torch.inference_mode():
        states = [reference.model(torch.tensor([prompt])).last_hidden_state[0, -1] for prompt in PROMPTS]
    expected = functional.normalize(torch.stack(states), dim=-1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_eight_bit_caches_are_refused(model: tuple[Path, torch.nn.Module]) -> None:
    with pytest.raises(ConfigError, match="kv_cache_dtype: latent attention caches no 8-bit numbers"):
        load(model[0], kv_cache_dtype="int8")


def test_layers_that_guess_further_tokens_are_left_out(model: tuple[Path, torch.nn.Module], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path, _ = model
    tensors = load_file(path / "model.safetensors")
    extra = {name.replace("layers.2.", "layers.3."): t.clone() for name, t in tensors.items() if "layers.2." in name}
    save_file({**tensors, **extra}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((path / "config.json").read_text())

    assert load(tmp_path).info.task == "generate"
