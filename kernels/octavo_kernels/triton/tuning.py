"""Launch configurations: measured ones from a small file for each device, defaults where none was measured.

Nothing is tuned while serving: `octavo tune` measures and writes the file, kernels only look it up.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

_log = logging.getLogger(__name__)

ENV_CONFIG_DIR = "OCTAVO_TUNED_DIR"
SHIPPED_DIR = Path(__file__).parent / "configs"


@dataclass(frozen=True, slots=True)
class LaunchConfig:
    """Tile sizes and launch shape of a kernel; each kernel reads the fields it has a use for.

    block_m, block_n, block_k: rows, columns (or keys) and depth of a tile. splits: how many programs share one
    reduction, 0 lets the kernel decide.
    """

    block_m: int = 16
    block_n: int = 64
    block_k: int = 64
    num_warps: int = 4
    num_stages: int = 2
    splits: int = 0


class TunedConfigError(ValueError):
    """A file of tuned configurations cannot be read; the message names the file and the entry."""


Table = dict[str, dict[str, LaunchConfig]]  # kernel -> key -> configuration


_recorded: dict[tuple[str, str], LaunchConfig] | None = None
_trials: dict[tuple[str, str], LaunchConfig] = {}


def launch_config(kernel: str, key: str, device: torch.device, default: LaunchConfig) -> LaunchConfig:
    """The measured configuration of `kernel` for the shape named `key`, else `default`."""
    if _recorded is not None:
        _recorded[kernel, key] = default
    if _trials and (kernel, key) in _trials:
        return _trials[kernel, key]
    return device_table(_device_name(device)).get(kernel, {}).get(key, default)


@contextlib.contextmanager
def recording() -> Iterator[dict[tuple[str, str], LaunchConfig]]:
    """Collect what is looked up inside the block: (kernel, key) -> its default. For the tuner, not concurrent."""
    global _recorded
    _recorded = {}
    try:
        yield _recorded
    finally:
        _recorded = None


@contextlib.contextmanager
def trial(kernel: str, key: str, config: LaunchConfig) -> Iterator[None]:
    """Use `config` for this kernel and key inside the block. For the tuner, not concurrent."""
    _trials[kernel, key] = config
    try:
        yield
    finally:
        del _trials[kernel, key]


@functools.cache
def device_table(device_name: str) -> Table:
    """All measured configurations of a device: the user's file if there is one, else the shipped one."""
    for folder in (user_dir(), SHIPPED_DIR):
        path = folder / file_name(device_name)
        if path.is_file():
            _log.info("kernel configurations for %s from %s", device_name, path)
            return read_table(path)
    return {}


def user_dir() -> Path:
    """Where `octavo tune` writes: $OCTAVO_TUNED_DIR, else the cache folder of the user."""
    chosen = os.environ.get(ENV_CONFIG_DIR)
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "octavo" / "tuned"


def file_name(device_name: str) -> str:
    """`NVIDIA H200` -> `nvidia_h200.json`."""
    return re.sub(r"[^a-z0-9]+", "_", device_name.lower()).strip("_") + ".json"


def read_table(path: Path) -> Table:
    """Parse a file written by `write_table`; unknown fields and wrong types are refused."""
    try:
        kernels = json.loads(path.read_text())["kernels"]
        return {name: {key: _parse(values) for key, values in keys.items()} for name, keys in kernels.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise TunedConfigError(f"{path}: not a file of tuned configurations ({error}); run `octavo tune`") from error


def write_table(path: Path, device_name: str, versions: dict[str, str], table: Table) -> None:
    """Write atomically, sorted, so that two runs differ only where the measurements do."""
    kernels = {name: {key: asdict(config) for key, config in sorted(table[name].items())} for name in sorted(table)}
    text = json.dumps({"device": device_name, "versions": versions, "kernels": kernels}, indent=1) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)


def _parse(values: dict[str, int]) -> LaunchConfig:
    known = {field.name for field in fields(LaunchConfig)}
    unknown = set(values) - known
    if unknown:
        raise ValueError(f"unknown fields {sorted(unknown)}")
    if not all(isinstance(value, int) and value >= 0 for value in values.values()):
        raise ValueError(f"fields must be integers of at least 0: {values}")
    return LaunchConfig(**values)


@functools.cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
