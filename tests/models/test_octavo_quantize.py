"""What `octavo quantize` writes is a checkpoint that transformers and the engine read alike."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path

import msgspec
import pytest
import safetensors.torch
import torch
import transformers as hf

from models.tiny_checkpoints import (
    SIZES,
    load,
    paged_logits,
    random_prompts,
    reference_logits,
    write_checkpoint,
    write_tokenizer,
)
from octavo_engine.errors import ConfigError, ModelLoadError
from octavo_engine.quantize.layout import Format
from octavo_engine.quantize.perplexity import change_error, perplexity
from octavo_engine.quantize.pipeline import QuantizeOptions, quantize_model
from octavo_engine.quantize.report import QuantizationReport
from octavo_engine.quantize.scheme import Method

WIDE = {**SIZES, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
TEXT = "A quick brown fox jumps over the lazy dog, and the dog does not mind at all. " * 12


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A small random Llama with a tokenizer of single characters."""
    folder = tmp_path / "source"
    write_checkpoint(folder, hf.LlamaForCausalLM, hf.LlamaConfig(**WIDE))
    write_tokenizer(folder)
    return folder


def quantized(source: Path, **options: object) -> tuple[Path, QuantizationReport]:
    text = source.parent / "text.txt"
    text.write_text(TEXT)
    settings = {"window_tokens": 128, "num_windows": 4, "calibration": text, "evaluation": text, "device": "cpu"}
    output = Path(str(options.pop("output", source.parent / "output")))
    report = quantize_model(QuantizeOptions(model=str(source), output=output, **(settings | options)), lambda *_: None)
    return output, report


CASES = [
    pytest.param({"method": Method.RTN, "bits": 8}, id="rtn-8"),
    pytest.param({"method": Method.GPTQ, "bits": 4}, id="gptq-4"),
    pytest.param({"method": Method.AWQ, "bits": 4, "group_size": 16}, id="awq-4"),
    pytest.param({"method": Method.AWQ_GPTQ, "bits": 4}, id="awq-gptq-4"),
    pytest.param({"method": Method.SMOOTHQUANT, "bits": 8}, id="smoothquant"),
]


def rms_error(found: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    return float((torch.cat(found) - torch.cat(exact)).norm() / torch.cat(exact).norm())


@pytest.mark.parametrize("options", CASES)
def test_transformers_and_the_engine_read_the_same_model(source: Path, options: dict) -> None:
    output, report = quantized(source, **options)
    theirs = hf.AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    prompts = random_prompts((9, 30))

    ours = paged_logits(load(output), prompts)

    read = reference_logits(theirs, prompts)
    assert rms_error(ours, read) < (0.05 if options["method"] is Method.SMOOTHQUANT else 0.01)
    exact = reference_logits(hf.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), prompts)
    assert 1e-4 < rms_error(read, exact) < (0.1 if options["bits"] == 8 else 0.8)
    assert report.num_quantized == 3 * 7


def test_the_projections_that_rounding_hurts_most_get_eight_bits(source: Path, tmp_path: Path) -> None:
    even, even_report = quantized(source, method=Method.RTN, bits=4, sensitive_share=0.0, output=tmp_path / "even")
    output, report = quantized(source, method=Method.RTN, bits=4, sensitive_share=0.3)
    config = json.loads((output / "config.json").read_text())["quantization_config"]["config_groups"]
    named = config["group_1"]["targets"]
    weights = safetensors.torch.load_file(output / "model.safetensors")
    sizes = {name: weights[f"{name}.weight_shape"].prod().item() for name in named}
    total = sum(value.prod().item() for name, value in weights.items() if name.endswith(".weight_shape"))
    theirs = hf.AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    prompts = random_prompts((9, 30))
    read = reference_logits(theirs, prompts)
    exact = reference_logits(hf.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), prompts)

    assert 0.2 < sum(sizes.values()) / total <= 0.3
    assert report.num_in_8_bits == len(named) > even_report.num_in_8_bits == 0
    assert rms_error(paged_logits(load(output), prompts), read) < 0.01
    assert rms_error(read, exact) < rms_error(paged_logits(load(even), prompts), exact)


def test_the_experts_of_a_layer_get_eight_bits_together(tmp_path: Path) -> None:
    folder, num_experts = tmp_path / "source", 4
    config = hf.MixtralConfig(**WIDE, num_local_experts=num_experts, num_experts_per_tok=2)
    write_checkpoint(folder, hf.MixtralForCausalLM, config)
    write_tokenizer(folder)

    output, _ = quantized(folder, method=Method.RTN, bits=4, sensitive_share=0.4)

    groups = json.loads((output / "config.json").read_text())["quantization_config"]["config_groups"]
    kinds = Counter(re.sub(r"experts\.\d+", "experts", name) for name in groups["group_1"]["targets"])
    assert {count for name, count in kinds.items() if "experts" in name} == {num_experts}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 8, "sensitive_share": 0.1}, "only for 4 bits"),
        ({"bits": 4, "sensitive_share": 1.5}, "from 0 to below 1"),
        ({"bits": 4, "sensitive_share": 0.3, "format": Format.GPTQ}, "cannot keep in 8 bits some projections"),
    ],
)
def test_shares_that_make_no_sense_are_refused(source: Path, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        quantized(source, method=Method.RTN, **options)


def test_small_models_keep_some_projections_in_eight_bits_where_the_format_can(source: Path, tmp_path: Path) -> None:
    _, packed = quantized(source, method=Method.RTN, bits=4)
    _, older = quantized(source, method=Method.RTN, bits=4, format=Format.GPTQ, output=tmp_path / "gptq")

    assert (packed.scheme, packed.num_in_8_bits > 0) == ("W4A16-g32", True)
    assert (older.scheme, older.num_in_8_bits) == ("W4A16-g32", 0)


def test_zero_points_reach_the_engine(source: Path) -> None:
    output, _ = quantized(source, method=Method.RTN, bits=4, symmetric=False)
    exact = reference_logits(hf.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), [[5, 6, 7, 8, 9]])
    assert rms_error(paged_logits(load(output), [[5, 6, 7, 8, 9]]), exact) < 0.5


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_gptq_format_holds_the_same_weights(source: Path, symmetric: bool, tmp_path: Path) -> None:
    options = {"method": Method.RTN, "bits": 4, "symmetric": symmetric, "sensitive_share": 0.0}
    packed, _ = quantized(source, **options)
    older, _ = quantized(source, **options, format=Format.GPTQ, output=tmp_path / "gptq")
    prompts = random_prompts((9, 30))
    assert rms_error(paged_logits(load(older), prompts), paged_logits(load(packed), prompts)) < 1e-3
    assert json.loads((older / "config.json").read_text())["quantization_config"]["quant_method"] == "gptq"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": Method.RTN, "bits": 8}, "holds 4-bit weights, not W8A16"),
        ({"method": Method.RTN, "bits": 4, "ignore": ("o_proj",)}, "cannot leave out some projections"),
    ],
)
def test_the_gptq_format_refuses_what_it_cannot_hold(source: Path, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        quantized(source, **options, format=Format.GPTQ)


@pytest.mark.parametrize("method", [Method.AWQ, Method.SMOOTHQUANT])
def test_scaling_alone_leaves_the_model_as_it_was(
    source: Path, method: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With rounding switched off, what is left of AWQ and SmoothQuant must cancel out."""
    monkeypatch.setattr("octavo_engine.quantize.pipeline._round", lambda *_: None)
    monkeypatch.setattr("octavo_engine.quantize.pipeline.STORED_DTYPE", torch.float32)
    _, report = quantized(source, method=method, bits=8 if method is Method.SMOOTHQUANT else 4)
    assert report.perplexity_after == pytest.approx(report.perplexity_before, rel=1e-4)


def test_the_report_tells_and_keeps_the_facts(source: Path) -> None:
    output, report = quantized(source, method=Method.RTN, bits=8)
    kept = msgspec.json.decode((output / "quantization_report.json").read_bytes(), type=QuantizationReport)
    assert kept == report
    assert report.scheme == "W8A16"
    assert report.weight_bytes_after < report.weight_bytes_before
    assert abs(report.perplexity_change) < 0.02
    assert report.perplexity_change_error is not None
    assert 0 < report.perplexity_change_error < 0.02
    assert (report.calibration_tokens, report.evaluation_tokens) == (512, 896)


def test_the_error_of_the_change_shrinks_with_the_text_and_covers_the_truth() -> None:
    """Losses with a known change, of tokens whose neighbours resemble each other."""
    draw = torch.Generator().manual_seed(0)
    before = torch.full((4_096_000,), 2.0)
    change = 0.05 + 0.3 * torch.randn(512_000, generator=draw).repeat_interleave(8)
    covered = []
    for start in range(0, len(before), 4_096):
        part = slice(start, start + 4_096)
        error = change_error(before[part], before[part] + change[part])
        assert error is not None
        found = perplexity(before[part] + change[part]) / perplexity(before[part])
        covered.append(abs(found - math.exp(0.05)) < error)

    assert 0.92 < sum(covered) / len(covered) < 0.98
    short = change_error(before[:512], before[:512] + change[:512])
    long = change_error(before, before + change)
    assert short is not None
    assert long is not None
    assert 50 < short / long < 150
    assert change_error(before[:63], before[:63]) is None


def test_progress_passes_through_every_phase(source: Path) -> None:
    seen: list[str] = []
    text = source.parent / "text.txt"
    text.write_text(TEXT)
    options = QuantizeOptions(
        model=str(source),
        output=source.parent / "output",
        method=Method.RTN,
        bits=8,
        window_tokens=128,
        calibration=text,
        evaluation=text,
    )
    quantize_model(options, lambda phase, fraction, _: seen.append(phase) if 0 <= fraction <= 1 else None)
    assert list(dict.fromkeys(seen)) == ["load", "before", "quantize", "after", "write"]


def test_layers_can_be_left_as_they_are(source: Path) -> None:
    output, report = quantized(source, method=Method.RTN, bits=8, ignore=("down_proj",))
    assert report.num_quantized == 3 * 6
    config = json.loads((output / "config.json").read_text())["quantization_config"]
    assert "model.layers.0.mlp.down_proj" in config["ignore"]
    theirs = hf.AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    prompts = random_prompts((9,))
    assert rms_error(paged_logits(load(output), prompts), reference_logits(theirs, prompts)) < 0.01


def test_the_tokenizer_and_settings_travel_along(source: Path) -> None:
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "evil.py").write_text("raise SystemExit")
    output, _ = quantized(source, method=Method.RTN, bits=8)
    assert (output / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert (output / "chat_template.jinja").exists()
    assert not (output / "evil.py").exists()


def test_large_models_are_split_into_shards(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octavo_engine.quantize.writer.MAX_SHARD_BYTES", 40_000)
    output, _ = quantized(source, method=Method.RTN, bits=8)
    assert len(list(output.glob("model-*-of-*.safetensors"))) > 1
    prompts = random_prompts((9,))
    theirs = hf.AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    assert rms_error(paged_logits(load(output), prompts), reference_logits(theirs, prompts)) < 0.01


def test_norms_with_an_offset_are_scaled_as_stored(tmp_path: Path) -> None:
    folder = tmp_path / "source"
    sizes = WIDE | {"query_pre_attn_scalar": 16, "sliding_window": 32}
    write_checkpoint(folder, hf.Gemma2ForCausalLM, hf.Gemma2Config(**sizes))
    write_tokenizer(folder)
    output, _ = quantized(folder, method=Method.AWQ, bits=4)
    theirs = hf.AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    prompts = random_prompts((9,))
    assert rms_error(paged_logits(load(output), prompts), reference_logits(theirs, prompts)) < 0.01


def test_a_folder_in_use_is_not_touched(source: Path) -> None:
    output = source.parent / "output"
    output.mkdir()
    (output / "mine.txt").write_text("x")
    with pytest.raises(ConfigError, match="not empty"):
        quantized(source, method=Method.RTN)
    assert [path.name for path in output.iterdir()] == ["mine.txt"]


def test_a_failure_leaves_no_half_written_folder(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("octavo_engine.quantize.writer.save_file", full)
    with pytest.raises(ModelLoadError, match="No space left"):
        quantized(source, method=Method.RTN)
    assert sorted(path.name for path in source.parent.iterdir()) == ["source", "text.txt"]


def test_too_little_text_is_refused(source: Path) -> None:
    short = source.parent / "short.txt"
    short.write_text("hello")
    with pytest.raises(ConfigError, match="only 5 tokens"):
        quantized(source, calibration=short)


def test_a_missing_text_is_named(source: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing\.txt: cannot be read"):
        quantized(source, calibration=source.parent / "missing.txt")
