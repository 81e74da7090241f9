"""The sampling defaults a checkpoint ships in `generation_config.json`."""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec

_MAX_BYTES = 1_000_000
logger = logging.getLogger("octavo.server")


class SamplingDefaults(msgspec.Struct, frozen=True):
    """What a request gets for the fields it leaves out."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def describe(self) -> str:
        """The values that differ from the protocol's own, for the log."""
        given = {name: value for name in self.__struct_fields__ if (value := getattr(self, name)) is not None}
        return ", ".join(f"{name} {value:g}" for name, value in given.items())


def read_sampling_defaults(model_path: str) -> SamplingDefaults:
    """The checkpoint's defaults, or none where it ships none; a file that makes no sense is ignored with a warning."""
    file = Path(model_path) / "generation_config.json"
    if not file.is_file():
        return SamplingDefaults()
    try:
        data = file.read_bytes()
        if len(data) > _MAX_BYTES:
            raise ValueError("the file is too large")
        return msgspec.json.decode(data, type=SamplingDefaults)
    except (OSError, ValueError, RecursionError) as error:
        logger.warning("%s is ignored: %s", file.name, error)
        return SamplingDefaults()
