"""Orders from the first rank to all others."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from octavo_engine.parallel.communicator import Communicator
from octavo_engine.parallel.steps import Numbers, Order

_FIRST = 1_024  # numbers of the first message: a small step needs no second one


def send_order(control: Communicator, order: Order, numbers: Numbers | None = None) -> list[Callable[[], None]]:
    """Called by the first rank; the others call `receive_order`. Returns what waits until all of them have it."""
    payload = np.zeros(0, dtype=np.int32) if numbers is None else numbers
    first = np.zeros(_FIRST, dtype=np.int32)
    first[:2] = order, len(payload)
    room = min(len(payload), _FIRST - 2)
    first[2 : 2 + room] = payload[:room]
    messages = [first, payload[room:]] if room < len(payload) else [first]
    return [control.announce(torch.from_numpy(np.ascontiguousarray(message))) for message in messages]


def receive_order(control: Communicator) -> tuple[Order, Numbers]:
    """Waits for the first rank. Raises `RuntimeError` when it is gone."""
    first = np.zeros(_FIRST, dtype=np.int32)
    control.broadcast(torch.from_numpy(first))
    length = int(first[1])
    if length <= _FIRST - 2:
        return Order(int(first[0])), first[2 : 2 + length]
    rest = np.zeros(length - (_FIRST - 2), dtype=np.int32)
    control.broadcast(torch.from_numpy(rest))
    return Order(int(first[0])), np.concatenate((first[2:], rest))
