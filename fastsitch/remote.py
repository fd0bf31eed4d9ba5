"""Folders of an object store: s3://BUCKET/PREFIX. It knows no rename, no lock and no flush; what is put is whole.

Credentials, region and endpoint come from the environment: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY,
AWS_SESSION_TOKEN, AWS_REGION, AWS_ENDPOINT_URL.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastsitch.errors import ConfigError, FailedError

_SCHEME = "s3://"
_REQUESTS = 32
"""Small requests that are under way at once."""


@dataclass(frozen=True)
class RemoteFolder:
    """A folder below a bucket; its files have names relative to it, such as ``train/0/0.0.0.0``.

    ``locks`` is the folder on a disk whose lock files stand for it. Methods raise ConfigError where access is denied,
    FailedError where the server fails. Can be pickled: connections belong to the process.
    """

    url: str
    locks: Path

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> "RemoteFolder":
        return RemoteFolder(f"{self.url}/{name}", self.locks)

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> "RemoteFolder":
        return RemoteFolder(self.url.rpartition("/")[0], self.locks)

    @property
    def store(self) -> Any:
        """The folder for obstore, which zarr can wrap."""
        return _connected(self.url)

    def exists(self) -> bool:
        """Whether it holds a store: a manifest is written last and removed first."""
        import obstore

        with self.answering():
            try:
                obstore.head(self.store, "manifest.json")
            except FileNotFoundError:
                return False
            return True

    def sizes(self) -> dict[str, int]:
        """Size of every file."""
        import obstore

        with self.answering():
            return {
                entry["path"]: entry["size"] for page in obstore.list(self.store, chunk_size=1000) for entry in page
            }

    def read(self, name: str) -> bytes:
        """A whole file; raises FileNotFoundError."""
        import obstore

        with self.answering():
            return bytes(obstore.get(self.store, name).bytes())

    def tails(self, sizes: dict[str, int], count: int) -> dict[str, bytes]:
        """The last bytes of files of these sizes; raises FileNotFoundError."""
        import obstore

        def tail(name: str) -> bytes:
            return bytes(obstore.get_range(self.store, name, start=sizes[name] - count, length=count))

        with self.answering(), ThreadPoolExecutor(_REQUESTS) as executor:
            return dict(zip(sizes, executor.map(tail, sizes), strict=True))

    def write(self, name: str, content: bytes) -> None:
        """Write a file: afterwards it is there wholly, or as before."""
        import obstore

        with self.answering():
            obstore.put(self.store, name, content)

    def remove(self, *names: str) -> None:
        """Remove some files, or all: the manifest first, so that a store that is partly removed does not exist."""
        import obstore

        own = sorted(names or self.sizes(), key=lambda name: name != "manifest.json")
        with self.answering():
            for some in (own[:1], own[1:]):
                if some:
                    obstore.delete(self.store, some)

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Errors of obstore as our own."""
        from obstore.exceptions import BaseError

        try:
            yield
        except BaseError as error:
            raise _refusal(self.url, error) from None


Place = Path | RemoteFolder
"""Where a store lies."""


def remote_folder(url: str, locks: Path) -> RemoteFolder:
    """The folder of this name; raises ConfigError where it is none, or obstore is missing."""
    bucket, *parts = url.removeprefix(_SCHEME).rstrip("/").split("/")
    if not url.startswith(_SCHEME) or not bucket or "" in parts:
        raise ConfigError(f"--activations {url}: expected s3://BUCKET, s3://BUCKET/PREFIX, or a folder")
    if find_spec("obstore") is None:
        raise ConfigError(f"--activations {url} needs obstore, which is not installed: pip install 'fastsitch[s3]'")
    return RemoteFolder(url.rstrip("/"), locks)


@cache
def reached(folder: RemoteFolder) -> RemoteFolder:
    """The same folder; raises ConfigError unless the bucket is there and lets us in."""
    import obstore

    url = folder.url
    bucket = url.removeprefix(_SCHEME).partition("/")[0]
    impatient = _open(folder.url, retry_config={"max_retries": 1, "retry_timeout": timedelta(seconds=10)})
    try:
        next(iter(obstore.list(impatient, chunk_size=1)), None)
    except (obstore.exceptions.BaseError, FileNotFoundError) as error:
        if "NoSuchBucket" in str(error):
            raise ConfigError(f"--activations {url}: there is no bucket {bucket!r}{_where()}") from None
        refusal = _refusal(folder.url, error)
        if isinstance(refusal, ConfigError):
            raise refusal from None
        raise ConfigError(
            f"--activations {url}: no answer{_where()} ({_first_line(error)}); expected an S3 server, as "
            "AWS_ENDPOINT_URL and AWS_REGION say, and credentials"
        ) from None
    return folder


@cache
def _connected(url: str) -> Any:
    return _open(url)


def _open(url: str, **options: Any) -> Any:
    from obstore.store import S3Store

    # plain http only to a server that was named so
    plain = _endpoint().startswith("http://")
    return S3Store.from_url(url, client_options={"allow_http": plain, "connect_timeout": "5s"}, **options)


def _endpoint() -> str:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""


def _where() -> str:
    return f" at {_endpoint()}" if _endpoint() else ""


def _refusal(url: str, error: Exception) -> ConfigError | FailedError:
    from obstore.exceptions import PermissionDeniedError, UnauthenticatedError

    # listing has no error of its own for it
    denied = any(status in str(error) for status in ("401 Unauthorized", "403 Forbidden"))
    if denied or isinstance(error, PermissionDeniedError | UnauthenticatedError):
        return ConfigError(
            f"--activations {url}: access denied{_where()}; expected AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY of "
            "someone who may list, read, write and delete there"
        )
    return FailedError(f"{url}: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
