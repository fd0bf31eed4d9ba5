"""Who does what: jobs that need the same thing stay together."""

from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterable
from typing import Generic, TypeVar

Job = TypeVar("Job")


class Deal(Generic[Job]):
    """Hands out jobs to workers, each of which holds what the jobs of one key need.

    A worker gets jobs of the key it holds while there are any, then of the key that the fewest workers hold. It never
    comes back to a key that it has let go, so that no worker loads anything twice.
    """

    def __init__(self, jobs: Iterable[Job], key: Callable[[Job], Hashable]) -> None:
        self._key = key
        self._waiting: dict[Hashable, deque[Job]] = defaultdict(deque)
        self._held: dict[int, Hashable] = {}
        self._let_go: dict[int, set[Hashable]] = defaultdict(set)
        for job in jobs:
            self._waiting[key(job)].append(job)

    def take(self, worker: int) -> Job | None:
        """The next job of a worker; None when there is none for it, now or later."""
        held = self._held.get(worker)
        if worker in self._held and self._waiting[held]:
            return self._waiting[held].popleft()
        if worker in self._held:
            self._let_go[worker].add(self._held.pop(worker))
        new = [key for key, jobs in self._waiting.items() if jobs and key not in self._let_go[worker]]
        if not new:
            return None
        holders = list(self._held.values())
        chosen = min(new, key=holders.count)
        self._held[worker] = chosen
        return self._waiting[chosen].popleft()

    def put_back(self, worker: int, job: Job) -> None:
        """Return the job of a worker that was lost: it is the next of its key, for any other worker."""
        self._held.pop(worker, None)
        self._waiting[self._key(job)].appendleft(job)
