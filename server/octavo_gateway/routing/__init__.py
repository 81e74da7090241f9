"""Routing policies: pure functions from candidates and a request to one endpoint and the reason it was chosen."""

from octavo_gateway.routing.policy import Candidate, Choice, Policy, RouteRequest
from octavo_gateway.routing.prefix_index import BLOCK_TOKENS, PREFIX, PrefixIndex, chain_hashes, prefix_value
from octavo_gateway.routing.strategies import Router

__all__ = [
    "BLOCK_TOKENS",
    "PREFIX",
    "Candidate",
    "Choice",
    "Policy",
    "PrefixIndex",
    "RouteRequest",
    "Router",
    "chain_hashes",
    "prefix_value",
]
