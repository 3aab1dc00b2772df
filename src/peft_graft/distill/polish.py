"""Label-free polish: the grafted module is trained on the teacher's predictions over the same unlabelled text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from peft_graft.checkpoints.attach import LiveModule
from peft_graft.distill.agreement import Agreement, measure
from peft_graft.distill.targets import Predictions, answers, batches, distillation_loss
from peft_graft.files import read_json, read_tensors, write_json, write_tensors, written_aside
from peft_graft.models.loading import ModelHandle
from peft_graft.options import Progress

_WARM_UP = 0.06
_STATE = "state"


class PolishSettings(BaseModel):
    """How to polish: AdamW, linear decay after 6 % warm-up, gradients clipped at norm 1.

    Attributes:
        steps: batches. batch_size: samples in one. learning_rate: of the module, at its height.
        head_rate: the head's learning rate over the module's; a fitted head, full matrices, needs care.
        evaluations: points of the held-out curve, the start not counted. seed: of the order and of dropout.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    steps: int
    batch_size: int = 32
    learning_rate: float = 3e-3
    head_rate: float = 0.1
    evaluations: int = 6
    seed: int = 0


class CurvePoint(BaseModel):
    """Agreement on held-out text after a number of steps."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    step: int
    agreement: float
    divergence: float


@dataclass
class _State:
    """All that an interrupted polish needs to go on, beside the text and the models."""

    step: int = 0
    curve: list[CurvePoint] = field(default_factory=list)


def polish(
    live: LiveModule,
    student: ModelHandle,
    lessons: Predictions,
    held_out: Predictions,
    settings: PolishSettings,
    *,
    work: Path | None = None,
    identity: str = "",
    until: int | None = None,
    progress: Progress | None = None,
) -> list[CurvePoint]:
    """Train the live graft in place, and leave it at the best point of its held-out curve.

    Args:
        lessons: what to learn. held_out: what to be judged by.
        work: a folder for the state of an interrupted run; a run that finds the state of the same work there goes on
            from it, to the same result. Without it an interruption starts anew.
        identity: what is polished with what; a state of another identity is not used.
        until: stop after this many of the steps, with a point of the curve there; the same work goes on from it later.

    Returns:
        The curve; its first point is the graft before the polish.
    """
    parameters = live.trainable()
    head = [value for name, value in parameters.items() if _is_head(name)]
    inner = [value for name, value in parameters.items() if not _is_head(name)]
    groups = [{"params": inner, "share": 1.0}, {"params": head, "share": settings.head_rate}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], settings.learning_rate)
    key = hashlib.sha256(f"{identity}{settings.model_dump_json()}".encode()).hexdigest()
    best = _Best(parameters)
    state = _load(work, key, parameters, optimizer, best)
    due = {max(1, round(settings.steps * n / settings.evaluations)) for n in range(1, settings.evaluations + 1)}
    last = settings.steps if until is None else min(until, settings.steps)
    if not state.curve:
        start = _add_point(state, measure(live, student, held_out))
        if live.is_active:  # neutral modules may begin a polish, but are no result of one
            best.offer(start, parameters)
    try:
        for rows in _schedule(lessons, settings, state.step, last):
            _set_rate(optimizer, settings, state.step)
            torch.manual_seed(settings.seed * 1_000_003 + state.step)  # dropout, the same after a resume
            live.model.train()
            loss = distillation_loss(answers(live, student, lessons, rows).float(), lessons, rows)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            state.step += 1
            if state.step in due or state.step == last:
                best.offer(_add_point(state, measure(live, student, held_out)), parameters)
                _save(work, key, parameters, optimizer, best, state)
            if progress:
                progress("polishing", state.step, last)
    except KeyboardInterrupt:
        _save(work, key, parameters, optimizer, best, state)
        raise
    best.restore(parameters)
    live.model.eval()
    return state.curve


def _is_head(name: str) -> bool:
    """Whether a parameter belongs to the head: peft keeps it in ``modules_to_save``, adapters in ``heads``."""
    return "modules_to_save." in name or name.startswith("heads.")


class _Best:
    """The parameters at the best point of the curve."""

    def __init__(self, parameters: dict[str, torch.nn.Parameter]) -> None:
        self.divergence = float("inf")
        self.values = {name: value.detach().clone() for name, value in parameters.items()}

    def offer(self, point: CurvePoint, parameters: dict[str, torch.nn.Parameter]) -> None:
        if point.divergence < self.divergence:
            self.divergence = point.divergence
            self.values = {name: value.detach().clone() for name, value in parameters.items()}

    def restore(self, parameters: dict[str, torch.nn.Parameter]) -> None:
        with torch.no_grad():
            for name, value in parameters.items():
                value.copy_(self.values[name])


def _add_point(state: _State, found: Agreement) -> CurvePoint:
    point = CurvePoint(step=state.step, agreement=found.agreement, divergence=found.divergence)
    state.curve.append(point)
    return point


def _schedule(lessons: Predictions, settings: PolishSettings, start: int, last: int) -> Iterator[list[int]]:
    """The batches of the steps [start, last); each pass over the text has its own order."""
    lengths = [len(row["input_ids"]) for row in lessons.inputs]
    step = epoch = 0
    while step < last:
        for rows in batches(lengths, settings.batch_size, settings.seed * 1000 + epoch):
            if step == last:
                return
            if step >= start:
                yield rows
            step += 1
        epoch += 1


def _set_rate(optimizer: torch.optim.Optimizer, settings: PolishSettings, step: int) -> None:
    warm = max(1, int(_WARM_UP * settings.steps))
    share = min(1.0, (step + 1) / warm) * (1 - step / settings.steps)
    for group in optimizer.param_groups:
        group["lr"] = settings.learning_rate * share * group["share"]


def _save(
    work: Path | None,
    key: str,
    parameters: dict[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    best: _Best,
    state: _State,
) -> None:
    if work is None:
        return
    tensors: dict[str, Tensor] = {}
    for name, value in parameters.items():
        tensors[f"value/{name}"] = value.detach().clone()
        tensors[f"best/{name}"] = best.values[name]
        for part, moment in optimizer.state.get(value, {}).items():
            tensors[f"{part}/{name}"] = torch.as_tensor(moment).detach().clone()
    with written_aside(work, force=True) as staging:
        write_tensors(staging / f"{_STATE}.safetensors", tensors)
        write_json(
            staging / f"{_STATE}.json",
            {
                "key": key,
                "step": state.step,
                "best": best.divergence,
                "curve": [point.model_dump() for point in state.curve],
            },
        )


def _load(
    work: Path | None,
    key: str,
    parameters: dict[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    best: _Best,
) -> _State:
    if work is None or not (work / f"{_STATE}.json").is_file():
        return _State()
    found: dict[str, Any] = read_json(work / f"{_STATE}.json")
    if found.get("key") != key:
        return _State()
    tensors = read_tensors(work / f"{_STATE}.safetensors")
    with torch.no_grad():
        for name, value in parameters.items():
            value.copy_(tensors[f"value/{name}"])
            best.values[name] = tensors[f"best/{name}"].to(value.device)
            moments = {part: tensors[f"{part}/{name}"] for part in ("step", "exp_avg", "exp_avg_sq")
                       if f"{part}/{name}" in tensors}  # fmt: skip
            if moments:
                optimizer.state[value] = {
                    part: moment if part == "step" else moment.to(value.device) for part, moment in moments.items()
                }
    best.divergence = found["best"]
    return _State(found["step"], [CurvePoint(**point) for point in found["curve"]])
