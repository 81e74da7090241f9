"""A Jinja sandbox for chat templates, which come with models from strangers.

The immutable sandbox keeps templates away from Python; budgets keep them from eating the machine: characters of
output, loop turns and calls, the size of any single value, and time.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_OUTPUT_CHARS = 16 << 20
MAX_VALUE_CHARS = 16 << 20
MAX_STEPS = 2_000_000
MAX_WIDTH = 1_000
MAX_SECONDS = 5.0
UNBOUNDED_FILTERS = ("batch", "center", "pprint", "random", "slice", "urlize", "wordwrap", "xmlattr")
WIDE_CONVERSION = re.compile(r"%[^%a-zA-Z]*(\d{4,}|\*)")
UNBOUNDED_METHODS = frozenset(("ljust", "rjust", "center", "zfill", "expandtabs", "format", "format_map", "translate"))


class TemplateRefusalError(jinja2.TemplateError):
    """`raise_exception` in a template: its author's words for messages it does not take."""


class Budget:
    """What one rendering may use up."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._deadline = clock() + MAX_SECONDS
        self._steps = 0
        self._chars = 0

    def step(self) -> None:
        """Count a loop turn or a call."""
        self._steps += 1
        if self._steps > MAX_STEPS or (self._steps % 256 == 0 and self._clock() > self._deadline):
            raise SecurityError("the template runs for too long")

    def emit(self, num_chars: int) -> None:
        """Count output."""
        self._chars += num_chars
        if self._chars > MAX_OUTPUT_CHARS:
            raise SecurityError(f"the template writes more than {MAX_OUTPUT_CHARS} characters")


_budget: ContextVar[Budget] = ContextVar("template_budget")


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """The environment chat templates are written for (as in transformers), with budgets."""

    intercepted_binops = frozenset(("*", "**", "%", "+"))

    def __init__(self, now: Callable[[], datetime] = datetime.now) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, GenerationBlocks], finalize=_counted_output
        )
        self.globals = {
            "raise_exception": _raise_exception,
            "strftime_now": lambda pattern: now().strftime(str(pattern)[:100]),
            "namespace": self.globals["namespace"],
            "dict": dict,
            "range": _bounded_range,
        }
        for name in UNBOUNDED_FILTERS:
            del self.filters[name]
        self.filters |= {
            "tojson": _tojson,
            "indent": _bounded_indent,
            "format": _bounded_format,
            "join": _bounded_join,
            "replace": _bounded_replace,
            "string": _as_text,
            BUDGETED: _budgeted,
            JOINED: _bounded_join,
        }

    def render_bounded(self, template: jinja2.Template, variables: Mapping[str, Any], budget: Budget) -> str:
        """The template's output; raises `jinja2.TemplateError` and what a template's own operations raise."""
        token = _budget.set(budget)
        try:
            chunks = []
            for chunk in template.generate(**variables):
                budget.emit(len(chunk))
                chunks.append(chunk)
            return "".join(chunks)
        finally:
            _budget.reset(token)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """No private attributes, and no string methods that make much out of little."""
        if isinstance(obj, str) and attr in UNBOUNDED_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """`str.format` stays unsafe, whose widths nothing bounds."""

    def call(self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Count every call; bound what strings may grow to."""
        _budget.get().step()
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str) and __obj.__name__ in ("join", "replace"):
            bounded = _bounded_join if __obj.__name__ == "join" else _bounded_replace
            return bounded(args[0], owner) if bounded is _bounded_join else bounded(owner, *args)
        return _bounded(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Refuse multiplications and powers whose result would be huge, before they are made."""
        _budget.get().step()
        if operator == "*" and not _fits_product(left, right):
            raise SecurityError("the template multiplies a text or list too often")
        if operator == "**" and (abs(left) > 1_000_000 or abs(right) > 64):
            raise SecurityError("the template raises a number to a huge power")
        if operator == "%" and isinstance(left, str) and WIDE_CONVERSION.search(left):
            raise SecurityError("the template formats text too widely")
        return _bounded(super().call_binop(context, operator, left, right))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """Every loop's iterable and every `~` pass through the budget."""
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, BUDGETED, [], [], None, None, lineno=loop.lineno)
        bounded: nodes.Template = _ConcatenationsBounded().visit(tree)
        return bounded


class _ConcatenationsBounded(NodeTransformer):
    """`a ~ b ~ c` becomes `[a, b, c] | join`, with its bound."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802 - jinja's names
        self.generic_visit(node)
        parts = nodes.List(node.nodes, lineno=node.lineno)
        return nodes.Filter(parts, JOINED, [], [], None, None, lineno=node.lineno)


BUDGETED = "octavo_budgeted"
JOINED = "octavo_joined"


class GenerationBlocks(Extension):
    """`{% generation %}...{% endgeneration %}` marks what the assistant said; it renders as its content."""

    tags = {"generation"}  # noqa: RUF012 - as the base class declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The block's own statements."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _budgeted(items: Iterable[Any]) -> Iterable[Any]:
    """Sized things stay sized, so that `loop.length` and `loop.last` work; each turn is counted by the iterator."""
    return _CountedList(items) if isinstance(items, list | tuple | range | str) else _counted(items)


class _CountedList(list[Any]):
    def __iter__(self) -> Iterator[Any]:
        return _counted(super().__iter__())


def _counted(items: Iterable[Any]) -> Iterator[Any]:
    budget = _budget.get()
    for item in items:
        budget.step()
        yield item


def _bounded(value: Any) -> Any:
    if isinstance(value, str | list | tuple) and len(value) > MAX_VALUE_CHARS:
        raise SecurityError(f"the template makes a value longer than {MAX_VALUE_CHARS}")
    return value


def _fits_product(left: Any, right: Any) -> bool:
    for sized, times in ((left, right), (right, left)):
        if isinstance(sized, str | list | tuple) and isinstance(times, int):
            return len(sized) * max(times, 0) <= MAX_VALUE_CHARS
    return True


def _bounded_range(*args: int) -> range:
    numbers = range(*args)
    if len(numbers) > MAX_STEPS:
        raise SecurityError(f"the template asks for a range of more than {MAX_STEPS}")
    return numbers


def _bounded_indent(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    size = width if isinstance(width, int) else len(width)
    if size > MAX_WIDTH or (text.count("\n") + 1) * size > MAX_VALUE_CHARS:
        raise SecurityError("the template indents too far")
    indented: str = jinja2.filters.do_indent(text, width, first, blank)
    return indented


def _bounded_join(items: Iterable[Any], separator: str = "", attribute: str | int | None = None) -> str:
    texts = []
    total = 0
    for item in items:
        text = _as_text(item if attribute is None else item[attribute])
        total += len(text) + len(separator)
        if total > MAX_VALUE_CHARS:
            raise SecurityError(f"the template joins more than {MAX_VALUE_CHARS} characters")
        texts.append(text)
    return separator.join(texts)


def _bounded_format(pattern: str, *args: Any) -> str:
    if WIDE_CONVERSION.search(pattern):
        raise SecurityError("the template formats text too widely")
    return pattern % args


def _bounded_replace(text: str, old: str, new: str, count: int = -1) -> str:
    occurrences = text.count(old) if count < 0 else min(count, text.count(old))
    if occurrences * len(new) > MAX_VALUE_CHARS:
        raise SecurityError(f"the template replaces with more than {MAX_VALUE_CHARS} characters")
    return text.replace(old, new, count)


def _counted_output(value: Any) -> str:
    """What `{{ value }}` writes; counted here too, because a block may capture it instead of writing it out."""
    text = _as_text(value)
    budget = _budget.get(None)
    if budget is not None:
        budget.emit(len(text))
    return text


def _as_text(value: Any) -> str:
    """`str(value)`, after making sure that it is not a giant built of shared parts."""
    if isinstance(value, list | tuple | dict):
        return "".join(_bounded_chunks(_python_chunks(value)))
    return str(value)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: no HTML escapes, which models never saw in training."""
    if indent is not None and indent > MAX_WIDTH:
        raise SecurityError("the template indents too far")
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return "".join(_bounded_chunks(encoder.iterencode(value)))


def _bounded_chunks(chunks: Iterable[str]) -> Iterator[str]:
    total = 0
    for chunk in chunks:
        total += len(chunk)
        if total > MAX_VALUE_CHARS:
            raise SecurityError(f"the template writes out a value longer than {MAX_VALUE_CHARS}")
        yield chunk


def _python_chunks(value: Any) -> Iterator[str]:
    """`repr(value)` piece by piece."""
    if isinstance(value, dict):
        yield "{"
        for index, (key, item) in enumerate(value.items()):
            yield f"{', ' if index else ''}{key!r}: "
            yield from _python_chunks(item)
        yield "}"
    elif isinstance(value, list | tuple):
        yield "[" if isinstance(value, list) else "("
        for index, item in enumerate(value):
            yield ", " if index else ""
            yield from _python_chunks(item)
        yield "]" if isinstance(value, list) else (",)" if len(value) == 1 else ")")
    else:
        yield repr(value)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateRefusalError(str(message)[:1_000])
