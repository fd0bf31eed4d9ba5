"""A Ray cluster that does jobs."""

import logging
import secrets
from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, overload

import torch

from fastsitch.cluster.connect_ray import checked_address, connection
from fastsitch.cluster.worker import Task
from fastsitch.cluster.worker_pool import Work, WorkerPool, WorkerSlots
from fastsitch.errors import BusyError, ConfigError, argument
from fastsitch.files import exclusive

log = logging.getLogger(__name__)

Job = TypeVar("Job")

_MARKER_PREFIX = ".fastsitch-workers-"


class Cluster:
    """The machines of a Ray cluster, all of which see one root; a context manager that several calls may share.

    The connection is made when it is first needed.

    Args:
        address: ``HOST:PORT``, ``auto`` for the cluster that runs on this machine, or ``local`` for one that starts and
            stops by itself.
        root: folder of networks, stores and runs, which all machines see under the same path.

    Raises:
        ConfigError: Ray is not installed, or nothing answers at the address.
    """

    def __init__(self, address: str, *, root: Path) -> None:
        self._address = checked_address(address)
        self._root = root
        self._stack = ExitStack()
        self._ray: Any = None

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ray = None
        self._stack.close()

    def worker_slots(self, device: str) -> WorkerSlots:
        """The workers that fit with ``device``: ``auto`` (a GPU each, where there are any), ``cpu`` or ``cuda``.

        A worker without a GPU takes as many CPUs as this process has threads, so that it computes what this process
        would, bit by bit. Raises ConfigError when no worker fits.
        """
        if device not in ("auto", "cpu", "cuda"):
            raise ConfigError(
                f"{argument('device', device)}: expected auto, cpu or cuda with {argument('ray')}, which gives every "
                "worker a GPU of its own"
            )
        nodes = [node["Resources"] for node in self._connected().nodes() if node["Alive"]]
        gpus = [int(node.get("GPU", 0)) for node in nodes]
        threads = torch.get_num_threads()
        if device != "cpu" and any(gpus):
            return WorkerSlots(device="cuda", threads=threads, total=sum(gpus), per_machine=max(gpus))
        if device == "cuda":
            raise ConfigError(
                f"{argument('device', 'cuda')}: no machine of the Ray cluster has a GPU; use "
                f"{argument('device', 'cpu')}"
            )
        cpus = [int(node.get("CPU", 0)) for node in nodes]
        if not any(cpus):
            raise ConfigError("no machine of the Ray cluster offers CPUs: start it with ray start --num-cpus N")
        if threads > max(cpus):
            log.warning("no machine of the Ray cluster offers %d CPUs: each worker uses %d", threads, max(cpus))
            threads = max(cpus)
        workers = [count // threads for count in cpus]
        return WorkerSlots(device="cpu", threads=threads, total=sum(workers), per_machine=max(workers))

    def run_jobs(
        self,
        make_task: Callable[[], Task],
        jobs: Sequence[Job],
        slots: WorkerSlots,
        *,
        name: Callable[[Job], str] = str,
        key: Callable[[Job], Hashable] = hash,
        report: Callable[[Job, Any], None] | None = None,
    ) -> Generator[tuple[Job, Any], None, None]:
        """Do all jobs, and yield each with its result as it is done.

        Every worker makes a task of its own, which may keep what it has loaded: jobs of one ``key`` are kept
        together, see :class:`fastsitch.cluster.affinity_queue.AffinityQueue`. ``report`` gets the progress that tasks
        report while they work. A job whose worker is lost, or that fails, is tried again by another worker, three times
        in all. Errors in what the user asked for (exit code 2) are raised at once.
        """
        with _root_marker(self._root) as marker:
            report = report or (lambda job, progress: None)
            work = Work(make_task=make_task, jobs=jobs, name=name, key=key, report=report)
            yield from WorkerPool(self._connected(), slots, work, marker).results()

    def _connected(self) -> Any:
        if self._ray is None:
            self._ray = self._stack.enter_context(connection(self._address))
        return self._ray


@contextmanager
def _root_marker(root: Path) -> Iterator[Path]:
    """A file by which workers recognise the root; those that killed commands left, whose locks are free, go first."""
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob(f"{_MARKER_PREFIX}*"):
        # another user's is theirs to remove
        with suppress(BusyError, PermissionError), exclusive(leftover, "a cluster"):
            leftover.unlink(missing_ok=True)
    token = secrets.token_hex(8)
    new = root.absolute() / f".fastsitch-new-{token}"
    # gets its name when its lock is held already, so that no other command takes it for a leftover
    with exclusive(new, "a cluster"):
        marker = new.rename(new.with_name(_MARKER_PREFIX + token))
        try:
            yield marker
        finally:
            marker.unlink(missing_ok=True)


@overload
def connected(ray: str | Cluster, root: Path) -> AbstractContextManager[Cluster]: ...
@overload
def connected(ray: str | Cluster | None, root: Path) -> AbstractContextManager[Cluster | None]: ...
def connected(ray: str | Cluster | None, root: Path) -> AbstractContextManager[Cluster | None]:
    """A new cluster for an address, closed in the end; a given cluster, which stays open; or None."""
    return Cluster(ray, root=root) if isinstance(ray, str) else nullcontext(ray)
