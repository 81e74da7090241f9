"""Where models come from: `resolve(uri)` turns a path or storage URI into a local folder or GGUF file."""

from octavo_engine.storage.resolver import resolve

__all__ = ["resolve"]
