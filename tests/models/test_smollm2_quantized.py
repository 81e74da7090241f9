"""How much perplexity quantizing costs on a real model, on the text that comes with Octavo and on Python's manual."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch

from models.tiny_checkpoints import load
from octavo_engine.quantize.pipeline import QuantizeOptions, quantize_model
from octavo_engine.quantize.report import QuantizationReport
from octavo_engine.quantize.scheme import Method
from octavo_engine.runner.interface import SequenceSlice
from octavo_engine.tokenizer.load import load_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1_800)]


def quantized(model: Path, output: Path, **options: object) -> QuantizationReport:
    settings = {"model": str(model), "output": output, "device": "cpu"}
    return quantize_model(QuantizeOptions(**(settings | options)), lambda *_: None)


@pytest.mark.parametrize(
    ("options", "bound"),
    [
        pytest.param({"method": Method.RTN, "bits": 8}, 0.01, id="int8"),
        pytest.param({}, 0.05, id="int4, nothing chosen"),
        pytest.param({"symmetric": False}, 0.05, id="int4 with zero points"),
        pytest.param({"method": Method.SMOOTHQUANT, "bits": 8}, 0.01, id="int8-with-int8-activations"),
    ],
)
def test_perplexity_stays_within_its_bound(smollm2_gguf: Path, tmp_path: Path, options: dict, bound: float) -> None:
    report = quantized(smollm2_gguf, tmp_path / "out", **options)

    assert report.perplexity_change < bound
    assert "Paris" in completion(tmp_path / "out")


def test_four_bits_keep_their_bound_on_text_of_another_kind(smollm2_gguf: Path, tmp_path: Path) -> None:
    manual = tmp_path / "manual.txt"
    names = ("with", "try", "async", "numbers", "class", "import", "assignment", "lambda", "slicings", "specialnames")
    manual.write_text("\n\n".join(topics[name] for name in names)[:45_000])

    report = quantized(smollm2_gguf, tmp_path / "out", evaluation=manual)

    assert report.evaluation_tokens > 10_000
    assert report.perplexity_change_error is not None
    assert report.perplexity_change_error < 0.008
    assert report.perplexity_change < 0.05


@torch.inference_mode()
def completion(folder: Path) -> str:
    """A greedy completion by the engine running the quantized checkpoint."""
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode("The capital of France is the city of")
    runner = load(folder, block_size=16, num_kv_blocks=16)
    done, generated = 0, []
    while len(generated) < 12 and (not generated or generated[-1] not in tokenizer.eos_token_ids):
        logits = runner.forward([SequenceSlice((ids + generated)[done:], done, range(16))])
        done = len(ids) + len(generated)
        generated.append(int(logits[-1].argmax()))
    return tokenizer.decode(generated)
