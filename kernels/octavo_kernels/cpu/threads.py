"""How many threads the kernels use: what the process may really have, not what the machine shows."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch

ENV_THREADS = "OCTAVO_CPU_THREADS"
ENV_PIN = "OCTAVO_CPU_PIN"


def usable_cpus(cgroup_root: Path = Path("/sys/fs/cgroup"), proc_cgroup: Path = Path("/proc/self/cgroup")) -> int:
    """CPUs this process may use: affinity mask, capped by the cgroup's CPU quota (rounded up), at least 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota(cgroup_root, proc_cgroup)
    return max(1, min(allowed, math.ceil(quota)) if quota else allowed)


def requested_threads() -> int:
    """The count that `OCTAVO_CPU_THREADS` asks for, else torch's (the engine's `num_threads`) up to the usable CPUs."""
    text = os.environ.get(ENV_THREADS, "").strip()
    if not text:
        return min(usable_cpus(), torch.get_num_threads())
    try:
        count = int(text)
    except ValueError:
        count = 0
    if count < 1:
        raise ValueError(f"{ENV_THREADS}: must be a whole number of at least 1, got {text!r}")
    return count


def pinning_requested() -> bool:
    """Whether worker threads are bound to one CPU each (`OCTAVO_CPU_PIN=1`)."""
    return os.environ.get(ENV_PIN, "").strip() in ("1", "true", "yes")


def _quota(cgroup_root: Path, proc_cgroup: Path) -> float | None:
    """CPUs' worth of time the tightest cgroup grants, None without a limit (cgroup v2, then v1)."""
    quotas = [_v2_limit(folder / "cpu.max") for folder in _own_folders(cgroup_root, proc_cgroup)]
    quotas.append(_v1_limit(cgroup_root / "cpu"))
    return min((quota for quota in quotas if quota), default=None)


def _own_folders(cgroup_root: Path, proc_cgroup: Path) -> list[Path]:
    """The folder of the process's cgroup and its parents up to the root."""
    try:
        lines = proc_cgroup.read_text().splitlines()
    except OSError:
        lines = []
    path = next((line[3:].strip("/") for line in lines if line.startswith("0::")), "")
    own = cgroup_root / path
    return [folder for folder in (own, *own.parents) if folder == cgroup_root or cgroup_root in folder.parents]


def _v2_limit(file: Path) -> float | None:
    try:
        quota, period = file.read_text().split()[:2]
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def _v1_limit(folder: Path) -> float | None:
    try:
        quota = int((folder / "cpu.cfs_quota_us").read_text())
        period = int((folder / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError):
        return None
    return quota / period if quota > 0 else None
