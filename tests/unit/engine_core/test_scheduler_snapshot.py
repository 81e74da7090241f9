"""A snapshot shows what runs before what waits, within its bound."""

from __future__ import annotations

from fake_runner import FakeRunner
from octavo_engine.config import EngineConfig
from octavo_engine.engine import EngineCore
from octavo_engine.messages import AddRequest
from octavo_engine.sampling_params import SamplingParams
from octavo_engine.scheduler import snapshot


class Clock:
    now = 10.0

    def __call__(self) -> float:
        return self.now


def busy_engine(clock: Clock, num_requests: int) -> EngineCore:
    config = EngineConfig(model="fake", block_size=4, max_num_seqs=2, max_num_batched_tokens=32)
    core = EngineCore(FakeRunner(), config, clock)
    for number in range(num_requests):
        sampling = SamplingParams(max_tokens=20, temperature=0.0)
        core.add(
            AddRequest(request_id=f"r{number}", prompt_token_ids=[1, 2, 3], sampling=sampling, tenant=f"t{number % 2}",
                       priority=number, deadline_s=60.0)
        )  # fmt: skip
    core.step()
    return core


def test_running_sequences_come_first_with_their_progress() -> None:
    clock = Clock()
    core = busy_engine(clock, 4)
    clock.now += 5.0

    taken = core.snapshot()

    assert [(seq.request_id, seq.state) for seq in taken.sequences] == [
        ("r0", "running"), ("r1", "running"), ("r2", "waiting"), ("r3", "waiting"),
    ]  # fmt: skip
    running, waiting = taken.sequences[0], taken.sequences[2]
    assert (running.num_prompt, running.num_output, running.num_computed, running.num_blocks) == (3, 1, 3, 1)
    assert (running.queue_time_s, running.age_s, running.deadline_in_s) == (0.0, 5.0, 55.0)
    assert (waiting.num_computed, waiting.num_blocks, waiting.queue_time_s) == (0, 0, 5.0)
    assert taken.kv_blocks_free == taken.kv_blocks_total - 2
    assert set(taken.virtual_tokens) == {"t0", "t1"}


def test_a_long_queue_is_cut_and_the_rest_counted(monkeypatch) -> None:
    monkeypatch.setattr(snapshot, "MAX_SNAPSHOT_SEQUENCES", 3)
    taken = busy_engine(Clock(), 8).snapshot()
    assert len(taken.sequences) == 3
    assert (taken.num_running, taken.num_waiting, taken.num_left_out) == (2, 6, 5)
