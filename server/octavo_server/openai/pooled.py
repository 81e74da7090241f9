"""What the routes share that pool texts: embeddings, scores, ranks and classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, TypeVar

from msgspec import Meta, Struct
from starlette.requests import Request

from octavo_server.embedding import TextVector
from octavo_server.limits import LIMITS
from octavo_server.openai.refused_fields import HINTS
from octavo_server.openai.request_types import ModelName
from octavo_server.parsing import Refused, parse
from octavo_server.replica import Replica

Truncation = Annotated[int, Meta(ge=-1, le=LIMITS.max_tokens)] | None
REFUSED = {
    "priority": Refused("texts run in order of arrival, whatever their priority", off=("0",)),
    "use_activation": Refused("the checkpoint decides on it", off=("true",)),
}


class Usage(Struct, frozen=True):
    """Tokens of all texts."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int = 0


class PooledRequest(Struct, frozen=True, kw_only=True):
    """What every route takes."""

    model: ModelName | None = None
    truncate_prompt_tokens: Truncation = None


R = TypeVar("R", bound=PooledRequest)


async def read_request(
    http: Request,
    replica: Replica,
    kind: type[R],
    refused: Mapping[str, Refused],
    tasks: str | tuple[str, ...],
    route: str,
) -> tuple[R, str]:
    """The request, and the name of the model that answers it; raises a 400 or a 404."""
    served = replica.served
    parsed = parse(await http.body(), kind, refused, HINTS)
    replica.metrics.ignored_fields(len(parsed.unknown_fields))
    model = served.check_name(parsed.request.model)
    served.require_task(tasks, route)
    return parsed.request, model


def usage_of(vectors: Sequence[TextVector]) -> Usage:
    """What the texts took together."""
    total = sum(vector.num_tokens for vector in vectors)
    return Usage(total, total)
