"""The engine's errors. Every message says what was wrong, where, and what to do."""

from __future__ import annotations


class OctavoError(Exception):
    """Root of every error the engine raises on purpose."""


class ConfigError(OctavoError):
    """A setting is impossible or does not fit the machine."""


class ModelLoadError(OctavoError):
    """A checkpoint cannot be found, read or understood."""


class InvalidRequestError(OctavoError):
    """The caller's request is wrong; `param` names the field in the caller's own terms."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class QueueFullError(OctavoError):
    """The waiting queue is full; try again after `retry_after_s` seconds."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RequestFailedError(OctavoError):
    """This one request could not be computed; the engine and all other requests go on."""


class EngineDrainingError(OctavoError):
    """The replica is shutting down and takes no new work; another replica can."""


class EngineDeadError(OctavoError):
    """The engine process is gone or hung; the request cannot finish here."""
