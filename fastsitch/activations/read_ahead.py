"""Reading ahead in one background thread."""

import threading
from collections import deque
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Generic, TypeVar

Item = TypeVar("Item")
Value = TypeVar("Value")


class ReadAhead(Generic[Item, Value]):
    """Calls ``read`` for each item, in order, in a thread that lives as long as the ``with`` block.

    At most ``ahead`` values are read, or being read, and not yet taken; when there are so many, the thread sleeps. An
    error of ``read`` is raised by :meth:`take`, unchanged.
    """

    THREAD = "fastsitch-read-ahead"

    def __init__(self, read: Callable[[Item], Value], items: Iterable[Item], *, ahead: int) -> None:
        self._read = read
        self._items = items
        self._ahead = ahead
        self._ready: deque[Value] = deque()
        self._changed = threading.Condition()
        self._stopped = False
        self._error: BaseException | None = None
        # a daemon: an interpreter that exits while an iterator is still open does not wait for it
        self._thread = threading.Thread(target=self._work, name=self.THREAD, daemon=True)

    def __enter__(self) -> "ReadAhead[Item, Value]":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join()

    def take(self, *, wait: bool) -> Value | None:
        """The next value; None when it is not there yet and ``wait`` is not set."""
        with self._changed:
            if wait:
                self._changed.wait_for(lambda: self._ready or self._error is not None)
            if self._ready:
                self._changed.notify_all()
                return self._ready.popleft()
            if self._error is not None:
                raise self._error
            return None

    def _work(self) -> None:
        try:
            for item in self._items:
                with self._changed:
                    self._changed.wait_for(lambda: self._stopped or len(self._ready) < self._ahead)
                    if self._stopped:
                        return
                value = self._read(item)
                with self._changed:
                    self._ready.append(value)
                    self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()
