"""Storage URIs, taken apart."""

from __future__ import annotations

import re
from dataclasses import dataclass

from octavo_engine.errors import ModelLoadError

SCHEMES = ("file", "pypi", "hf", "https", "http", "s3", "pvc")
EXAMPLES = (
    "./folder, file:///models/llama, pypi://PACKAGE/FILE.gguf, hf://ORG/REPO, https://HOST/FILE.gguf, "
    "s3://BUCKET/PREFIX, pvc://CLAIM/PATH"
)


@dataclass(frozen=True, slots=True)
class StorageURI:
    """`scheme://location`; a plain path has the scheme `file`. `text` is what the user wrote."""

    text: str
    scheme: str
    location: str

    @property
    def public_text(self) -> str:
        """The URI without query, fragment and user info, which may hold secrets: for messages and file names."""
        if self.scheme not in ("http", "https"):
            return self.text
        return re.sub(r"//[^/@]*@", "//", re.split(r"[?#]", self.text, maxsplit=1)[0])


def parse_uri(text: str) -> StorageURI:
    """Split a storage URI or path; raises `ModelLoadError` for an empty one or an unknown scheme."""
    if not text.strip():
        raise ModelLoadError(f"model: the storage URI is empty; give one of {EXAMPLES}")
    if not text.isprintable():
        raise ModelLoadError(f"model: the storage URI {text!r} holds control characters")
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)$", text)
    if match is None:
        return StorageURI(text, "file", text)
    scheme = match[1].lower()
    if scheme not in SCHEMES:
        raise ModelLoadError(f"model {text!r}: storage scheme '{scheme}://' is not known; use one of {EXAMPLES}")
    return StorageURI(text, scheme, match[2])
