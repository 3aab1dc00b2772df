"""Streams worked on in threads: results in order, errors where they happened, torch as it was."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from peft_graft.alignment.threads import Workers, ahead


@pytest.fixture
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("on_processor", [True, False])
def test_results_come_in_the_order_of_the_items(four_threads, on_processor: bool) -> None:
    seen = set()

    def work(item: int) -> tuple[int, bool, int]:
        seen.add(threading.get_ident())
        time.sleep(0.02 if item % 3 == 0 else 0)
        return item * item, torch.is_inference_mode_enabled(), torch.get_num_threads()

    with torch.inference_mode(), Workers(on_processor=on_processor) as workers:
        found = list(workers.in_order(range(12), work))
        assert workers.each(lambda item: work(item)[0], [3, 1, 2]) == [9, 1, 4]
    assert found == [(item, (item * item, True, 1 if on_processor else 4)) for item in range(12)]
    assert (len(seen) > 1) == on_processor
    assert torch.get_num_threads() == 4


def test_an_error_ends_the_stream_where_it_happened(four_threads) -> None:
    def work(item: int) -> int:
        if item == 5:
            raise ValueError("five")
        return item

    found = []
    with pytest.raises(ValueError, match="five"), Workers(on_processor=True) as workers:
        for _, result in workers.in_order(range(100), work):
            found.append(result)
    assert found == [0, 1, 2, 3, 4]
    assert torch.get_num_threads() == 4


def test_a_stream_that_is_left_stops_working(four_threads) -> None:
    done = []
    with Workers(on_processor=True) as workers:
        next(workers.in_order(range(1000), done.append))
    assert len(done) < 20
    assert torch.get_num_threads() == 4


def test_no_more_than_the_threads_there_are_compute_at_once(four_threads) -> None:
    """The products of one batch go through the threads that the forward passes of the next ones are in."""
    lock, now, most = threading.Lock(), 0, 0

    def work(_: int) -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.005)
        with lock:
            now -= 1

    with Workers(on_processor=True) as workers:
        for item, _ in workers.in_order(range(20), work):
            workers.each(work, range(item % 7))
    assert most == 4


def test_the_next_item_is_made_while_one_is_used() -> None:
    made = []

    def items():
        for item in range(3):
            made.append(item)
            yield item

    stream = ahead(items())
    assert next(stream) == 0
    while len(made) < 2:  # without anyone asking for it
        time.sleep(0.001)
    assert list(stream) == [1, 2]
