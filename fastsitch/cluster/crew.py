"""The workers that do one list of jobs: each job is done once, and again where a worker is lost."""

import logging
from collections import Counter
from collections.abc import Callable, Generator, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from fastsitch.cluster.deal import Deal
from fastsitch.cluster.worker import Arrived, Finished, Station, Told, Worker
from fastsitch.errors import ConfigError, FailedError, FastsitchError
from fastsitch.machine import versions

log = logging.getLogger(__name__)

Job = TypeVar("Job")

_PATIENCE = 30.0
"""Seconds without a sign of any worker after which that is said."""

ATTEMPTS = 3
"""How often a job is tried in all when workers are lost or fail."""


@dataclass(frozen=True, kw_only=True)
class Places:
    """Room for workers on a cluster; each has a device and ``threads`` of its own."""

    device: str
    """``cpu`` or ``cuda``, where every worker has one GPU."""
    threads: int
    total: int
    per_machine: int
    """On the machine with most of them."""


@dataclass(frozen=True, kw_only=True)
class Work(Generic[Job]):
    """What a crew does; see :meth:`fastsitch.cluster.cluster.Cluster.carry_out`."""

    make: Callable[[], Station]
    jobs: Sequence[Job]
    name: Callable[[Job], str]
    key: Callable[[Job], Hashable]
    report: Callable[[Job, Any], None]


@dataclass
class _Post(Generic[Job]):
    """A worker, by number, and what it is at: nothing while it is on its way."""

    number: int
    actor: Any
    job: Job | None = None
    place: str = "a worker"


class Crew(Generic[Job]):
    """Workers of a cluster, as many as have room, for one piece of work. ``witness`` is a file that all must see."""

    def __init__(self, ray: Any, places: Places, work: Work[Job], witness: Path) -> None:
        self._ray = ray
        self._places = places
        self._work = work
        self._witness = witness
        self._deal = Deal(work.jobs, work.key)
        self._busy: dict[Any, _Post[Job]] = {}
        self._attempts: Counter[Job | None] = Counter()
        self._hired = 0
        self._waits = True

    def results(self) -> Generator[tuple[Job, Any], None, None]:
        """Each job with its result, as it is done; closing the generator ends all workers."""
        ray = self._ray
        try:
            for _ in range(min(self._places.total, len(self._work.jobs))):
                self._hire()
            while self._busy:
                ready, _ = ray.wait(list(self._busy), num_returns=1, timeout=_PATIENCE)
                if not ready:
                    self._say_that_nobody_came()
                    continue
                (stream,) = ready
                post = self._busy[stream]
                try:
                    event = ray.get(next(stream))
                except ray.exceptions.RayError as error:
                    del self._busy[stream]
                    self._lost(post, error)
                    continue
                if isinstance(event, logging.LogRecord):
                    event.msg = f"[{post.place}] {event.msg}"
                    logging.getLogger(event.name).handle(event)
                elif isinstance(event, Told):
                    assert post.job is not None
                    self._work.report(post.job, event.value)
                else:
                    del self._busy[stream]
                    done = post.job
                    if isinstance(event, Arrived):
                        self._check(event)
                        self._attempts.pop(None, None)
                        post.place = f"{event.host}:{event.process}"
                    # has its next job before anything is done about this one
                    self._proceed(post)
                    if isinstance(event, Finished):
                        assert done is not None
                        yield done, event.value
        finally:
            for post in self._busy.values():
                ray.kill(post.actor)

    def _say_that_nobody_came(self) -> None:
        """Once, while no worker has found room; later ones may wait for long without harm."""
        if self._waits and all(post.job is None for post in self._busy.values()):
            log.warning("waiting for room on the Ray cluster: other work has its processors or GPUs")
            self._waits = False

    def _hire(self) -> None:
        """Ask for one more worker; it comes when there is room."""
        places = self._places
        needs = {"num_cpus": 1, "num_gpus": 1} if places.device == "cuda" else {"num_cpus": places.threads}
        # a worker that Ray restarts would come back to what others have taken over
        options = {"max_restarts": 0, "max_task_retries": 0, "scheduling_strategy": "SPREAD"}
        kind = self._ray.remote(Worker).options(**options, **needs)
        self._begin(_Post(self._hired, kind.remote(self._work.make, places.threads, self._witness)), None)
        self._hired += 1

    def _begin(self, post: _Post[Job], job: Job | None) -> None:
        post.job = job
        self._busy[post.actor.run.remote(job)] = post

    def _proceed(self, post: _Post[Job]) -> None:
        job = self._deal.take(post.number)
        if job is None:
            # makes room for a worker that waits for it
            self._ray.kill(post.actor)
        else:
            self._begin(post, job)

    def _lost(self, post: _Post[Job], error: Exception) -> None:
        """A worker died, or its job failed: the job goes to another worker, unless it is refused or tried too often."""
        self._ray.kill(post.actor)
        cause = getattr(error, "cause", None)
        if isinstance(cause, FastsitchError) and cause.exit_code == FastsitchError.exit_code:
            raise cause from None
        lines = str(cause or error).strip().splitlines() or [type(error).__name__]
        what = "starting a worker" if post.job is None else self._work.name(post.job)
        self._attempts[post.job] += 1
        if self._attempts[post.job] == ATTEMPTS:
            if isinstance(cause, FastsitchError):
                raise cause from None
            kind = f"{type(cause).__name__}: " if isinstance(cause, Exception) else ""
            raise FailedError(
                f"{what} failed {ATTEMPTS} times on the Ray cluster, last on {post.place}: {kind}{lines[0]}"
            )
        log.warning("%s failed on %s (%s): trying it again", what, post.place, lines[0])
        if post.job is not None:
            self._deal.put_back(post.number, post.job)
        self._hire()

    def _check(self, worker: Arrived) -> None:
        """Refuse a worker that does not see the root, or that would compute with something else."""
        if not worker.shares:
            raise ConfigError(
                f"{self._witness.parent} is another folder on {worker.host}, or none: with --ray the root has to lie "
                "on a file system that all machines share, under the same path"
            )
        own = versions()
        for package in ("fastsitch", "torch"):
            expected, found = (each[package].partition("+")[0] for each in (own, worker.versions))
            if expected != found:
                raise ConfigError(f"{worker.host} has {package} {found}: expected {expected}, as on this machine")
