"""Tokenizers built from the `tokenizer.ggml.*` metadata of GGUF files."""

from __future__ import annotations

import enum
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as RustTokenizer

from octavo_engine.errors import ModelLoadError
from octavo_engine.tokenizer.chat_template import ChatTemplates
from octavo_engine.tokenizer.fast import FastTokenizer, SpecialTokens, add_bos_and_eos, built
from octavo_engine.tokenizer.pre_tokenizers import BEGINS_WITH_BOS, TAKES_WHOLE_WORDS, pre_tokenizer

_log = logging.getLogger(__name__)
SPACE = "▁"
END_OF_TURN_TEXTS = frozenset(
    (
        "<|eot_id|>",
        "<|eom_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<end_of_turn>",
        "<EOT>",
        "<｜end▁of▁sentence｜>",
        "</s>",
    )
)
TEMPLATE_KEY = "tokenizer.chat_template"


class TokenType(enum.IntEnum):
    """`tokenizer.ggml.token_type`, as llama.cpp numbers them."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Vocabulary:
    """The metadata's vocabulary, checked: raises `ModelLoadError` naming the key that is missing or wrong."""

    def __init__(self, metadata: Mapping[str, Any], path: Path) -> None:
        self._metadata = metadata
        self.path = path
        self.model = self._value("model", str, None)
        self.pre = self._value("pre", str, "default")
        self.tokens: list[str] = self._items("tokens", str, required=True)
        self.types: list[int] = self._items("token_type", int)
        self.scores: list[float] = self._items("scores", float)
        self.merges: list[str] = self._items("merges", str)
        self.ids = {token: index for index, token in enumerate(self.tokens)}
        if len(self.ids) != len(self.tokens):
            raise self.error("tokens", "holds the same token twice")
        for name, items in (("token_type", self.types), ("scores", self.scores)):
            if items and len(items) != len(self.tokens):
                raise self.error(name, f"has {len(items)} entries for {len(self.tokens)} tokens")

    def error(self, name: str, problem: str) -> ModelLoadError:
        return ModelLoadError(f"{self.path}: tokenizer.ggml.{name} {problem}")

    def flag(self, name: str, default: bool) -> bool:
        value: bool = self._value(name, bool, default)
        return value

    def token_id(self, name: str) -> int | None:
        token_id = self._value(name, int, -1)
        if token_id >= len(self.tokens):
            raise self.error(name, f"is {token_id}, beyond the {len(self.tokens)} tokens")
        return token_id if token_id >= 0 else None

    def token(self, name: str) -> str | None:
        token_id = self.token_id(name)
        return self.tokens[token_id] if token_id is not None else None

    def of_type(self, *kinds: TokenType) -> list[str]:
        return [token for token, kind in zip(self.tokens, self.types, strict=False) if kind in kinds and token]

    def _value(self, name: str, kind: type[Any], default: Any) -> Any:
        value = self._metadata.get(f"tokenizer.ggml.{name}", default)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.error(name, "is missing" if value is None else f"must be {kind.__name__}, got {value!r:.80}")
        return value

    def _items(self, name: str, kind: type[Any], *, required: bool = False) -> list[Any]:
        value = self._metadata.get(f"tokenizer.ggml.{name}", [])
        if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
            raise self.error(name, f"must be a list of {kind.__name__}")
        if required and not value:
            raise self.error(name, "is missing: the file carries no tokenizer")
        return value


def tokenizer_from_metadata(metadata: Mapping[str, Any], path: Path) -> FastTokenizer:
    """Build the tokenizer a GGUF file describes; raises `ModelLoadError`. `path` is for messages."""
    vocabulary = Vocabulary(metadata, path)
    builders = {"gpt2": _byte_level_bpe, "llama": _sentencepiece_bpe}
    if vocabulary.model not in builders:
        raise vocabulary.error("model", f"{vocabulary.model!r} is not supported; supported: {', '.join(builders)}")
    tokenizer = built(str(path), lambda: builders[vocabulary.model](vocabulary))
    _add_special_tokens(tokenizer, vocabulary)
    _add_bos_and_eos(tokenizer, vocabulary)
    return FastTokenizer(tokenizer, _special_tokens(vocabulary), _templates(metadata))


def _byte_level_bpe(vocabulary: Vocabulary) -> RustTokenizer:
    merges = [_pair(merge, vocabulary) for merge in vocabulary.merges]
    if vocabulary.pre == "default":
        _log.warning(
            "%s names no pre-tokenizer (tokenizer.ggml.pre): text is cut in llama.cpp's default way, "
            "which may not be the model's own",
            vocabulary.path,
        )
    model = models.BPE(vocab=vocabulary.ids, merges=merges, ignore_merges=vocabulary.pre in TAKES_WHOLE_WORDS)
    tokenizer = RustTokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer(vocabulary.pre)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _pair(merge: str, vocabulary: Vocabulary) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    if not left or not right:
        raise vocabulary.error("merges", f"holds {merge!r:.80}, which is no pair")
    return left, right


def _sentencepiece_bpe(vocabulary: Vocabulary) -> RustTokenizer:
    """SentencePiece BPE: the file has scores, not merges; a better score merges first."""
    if len(vocabulary.scores) != len(vocabulary.tokens):
        raise vocabulary.error("scores", "is missing")
    unknown = vocabulary.token("unknown_token_id")
    model = models.BPE(
        vocab=vocabulary.ids, merges=_merges(vocabulary), unk_token=unknown, fuse_unk=True, byte_fallback=True
    )
    tokenizer = RustTokenizer(model)
    prefixed = vocabulary.flag("add_space_prefix", True)
    steps: list[Any] = [normalizers.Prepend(SPACE)] if prefixed else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    decoding: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*decoding, decoders.Strip(" ", 1, 0)] if prefixed else decoding)
    return tokenizer


def _merges(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Every way to make a token of two others, best token first; of one token's ways, earlier parts first."""
    ids = vocabulary.ids
    mergeable = {TokenType.NORMAL, TokenType.USER_DEFINED, TokenType.UNUSED}
    types = vocabulary.types or [TokenType.NORMAL] * len(vocabulary.tokens)
    order = sorted(range(len(vocabulary.tokens)), key=lambda index: (-vocabulary.scores[index], index))
    merges: list[tuple[str, str]] = []
    for index in order:
        token = vocabulary.tokens[index]
        if types[index] in mergeable:
            ways = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
            possible = [way for way in ways if way[0] in ids and way[1] in ids]
            merges += sorted(possible, key=lambda way: (ids[way[0]], ids[way[1]]))
    return merges


def _add_special_tokens(tokenizer: RustTokenizer, vocabulary: Vocabulary) -> None:
    """Control tokens are special; user-defined ones are kept whole but remain text."""
    roles = ("bos_token_id", "eos_token_id", "eot_token_id", "padding_token_id")
    named = [token for role in roles if (token := vocabulary.token(role)) is not None]
    control = dict.fromkeys([*vocabulary.of_type(TokenType.CONTROL, TokenType.UNKNOWN), *named])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    whole = [token for token in vocabulary.of_type(TokenType.USER_DEFINED) if token not in control]
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in whole])


def _add_bos_and_eos(tokenizer: RustTokenizer, vocabulary: Vocabulary) -> None:
    bos_by_default = vocabulary.model == "llama" or vocabulary.pre in BEGINS_WITH_BOS
    bos = vocabulary.token("bos_token_id") if vocabulary.flag("add_bos_token", bos_by_default) else None
    eos = vocabulary.token("eos_token_id") if vocabulary.flag("add_eos_token", False) else None
    if bos is not None or eos is not None:
        add_bos_and_eos(tokenizer, bos, eos)


def _special_tokens(vocabulary: Vocabulary) -> SpecialTokens:
    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    texts = {role: vocabulary.token(f"{name}_token_id") for role, name in roles.items()}
    ending = [vocabulary.token_id(f"{name}_token_id") for name in ("eos", "eot", "eom")]
    control = set(vocabulary.of_type(TokenType.CONTROL))
    ending += [vocabulary.ids[text] for text in END_OF_TURN_TEXTS & control]
    return SpecialTokens(
        bos_id=vocabulary.token_id("bos_token_id"),
        eos_ids=frozenset(token_id for token_id in ending if token_id is not None),
        named={role: text for role, text in texts.items() if text is not None},
    )


def _templates(metadata: Mapping[str, Any]) -> ChatTemplates:
    named: dict[str, str] = {}
    for key, value in metadata.items():
        if isinstance(value, str) and (key == TEMPLATE_KEY or key.startswith(f"{TEMPLATE_KEY}.")):
            named[key.removeprefix(TEMPLATE_KEY).removeprefix(".") or "default"] = value
    return ChatTemplates(named)
