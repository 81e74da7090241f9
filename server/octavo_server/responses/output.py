"""The output items of a response and the events that build them up."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from msgspec import UnsetType

from octavo_server.openai.response_types import ChatDelta, ToolCallDelta

JsonEvent = dict[str, Any]


class OutputBuilder:
    """Turns chat deltas into items: reasoning, message, function calls. `items` holds those that are complete."""

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self._open: _TextItem | None = None

    def push(self, delta: ChatDelta) -> Iterator[JsonEvent]:
        """Events of one delta, without their sequence numbers."""
        if not isinstance(delta.reasoning, UnsetType):
            yield from self._text("reasoning", delta.reasoning)
        if not isinstance(delta.content, UnsetType):
            yield from self._text("message", delta.content)
        if not isinstance(delta.tool_calls, UnsetType):
            yield from self._close()
            for call in delta.tool_calls:
                yield from self._call(call)

    def finish(self, status: str = "completed") -> Iterator[JsonEvent]:
        """Close what is open; an answer without anything becomes an empty message."""
        if not self.items and self._open is None:
            yield from self._text("message", "")
        yield from self._close(status)

    def _text(self, kind: str, text: str) -> Iterator[JsonEvent]:
        if self._open is not None and self._open.kind != kind:
            yield from self._close()
        if self._open is None:
            self._open = _TextItem(kind, len(self.items))
            yield from self._open.opening()
        if text:
            yield self._open.add(text)

    def _close(self, status: str = "completed") -> Iterator[JsonEvent]:
        if self._open is not None:
            item, self._open = self._open, None
            self.items.append(item.complete(status))
            yield from item.closing(status)

    def _call(self, call: ToolCallDelta) -> Iterator[JsonEvent]:
        index, arguments = len(self.items), call.function.arguments or ""
        item = {
            "type": "function_call",
            "id": f"fc_{uuid.uuid4().hex}",
            "call_id": call.id,
            "name": call.function.name,
            "arguments": arguments,
            "status": "completed",
        }
        started = {**item, "arguments": "", "status": "in_progress"}
        where = {"output_index": index, "item_id": item["id"]}
        self.items.append(item)
        yield {"type": "response.output_item.added", "output_index": index, "item": started}
        yield {"type": "response.function_call_arguments.delta", **where, "delta": arguments}
        yield {
            "type": "response.function_call_arguments.done", **where, "arguments": arguments,
            "name": call.function.name,
        }  # fmt: skip
        yield {"type": "response.output_item.done", "output_index": index, "item": item}


class _TextItem:
    """A message or a chain of thought while it grows."""

    def __init__(self, kind: str, index: int) -> None:
        self.kind = kind
        self._id = f"{'msg' if kind == 'message' else 'rs'}_{uuid.uuid4().hex}"
        self._where: Mapping[str, Any] = {"item_id": self._id, "output_index": index, "content_index": 0}
        self._index = index
        self._parts: list[str] = []
        self._event = "response.output_text" if kind == "message" else "response.reasoning_text"

    def opening(self) -> Iterator[JsonEvent]:
        item = {**self._item("in_progress"), "content": []}
        yield {"type": "response.output_item.added", "output_index": self._index, "item": item}
        yield {"type": "response.content_part.added", **self._where, "part": self._part("")}

    def add(self, text: str) -> JsonEvent:
        self._parts.append(text)
        event = {"type": f"{self._event}.delta", **self._where, "delta": text}
        return {**event, "logprobs": []} if self.kind == "message" else event

    def complete(self, status: str) -> dict[str, Any]:
        return {**self._item(status), "content": [self._part("".join(self._parts))]}

    def closing(self, status: str) -> Iterator[JsonEvent]:
        text = "".join(self._parts)
        done = {"type": f"{self._event}.done", **self._where, "text": text}
        yield {**done, "logprobs": []} if self.kind == "message" else done
        yield {"type": "response.content_part.done", **self._where, "part": self._part(text)}
        yield {"type": "response.output_item.done", "output_index": self._index, "item": self.complete(status)}

    def _item(self, status: str) -> dict[str, Any]:
        if self.kind == "message":
            return {"type": "message", "id": self._id, "role": "assistant", "status": status}
        return {"type": "reasoning", "id": self._id, "summary": [], "status": status}

    def _part(self, text: str) -> dict[str, Any]:
        if self.kind == "message":
            return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
        return {"type": "reasoning_text", "text": text}
