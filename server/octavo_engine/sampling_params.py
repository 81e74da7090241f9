"""How one request wants its tokens chosen."""

from __future__ import annotations

import math

import msgspec

from octavo_engine.errors import InvalidRequestError

MAX_LOGPROBS = 20
MAX_N = 64
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 1_024
MAX_LOGIT_BIAS = 1_024
MAX_GRAMMAR_CHARS = 65_536
MAX_CHOICES = 1_024


class StructuredOutput(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A language the output must belong to; exactly one field is set.

    `json_schema` is a JSON Schema as text, `regex` a regular expression over the whole output, `grammar` a
    context-free grammar in Lark's notation as llguidance reads it, `choice` a list of allowed outputs, `json_object`
    any JSON object. `whitespace_pattern` is a regular expression for the space between JSON's tokens, "" for none;
    left out, up to 24 blanks are allowed, so that no model writes them for ever.
    """

    json_schema: str | None = None
    regex: str | None = None
    grammar: str | None = None
    choice: tuple[str, ...] | None = None
    json_object: bool = False
    whitespace_pattern: str | None = None

    def validate(self) -> None:
        """Raise `InvalidRequestError` unless exactly one constraint of acceptable size is given."""
        texts = {"json_schema": self.json_schema, "regex": self.regex, "grammar": self.grammar}
        given = [name for name, text in texts.items() if text is not None]
        given += ["choice"] * (self.choice is not None) + ["json_object"] * self.json_object
        if len(given) != 1:
            raise InvalidRequestError(
                "structured: exactly one of json_schema, regex, grammar, choice and json_object must be given, "
                f"got {', '.join(given) or 'none'}",
                "structured",
            )
        if self.whitespace_pattern is not None and given[0] not in ("json_schema", "json_object"):
            raise InvalidRequestError(f"structured.whitespace_pattern: has no meaning for {given[0]}", "structured")
        size = sum(len(text or "") for text in (*texts.values(), *(self.choice or ()), self.whitespace_pattern))
        if size > MAX_GRAMMAR_CHARS:
            raise InvalidRequestError(
                f"structured.{given[0]}: at most {MAX_GRAMMAR_CHARS} characters, got {size}", "structured"
            )
        if self.choice is not None and not (0 < len(self.choice) <= MAX_CHOICES and all(self.choice)):
            raise InvalidRequestError(
                f"structured.choice: must have 1 to {MAX_CHOICES} strings, none of them empty", "structured"
            )


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Sampling settings of one sequence, in the field's usual names (vLLM, OpenAI).

    `temperature == 0` is greedy. `top_k == 0` and `top_p == 1` switch those filters off.
    `seed` makes the sequence reproducible in any batch. `logprobs` is the number of alternatives reported
    beside the chosen token (0 reports the chosen token alone, None reports nothing); `prompt_logprobs` likewise.
    Stop strings are matched by the detokenizer; everything else is applied in the engine.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words_ids: list[list[int]] | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    structured: StructuredOutput | None = None

    def validate(self, vocab_size: int | None = None) -> None:
        """Raise `InvalidRequestError` naming the first field out of range."""
        _within("max_tokens", self.max_tokens, 1, None)
        _within("min_tokens", self.min_tokens, 0, self.max_tokens)
        _within("n", self.n, 1, MAX_N)
        _within("temperature", self.temperature, 0.0, 2.0)
        _within("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _within("top_k", self.top_k, 0, None)
        _within("min_p", self.min_p, 0.0, 1.0)
        _within("typical_p", self.typical_p, 0.0, 1.0, open_low=True)
        _within("repetition_penalty", self.repetition_penalty, 0.0, 10.0, open_low=True)
        _within("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _within("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if self.seed is not None:
            _within("seed", self.seed, -(2**63), 2**63 - 1)
        for field in ("logprobs", "prompt_logprobs"):
            value = getattr(self, field)
            if value is not None:
                _within(field, value, 0, MAX_LOGPROBS)
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidRequestError(f"stop: at most {MAX_STOP_STRINGS} strings, got {len(self.stop)}", "stop")
        for text in self.stop:
            if not text or len(text) > MAX_STOP_STRING_CHARS:
                raise InvalidRequestError(
                    f"stop: each string must have 1 to {MAX_STOP_STRING_CHARS} characters, got {len(text)}", "stop"
                )
        if self.structured is not None:
            self.structured.validate()
        self._validate_token_ids(vocab_size)

    def _validate_token_ids(self, vocab_size: int | None) -> None:
        bias = self.logit_bias or {}
        if len(bias) > MAX_LOGIT_BIAS:
            raise InvalidRequestError(f"logit_bias: at most {MAX_LOGIT_BIAS} entries, got {len(bias)}", "logit_bias")
        for token, value in bias.items():
            _within(f"logit_bias[{token}]", value, -100.0, 100.0, param="logit_bias")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise InvalidRequestError("allowed_token_ids: must not be empty when given", "allowed_token_ids")
        if vocab_size is None:
            return
        ids_by_field: dict[str, list[int]] = {
            "logit_bias": list(bias),
            "allowed_token_ids": self.allowed_token_ids or [],
            "stop_token_ids": list(self.stop_token_ids),
            "bad_words": [token for word in self.bad_words_ids or [] for token in word],
        }
        for field, ids in ids_by_field.items():
            for token in ids:
                _within(field, token, 0, vocab_size - 1)


def _within(
    field: str,
    value: float,
    low: float | None,
    high: float | None,
    *,
    open_low: bool = False,
    param: str | None = None,
) -> None:
    finite = math.isfinite(value)
    above = low is None or (value > low if open_low else value >= low)
    below = high is None or value <= high
    if finite and above and below:
        return
    bounds = []
    if low is not None:
        bounds.append(f"{'greater than' if open_low else 'at least'} {low:g}")
    if high is not None:
        bounds.append(f"at most {high:g}")
    raise InvalidRequestError(f"{field}: must be {' and '.join(bounds)}, got {value}", param or field)
