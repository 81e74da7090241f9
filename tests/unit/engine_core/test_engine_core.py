"""The engine core over a deterministic model: what comes out, when it ends, and what happens when things go wrong."""

from __future__ import annotations

from random import Random

import pytest
import torch

from fake_runner import CRASH, EOS, NAN, FakeRunner, greedy, logits_after
from octavo_engine.config import EngineConfig
from octavo_engine.engine import EngineCore
from octavo_engine.errors import InvalidRequestError, QueueFullError
from octavo_engine.isolation import StepFailedError
from octavo_engine.messages import AddRequest, EmbedRequest, FinishReason, SequenceOutput
from octavo_engine.sampling_params import SamplingParams, StructuredOutput


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def engine(clock: Clock | None = None, *, runner: FakeRunner | None = None, **settings: object) -> EngineCore:
    config = EngineConfig(
        **{"model": "fake", "block_size": 4, "max_num_seqs": 8, "max_num_batched_tokens": 32, **settings}
    )
    return EngineCore(runner or FakeRunner(), config, clock or Clock())


def request(name: str, prompt: list[int], **sampling: object) -> AddRequest:
    params = SamplingParams(**{"max_tokens": 8, "temperature": 0.0, **sampling})
    return AddRequest(request_id=name, prompt_token_ids=prompt, sampling=params)


def run(core: EngineCore, max_steps: int = 2_000) -> dict[str, list[SequenceOutput]]:
    outputs: dict[str, list[SequenceOutput]] = {}
    for _ in range(max_steps):
        if not core.has_work:
            return outputs
        for output in core.step().outputs:
            outputs.setdefault(output.request_id, []).append(output)
    raise AssertionError("the engine did not become idle")


def tokens(outputs: list[SequenceOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def test_a_greedy_request_returns_the_models_own_continuation() -> None:
    core = engine()
    core.add(request("a", [1, 2, 3]))
    out = run(core)["a"]
    assert tokens(out) == greedy([1, 2, 3], 8)
    assert out[-1].finish_reason is FinishReason.LENGTH
    assert core.pool.num_used == 0


def test_batched_requests_equal_each_alone() -> None:
    prompts = {f"r{i}": [i % 80 + 1, *range(1, i % 23)] for i in range(32)}
    core = engine(max_num_seqs=8, max_num_batched_tokens=16)
    for name, prompt in prompts.items():
        core.add(request(name, prompt))
    out = run(core)
    assert {name: tokens(out[name]) for name in prompts} == {name: greedy(p, 8) for name, p in prompts.items()}


def test_preempted_sequences_equal_undisturbed_ones() -> None:
    core = engine(runner=FakeRunner(num_blocks=12, max_model_len=48), enable_prefix_caching=False)
    prompts = {f"r{i}": [i + 1, 7, 8] for i in range(6)}
    for name, prompt in prompts.items():
        core.add(request(name, prompt, max_tokens=20))
    out = run(core)
    assert core.scheduler.num_preemptions > 0
    assert {name: tokens(out[name]) for name in prompts} == {name: greedy(p, 20) for name, p in prompts.items()}


def test_a_cached_prefix_gives_the_same_tokens_as_a_cold_one() -> None:
    prompt = list(range(1, 30))
    core = engine()
    core.add(request("cold", prompt))
    cold = run(core)["cold"]
    core.add(request("warm", prompt))
    warm = run(core)["warm"]
    assert tokens(warm) == tokens(cold) == greedy(prompt, 8)
    assert (cold[0].num_cached_tokens, warm[0].num_cached_tokens) == (0, 28)


def test_a_salt_keeps_tenants_caches_apart() -> None:
    prompt = list(range(1, 30))
    core = engine()
    for name, salt in (("a", "x"), ("b", "y"), ("c", "x")):
        core.add(AddRequest(request_id=name, prompt_token_ids=prompt, sampling=SamplingParams(), cache_salt=salt))
        assert run(core)[name][0].num_cached_tokens == (28 if name == "c" else 0)


def test_resetting_the_prefix_cache_makes_the_next_request_cold() -> None:
    core = engine()
    core.add(request("a", list(range(1, 30))))
    run(core)
    core.reset_prefix_cache()
    core.add(request("b", list(range(1, 30))))
    assert run(core)["b"][0].num_cached_tokens == 0


def test_a_seeded_request_reproduces_alone_in_a_batch_and_after_preemption() -> None:
    def sample(core: EngineCore, others: int) -> list[int]:
        for i in range(others):
            core.add(request(f"other{i}", [i + 1, 5], temperature=1.0, max_tokens=20))
        core.add(request("seeded", [3, 1, 4], temperature=0.9, top_p=0.95, top_k=40, seed=7, max_tokens=20))
        return tokens(run(core)["seeded"])

    crowded = engine(runner=FakeRunner(num_blocks=12, max_model_len=48), enable_prefix_caching=False)
    assert sample(engine(), 0) == sample(engine(), 6) == sample(crowded, 6)
    assert crowded.scheduler.num_preemptions > 0


def test_a_stop_token_ends_the_sequence_and_is_named() -> None:
    expected = greedy([5, 6], 8)
    core = engine()
    core.add(request("a", [5, 6], stop_token_ids=(expected[3],)))
    out = run(core)["a"]
    end = expected.index(expected[3]) + 1
    assert tokens(out) == expected[:end]
    assert (out[-1].finish_reason, out[-1].stop_token_id) == (FinishReason.STOP, expected[3])


def test_eos_ends_a_sequence_unless_it_is_ignored() -> None:
    core = engine()
    core.add(request("a", [5, 6], logit_bias={EOS: 100.0}))
    core.add(request("b", [5, 6], logit_bias={EOS: 100.0}, ignore_eos=True, max_tokens=3))
    out = run(core)
    assert tokens(out["a"]) == [EOS]
    assert out["a"][-1].finish_reason is FinishReason.STOP
    assert tokens(out["b"]) == [EOS] * 3


def test_min_tokens_holds_eos_back() -> None:
    core = engine()
    core.add(request("a", [5, 6], logit_bias={EOS: 100.0}, min_tokens=3))
    out = run(core)["a"]
    assert len(tokens(out)) == 4
    assert tokens(out)[-1] == EOS
    assert EOS not in tokens(out)[:-1]


def test_the_context_length_ends_a_sequence() -> None:
    core = engine(runner=FakeRunner(max_model_len=10))
    core.add(request("a", [1] * 9, max_tokens=50))
    out = run(core)["a"]
    assert len(tokens(out)) == 1
    assert out[-1].finish_reason is FinishReason.LENGTH


def test_the_whole_cache_is_the_longest_context() -> None:
    core = engine(runner=FakeRunner(num_blocks=4, block_size=4, max_model_len=256))
    assert core.model.max_model_len == 16
    core.add(request("a", [1] * 8, max_tokens=100))
    assert len(tokens(run(core)["a"])) == 8


@pytest.mark.parametrize(
    ("prompt", "param"),
    [([], "prompt"), ([1] * 256, "prompt"), ([97], "prompt"), ([-1], "prompt")],
)
def test_a_prompt_that_cannot_run_is_refused(prompt: list[int], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        engine().add(request("a", prompt))
    assert caught.value.param == param


def test_a_request_id_in_use_is_refused() -> None:
    core = engine()
    core.add(request("a", [1]))
    with pytest.raises(InvalidRequestError, match="in use"):
        core.add(request("a", [2]))


def test_a_full_queue_refuses_with_a_time_to_come_back() -> None:
    core = engine(max_num_seqs=2, max_queued_requests=3)
    for i in range(5):
        core.add(request(f"r{i}", [1]))
    with pytest.raises(QueueFullError) as caught:
        core.add(request("late", [1]))
    assert caught.value.retry_after_s >= 1.0


def test_the_queue_is_bounded_by_tokens_too() -> None:
    core = engine(max_queued_tokens=50)
    core.add(request("a", [1] * 40))
    with pytest.raises(QueueFullError, match="tokens"):
        core.add(request("b", [1] * 40))


def test_texts_to_embed_and_grammars_to_compile_are_bounded_too() -> None:
    core = engine(max_queued_requests=2)
    structured = StructuredOutput(regex="a")
    for i in range(2):
        core.add_embedding(EmbedRequest(request_id=f"e{i}", prompt_token_ids=[1]))
        core.add(request(f"g{i}", [1], structured=structured))
    with pytest.raises(QueueFullError):
        core.add_embedding(EmbedRequest(request_id="e2", prompt_token_ids=[1]))
    with pytest.raises(QueueFullError):
        core.add(request("g2", [1], structured=structured))


def test_abort_frees_the_blocks_at_every_stage() -> None:
    core = engine(max_num_seqs=2, max_num_batched_tokens=8)
    for name in ("decoding", "prefilling", "waiting"):
        core.add(request(name, [3] * (30 if name == "prefilling" else 2), max_tokens=50))
    core.step()
    core.step()
    assert (core.scheduler.num_running, core.scheduler.num_waiting) == (2, 1)
    core.abort(["decoding", "prefilling", "waiting", "unknown"])
    assert core.pool.num_used == 0
    assert all(out[-1].finish_reason is FinishReason.ABORT for out in run(core).values())


def test_a_deadline_ends_waiting_and_running_sequences() -> None:
    clock = Clock()
    core = engine(clock, max_num_seqs=1)
    for name in ("running", "waiting"):
        params = SamplingParams(max_tokens=100, temperature=0.0)
        core.add(AddRequest(request_id=name, prompt_token_ids=[1, 2], sampling=params, deadline_s=5.0))
    core.step()
    clock.now += 5.0
    ended = {o.request_id: o.finish_reason for o in core.step().outputs if o.finish_reason}
    assert ended == {"running": FinishReason.DEADLINE, "waiting": FinishReason.DEADLINE}
    assert core.pool.num_used == 0


def test_nan_logits_end_their_request_and_no_other() -> None:
    core = engine()
    core.add(request("good", [1, 2, 3]))
    core.add(request("bad", [4, NAN, 5, 6, 7, 8]))
    out = run(core)
    assert tokens(out["good"]) == greedy([1, 2, 3], 8)
    assert out["bad"][-1].finish_reason is FinishReason.ERROR
    assert "NaN" in (out["bad"][-1].error or "")


def test_what_a_failed_request_computed_is_not_cached() -> None:
    core = engine()
    prompt = [4, NAN, 5, 6, 7, 8]
    for name in ("first", "second"):
        core.add(request(name, prompt))
        assert run(core)[name][-1].num_cached_tokens == 0


def test_a_kernel_failure_is_pinned_to_the_request_that_causes_it() -> None:
    core = engine()
    for i in range(5):
        core.add(request(f"r{i}", [CRASH if i == 2 else i + 1, 9]))
    out = run(core)
    assert out["r2"][-1].finish_reason is FinishReason.ERROR
    for i in (0, 1, 3, 4):
        assert tokens(out[f"r{i}"]) == greedy([i + 1, 9], 8)
    assert core.pool.num_used == 0


def test_a_lone_bad_request_does_not_end_the_engine() -> None:
    core = engine()
    for i in range(5):
        core.add(request(f"bad{i}", [CRASH]))
        assert run(core)[f"bad{i}"][-1].finish_reason is FinishReason.ERROR
    core.add(request("good", [1]))
    assert tokens(run(core)["good"]) == greedy([1], 8)


def test_a_runner_that_fails_on_everything_ends_the_engine() -> None:
    runner = FakeRunner()
    core = engine(runner=runner)
    core.add(request("a", [1]))
    core.add(request("b", [2]))
    runner.broken = True
    with pytest.raises(StepFailedError, match="every request"):
        core.step()


def test_constraints_that_leave_no_token_are_told_to_the_caller() -> None:
    core = engine()
    core.add(request("a", [1], allowed_token_ids=[5], bad_words_ids=[[5]]))
    last = run(core)["a"][-1]
    assert last.error_param == "allowed_token_ids"
    assert "every token is excluded" in (last.error or "")


def test_prompt_logprobs_are_those_of_the_model_in_any_chunking() -> None:
    prompt = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
    core = engine(max_num_seqs=2, max_num_batched_tokens=4)
    core.add(request("a", prompt, prompt_logprobs=2, logprobs=0))
    first = run(core)["a"][0]
    assert first.prompt_logprobs is not None
    assert first.prompt_logprobs[0] is None
    assert len(first.prompt_logprobs) == len(prompt)
    for position, entry in enumerate(first.prompt_logprobs[1:], start=1):
        expected = torch.log_softmax(logits_after(prompt[:position]), dim=-1)
        assert entry is not None
        assert entry.token_id == prompt[position]
        assert entry.logprob == pytest.approx(float(expected[prompt[position]]), abs=1e-5)
        assert entry.rank == int((expected > expected[prompt[position]]).sum()) + 1
        assert [token for token, _ in entry.top] == expected.topk(2).indices.tolist()


def test_texts_are_embedded_beside_running_sequences() -> None:
    core = engine()
    core.add(request("text", [1, 2]))
    for i in range(3):
        core.add_embedding(EmbedRequest(request_id=f"e{i}", prompt_token_ids=[CRASH if i == 1 else i + 1, 2]))
    out = run(core)
    assert out["e0"][0].embedding == [3.0, 2.0, 0.0, 1.0]
    assert out["e1"][0].finish_reason is FinishReason.ERROR
    assert out["e2"][0].embedding == [5.0, 2.0, 0.0, 1.0]
    assert tokens(out["text"]) == greedy([1, 2], 8)


def test_a_long_prompt_does_not_hold_up_a_short_one() -> None:
    core = engine(max_num_seqs=8, max_num_batched_tokens=16)
    core.add(request("long", [1] * 200))
    core.step()
    core.add(request("short", [2, 3]))
    assert any(output.request_id == "short" for output in core.step().outputs)


def test_stats_count_what_happened() -> None:
    core = engine()
    core.add(request("a", [1, 2, 3]))
    core.add(request("b", [1, 2, 3], max_tokens=2))
    run(core)
    stats = core.stats()
    assert (stats.prompt_tokens, stats.generation_tokens) == (6, 10)
    assert stats.requests_finished["length"] == 2
    assert stats.step == 8


class _Broken:
    is_complete = False

    def mask(self, row: torch.Tensor) -> None:
        raise RuntimeError("a bug in a grammar")

    def accept(self, token: int) -> None: ...


def test_a_failing_logit_processor_ends_its_request_alone() -> None:
    core = engine()
    core.add(request("good", [1, 2]))
    core.add(request("bad", [3, 4], min_tokens=1))
    bad = core.scheduler.get("bad")
    assert bad is not None
    bad.sampler.constraint = _Broken()
    out = run(core)
    assert out["bad"][-1].finish_reason is FinishReason.ERROR
    assert "sampling settings" in (out["bad"][-1].error or "")
    assert tokens(out["good"]) == greedy([1, 2], 8)


def test_two_thousand_requests_with_secrets_never_see_each_others() -> None:
    rng = Random(0)
    core = engine(runner=FakeRunner(num_blocks=60, max_model_len=64), max_num_seqs=16, max_num_batched_tokens=64)
    prompts = {f"r{i}": [1, 2, 3, 4, 5, *divmod(i, 80), 7] for i in range(2_000)}
    waiting = list(prompts)
    answers: dict[str, list[int]] = {name: [] for name in prompts}
    aborted: set[str] = set()
    while waiting or core.has_work:
        for name in waiting[:5]:
            core.add(request(name, prompts[name], max_tokens=4))
        del waiting[:5]
        if rng.random() < 0.3 and core.scheduler.sequences():
            name = rng.choice(core.scheduler.sequences()).request_id
            aborted.add(name)
            core.abort([name])
        for output in core.step().outputs:
            answers[output.request_id].extend(output.token_ids)
    assert core.scheduler.prefix_hits > 0
    assert len(aborted) > 50
    for name, prompt in prompts.items():
        expected = greedy(prompt, 4)
        assert answers[name] == (expected[: len(answers[name])] if name in aborted else expected)
