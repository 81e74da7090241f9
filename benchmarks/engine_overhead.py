"""Host time that one engine step costs beside the model: scheduling, block tables, sampling, messages.

First table: the model is replaced by a runner that returns ready-made logits at once, so all the time measured is
overhead. Second table: a stand-in device beside the host, whose work is in order and takes a given time, as a GPU's
does; how long it idles in each step, with steps one after the other and with steps launched ahead.
Run: python benchmarks/engine_overhead.py [--vocab 49152] [--steps 400] [--device-ms 2 5 10]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import msgspec
import torch

from octavo_engine.config import EngineConfig
from octavo_engine.engine import EngineCore
from octavo_engine.messages import AddRequest, ModelInfo
from octavo_engine.runner.batch_builder import build_step
from octavo_engine.runner.interface import SequenceSlice
from octavo_engine.sampling_params import SamplingParams
from octavo_engine.stepping.device_queue import Result


class InstantRunner:
    """A model that answers in no time."""

    def __init__(self, vocab_size: int, num_blocks: int, builds_inputs: bool = False) -> None:
        self.builds_inputs = builds_inputs
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

    def forward(self, slices: Sequence[SequenceSlice], sampled: torch.Tensor | None = None) -> torch.Tensor:
        if self.builds_inputs:
            build_step(slices, self.info.kv_block_size, torch.device("cpu"), sampled)
        return self._logits[: sum(piece.num_logits for piece in slices)]


class StandInDevice:
    """Work in order: a step takes `step_s`, a choice no time; who asks for a result waits until it is due.

    Calls are made at once, as calls that launch kernels are. idle_s: time in which nothing was left to do.
    """

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s
        self._free_at = 0.0
        self.is_launching = False
        self.idle_s = 0.0

    def submit(self, call: Callable[[], Result]) -> Future[Result]:
        self.is_launching = True
        value = call()
        self.is_launching = False
        now = time.perf_counter()
        if self._free_at:
            self.idle_s += max(0.0, now - self._free_at)
        self._free_at = max(now, self._free_at) + (self._step_s if call.__name__ == "forward" else 0.0)
        return Due(self, value, self._free_at)


class Due(Future[Result]):
    """A result that is there at a time of the device. Work that is put behind it does not wait for it."""

    def __init__(self, device: StandInDevice, value: Result, due_at: float) -> None:
        super().__init__()
        self._device, self._value, self._due_at = device, value, due_at

    def result(self, timeout: float | None = None) -> Result:
        while not self._device.is_launching and (left := self._due_at - time.perf_counter()) > 0:
            time.sleep(left / 2 if left > 2e-4 else 0)
        return self._value


def idle_ms(batch: int, steps: int, step_s: float, vocab_size: int, mode: str) -> tuple[float, float]:
    """(device's idle milliseconds, milliseconds) of a decode step with `batch` sequences."""
    device = StandInDevice(step_s)
    runner = InstantRunner(vocab_size, batch * 64, builds_inputs=True)
    config = EngineConfig(model="instant", max_num_seqs=batch, async_scheduling=mode)
    core = EngineCore(runner, config, queue=device)
    encoder = msgspec.msgpack.Encoder()
    sampling = SamplingParams(max_tokens=8_000, temperature=0.0, ignore_eos=True)
    for index in range(batch):
        core.add(AddRequest(request_id=f"request-{index:032x}", prompt_token_ids=[1] * 100, sampling=sampling))
    while core.scheduler.num_waiting or core.stats().generation_tokens < 2 * batch:
        core.step()
    device.idle_s, started = 0.0, time.perf_counter()
    for _ in range(steps):
        encoder.encode(core.step())
    return device.idle_s / steps * 1e3, (time.perf_counter() - started) / steps * 1e3


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
    parser.add_argument("--device-ms", type=float, nargs="*", default=[2.0, 5.0, 10.0])
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
    if arguments.device_ms:
        print(f"\n{'device ms':>10} {'batch':>6} {'off: idle':>10} {'step':>8} {'on: idle':>10} {'step':>8}")
    for device_ms in arguments.device_ms:
        for batch in (1, 64):
            columns = [
                f"{value:>{width}.3f}"
                for mode in ("off", "on")
                for value, width in zip(
                    idle_ms(batch, arguments.steps, device_ms / 1e3, arguments.vocab, mode), (10, 8), strict=True
                )
            ]
            print(f"{device_ms:>10} {batch:>6} {' '.join(columns)}")


if __name__ == "__main__":
    main()
