"""The workers that do a list of jobs: each job once, and again where a worker is lost."""

import logging
from collections import Counter
from collections.abc import Callable, Generator, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from fastsitch.cluster.affinity_queue import AffinityQueue
from fastsitch.cluster.worker import Finished, Reported, Started, Task, Worker
from fastsitch.errors import ConfigError, FailedError, FastsitchError, argument
from fastsitch.machine import versions

log = logging.getLogger(__name__)

Job = TypeVar("Job")

_WAITING_NOTICE = 30.0
"""Seconds without an event from any worker after which the log says that the cluster is busy."""

ATTEMPTS = 3
"""How often a job is tried in all when workers are lost or fail."""


@dataclass(frozen=True, kw_only=True)
class WorkerSlots:
    """How many workers a cluster can run at once, and what each of them gets."""

    device: str
    """``cpu``, or ``cuda`` where every worker has one GPU."""
    threads: int
    """Of each worker."""
    total: int
    per_machine: int
    """On the machine with most of them."""


@dataclass(frozen=True, kw_only=True)
class Work(Generic[Job]):
    """What a worker pool does; see :meth:`fastsitch.cluster.cluster.Cluster.run_jobs`."""

    make_task: Callable[[], Task]
    jobs: Sequence[Job]
    name: Callable[[Job], str]
    key: Callable[[Job], Hashable]
    report: Callable[[Job, Any], None]


@dataclass
class _ActiveWorker(Generic[Job]):
    """A worker and its current job: None while it starts."""

    number: int
    actor: Any
    job: Job | None = None
    address: str = "a worker"
    """``HOST:PROCESS`` once it has started."""


class WorkerPool(Generic[Job]):
    """As many workers of a cluster as it can run, for one list of jobs. All must see the file ``root_marker``."""

    def __init__(self, ray: Any, slots: WorkerSlots, work: Work[Job], root_marker: Path) -> None:
        self._ray = ray
        self._slots = slots
        self._work = work
        self._root_marker = root_marker
        self._queue = AffinityQueue(work.jobs, work.key)
        self._active: dict[Any, _ActiveWorker[Job]] = {}
        self._attempts: Counter[Job | None] = Counter()
        self._requested = 0
        self._said_waiting = False

    def results(self) -> Generator[tuple[Job, Any], None, None]:
        """Each job with its result, as it is done; closing the generator ends all workers."""
        ray = self._ray
        try:
            for _ in range(min(self._slots.total, len(self._work.jobs))):
                self._request_worker()
            while self._active:
                ready, _ = ray.wait(list(self._active), num_returns=1, timeout=_WAITING_NOTICE)
                if not ready:
                    self._log_waiting()
                    continue
                (stream,) = ready
                worker = self._active[stream]
                try:
                    event = ray.get(next(stream))
                except ray.exceptions.RayError as error:
                    del self._active[stream]
                    self._handle_failure(worker, error)
                    continue
                if isinstance(event, logging.LogRecord):
                    event.msg = f"[{worker.address}] {event.msg}"
                    logging.getLogger(event.name).handle(event)
                elif isinstance(event, Reported):
                    assert worker.job is not None
                    self._work.report(worker.job, event.value)
                else:
                    del self._active[stream]
                    done = worker.job
                    if isinstance(event, Started):
                        self._require_compatible(event)
                        self._attempts.pop(None, None)
                        worker.address = f"{event.host}:{event.process}"
                    # the worker gets its next job before this result is handled
                    self._assign_next(worker)
                    if isinstance(event, Finished):
                        assert done is not None
                        yield done, event.value
        finally:
            for worker in self._active.values():
                ray.kill(worker.actor)

    def _log_waiting(self) -> None:
        """Once, while no worker has started; once one has, others may wait for long without harm."""
        if not self._said_waiting and all(worker.job is None for worker in self._active.values()):
            log.warning("waiting for free CPUs or GPUs on the Ray cluster: other work is using them")
            self._said_waiting = True

    def _request_worker(self) -> None:
        """Ask for one more worker; it starts when the cluster has free CPUs or GPUs."""
        slots = self._slots
        needs = {"num_cpus": 1, "num_gpus": 1} if slots.device == "cuda" else {"num_cpus": slots.threads}
        # a worker that Ray restarts would return to a job that another worker has taken over
        options = {"max_restarts": 0, "max_task_retries": 0, "scheduling_strategy": "SPREAD"}
        kind = self._ray.remote(Worker).options(**options, **needs)
        actor = kind.remote(self._work.make_task, slots.threads, self._root_marker)
        self._assign(_ActiveWorker(self._requested, actor), None)
        self._requested += 1

    def _assign(self, worker: _ActiveWorker[Job], job: Job | None) -> None:
        worker.job = job
        self._active[worker.actor.run.remote(job)] = worker

    def _assign_next(self, worker: _ActiveWorker[Job]) -> None:
        job = self._queue.take(worker.number)
        if job is None:
            # frees its CPUs or GPU for a worker that waits for them
            self._ray.kill(worker.actor)
        else:
            self._assign(worker, job)

    def _handle_failure(self, worker: _ActiveWorker[Job], error: Exception) -> None:
        """A worker died, or its job failed: another worker gets the job, unless it was refused or tried too often."""
        self._ray.kill(worker.actor)
        cause = getattr(error, "cause", None)
        if isinstance(cause, FastsitchError) and cause.exit_code == FastsitchError.exit_code:
            raise cause from None
        lines = str(cause or error).strip().splitlines() or [type(error).__name__]
        what = "starting a worker" if worker.job is None else self._work.name(worker.job)
        self._attempts[worker.job] += 1
        if self._attempts[worker.job] == ATTEMPTS:
            if isinstance(cause, FastsitchError):
                raise cause from None
            kind = f"{type(cause).__name__}: " if isinstance(cause, Exception) else ""
            raise FailedError(
                f"{what} failed {ATTEMPTS} times on the Ray cluster, last on {worker.address}: {kind}{lines[0]}"
            )
        log.warning("%s failed on %s (%s): trying it again", what, worker.address, lines[0])
        if worker.job is not None:
            self._queue.put_back(worker.number, worker.job)
        self._request_worker()

    def _require_compatible(self, worker: Started) -> None:
        """Refuse a worker that does not see the root, or has other versions of what computes."""
        if not worker.sees_root:
            raise ConfigError(
                f"{worker.host} does not see this machine's {self._root_marker.parent}: with {argument('ray')} the "
                "root has to be on a file system that all machines share, under the same path"
            )
        here = versions()
        for package in ("fastsitch", "torch"):
            expected, found = (each[package].partition("+")[0] for each in (here, worker.versions))
            if expected != found:
                raise ConfigError(f"{worker.host} has {package} {found}: expected {expected}, as on this machine")
