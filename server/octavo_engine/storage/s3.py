"""`s3://BUCKET/PREFIX` and `s3://BUCKET/PATH/FILE.gguf`: object stores that speak S3 (AWS, MinIO, Ceph, R2).

The minio package lists objects and signs addresses; the download itself is the one every source uses. Credentials:
AWS_ACCESS_KEY_ID and its kin, `~/.aws/credentials`, the role of a Kubernetes service account, container or machine;
without any, the bucket is read anonymously. AWS_ENDPOINT_URL names a store other than Amazon's.
"""

from __future__ import annotations

import os
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from octavo_engine.errors import ModelLoadError
from octavo_engine.storage.cache import ModelCache
from octavo_engine.storage.http import HttpClient, RemoteFile
from octavo_engine.storage.progress import OnProgress
from octavo_engine.storage.safe_path import relative_name
from octavo_engine.storage.selection import choose_files, model_name
from octavo_engine.storage.transfer import download_all
from octavo_engine.storage.uri import StorageURI

if TYPE_CHECKING:
    from minio import Minio
    from minio.credentials.providers import Provider

MAX_OBJECTS = 10_000
ADDRESS_LIFETIME = timedelta(hours=12)
DENIED = ("AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "AllAccessDisabled")
MISSING = ("NoSuchKey", "NoSuchBucket", "NoSuchObject")


def fetch(uri: StorageURI, cache: ModelCache, on_progress: OnProgress) -> Path:
    """The cached model of a bucket; raises `ModelLoadError`."""
    bucket, _, key = uri.location.partition("/")
    key = key.strip("/")
    if not bucket:
        raise ModelLoadError(f"model {uri.text!r}: expected s3://BUCKET/PREFIX or s3://BUCKET/PATH/FILE.gguf")

    def fill(folder: Path) -> str:
        on_progress(0.0, f"asking for {uri.text}")
        with _explained(uri.text):
            store = _store()
            files = _one_file(store, bucket, key) if key.lower().endswith(".gguf") else _many(store, bucket, key, uri)
        name = model_name(uri.text, [file.name for file in files])
        download_all(HttpClient(), files, folder, uri.text, on_progress)
        return name

    return cache.obtain(uri.text, uri.text, fill, on_progress)


def _store() -> Minio:
    try:
        from minio import Minio
    except ModuleNotFoundError as error:
        raise ModelLoadError("s3:// needs the Python package minio; pip install 'octavo[s3]' to get it") from error
    address = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "https://s3.amazonaws.com"
    parts = urllib.parse.urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ModelLoadError(f"AWS_ENDPOINT_URL: must be an http or https address, got {address!r}")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or None
    return Minio(parts.netloc, secure=parts.scheme == "https", region=region, credentials=_credentials())


def _credentials() -> Provider | None:
    """The first provider that has any; None reads anonymously."""
    import urllib3
    from minio.credentials.providers import AWSConfigProvider, ChainedProvider, EnvAWSProvider, IamAwsProvider

    quick = urllib3.PoolManager(timeout=2.0, retries=False)  # most machines have no metadata service to answer
    chain = ChainedProvider([EnvAWSProvider(), AWSConfigProvider(), IamAwsProvider(http_client=quick)])
    try:
        chain.retrieve()
    except (ValueError, OSError, urllib3.exceptions.HTTPError):
        return None
    return chain


def _one_file(store: Minio, bucket: str, key: str) -> list[RemoteFile]:
    size = store.stat_object(bucket, key).size
    return [RemoteFile(_address(store, bucket, key), key.rpartition("/")[2], num_bytes=size)]


def _many(store: Minio, bucket: str, prefix: str, uri: StorageURI) -> list[RemoteFile]:
    start = f"{prefix}/" if prefix else ""
    sizes: dict[str, int | None] = {}
    for item in store.list_objects(bucket, prefix=start, recursive=True):
        name = (item.object_name or "").removeprefix(start)
        if name and not name.endswith("/"):
            sizes[name] = item.size
        if len(sizes) > MAX_OBJECTS:
            raise ModelLoadError(f"model {uri.text!r}: more than {MAX_OBJECTS} objects; name the model's own folder")
    chosen = choose_files(uri.text, list(sizes), uri.text.rstrip("/"))
    for name in chosen:
        relative_name(name)
    return [RemoteFile(_address(store, bucket, start + name), name, num_bytes=sizes[name]) for name in chosen]


def _address(store: Minio, bucket: str, key: str) -> str:
    address: str = store.presigned_get_object(bucket, key, expires=ADDRESS_LIFETIME)
    return address


@contextmanager
def _explained(uri: str) -> Iterator[None]:
    """The store's refusals with the next step."""
    import urllib3

    try:
        yield
    except ModelLoadError:
        raise
    except (ValueError, OSError, urllib3.exceptions.HTTPError) as error:
        todo = "the store cannot be reached: check the network and AWS_ENDPOINT_URL"
        raise ModelLoadError(f"{uri}: {todo} [{error}]") from error
    except Exception as error:
        code = getattr(error, "code", "") or ""
        if not type(error).__module__.startswith("minio"):
            raise
        if code in MISSING:
            todo = "no such bucket or object: check the address and AWS_ENDPOINT_URL"
        elif code in DENIED:
            todo = "access is denied: check AWS_ACCESS_KEY_ID, the role of the service account, and the bucket's policy"
        else:
            todo = "check AWS_ENDPOINT_URL and AWS_REGION"
        raise ModelLoadError(f"{uri}: {todo} [{code or type(error).__name__}]") from error
