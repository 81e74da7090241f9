"""Which part of a matrix a rank holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Section:
    """Rows or columns `start` up to `stop` of `size`."""

    size: int
    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start

    @property
    def is_whole(self) -> bool:
        return self.length == self.size

    def __mul__(self, factor: int) -> Section:
        """The rows of this part's units (heads) of `factor` rows each."""
        return Section(self.size * factor, self.start * factor, self.stop * factor)


Rows = tuple[Section, ...]  # of sections that lie one after the other in one stored matrix


def whole(size: int) -> Section:
    """All of it."""
    return Section(size, 0, size)


def share(size: int, index: int, count: int, unit: int = 1) -> Section:
    """The part of rank `index` of `count`: whole units, the first ranks one more where they do not divide evenly."""
    units = size // unit
    each, left = divmod(units, count)
    start = index * each + min(index, left)
    return Section(size, start * unit, (start + each + (index < left)) * unit)


def as_rows(rows: int | Rows) -> Rows:
    """A plain number of rows is all of them."""
    return (whole(rows),) if isinstance(rows, int) else rows


def stored_size(rows: Sequence[Section]) -> int:
    """Rows of the matrix in the file."""
    return sum(section.size for section in rows)


def held_size(rows: Sequence[Section]) -> int:
    """Rows that this rank keeps."""
    return sum(section.length for section in rows)
