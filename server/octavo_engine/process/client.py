"""The API process's side of the engine process."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import multiprocessing
import os
import signal
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec
import zmq
import zmq.asyncio

from octavo_engine.config import EngineConfig
from octavo_engine.errors import (
    ConfigError,
    EngineDeadError,
    EngineDrainingError,
    InvalidRequestError,
    ModelLoadError,
    QueueFullError,
    RequestFailedError,
)
from octavo_engine.messages import (
    AbortRequest,
    AddRequest,
    Command,
    EmbedRequest,
    EngineStats,
    Event,
    Failed,
    FinishReason,
    LoadAdapter,
    LoadProgress,
    ModelInfo,
    Ready,
    ResetPrefixCache,
    SchedulerSnapshot,
    SequenceOutput,
    Shutdown,
    StepOutput,
    TakeSnapshot,
    UnloadAdapter,
)
from octavo_engine.process.private_folder import PrivateFolder, remove_abandoned
from octavo_engine.process.stream import OutputStream
from octavo_engine.process.worker import run_worker
from octavo_engine.prompt import check_prompt, check_resumed
from octavo_engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from octavo_engine.startup import LoadRunner

START_ERRORS = {"ModelLoadError": ModelLoadError, "ConfigError": ConfigError}
WATCH_INTERVAL_S = 1.0

logger = logging.getLogger(__name__)


class EngineProcessClient:
    """Runs the engine as a child process and speaks with it over private Unix sockets; implements `EngineClient`.

    All methods belong to one event loop. The engine counts as dead when its process has ended, which is seen at once,
    or when it has sent nothing for `step_timeout_s`: an idle engine reports once a second, a busy one after each
    step. A dead engine ends every open request with `EngineDeadError` and is not restarted: the replica is.
    """

    def __init__(
        self, config: EngineConfig, load: LoadRunner | None = None, environment: Mapping[str, str] | None = None
    ) -> None:
        """environment: variables of the engine process only."""
        self._config = config
        self._environment = dict(environment or {})
        self._load = load
        self._model: ModelInfo | None = None
        self._stats = EngineStats()
        self._progress: LoadProgress | None = LoadProgress(phase="resolve", fraction=0.0)
        self._streams: dict[str, OutputStream] = {}
        self._num_sent = 0  # requests, to compare with `EngineStats.num_taken`
        self._dead: EngineDeadError | None = None
        self._draining = False
        self._last_event_s = 0.0
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event)
        self._process: multiprocessing.process.BaseProcess | None = None
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def model(self) -> ModelInfo:
        if self._model is None:
            raise self._dead or EngineDeadError("the engine is not ready: the model is still loading")
        return self._model

    @property
    def stats(self) -> EngineStats:
        return self._stats

    @property
    def progress(self) -> LoadProgress | None:
        return self._progress

    @property
    def pid(self) -> int | None:
        """The engine process's id, None before `start`."""
        return None if self._process is None else self._process.pid

    @property
    def socket_directory(self) -> str:
        """Where the private sockets lie, readable by this user alone."""
        return self._folder.path

    async def start(self) -> None:
        if self._process is not None:
            raise RuntimeError("an engine client starts once; make a new one")
        self._config.validate()
        self._open_sockets()
        context = multiprocessing.get_context("spawn")
        addresses = (self._address("commands"), self._address("events"))
        arguments = (self._config, self._load, *addresses, os.getpid(), self._environment)
        self._process = context.Process(target=run_worker, args=arguments, name="octavo-engine", daemon=True)
        self._process.start()
        # An interpreter that ends without `shutdown` joins its children, and this one ignores SIGTERM.
        atexit.register(self._kill)
        self._exited = asyncio.Event()
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._last_event_s = time.monotonic()
        asyncio.get_running_loop().add_reader(self._process.sentinel, self._on_exit)
        self._tasks = [asyncio.create_task(self._read_events()), asyncio.create_task(self._watch())]
        try:
            await self._ready
        except BaseException:
            await self._stop(timeout_s=1.0)
            raise

    def check_health(self) -> None:
        if self._dead is not None:
            raise self._dead
        if self._model is None:
            raise EngineDeadError("the engine is not ready: the model is still loading")
        silent_s = time.monotonic() - self._last_event_s
        if silent_s > self._config.step_timeout_s:
            raise EngineDeadError(self._describe_silence(silent_s))

    def check_room(self) -> None:
        self._check_open()
        self._check_queue()

    async def generate(
        self,
        *,
        request_id: str,
        prompt_token_ids: list[int],
        sampling: SamplingParams,
        tenant: str = "",
        cache_salt: str = "",
        priority: int = 0,
        deadline_s: float | None = None,
        adapter: str = "",
        output_token_ids: Sequence[int] = (),
        prefix_labels: Sequence[tuple[int, int]] = (),
    ) -> AsyncGenerator[SequenceOutput, None]:
        self._check_open()
        check_prompt(prompt_token_ids, self.model, room=1)
        sampling.validate(self.model.vocab_size)
        check_resumed(prompt_token_ids, output_token_ids, sampling, self.model)
        self._check_queue()
        request = AddRequest(
            request_id=request_id,
            prompt_token_ids=prompt_token_ids,
            output_token_ids=list(output_token_ids),
            sampling=sampling,
            tenant=tenant,
            cache_salt=cache_salt,
            priority=priority,
            deadline_s=deadline_s,
            adapter=adapter,
            prefix_labels=list(prefix_labels),
            arrival_time=time.time(),
        )
        stream = self._open_stream(request)
        finished = False
        try:
            while not finished:
                output = await stream.get()
                finished = output.finish_reason is not None
                _raise_rejection(output)
                yield output
        finally:
            self._close_stream(request_id, finished)

    async def embed(
        self, *, request_id: str, prompt_token_ids: list[int], second_start: int = 0, tenant: str = ""
    ) -> SequenceOutput:
        self._check_open()
        check_prompt(prompt_token_ids, self.model, room=0)
        self._check_queue()
        stream = self._open_stream(
            EmbedRequest(
                request_id=request_id,
                prompt_token_ids=prompt_token_ids,
                second_start=second_start,
                tenant=tenant,
                arrival_time=time.time(),
            )
        )
        finished = False
        try:
            output = await stream.get()
            finished = True
        finally:
            self._close_stream(request_id, finished)
        _raise_rejection(output)
        if output.embedding is None:
            raise RequestFailedError(output.error or "the engine returned no vector for this text")
        return output

    async def load_adapter(self, *, request_id: str, name: str, path: str, replace: bool = False) -> None:
        await self._ask(LoadAdapter(request_id=request_id, name=name, path=path, replace=replace))

    async def unload_adapter(self, *, request_id: str, name: str) -> None:
        await self._ask(UnloadAdapter(request_id=request_id, name=name))

    async def snapshot(self, *, request_id: str) -> list[SchedulerSnapshot]:
        answer = await self._ask(TakeSnapshot(request_id=request_id))
        return [] if answer.snapshot is None else [answer.snapshot]

    async def _ask(self, command: LoadAdapter | UnloadAdapter | TakeSnapshot) -> SequenceOutput:
        """Send a command and wait for its one answer; a caller that leaves does not undo it."""
        self._check_open()
        stream = self._open_stream(command)
        try:
            output = await stream.get()
        finally:
            self._streams.pop(command.request_id, None)
        _raise_rejection(output)
        return output

    def reset_prefix_cache(self) -> None:
        """Forget every cached prefix."""
        self._check_open()
        self._send(ResetPrefixCache())

    async def shutdown(self, timeout_s: float) -> None:
        self._draining = True
        if self._process is None:
            return
        if self._dead is None:
            self._send(Shutdown())
        await self._stop(timeout_s)

    # ------------------------------------------------------------ requests

    def _check_open(self) -> None:
        if self._draining:
            raise EngineDrainingError("this replica is shutting down and takes no new requests; retry on another one")
        if self._dead is not None:
            raise self._dead

    def _check_queue(self) -> None:
        """Refuse at once what the engine would refuse after the step it is in; it has the last word itself.

        What was sent since it last told of its queue has taken some of the room that it told of.
        """
        stats, limit = self._stats, self._config.max_queued_requests
        too_many = len(self._streams) >= limit + self._config.max_num_seqs
        if too_many or self._num_sent - stats.num_taken >= stats.queue_room:
            rate = stats.retry_after_s
            raise QueueFullError(f"the waiting queue is full ({limit} requests); try again in {rate:.0f} s", rate)

    def _open_stream(
        self, request: AddRequest | EmbedRequest | LoadAdapter | UnloadAdapter | TakeSnapshot
    ) -> OutputStream:
        if request.request_id in self._streams:
            raise InvalidRequestError(
                f"request id {request.request_id!r} is in use by a request still running", "request_id"
            )
        try:
            message = self._encoder.encode(request)
        except (OverflowError, UnicodeEncodeError) as error:
            raise InvalidRequestError(f"a field of the request cannot be sent to the engine: {error}") from error
        self._num_sent += isinstance(request, AddRequest | EmbedRequest)
        stream = self._streams[request.request_id] = OutputStream()
        self._send_encoded(message)
        return stream

    def _close_stream(self, request_id: str, finished: bool) -> None:
        self._streams.pop(request_id, None)
        if not finished and self._dead is None:
            self._send(AbortRequest(request_ids=[request_id]))

    # ------------------------------------------------------------ the process

    def _open_sockets(self) -> None:
        for abandoned in remove_abandoned():
            logger.info("removed %s, which a killed server left behind", abandoned)
        self._folder = PrivateFolder()
        self._context = zmq.asyncio.Context()
        # With one peer only: of several, each would get a part of the commands, whoever they are.
        self._commands: zmq.Socket[bytes] = zmq.Context.shadow(self._context.underlying).socket(zmq.PAIR)
        self._events = self._context.socket(zmq.PULL)
        self._commands.setsockopt(zmq.SNDHWM, 0)
        self._events.setsockopt(zmq.RCVHWM, 0)
        self._commands.bind(self._address("commands"))
        self._events.bind(self._address("events"))

    def _address(self, name: str) -> str:
        return f"ipc://{self._folder.path}/{name}"

    def _send(self, command: Command) -> None:
        self._send_encoded(self._encoder.encode(command))

    def _send_encoded(self, message: bytes) -> None:
        # Killed a moment ago: nobody hears any more, and `_on_exit` is about to end every stream with the cause.
        with contextlib.suppress(zmq.Again):
            self._commands.send(message, zmq.NOBLOCK)

    async def _read_events(self) -> None:
        while True:
            message = await self._events.recv()
            self._last_event_s = time.monotonic()
            try:
                self._on_event(self._decoder.decode(message))
            except msgspec.MsgspecError as error:
                self._die(f"the engine sent a message this process cannot read: {error}")
                self._kill()
                return

    def _on_event(self, event: Event) -> None:
        if isinstance(event, StepOutput):
            self._stats = event.stats
            for output in event.outputs:
                stream = self._streams.get(output.request_id)
                if stream is not None:
                    stream.put(output)
        elif isinstance(event, LoadProgress):
            self._progress = event
        elif isinstance(event, Ready):
            self._model = event.model
            self._progress = None
            if not self._ready.done():
                self._ready.set_result(None)
        elif isinstance(event, Failed):
            self._die(event.message, event.kind)

    async def _watch(self) -> None:
        """Kill an engine that has gone silent after it was ready."""
        while self._dead is None:
            await asyncio.sleep(min(WATCH_INTERVAL_S, self._config.step_timeout_s / 4))
            if self._model is None or self._silent_s() <= self._config.step_timeout_s:
                continue
            # This loop itself may have been held up; let it read what lies in the socket before judging.
            await asyncio.sleep(min(WATCH_INTERVAL_S, self._config.step_timeout_s / 4))
            silent_s = self._silent_s()
            if silent_s > self._config.step_timeout_s:
                self._die(self._describe_silence(silent_s))
                self._kill()

    def _silent_s(self) -> float:
        return time.monotonic() - self._last_event_s

    def _describe_silence(self, silent_s: float) -> str:
        return (
            f"the engine has made no progress for {silent_s:.1f} s "
            f"(step_timeout_s is {self._config.step_timeout_s:g}); this replica must be restarted"
        )

    def _on_exit(self) -> None:
        process = self._process
        if process is None:
            return
        asyncio.get_running_loop().remove_reader(process.sentinel)
        process.join()
        self._exited.set()
        # A last message, such as the reason, may still lie in the socket: read it before naming the exit code.
        asyncio.get_running_loop().call_later(0.2, self._die, describe_exit(process.exitcode))

    def _die(self, message: str, kind: str = "EngineDeadError") -> None:
        if self._dead is not None:
            return
        self._dead = EngineDeadError(message)
        if not self._draining:
            logger.error("engine is dead: %s", message)
        if not self._ready.done():
            self._ready.set_exception(START_ERRORS.get(kind, EngineDeadError)(message))
        for stream in self._streams.values():
            stream.fail(self._dead)

    def _kill(self) -> None:
        if self._process is not None and self._process.pid is not None and not self._exited.is_set():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGKILL)

    async def _stop(self, timeout_s: float) -> None:
        try:
            await asyncio.wait_for(self._exited.wait(), timeout_s)
        except TimeoutError:
            self._kill()
            await self._exited.wait()
        atexit.unregister(self._kill)
        self._die("the engine was shut down")
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._commands.close(linger=0)
        self._events.close(linger=0)
        self._context.term()
        self._folder.remove()


def _raise_rejection(output: SequenceOutput) -> None:
    """Turn an output that says a request was refused into the error the engine raised."""
    if output.finish_reason is not FinishReason.ERROR or output.error_kind is None:
        return
    message = output.error or "the engine refused this request"
    if output.error_kind == "QueueFullError":
        raise QueueFullError(message, output.retry_after_s or 1.0)
    if output.error_kind == "InvalidRequestError":
        raise InvalidRequestError(message, output.error_param)
    if output.error_kind == "RequestFailedError":
        raise RequestFailedError(message)


def describe_exit(code: int | None) -> str:
    if code is not None and code < 0:
        hint = "; was it out of memory?" if code == -signal.SIGKILL else ""
        return f"the engine process was killed by {signal.Signals(-code).name}{hint}"
    return f"the engine process ended with exit code {code}"
