"""What the faces know of the model once it is loaded: its names, its tokenizer and how long prompts may be."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from octavo_engine.messages import ModelInfo
from octavo_engine.tokenizer.interface import Tokenizer
from octavo_server.errors import ApiError, bad_request
from octavo_server.generation_config import SamplingDefaults
from octavo_server.limits import LIMITS
from octavo_server.parsers.choose import ToolParserFactory


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The loaded model as callers see it. `names[0]` is the one that metrics and responses carry.

    `speaks_harmony`: answers come in the channels of gpt-oss. `adapters` gives the names of the adapters that are
    loaded at the moment; each is a model of its own to callers.
    """

    info: ModelInfo
    tokenizer: Tokenizer
    names: tuple[str, ...]
    chat_template: str | None = None
    sampling_defaults: SamplingDefaults = field(default_factory=SamplingDefaults)
    tool_parser: ToolParserFactory | None = None
    thinks: bool = False
    speaks_harmony: bool = False
    adapters: Callable[[], Sequence[str]] = tuple
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def fingerprint(self) -> str:
        """Changes when another checkpoint, precision or backend answers."""
        info = self.info
        identity = f"{info.path}|{info.architecture}|{info.dtype}|{info.quantization}|{info.device}|{info.backend}"
        return f"fp_{hashlib.sha256(identity.encode()).hexdigest()[:10]}"

    def check_name(self, requested: str | None) -> str:
        """The name to answer with; raises a 404 for a model that is not served here. None means the base model."""
        if requested is None or requested in self.names:
            return requested or self.name
        adapters = self.adapters()
        if requested in adapters:
            return requested
        available = ", ".join([*self.names, *adapters][: LIMITS.listed_names])
        raise ApiError(
            404,
            f"model: {requested[: LIMITS.identifier_chars]!r} is not served here; available: {available}",
            param="model",
            reason="unknown_model",
        )

    def adapter_of(self, name: str) -> str:
        """The adapter that a checked name stands for; empty for the base model."""
        return "" if name in self.names else name

    def require_task(self, task: str | tuple[str, ...], route: str) -> None:
        """Raise a 400 when this model cannot do what the route is for: one of these tasks."""
        tasks = (task,) if isinstance(task, str) else task
        if self.info.task not in tasks:
            wanted = " or ".join(repr(name) for name in tasks)
            raise bad_request(f"{route} needs a model for {wanted}; {self.name} is one for {self.info.task!r}", "model")

    def check_characters(self, text: str, param: str) -> None:
        """Refuse, before tokenizing, a text that cannot fit however well it compresses."""
        most = self.info.max_model_len * LIMITS.characters_per_token
        if len(text) > most:
            raise bad_request(
                f"{param}: {len(text)} characters cannot fit into this model's context of "
                f"{self.info.max_model_len} tokens",
                param,
            )

    def token_budget(self, num_prompt_tokens: int, max_tokens: int | None, *, prompt_param: str, max_param: str) -> int:
        """How many tokens may be generated; raises a 400 that names what does not fit the context."""
        context = self.info.max_model_len
        if num_prompt_tokens == 0:
            raise bad_request(f"{prompt_param}: holds no token", prompt_param)
        if num_prompt_tokens >= context:
            raise bad_request(
                f"{prompt_param}: {num_prompt_tokens} tokens leave no room in this model's context of {context} "
                "tokens; shorten it",
                prompt_param,
            )
        room = context - num_prompt_tokens
        if max_tokens is None:
            return room
        if max_tokens > room:
            raise bad_request(
                f"{max_param}: {num_prompt_tokens} prompt tokens and {max_tokens} new ones exceed this model's context "
                f"of {context} tokens; ask for at most {room}",
                max_param,
            )
        return max_tokens
