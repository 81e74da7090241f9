"""Usage: what each request consumed, counted by the engine, priced, and kept exactly once."""

from octavo_gateway.usage.ledger import Ledger, LedgerError
from octavo_gateway.usage.meter import UsageMeter
from octavo_gateway.usage.prices import Price, PriceTable
from octavo_gateway.usage.record import Begun, UsageRecord
from octavo_gateway.usage.report import GROUPS, UsageRow, read_month, read_usage

__all__ = [
    "GROUPS",
    "Begun",
    "Ledger",
    "LedgerError",
    "Price",
    "PriceTable",
    "UsageMeter",
    "UsageRecord",
    "UsageRow",
    "read_month",
    "read_usage",
]
