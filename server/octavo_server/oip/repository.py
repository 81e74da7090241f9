"""What the v2 protocol's server, repository, trace and logging routes say, whatever the transport."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from octavo_server.errors import ApiError, bad_request
from octavo_server.lifecycle import Phase
from octavo_server.oip.models import VERSION, ServedV2Model
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
LOG_LEVELS = {"log_info": logging.INFO, "log_warning": logging.WARNING, "log_error": logging.ERROR}


class Repository:
    """One engine, one model: it can be looked at, but lives and dies with the replica."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self.model = ServedV2Model(replica)
        self._log_verbose = 0

    @property
    def live(self) -> bool:
        return self._replica.health_problem() is None

    @property
    def ready(self) -> bool:
        return self._replica.lifecycle.phase is Phase.READY and self.live

    def model_ready(self, name: str, version: str) -> bool:
        """Whether inference on this model works; an unknown model is just not ready."""
        try:
            self.model.check(name, version)
        except ApiError:
            return False
        return self.ready

    def index(self, *, ready_only: bool = False) -> list[dict[str, str]]:
        """Every served name with its state."""
        phase = self._replica.lifecycle.phase
        if phase is Phase.STARTING:
            names: tuple[str, ...] = self._replica.settings.served_model_names or (self._replica.settings.model,)
            state = "LOADING"
        else:
            names = self.model.served.names
            state = "READY" if self.ready else "UNAVAILABLE"
        if ready_only and state != "READY":
            return []
        reason = "" if state == "READY" else self._replica.health_problem() or phase.value
        return [{"name": name, "version": VERSION, "state": state, "reason": reason} for name in names]

    def load(self, name: str, parameters: Mapping[str, Any]) -> None:
        """Loading the model that is served changes nothing; any other is refused."""
        if parameters:
            raise bad_request("parameters: this replica takes its configuration from its flags only", "parameters")
        self.model.check(name, "")

    def unload(self, name: str) -> None:
        """Refused: memory is freed by ending the replica, which is the operator's decision."""
        self.model.check(name, "")
        raise ApiError(
            501, f"{name} lives as long as its replica; scale the service down instead", reason="unload_refused"
        )

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

    def metadata(self) -> dict[str, Any]:
        """Of the model, as HTTP shows it."""
        model = self.model
        return {
            "name": model.served.name,
            "versions": [VERSION],
            "platform": model.platform,
            "inputs": [{"name": s.name, "datatype": s.datatype, "shape": list(s.shape)} for s in model.inputs],
            "outputs": [{"name": s.name, "datatype": s.datatype, "shape": list(s.shape)} for s in model.outputs],
        }

    def config(self) -> dict[str, Any]:
        """Triton's model configuration, as HTTP shows it."""
        model = self.model
        return {
            "name": model.served.name,
            "platform": model.platform,
            "backend": "octavo",
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
            "model_transaction_policy": {"decoupled": model.generates},
        }

    def statistics(self) -> dict[str, Any]:
        """Triton's statistics, as HTTP shows them."""
        model = self.model
        counts = model.statistics
        return {
            "name": model.served.name,
            "version": VERSION,
            "last_inference": counts.last_inference_ms,
            "inference_count": counts.success.count,
            "execution_count": counts.success.count,
            "inference_stats": {
                name: {"count": duration.count, "ns": duration.ns} for name, duration in counts.durations().items()
            },
            "response_stats": {},
            "batch_stats": [],
            "memory_usage": [
                {"type": model.served.info.device.upper(), "id": 0, "byte_size": model.served.info.weight_bytes}
            ],
        }


def config_type(datatype: str) -> str:
    """The datatype's name in a model configuration."""
    return "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}"
