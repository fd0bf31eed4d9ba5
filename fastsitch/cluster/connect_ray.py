"""Connect to a Ray cluster: one that runs already, or one on this machine that ends with the command."""

import logging
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastsitch.errors import BusyError, ConfigError, argument
from fastsitch.files import exclusive

log = logging.getLogger(__name__)

LOCAL, RUNNING = "local", "auto"

_TIMEOUT = 10.0
"""Seconds to wait for an answer from an address."""

_RESULTS_MEMORY = 1 << 28
"""Bytes of shared memory of a local cluster, for results sent to the driver. What does not fit goes to its folder."""

_QUIET = {
    # the driver itself logs what happens to workers
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".*",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray must not change CUDA_VISIBLE_DEVICES of workers without a GPU; unset, it warns about this
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # workers of a local cluster run at the priority of an ordinary run
    "RAY_worker_niceness": "0",
}

_FOLDER_PREFIX = "fastsitch-ray-"


def checked_address(address: str) -> str:
    """Return ``local``, ``auto``, or ``HOST:PORT`` where a server answers.

    Raises ConfigError for anything else, and where Ray is not installed.
    """
    if find_spec("ray") is None:
        raise ConfigError(f"{argument('ray')} needs Ray, which is not installed: pip install 'fastsitch[ray]'")
    if address in (LOCAL, RUNNING):
        return address
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ConfigError(
            f"{argument('ray', address)}: expected HOST:PORT of a Ray cluster, auto for the one that runs on this "
            "machine, or no address for one that starts and stops by itself"
        )
    expected = "expected the address that 'ray start --head' printed"
    try:
        if not _speaks_grpc(host.strip("[]"), int(port)):
            raise ConfigError(f"{argument('ray', address)}: the server there is not a Ray cluster; {expected}")
    except OSError as error:
        raise ConfigError(f"{argument('ray', address)}: nothing answers there ({error}); {expected}") from None
    return address


def _speaks_grpc(host: str, port: int) -> bool:
    """Whether a server speaks HTTP/2, as Ray does; Ray itself would try for minutes."""
    encrypted = os.environ.get("RAY_USE_TLS", "0") not in ("", "0")
    with socket.create_connection((host, port), timeout=_TIMEOUT) as connection:
        settings = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + settings)
        return encrypted or connection.recv(4)[3:] == settings[3:4]


@contextmanager
def connection(address: str) -> Iterator[Any]:
    """The module ``ray``, connected to a checked address. An existing connection is used, and stays open.

    Raises ConfigError when there is no cluster, or when it refuses the connection.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        _require_same(address, ray.get_runtime_context().gcs_address)
        yield ray
        return
    quiet = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    if address == LOCAL:
        # whoever reaches its ports commands a cluster, so Ray asks for a token; by default one in the home folder
        made_token = "RAY_AUTH_TOKEN" not in os.environ
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        with _temporary_folder() as folder:
            memory = {"object_store_memory": _RESULTS_MEMORY}
            try:
                ray.init(address=LOCAL, include_dashboard=False, _temp_dir=str(folder), **memory, **quiet)
                yield ray
            finally:
                ray.shutdown()
                if made_token:
                    del os.environ["RAY_AUTH_TOKEN"]
        return
    try:
        ray.init(address=address, **quiet)
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(f"{argument('ray', address)}: cannot connect to a Ray cluster there ({reason})") from None
    log.info("connected to the Ray cluster at %s", ray.get_runtime_context().gcs_address)
    try:
        yield ray
    finally:
        ray.shutdown()


def _require_same(address: str, connected: str) -> None:
    """Raise ConfigError when this process is connected to a cluster at another address than the given one."""
    if address in (LOCAL, RUNNING):
        return
    host, _, port = address.rpartition(":")
    if f"{socket.gethostbyname(host.strip('[]'))}:{port}" != connected and address != connected:
        raise ConfigError(
            f"{argument('ray', address)}: this process is connected to Ray at {connected}: call ray.shutdown() first"
        )


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    """Where a local cluster keeps its files. Removed in the end; what killed commands left is removed first."""
    parent = Path(tempfile.gettempdir())
    if len(str(parent)) > 16:
        # Ray's sockets are in it, whose paths are limited to about 100 characters
        parent = Path("/tmp")
    for leftover in parent.glob(f"{_FOLDER_PREFIX}*"):
        with suppress(BusyError, FileNotFoundError):
            if leftover.stat().st_uid == os.getuid():
                with exclusive(leftover / "lock", "a Ray cluster"):
                    shutil.rmtree(leftover, ignore_errors=True)
    new = Path(tempfile.mkdtemp(prefix="fastsitch-new-", dir=parent))
    # gets its name when its lock is held already, so that no other command takes it for a leftover
    with exclusive(new / "lock", "a Ray cluster"):
        folder = new.rename(parent / new.name.replace("fastsitch-new-", _FOLDER_PREFIX))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
