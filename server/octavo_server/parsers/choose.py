"""Which parsers suit a model: told by flags, or read off its chat template."""

from __future__ import annotations

from collections.abc import Callable, Collection

from octavo_server.parsers.events import TextParser
from octavo_server.parsers.json_list import MISTRAL_OPEN, PHI_OPEN, JsonListParser
from octavo_server.parsers.reasoning import OPEN as THINK_OPEN
from octavo_server.parsers.tool_calls import OPEN as TOOL_CALL_OPEN
from octavo_server.parsers.tool_calls import HermesParser, Llama3JsonParser

ToolParserFactory = Callable[[Collection[str]], TextParser]

TOOL_PARSERS: dict[str, ToolParserFactory] = {
    "hermes": HermesParser,
    "llama3_json": Llama3JsonParser,
    "mistral": JsonListParser,
    "phi4_mini_json": JsonListParser,
}
REASONING_PARSERS = ("think",)


def tool_parser_for(setting: str, template: str | None) -> ToolParserFactory | None:
    """The factory for a model's tool calls; None when its template knows no tools or `setting` is none."""
    if setting == "none":
        return None
    if setting != "auto":
        return TOOL_PARSERS[setting]
    if template is None or "tools" not in template:
        return None
    if TOOL_CALL_OPEN in template:
        return HermesParser
    if MISTRAL_OPEN in template or PHI_OPEN in template:
        return JsonListParser
    if '"parameters"' in template and ("ipython" in template or "python_tag" in template):
        return Llama3JsonParser
    return None


def thinks(setting: str, template: str | None) -> bool:
    """Whether a model's answers may begin with thoughts."""
    if setting == "auto":
        return template is not None and (THINK_OPEN in template or "</think>" in template)
    return setting == "think"


def prompt_opens_thoughts(prompt: str) -> bool:
    """Whether the rendered prompt already ends with the opening tag."""
    return prompt.rstrip().endswith(THINK_OPEN)
