"""Which parsers suit a model: told by flags, or read off its chat template."""

from __future__ import annotations

from collections.abc import Callable, Collection

from octavo_server.parsers.events import TextParser
from octavo_server.parsers.gemma import GemmaParser
from octavo_server.parsers.harmony import CHANNEL, START, HarmonyParser
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
    "harmony": HarmonyParser,
    "gemma": GemmaParser,
}
REASONING_PARSERS = ("think", "harmony")
GEMMA_TURN = "<start_of_turn>"
NO_SYSTEM = "System role not supported"  # Gemma 2, which was not trained to call functions


def tool_parser_for(setting: str, template: str | None) -> ToolParserFactory | None:
    """The factory for a model's tool calls; None when its template knows no tools or `setting` is none."""
    if setting == "none":
        return None
    if setting != "auto":
        return TOOL_PARSERS[setting]
    if template is None:
        return None
    if GEMMA_TURN in template and NO_SYSTEM not in template:
        return GemmaParser
    if "tools" not in template:
        return None
    if _is_harmony(template):
        return HarmonyParser
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


def speaks_harmony(reasoning: str, tools: str, template: str | None) -> bool:
    """Whether answers come in channels. They are read as such unless both settings say otherwise."""
    if "harmony" in (reasoning, tools):
        return True
    return "auto" in (reasoning, tools) and template is not None and _is_harmony(template)


def prompt_opens_thoughts(prompt: str) -> bool:
    """Whether the rendered prompt already ends with the opening tag."""
    return prompt.rstrip().endswith(THINK_OPEN)


def _is_harmony(template: str) -> bool:
    return CHANNEL in template and START in template
