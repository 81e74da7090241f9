"""The bytes each token stands for, so that text can be put together from tokens one by one.

A `tokenizers` decoder works on whole sequences; the models we serve decode token by token, which its parts tell:
byte-level BPE (GPT-2 family), SentencePiece spellings with byte fallback (Llama 2, Gemma), WordPiece (BERT).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer as RustTokenizer

from octavo_engine.errors import ModelLoadError

TOKEN_WISE = frozenset(("ByteLevel", "ByteFallback", "Fuse", "Strip", "Metaspace", "WordPiece"))
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in character of every byte: visible Latin-1 stands for itself, the rest moves up."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in set(visible)]
    alphabet = {chr(byte): byte for byte in visible}
    return alphabet | {chr(256 + index): byte for index, byte in enumerate(hidden)}


class PieceTable:
    """Bytes of tokens as the tokenizer's decoder spells them; filled as tokens occur."""

    def __init__(self, tokenizer: RustTokenizer) -> None:
        steps = _decoder_steps(tokenizer)
        kinds = {step["type"] for step in steps}
        self._tokenizer = tokenizer
        self._bytes: dict[int, bytes] = {}
        self._alphabet = byte_alphabet() if "ByteLevel" in kinds else None
        self._byte_fallback = "ByteFallback" in kinds
        self._replacements = [_replacement(step) for step in steps if step["type"] in ("Replace", "Metaspace")]
        self._word_pieces = next((step["prefix"] for step in steps if step["type"] == "WordPiece"), None)
        self._separate_words = not steps
        self.drops_leading_space = (
            self._separate_words or self._word_pieces is not None or any(_drops_leading_space(step) for step in steps)
        )

    def __getitem__(self, token_id: int) -> bytes:
        """The token's bytes; empty for an id the vocabulary does not know (padding rows of an embedding matrix)."""
        piece = self._bytes.get(token_id)
        if piece is None:
            token = self._tokenizer.id_to_token(token_id) if 0 <= token_id < 2**32 else None
            piece = b"" if token is None else self._spell(token)
            self._bytes[token_id] = piece
        return piece

    def _spell(self, token: str) -> bytes:
        if self._alphabet is not None:
            values = [self._alphabet.get(char) for char in token]
            known = [value for value in values if value is not None]
            return bytes(known) if len(known) == len(values) else token.encode()
        if self._byte_fallback and (match := BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        if self._word_pieces is not None:
            inner = token.startswith(self._word_pieces)
            return (token.removeprefix(self._word_pieces) if inner else f" {token}").encode()
        for pattern, content in self._replacements:
            token = token.replace(pattern, content)
        return (f" {token}" if self._separate_words else token).encode()


def _decoder_steps(tokenizer: RustTokenizer) -> list[Mapping[str, Any]]:
    """The decoder's parts in order; raises `ModelLoadError` for one that cannot decode token by token."""
    if tokenizer.decoder is None:
        return []
    state: dict[str, Any] = json.loads(tokenizer.decoder.__getstate__())
    steps: list[Mapping[str, Any]] = state["decoders"] if state["type"] == "Sequence" else [state]
    for step in steps:
        replaces_text = step["type"] == "Replace" and "String" in step["pattern"]
        if not replaces_text and step["type"] not in TOKEN_WISE:
            raise ModelLoadError(f"tokenizer: its decoder {step['type']!r} is not supported")
    return steps


def _replacement(step: Mapping[str, Any]) -> tuple[str, str]:
    if step["type"] == "Metaspace":
        return step["replacement"], " "
    return step["pattern"]["String"], step["content"]


def _drops_leading_space(step: Mapping[str, Any]) -> bool:
    if step["type"] == "Metaspace":
        return bool(step.get("prepend_scheme", "always") != "never")
    return bool(step["type"] == "Strip" and step["content"] == " " and step["start"] > 0)
