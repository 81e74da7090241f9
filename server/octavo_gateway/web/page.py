"""One self-contained page; its policy allows its own inline style and script, by hash, and nothing from afar."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import lru_cache
from importlib.resources import files

from octavo_gateway.asgi import Headers


@lru_cache(maxsize=1)
def page() -> bytes:
    """The HTML document."""
    return files("octavo_gateway.web").joinpath("index.html").read_bytes()


def _hashes(tag: str) -> str:
    blocks = re.findall(rf"<{tag}>(.*?)</{tag}>".encode(), page(), re.DOTALL)
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(block).digest()).decode()}'" for block in blocks)


@lru_cache(maxsize=1)
def _headers() -> Headers:
    policy = (
        f"default-src 'none'; script-src {_hashes('script')}; style-src {_hashes('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return [
        (b"content-security-policy", policy.encode()),
        (b"x-content-type-options", b"nosniff"),
        (b"referrer-policy", b"no-referrer"),
        (b"cross-origin-opener-policy", b"same-origin"),
        (b"cache-control", b"no-cache"),
    ]


PAGE_HEADERS = _headers()
