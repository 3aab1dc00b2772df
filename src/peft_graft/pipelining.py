"""Work on a stream of items in threads: the next item made ahead, several items at a time, results in order."""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch

_T = TypeVar("_T")
_R = TypeVar("_R")
#: (work, items) -> what it makes of every item, in their order.
Each = Callable[[Callable[[Any], Any], Iterable[Any]], list[Any]]
#: Items in work at once on a processor: each holds its activations.
_MOST = 4


def shares(*, on_processor: bool) -> tuple[int, int]:
    """How many items are worked on at once, and with how many of torch's threads each."""
    workers = min(torch.get_num_threads(), _MOST) if on_processor else 1
    return workers, torch.get_num_threads() // workers


@contextmanager
def side_by_side(workers: int, share: int) -> Iterator[Each]:
    """Something that works on items ``workers`` at a time, in inference mode, with ``share`` of torch's threads each.

    Its threads stay, and with them the memory that matrix products set up in each.
    """
    if workers == 1:
        yield lambda work, items: [work(item) for item in items]
        return
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(share,)) as pool:
        yield lambda work, items: list(pool.map(_inferring(work), items))


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


def in_order(items: Iterator[_T], work: Callable[[_T], _R], *, on_processor: bool) -> Iterator[tuple[_T, _R]]:
    """Every item with what ``work`` makes of it, in the order of the items.

    Two forward passes with one thread each take less time than one after the other with two threads each, which spend
    a part of it waiting for one another. So on a processor its threads are shared out among several items; torch's
    number of threads is another while this runs, and as it was afterwards.

    Args:
        work: called in inference mode, on a processor from several threads. on_processor: whether it computes there,
            and not on an accelerator, whose own queue keeps it busy.
    """
    threads = torch.get_num_threads()
    workers, share = shares(on_processor=on_processor)
    if workers == 1:
        for item in items:
            yield item, work(item)
        return

    quietly = _inferring(work)
    waiting: deque[tuple[_T, Future[_R]]] = deque()
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(share,)) as pool:
            try:
                torch.set_num_threads(share)
                for item in items:
                    waiting.append((item, pool.submit(quietly, item)))
                    if len(waiting) > workers:
                        first, result = waiting.popleft()
                        yield first, result.result()
                while waiting:
                    first, result = waiting.popleft()
                    yield first, result.result()
            finally:
                pool.shutdown(cancel_futures=True)
    finally:
        torch.set_num_threads(threads)


def give_back_memory() -> None:
    """Give the system back what the C library (glibc) holds free.

    That is more and more: batches differ in size, and each thread has holes of its own where their activations were.
    It takes a fiftieth of the time of a small model's batch.
    """
    with suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
