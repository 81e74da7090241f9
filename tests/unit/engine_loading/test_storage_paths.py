"""Paths, file:// and mounted claims; names that try to get out."""

from __future__ import annotations

from pathlib import Path

import pytest

from octavo_engine.errors import ModelLoadError
from octavo_engine.storage import resolve
from octavo_engine.storage.safe_path import safe_join
from octavo_engine.storage.uri import parse_uri


def test_a_gguf_file_is_taken_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF")
    assert resolve(str(file)) == file
    assert resolve(f"file://{file}") == file
    assert resolve(f"file://localhost{file}") == file


def test_a_relative_path_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.chdir(tmp_path)
    assert resolve("m.gguf") == tmp_path / "m.gguf"


def test_percent_escapes_in_file_uris_are_decoded(tmp_path: Path) -> None:
    (tmp_path / "my model.gguf").write_bytes(b"GGUF")
    assert resolve(f"file://{tmp_path}/my%20model.gguf") == tmp_path / "my model.gguf"


def test_a_checkpoint_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert resolve(str(tmp_path)) == tmp_path


def test_a_folder_with_one_gguf_file_stands_for_it(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    assert resolve(str(tmp_path)) == tmp_path / "a.gguf"


def test_a_folder_with_two_gguf_files_asks_which(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(ModelLoadError, match=r"name one of: a\.gguf, b\.gguf"):
        resolve(str(tmp_path))


def test_an_empty_folder_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"neither config\.json nor"):
        resolve(str(tmp_path))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt", "model.pkl"])
def test_pickles_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04")
    with pytest.raises(ModelLoadError, match="pickle"):
        resolve(str(tmp_path / name))


def test_something_that_looks_like_a_hub_name_gets_a_hint() -> None:
    with pytest.raises(ModelLoadError, match="hf://some-org/some-model"):
        resolve("some-org/some-model")


@pytest.mark.parametrize(("uri", "message"), [("", "empty"), ("ftp://b/k", "not known"), ("hf://a\x00b/c", "control")])
def test_uris_that_mean_nothing_are_refused(uri: str, message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        parse_uri(uri)


def test_secrets_of_web_addresses_are_not_shown() -> None:
    uri = parse_uri("https://user:secret@host/m.gguf?sig=hush#sha256=ab")
    assert uri.public_text == "https://host/m.gguf"


def test_a_claim_is_read_where_it_is_mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCTAVO_PVC_ROOT", str(tmp_path))
    (tmp_path / "models" / "llama").mkdir(parents=True)
    (tmp_path / "models" / "llama" / "config.json").write_text("{}")
    assert resolve("pvc://models/llama") == tmp_path / "models" / "llama"
    with pytest.raises(ModelLoadError, match="holds no 'other'"):
        resolve("pvc://models/other")
    with pytest.raises(ModelLoadError, match="not mounted at"):
        resolve("pvc://elsewhere/llama")


def test_a_link_out_of_a_claim_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "config.json").write_text("{}")
    claim = tmp_path / "root" / "claim"
    claim.mkdir(parents=True)
    (claim / "link").symlink_to(outside)
    monkeypatch.setenv("OCTAVO_PVC_ROOT", str(tmp_path / "root"))
    with pytest.raises(ModelLoadError, match="leads out of"):
        resolve("pvc://claim/link")


ESCAPES = [
    "../x",
    "a/../../x",
    "/etc/passwd",
    "a//b",
    "./x",
    "a/./b",
    "a/..",
    "..",
    ".",
    "",
    "a\\..\\b",
    "C:/x",
    "c:x",
    "a\x00b",
    "a\nb",
    "a\x7fb",
    "\u202ex",
    "x" * 300,
    "/".join(["d" * 200] * 10),
    *(
        form.format(step)
        for step in ("..", "../..", "..\\..", "/etc", "//host/share", "C:\\x", "\\\\host\\x")
        for form in (
            "{}/etc/passwd",
            "a/{}/b",
            "a/b/{}",
            "{}",
            "models/{}/../x",
            "./{}",
            "{}/./x",
            "{}//x",
            "a\x00{}/..",
            "{}\r\n/..",
            "{}/.. ",
            "\ufeff{}/../x",
        )
    ),
]


@pytest.mark.parametrize("name", ESCAPES)
def test_names_that_could_leave_their_folder_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelLoadError, match="is refused"):
        safe_join(tmp_path, name)


def test_the_corpus_has_a_hundred_names() -> None:
    assert len(set(ESCAPES)) >= 100


@pytest.mark.parametrize("name", ["a", "a/b.gguf", "..a", "a..b", "日本.gguf", "-x", "a b"])
def test_plain_names_are_joined(tmp_path: Path, name: str) -> None:
    assert safe_join(tmp_path, name) == tmp_path / name
