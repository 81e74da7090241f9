"""Text to windows of token ids, and a model's layers run over them one by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path

import torch

from octavo_engine.errors import ConfigError
from octavo_engine.models.decoder import Decoder, Layer
from octavo_engine.runner.batch_builder import build_packed
from octavo_engine.tokenizer.interface import Tokenizer

State = tuple[torch.Tensor, torch.Tensor | None]  # a layer's input [T, hidden_size] and the residual stream beside it
MIN_TOKENS = 64
MAX_TEXT_BYTES = 64 << 20


def read_text(path: Path | None, builtin: str) -> str:
    """A UTF-8 file, or one of the texts that come with Octavo; raises `ConfigError`."""
    if path is None:
        return (files("octavo_engine.quantize") / "texts" / builtin).read_text(encoding="utf-8")
    try:
        if path.stat().st_size > MAX_TEXT_BYTES:
            raise ConfigError(f"{path}: larger than {MAX_TEXT_BYTES >> 20} MiB; a few hundred kilobytes are plenty")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text: {error}") from error


def token_windows(tokenizer: Tokenizer, text: str, length: int, count: int) -> list[list[int]]:
    """At most `count` windows of at most `length` ids, one after the other; raises `ConfigError` for a short text."""
    ids = tokenizer.encode(text)
    windows = [ids[start : start + length] for start in range(0, len(ids), length)][:count]
    windows = [window for window in windows if len(window) >= min(length, MIN_TOKENS)]
    if not windows:
        raise ConfigError(f"the text has only {len(ids)} tokens; at least {MIN_TOKENS} are needed")
    return windows


class LayerWalk:
    """Hidden states of all windows before one layer after the other."""

    def __init__(self, model: Decoder, windows: Sequence[Sequence[int]], device: torch.device) -> None:
        packed = [build_packed([window], device) for window in windows]
        self._model = model
        self._batches = [batch for _, batch in packed]
        self._states: list[State] = [model.enter(ids) for ids, _ in packed]

    def layers(self) -> Iterator[Layer]:
        """Every layer; when the next is asked for, the states have passed through the last as it then was."""
        for layer in self._model.layers:
            yield layer
            self._states = list(self._outputs(layer))

    def run(self, layer: Layer) -> None:
        """Compute a layer for its observers' sake."""
        for _ in self._outputs(layer):
            pass

    def hidden(self, layer: Layer) -> list[torch.Tensor]:
        """Every window's hidden states [T, hidden_size] behind a layer."""
        return [x if residual is None else x + residual for x, residual in self._outputs(layer)]

    def _outputs(self, layer: Layer) -> Iterator[State]:
        for (x, residual), batch in zip(self._states, self._batches, strict=True):
            yield layer(x, residual, batch, None)
