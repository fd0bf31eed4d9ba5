"""What runs on the machines of a cluster. Imported there and by the driver; needs no Ray itself."""

import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from logging.handlers import QueueHandler
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from fastsitch.machine import versions

Tell = Callable[[Any], None]
"""tell(progress)."""

Station = Callable[[Any, Tell], Any]
"""station(job, tell) -> result: what a worker does with a job. It may keep what the next job needs too."""

_TELL_INTERVAL = 0.2
"""Seconds between two pieces of progress that are sent."""


@dataclass(frozen=True)
class Arrived:
    """A worker has started: on which machine, with which versions, and whether it sees the driver's root."""

    host: str
    process: int
    versions: dict[str, str]
    shares: bool


@dataclass(frozen=True)
class Told:
    """What a station told."""

    value: Any


@dataclass(frozen=True)
class Finished:
    """What a station returned."""

    value: Any


Event = Arrived | Told | Finished | logging.LogRecord


class Worker:
    """The actor. It works in a thread, so that what is logged and told can be sent as it comes.

    ``make`` is called for the first job. ``witness`` is a file in the driver's root. The number of ``threads`` is that
    of the driver: results may depend on it in the last bit.
    """

    def __init__(self, make: Callable[[], Station], threads: int, witness: Path) -> None:
        self._make = make
        self._witness = witness
        self._station: Station | None = None
        self._events: SimpleQueue[Any] = SimpleQueue()
        self._thread = ThreadPoolExecutor(max_workers=1)
        torch.set_num_threads(threads)
        logger = logging.getLogger("fastsitch")
        logger.setLevel(logging.INFO)
        logger.handlers = [QueueHandler(self._events)]
        logger.propagate = False

    def run(self, job: Any) -> Iterator[Event]:
        """Do a job: yields what happens, and last :class:`Finished`. Without a job: :class:`Arrived`."""
        if job is None:
            yield Arrived(socket.gethostname(), os.getpid(), versions(), self._witness.is_file())
            return
        work = self._thread.submit(self._work, job)
        work.add_done_callback(lambda _: self._events.put(None))
        # Ray sends into generators, which an iterator behind yield from would not take
        for event in iter(self._events.get, None):  # noqa: UP028
            yield event
        yield Finished(work.result())

    def _work(self, job: Any) -> Any:
        if self._station is None:
            self._station = self._make()
        sent = 0.0

        def tell(value: Any) -> None:
            nonlocal sent
            now = time.monotonic()
            if now - sent >= _TELL_INTERVAL:
                sent = now
                self._events.put(Told(value))

        return self._station(job, tell)
