"""Steps launched ahead: the same answers as one after the other, nothing given to others before it is computed, and no
failure that spreads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from random import Random

import pytest
import torch

from fake_runner import CRASH, NAN, SPECIAL, VOCAB_SIZE, FakeRunner, greedy
from octavo_engine.config import EngineConfig
from octavo_engine.engine import EngineCore
from octavo_engine.errors import ConfigError
from octavo_engine.isolation import StepFailedError
from octavo_engine.messages import AddRequest, EmbedRequest, FinishReason, ModelInfo, SequenceOutput
from octavo_engine.runner.interface import SequenceSlice
from octavo_engine.sampling_params import SamplingParams
from octavo_engine.scheduler.sequence import Sequence as Seq
from octavo_engine.stepping.device_queue import CallerQueue, DeviceQueue, Result, ThreadQueue, runs_ahead

AHEAD = {"thread": ThreadQueue, "caller": CallerQueue}
Outputs = dict[str, list[SequenceOutput]]


def engine(
    mode: str = "on", queue: DeviceQueue | None = None, runner: FakeRunner | None = None, **settings: object
) -> EngineCore:
    config = EngineConfig(
        **{
            "model": "fake",
            "max_num_seqs": 8,
            "max_num_batched_tokens": 32,
            "async_scheduling": mode,
            **settings,
        }
    )
    return EngineCore(runner or FakeRunner(), config, lambda: 0.0, queue=queue)


def request(name: str, prompt: Sequence[int], tenant: str = "", **sampling: object) -> AddRequest:
    params = SamplingParams(**{"max_tokens": 8, "temperature": 0.0, **sampling})
    return AddRequest(request_id=name, prompt_token_ids=list(prompt), sampling=params, tenant=tenant)


def run(core: EngineCore, arrivals: Sequence[tuple[int, AddRequest]] = (), outputs: Outputs | None = None) -> Outputs:
    """Step until idle; each arrival comes before the step of its number."""
    outputs = {} if outputs is None else outputs
    waiting = sorted(arrivals, key=lambda item: item[0])
    for number in range(5_000):
        while waiting and waiting[0][0] <= number:
            core.add(waiting.pop(0)[1])
        if not core.has_work and not waiting:
            return outputs
        for output in core.step().outputs:
            outputs.setdefault(output.request_id, []).append(output)
    raise AssertionError("the engine did not become idle")


def tokens(outputs: list[SequenceOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def summary(outputs: list[SequenceOutput]) -> tuple[object, ...]:
    """Everything a caller sees of a request, how often it was preempted and how much was cached aside."""
    last = outputs[-1]
    logprobs = [entry for output in outputs for entry in output.logprobs or []]
    prompts = [output.prompt_logprobs for output in outputs if output.prompt_logprobs is not None]
    return tokens(outputs), logprobs, prompts, last.finish_reason, last.stop_token_id, last.error


def workload(random: Random) -> list[tuple[int, AddRequest]]:
    """Requests of every kind that a step ahead could get wrong."""
    plain = [token for token in range(1, VOCAB_SIZE) if token not in SPECIAL]
    kinds: list[Callable[[], dict[str, object]]] = [
        dict,
        lambda: {"temperature": 1.0, "seed": random.randrange(1 << 40), "top_k": random.choice([0, 5]), "top_p": 0.9},
        lambda: {"stop_token_ids": random.sample(plain, 20), "min_tokens": random.randint(0, 4)},
        lambda: {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "temperature": 0.8, "seed": 3},
        lambda: {"bad_words_ids": [random.choices(plain, k=2) for _ in range(40)], "logprobs": 3},
        lambda: {"prompt_logprobs": 2, "logprobs": 1},
        lambda: {"temperature": 1.0, "typical_p": 0.5, "seed": 9},
        lambda: {"allowed_token_ids": [5], "bad_words_ids": [[5]]},  # nothing is left to choose
    ]
    arrivals = []
    for index in range(25):
        shared = list(range(1, random.randrange(12) + 1))
        prompt = shared + random.choices(plain, k=random.randint(1, 20))
        if random.random() < 0.1:
            prompt.insert(random.randrange(len(prompt)), random.choice([CRASH, NAN]))
        options = {"max_tokens": random.randint(1, 24), **random.choice(kinds)()}
        arrivals.append((random.randrange(60), request(f"r{index}", prompt, random.choice("ab"), **options)))
    return arrivals


@pytest.mark.parametrize("queue", AHEAD)
@pytest.mark.parametrize("seed", range(12))
def test_answers_logprobs_ends_and_counts_equal_those_of_steps_one_after_the_other(seed: int, queue: str) -> None:
    random = Random(seed)
    arrivals = workload(random)
    settings = {"enable_prefix_caching": random.random() < 0.7, "max_num_seqs": random.randint(2, 8)}
    num_blocks = random.choice([16, 24, 200])

    def outcome(core: EngineCore) -> tuple[dict[str, tuple[object, ...]], tuple[object, ...]]:
        outputs = run(core, arrivals)
        stats = core.stats()
        assert core.pool.num_used == 0
        counts = (stats.prompt_tokens, stats.generation_tokens, stats.requests_finished)
        return {name: summary(items) for name, items in outputs.items()}, counts

    plain = engine("off", runner=FakeRunner(num_blocks=num_blocks, max_model_len=64), **settings)
    ahead = engine("on", AHEAD[queue](), FakeRunner(num_blocks=num_blocks, max_model_len=64), **settings)
    assert outcome(ahead) == outcome(plain)
    assert ahead.stats().steps_ahead > ahead.stats().step / 2
    assert plain.stats().steps_ahead == 0
    assert not plain.stats().step_waits


class Announced:
    """A thread that tells how many steps were launched."""

    def __init__(self) -> None:
        self._thread = ThreadQueue()
        self.num_launched = 0
        self.launch = threading.Condition()

    def submit(self, call: Callable[[], Result]) -> Future[Result]:
        future = self._thread.submit(call)
        if getattr(call, "__name__", "") == "forward":
            with self.launch:
                self.num_launched += 1
                self.launch.notify_all()
        return future


def test_the_next_step_is_launched_while_one_is_computed() -> None:
    queue = Announced()
    late: list[int] = []

    class Patient(FakeRunner):
        """Computes each step but the last only once the next one was launched."""

        def forward(self, slices: Sequence[SequenceSlice], sampled: torch.Tensor | None = None) -> torch.Tensor:
            logits = super().forward(slices, sampled)
            if self.num_forwards < 8:
                with queue.launch:
                    if not queue.launch.wait_for(lambda: queue.num_launched > self.num_forwards, timeout=10.0):
                        late.append(self.num_forwards)
            return logits

    core = engine(queue=queue, runner=Patient())
    core.add(request("a", [1, 2, 3]))
    assert tokens(run(core)["a"]) == greedy([1, 2, 3], 8)
    assert not late
    assert core.stats().steps_ahead == 7


def test_a_step_is_not_launched_for_a_sequence_whose_last_token_is_being_chosen() -> None:
    counts = []
    for mode in ("off", "on"):
        runner = FakeRunner(max_model_len=12)
        core = engine(mode, runner=runner)
        core.add(request("full", [1, 2, 3], max_tokens=5))
        core.add(request("context", [1] * 10, max_tokens=50))
        run(core)
        counts.append((runner.num_forwards, sum(len(batch) for batch in runner.batches)))
    assert counts[0] == counts[1]


def test_what_is_computed_past_a_stop_token_is_not_published_and_its_blocks_are_held_until_then() -> None:
    prompt = [1, 2, 3]
    answer = greedy(prompt, 8)
    core = engine()
    core.add(request("a", prompt, stop_token_ids=[answer[4]], max_tokens=50))
    seq = core.scheduler.get("a")
    assert seq is not None
    while not (outputs := core.step().outputs) or outputs[-1].finish_reason is None:
        pass
    assert outputs[-1].finish_reason is FinishReason.STOP
    assert not core.scheduler.has_work
    # Positions 0..7 are the prompt and the answer; the step in flight computes one more, in the third block.
    assert core.pool.num_used == len(seq.table.blocks) > 0
    assert core.has_work
    core.step()
    assert core.pool.num_used == 0
    assert core.pool.num_cached == 1  # seven positions were computed for good: one whole block
    core.add(request("again", prompt + answer[:4], max_tokens=3))
    assert tokens(run(core)["again"]) == greedy(prompt + answer[:4], 3)


def test_an_aborted_sequence_in_flight_gives_its_blocks_back_when_its_step_is_over() -> None:
    core = engine()
    for name in ("a", "b"):
        core.add(request(name, [1, 2, 3, ord(name) - 90], max_tokens=40))
    core.step()
    core.step()
    core.abort(["a"])
    assert core.scheduler.get("a") is None
    held = core.pool.num_used
    outputs = core.step().outputs
    assert [output.finish_reason for output in outputs if output.request_id == "a"] == [FinishReason.ABORT]
    core.step()
    assert core.pool.num_used < held
    assert tokens(run(core)["b"]) == greedy([1, 2, 3, 8], 40)[3:]


@pytest.mark.parametrize("queue", AHEAD)
@pytest.mark.parametrize("bad", [CRASH, NAN])
def test_a_failing_step_fails_its_culprit_alone_though_the_next_one_is_in_flight(bad: int, queue: str) -> None:
    core = engine(queue=AHEAD[queue]())
    prompts = {f"r{i}": [i + 1, 7, 8] for i in range(4)}
    arrivals = [(0, request(name, prompt, max_tokens=20)) for name, prompt in prompts.items()]
    outputs = run(core, [*arrivals, (6, request("bad", [1, 2, bad, 4], max_tokens=20))])
    assert outputs["bad"][-1].finish_reason is FinishReason.ERROR
    assert {name: tokens(outputs[name]) for name in prompts} == {n: greedy(p, 20) for n, p in prompts.items()}
    assert core.stats().step_waits == ({"failure": 1} if bad == CRASH else {})
    assert core.pool.num_used == 0


def test_a_device_that_fails_on_everything_ends_the_engine() -> None:
    runner = FakeRunner()
    core = engine(runner=runner)
    core.add(request("a", [1, 2, 3]))
    core.step()
    runner.broken = True
    with pytest.raises(StepFailedError):
        run(core)


def test_an_interrupted_round_is_resumed() -> None:
    interrupted: list[bool] = []

    class Interrupted(ThreadQueue):
        """Ctrl-C arrives while the caller waits for the fifth step."""

        num_submitted = 0

        def submit(self, call: Callable[[], Result]) -> Future[Result]:
            future = super().submit(call)
            self.num_submitted += 1
            if self.num_submitted == 10:
                wait = future.result

                def result(timeout: float | None = None) -> Result:
                    if threading.current_thread() is threading.main_thread() and not interrupted:
                        interrupted.append(True)
                        raise KeyboardInterrupt
                    return wait(timeout)

                future.result = result  # type: ignore[method-assign]
            return future

    core = engine(queue=Interrupted())
    core.add(request("a", [1, 2, 3], max_tokens=20))
    outputs: Outputs = {"a": []}
    with pytest.raises(KeyboardInterrupt):
        run(core, outputs=outputs)
    assert interrupted
    run(core, outputs=outputs)
    assert tokens(outputs["a"]) == greedy([1, 2, 3], 20)
    assert core.stats().step_waits == {"interruption": 1}
    assert core.pool.num_used == 0


def waits_of(core: EngineCore, *requests: AddRequest) -> set[str]:
    prompts = {item.request_id: item.prompt_token_ids for item in requests}
    outputs = run(core, [(index, item) for index, item in enumerate(requests)])
    for name, prompt in prompts.items():
        assert tokens(outputs[name]) == greedy(prompt, len(tokens(outputs[name])))
    return set(core.stats().step_waits)


def test_what_needs_the_step_before_waits_for_it_and_is_counted() -> None:
    many = [request(f"r{i}", [i + 1, 7, 8], max_tokens=20) for i in range(6)]
    assert waits_of(engine(), *many) == set()
    assert waits_of(engine(num_speculative_tokens=3), *many) == {"speculation"}
    assert waits_of(engine(runner=FakeRunner(num_blocks=12, max_model_len=48)), *many) == {"preemption"}
    swapping = FakeRunner(num_blocks=12, max_model_len=48, num_host_blocks=40)
    assert waits_of(engine(runner=swapping, preemption_mode="swap"), *many) == {"preemption", "host_memory"}
    core = engine()
    core.add(many[0])
    core.step()
    core.add_embedding(EmbedRequest(request_id="text", prompt_token_ids=[1, 2]))
    outputs = run(core)
    assert outputs["text"][0].embedding == [3.0, 2.0, 0.0, 1.0]
    assert tokens(outputs["r0"]) == greedy([1, 7, 8], 20)
    assert core.stats().step_waits == {"embeddings": 1}


def test_steps_run_ahead_by_themselves_on_one_gpu_only() -> None:
    def info(device: str, num_ranks: int = 1) -> ModelInfo:
        return ModelInfo(**{**FakeRunner()._info, "device": device, "num_ranks": num_ranks, "kv_blocks_total": 1})

    config = EngineConfig(model="m")
    assert [runs_ahead(config, info(device)) for device in ("cpu", "cuda", "cuda:1")] == [False, True, True]
    assert not runs_ahead(config, info("cuda", num_ranks=2))
    assert runs_ahead(EngineConfig(model="m", async_scheduling="on"), info("cpu"))
    assert not runs_ahead(EngineConfig(model="m", async_scheduling="off"), info("cuda"))
    with pytest.raises(ConfigError, match="async_scheduling"):
        EngineConfig(model="m", async_scheduling="maybe").validate()


def test_a_sequence_knows_where_it_ends() -> None:
    assert Seq(request("a", [1, 2, 3], max_tokens=5), 0.0).max_length == 8
    assert Seq(request("a", [1, 2, 3], max_tokens=5), 0.0, max_model_len=6).max_length == 6
