"""Running one task in a thread while the next one is prepared."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType


class Background:
    """A thread that runs tasks in order; a context manager.

    At most one task runs at a time: :meth:`run` waits for the one before it, and raises its error. Leaving the block
    waits for the last task, raises its error unless the block itself raises one, and ends the thread.
    """

    def __init__(self, name: str) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self._running: Future[object] | None = None

    def run(self, work: Callable[..., object], *arguments: object) -> None:
        """Wait until the task before has ended, then start this one."""
        self.wait()
        self._running = self._executor.submit(work, *arguments)

    def wait(self) -> None:
        """Wait until the running task has ended; raises its error, once."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def __enter__(self) -> "Background":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self._executor.shutdown(wait=True)
