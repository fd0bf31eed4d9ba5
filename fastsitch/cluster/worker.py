"""What runs on the machines of a cluster. Imported there and by the driver; does not need Ray itself."""

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
from fastsitch.progress import Progress, Report

Task = Callable[[Any, Report], Any]
"""task(job, report) -> result: does one job, and may keep what it has loaded for the next."""

_REPORT_INTERVAL = 0.2
"""Least seconds between two progress reports that are sent."""


@dataclass(frozen=True)
class Started:
    """A worker has started: its machine, its versions, and whether it sees the driver's root."""

    host: str
    process: int
    versions: dict[str, str]
    sees_root: bool


@dataclass(frozen=True)
class Reported:
    """Progress that a task reported."""

    value: Progress


@dataclass(frozen=True)
class Finished:
    """The result that a task returned."""

    value: Any


Event = Started | Reported | Finished | logging.LogRecord


class Worker:
    """The Ray actor. It works in a thread, so that log records and progress are sent while a job runs.

    ``make_task`` is called before the first job. ``root_marker`` is a file in the driver's root. ``threads`` is as many
    as the driver uses: results may depend on that number in the last bit.
    """

    def __init__(self, make_task: Callable[[], Task], threads: int, root_marker: Path) -> None:
        self._make_task = make_task
        self._root_marker = root_marker
        self._task: Task | None = None
        self._events: SimpleQueue[Any] = SimpleQueue()
        self._thread = ThreadPoolExecutor(max_workers=1)
        torch.set_num_threads(threads)
        logger = logging.getLogger("fastsitch")
        logger.setLevel(logging.INFO)
        logger.handlers = [QueueHandler(self._events)]
        logger.propagate = False

    def run(self, job: Any) -> Iterator[Event]:
        """Do a job: yields what happens, and :class:`Finished` last. Without a job: :class:`Started`."""
        if job is None:
            yield Started(socket.gethostname(), os.getpid(), versions(), self._root_marker.is_file())
            return
        work = self._thread.submit(self._work, job)
        work.add_done_callback(lambda _: self._events.put(None))
        # Ray sends into generators, which the iterator behind a yield from does not accept
        for event in iter(self._events.get, None):  # noqa: UP028
            yield event
        yield Finished(work.result())

    def _work(self, job: Any) -> Any:
        if self._task is None:
            self._task = self._make_task()
        sent = 0.0

        def report(progress: Progress) -> None:
            nonlocal sent
            now = time.monotonic()
            if now - sent >= _REPORT_INTERVAL:
                sent = now
                self._events.put(Reported(progress))

        return self._task(job, report)
