"""A thread that prepares the next batches while the step runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Prefetch(Generic[T]):
    """Iterates over what `make()` yields, up to `ahead` items of it made beforehand on a thread of its own.

    At any time at most `ahead + 1` items exist: those waiting, and the one the consumer holds or the thread is making. So a
    maker that uses its buffers in turn needs `ahead + 1` of them. An exception of the maker is raised where its item would
    have come. Leaving the `with` block stops the thread and waits for it.
    """

    def __init__(self, make: Callable[[], Iterator[T]], ahead: int) -> None:
        self._make = make
        self._ready: SimpleQueue[tuple[bool, Any]] = SimpleQueue()
        self._room = threading.Semaphore(ahead + 1)
        self._stop = False
        self._thread = threading.Thread(target=self._work, name="tensorwright-prefetch", daemon=True)

    def _work(self) -> None:
        error: BaseException | None = None
        try:
            items = self._make()
            while True:
                self._room.acquire()
                if self._stop:
                    break
                try:
                    item = next(items)
                except StopIteration:
                    break
                self._ready.put((True, item))
        except BaseException as e:
            error = e
        self._ready.put((False, error))

    def __enter__(self) -> Prefetch[T]:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop = True
        self._room.release()
        self._thread.join()

    def __iter__(self) -> Iterator[T]:
        get, release = self._ready.get, self._room.release
        while True:
            more, item = get()
            if not more:
                if item is not None:
                    raise item
                return
            yield item
            release()
