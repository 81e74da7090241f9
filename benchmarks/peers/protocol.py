"""How `cpu_peers.py` talks to the engines it compares: one JSON object a line, each engine in its own process.

Standard library only: every peer runs under its own interpreter.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from abc import ABC, abstractmethod
from typing import Any

Tokens = list[int]


class Peer(ABC):
    """One engine. Token ids in, greedy token ids out, the end-of-sequence token ignored."""

    @abstractmethod
    def load(self, model: str, threads: int) -> dict[str, Any]:
        """Load the GGUF file; returns name, version and weight format."""

    @abstractmethod
    def generate(self, prompts: list[Tokens], new_tokens: list[int]) -> list[Tokens]:
        """Complete all prompts, concurrently where the engine can."""

    def bandwidth(self) -> float:
        """Bytes a second that this machine's memory delivers, where the peer can tell."""
        raise RuntimeError(f"{type(self).__name__} does not measure the memory's bandwidth")

    def encode(self, text: str) -> Tokens:
        """The text's token ids, where the peer has a tokenizer."""
        raise RuntimeError(f"{type(self).__name__} does not tokenize")

    def decode_seconds(self) -> dict[str, float]:
        """Where the last run's time went, where the peer can tell."""
        return {}


def serve(peer: Peer) -> None:
    """Answer commands until standard input closes. Anything the engine prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        command = json.loads(line)
        started, cpu_started = time.perf_counter(), time.process_time()
        try:
            answer = {"value": _run(peer, command)}
        except Exception as error:  # reported to the benchmark, which names the peer and goes on
            answer = {"error": f"{type(error).__name__}: {error}"}
        answer["wall"] = time.perf_counter() - started
        answer["cpu"] = time.process_time() - cpu_started
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _run(peer: Peer, command: dict[str, Any]) -> Any:
    match command["op"]:
        case "load":
            return peer.load(command["model"], command["threads"])
        case "generate":
            return peer.generate(command["prompts"], command["new_tokens"])
        case "bandwidth":
            return peer.bandwidth()
        case "encode":
            return peer.encode(command["text"])
        case "peak_rss_bytes":
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    raise ValueError(f"unknown op {command['op']!r}")
