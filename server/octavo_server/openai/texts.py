"""The union that OpenAI's `prompt` and `input` fields share: text, texts, token ids, or lists of token ids."""

from __future__ import annotations

from octavo_server.errors import bad_request

TextInput = str | list[int]


def text_inputs(value: str | list[str | int | list[int]], param: str, most: int) -> list[TextInput]:
    """Each text or list of ids; raises a 400 naming `param` for a mixture or too many."""
    if isinstance(value, str):
        return [value]
    ids = [item for item in value if isinstance(item, int)]
    if len(ids) == len(value):
        return [ids]
    if ids or len({type(item) for item in value}) > 1:
        raise bad_request(f"{param}: must be a string, a list of strings, token ids, or a list of token ids", param)
    if len(value) > most:
        raise bad_request(f"{param}: at most {most} entries, got {len(value)}", param)
    return [item for item in value if not isinstance(item, int)]
