"""Counter-based random numbers: a draw depends on (seed, index, stream) and on nothing else.

A seeded sequence therefore draws the same numbers in any batch, on any device and after a preemption. The mixing
function is the finaliser of SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014).
"""

from __future__ import annotations

from hashlib import blake2b

_MASK = (1 << 64) - 1


def uniform(seed: int, index: int, stream: int = 0) -> float:
    """A number in [0, 1) with 53 random bits for draw `index` of the sequence that owns `seed`."""
    state = _mix(seed & _MASK)
    state = _mix(state ^ _mix((index << 8) + stream + 1))
    return (state >> 11) * 2.0**-53


def request_seed(engine_seed: int, request_id: str) -> int:
    """The seed of a request that names none: fixed by the engine's seed and the request's id."""
    data = f"{engine_seed}:{request_id}".encode()
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")


def _mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
