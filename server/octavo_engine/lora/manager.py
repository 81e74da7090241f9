"""Loads and unloads adapters beside the engine's loop, and answers whoever asked for it."""

from __future__ import annotations

from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from octavo_engine.config import EngineConfig
from octavo_engine.errors import InvalidRequestError, ModelLoadError
from octavo_engine.lora.adapter import Adapter
from octavo_engine.lora.slots import AdapterSlots, LoadedAdapter
from octavo_engine.messages import FinishReason, LoadAdapter, SequenceOutput, UnloadAdapter
from octavo_engine.rejection import rejection
from octavo_engine.runner.interface import ModelRunner
from octavo_engine.storage import resolve

IDLE_WAIT_S = 0.01


@dataclass(frozen=True, slots=True)
class _Reading:
    command: LoadAdapter
    adapter: Future[Adapter]


class AdapterManager:
    """One thread reads files, so that no running sequence waits for a disk.

    Who asked hears of it by an output of its request id: the end of a load, or that an unloaded adapter is gone, which
    waits for the sequences that still use it.
    """

    def __init__(self, runner: ModelRunner, config: EngineConfig) -> None:
        self._runner = runner
        self._max_rank = config.max_lora_rank
        self._root = config.lora_root
        self.slots = AdapterSlots(config.max_loras, config.max_cpu_loras or 4 * config.max_loras)
        self._executor: ThreadPoolExecutor | None = None
        self._reading: dict[str, _Reading] = {}
        self._leaving: dict[str, str] = {}  # adapter -> request that unloads it
        self._replacing: dict[str, tuple[str, Adapter]] = {}  # adapter -> request and what takes its place
        self._done: list[SequenceOutput] = []

    def __len__(self) -> int:
        """Loads under way and answers not yet taken."""
        return len(self._reading) + len(self._done)

    def load_at_start(self, name: str, uri: str) -> None:
        """Load an adapter of the configuration. Raises `ModelLoadError` or `InvalidRequestError`."""
        self.slots.add(self._runner.read_adapter(name, resolve(uri), self._max_rank))

    def load(self, command: LoadAdapter) -> None:
        """Begin to load an adapter. Raises `InvalidRequestError`."""
        path = self._allowed_path(command.path)
        if not (command.replace and command.name in self.slots):
            self.slots.check_room(command.name)
        if command.name in self._leaving or command.name in self._replacing:
            raise InvalidRequestError(f"lora_name: {command.name!r} is being unloaded or replaced", "lora_name")
        if any(other.command.name == command.name for other in self._reading.values()):
            raise InvalidRequestError(f"lora_name: {command.name!r} is being loaded already", "lora_name")
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="adapter")
        reading = self._executor.submit(self._runner.read_adapter, command.name, path, self._max_rank)
        self._reading[command.request_id] = _Reading(command, reading)

    def unload(self, command: UnloadAdapter) -> None:
        """Take an adapter out as soon as nothing uses it. Raises `InvalidRequestError`."""
        if command.name in self._leaving or command.name in self._replacing:
            raise InvalidRequestError(f"lora_name: {command.name!r} is being unloaded already", "lora_name")
        if self.slots.retire(command.name):
            self._done.append(_success(command.request_id))
        else:
            self._leaving[command.name] = command.request_id

    def end(self, loaded: LoadedAdapter) -> None:
        """A sequence that used it ended."""
        if self.slots.end(loaded):
            self._left(loaded.adapter.name)

    def step(self, *, wait_for_one: bool) -> list[SequenceOutput]:
        """Answers since the last call; `wait_for_one` waits a moment, for when nothing else runs."""
        if wait_for_one and not self._done:
            wait([item.adapter for item in self._reading.values()], IDLE_WAIT_S, FIRST_COMPLETED)
        for item in [item for item in self._reading.values() if item.adapter.done()]:
            del self._reading[item.command.request_id]
            self._finish_load(item)
        done, self._done = self._done, []
        return done

    def _finish_load(self, item: _Reading) -> None:
        request_id, name = item.command.request_id, item.command.name
        try:
            adapter = item.adapter.result()
            if item.command.replace and name in self.slots and not self.slots.retire(name):
                self._replacing[name] = (request_id, adapter)
                return
            self.slots.add(adapter)
        except InvalidRequestError as error:
            self._done.append(rejection(request_id, error))
        except ModelLoadError as error:
            self._done.append(rejection(request_id, InvalidRequestError(f"lora_path: {error}", "lora_path")))
        except Exception as error:  # reading a file must not end the engine, whatever is in it
            problem = InvalidRequestError(f"lora_path: cannot be loaded: {type(error).__name__}", "lora_path")
            self._done.append(rejection(request_id, problem))
        else:
            self._done.append(_success(request_id))

    def _left(self, name: str) -> None:
        """An adapter is gone: tell who waits for it."""
        if name in self._leaving:
            self._done.append(_success(self._leaving.pop(name)))
        if name in self._replacing:
            request_id, adapter = self._replacing.pop(name)
            self.slots.add(adapter)
            self._done.append(_success(request_id))

    def _allowed_path(self, text: str) -> Path:
        """The folder a caller named, which must lie under the configured root, symbolic links followed."""
        if not self._root:
            raise InvalidRequestError(
                "lora_path: this server loads no adapters at run time; start it with --lora-root FOLDER", "lora_path"
            )
        if not text or not text.isprintable() or len(text) > 1_024:
            raise InvalidRequestError("lora_path: must name a folder under the server's adapter root", "lora_path")
        root = Path(self._root).resolve()
        try:
            path = (root / text).resolve()  # an absolute path stays itself
            inside = path.is_relative_to(root) and path.is_dir()
        except (OSError, RuntimeError):  # too long for the file system, or a loop of links
            inside = False
        if not inside:
            raise InvalidRequestError(
                f"lora_path: {text[:200]!r} is no folder under the server's adapter root", "lora_path"
            )
        return path


def _success(request_id: str) -> SequenceOutput:
    return SequenceOutput(request_id=request_id, token_ids=[], finish_reason=FinishReason.STOP)
