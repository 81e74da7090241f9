"""The documented limits are the ones that are enforced."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from octavo_server.limits import LIMITS

DOCUMENT = Path(__file__).parents[3] / "docs" / "api.md"


def test_the_document_lists_every_limit_with_its_value() -> None:
    section = DOCUMENT.read_text(encoding="utf-8").split("## Limits")[1]
    documented = {
        name: float(value.replace(",", "")) for name, value in re.findall(r"\| `(\w+)` \| ([\d,.]+) \|", section)
    }

    assert documented == {name: float(value) for name, value in dataclasses.asdict(LIMITS).items()}
