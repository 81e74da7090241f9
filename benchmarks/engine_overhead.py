"""Host time that one engine step costs beside the model: scheduling, block tables, sampling, messages.

The model is replaced by a runner that returns ready-made logits at once, so all the time measured is overhead.
Run: python benchmarks/engine_overhead.py [--vocab 49152] [--steps 400]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence

import msgspec
import torch

from octavo_engine.config import EngineConfig
from octavo_engine.engine import EngineCore
from octavo_engine.messages import AddRequest, ModelInfo
from octavo_engine.runner.interface import SequenceSlice
from octavo_engine.sampling_params import SamplingParams


class InstantRunner:
    """A model that answers in no time."""

    def __init__(self, vocab_size: int, num_blocks: int) -> None:
        self._logits = torch.randn(256, vocab_size)
        self.seconds = 0.0
        self.info = ModelInfo(
            name="instant",
            path="",
            architecture="",
            task="generate",
            max_model_len=8_192,
            vocab_size=vocab_size,
            hidden_size=1,
            eos_token_ids=[0],
            dtype="float32",
            quantization="none",
            device="cpu",
            backend="none",
            num_parameters=0,
            weight_bytes=0,
            kv_block_size=16,
            kv_blocks_total=num_blocks,
            kv_bytes_per_token=1,
        )

    def heartbeat(self) -> None: ...

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None: ...

    def embed(self, prompts: Sequence[Sequence[int]], second_starts: Sequence[int] = ()) -> torch.Tensor:
        return torch.zeros(len(prompts), 1)

    def forward(self, slices: Sequence[SequenceSlice]) -> torch.Tensor:
        return self._logits[: sum(piece.num_logits for piece in slices)]


def step_times_us(batch: int, steps: int, vocab_size: int, sampling: SamplingParams) -> list[float]:
    """Microseconds of each decode step with `batch` running sequences, encoding of the output included."""
    runner = InstantRunner(vocab_size, num_blocks=batch * 64)
    core = EngineCore(runner, EngineConfig(model="instant", max_num_seqs=batch))
    encoder = msgspec.msgpack.Encoder()
    for index in range(batch):
        core.add(AddRequest(request_id=f"request-{index:032x}", prompt_token_ids=[1] * 100, sampling=sampling))
    while core.scheduler.num_waiting or core.stats().generation_tokens < batch:
        core.step()
    for _ in range(10):
        core.step()
    times = []
    for _ in range(steps):
        started = time.perf_counter()
        encoder.encode(core.step())
        times.append((time.perf_counter() - started) * 1e6)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocab", type=int, default=32)
    parser.add_argument("--steps", type=int, default=400)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    kinds = {
        "greedy": SamplingParams(max_tokens=8_000, temperature=0.0, ignore_eos=True),
        "random": SamplingParams(max_tokens=8_000, temperature=1.0, ignore_eos=True),
        "top_p": SamplingParams(max_tokens=8_000, temperature=1.0, top_p=0.9, top_k=50, ignore_eos=True),
    }
    print(f"vocabulary {arguments.vocab}, {arguments.steps} steps, torch {torch.__version__}")
    print(f"{'sampling':>10} {'batch':>6} {'median us':>10} {'p99 us':>10}")
    for name, sampling in kinds.items():
        for batch in (1, 32, 128):
            times = sorted(step_times_us(batch, arguments.steps, arguments.vocab, sampling))
            p99 = times[int(len(times) * 0.99)]
            print(f"{name:>10} {batch:>6} {statistics.median(times):>10.0f} {p99:>10.0f}")


if __name__ == "__main__":
    main()
