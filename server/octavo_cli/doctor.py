"""`octavo doctor`: what this machine can do, what Octavo chose for it, and what is missing."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Finding:
    """One fact: `state` is ok, warn or fail; `hint` says what to do about the latter two."""

    subject: str
    state: str
    detail: str
    hint: str = ""


def doctor(
    output: Annotated[str, typer.Option("--output", "-o", help="text or json.")] = "text",
) -> None:
    """Say what this machine can do, what Octavo chose for it, and what is missing.

    Exits 1 when something stops models from being served here.
    """
    findings = examine()
    if output == "json":
        typer.echo(json.dumps([asdict(f) for f in findings], indent=2))
    elif output == "text":
        _print(findings)
    else:
        typer.echo(f"--output: must be text or json, got {output!r}", err=True)
        raise typer.Exit(2)
    raise typer.Exit(1 if any(f.state == "fail" for f in findings) else 0)


def examine() -> list[Finding]:
    """Look at Python, packages, processors, memory, accelerators, kernels and the model cache."""
    findings = [_python(), *_packages(), _cpu(), _memory()]
    if importlib.util.find_spec("torch") is not None:
        findings += [_accelerator(), *_kernels()]
    findings.append(_cache())
    return findings


def _python() -> Finding:
    supported = sys.version_info >= (3, 11)
    return Finding(
        "python",
        "ok" if supported else "fail",
        f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "" if supported else "Octavo needs Python 3.11 or newer",
    )


def _packages() -> list[Finding]:
    rows = []
    for name, needed_for in (("torch", "server"), ("fastapi", "server"), ("aiohttp", "gateway"), ("kopf", "operator")):
        try:
            rows.append(Finding(f"package {name}", "ok", version(name)))
        except PackageNotFoundError:
            state = "fail" if name == "torch" else "warn"
            rows.append(
                Finding(f"package {name}", state, "not installed", f"pip install 'octavo[{needed_for}]' to get it")
            )
    return rows


def _cpu() -> Finding:
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    flags = _cpu_flags()
    interesting = [f for f in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16") if f in flags]
    return Finding("cpu", "ok", f"{count} usable cores; {', '.join(interesting) or 'no vector extensions found'}")


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split(":", 1)[1].split()) for line in lines if line.startswith("flags")), set())


def _memory() -> Finding:
    if importlib.util.find_spec("psutil") is None:
        return Finding("memory", "warn", "unknown", "pip install 'octavo[server]' to get it measured")
    import psutil

    memory = psutil.virtual_memory()
    free_gib = memory.available / 2**30
    enough = free_gib >= 2
    return Finding(
        "memory",
        "ok" if enough else "warn",
        f"{free_gib:.1f} GiB free of {memory.total / 2**30:.1f} GiB",
        "" if enough else "below 2 GiB even a small model may not fit: close other programs",
    )


def _accelerator() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding("accelerator", "ok", "none: models run on the CPU")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return Finding("accelerator", "ok", ", ".join(names))


def _kernels() -> list[Finding]:
    from octavo_kernels import registry

    return [Finding(f"kernels {row.name}", row.state, row.detail, row.hint) for row in registry.describe_backends()]


def _cache() -> Finding:
    root = Path(os.environ.get("OCTAVO_CACHE_DIR", Path.home() / ".cache" / "octavo"))
    existing = next(p for p in (root, *root.parents) if p.exists())
    free_gib = shutil.disk_usage(existing).free / 2**30
    writable = os.access(existing, os.W_OK)
    return Finding(
        "model cache",
        "ok" if writable else "fail",
        f"{root}, {free_gib:.1f} GiB free",
        "" if writable else f"{existing} is not writable: set OCTAVO_CACHE_DIR to a folder that is",
    )


def _print(findings: list[Finding]) -> None:
    table = Table(box=None, pad_edge=False)
    for column in ("", "what", "found", "what to do"):
        table.add_column(column)
    marks = {"ok": "[green]✓[/]", "warn": "[yellow]![/]", "fail": "[red]✗[/]"}
    for finding in findings:
        table.add_row(marks[finding.state], finding.subject, finding.detail, finding.hint)
    Console().print(table)
