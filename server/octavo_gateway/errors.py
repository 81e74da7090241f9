"""What can go wrong at the door, each with the HTTP status and OpenAI error code a client sees."""

from __future__ import annotations

from collections.abc import Sequence


class GatewayError(Exception):
    """An error answered to the client; `message` is fit for a user and names no internal address."""

    status = 500
    kind = "server_error"
    code: str | None = None

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s


class ConfigError(Exception):
    """A setting or a file of the gateway is wrong; the message names the file, the field and what is allowed."""


class BadRequestError(GatewayError):
    """The request cannot be understood; `param` names the field."""

    status = 400
    kind = "invalid_request_error"


class BodyTooLargeError(GatewayError):
    status = 413
    kind = "invalid_request_error"
    code = "body_too_large"


class UnsupportedMediaTypeError(GatewayError):
    status = 415
    kind = "invalid_request_error"
    code = "unsupported_media_type"


class RequestTimeoutError(GatewayError):
    """The client took too long to send its request."""

    status = 408
    kind = "invalid_request_error"
    code = "request_timeout"


class RouteNotFoundError(GatewayError):
    status = 404
    kind = "invalid_request_error"
    code = "route_not_found"


class MethodNotAllowedError(GatewayError):
    status = 405
    kind = "invalid_request_error"
    code = "method_not_allowed"


class ModelNotFoundError(GatewayError):
    """No service has this model name; lists the names the caller may use."""

    status = 404
    kind = "invalid_request_error"
    code = "model_not_found"

    def __init__(self, model: str, known: Sequence[str]) -> None:
        shown = model if len(model) <= 100 else model[:100] + "..."
        names = ", ".join(known) if known else "none yet"
        super().__init__(f"The model {shown!r} does not exist. Available models: {names}.", param="model")


class QueueFullError(GatewayError):
    """The waiting line of the model is full."""

    status = 429
    kind = "rate_limit_error"
    code = "queue_full"


class NoReplicaInTimeError(GatewayError):
    """No replica became free (or ready) before the request's hold deadline."""

    status = 503
    kind = "server_error"
    code = "no_replica_available"


class GatewayDrainingError(GatewayError):
    """This gateway is shutting down; another one behind the same address can answer."""

    status = 503
    kind = "server_error"
    code = "gateway_draining"


class NotSyncedError(GatewayError):
    """This gateway has just started and does not know yet which models there are."""

    status = 503
    kind = "server_error"
    code = "gateway_starting"


class UpstreamFailedError(GatewayError):
    """The replica could not be reached, or broke off before its first byte, and retries are used up."""

    status = 502
    kind = "server_error"
    code = "replica_failed"


class UpstreamDeadlineError(GatewayError):
    """A deadline passed: connect, first byte, idle or total."""

    status = 504
    kind = "server_error"
    code = "deadline_exceeded"


class AuthenticationError(GatewayError):
    """No valid API key. Says the same for a missing, a wrong and a revoked one."""

    status = 401
    kind = "authentication_error"
    code = "invalid_api_key"

    def __init__(self) -> None:
        super().__init__("Send a valid API key as: Authorization: Bearer KEY.")


class TenantSuspendedError(GatewayError):
    status = 403
    kind = "permission_error"
    code = "tenant_suspended"


class RateLimitError(GatewayError):
    """A limit of the tenant is reached; `retry_after_s` says when the request fits."""

    status = 429
    kind = "rate_limit_error"
    code = "rate_limit_exceeded"


class BudgetExceededError(GatewayError):
    """The tenant's monthly budget is used up; waiting a minute does not help."""

    status = 429
    kind = "insufficient_quota"
    code = "insufficient_quota"


class LedgerFullError(GatewayError):
    """The ledger's database has been away for so long that no more requests can be written down."""

    status = 503
    kind = "server_error"
    code = "ledger_full"
