"""What tokens cost: per million, by model, with a price for prompt tokens that were already cached."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from octavo_gateway.errors import ConfigError


class Price(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"):
    """Per million tokens, in one currency of the installation. `cached_input` defaults to `input`."""

    input: float = 0.0
    output: float = 0.0
    cached_input: float | None = None

    def cost(self, prompt_tokens: int, cached_tokens: int, output_tokens: int) -> float:
        """Cost of one request."""
        cached_price = self.input if self.cached_input is None else self.cached_input
        fresh = prompt_tokens - cached_tokens
        return (fresh * self.input + cached_tokens * cached_price + output_tokens * self.output) / 1e6


class PriceTable:
    """Prices by model name; `*` is the price of all others. What has no price costs nothing."""

    def __init__(self, prices: Mapping[str, Price] | None = None) -> None:
        self._prices = dict(prices or {})

    @classmethod
    def parse(cls, values: Mapping[str, Any], where: str) -> PriceTable:
        """Read `prices:` of the config file; raises `ConfigError`."""
        try:
            prices = msgspec.convert(dict(values), dict[str, Price])
        except msgspec.ValidationError as error:
            raise ConfigError(f"{where}: prices: {error}") from error
        for model, price in prices.items():
            if min(price.input, price.output, price.cached_input or 0.0) < 0:
                raise ConfigError(f"{where}: prices.{model}: must not be negative")
        return cls(prices)

    def cost(self, model: str, prompt_tokens: int, cached_tokens: int, output_tokens: int) -> float:
        """Cost of one request to a model."""
        price = self._prices.get(model) or self._prices.get("*")
        return price.cost(prompt_tokens, cached_tokens, output_tokens) if price else 0.0
