"""Kubernetes quantities and decimal fractions as strings, with their exact values."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Annotated, Any

from pydantic import Field, GetJsonSchemaHandler
from pydantic_core import CoreSchema

QUANTITY_PATTERN = (
    r"^(\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))(([KMGTPE]i)|[numkMGTPE]|([eE](\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))))?$"
)
_SUFFIX = {
    **{unit: Decimal(1024) ** power for power, unit in enumerate(("", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"))},
    **{unit: Decimal(1000) ** power for power, unit in enumerate(("", "k", "M", "G", "T", "P", "E"))},
    "n": Decimal("1e-9"),
    "u": Decimal("1e-6"),
    "m": Decimal("1e-3"),
}


class _IntOrString:
    """Makes the schema of a quantity `x-kubernetes-int-or-string`, as the API server writes it."""

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"x-kubernetes-int-or-string": True, "pattern": QUANTITY_PATTERN}


Quantity = Annotated[
    int | Annotated[str, Field(pattern=QUANTITY_PATTERN)],
    _IntOrString(),
]
"""An amount such as 8, "500m", "16Gi"."""

Fraction = Annotated[str, Field(pattern=r"^(0\.[0-9]{1,4}|1(\.0{1,4})?)$", max_length=8)]
"""A decimal between 0 and 1 as a string, such as "0.75"."""

PositiveDecimal = Annotated[str, Field(pattern=r"^[0-9]{1,9}(\.[0-9]{1,4})?$", max_length=16)]
"""A decimal number that is not negative, as a string, such as "4" or "2.5"."""


def parse_quantity(value: str | int) -> Decimal:
    """The exact value of a Kubernetes quantity in its base unit. Raises ValueError for anything else."""
    text = str(value)
    if not re.match(QUANTITY_PATTERN, text):
        raise ValueError(f"not a Kubernetes quantity: {text!r}")
    number = text.rstrip("KMGTPEinumk")
    suffix = text[len(number) :]
    return Decimal(number) * _SUFFIX[suffix]


def format_bytes(value: int | float) -> str:
    """Bytes for people, in binary units: 4.9Gi."""
    amount = float(value)
    for unit in ("", "Ki", "Mi", "Gi"):
        if abs(amount) < 1024:
            return f"{amount:.0f}{unit}" if unit == "" else f"{amount:.1f}{unit}"
        amount /= 1024
    return f"{amount:.1f}Ti"
