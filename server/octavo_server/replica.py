"""One replica as its faces see it: settings, engine, life cycle, metrics and, once loaded, the model."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from importlib.metadata import version
from typing import ParamSpec, TypeVar

from octavo_engine.client import EngineClient
from octavo_engine.errors import EngineDeadError, OctavoError
from octavo_engine.tokenizer.interface import Tokenizer
from octavo_server.batches.service import Batches
from octavo_server.beams import BeamSearcher
from octavo_server.embedding import Embedder
from octavo_server.errors import from_engine_error, unavailable
from octavo_server.generation import Generator
from octavo_server.generation_config import SamplingDefaults, read_sampling_defaults
from octavo_server.lifecycle import Lifecycle, Phase
from octavo_server.metrics import Metrics, Snapshot
from octavo_server.parsers.choose import speaks_harmony, thinks, tool_parser_for
from octavo_server.served_model import ServedModel
from octavo_server.settings import ServeSettings
from octavo_server.telemetry import Telemetry
from octavo_server.text_pool import TextPool
from octavo_server.usage_log import UsageLog

VERSION = version("octavo")
P = ParamSpec("P")
T = TypeVar("T")
TokenizerLoader = Callable[[str], Tokenizer]

logger = logging.getLogger("octavo.server")


class Replica:
    """What every face needs, in one place; used from one event loop."""

    def __init__(self, settings: ServeSettings, engine: EngineClient, load_tokenizer: TokenizerLoader) -> None:
        self.settings = settings
        self.engine = engine
        self.lifecycle = Lifecycle()
        self.batches = Batches(settings.batch_folder, self.lifecycle) if settings.batch_folder is not None else None
        self.text = TextPool()
        self.usage = UsageLog()
        max_loras = settings.max_loras if settings.enable_lora else 0
        self.metrics = Metrics(self._snapshot, VERSION, settings.max_num_seqs, self.usage, max_loras)
        self.telemetry = Telemetry(settings.otlp_endpoint, VERSION)
        self._load_tokenizer = load_tokenizer
        self._served: ServedModel | None = None
        self._generator: Generator | None = None
        self._embedder: Embedder | None = None

    async def start(self) -> None:
        """Load the model and become ready; raises what `EngineClient.start` raises."""
        await self.engine.start()
        info = self.engine.model
        tokenizer = await self.text.run(self._load_tokenizer, info.path)
        names = self.settings.served_model_names or (info.name,)
        own_template = self.settings.read_chat_template()
        template = own_template or tokenizer.chat_template
        self._served = ServedModel(
            info=info,
            tokenizer=tokenizer,
            names=names,
            chat_template=own_template,
            sampling_defaults=self._sampling_defaults(info.path),
            tool_parser=tool_parser_for(self.settings.tool_call_parser, template),
            thinks=thinks(self.settings.reasoning_parser, template),
            speaks_harmony=speaks_harmony(self.settings.reasoning_parser, self.settings.tool_call_parser, template),
            adapters=self._adapters,
        )
        latencies = self.metrics.for_model(self._served.name)
        self._generator = Generator(self.engine, tokenizer, latencies, self.telemetry, self._served.name)
        self._embedder = Embedder(self.engine, self._served, self.prepare)
        self.lifecycle.become_ready()
        if self.batches is not None:
            self.batches.runner.resume()

    @property
    def served(self) -> ServedModel:
        """The loaded model; raises a retryable 503 while there is none."""
        return _loaded(self._served)

    @property
    def generator(self) -> Generator:
        """Runs sequences; raises a retryable 503 while no model is loaded."""
        return _loaded(self._generator)

    @property
    def beams(self) -> BeamSearcher:
        """Searches instead of sampling; raises a retryable 503 while no model is loaded."""
        return BeamSearcher(self.engine, self.served.tokenizer)

    @property
    def embedder(self) -> Embedder:
        """Makes vectors; raises a retryable 503 while no model is loaded."""
        return _loaded(self._embedder)

    async def prepare(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run the text work of a request that is about to be queued; refused before it when there is no room.

        Raises `ApiError`.
        """
        try:
            self.engine.check_room()
        except OctavoError as error:
            raise from_engine_error(error) from error
        return await self.text.run(function, *args, **kwargs)

    def health_problem(self) -> str | None:
        """Why the process should be restarted, or None while it is well (loading counts as well)."""
        if self.lifecycle.phase is Phase.FAILED:
            return self.lifecycle.failure or "the engine failed"
        if self._served is None:
            return None
        try:
            self.engine.check_health()
        except EngineDeadError as error:
            return str(error)
        return None

    async def close(self, timeout_s: float) -> None:
        """End the engine process and the threads."""
        if self.batches is not None:
            await self.batches.close()
        self.text.close()
        await self.engine.shutdown(timeout_s)
        await asyncio.to_thread(self.telemetry.shutdown)

    def _sampling_defaults(self, model_path: str) -> SamplingDefaults:
        if self.settings.generation_config == "none":
            return SamplingDefaults()
        defaults = read_sampling_defaults(model_path)
        if defaults != SamplingDefaults():
            logger.info("sampling defaults of the checkpoint: %s", defaults.describe())
        return defaults

    def _adapters(self) -> list[str]:
        return [adapter.name for adapter in self.engine.stats.adapters if not adapter.is_leaving]

    def _snapshot(self) -> Snapshot | None:
        served = self._served
        return None if served is None else Snapshot(served.name, served.info, self.engine.stats)


def _loaded(part: T | None) -> T:
    if part is None:
        raise unavailable("The model is still loading; retry shortly.", 5.0, "starting")
    return part
