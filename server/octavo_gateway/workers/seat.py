"""A worker's place among its peers."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from octavo_gateway.listeners import Listeners


@dataclass(frozen=True)
class Seat:
    """`folder` is private to the gateway: peers meet there. `life` is a pipe's end that reads EOF once the parent is
    gone, `news` one where the worker writes a byte when it serves."""

    index: int
    count: int
    folder: Path
    listeners: Listeners
    life: int
    news: int

    def tell_ready(self) -> None:
        os.write(self.news, b".")
