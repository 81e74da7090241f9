"""A tokenizer on top of the `tokenizers` library."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tokenizers import Tokenizer as RustTokenizer
from tokenizers.processors import TemplateProcessing

from octavo_engine.errors import InvalidRequestError, ModelLoadError
from octavo_engine.tokenizer.chat_template import ChatTemplates
from octavo_engine.tokenizer.pieces import PieceTable

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """The roles some tokens play. `named` maps template variables (`bos_token`, ...) to their text."""

    bos_id: int | None
    eos_ids: frozenset[int]
    named: Mapping[str, str]


class FastTokenizer:
    """Implements `Tokenizer`. The wrapped tokenizer is never changed after loading, so threads may share it."""

    def __init__(self, tokenizer: RustTokenizer, special: SpecialTokens, templates: ChatTemplates) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._special = special
        self._templates = templates
        self._pieces = PieceTable(tokenizer)
        added = tokenizer.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._vocab_size = tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def vocab_size(self) -> int:
        """Number of tokens with text; the model's logits may be padded to more."""
        return self._vocab_size

    @property
    def bos_token_id(self) -> int | None:
        """The id that begins a text, if the model has one."""
        return self._special.bos_id

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Every id that ends a generation (eos, end-of-turn)."""
        return self._special.eos_ids

    @property
    def special_token_ids(self) -> frozenset[int]:
        """Ids that `skip_special_tokens` leaves out."""
        return self._special_ids

    @property
    def chat_template(self) -> str | None:
        """The model's own Jinja template for chats without tools."""
        return self._templates.default

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; raises `InvalidRequestError` for text that is not valid Unicode."""
        try:
            encoding = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        except TypeError as error:
            raise InvalidRequestError("prompt: the text holds half of a surrogate pair, no valid Unicode") from error
        ids: list[int] = encoding.ids
        return ids

    def encode_pair(self, first: str, second: str, *, max_length: int = 0) -> tuple[list[int], int]:
        """Both texts as the model joins pairs, and where the tokens of type 1 start (0: nowhere)."""
        try:
            left, right = (self._tokenizer.encode(text, add_special_tokens=False) for text in (first, second))
        except TypeError as error:
            raise InvalidRequestError("a text holds half of a surrogate pair, no valid Unicode") from error
        if max_length:
            room = max_length - len(left) - self._tokenizer.num_special_tokens_to_add(is_pair=True)
            right.truncate(max(0, min(room, len(right))))
        joined = self._tokenizer.post_process(left, right, add_special_tokens=True)
        ids: list[int] = joined.ids
        return ids, joined.type_ids.index(1) if 1 in joined.type_ids else 0

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of the tokens; bytes that are no valid UTF-8 come as U+FFFD."""
        skipped = self._special_ids if skip_special_tokens else frozenset()
        text = b"".join([self._pieces[token_id] for token_id in token_ids if token_id not in skipped])
        if self._pieces.drops_leading_space:
            text = text.removeprefix(b" ")
        return text.decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token adds to a text."""
        return self._pieces[token_id]

    def token_text(self, token_id: int) -> str:
        """The token as shown in logprobs; bytes that are no valid UTF-8 alone come as `bytes:\\xNN`."""
        piece = self._pieces[token_id]
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json`, `tokenizer_config.json`, `generation_config.json` and the chat template."""
        self._tokenizer.save(str(folder / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self._special.named}
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
        generation = {"bos_token_id": self._special.bos_id, "eos_token_id": sorted(self._special.eos_ids)}
        (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
        if self._templates.default is not None:
            (folder / "chat_template.jinja").write_text(self._templates.default)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """Render messages with the model's own Jinja template in a sandbox.

        Raises `InvalidRequestError` when the template refuses the messages or the model has none.
        """
        return self._templates.render(
            messages,
            tools=tools,
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables={**self._special.named, **(template_kwargs or {})},
        )


def built(what: str, build: Callable[[], T]) -> T:
    """Run a constructor of the `tokenizers` library on a stranger's data; raises `ModelLoadError`.

    The library raises bare `Exception`, and a `PanicException` outside that hierarchy when its Rust code panics.
    """
    try:
        return build()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise ModelLoadError(f"{what}: not a usable tokenizer: {str(error)[:500]}") from error


def add_bos_and_eos(tokenizer: RustTokenizer, bos: str | None, eos: str | None) -> None:
    """Make `encode(add_special_tokens=True)` put these tokens of the vocabulary around a text, and no others."""
    around = [text for text in (bos, eos) if text is not None]
    template = [*([f"{bos}:0"] if bos is not None else []), "$A:0", *([f"{eos}:0"] if eos is not None else [])]
    special = [(text, tokenizer.token_to_id(text)) for text in dict.fromkeys(around)]
    tokenizer.post_processor = TemplateProcessing(single=template, pair=None, special_tokens=special)
