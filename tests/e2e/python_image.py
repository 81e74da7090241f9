"""A container image of this very Python environment, so that a real node can run octavo without a registry."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SOURCES = ("operator", "server", "kernels", "tests", "pyproject.toml")
# What no replica needs, of the large packages.
LEFT_OUT = ("triton", "transformers", "mypy", "onnx", "onnxruntime", "hypothesis", "pip", "ruff", "__pycache__")
ENVIRONMENT = ("bin", "lib", "lib64", "pyvenv.cfg")
LINKS = (("usr/bin", "bin"), ("usr/lib", "lib"), ("usr/lib64", "lib64"))


def write_image(path: Path, names: Iterable[str]) -> None:
    """Write a Docker archive whose files lie where they lie on this machine, readable by every user."""
    layer = path.with_suffix(".layer")
    with tarfile.open(layer, "w") as tar:
        _add_folders(tar)
        for library in sorted(_libraries()):
            _add(tar, library.resolve(), library)
        _add(tar, Path(sys.base_prefix))
        for part in ENVIRONMENT:
            _add(tar, Path(sys.prefix, part))
        for source in SOURCES:
            _add(tar, ROOT / source)
    with layer.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    config = json.dumps(_config(digest)).encode()
    config_name = f"{hashlib.sha256(config).hexdigest()}.json"
    manifest = [{"Config": config_name, "RepoTags": list(names), "Layers": ["layer.tar"]}]
    with tarfile.open(path, "w") as tar:
        tar.add(layer, "layer.tar")
        for name, content in ((config_name, config), ("manifest.json", json.dumps(manifest).encode())):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    layer.unlink()


def _config(digest: str) -> dict[str, Any]:
    wait = [sys.executable, "-c", "import signal; signal.pause()"]  # as the pause image of every pod
    environment = {
        "PATH": f"{sys.prefix}/bin",
        "PYTHONPATH": str(ROOT / "tests"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "LD_LIBRARY_PATH": f"{sys.base_prefix}/lib",
    }
    return {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Env": [f"{k}={v}" for k, v in environment.items()], "Entrypoint": wait},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]},
        "history": [{}],
    }


def _add_folders(tar: tarfile.TarFile) -> None:
    for name in ("tmp", "etc", "proc", "sys", "dev", "usr", "usr/bin", "usr/lib", "usr/lib64", "var", "var/cache"):
        entry = tarfile.TarInfo(name)
        entry.type, entry.mode = tarfile.DIRTYPE, 0o1777 if name == "tmp" else 0o755
        tar.addfile(entry)
    for target, link in LINKS:
        entry = tarfile.TarInfo(link)
        entry.type, entry.linkname = tarfile.SYMTYPE, target
        tar.addfile(entry)


def _add(tar: tarfile.TarFile, path: Path, name: Path | None = None) -> None:
    def readable(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        if any(part in LEFT_OUT for part in Path(entry.name).parts[-1:]):
            return None
        entry.uid = entry.gid = 0
        entry.uname = entry.gname = ""
        entry.mode |= 0o755 if entry.isdir() or entry.mode & 0o100 else 0o444
        return entry

    tar.add(path, str(name or path).lstrip("/"), filter=readable)


def _libraries() -> set[Path]:
    """Shared libraries outside Python's own folders that Python and its extensions need, and the dynamic loader."""
    own = (Path(sys.base_prefix), Path(sys.prefix))
    extensions = [Path(sys.executable).resolve(), *Path(sysconfig.get_path("stdlib"), "lib-dynload").glob("*.so")]
    extensions += [p for p in Path(sysconfig.get_path("purelib")).rglob("*.so*") if not set(LEFT_OUT) & set(p.parts)]
    output = subprocess.run(["ldd", *map(str, extensions)], capture_output=True, text=True).stdout
    found = set()
    for line in output.splitlines():
        words = line.split()
        candidates = [Path(word) for word in words if word.startswith("/") and not word.endswith(":")]
        found |= {p for p in candidates if p.is_file() and not any(p.is_relative_to(prefix) for prefix in own)}
    return {Path("/usr", *p.parts[1:]) if p.parts[1] in ("lib", "lib64") else p for p in found}
