"""A Ray cluster as a place where jobs are done."""

import logging
import secrets
from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, overload

import torch

from fastsitch.cluster.connect import checked_address, connection
from fastsitch.cluster.crew import Crew, Places, Work
from fastsitch.cluster.worker import Station
from fastsitch.errors import BusyError, ConfigError
from fastsitch.files import exclusive

log = logging.getLogger(__name__)

Job = TypeVar("Job")

_WITNESS = ".fastsitch-workers-"


class Cluster:
    """The machines of a Ray cluster, all of which see one root; a context manager.

    ``address`` is ``HOST:PORT``, ``auto`` for the cluster that runs on this machine, or ``local`` for one that starts
    and stops by itself. The connection is made when it is first needed. Raises ConfigError at once when Ray is not
    installed or nothing answers.
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

    def places(self, device: str) -> Places:
        """Room for workers with ``device``: ``auto`` (a GPU each, where there are any), ``cpu`` or ``cuda``.

        A worker without a GPU takes as many processors as this process has threads, so that it computes what this
        process would, bit by bit. Raises ConfigError when there is no room for any.
        """
        if device not in ("auto", "cpu", "cuda"):
            raise ConfigError(
                f"--device {device}: expected auto, cpu or cuda with --ray, where each worker has its GPU"
            )
        nodes = [node["Resources"] for node in self._connected().nodes() if node["Alive"]]
        gpus = [int(node.get("GPU", 0)) for node in nodes]
        threads = torch.get_num_threads()
        if device != "cpu" and any(gpus):
            return Places(device="cuda", threads=threads, total=sum(gpus), per_machine=max(gpus))
        if device == "cuda":
            raise ConfigError("--device cuda: no machine of the Ray cluster has a GPU; use --device cpu")
        processors = [int(node.get("CPU", 0)) for node in nodes]
        if not any(processors):
            raise ConfigError("no machine of the Ray cluster offers processors: expected some, as with --num-cpus 8")
        if threads > max(processors):
            log.warning("no machine of the Ray cluster offers %d processors: using %d", threads, max(processors))
            threads = max(processors)
        room = [count // threads for count in processors]
        return Places(device="cpu", threads=threads, total=sum(room), per_machine=max(room))

    def carry_out(
        self,
        make: Callable[[], Station],
        jobs: Sequence[Job],
        places: Places,
        *,
        name: Callable[[Job], str] = str,
        key: Callable[[Job], Hashable] = hash,
        report: Callable[[Job, Any], None] | None = None,
    ) -> Generator[tuple[Job, Any], None, None]:
        """Do all jobs, and yield each with its result as it is done.

        Every worker makes a station of its own, which may keep what it has loaded: jobs of one ``key`` are kept
        together, see :class:`fastsitch.cluster.deal.Deal`. ``report`` gets what stations tell while they work. A job
        whose worker is lost, or that fails otherwise than by a refusal (an error of ours that ends with 2), is tried
        again by another worker, three times in all. Refusals are raised at once.
        """
        with _witness(self._root) as witness:
            tell = report or (lambda job, progress: None)
            work = Work(make=make, jobs=jobs, name=name, key=key, report=tell)
            yield from Crew(self._connected(), places, work, witness).results()

    def _connected(self) -> Any:
        if self._ray is None:
            self._ray = self._stack.enter_context(connection(self._address))
        return self._ray


@contextmanager
def _witness(root: Path) -> Iterator[Path]:
    """A file by which workers know the root; those of killed commands, whose locks are free, are removed first."""
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob(f"{_WITNESS}*"):
        # somebody else's is theirs to remove
        with suppress(BusyError, PermissionError), exclusive(leftover, "a cluster"):
            leftover.unlink(missing_ok=True)
    word = secrets.token_hex(8)
    making = root.absolute() / f".fastsitch-new-{word}"
    # gets its name with the lock held already: nobody takes it for left behind
    with exclusive(making, "a cluster"):
        witness = making.rename(making.with_name(_WITNESS + word))
        try:
            yield witness
        finally:
            witness.unlink(missing_ok=True)


@overload
def connected(ray: str | Cluster, root: Path) -> AbstractContextManager[Cluster]: ...
@overload
def connected(ray: str | Cluster | None, root: Path) -> AbstractContextManager[Cluster | None]: ...
def connected(ray: str | Cluster | None, root: Path) -> AbstractContextManager[Cluster | None]:
    """The cluster at an address, one that is connected already and stays so, or none."""
    return Cluster(ray, root=root) if isinstance(ray, str) else nullcontext(ray)
