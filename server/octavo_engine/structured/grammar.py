"""Grammars over tokens, and where in them a sequence stands."""

from __future__ import annotations

import json
from collections import OrderedDict
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from octavo_engine.errors import InvalidRequestError
from octavo_engine.sampling_params import StructuredOutput
from octavo_engine.staging import to_device
from octavo_engine.tokenizer.interface import Tokenizer

MAX_CACHED = 64
# What compiling and one token may cost: tenths of a second and tens of MiB, where the library's own limits let a
# single expression take five times that. Schemas of real use need a hundredth of it.
LIMITS = LLParserLimits(
    initial_lexer_fuel=200_000, step_lexer_fuel=50_000, max_grammar_size=200_000, max_lexer_states=50_000
)
# Room for indented JSON, and an end to a model that would write white space for ever.
DEFAULT_WHITESPACE = r"[ \n\r\t]{0,24}"


class GrammarConstraint:
    """A position in a grammar; implements `TokenConstraint`."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    @property
    def is_complete(self) -> bool:
        return self._matcher.is_stopped()

    def mask(self, row: torch.Tensor) -> None:
        mask = self._matcher.compute_bitmask()
        self._check()
        bits = np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")
        (allowed,) = to_device((bits.view(np.bool_)[: len(row)],), row.device)
        row[: len(allowed)].masked_fill_(~allowed, float("-inf"))
        row[len(allowed) :] = float("-inf")

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        """The compiler bounds what a grammar may cost while it is followed, too."""
        if self._matcher.is_error():
            reason = self._matcher.get_error().splitlines()[0][:200]
            raise InvalidRequestError(f"structured: the grammar cannot be followed any further: {reason}", "structured")


class GrammarCompiler:
    """Compiles and remembers grammars for one tokenizer. Sizes and steps are bounded by llguidance's own limits."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_token_ids: frozenset[int]) -> None:
        eos = sorted(end_token_ids or tokenizer.eos_token_ids)
        wrapped = _Vocabulary(tokenizer, eos[0])
        self._tokenizer = LLTokenizer(wrapped, n_vocab=max(vocab_size, len(wrapped.tokens)), eos_token=eos)  # type: ignore[arg-type]
        self._cache: OrderedDict[StructuredOutput, LLMatcher] = OrderedDict()

    def compile(self, structured: StructuredOutput) -> GrammarConstraint:
        """A constraint at its start. Raises `InvalidRequestError` with the compiler's own complaint."""
        matcher = self._cache.get(structured)
        if matcher is None:
            matcher = self._cache[structured] = self._build(structured)
            if len(self._cache) > MAX_CACHED:
                self._cache.popitem(last=False)
        self._cache.move_to_end(structured)
        return GrammarConstraint(matcher.deep_copy())

    def _build(self, structured: StructuredOutput) -> LLMatcher:
        field, grammar = _source(structured)
        is_error, messages = LLMatcher.validate_grammar_with_warnings(grammar, self._tokenizer)
        matcher = None if is_error else LLMatcher(self._tokenizer, grammar, log_level=0, limits=LIMITS)
        if matcher is None or matcher.is_error():
            complaint = messages[0] if is_error else (matcher.get_error() if matcher is not None else "")
            raise InvalidRequestError(f"structured.{field}: {_first_lines(complaint)}", "structured")
        return matcher


class _Vocabulary:
    """The tokenizer as llguidance wants to see it."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer, eos_token_id: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = eos_token_id
        self.bos_token_id = tokenizer.bos_token_id
        self.tokens = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted(tokenizer.special_token_ids)

    def __call__(self, text: str | bytes) -> list[int]:
        decoded = text if isinstance(text, str) else text.decode("utf-8", "replace")
        return self._tokenizer.encode(decoded, add_special_tokens=False)


def _source(structured: StructuredOutput) -> tuple[str, str]:
    """The field that is set, and its grammar in llguidance's form."""
    if structured.regex is not None:
        return "regex", LLMatcher.grammar_from_regex(structured.regex)
    if structured.grammar is not None:
        return "grammar", LLMatcher.grammar_from_lark(structured.grammar)
    if structured.choice is not None:
        return "choice", LLMatcher.grammar_from_lark(
            "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in structured.choice)
        )
    schema = '{"type": "object"}' if structured.json_object else structured.json_schema or "{}"
    try:
        parsed = json.loads(schema)
        if parsed is True:
            schema = "{}"
        elif not isinstance(parsed, dict):
            raise InvalidRequestError("structured.json_schema: must be a schema that allows something", "structured")
        options = _json_options(structured.whitespace_pattern)
        return "json_schema", LLMatcher.grammar_from_json_schema(schema, overrides=options)  # type: ignore[arg-type]
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"structured.json_schema: not valid JSON: {error}", "structured") from error


def _json_options(whitespace: str | None) -> dict[str, Any]:
    if whitespace == "":
        return {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"}
    return {"whitespace_pattern": DEFAULT_WHITESPACE if whitespace is None else whitespace}


def _first_lines(complaint: str) -> str:
    return " ".join(complaint.split())[:300]
