"""A worker's place among its peers."""

from __future__ import annotations

import os
import shutil
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

    def clear(self) -> None:
        """Remove the folder in the parent's stead; the peers are leaving, too."""
        shutil.rmtree(self.folder, ignore_errors=True)
