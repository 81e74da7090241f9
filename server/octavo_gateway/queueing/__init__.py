"""The line in front of the replicas: fair between tenants, ordered by priority and deadline, bounded."""

from octavo_gateway.queueing.fair_queue import FairQueue, Ticket

__all__ = ["FairQueue", "Ticket"]
