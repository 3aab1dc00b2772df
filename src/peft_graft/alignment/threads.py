"""Work on a stream of items in threads: the next item made ahead, several items at a time, results in order."""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

import torch

_T = TypeVar("_T")
_R = TypeVar("_R")
#: Items in work at once on a processor: each holds its activations.
_MOST = 4


class Workers:
    """Threads among which a processor is shared out; no more than the caller's own elsewhere. A context manager.

    Two forward passes with one thread each take less time than one after the other with two threads each, which spend
    a part of it waiting for one another. So on a processor torch's threads are shared out among several items in work
    at once, and whatever is computed meanwhile goes through the same threads, so that no more compute than there are
    cores. Inside, torch's number of threads is that of one item's share, and as it was afterwards.

    Args:
        on_processor: whether the work is done there, and not on an accelerator, whose own queue keeps it busy.
    """

    def __init__(self, *, on_processor: bool) -> None:
        self._threads = torch.get_num_threads()
        self.count = min(self._threads, _MOST) if on_processor else 1
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> Workers:
        if self.count > 1:
            share = self._threads // self.count
            # The threads stay, and with them the memory that matrix products set up in each.
            self._pool = ThreadPoolExecutor(self.count, initializer=torch.set_num_threads, initargs=(share,))
            torch.set_num_threads(share)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)
            torch.set_num_threads(self._threads)

    def each(self, work: Callable[[_T], _R], items: Iterable[_T]) -> list[_R]:
        """What ``work`` makes of every item, in their order, several at a time and in inference mode."""
        if self._pool is None:
            return [work(item) for item in items]
        return list(self._pool.map(_inferring(work), items))

    def in_order(self, items: Iterable[_T], work: Callable[[_T], _R]) -> Iterator[tuple[_T, _R]]:
        """Every item with what ``work`` makes of it in inference mode, in the order of the items, some ahead."""
        if self._pool is None:
            for item in items:
                yield item, work(item)
            return
        quietly = _inferring(work)
        waiting: deque[tuple[_T, Future[_R]]] = deque()
        for item in items:
            waiting.append((item, self._pool.submit(quietly, item)))
            if len(waiting) > self.count:
                first, result = waiting.popleft()
                yield first, result.result()
        while waiting:
            first, result = waiting.popleft()
            yield first, result.result()


def _inferring(work: Callable[[_T], _R]) -> Callable[[_T], _R]:
    """The same work in inference mode, which is a thread's own."""

    def inside(item: _T) -> _R:
        with torch.inference_mode():
            return work(item)

    return inside


def ahead(items: Iterator[_T]) -> Iterator[_T]:
    """The same items, the next one already being made in a thread."""
    end = object()
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = pool.submit(next, items, end)
            yield item  # type: ignore[misc]


def give_back_memory() -> None:
    """Give the system back what the C library (glibc) holds free.

    That is more and more: batches differ in size, and each thread has holes of its own where their activations were.
    It takes a fiftieth of the time of a small model's batch.
    """
    with suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
