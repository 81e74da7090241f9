"""The inference engine: requests in, tokens out. No HTTP lives here."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from octavo_engine.llm import LLM as LLM
    from octavo_engine.sampling_params import SamplingParams as SamplingParams

__all__ = ["LLM", "SamplingParams"]

_MODULES = {"LLM": "octavo_engine.llm", "SamplingParams": "octavo_engine.sampling_params"}


def __getattr__(name: str) -> object:
    """Import the public names when they are first used: a process that only needs messages loads no torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_MODULES[name]), name)
