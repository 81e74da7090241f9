"""One self-contained page; its policy allows its own inline style and script, by hash, and nothing from afar."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import lru_cache
from importlib.resources import files

from octavo_gateway.asgi import Headers

_INSIDE = re.compile(rb"/\* ([a-z]+\.(?:css|js)) \*/")


@lru_cache(maxsize=2)
def page(*, admin: bool = False) -> bytes:
    """The HTML document, with its style and its scripts inside; `admin`: without the chat, about all tenants."""
    folder = files("octavo_gateway.web")
    document = folder.joinpath("index.html").read_bytes()
    document = _INSIDE.sub(lambda name: folder.joinpath(name[1].decode()).read_bytes(), document)
    return document.replace(b"<body>", b'<body class="admin">') if admin else document


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
