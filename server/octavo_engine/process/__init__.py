"""The engine in a process of its own, and the client through which an API process uses it."""

from octavo_engine.process.client import EngineProcessClient

__all__ = ["EngineProcessClient"]
