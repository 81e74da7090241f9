"""Turn a request's body into a typed struct, or into one 400 that names the field."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

import msgspec

from octavo_server.errors import ApiError, bad_request
from octavo_server.limits import LIMITS

T = TypeVar("T", bound=msgspec.Struct)

_LOCATED = re.compile(r"(?P<what>.*) - at `(?:key in )?\$\.?(?P<path>.*)`", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(?P<field>[^`]+)`")


class Refused(msgspec.Struct, frozen=True):
    """Why a field is not honoured. `off`: JSON texts beside null that ask for nothing and are let pass."""

    reason: str
    off: tuple[str, ...] = ("false", "[]", "{}", '""')


class Parsed(msgspec.Struct, Generic[T], frozen=True):
    """A request and the names of the fields this server does not know (ignored, as OpenAI and vLLM do)."""

    request: T
    unknown_fields: tuple[str, ...]


def parse(
    body: bytes, kind: type[T], refused: Mapping[str, Refused] | None = None, hints: frozenset[str] = frozenset()
) -> Parsed[T]:
    """Decode `body` as `kind`; raises a 400 for malformed JSON, wrong types and values out of bounds.

    `refused` names fields that are understood but not honoured: anything but "off" there is a 400, because ignoring
    it would change what the caller gets. `hints` are fields that never change it.
    """
    raw = _decode_object(body)
    for name, refusal in (refused or {}).items():
        value = raw.get(name)
        if value is not None and bytes(value).strip().decode() not in ("null", *refusal.off):
            raise bad_request(f"{name}: {refusal.reason}", name)
    try:
        request = _decoder(kind).decode(body)
    except msgspec.ValidationError as error:
        raise from_validation_error(error) from None
    known = _field_names(kind) | hints | (refused or {}).keys()
    return Parsed(request, tuple(name for name in raw if name not in known))


def json_object(body: bytes) -> dict[str, Any]:
    """The body as a plain object, for routes whose keys are not known beforehand; an empty body is an empty object."""
    if not body.strip():
        return {}
    _check_text(body)
    try:
        value = msgspec.json.decode(body)
    except msgspec.DecodeError as error:
        raise bad_request(f"The body is not valid JSON: {str(error)[:200]}") from None
    if not isinstance(value, dict) or len(value) > LIMITS.metadata_entries:
        raise bad_request(f"The body must be a JSON object of at most {LIMITS.metadata_entries} entries.")
    return value


def from_validation_error(error: msgspec.ValidationError) -> ApiError:
    """One finding with its field path as the caller wrote it."""
    located = _LOCATED.fullmatch(str(error))
    what, path = (located["what"], located["path"]) if located else (str(error), "")
    missing = _MISSING.fullmatch(what)
    if missing:
        path = f"{path}.{missing['field']}" if path else missing["field"]
        what = "missing; this field is required"
    path = path[:200]
    what = what[:1].lower() + what[1:]
    return bad_request(f"{path}: {what}" if path else f"The body is not a valid request: {what}", path or None)


def _decode_object(body: bytes) -> dict[str, msgspec.Raw]:
    if not body.strip():
        raise bad_request("The body is empty; send a JSON object.")
    _check_text(body)
    try:
        return _RAW_OBJECT.decode(body)
    except msgspec.ValidationError:
        raise bad_request("The body must be a JSON object.") from None
    except msgspec.DecodeError as error:
        raise bad_request(f"The body is not valid JSON: {str(error)[:200]}") from None


def _check_text(body: bytes) -> None:
    """What the decoder must be spared: it finds bad UTF-8 only in the parts it reads, and recurses into depth."""
    try:
        body.decode()
    except UnicodeDecodeError:
        raise bad_request("The body is not valid UTF-8.") from None
    if _depth_exceeds(body, LIMITS.json_depth):
        raise bad_request(f"The body nests deeper than {LIMITS.json_depth} levels.")


def _depth_exceeds(body: bytes, limit: int) -> bool:
    """Whether brackets outside strings nest deeper than `limit`; a cheap count first spares almost every body."""
    if body.count(b"{") + body.count(b"[") <= limit:
        return False
    depth = 0
    for token in _STRUCTURE.finditer(body):
        first = token[0][0]
        if first in b"{[":
            depth += 1
            if depth > limit:
                return True
        elif first in b"}]":
            depth -= 1
    return False


_STRUCTURE = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)
_RAW_OBJECT = msgspec.json.Decoder(dict[str, msgspec.Raw])


@functools.cache
def _decoder(kind: type[T]) -> msgspec.json.Decoder[T]:
    return msgspec.json.Decoder(kind)


@functools.cache
def _field_names(kind: type[msgspec.Struct]) -> frozenset[str]:
    return frozenset(kind.__struct_encode_fields__)
