"""`hf://ORG/REPO[@REV][/FILE]`: models of the Hugging Face hub, through its HTTP API.

Honours HF_TOKEN, HF_HOME (its token file and its cache of earlier downloads), HF_ENDPOINT and HF_HUB_OFFLINE.
Only weights in safetensors or GGUF and the text files around them are fetched: never pickles, never code.
"""

from __future__ import annotations

import os
import re
import urllib.parse
from dataclasses import dataclass
from pathlib import Path

import msgspec

from octavo_engine.errors import ModelLoadError
from octavo_engine.storage.cache import ModelCache, home_folder
from octavo_engine.storage.http import HttpClient, RemoteError, RemoteFile
from octavo_engine.storage.progress import OnProgress
from octavo_engine.storage.safe_path import relative_name, safe_join
from octavo_engine.storage.selection import choose_files, listed, model_name
from octavo_engine.storage.transfer import download_all
from octavo_engine.storage.uri import StorageURI

NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]*")
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class HubModel:
    """A repository of the hub at a revision, or one file of it."""

    repo: str
    revision: str
    file: str | None

    @property
    def uri(self) -> str:
        return f"hf://{self.repo}@{self.revision}" + (f"/{self.file}" if self.file else "")


class LargeFile(msgspec.Struct, frozen=True):
    """Git LFS facts of a file."""

    sha256: str


class RepoFile(msgspec.Struct, frozen=True, rename={"name": "rfilename", "blob_id": "blobId"}):
    """One file of a repository, as the hub's API lists it."""

    name: str
    size: int | None = None
    blob_id: str | None = None
    lfs: LargeFile | None = None


class RepoInfo(msgspec.Struct, frozen=True):
    """The part of the hub's answer on a revision that we use."""

    sha: str
    siblings: list[RepoFile]


def parse(uri: StorageURI, revision: str | None) -> HubModel:
    """Take `ORG/REPO[@REV][/FILE]` apart; raises `ModelLoadError`. A revision with slashes comes as `revision`."""
    match = re.fullmatch(rf"({NAME}/{NAME})(?:@([^/]+))?(?:/(.+))?", uri.location)
    if match is None:
        raise ModelLoadError(f"model {uri.text!r}: expected hf://ORG/REPO, hf://ORG/REPO@REVISION or .../FILE.gguf")
    repo, named_revision, file = match.groups()
    chosen = named_revision or revision or "main"
    if not REVISION.fullmatch(chosen) or ".." in chosen:
        raise ModelLoadError(f"model {uri.text!r}: {chosen!r} is no Git revision")
    if file is not None:
        relative_name(file)
        if not file.lower().endswith(".gguf"):
            raise ModelLoadError(f"model {uri.text!r}: a single file must be a .gguf file; name the repository instead")
    return HubModel(repo, chosen, file)


def fetch(uri: StorageURI, revision: str | None, cache: ModelCache, on_progress: OnProgress) -> Path:
    """The model in our cache, in the hub's own cache, or downloaded; raises `ModelLoadError`."""
    model = parse(uri, revision)
    if (known := _in_hub_cache(model)) is not None:
        return known

    def fill(folder: Path) -> str:
        return _download(model, folder, on_progress)

    return cache.obtain(f"{_endpoint()}|{model.uri}", model.uri, fill, on_progress)


# ---------------------------------------------------------------- download


def _download(model: HubModel, folder: Path, on_progress: OnProgress) -> str:
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise ModelLoadError(f"{model.uri}: not in the cache, and HF_HUB_OFFLINE forbids to download it")
    token = _token()
    client = HttpClient({"Authorization": f"Bearer {token}"} if token else None)
    try:
        on_progress(0.0, f"asking the hub for {model.uri}")
        info = _repo_info(model, client)
        wanted = _wanted(model, [file.name for file in info.siblings])
        name = model_name(model.uri, wanted)
        _forget_other_commit(folder, info.sha)
        by_name = {file.name: file for file in info.siblings}
        files = [_remote_file(model, info.sha, by_name[name]) for name in wanted]
        download_all(client, files, folder, model.uri, on_progress)
    except RemoteError as error:
        raise ModelLoadError(_advice(model, error, has_token=token is not None)) from error
    return name


def _repo_info(model: HubModel, client: HttpClient) -> RepoInfo:
    revision = urllib.parse.quote(model.revision, safe="")
    body = client.read(f"{_endpoint()}/api/models/{model.repo}/revision/{revision}?blobs=true")
    try:
        info = msgspec.json.decode(body, type=RepoInfo)
    except msgspec.DecodeError as error:
        raise ModelLoadError(f"{model.uri}: {_endpoint()} does not answer like a model hub ({error})") from error
    if not COMMIT.fullmatch(info.sha):
        raise ModelLoadError(f"{model.uri}: {_endpoint()} named an impossible commit {info.sha!r}")
    return info


def _remote_file(model: HubModel, commit: str, file: RepoFile) -> RemoteFile:
    return RemoteFile(
        url=f"{_endpoint()}/{model.repo}/resolve/{commit}/{urllib.parse.quote(file.name)}",
        name=file.name,
        num_bytes=file.size,
        sha256=file.lfs.sha256 if file.lfs else None,
        git_blob_sha1=file.blob_id if file.lfs is None else None,
    )


def _wanted(model: HubModel, names: list[str]) -> list[str]:
    if model.file is None:
        return choose_files(model.uri, names, f"hf://{model.repo}")
    if model.file in names:
        return [model.file]
    gguf_files = sorted(name for name in names if name.lower().endswith(".gguf"))
    raise ModelLoadError(f"{model.uri}: no such file; the repository's GGUF files: {listed(gguf_files)}")


def _forget_other_commit(folder: Path, commit: str) -> None:
    """Files of an interrupted download belong together only when the branch has not moved since."""
    stamp = folder / ".commit"
    if not stamp.exists() or stamp.read_text() != commit:
        for path in sorted(folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        stamp.write_text(commit)


def _advice(model: HubModel, error: RemoteError, *, has_token: bool) -> str:
    match error.status:
        case 401 | 403 if has_token:
            todo = (
                f"the token was not accepted for it: ask for access on {_endpoint()}/{model.repo}, "
                "and check that the token may read gated repositories"
            )
        case 401 | 403:
            todo = (
                "it does not exist, or is private or gated: check the name, or set HF_TOKEN to a token with access "
                f"(accept the licence on {_endpoint()}/{model.repo} first)"
            )
        case 404:
            todo = f"there is no such repository, revision {model.revision!r} or file: check the name"
        case 429:
            todo = "the hub limits requests from this address: wait some minutes, set HF_TOKEN, or use a mirror"
        case 0:
            todo = "without a network, set HF_ENDPOINT to a mirror, or copy the model here and give its path"
        case _:
            todo = "the hub may have trouble: try again later, or set HF_ENDPOINT to a mirror"
    return f"{model.uri}: {todo} [{error}]"


# ---------------------------------------------------------------- what the environment says


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def _home() -> Path:
    for variable, inside in (("HF_HOME", ""), ("XDG_CACHE_HOME", "huggingface")):
        if os.environ.get(variable):
            return Path(os.environ[variable]).expanduser() / inside
    return home_folder() / ".cache" / "huggingface"


def _token() -> str | None:
    token = os.environ.get("HF_TOKEN", "").strip()
    if not token:
        path = Path(os.environ.get("HF_TOKEN_PATH", _home() / "token"))
        token = path.read_text().strip() if path.is_file() else ""
    return token or None


def _in_hub_cache(model: HubModel) -> Path | None:
    """A whole snapshot that the hub's own tools left in HF_HOME; None unless everything needed is there."""
    hub_cache = Path(os.environ.get("HF_HUB_CACHE", _home() / "hub"))
    repo = hub_cache / f"models--{model.repo.replace('/', '--')}"
    ref = safe_join(repo, f"refs/{model.revision}") if repo.is_dir() else repo
    commit = ref.read_text().strip() if ref.is_file() else model.revision
    snapshot = repo / "snapshots" / commit
    if not COMMIT.fullmatch(commit) or not snapshot.is_dir():
        return None
    if model.file is not None:
        path = snapshot / relative_name(model.file)
        return path if path.is_file() else None
    has_tokenizer = (snapshot / "config.json").is_file() and (snapshot / "tokenizer.json").is_file()
    return snapshot if has_tokenizer and _has_all_weights(snapshot) else None


def _has_all_weights(snapshot: Path) -> bool:
    index = snapshot / "model.safetensors.index.json"
    if not index.is_file():
        return (snapshot / "model.safetensors").is_file()
    try:
        shards = set(msgspec.json.decode(index.read_bytes())["weight_map"].values())
        return all((snapshot / relative_name(name)).is_file() for name in shards)
    except (msgspec.DecodeError, KeyError, TypeError, AttributeError):
        return False
