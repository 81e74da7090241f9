"""Load a model's tokenizer from wherever it lies."""

from __future__ import annotations

from pathlib import Path

from octavo_engine.errors import ModelLoadError
from octavo_engine.tokenizer.fast import FastTokenizer


def load_tokenizer(path: Path | str) -> FastTokenizer:
    """The tokenizer of a Hugging Face folder or a GGUF file; raises `ModelLoadError`."""
    path = Path(path)
    if path.is_dir():
        from octavo_engine.tokenizer.hf_folder import load_from_folder

        return load_from_folder(path)
    if path.suffix.lower() == ".gguf":
        from octavo_engine.loader.gguf_file import open_gguf
        from octavo_engine.tokenizer.gguf_vocabulary import tokenizer_from_metadata

        return tokenizer_from_metadata(open_gguf(path).metadata, path)
    raise ModelLoadError(f"tokenizer {path}: expected a folder with tokenizer.json or a .gguf file")
