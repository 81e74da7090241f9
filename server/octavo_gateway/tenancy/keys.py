"""API keys: 256 random bits shown once; only their SHA-256 is kept.

A slow password hash would add nothing: a key cannot be guessed, and every request is checked.
"""

from __future__ import annotations

import base64
import hashlib
import re
import secrets

PREFIX = "oct-"
MAX_KEY_CHARS = 200
_HASH = re.compile(r"sha256:([0-9a-f]{64})")


def new_key() -> str:
    """A key to show once: `oct-` and 43 URL-safe characters."""
    return PREFIX + base64.urlsafe_b64encode(secrets.token_bytes(32)).decode().rstrip("=")


def hash_key(key: str) -> bytes:
    """SHA-256 of a key."""
    return hashlib.sha256(key.encode()).digest()


def format_hash(digest: bytes) -> str:
    """The form kept in Secrets and files: `sha256:` and 64 hexadecimal digits."""
    return f"sha256:{digest.hex()}"


def parse_hash(text: str) -> bytes:
    """Read the kept form; raises `ValueError`, whose message does not repeat the value (it may be a bare key)."""
    match = _HASH.fullmatch(text.strip().lower())
    if match is None:
        raise ValueError("must be sha256: and 64 hexadecimal digits, never the key itself")
    return bytes.fromhex(match[1])
