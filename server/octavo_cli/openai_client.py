"""A small streaming client for any OpenAI-compatible endpoint, as the terminal commands need it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

import aiohttp

CONNECT_TIMEOUT_S = 10.0
IDLE_TIMEOUT_S = 600.0


class EndpointError(Exception):
    """The endpoint refused, broke off or stayed silent; the message is fit for a user. `status` 0: no answer at all."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


def open_session(api_key: str | None, idle_timeout_s: float = IDLE_TIMEOUT_S) -> aiohttp.ClientSession:
    """A session without a limit on connections; the key travels as a bearer token."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=idle_timeout_s),
        headers={"authorization": f"Bearer {api_key}"} if api_key else None,
        read_bufsize=2**20,
    )


async def list_models(http: aiohttp.ClientSession, base_url: str) -> list[str]:
    """Names under `GET /v1/models`; raises `EndpointError`."""
    try:
        async with http.get(f"{base_url}/v1/models") as response:
            text = await response.text()
            if response.status != 200:
                raise EndpointError(f"{base_url} answered {response.status}: {error_message(text)}", response.status)
            return [str(model["id"]) for model in json.loads(text)["data"]]
    except (aiohttp.ClientError, TimeoutError) as error:
        raise EndpointError(f"cannot reach {base_url}: {error or type(error).__name__}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise EndpointError(f"{base_url} does not speak the OpenAI API: /v1/models holds no list") from error


async def stream_events(
    http: aiohttp.ClientSession, url: str, body: Mapping[str, Any]
) -> AsyncIterator[dict[str, Any]]:
    """POST `body` and yield the JSON of each event; raises `EndpointError`."""
    try:
        async with http.post(url, json=body) as response:
            if response.status != 200:
                text = await response.text()
                raise EndpointError(f"{response.status}: {error_message(text)}", response.status)
            async for line in response.content:
                if not line.startswith(b"data:"):
                    continue
                data = line[5:].strip()
                if data == b"[DONE]":
                    return
                event: dict[str, Any] = json.loads(data)
                if "error" in event:
                    raise EndpointError(error_message(data.decode()), response.status)
                yield event
    except (aiohttp.ClientError, TimeoutError) as error:
        raise EndpointError(f"the connection failed: {error or type(error).__name__}") from error
    except ValueError as error:
        raise EndpointError("the endpoint sent an event that is no JSON") from error


def error_message(body: str) -> str:
    """The message of an OpenAI error body, or the body's beginning when it is none."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:300] or "an empty body"
