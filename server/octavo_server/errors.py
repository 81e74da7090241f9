"""What goes wrong with a request, as one exception type that every face renders in its own shape."""

from __future__ import annotations

import math
from typing import Any

from octavo_engine.errors import (
    EngineDeadError,
    EngineDrainingError,
    InvalidRequestError,
    OctavoError,
    QueueFullError,
    RequestFailedError,
)
from octavo_server.limits import LIMITS

ERROR_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    413: "RequestTooLargeError",
    415: "UnsupportedMediaTypeError",
    422: "UnprocessableEntityError",
    429: "RateLimitError",
    500: "InternalServerError",
    501: "NotImplementedError",
    503: "ServiceUnavailableError",
    504: "DeadlineExceededError",
}


INTERNAL_ERROR = "Internal error; the server's log has the details."


class ApiError(Exception):
    """A refusal with its HTTP status. `param` names the request's field; `retry_after_s` invites a retry."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: float | None = None,
        reason: str = "",
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message[: LIMITS.error_message_chars]
        self.param = param
        self.retry_after_s = retry_after_s
        self.reason = reason or ERROR_TYPES.get(status, "error")

    def body(self) -> dict[str, Any]:
        """The error in OpenAI's shape."""
        return {
            "error": {
                "message": self.message,
                "type": ERROR_TYPES.get(self.status, "InternalServerError"),
                "param": self.param,
                "code": self.status,
            }
        }

    def headers(self) -> dict[str, str]:
        """`Retry-After` in whole seconds where a retry can help."""
        if self.retry_after_s is None:
            return {}
        return {"retry-after": str(max(1, math.ceil(self.retry_after_s)))}


def bad_request(message: str, param: str | None = None) -> ApiError:
    """400: the request can never succeed as it stands."""
    return ApiError(400, message, param=param)


def unavailable(message: str, retry_after_s: float, reason: str) -> ApiError:
    """503: this replica cannot now, another one or a later try can."""
    return ApiError(503, message, retry_after_s=retry_after_s, reason=reason)


def from_engine_error(error: OctavoError) -> ApiError:
    """Translate the engine's errors; anything unforeseen is a 500 without details."""
    match error:
        case InvalidRequestError():
            return bad_request(str(error), error.param)
        case QueueFullError():
            return ApiError(429, str(error), retry_after_s=error.retry_after_s, reason="queue_full")
        case EngineDrainingError():
            return unavailable(str(error), 1.0, "draining")
        case RequestFailedError():
            return ApiError(500, "This request could not be computed; others are not affected.", reason="engine_error")
        case EngineDeadError():
            return unavailable("The engine of this replica stopped; retry on another replica.", 5.0, "engine_dead")
    return ApiError(500, INTERNAL_ERROR)
