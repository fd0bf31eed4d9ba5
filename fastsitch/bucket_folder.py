"""Folders of an object store: s3://BUCKET/PREFIX. It knows no rename, no lock and no flush; what is put is whole.

Credentials, region and endpoint come from the environment: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY,
AWS_SESSION_TOKEN, AWS_REGION, AWS_ENDPOINT_URL.
"""

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from fastsitch.errors import ConfigError, FailedError, argument
from fastsitch.folders import MANIFEST, Folder

_SCHEME = "s3://"
_REQUESTS = 32
"""Small requests that are under way at once."""


@dataclass(frozen=True)
class BucketFolder(Folder):
    """A folder below a bucket, which is written in place: the manifest decides whether it is there as a store.

    ``locks`` is the folder on a disk, in the root, whose lock files stand for it. Methods raise ConfigError where
    access is denied, FailedError where the server fails. Connections belong to the process.
    """

    url: str
    locks: Path

    listable = False
    zarr_settings: ClassVar[Mapping[str, Any]] = {}

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> "BucketFolder":
        return BucketFolder(f"{self.url}/{name}", self.locks)

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> "BucketFolder":
        return BucketFolder(self.url.rpartition("/")[0], self.locks)

    def absolute(self) -> "BucketFolder":
        return BucketFolder(self.url, self.locks.absolute())

    def reached(self) -> "BucketFolder":
        return _reached(self)

    def exists(self) -> bool:
        import obstore

        with self.translating_errors():
            try:
                obstore.head(self._objects, MANIFEST)
            except FileNotFoundError:
                return False
            return True

    def folders(self) -> list[Folder]:
        """None: a bucket may be far away, and large."""
        return []

    def _sizes(self) -> dict[str, int]:
        import obstore

        with self.translating_errors():
            return {
                entry["path"]: entry["size"] for page in obstore.list(self._objects, chunk_size=1000) for entry in page
            }

    def read(self, name: str) -> bytes:
        import obstore

        with self.translating_errors():
            return bytes(obstore.get(self._objects, name).bytes())

    def tails(self, sizes: Mapping[str, int], count: int) -> dict[str, bytes]:
        import obstore

        def tail(name: str) -> bytes:
            return bytes(obstore.get_range(self._objects, name, start=sizes[name] - count, length=count))

        with self.translating_errors(), ThreadPoolExecutor(_REQUESTS) as executor:
            return dict(zip(sizes, executor.map(tail, sizes), strict=True))

    def write(self, name: str, content: bytes) -> None:
        import obstore

        with self.translating_errors():
            obstore.put(self._objects, name, content)

    def remove(self, name: str) -> None:
        import obstore

        with self.translating_errors():
            obstore.delete(self._objects, name)

    def clear(self) -> None:
        """The manifest first, so that a store that is partly removed does not exist."""
        import obstore

        names = sorted(self._sizes(), key=lambda name: name != MANIFEST)
        with self.translating_errors():
            for some in (names[:1], names[1:]):
                if some:
                    obstore.delete(self._objects, some)

    def flush(self) -> None:
        """Nothing to do: what an object store has taken it keeps."""

    @contextmanager
    def replacing(self) -> Iterator["BucketFolder"]:
        """The folder itself: what it held is gone from the beginning."""
        self.clear()
        try:
            yield self
        except BaseException:
            self.clear()
            raise

    def zarr_store(self, *, reading: bool) -> Any:
        """For ``reading`` one in which a missing chunk is an error; on a disk the census has just found them all."""
        from zarr.storage import ObjectStore

        from fastsitch.zarr_bucket import CompleteObjectStore

        return (CompleteObjectStore if reading else ObjectStore)(self._objects)

    @contextmanager
    def translating_errors(self) -> Iterator[None]:
        from obstore.exceptions import BaseError

        try:
            yield
        except BaseError as error:
            raise _refusal(self.url, error) from None

    @property
    def lock_file(self) -> Path:
        return self.locks / self.parent.name / f"{self.name}.lock"

    @property
    def disk(self) -> None:
        return None

    def disk_needed(self, size: int) -> int:
        """A bucket grows with what is put into it."""
        return 0

    def forget(self, name: str) -> None:
        """Nothing to do: every read is a request."""

    def _scratch(self) -> "BucketFolder":
        return self

    @property
    def root_of_stores(self) -> Path:
        return self.locks.parent

    @property
    def activations_option(self) -> str:
        return self.url

    @property
    def _objects(self) -> Any:
        """The folder for obstore."""
        return _connected(self.url)


def bucket_folder(url: str, locks: Path) -> BucketFolder:
    """The folder of this name; raises ConfigError where it is none, or obstore is missing."""
    bucket, *prefix = url.removeprefix(_SCHEME).rstrip("/").split("/")
    if not url.startswith(_SCHEME) or not bucket or "" in prefix:
        raise ConfigError(f"{argument('activations', url)}: expected s3://BUCKET, s3://BUCKET/PREFIX, or a folder")
    if find_spec("obstore") is None:
        raise ConfigError(
            f"{argument('activations', url)} needs obstore, which is not installed: pip install 'fastsitch[s3]'"
        )
    return BucketFolder(url.rstrip("/"), locks)


@cache
def _reached(folder: BucketFolder) -> BucketFolder:
    """Looks once, and not for long; raises ConfigError unless the bucket is there and lets us in."""
    import obstore

    url = folder.url
    bucket = url.removeprefix(_SCHEME).partition("/")[0]
    impatient = _open(folder.url, retry_config={"max_retries": 1, "retry_timeout": timedelta(seconds=10)})
    try:
        next(iter(obstore.list(impatient, chunk_size=1)), None)
    except (obstore.exceptions.BaseError, FileNotFoundError) as error:
        if "NoSuchBucket" in str(error):
            raise ConfigError(f"{argument('activations', url)}: there is no bucket {bucket!r}{_where()}") from None
        refusal = _refusal(folder.url, error)
        if isinstance(refusal, ConfigError):
            raise refusal from None
        raise ConfigError(
            f"{argument('activations', url)}: no answer{_where()} ({_first_line(error)}); expected an S3 server, as "
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
            f"{argument('activations', url)}: access denied{_where()}; expected AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY of someone who may list, read, write and delete there"
        )
    return FailedError(f"{url}: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
