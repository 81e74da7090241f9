"""The command line of a replica: the runtime's command and arguments, then the flags of every field that is set."""

from __future__ import annotations

from collections.abc import Mapping

from octavo_operator.api.errors import FieldError
from octavo_operator.api.serving_runtime import Container, FlagMapping
from octavo_operator.plan.fields import OPTIONAL, Value

HOST, PORT = "{host}", "{port}"
KV_EVENTS, KV_REPLAY = "{kv_events}", "{kv_replay}"
ALIASES = "$(MODEL_ALIASES)"  # an argument of its own, replaced by one for each alias


def command_line(
    container: Container, values: Mapping[str, Value], names: Mapping[str, str], extra: tuple[str, ...]
) -> tuple[tuple[str, ...], list[FieldError]]:
    """The argv, and an error for every field that the runtime cannot express.

    `names` fills $(MODEL_URI), $(MODEL_PATH), $(MODEL_NAME); $(HOST), $(PORT), $(KV_EVENTS) and $(KV_REPLAY)
    become `{host}`, `{port}`, `{kv_events}` and `{kv_replay}`; the last two are ZeroMQ addresses.
    """
    filled = {**names, "HOST": HOST, "PORT": PORT, "KV_EVENTS": KV_EVENTS, "KV_REPLAY": KV_REPLAY}
    argv = [_fill(word, filled) for word in _with_aliases((*container.command, *container.args), values)]
    flags = {mapping.field: mapping for mapping in container.flags}
    errors: list[FieldError] = []
    for path, value in values.items():
        mapping = flags.get(path)
        if mapping is None:
            if path not in OPTIONAL and not (path == "model.aliases" and ALIASES in container.args):
                errors.append(FieldError(f"spec.{path}", "the runtime has no such setting", _word(value)))
            continue
        words = _flag_words(mapping, value, filled)
        if words is None:
            known = ", ".join(mapping.values)
            errors.append(FieldError(f"spec.{path}", f"the runtime knows only {known}", _word(value)))
        else:
            argv += words
    return (*argv, *extra), errors


def _flag_words(mapping: FlagMapping, value: Value, names: Mapping[str, str]) -> list[str] | None:
    """The arguments of one field; None if the runtime has no word for the value."""
    items = value if isinstance(value, tuple) else (_word(value),)
    if mapping.values:
        if any(item not in mapping.values for item in items):
            return None
        items = tuple(mapping.values[item] for item in items)
    if mapping.flag is None:
        return [_fill(word, names) for item in items for word in item.split()]
    template = [_fill(word, names) for word in mapping.flag.split()]
    return [part.replace("{}", item) for item in items for part in template]


def _with_aliases(words: tuple[str, ...], values: Mapping[str, Value]) -> list[str]:
    aliases = values.get("model.aliases")
    names = aliases if isinstance(aliases, tuple) else ()
    return [word for part in words for word in (names if part == ALIASES else (part,))]


def _fill(word: str, names: Mapping[str, str]) -> str:
    for name, text in names.items():
        word = word.replace(f"$({name})", text)
    return word


def _word(value: Value) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return ", ".join(value) if isinstance(value, tuple) else str(value)
