"""Tenants: who asks (hashed API keys), for what (allowed models), and how much (limits, weights, priorities)."""

from octavo_gateway.tenancy.keys import hash_key, new_key
from octavo_gateway.tenancy.limiter import Limiter, Reservation
from octavo_gateway.tenancy.tenant import Identity, KeyRecord, Limits, Tenant, TenantDirectory

__all__ = [
    "Identity",
    "KeyRecord",
    "Limiter",
    "Limits",
    "Reservation",
    "Tenant",
    "TenantDirectory",
    "hash_key",
    "new_key",
]
