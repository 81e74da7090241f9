"""Keeps the device busy: a step is launched while the one before is still computed.

The order of one round, with step k in flight: launch step k+1, whose decodes read their token on the device from what
step k chooses; wait for step k and append its tokens; choose from the logits of step k+1, for the sequences that go on.
Choosing needs the host only after the model has run, so whatever depends on a sequence's last tokens (penalties,
grammars) is exact, and costs nothing as long as the host is quicker than the model.

What step k ends (a stop token, a failure, a cancelled request) is in step k+1 too: one position too many is computed
for it, which nobody reads; its blocks are free once step k+1 has landed.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

import torch

from octavo_engine.errors import EngineDeadError, RequestFailedError
from octavo_engine.isolation import StepFailedError, first_line, run_isolated
from octavo_engine.outcomes import Outcomes
from octavo_engine.roofline import Roofline
from octavo_engine.runner.interface import ModelRunner, StagedRunner
from octavo_engine.sampler.sampler import Sampler
from octavo_engine.scheduler.batch import Batch
from octavo_engine.scheduler.scheduler import Scheduler, WaitReason
from octavo_engine.scheduler.sequence import SequenceState
from octavo_engine.stepping.choices import Chosen, Results, choices_of
from octavo_engine.stepping.device_queue import DeviceQueue
from octavo_engine.stepping.step import Step, still_running


class StepPipeline:
    """At most one step is in flight between two rounds; none, unless it `runs_ahead`.

    A runner in stages has a step in flight in each of them, over different sequences: a round launches one and takes in
    the oldest.

    num_ahead: steps that were launched before the one in front of them was over.
    """

    def __init__(
        self,
        runner: ModelRunner,
        scheduler: Scheduler,
        outcomes: Outcomes,
        queue: DeviceQueue,
        clock: Callable[[], float],
        roofline: Roofline | None,
        *,
        runs_ahead: bool,
        stages: StagedRunner | None = None,
    ) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._outcomes = outcomes
        self._queue = queue
        self._clock = clock
        self._roofline = roofline
        self._runs_ahead = runs_ahead
        self._stages = stages
        self._sampler = Sampler()
        self._in_flight: deque[Step] = deque()  # a step leaves when it is over, even if a round was interrupted
        self._collected_s = 0.0
        self._settled = False  # since the last batch was scheduled
        self.num_ahead = 0
        self._waits: Counter[WaitReason] = Counter()

    @property
    def num_in_flight(self) -> int:
        """Steps that are not over."""
        return len(self._in_flight)

    @property
    def waits(self) -> dict[str, int]:
        """Steps that were not launched ahead, or waited for the device otherwise, by reason."""
        counts = {reason.value: count for reason, count in self._waits.items()}
        return counts | {"sampling": self._sampler.num_waits} if self._sampler.num_waits else counts

    def make_ready(self) -> None:
        """Before the next batch is scheduled: wait for what is in flight if that has to be over."""
        if self._in_flight:
            unready = self._stages is None and any(step.chosen is None for step in self._in_flight)
            reason = WaitReason.INTERRUPTION if unready else self._scheduler.reason_to_wait()
            if reason is not None:
                self.settle(reason)
        self._settled = False

    def settle(self, reason: WaitReason) -> None:
        """Wait until nothing is in flight, and take in what comes of it."""
        if self._in_flight:
            self._waits[reason] += 1
            self._settled = True
        self._collect_all_but(0)

    def advance(self, batch: Batch) -> None:
        """Launch a batch, if it is not empty, and take in the oldest step. Raises `StepFailedError`."""
        if self._settled:
            batch = still_running(batch)
        if self._stages is not None:
            self._advance_stages(batch, self._stages)
            return
        self._collect_all_but(1)
        if batch.slices:
            self._launch(batch)
        self._collect_all_but(1 if batch.slices else 0)
        if self._in_flight:
            self._chosen(self._in_flight[0])
        if not self._runs_ahead:
            self._collect_all_but(0)

    def _advance_stages(self, batch: Batch, stages: StagedRunner) -> None:
        if batch.slices:
            started = self._clock()
            begun = self._queue.submit(partial(stages.begin, batch.slices))
            self._add(batch, started, lambda: begun.result()())
        if self._in_flight and (not batch.slices or len(self._in_flight) >= stages.num_stages):
            self._collect(self._in_flight[0])

    def _launch(self, batch: Batch) -> None:
        before = self._in_flight[-1].chosen if self._in_flight else None

        def forward() -> torch.Tensor:
            tokens = None if before is None else before.result().tokens
            return self._runner.forward(batch.slices, None if tokens is None else tokens.tokens)

        started = self._clock()
        self._add(batch, started, self._queue.submit(forward).result)

    def _add(self, batch: Batch, launched_s: float, logits: Callable[[], torch.Tensor]) -> None:
        self.num_ahead += bool(self._in_flight)
        self._scheduler.launched(batch)
        self._in_flight.append(Step(batch, batch, launched_s, logits))

    def _chosen(self, step: Step) -> Future[Chosen]:
        """What is chosen from a step's logits, now that the steps before it are over."""
        if step.chosen is None:
            choices, logits = choices_of(step.batch), step.logits
            step.chosen = self._queue.submit(lambda: choices.choose(self._sampler, logits()))
        return step.chosen

    def _collect_all_but(self, count: int) -> None:
        while len(self._in_flight) > count:
            self._collect(self._in_flight[0])

    def _collect(self, step: Step) -> None:
        """Wait for the oldest step and take in what it brings."""
        chosen = self._chosen(step)
        try:
            results = chosen.result().wait()
        except torch.AcceleratorError as error:
            raise StepFailedError(f"the device failed: {first_line(error)}") from error
        except EngineDeadError:
            raise
        except Exception as error:
            self._recover(step, error)
            return
        self._in_flight.popleft()
        self._scheduler.landed(step.scheduled)
        self._take_in(step.batch, results)
        now = self._clock()
        seconds = now - max(step.launched_s, self._collected_s)
        self._collected_s = now
        self._scheduler.observe(step.batch, seconds)
        if self._roofline is not None:
            self._roofline.observe(step.batch.load, step.batch.num_logits, seconds)

    def _recover(self, step: Step, error: Exception) -> None:
        """A step failed: find the culprits, and compute what is left of it, then the steps behind it, anew."""
        batch = still_running(step.batch)
        known = error if len(batch) == len(step.batch) else None  # may have failed by what is left out now
        isolated = self._queue.submit(lambda: run_isolated(self._runner, batch, known))
        parts, failed = isolated.result()
        self._in_flight.popleft()
        self._scheduler.landed(step.scheduled)
        for seq, reason in failed:
            self._outcomes.fail(seq, RequestFailedError(f"the model could not compute this request: {reason}"))
        for part, logits in parts:
            self._take_in(part, choices_of(part).choose(self._sampler, logits).wait())
        self._collected_s = self._clock()
        for behind in self._in_flight:
            behind.batch = still_running(behind.scheduled)
            behind.logits = self._queue.submit(partial(self._runner.forward, behind.batch.slices)).result
            self._waits[WaitReason.FAILURE] += 1

    def _take_in(self, batch: Batch, results: Results) -> None:
        """Record what a step has computed, and append what was chosen; of requests that still run."""
        for seq, piece in zip(batch.sequences, batch.slices, strict=True):
            if seq.state is SequenceState.RUNNING and not seq.drafted:
                self._scheduler.advance(seq, len(piece.token_ids))
        for part, entries in zip(results.choices.prompts, results.prompts, strict=True):
            if part.is_start:
                part.seq.prompt_logprobs = [None]
            part.seq.prompt_logprobs.extend(entries)
        if results.sampled is None:
            return
        token_ids, logprobs = results.sampled.token_ids, results.sampled.logprobs
        row = 0
        for seq in results.choices.sequences:
            first, row = row, row + 1 + len(seq.drafted)
            if seq.state is SequenceState.RUNNING:
                reported = None if logprobs is None else logprobs[first:row]
                self._outcomes.append_verified(seq, token_ids[first:row], reported)
