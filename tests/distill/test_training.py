"""The training loop: resumed bit for bit, stopped early, the best kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from peft_graft.distill.training import Point, Schedule, StateStore, TrainingLoop

SCHEDULE = Schedule(steps=12, batch_size=4, learning_rate=0.05, accumulation=2, evaluations=(3, 6, 9, 12))
ROWS = 22


class Problem:
    """A small regression through dropout, whose order of rows and masks matter."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(5, 16), nn.Dropout(0.3), nn.Tanh(), nn.Linear(16, 1))
        self.inputs, self.wanted = torch.randn(ROWS, 5), torch.randn(ROWS, 1)
        self.evaluated: list[int] = []

    def loss(self, rows: list[int]) -> torch.Tensor:
        return (self.model(self.inputs[rows]) - self.wanted[rows]).square().mean()

    def evaluate(self, step: int) -> Point:
        self.evaluated.append(step)
        self.model.eval()
        with torch.no_grad():
            return Point(step, float(self.loss(list(range(ROWS)))), {"twice": 2.0})

    def loop(self, schedule: Schedule = SCHEDULE, **options) -> TrainingLoop:
        lengths = [3 + row % 7 for row in range(ROWS)]
        return TrainingLoop(self.model, lengths, self.loss, schedule, self.evaluate, **options)

    def values(self) -> list[torch.Tensor]:
        return [value.detach().clone() for value in self.model.parameters()]


def assert_same(first: Problem, second: Problem) -> None:
    assert all(torch.equal(a, b) for a, b in zip(first.values(), second.values(), strict=True))


@pytest.mark.parametrize("stop", [1, 3, 7, 11])
@pytest.mark.parametrize("keep_best", [True, False])
def test_an_interrupted_run_goes_on_to_the_same_result_bit_for_bit(tmp_path: Path, stop: int, keep_best: bool) -> None:
    whole = Problem()
    curve = whole.loop(keep_best=keep_best).run()

    def interrupt(step: int, _: torch.Tensor) -> None:
        if step == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Problem().loop(keep_best=keep_best, store=StateStore(tmp_path / "s"), on_step=interrupt).run()
    assert {path.name for path in (tmp_path / "s").iterdir()} == {"state.json", "state.safetensors"}
    steps: list[int] = []
    resumed = Problem()
    store = StateStore(tmp_path / "s")
    found = resumed.loop(keep_best=keep_best, store=store, on_step=lambda step, _: steps.append(step)).run()
    assert steps == list(range(stop + 1, 13))
    assert found == curve
    assert_same(whole, resumed)


def test_every_loss_is_that_of_a_model_in_training_mode() -> None:
    """Whatever mode it comes in, and after evaluations, which put it in another."""
    problem, modes = Problem(), list[bool]()
    problem.model.eval()
    problem.model[1].register_forward_pre_hook(lambda layer, _: modes.append(layer.training))
    problem.loop().run()
    assert modes.count(True) == 12 * SCHEDULE.accumulation
    assert modes.count(False) == len(problem.evaluated) == 4


def test_an_interruption_in_an_evaluation_loses_no_point(tmp_path: Path) -> None:
    whole = Problem()
    curve = whole.loop().run()
    broken = Problem()
    evaluate = broken.evaluate

    def stop(step: int) -> Point:
        if step == 6:
            raise KeyboardInterrupt
        return evaluate(step)

    broken.evaluate = stop  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        broken.loop(store=StateStore(tmp_path / "s")).run()
    resumed = Problem()
    assert resumed.loop(store=StateStore(tmp_path / "s")).run() == curve
    assert_same(whole, resumed)


def test_a_run_in_parts_is_the_whole_one_and_needs_no_file(tmp_path: Path) -> None:
    whole, parts, store = Problem(), Problem(), StateStore()
    whole.loop(keep_best=False).run()
    parts.loop(keep_best=False, store=store).run(until=5)
    for value in parts.model.parameters():
        nn.init.zeros_(value)  # something else has used the model meanwhile
    curve = parts.loop(keep_best=False, store=store).run()
    assert [point.step for point in curve] == [3, 5, 6, 9, 12]
    assert_same(whole, parts)


def test_a_state_of_other_work_is_not_taken_up(tmp_path: Path) -> None:
    whole, other = Problem(), Problem()
    whole.loop(identity="b").run()
    Problem().loop(store=StateStore(tmp_path / "s"), identity="a").run(until=5)
    other.loop(store=StateStore(tmp_path / "s"), identity="b").run()
    assert_same(whole, other)


def test_a_damaged_state_is_done_without(tmp_path: Path) -> None:
    whole, again = Problem(), Problem()
    whole.loop().run()
    Problem().loop(store=StateStore(tmp_path / "s")).run(until=5)
    (tmp_path / "s" / "state.safetensors").write_bytes(b"cut off")
    again.loop(store=StateStore(tmp_path / "s")).run()
    assert_same(whole, again)


def test_a_run_that_makes_things_worse_leaves_its_start() -> None:
    problem = Problem()
    before = problem.values()
    problem.evaluate = lambda step: Point(step, float(step))  # type: ignore[method-assign]
    curve = problem.loop(evaluate_start=True).run()
    assert [point.step for point in curve] == [0, 3, 6, 9, 12]
    assert all(torch.equal(a, b) for a, b in zip(before, problem.values(), strict=True))


def test_a_point_that_may_not_be_the_result_is_not() -> None:
    problem = Problem()
    before = problem.values()
    problem.evaluate = lambda step: Point(step, float(step), keep=step > 0)  # type: ignore[method-assign]
    problem.loop(evaluate_start=True).run()
    assert not any(torch.equal(a, b) for a, b in zip(before, problem.values(), strict=True))


def test_without_a_better_evaluation_it_stops() -> None:
    problem = Problem()
    problem.evaluate = lambda step: Point(step, abs(step - 3.0))  # type: ignore[method-assign]
    curve = problem.loop(SCHEDULE.model_copy(update={"patience": 2})).run()
    assert [point.step for point in curve] == [3, 6, 9]


def test_the_head_has_a_rate_of_its_own() -> None:
    class WithHead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.ModuleDict({"task": nn.Linear(1, 1, bias=False)})
            self.inner = nn.Linear(1, 1, bias=False)

    model = WithHead()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    schedule = Schedule(steps=1, batch_size=1, learning_rate=0.1, head_rate=0.01)
    TrainingLoop(model, [1], lambda rows: model.inner.weight.sum() + model.heads["task"].weight.sum(), schedule).run()
    moved = {name: float((value.detach() - before[name]).abs()) for name, value in model.named_parameters()}
    assert moved["heads.task.weight"] == pytest.approx(0.01 * moved["inner.weight"], rel=1e-2)
