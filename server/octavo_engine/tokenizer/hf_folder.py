"""Tokenizers of Hugging Face checkpoints: `tokenizer.json` and the small JSON files around it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import AddedToken
from tokenizers import Tokenizer as RustTokenizer

from octavo_engine.errors import ModelLoadError
from octavo_engine.tokenizer.chat_template import MAX_TEMPLATE_CHARS, ChatTemplates
from octavo_engine.tokenizer.fast import FastTokenizer, SpecialTokens, add_bos_and_eos, built

MAX_TOKENIZER_BYTES = 256 << 20
MAX_CONFIG_BYTES = 16 << 20
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def load_from_folder(folder: Path) -> FastTokenizer:
    """Read the tokenizer, its special tokens and chat templates; raises `ModelLoadError` naming the file."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        older = ", ".join(name for name in ("tokenizer.model", "vocab.json") if (folder / name).exists())
        found = f" ({older} alone is not enough: save the model again with a fast tokenizer)" if older else ""
        raise ModelLoadError(f"{folder}: holds no tokenizer.json{found}")
    text = _read(path, MAX_TOKENIZER_BYTES)
    tokenizer = built(str(path), lambda: RustTokenizer.from_str(text))
    config = _read_json(folder / "tokenizer_config.json")
    named = _named_tokens(_read_json(folder / "special_tokens_map.json"), config)
    _mark_special(tokenizer, config, named)
    _follow_bos_setting(tokenizer, config, named)
    bos = named.get("bos_token")
    special = SpecialTokens(
        bos_id=tokenizer.token_to_id(bos) if bos is not None else None,
        eos_ids=_eos_ids(folder, tokenizer, named),
        named=named,
    )
    return FastTokenizer(tokenizer, special, _templates(folder, config))


def _read(path: Path, limit: int) -> str:
    try:
        if path.stat().st_size > limit:
            raise ModelLoadError(f"{path}: larger than {limit} bytes, which no tokenizer needs")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelLoadError(f"{path}: cannot be read: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one when the file is absent."""
    if not path.is_file():
        return {}
    try:
        return msgspec.json.decode(_read(path, MAX_CONFIG_BYTES), type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError) as error:
        raise ModelLoadError(f"{path}: not a JSON object: {error}") from error


def _named_tokens(*sources: Mapping[str, Any]) -> dict[str, str]:
    """Texts of the special tokens by role; later sources win. A token is a string or `{"content": ...}`."""
    named: dict[str, str] = {}
    for source in sources:
        for role in ROLES:
            value = source.get(role)
            text = value.get("content") if isinstance(value, Mapping) else value
            if isinstance(text, str):
                named[role] = text
    return named


def _mark_special(tokenizer: RustTokenizer, config: Mapping[str, Any], named: Mapping[str, str]) -> None:
    """Tokens that only `tokenizer_config.json` calls special are special too."""
    extra = config.get("additional_special_tokens")
    texts = [*named.values(), *(text for text in extra if isinstance(text, str))] if extra else [*named.values()]
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    missing = [text for text in texts if text not in known and tokenizer.token_to_id(text) is not None]
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in missing])


def _follow_bos_setting(tokenizer: RustTokenizer, config: Mapping[str, Any], named: Mapping[str, str]) -> None:
    """`add_bos_token` and `add_eos_token` decide where they are given and `tokenizer.json` says otherwise."""
    wanted = {role: config.get(f"add_{role}") for role in ("bos_token", "eos_token")}
    if not any(isinstance(value, bool) for value in wanted.values()):
        return
    around = built("tokenizer.json", lambda: tokenizer.encode("", add_special_tokens=True).tokens)
    texts: dict[str, str | None] = {}
    for role, position in (("bos_token", 0), ("eos_token", -1)):
        text = named.get(role)
        present = text is not None and bool(around) and around[position] == text
        chosen = wanted[role] if isinstance(wanted[role], bool) else present
        texts[role] = text if chosen and text is not None and tokenizer.token_to_id(text) is not None else None
    if [text for text in texts.values() if text is not None] != around:
        add_bos_and_eos(tokenizer, texts["bos_token"], texts["eos_token"])


def _eos_ids(folder: Path, tokenizer: RustTokenizer, named: Mapping[str, str]) -> frozenset[int]:
    """What ends a generation: `generation_config.json` (else `config.json`), and the tokenizer's own eos token."""
    ids: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        value = _read_json(folder / name).get("eos_token_id")
        values = value if isinstance(value, list) else [value]
        ids = {item for item in values if isinstance(item, int) and not isinstance(item, bool) and item >= 0}
        if ids:
            break
    own = tokenizer.token_to_id(named["eos_token"]) if "eos_token" in named else None
    return frozenset(ids | ({own} if own is not None else set()))


def _templates(folder: Path, config: Mapping[str, Any]) -> ChatTemplates:
    """`chat_template.jinja`, else `chat_template.json`, else the field of `tokenizer_config.json`."""
    if (folder / "chat_template.jinja").is_file():
        named = {"default": _read(folder / "chat_template.jinja", 4 * MAX_TEMPLATE_CHARS)}
        extra_folder = folder / "additional_chat_templates"
        for path in sorted(extra_folder.glob("*.jinja")) if extra_folder.is_dir() else ():
            named[path.stem] = _read(path, 4 * MAX_TEMPLATE_CHARS)
        return ChatTemplates(named)
    value = _read_json(folder / "chat_template.json").get("chat_template") or config.get("chat_template")
    if isinstance(value, str):
        return ChatTemplates({"default": value})
    entries = value if isinstance(value, list) else []
    return ChatTemplates(
        {
            entry["name"]: entry["template"]
            for entry in entries
            if isinstance(entry, Mapping) and isinstance(entry.get("name"), str)
            if isinstance(entry.get("template"), str)
        }
    )
