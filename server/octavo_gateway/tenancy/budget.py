"""Budgets of a calendar day and of a calendar month (UTC): what was spent, and whether more may be."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from octavo_gateway.errors import BudgetExceededError
from octavo_gateway.tenancy.tenant import Limits


class Period(enum.Enum):
    """The value is the word for it."""

    DAY = "daily"
    MONTH = "monthly"

    def label(self, today: str) -> str:
        """Which one `today` (YYYY-MM-DD) lies in."""
        return today if self is Period.DAY else today[:7]


def budgets(limits: Limits) -> list[tuple[Period, int | None, float | None]]:
    """Per period: the most tokens, and the highest cost."""
    return [
        (Period.DAY, limits.tokens_per_day, limits.cost_per_day),
        (Period.MONTH, limits.tokens_per_month, limits.cost_per_month),
    ]


@dataclass(slots=True)
class Spent:
    """In one period of one tenant."""

    label: str = ""
    tokens: float = 0.0
    cost: float = 0.0

    def check(self, period: Period, tokens: int | None, cost: float | None) -> None:
        """Raise `BudgetExceededError` when a budget is used up."""
        if tokens is not None and self.tokens >= tokens:
            raise BudgetExceededError(f"The {period.value} budget of {tokens} tokens is used up.")
        if cost is not None and self.cost >= cost:
            raise BudgetExceededError(f"The {period.value} budget of {cost:g} is used up.")
