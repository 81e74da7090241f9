"""A deterministic model whose KV cache holds token ids, so that a block with foreign content changes the output."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Sequence
from hashlib import blake2b
from pathlib import Path

import torch

from octavo_engine.config import EngineConfig
from octavo_engine.errors import ModelLoadError
from octavo_engine.kv.transfers import Direction, Transfer
from octavo_engine.lora.adapter import Adapter
from octavo_engine.messages import LoadProgress, ModelInfo
from octavo_engine.runner.interface import SequenceSlice, with_sampled

VOCAB_SIZE = 97
EOS = 96
CRASH, NAN, HANG, EXIT, SLOW = 90, 91, 92, 93, 94
SPECIAL = frozenset({CRASH, NAN, HANG, EXIT, SLOW, EOS})
EMPTY = -1


def logits_after(context: Sequence[int], adapter: str = "") -> torch.Tensor:
    """The model: logits [VOCAB_SIZE] from a hash of the whole context; special tokens are never likely."""
    return _logits(bytes(context), adapter)


@functools.lru_cache(maxsize=1 << 16)
def _logits(context: bytes, adapter: str) -> torch.Tensor:
    digest = blake2b(context, digest_size=8, key=adapter.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    logits = torch.randn(VOCAB_SIZE, generator=generator) * 3
    logits[list(SPECIAL)] = -20.0
    return logits


def greedy(prompt: Sequence[int], num_tokens: int, adapter: str = "") -> list[int]:
    """What a greedy request must return."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(int(logits_after(tokens, adapter).argmax()))
    return tokens[len(prompt) :]


class FakeRunner:
    """A `ModelRunner` over `logits_after`; certain tokens make it misbehave."""

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        max_model_len: int = 256,
        task: str = "generate",
        memory: int | None = None,
        num_host_blocks: int = 0,
    ) -> None:
        self.block_size = block_size
        self.memory = memory
        self.kv: list[list[int | tuple[int, str]]] = []
        self.host: list[list[int | tuple[int, str]]] = []
        self.placed: dict[int, Adapter] = {}
        self.num_forwards = 0
        self.broken = False
        self.batches: list[list[SequenceSlice]] = []
        self._info = {
            "name": "fake",
            "path": "/dev/null",
            "architecture": "FakeForCausalLM",
            "task": task,
            "max_model_len": max_model_len,
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 4,
            "eos_token_ids": [EOS],
            "dtype": "float32",
            "quantization": "none",
            "device": "cpu",
            "backend": "fake",
            "num_parameters": 1,
            "weight_bytes": 4,
            "kv_block_size": block_size,
            "kv_bytes_per_token": 8,
        }
        if num_blocks:
            self.allocate_kv_cache(num_blocks)
        self.allocate_host_cache(num_host_blocks)

    @property
    def info(self) -> ModelInfo:
        return ModelInfo(**self._info, kv_blocks_total=len(self.kv), kv_host_blocks=len(self.host))

    def allocate_kv_cache(self, num_blocks: int) -> None:
        self.kv = [[EMPTY] * self.block_size for _ in range(num_blocks)]

    def heartbeat(self) -> None: ...

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        for source, destination in pairs:
            self.kv[destination] = list(self.kv[source])

    def allocate_host_cache(self, num_blocks: int) -> None:
        self.host = [[EMPTY] * self.block_size for _ in range(num_blocks)]

    def move_blocks(self, transfer: Transfer) -> None:
        out = transfer.direction is Direction.TO_HOST
        source, destination = (self.kv, self.host) if out else (self.host, self.kv)
        for new, old in transfer.source_of.items():
            destination[new] = list(source[old])

    def embed(self, prompts: Sequence[Sequence[int]], second_starts: Sequence[int] = ()) -> torch.Tensor:
        if any(CRASH in prompt for prompt in prompts):
            raise RuntimeError("a token the model cannot embed")
        return torch.tensor([[float(sum(prompt)), float(len(prompt)), 0.0, 1.0] for prompt in prompts])

    def forward(self, slices: Sequence[SequenceSlice], sampled: torch.Tensor | None = None) -> torch.Tensor:
        slices = with_sampled(slices, sampled)
        self.num_forwards += 1
        self.batches.append(list(slices))
        self._misbehave({token for piece in slices for token in piece.token_ids})
        lengths = [len(piece.token_ids) for piece in slices]
        assert lengths == sorted(lengths, key=lambda n: n != 1), "slices of one token come first"
        for piece in slices:
            for offset, token in enumerate(piece.token_ids):
                block, slot = divmod(piece.start + offset, self.block_size)
                self.kv[piece.block_table[block]][slot] = (token, self._adapter(piece))
        rows = [row for piece in slices for row in self._rows(piece)]
        return torch.stack(rows) if rows else torch.empty(0, VOCAB_SIZE)

    def _rows(self, piece: SequenceSlice) -> list[torch.Tensor]:
        end = piece.start + len(piece.token_ids)
        entries = [entry for block in piece.block_table for entry in self.kv[block]][:end]
        written = [entry for entry in entries if isinstance(entry, tuple)]
        assert len(written) == len(entries), "attention over a position that was never computed"
        adapter = self._adapter(piece)
        assert all(by == adapter for _, by in written), "attention over what another adapter computed"
        context = [token for token, _ in written]
        rows = [
            logits_after(self._remembered(context[: position + 1]), adapter)
            for position in range(end - piece.num_logits, end)
        ]
        return [torch.full_like(row, float("nan")) for row in rows] if NAN in context else rows

    def _adapter(self, piece: SequenceSlice) -> str:
        return "" if piece.adapter_slot is None else self.placed[piece.adapter_slot].digest

    def read_adapter(self, name: str, path: Path, max_rank: int) -> Adapter:
        """A folder's `content` file is the adapter: other content, other answers."""
        file = path / "content"
        if not file.exists():
            raise ModelLoadError(f"{file}: cannot be read")
        return Adapter(name, str(path), file.read_text(), rank=1)

    def place_adapter(self, slot: int, adapter: Adapter) -> None:
        self.placed[slot] = adapter

    def _remembered(self, context: list[int]) -> list[int]:
        """With a `memory` of a few tokens the model soon repeats itself."""
        return context if self.memory is None else context[-self.memory :]

    def _misbehave(self, tokens: set[int]) -> None:
        if self.broken or CRASH in tokens:
            raise RuntimeError("a kernel failed")
        if EXIT in tokens:
            os._exit(7)
        if HANG in tokens:
            time.sleep(3_600)
        if SLOW in tokens:
            time.sleep(0.05)


def load_fake(config: EngineConfig, on_progress: Callable[[LoadProgress], None]) -> FakeRunner:
    """Stands where the real loader stands; picklable by name for a spawned process."""
    on_progress(LoadProgress(phase="weights", fraction=1.0))
    return FakeRunner(num_blocks=config.num_kv_blocks, block_size=config.block_size)
