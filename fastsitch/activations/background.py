"""One piece of work in a thread while the next one is prepared."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType


class Background:
    """A thread for work that depends on nothing but its order; a context manager.

    At most one piece is under way: :meth:`run` waits for the one before it, and raises its error. Leaving the block
    waits for the last piece, raises its error unless another one is on its way, and ends the thread.
    """

    def __init__(self, name: str) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self._running: Future[object] | None = None

    def run(self, work: Callable[..., object], *arguments: object) -> None:
        """Wait until the piece before has ended, then begin this one."""
        self.wait()
        self._running = self._executor.submit(work, *arguments)

    def wait(self) -> None:
        """Wait until the piece under way has ended; raises its error, once."""
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
