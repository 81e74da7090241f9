"""What a caller asked for and cannot have; each face says it in its own shape."""

from __future__ import annotations


class BatchError(Exception):
    """A refusal with its HTTP status. `param` names the request's field; `retry_after_s` invites a retry."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: float | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s
        self.code = code


class StoreError(Exception):
    """The folder of files and batches cannot be used; the message says why."""
