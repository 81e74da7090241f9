"""Several worker processes behind one address: started, replaced and drained by a parent, speaking with one voice."""

from octavo_gateway.workers.peers import Peers
from octavo_gateway.workers.seat import Seat
from octavo_gateway.workers.supervisor import run_workers

__all__ = ["Peers", "Seat", "run_workers"]
