"""What the host does to launch a step on a device never waits for the device: not for one number of what it computes.

The device is torch's `meta`, where tensors have no content, so that reading one fails; copies from the host must not
block either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from char_tokenizer import CharTokenizer
from octavo_engine.messages import AddRequest
from octavo_engine.runner.batch_builder import build_step
from octavo_engine.runner.cuda_graphs import DecodeGraphs
from octavo_engine.runner.interface import SequenceSlice
from octavo_engine.sampler import device as sampler_device
from octavo_engine.sampler.sampler import Sampler
from octavo_engine.sampler.state import SamplerState
from octavo_engine.sampling_params import SamplingParams, StructuredOutput
from octavo_engine.scheduler.batch import Batch
from octavo_engine.scheduler.sequence import Sequence as Seq
from octavo_engine.scheduler.sequence import SequenceState
from octavo_engine.stepping.choices import choices_of
from octavo_engine.structured.grammar import GrammarCompiler
from octavo_kernels.batch import PagedKVCache

DEVICE = torch.device("meta")
BLOCK_SIZE, VOCAB_SIZE = 4, 97


class NoTensorsOfLists(TorchFunctionMode):
    """Refuses `torch.tensor(values, device=...)`: on a GPU its copy blocks, though no op shows it."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        assert func is not torch.tensor or torch.device(options.get("device") or "cpu").type == "cpu", "it blocks"
        return func(*args, **options)


class NoWaits(TorchDispatchMode):
    """Refuses copies between host and device that block."""

    num_copies = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        if func is torch.ops.aten._to_copy.default and tensors[0].device != options.get("device", tensors[0].device):
            assert options.get("non_blocking"), f"a copy from {tensors[0].device} that blocks"
            self.num_copies += 1
        if func is torch.ops.aten.copy_.default and tensors[0].device != tensors[1].device:
            raise AssertionError(f"a copy from {tensors[1].device} that blocks")
        return func(*args, **options)


class Kernel:
    """Stands where a GPU's sampling kernel is registered."""

    def backend_for(self, *_tensors: torch.Tensor) -> str:
        return "triton"

    def __call__(self, logits: torch.Tensor, *settings: torch.Tensor) -> torch.Tensor:
        assert {tensor.device.type for tensor in settings} == {"meta"}
        assert {tensor.shape for tensor in settings} == {logits.shape[:1]}
        return torch.empty(len(logits), dtype=torch.int64, device=DEVICE)


def state(**settings: Any) -> SamplerState:
    params = SamplingParams(**settings)
    tokens = [5, 6, 7, 8, 9]
    return SamplerState(params, 2**63 + 1, tokens, 2, frozenset({96}))


def states() -> list[SamplerState]:
    constrained = state()
    constrained.constraint = GrammarCompiler(CharTokenizer(), VOCAB_SIZE, frozenset({96})).compile(
        StructuredOutput(choice=("abc",))
    )
    constrained.has_processors = True
    return [
        state(temperature=0.0),
        state(temperature=0.7, top_k=5, top_p=0.9, min_p=0.1, seed=3),
        state(repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.5),
        state(logit_bias={5: 1.0}, bad_words_ids=[[8, 9, 3], [4]], min_tokens=9),
        state(allowed_token_ids=[1, 2], logprobs=3),
        constrained,
    ]


def test_the_modes_of_this_test_notice_waits() -> None:
    x = torch.zeros(3, device=DEVICE)
    with NoWaits(), NoTensorsOfLists():
        with pytest.raises((NotImplementedError, AssertionError)):
            x.tolist()
        with pytest.raises(AssertionError, match="blocks"):
            torch.ones(3).to(DEVICE)
        with pytest.raises(RuntimeError):
            x.sum().item()
        with pytest.raises(AssertionError, match="blocks"):
            torch.tensor([1], device=DEVICE)


def test_inputs() -> None:
    slices = [
        SequenceSlice([0], 9, range(4), 1, None, 1),
        SequenceSlice([0], 5, range(4, 8), 1, 2, 0),
        SequenceSlice([1, 2, 3], 0, range(8, 10), 3),
    ]
    with NoWaits() as mode, NoTensorsOfLists():
        inputs = build_step(slices, BLOCK_SIZE, DEVICE, torch.zeros(2, dtype=torch.int64, device=DEVICE))
    assert inputs.token_ids.shape == (5,)
    assert mode.num_copies == 3  # inputs, rows of the samples, adapters


def test_a_graphs_inputs() -> None:
    shape = (16, 1, BLOCK_SIZE, 3)
    caches = [PagedKVCache(torch.empty(shape, device=DEVICE), torch.empty(shape, device=DEVICE))]
    graphs = DecodeGraphs(
        lambda token_ids, batch, caches: torch.empty(batch.num_tokens, 3, device=DEVICE),
        lambda hidden: torch.empty(len(hidden), VOCAB_SIZE, device=DEVICE),
        32,
        DEVICE,
        lambda call: (lambda: None, call()),
        max_num_seqs=4,
    )
    slices = [SequenceSlice([0], 9, range(4), 1, None, row) for row in range(3)]
    sampled = torch.zeros(3, dtype=torch.int64, device=DEVICE)

    def step() -> torch.Tensor:
        inputs = build_step(slices, BLOCK_SIZE, DEVICE, sampled)
        return graphs(inputs.token_ids, inputs.batch, caches, inputs.logits_indices)

    step()  # captures
    with NoWaits(), NoTensorsOfLists():
        assert step().shape == (3, VOCAB_SIZE)
    assert graphs.num_replays == 2


def test_choosing_every_kind_of_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler_device.ops, "sample", Kernel())
    rows = states()
    sampler = Sampler()
    with NoWaits(), NoTensorsOfLists():
        choosing = sampler.choose(torch.zeros(len(rows), VOCAB_SIZE, device=DEVICE), rows)
    assert choosing.tokens.shape == (len(rows),)
    assert all(row.failure is None for row in rows)  # a processor that fails is its request's failure
    assert sampler.num_waits == 0


def test_log_probabilities_of_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler_device.ops, "sample", Kernel())
    params = SamplingParams(prompt_logprobs=2, logprobs=1)
    seq = Seq(AddRequest(request_id="a", prompt_token_ids=[1, 2, 3], sampling=params), 0.0)
    seq.state = SequenceState.RUNNING
    batch = Batch([seq], [SequenceSlice([1, 2, 3], 0, [0], 3)])
    with NoWaits(), NoTensorsOfLists():
        chosen = choices_of(batch).choose(Sampler(), torch.zeros(3, VOCAB_SIZE, device=DEVICE))
    assert chosen.tokens is not None
    assert chosen.tokens.tokens.shape == (1,)
    assert len(chosen.prompts) == 1
