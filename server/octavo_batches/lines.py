"""The lines of batch files: requests on the way in, results on the way out."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/score", "/v1/rerank")
_MAX_CUSTOM_ID_CHARS = 512


class BatchFileError(Exception):
    """A line is no batch request or result; the message says which and why."""


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """One line of the input."""

    custom_id: str
    url: str
    body: dict[str, Any]


def read_request(line: str) -> BatchRequest:
    """One line, as a request that does not stream; raises `BatchFileError`."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BatchFileError(f"is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise BatchFileError("must be a JSON object")
    custom_id, url, body = value.get("custom_id"), value.get("url"), value.get("body")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= _MAX_CUSTOM_ID_CHARS:
        raise BatchFileError(f"custom_id: must be a string of 1 to {_MAX_CUSTOM_ID_CHARS} characters")
    if value.get("method", "POST") != "POST":
        raise BatchFileError("method: must be POST")
    if url not in ROUTES:
        raise BatchFileError(f"url: must be one of {', '.join(ROUTES)}, got {str(url)[:100]!r}")
    if not isinstance(body, dict):
        raise BatchFileError("body: must be a JSON object")
    return BatchRequest(custom_id, url, {k: v for k, v in body.items() if k not in ("stream", "stream_options")})


def result(request: BatchRequest, status: int, body: str, request_id: str) -> dict[str, Any]:
    """The line that answers a request. status 0: no answer came, and `body` says why."""
    try:
        content: Any = json.loads(body)
    except ValueError:
        content = None
    failed = status != 200 or content is None
    answered = None if status == 0 else {"status_code": status, "request_id": request_id, "body": content}
    return {
        "id": f"batch_req_{uuid.uuid4().hex}",
        "custom_id": request.custom_id,
        "response": answered,
        "error": {"code": str(status), "message": _message(content, body)} if failed else None,
    }


def finished_ids(path: Path, *, retry_failed: bool = False) -> set[str]:
    """Ids whose results a file holds; raises `BatchFileError`. A line cut short by a crash is dropped from the file."""
    if not path.exists():
        return set()
    text = path.read_text(encoding="utf-8", errors="replace")
    complete, _, cut = text.rpartition("\n")
    done: set[str] = set()
    kept: list[str] = []
    lines = complete.split("\n") if complete else []
    for number, line in enumerate(lines, start=1):
        try:
            recorded = json.loads(line)
            failed = recorded["error"] is not None
            custom_id = str(recorded["custom_id"])
        except (ValueError, KeyError, TypeError) as error:
            raise BatchFileError(f"{path}, line {number}: is no batch result; name another output file") from error
        if failed and retry_failed:
            continue
        done.add(custom_id)
        kept.append(line)
    if cut or len(kept) != len(lines):
        path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    return done


def _message(content: Any, body: str) -> str:
    """What went wrong, in the words of the endpoint."""
    error = content.get("error") if isinstance(content, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    return str(message) if message else body[:500] or "the answer was empty"
