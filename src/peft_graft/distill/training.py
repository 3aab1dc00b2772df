"""The one training loop: the polish of a graft and the fine-tuning of studies, resumed bit for bit.

Every step seeds torch with its own number, and every pass over the data has an order of its own seed; so a run that was
interrupted and goes on from its saved state computes what the undisturbed one does.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peft_graft.models.devices import seed_generators, trainable_attention
from peft_graft.outputs import read_state, write_state
from peft_graft.processes import ALONE, Processes
from peft_graft.record import Record
from peft_graft.run import uninterrupted

#: Share of the steps in which the learning rate rises.
WARM_UP = 0.06
_MAX_NORM = 1.0
#: Batches of like length are cut from so many batches' rows at a time, drawn at random.
_GROUPED = 8


class Schedule(Record):
    """How to train: AdamW, linear warm-up over 6 % of the steps and linear decay, gradients clipped at norm 1.

    Attributes:
        steps: updates. batch_size: rows in a batch; ``accumulation`` batches make an update.
        learning_rate: at its height. head_rate: the head's learning rate over the others'.
        weight_decay: AdamW's. seed: of the order of rows and of dropout.
        evaluations: steps after which to evaluate; the last step is always one.
        patience: stop after so many evaluations without a better one; None trains to the end.
        bf16, fp16: forward passes in mixed precision, fp16 with a scaled loss.
    """

    steps: int
    batch_size: int
    learning_rate: float
    accumulation: int = 1
    head_rate: float = 1.0
    weight_decay: float = 0.0
    seed: int = 0
    evaluations: tuple[int, ...] = ()
    patience: int | None = None
    bf16: bool = False
    fp16: bool = False

    def rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        warm = max(1, int(WARM_UP * self.steps))
        return self.learning_rate * min(1.0, (step + 1) / warm) * (1 - step / self.steps)


@dataclass(frozen=True)
class Point:
    """An evaluation.

    Attributes:
        step: updates before it. cost: what is to be small; the point with the least is the best.
        values: what else was found, to be recorded.
        keep: whether the parameters of this point may be the result.
    """

    step: int
    cost: float
    values: Mapping[str, float] = field(default_factory=dict)
    keep: bool = True


class StateStore:
    """Where a loop keeps its state: in memory, and in a folder too if one is given.

    A kill leaves the last whole state in the folder, or the one before.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._held: tuple[dict[str, Tensor], dict[str, Any]] | None = None

    def save(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Replace what is kept; the tensors are copied."""
        self._held = {name: value.detach().clone() for name, value in tensors.items()}, dict(record)
        if self.folder is not None:
            write_state(self.folder, tensors, record)

    def load(self, key: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What is kept of the work with this key, None where nothing is."""
        if self._held is None and self.folder is not None:
            self._held = read_state(self.folder, key)
        return self._held if self._held and self._held[1].get("key") == key else None


@dataclass
class TrainingLoop:
    """Trains whatever parameters of a model are free, in place.

    Attributes:
        model: whose parameters are trained. lengths: tokens of every row; batches are of like length.
        loss: the loss of a batch, given its rows' numbers; called with the model in training mode.
        schedule: how to train.
        evaluate: says how good the model is, after ``step`` updates; without it the last parameters are the result.
        evaluate_start: whether to evaluate before the first step too.
        keep_best: whether to leave the best evaluation's parameters in the model, or the last ones.
        store: where to keep the state; what it holds of the same work is taken up. None keeps none.
        identity: what is trained on what; a state of another identity is not taken up.
        on_step: called with the number of steps done and the loss. What it raises ends the run; on a
            ``KeyboardInterrupt`` the state is kept.
        processes: that share every batch. weight: what the loss of rows is a mean over, with which theirs are added up.
    """

    model: nn.Module
    lengths: Sequence[int]
    loss: Callable[[list[int]], Tensor]
    schedule: Schedule
    evaluate: Callable[[int], Point] | None = None
    evaluate_start: bool = False
    keep_best: bool = True
    store: StateStore | None = None
    identity: str = ""
    on_step: Callable[[int, Tensor], None] | None = None
    processes: Processes = ALONE
    weight: Callable[[list[int]], float] = len

    def __post_init__(self) -> None:
        self._parameters: dict[str, Tensor] = {
            name: value for name, value in self.model.named_parameters() if value.requires_grad
        }
        self._device = next(iter(self._parameters.values())).device
        # By default torch updates one parameter after another on processors, in half as long as the gradients take.
        fused = True if self._device.type == "cpu" else None
        self._optimizer = torch.optim.AdamW(self._groups(), weight_decay=self.schedule.weight_decay, fused=fused)
        self._scaler = torch.amp.GradScaler(self._device.type, enabled=self.schedule.fp16)
        self._step, self._since, self._least = 0, 0, float("inf")
        self._curve: list[Point] = []
        self._best = self._copy() if self.keep_best and self.evaluate else {}

    @property
    def step(self) -> int:
        """Updates so far."""
        return self._step

    def run(self, until: int | None = None) -> list[Point]:
        """Train, and leave the model in evaluation mode with the result's parameters.

        Args:
            until: stop after so many of the steps, with an evaluation there; the same work goes on from it later.

        Returns:
            The evaluations, also those of earlier runs of the same work.
        """
        schedule = self.schedule
        last = schedule.steps if until is None else min(until, schedule.steps)
        self._take_up()
        try:
            if self._lacks_point(last):  # also where an interruption came in an evaluation
                self._add_point()
            self.model.train()
            for batches in self._updates(last):
                if self._is_enough():
                    break
                loss = self._update(batches)
                if self._is_due(last):
                    if self._lacks_point(last):
                        self._add_point()
                        self.model.train()
                    self._keep()
                if self.on_step:
                    self.on_step(self._step, loss)
        except KeyboardInterrupt:
            self._keep()
            raise
        self._leave_result()
        return self._curve

    def _groups(self) -> list[dict[str, Any]]:
        head = [value for name, value in self._parameters.items() if is_head(name)]
        inner = [value for name, value in self._parameters.items() if not is_head(name)]
        groups: list[dict[str, Any]] = [
            {"params": inner, "share": 1.0},
            {"params": head, "share": self.schedule.head_rate},
        ]
        return [group for group in groups if group["params"]]

    def _updates(self, last: int) -> Iterator[list[list[int]]]:
        """The batches of every update that is left, up to ``last``; each pass over the rows has its own order."""
        schedule, step, epoch = self.schedule, 0, 0
        start = self._step
        while step < last:
            order = list(length_batches(self.lengths, schedule.batch_size, schedule.seed * 1000 + epoch))
            for at in range(0, len(order), schedule.accumulation):
                if step == last:
                    return
                if step >= start:
                    yield order[at : at + schedule.accumulation]
                step += 1
            epoch += 1

    def _update(self, batches: list[list[int]]) -> Tensor:
        for group in self._optimizer.param_groups:
            group["lr"] = self.schedule.rate_at(self._step) * group["share"]
        seed_generators(self.schedule.seed * 1_000_003 + self._step, self._device)  # dropout, the same after a resume
        total = torch.zeros((), device=self._device)
        for rows in batches:
            own = self.processes.share(rows)
            if not own:
                continue
            part = 1.0 if self.processes.alone else self.weight(own) / (self.weight(rows) or 1.0)
            with self._precision():
                loss = self.loss(own) * (part / len(batches))
            self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            total += loss.detach().to(self._device)
        self._add_up(total)
        self._scaler.unscale_(self._optimizer)
        torch.nn.utils.clip_grad_norm_(self._parameters.values(), _MAX_NORM)
        with uninterrupted():  # half an update is what no state may hold
            self._scaler.step(self._optimizer)
            self._scaler.update()
            self._optimizer.zero_grad()
            self._step += 1
        return total

    def _add_up(self, total: Tensor) -> None:
        """Loss and gradients of all processes' shares of the batches, in one message."""
        if self.processes.alone:
            return
        values = list(self._parameters.values())
        gradients = [torch.zeros_like(value) if value.grad is None else value.grad for value in values]
        there = torch.tensor([value.grad is not None for value in values], device=total.device)
        parts = [total.reshape(1), there, *(gradient.reshape(-1) for gradient in gradients)]
        message = torch.cat([part.float() for part in parts])
        self.processes.add_up([message])
        total.copy_(message[0])
        anywhere, sums = message[1 : 1 + len(values)], message[1 + len(values) :]
        each = torch.split(sums, [value.numel() for value in values])
        for value, used, found in zip(values, anywhere, each, strict=True):
            value.grad = found.view_as(value).to(value.dtype) if used else None

    def _precision(self) -> AbstractContextManager[Any]:
        if not self.schedule.bf16 and not self.schedule.fp16:
            return nullcontext()
        return mixed_precision(self._device, torch.bfloat16 if self.schedule.bf16 else torch.float16)

    def _add_point(self) -> None:
        assert self.evaluate is not None
        found = self.evaluate(self._step)
        point = self.processes.of_first(lambda: found)  # rounding must not have them go on differently
        self._curve.append(point)
        self._since += 1
        if point.keep and point.cost < self._least:
            self._least, self._since = point.cost, 0
            if self.keep_best:
                self._best = self._copy()

    def _copy(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self._parameters.items()}

    def _is_due(self, last: int) -> bool:
        if self._step == 0:
            return self.evaluate_start
        return self._step in self.schedule.evaluations or self._step == last

    def _lacks_point(self, last: int) -> bool:
        known = bool(self._curve) and self._curve[-1].step == self._step
        return self.evaluate is not None and self._is_due(last) and not known

    def _is_enough(self) -> bool:
        return self.schedule.patience is not None and self._since >= self.schedule.patience

    def _leave_result(self) -> None:
        with torch.no_grad():
            for name, value in self._best.items():
                self._parameters[name].copy_(value)
        self.model.eval()

    @property
    def _key(self) -> str:
        return hashlib.sha256(f"{self.identity}{self.schedule.model_dump_json()}".encode()).hexdigest()

    def _keep(self) -> None:
        if self.store is None:
            return
        tensors = {f"value/{name}": value for name, value in self._parameters.items()}
        tensors |= {f"best/{name}": value for name, value in self._best.items()}
        for name, value in self._parameters.items():
            for part, moment in self._optimizer.state.get(value, {}).items():
                tensors[f"{part}/{name}"] = torch.as_tensor(moment)
        record = {
            "key": self._key,
            "step": self._step,
            "least": _number(self._least),
            "since": self._since,
            "scaler": self._scaler.state_dict(),
            "curve": [
                {**vars(point), "cost": _number(point.cost), "values": dict(point.values)} for point in self._curve
            ],
        }
        self.store.save(tensors, record)

    def _take_up(self) -> None:
        own = self.store.load(self._key) if self.store else None
        held = self.processes.of_first(lambda: own)
        self.processes.equal(value.data for value in self._parameters.values())
        if held is None:
            return
        tensors, record = held
        self._best = {}
        with torch.no_grad():
            for name, value in self._parameters.items():
                value.copy_(tensors[f"value/{name}"])
                if f"best/{name}" in tensors:
                    self._best[name] = tensors[f"best/{name}"].to(value.device, copy=True)
                moments = {
                    part: tensors[f"{part}/{name}"]
                    for part in ("step", "exp_avg", "exp_avg_sq")
                    if f"{part}/{name}" in tensors
                }
                if moments:  # AdamW counts its steps on the CPU
                    self._optimizer.state[value] = {
                        part: moment.to("cpu" if part == "step" else value.device, copy=True)
                        for part, moment in moments.items()
                    }
        if self.schedule.fp16:
            self._scaler.load_state_dict(record["scaler"])
        self._step, self._since, self._least = record["step"], record["since"], _cost(record["least"])
        self._curve = [Point(**{**point, "cost": _cost(point["cost"])}) for point in record["curve"]]


def _number(cost: float) -> float | None:
    """A cost as JSON has it, which knows no infinity."""
    return cost if math.isfinite(cost) else None


def _cost(number: float | None) -> float:
    return math.inf if number is None else number


def length_batches(lengths: Sequence[int], size: int = 32, seed: int | None = None) -> Iterator[list[int]]:
    """Numbers of rows in batches of like length, so that little is padded; with a seed in random order."""
    if seed is None:
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        yield from (order[start : start + size] for start in range(0, len(order), size))
        return
    from transformers.trainer_pt_utils import get_length_grouped_indices

    generator = torch.Generator().manual_seed(seed)
    order = get_length_grouped_indices(lengths, size, mega_batch_mult=_GROUPED, generator=generator)
    chunks = [order[start : start + size] for start in range(0, len(order), size)]
    yield from (chunks[index] for index in torch.randperm(len(chunks), generator=generator).tolist())


def mixed_precision(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Forward passes in ``dtype``, with an attention whose gradients are cheap."""
    stack = ExitStack()
    stack.enter_context(torch.autocast(device.type, dtype))
    stack.enter_context(trainable_attention(device, bf16=dtype == torch.bfloat16))
    return stack


def is_head(name: str) -> bool:
    """Whether a parameter belongs to the head: peft keeps it in ``modules_to_save``, adapters in ``heads``."""
    return "modules_to_save." in name or name.startswith("heads.")
