"""One structured line per request. It names ids, sizes and times, never prompt or answer text."""

from __future__ import annotations

import json
import logging

from octavo_gateway.exchange import Exchange

access = logging.getLogger("octavo.gateway.access")


class Fields(dict[str, object]):
    """Fields of one log record: a text formatter prints them as JSON, the JSON formatter nests them."""

    def __str__(self) -> str:
        return json.dumps(self, separators=(",", ":"))


class JsonFormatter(logging.Formatter):
    """One JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": self.formatTime(record),
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        if isinstance(record.msg, Fields):
            line |= record.msg
        else:
            line["message"] = record.getMessage()
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def log_exchange(exchange: Exchange, now: float) -> None:
    """Log an ended exchange; times in milliseconds."""
    if not access.isEnabledFor(logging.INFO):
        return
    fields = Fields(
        event="request",
        request_id=exchange.request_id,
        trace_id=exchange.trace.trace_id,
        method=exchange.method,
        path=exchange.path[:200],
        model=exchange.model,
        status=exchange.status,
        outcome=exchange.outcome,
        duration_ms=_ms(now - exchange.started_at),
        bytes=exchange.bytes_sent,
        stream=exchange.streaming,
    )
    if exchange.tenant:
        fields["tenant"] = exchange.tenant
        fields["key"] = exchange.key_name
    if exchange.endpoint:
        fields["replica"] = exchange.endpoint
        fields["route"] = exchange.route_reason
        fields["replica_wait_ms"] = _ms(exchange.upstream_wait_s)
    if exchange.held_s:
        fields["held_ms"] = _ms(exchange.held_s)
    if exchange.bytes_sent:
        fields["first_byte_ms"] = _ms(exchange.first_byte_at - exchange.started_at)
    if exchange.attempts > 1:
        fields["attempts"] = exchange.attempts
    access.info(fields)


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 2)
