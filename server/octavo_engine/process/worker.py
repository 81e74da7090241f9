"""The engine process: reads commands, steps the core, writes events."""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

import msgspec
import zmq

from octavo_engine.config import EngineConfig
from octavo_engine.errors import InvalidRequestError, OctavoError, QueueFullError, RequestFailedError
from octavo_engine.kv.event_publisher import KVEventPublisher
from octavo_engine.messages import (
    AbortRequest,
    AddRequest,
    Command,
    EmbedRequest,
    Event,
    Failed,
    LoadAdapter,
    Ready,
    ResetPrefixCache,
    SequenceOutput,
    Shutdown,
    StepOutput,
    TakeSnapshot,
    UnloadAdapter,
)
from octavo_engine.process.parent import die_with_parent
from octavo_engine.rejection import rejection

if TYPE_CHECKING:
    from octavo_engine.engine import EngineCore

HEARTBEAT_MS = 1_000
NICENESS = 5

logger = logging.getLogger(__name__)


def run_worker(
    config: EngineConfig,
    load: object,
    commands_address: str,
    events_address: str,
    parent_pid: int,
    environment: Mapping[str, str],
) -> None:
    """Entry point of the engine process. `load` is a `LoadRunner`, or None for the real loader."""
    die_with_parent(parent_pid)
    os.environ.update(environment)
    # Only the parent decides when the engine ends: a Ctrl-C or a pod's SIGTERM must let running requests drain.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if config.num_threads:
        os.environ["OMP_NUM_THREADS"] = str(config.num_threads)
    context = zmq.Context()
    commands, events = _connect(context, commands_address, events_address)
    worker = Worker(commands, events)
    try:
        worker.run(config, load)
    except Exception as error:
        if not isinstance(error, OctavoError):
            logger.exception("the engine loop ended with an unexpected error")
        worker.send(Failed(message=_describe(error), kind=_kind(error)))
        sys.exit(1)
    finally:
        commands.close(linger=0)
        events.close(linger=2_000)
        context.term()


class Worker:
    """One core between two sockets."""

    def __init__(self, commands: zmq.Socket[bytes], events: zmq.Socket[bytes]) -> None:
        self._commands = commands
        self._events = events
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)

    def send(self, event: Event) -> None:
        self._events.send(self._encoder.encode(event))

    def run(self, config: EngineConfig, load: object) -> None:
        """Start up, then step until `Shutdown`."""
        from octavo_engine.runner.machine import choose_device
        from octavo_engine.startup import build_engine

        if choose_device(config.device).type == "cpu":
            # It takes every core for long: probes and refusals, a moment's work of the server's, go first. Threads
            # inherit this when they are made, so it comes before the first of them.
            os.nice(NICENESS)
        core = build_engine(config, self.send, load)  # type: ignore[arg-type]
        # What start-up left alive stays alive: collecting it again and again would only stop the loop.
        gc.collect()
        gc.freeze()
        self.send(StepOutput(outputs=[], stats=core.stats()))  # whoever knows that it is ready knows its room
        self.send(Ready(model=core.model))
        publisher = _publisher(config)
        try:
            self._loop(core, publisher)
        finally:
            if publisher is not None:
                publisher.close()

    def _loop(self, core: EngineCore, publisher: KVEventPublisher | None) -> None:
        commands = self._commands
        while True:
            if publisher is not None:
                events = core.take_kv_events()
                if events is not None:
                    publisher.publish(events)
                publisher.serve_replays(core.kv_snapshot)
            if not core.has_work and not commands.poll(HEARTBEAT_MS):
                core.heartbeat()
                self.send(StepOutput(outputs=[], stats=core.stats()))
                continue
            answers: list[SequenceOutput] = []
            while True:
                try:
                    message = commands.recv(zmq.NOBLOCK)
                except zmq.Again:
                    break
                command = self._decoder.decode(message)
                if isinstance(command, Shutdown):
                    return
                answers.extend(_apply(core, command))
            if answers:
                self.send(StepOutput(outputs=answers, stats=core.stats()))
            if core.has_work:
                self.send(core.step())


def _publisher(config: EngineConfig) -> KVEventPublisher | None:
    if not config.kv_events_endpoint:
        return None
    return KVEventPublisher(config.kv_events_endpoint, config.kv_events_replay_endpoint, config.kv_events_topic)


def _apply(core: EngineCore, command: Command) -> list[SequenceOutput]:
    """Carry out one command; what is answered at once is returned: snapshots, and why a request is refused."""
    if isinstance(command, AbortRequest):
        core.abort(command.request_ids)
    elif isinstance(command, ResetPrefixCache):
        core.reset_prefix_cache()
    elif isinstance(command, TakeSnapshot):
        return [SequenceOutput(request_id=command.request_id, token_ids=[], snapshot=core.snapshot())]
    elif isinstance(command, AddRequest | EmbedRequest | LoadAdapter | UnloadAdapter):
        try:
            _submit(core, command)
        except (InvalidRequestError, QueueFullError) as error:
            return [rejection(command.request_id, error)]
        except Exception as error:  # a request the engine cannot even take in must not end the others
            logger.error("a request could not be queued: %s", type(error).__name__)
            return [rejection(command.request_id, RequestFailedError(f"the engine cannot run this request: {error}"))]
    return []


def _submit(core: EngineCore, command: AddRequest | EmbedRequest | LoadAdapter | UnloadAdapter) -> None:
    match command:
        case AddRequest():
            core.add(command)
        case EmbedRequest():
            core.add_embedding(command)
        case LoadAdapter():
            core.load_adapter(command)
        case UnloadAdapter():
            core.unload_adapter(command)


def _connect(
    context: zmq.Context[zmq.Socket[bytes]], commands_address: str, events_address: str
) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes]]:
    commands = context.socket(zmq.PAIR)
    events = context.socket(zmq.PUSH)
    # No high-water mark: what is in flight is bounded by the queue and by max_tokens of what runs.
    commands.setsockopt(zmq.RCVHWM, 0)
    events.setsockopt(zmq.SNDHWM, 0)
    commands.connect(commands_address)
    events.connect(events_address)
    return commands, events


def _describe(error: Exception) -> str:
    return str(error) if isinstance(error, OctavoError) else f"{type(error).__name__}: {error}"


def _kind(error: Exception) -> str:
    return type(error).__name__ if isinstance(error, OctavoError) else "EngineDeadError"
