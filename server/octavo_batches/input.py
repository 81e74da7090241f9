"""The input of a batch: checked as a whole before anything runs, then read line by line."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO, NamedTuple

from octavo_batches.lines import BatchFileError, BatchRequest, read_request
from octavo_batches.records import LineError

_SHOWN_ERRORS = 20


class Line(NamedTuple):
    """Where a request is in its file."""

    custom_id: str
    offset: int
    length: int


def read_input(path: Path, endpoint: str, max_lines: int) -> tuple[list[Line], list[LineError]]:
    """Every request of a file, or what is wrong with it; not the requests themselves, which may be large."""
    lines: list[Line] = []
    errors: list[LineError] = []
    seen: set[str] = set()
    offset = 0
    with path.open("rb") as source:
        for number, raw in enumerate(source, start=1):
            place, offset = offset, offset + len(raw)
            if not raw.strip():
                continue
            if len(lines) >= max_lines:
                return [], [LineError("too_many_lines", f"at most {max_lines} requests", number)]
            try:
                request = _check(raw, endpoint, seen)
            except BatchFileError as error:
                name, _, _ = str(error).partition(": ")
                errors.append(LineError("invalid_line", str(error), number, name if name.isidentifier() else None))
                if len(errors) >= _SHOWN_ERRORS:
                    break
                continue
            seen.add(request.custom_id)
            lines.append(Line(request.custom_id, place, len(raw)))
    if not lines and not errors:
        errors.append(LineError("empty_file", "the file holds no request"))
    return lines, errors


def read_line(source: BinaryIO, line: Line) -> BatchRequest:
    """A request that `read_input` has found in this file."""
    source.seek(line.offset)
    return read_request(source.read(line.length).decode(errors="replace"))


def _check(raw: bytes, endpoint: str, seen: set[str]) -> BatchRequest:
    request = read_request(raw.decode(errors="replace"))
    if request.url != endpoint:
        raise BatchFileError(f"url: must be the batch's endpoint {endpoint}, got {request.url}")
    if request.custom_id in seen:
        raise BatchFileError(f"custom_id: {request.custom_id[:64]!r} is used twice")
    return request
