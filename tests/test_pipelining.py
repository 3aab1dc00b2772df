"""Streams worked on in threads: results in order, errors where they happened, torch as it was."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from peft_graft.pipelining import ahead, in_order


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

    with torch.inference_mode():
        found = list(in_order(iter(range(12)), work, on_processor=on_processor))
    assert found == [(item, (item * item, True, 1 if on_processor else 4)) for item in range(12)]
    assert (len(seen) > 1) == on_processor
    assert torch.get_num_threads() == 4


def test_an_error_ends_the_stream_where_it_happened(four_threads) -> None:
    def work(item: int) -> int:
        if item == 5:
            raise ValueError("five")
        return item

    found = []
    with pytest.raises(ValueError, match="five"):
        for _, result in in_order(iter(range(100)), work, on_processor=True):
            found.append(result)
    assert found == [0, 1, 2, 3, 4]
    assert torch.get_num_threads() == 4


def test_a_stream_that_is_left_stops_working(four_threads) -> None:
    done = []
    stream = in_order(iter(range(1000)), done.append, on_processor=True)
    next(stream)
    stream.close()
    assert len(done) < 20
    assert torch.get_num_threads() == 4


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
