"""A queue of jobs that gives jobs with the same needs to the same worker."""

from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterable
from typing import Generic, TypeVar

Job = TypeVar("Job")


class AffinityQueue(Generic[Job]):
    """Jobs for workers, each of which has loaded what the jobs of one key need.

    A worker gets jobs of the key it has loaded as long as there are any, then jobs of the key that the fewest workers
    have loaded. It never returns to a key that it has left, so no worker loads anything twice.
    """

    def __init__(self, jobs: Iterable[Job], key: Callable[[Job], Hashable]) -> None:
        self._key = key
        self._waiting: dict[Hashable, deque[Job]] = defaultdict(deque)
        self._loaded: dict[int, Hashable] = {}
        self._left: dict[int, set[Hashable]] = defaultdict(set)
        for job in jobs:
            self._waiting[key(job)].append(job)

    def take(self, worker: int) -> Job | None:
        """The next job for a worker; None when there is none for it, now or later."""
        if worker in self._loaded:
            same = self._waiting[self._loaded[worker]]
            if same:
                return same.popleft()
            self._left[worker].add(self._loaded.pop(worker))
        new = [key for key, jobs in self._waiting.items() if jobs and key not in self._left[worker]]
        if not new:
            return None
        chosen = min(new, key=list(self._loaded.values()).count)
        self._loaded[worker] = chosen
        return self._waiting[chosen].popleft()

    def put_back(self, worker: int, job: Job) -> None:
        """Return the job of a worker that was lost: another worker gets it before the other jobs of its key."""
        self._loaded.pop(worker, None)
        self._waiting[self._key(job)].appendleft(job)
