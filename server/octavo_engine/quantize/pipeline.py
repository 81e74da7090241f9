"""Quantize a model layer by layer: watch its inputs on calibration text, scale, round, measure, write."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec
import torch

from octavo_engine.errors import ConfigError, ModelLoadError
from octavo_engine.loader.checkpoint import Checkpoint, open_checkpoint
from octavo_engine.models.decoder import Decoder
from octavo_engine.models.registry import find_architecture
from octavo_engine.quantize.calibration import LayerWalk, read_text, token_windows
from octavo_engine.quantize.folding import find_folds
from octavo_engine.quantize.gptq import gptq
from octavo_engine.quantize.layout import Format, Layout, choose_layout
from octavo_engine.quantize.observed import ObservingLoader, Projection
from octavo_engine.quantize.perplexity import change_error, perplexity, token_losses
from octavo_engine.quantize.report import QuantizationReport
from octavo_engine.quantize.scaling import awq_scale, smoothquant_scale
from octavo_engine.quantize.scheme import EXACT, Method, Scheme, as_int_weight, choose_scheme, fit_grid, is_narrow
from octavo_engine.quantize.sensitivity import most_sensitive
from octavo_engine.quantize.statistics import InputStatistics
from octavo_engine.quantize.writer import output_tensors, write_checkpoint
from octavo_engine.runner.machine import choose_device
from octavo_engine.storage import resolve
from octavo_engine.tokenizer.load import load_tokenizer

OnProgress = Callable[[str, float, str], None]
"""Called with the phase (resolve, load, before, quantize, after, write), a fraction in [0, 1] and a detail."""

STORED_DTYPE = torch.bfloat16
NARROW_SHARE = 0.3
REPORT_FILE = "quantization_report.json"


class QuantizeOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What to quantize and how. Texts None: Octavo's own.

    group_size None: see `choose_scheme`. sensitive_share: of the weights, those that four bits hurt most get
    eight; None: `NARROW_SHARE` of narrow layers where the format can hold both.
    """

    model: str
    output: Path
    method: Method = Method.AWQ_GPTQ
    bits: int = 4
    group_size: int | None = None
    symmetric: bool = True
    format: Format = Format.COMPRESSED_TENSORS
    calibration: Path | None = None
    evaluation: Path | None = None
    num_windows: int = 64
    window_tokens: int = 512
    ignore: tuple[str, ...] = ()
    sensitive_share: float | None = None
    device: str = "auto"
    revision: str | None = None


def quantize_model(options: QuantizeOptions, on_progress: OnProgress) -> QuantizationReport:
    """Write the quantized checkpoint and its report; raises `ModelLoadError` or `ConfigError`."""
    started = time.monotonic()
    if options.output.exists() and any(options.output.iterdir()):
        raise ConfigError(f"output {options.output}: the folder is not empty; name a new one")
    path = resolve(
        options.model, revision=options.revision, on_progress=lambda done, text: on_progress("resolve", done, text)
    )
    device = choose_device(options.device)
    checkpoint = open_checkpoint(path)
    loader = ObservingLoader(checkpoint, torch.float32, device, lambda done: on_progress("load", done, path.name))
    model = _build(checkpoint, loader, options.window_tokens)
    tokenizer = load_tokenizer(path)
    text = read_text(options.calibration, "calibration.txt")
    windows = token_windows(tokenizer, text, options.window_tokens, options.num_windows)
    held_out = token_windows(tokenizer, read_text(options.evaluation, "evaluation.txt"), options.window_tokens, 64)
    targets = [item for item in loader.projections if not _ignored(item, options.ignore)]
    scheme = choose_scheme(
        options.method,
        options.bits,
        options.group_size,
        options.symmetric,
        (item.weight.shape[1] for item in targets),
    )
    share = _share(options, scheme, targets)
    kept = [name for item in loader.projections if item not in targets for name in item.rows]
    rows = [count for item in targets for count in item.rows.values()]
    sensitive = most_sensitive(model, targets, windows, scheme, share, device)
    schemes = {id(item): EXACT if id(item) in sensitive else scheme for item in targets}
    exactly = [name for item in targets if id(item) in sensitive for name in item.rows]
    layout = choose_layout(options.format, scheme, rows, kept, exactly)
    on_progress("before", 0.0, "measuring perplexity")
    before = token_losses(model, held_out, device)
    on_progress("before", 1.0, f"perplexity {perplexity(before):.3f}")
    _quantize_layers(model, loader, targets, windows, options.method, schemes, on_progress)
    on_progress("after", 0.0, "measuring perplexity")
    after = token_losses(model, held_out, device)
    on_progress("after", 1.0, f"perplexity {perplexity(after):.3f}")
    on_progress("write", 0.0, str(options.output))
    num_bytes = _write(options, checkpoint, loader, scheme, layout)
    on_progress("write", 1.0, str(options.output))
    report = QuantizationReport(
        model=options.model,
        output=str(options.output),
        method=options.method.value,
        scheme=scheme.name,
        num_quantized=sum(len(item.quantized) for item in targets),
        num_in_8_bits=len(exactly),
        calibration_tokens=sum(map(len, windows)),
        evaluation_tokens=sum(map(len, held_out)),
        weight_bytes_before=_file_bytes(path),
        weight_bytes_after=num_bytes,
        perplexity_before=perplexity(before),
        perplexity_after=perplexity(after),
        perplexity_change_error=change_error(before, after),
        seconds=time.monotonic() - started,
        peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )
    (options.output / REPORT_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2))
    return report


def _share(options: QuantizeOptions, scheme: Scheme, targets: Sequence[Projection]) -> float:
    share = options.sensitive_share
    if share is None:
        mixes = scheme.bits == 4 and options.format is Format.COMPRESSED_TENSORS
        return NARROW_SHARE if mixes and is_narrow(item.weight.shape[1] for item in targets) else 0.0
    if not 0 <= share < 1:
        raise ConfigError(f"sensitive_share: must be from 0 to below 1, got {share}")
    if share and scheme.bits != 4:
        raise ConfigError("sensitive_share: only for 4 bits; the others have 8 already")
    return share


def _build(checkpoint: Checkpoint, loader: ObservingLoader, max_positions: int) -> Decoder:
    architecture, model_class = find_architecture(checkpoint.config)
    config = model_class.configure(checkpoint.config, architecture)
    if max_positions > config.max_position_embeddings:
        raise ConfigError(f"window_tokens: {max_positions} is beyond the model's {config.max_position_embeddings}")
    model = model_class(config, loader, max_positions)
    loader.finish()
    if not isinstance(model, Decoder) or not loader.projections:
        raise ModelLoadError(f"{checkpoint.path}: {architecture} cannot be quantized; decoders of text can")
    return model


def _ignored(projection: Projection, patterns: Sequence[str]) -> bool:
    """Routers decide between experts and stay exact; the rest is the caller's wish."""
    return projection.exact or any(pattern in name for pattern in patterns for name in projection.rows)


@torch.inference_mode()
def _quantize_layers(
    model: Decoder,
    loader: ObservingLoader,
    targets: Sequence[Projection],
    windows: Sequence[Sequence[int]],
    method: Method,
    schemes: Mapping[int, Scheme],
    on_progress: OnProgress,
) -> None:
    """schemes: by the `id` of the projection."""
    walk = LayerWalk(model, windows if method is not Method.RTN else [], loader.device)
    heads = (model.config.num_heads, model.config.num_kv_heads)
    for index, layer in enumerate(walk.layers()):
        prefix = f"model.layers.{index}"
        inside = [item for item in targets if any(name.startswith(f"{prefix}.") for name in item.rows)]
        statistics = {id(item): InputStatistics(item.weight.shape[1], loader.device) for item in inside}
        if method is not Method.RTN:
            for item in inside:
                item.on_input = statistics[id(item)].add
            walk.run(layer)
            for item in inside:
                item.on_input = None
        if method in (Method.AWQ, Method.AWQ_GPTQ, Method.SMOOTHQUANT):
            for fold in find_folds(prefix, inside, loader.vectors, heads):
                seen, scheme = statistics[id(fold.projection)], schemes[id(fold.projection)]
                smooth = method is Method.SMOOTHQUANT
                scale = smoothquant_scale(fold, seen, scheme) if smooth else awq_scale(fold, seen, scheme)
                fold.apply(scale, seen)
        for item in inside:
            _round(item, statistics[id(item)], method, schemes[id(item)])
        on_progress("quantize", (index + 1) / model.config.num_layers, f"layer {index + 1}")
    loader.round_as_stored(STORED_DTYPE)


def _round(projection: Projection, statistics: InputStatistics, method: Method, scheme: Scheme) -> None:
    """Replace the weight by its rounded value and keep the codes of every part."""
    weight = projection.weight.float()
    if method in (Method.GPTQ, Method.AWQ_GPTQ) and statistics.count:
        codes, grid = gptq(weight, statistics, scheme)
    else:
        grid = fit_grid(weight, scheme, statistics.mean_square if statistics.count else None)
        codes = grid.codes(weight)
    projection.weight = grid.values(codes).to(projection.weight.dtype)
    projection.activation_bits = scheme.activation_bits
    for prefix in projection.rows:
        rows = projection.rows_of(prefix)
        projection.quantized[prefix] = as_int_weight(codes[rows], grid.rows(rows), scheme)


def _write(
    options: QuantizeOptions, checkpoint: Checkpoint, loader: ObservingLoader, scheme: Scheme, layout: Layout
) -> int:
    settings = {
        "quantization_config": dict(layout.quantization_config),
        "dtype": str(STORED_DTYPE).removeprefix("torch."),
        "torch_dtype": str(STORED_DTYPE).removeprefix("torch."),
    }
    tensors = output_tensors(checkpoint, loader, scheme, layout, STORED_DTYPE)
    return write_checkpoint(options.output, tensors, checkpoint, settings)


def _file_bytes(path: Path) -> int:
    files = [path] if path.is_file() else [*path.glob("*.safetensors")]
    return sum(file.stat().st_size for file in files)
