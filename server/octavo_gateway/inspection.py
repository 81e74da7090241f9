"""Reads from a request body the few fields routing needs; the body itself goes to the replica untouched."""

from __future__ import annotations

import enum
from dataclasses import dataclass

import msgspec

from octavo_gateway.errors import BadRequestError
from octavo_gateway.routing import chain_hashes

MAX_MODEL_NAME_CHARS = 512
BYTES_PER_TOKEN = 4
DEFAULT_MAX_TOKENS = 256
MAX_COST_TOKENS = 1_000_000


class Api(enum.Enum):
    """What kind of work a path asks for."""

    GENERATE = "generate"  # prompts in, tokens out, may stream
    POOL = "pool"  # one forward pass: embeddings, scores
    TOKENIZE = "tokenize"  # no model work at all


APIS: dict[str, Api] = {
    "/v1/chat/completions": Api.GENERATE,
    "/v1/completions": Api.GENERATE,
    "/v1/responses": Api.GENERATE,
    "/v1/messages": Api.GENERATE,
    "/v1/embeddings": Api.POOL,
    "/v1/rerank": Api.POOL,
    "/v2/rerank": Api.POOL,
    "/rerank": Api.POOL,
    "/v1/score": Api.POOL,
    "/score": Api.POOL,
    "/classify": Api.POOL,
    "/pooling": Api.POOL,
    "/tokenize": Api.TOKENIZE,
    "/detokenize": Api.TOKENIZE,
}
"""Paths whose JSON body names the model."""


class _Body(msgspec.Struct):
    """Known fields are decoded, `Raw` ones only delimited, all others skipped."""

    model: str | None = None
    stream: bool | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    max_output_tokens: int | None = None
    priority: int | None = None
    n: int | None = None
    return_token_ids: bool | None = None
    messages: msgspec.Raw = msgspec.Raw()
    prompt: msgspec.Raw = msgspec.Raw()
    input: msgspec.Raw = msgspec.Raw()
    tools: msgspec.Raw = msgspec.Raw()
    system: msgspec.Raw = msgspec.Raw()


_DECODER = msgspec.json.Decoder(_Body)


@dataclass(frozen=True, slots=True)
class Inspection:
    """What the gateway knows of a request. `prompt` is a view of the body's bytes; it is hashed, never logged."""

    model: str
    stream: bool
    prompt: memoryview
    context: bytes  # what precedes the prompt in the model's input: tools, system text
    prompt_tokens: int  # estimated
    output_tokens: int  # asked for, else a default
    shows_tokens: bool  # the client wants token ids in its stream
    priority: int | None  # asked for; lower is earlier, as in vLLM

    @property
    def cost(self) -> float:
        """Estimated tokens of work, for fair queueing."""
        return float(min(max(1, self.prompt_tokens + self.output_tokens), MAX_COST_TOKENS))

    def prefix(self, model: str, adapter: str | None, salt: str) -> tuple[int, ...]:
        """Chained block hashes of the prompt, seeded by everything that keeps two equal texts from sharing a cache."""
        seed = b"\0".join((model.encode(), (adapter or "").encode(), salt.encode(), self.context))
        return chain_hashes(self.prompt, seed)


def inspect_body(body: bytes, api: Api = Api.GENERATE) -> Inspection:
    """Parse a JSON body as far as needed; raises `BadRequestError` naming the field."""
    try:
        fields = _DECODER.decode(body)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$.")
        field = path.rstrip("`") or None
        raise BadRequestError(f"{field or 'body'}: {message}.", param=field) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise BadRequestError("The body is no valid JSON object.") from None
    if not fields.model:
        raise BadRequestError("model: name the model to use; GET /v1/models lists them.", param="model")
    if len(fields.model) > MAX_MODEL_NAME_CHARS:
        raise BadRequestError(f"model: must have at most {MAX_MODEL_NAME_CHARS} characters.", param="model")
    prompt = next((raw for raw in (fields.messages, fields.prompt, fields.input) if raw), b"")
    asked = fields.max_completion_tokens or fields.max_tokens or fields.max_output_tokens or DEFAULT_MAX_TOKENS
    view = memoryview(prompt)
    return Inspection(
        model=fields.model,
        stream=bool(fields.stream),
        prompt=view,
        context=bytes(fields.tools) + b"\0" + bytes(fields.system) if fields.tools or fields.system else b"",
        prompt_tokens=len(view) // BYTES_PER_TOKEN,
        output_tokens=max(1, asked) * max(1, fields.n or 1) if api is Api.GENERATE else 0,
        shows_tokens=bool(fields.return_token_ids),
        priority=fields.priority,
    )
