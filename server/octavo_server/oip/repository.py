"""What the v2 protocol's server, repository, trace and logging routes say, whatever the transport."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from octavo_engine.errors import ModelLoadError
from octavo_server.errors import ApiError, bad_request
from octavo_server.lifecycle import Phase
from octavo_server.oip.array_model import ArrayModel
from octavo_server.oip.model_files import find_models, load_program, warn_of_pickles
from octavo_server.oip.models import VERSION, ServedV2Model, V2Model
from octavo_server.replica import Replica

SERVER_NAME = "octavo"
EXTENSIONS = (
    "model_repository",
    "model_configuration",
    "binary_tensor_data",
    "parameters",
    "statistics",
    "trace",
    "logging",
    "generate",
)
logger = logging.getLogger("octavo.server")
LOG_LEVELS = {"log_info": logging.INFO, "log_warning": logging.WARNING, "log_error": logging.ERROR}


class Repository:
    """The engine's own model, which lives and dies with the replica, and files that are loaded and unloaded at will."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self._engine_model = ServedV2Model(replica)
        self._adapters: dict[str, ServedV2Model] = {}
        self._files: dict[str, ArrayModel] = {}
        self._log_verbose = 0

    async def load_files(self) -> None:
        """Load every model of the repository folder; raises `ModelLoadError`."""
        if self._replica.settings.model_repository is not None:
            warn_of_pickles(Path(self._replica.settings.model_repository))
        for name in self._found():
            await self._load_file(name)

    def find(self, name: str, version: str = "") -> V2Model:
        """A model that can be used now; raises a 404."""
        model: V2Model | None = self._files.get(name)
        if model is None:
            served = self._engine_model.served
            model = self._adapted(served.adapter_of(served.check_name(name)))
        if version not in ("", model.version):
            raise ApiError(404, f"model {name[:128]} has no version {version[:20]!r}", reason="unknown_model")
        return model

    @property
    def models(self) -> list[V2Model]:
        """Every model that can be used now."""
        return [self._engine_model, *self._files.values()]

    @property
    def live(self) -> bool:
        return self._replica.health_problem() is None

    @property
    def ready(self) -> bool:
        return self._replica.lifecycle.phase is Phase.READY and self.live

    def model_ready(self, name: str, version: str) -> bool:
        """Whether inference on this model works; an unknown model is just not ready."""
        try:
            self.find(name, version)
        except ApiError:
            return False
        return self.ready

    def index(self, *, ready_only: bool = False) -> list[dict[str, str]]:
        """Every served name and every file with its state."""
        phase = self._replica.lifecycle.phase
        if phase is Phase.STARTING:
            names: tuple[str, ...] = self._replica.settings.served_model_names or (self._replica.settings.model,)
            state = "LOADING"
        else:
            names = (*self._engine_model.served.names, *self._engine_model.served.adapters())
            state = "READY" if self.ready else "UNAVAILABLE"
        reason = "" if state == "READY" else self._replica.health_problem() or phase.value
        rows = [{"name": name, "version": VERSION, "state": state, "reason": reason} for name in names]
        for name, (version, _) in self._found().items():
            loaded = self._files.get(name)
            rows.append({
                "name": name,
                "version": version if loaded is None else loaded.version,
                "state": "UNAVAILABLE" if loaded is None else "READY",
                "reason": "unloaded" if loaded is None else "",
            })  # fmt: skip
        return [row for row in rows if row["state"] == "READY" or not ready_only]

    async def load(self, name: str, parameters: Mapping[str, Any]) -> None:
        """Load a file again; loading the engine's own model changes nothing; anything else is refused."""
        if parameters:
            raise bad_request("parameters: models are loaded as they lie in the repository folder", "parameters")
        if name not in self._found():
            self._engine_model.served.check_name(name)
            return
        try:
            await self._load_file(name)
        except ModelLoadError as error:
            raise bad_request(f"model {name} cannot be loaded; the server's log says why", "name") from error

    def unload(self, name: str) -> None:
        """Free a file's model. The engine's own is freed by ending the replica, which is the operator's decision."""
        model = self._files.pop(name, None)
        if model is not None:
            model.close()
            return
        served = self._engine_model.served
        instead = "use /v1/unload_lora_adapter" if served.adapter_of(served.check_name(name)) else "scale down"
        raise ApiError(501, f"{name} is not unloaded here; {instead} instead", reason="unload_refused")

    def _adapted(self, adapter: str) -> ServedV2Model:
        """The engine's model with an adapter, which has statistics of its own while it is loaded."""
        if not adapter:
            return self._engine_model
        loaded = self._engine_model.served.adapters()
        self._adapters = {name: model for name, model in self._adapters.items() if name in loaded}
        return self._adapters.setdefault(adapter, ServedV2Model(self._replica, adapter))

    def _found(self) -> dict[str, tuple[str, Path]]:
        folder = self._replica.settings.model_repository
        return {} if folder is None else find_models(Path(folder))

    async def _load_file(self, name: str) -> None:
        version, path = self._found()[name]
        try:
            program = await asyncio.to_thread(load_program, path)
        except ModelLoadError as error:
            logger.warning("%s", error)
            raise
        previous = self._files.get(name)
        self._files[name] = ArrayModel(name, version, path, program)
        if previous is not None:
            previous.close()
        logger.info("loaded %s version %s from the model repository", name, version)

    def trace_settings(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Tracing is set by --otlp-endpoint for the whole replica; it can be read here."""
        if any(value is not None for value in changes.values()):
            raise ApiError(501, "tracing is configured by --otlp-endpoint", reason="trace_refused")
        traced = self._replica.settings.otlp_endpoint is not None
        return {
            "trace_level": ["TIMESTAMPS"] if traced else ["OFF"],
            "trace_rate": "1",
            "trace_count": "-1",
            "log_frequency": "0",
            "trace_file": self._replica.settings.otlp_endpoint or "",
            "trace_mode": "opentelemetry",
        }

    def log_settings(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Read the log's settings and change its level: `log_verbose_level` above 0 is debug."""
        root = logging.getLogger("octavo")
        for name, value in changes.items():
            if name in LOG_LEVELS and isinstance(value, bool):
                if not value and root.getEffectiveLevel() <= LOG_LEVELS[name]:
                    root.setLevel(LOG_LEVELS[name] + 10)
                elif value and root.getEffectiveLevel() > LOG_LEVELS[name]:
                    root.setLevel(LOG_LEVELS[name])
            elif name == "log_verbose_level" and isinstance(value, int):
                self._log_verbose = max(0, value)
                root.setLevel(logging.DEBUG if value > 0 else logging.INFO)
            else:
                raise bad_request(f"{name[:40]}: unknown log setting, or a value of the wrong type", name[:40])
        level = root.getEffectiveLevel()
        return {
            "log_file": "",
            **{name: level <= threshold for name, threshold in LOG_LEVELS.items()},
            "log_verbose_level": self._log_verbose,
            "log_format": "default",
        }


def metadata(model: V2Model) -> dict[str, Any]:
    """Of a model, as HTTP shows it."""
    return {
        "name": model.name,
        "versions": [model.version],
        "platform": model.platform,
        "inputs": [{"name": s.name, "datatype": s.datatype, "shape": list(s.shape)} for s in model.inputs],
        "outputs": [{"name": s.name, "datatype": s.datatype, "shape": list(s.shape)} for s in model.outputs],
    }


def config(model: V2Model) -> dict[str, Any]:
    """Triton's model configuration, as HTTP shows it."""
    return {
        "name": model.name,
        "platform": model.platform,
        "backend": model.backend,
        "max_batch_size": 0,
        "input": [
            {
                "name": spec.name,
                "data_type": config_type(spec.datatype),
                "dims": list(spec.shape),
                "optional": spec.optional,
            }
            for spec in model.inputs
        ],
        "output": [
            {"name": spec.name, "data_type": config_type(spec.datatype), "dims": list(spec.shape)}
            for spec in model.outputs
        ],
        "model_transaction_policy": {"decoupled": model.decoupled},
    }


def statistics(model: V2Model) -> dict[str, Any]:
    """Triton's statistics, as HTTP shows them."""
    counts = model.statistics
    return {
        "name": model.name,
        "version": model.version,
        "last_inference": counts.last_inference_ms,
        "inference_count": counts.success.count,
        "execution_count": model.execution_count,
        "inference_stats": {
            name: {"count": duration.count, "ns": duration.ns} for name, duration in counts.durations().items()
        },
        "response_stats": {},
        "batch_stats": [],
        "memory_usage": [{"type": model.device.upper(), "id": 0, "byte_size": model.memory_bytes}],
    }


def config_type(datatype: str) -> str:
    """The datatype's name in a model configuration."""
    return "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}"
