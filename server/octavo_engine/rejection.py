"""A refused request as an output, for callers that are not on the stack any more."""

from __future__ import annotations

from octavo_engine.errors import InvalidRequestError, QueueFullError, RequestFailedError
from octavo_engine.messages import FinishReason, SequenceOutput


def rejection(request_id: str, error: InvalidRequestError | QueueFullError | RequestFailedError) -> SequenceOutput:
    """The output that ends a request which never ran, and from which a client can raise the same error again."""
    return SequenceOutput(
        request_id=request_id,
        token_ids=[],
        finish_reason=FinishReason.ERROR,
        error=str(error),
        error_kind=type(error).__name__,
        error_param=error.param if isinstance(error, InvalidRequestError) else None,
        retry_after_s=error.retry_after_s if isinstance(error, QueueFullError) else None,
    )
