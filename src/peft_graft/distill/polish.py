"""Label-free polish: the grafted module is trained on the teacher's answers to the same unlabelled text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from peft_graft.checkpoints.resolve import PeftCheckpoint
from peft_graft.distill.candidates import Candidate
from peft_graft.distill.choose import Outcome
from peft_graft.distill.finite import NotFiniteError
from peft_graft.distill.gradient_start import gradient_start, reads_the_gradient
from peft_graft.distill.training import Point, Schedule, StateStore, TrainingLoop
from peft_graft.record import Record
from peft_graft.run import Run

#: Where a polish may begin: the modules as they were moved, or ones that change nothing yet and read where the gradient
#: points.
STARTS = ("moved", "gradient")
#: Learning rates to choose from, and the share of the steps that one trial takes (one part in ``PILOT``).
RATES, PROMPT_RATES, PILOT = (3e-3, 1e-2), (2e-3, 5e-3), 20
STAGE = "polishing"
_WEIGHT_DECAY = 0.01


class PolishSettings(Record):
    """How to polish: AdamW, linear decay after 6 % warm-up, gradients clipped at norm 1.

    Attributes:
        steps: batches. batch_size: samples in one. learning_rate: of the module, at its height.
        head_rate: the head's learning rate over the module's; a fitted head, full matrices, needs care.
        rates: that are tried for it.
        evaluations: points of the held-out curve, the start not counted. seed: of the order and of dropout.
    """

    steps: int
    batch_size: int = 32
    learning_rate: float = 3e-3
    rates: tuple[float, ...] = RATES
    head_rate: float = 0.1
    evaluations: int = 6
    seed: int = 0

    @property
    def parts(self) -> list[int]:
        """The steps after which equal parts of the course are done, one for each of the evaluations."""
        return [max(1, round(self.steps * n / self.evaluations)) for n in range(1, self.evaluations + 1)]

    def schedule(self) -> Schedule:
        """The same for the training loop."""
        return Schedule(
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            head_rate=self.head_rate,
            weight_decay=_WEIGHT_DECAY,
            seed=self.seed,
            evaluations=tuple(sorted(set(self.parts))),
        )


class CurvePoint(Record):
    """Agreement on the text that chooses after a number of steps; no divergence where the training diverged."""

    step: int
    agreement: float | None
    divergence: float | None


class PolishRecord(Record):
    """A label-free polish: its settings, the samples it learned from and the held-out curve.

    ``start``: ``moved`` or ``gradient`` (``STARTS``). ``pilots``: what was tried first, as "start rate", and
    how far it came. ``trials``: the held-out curves of these, from where each began.
    """

    settings: PolishSettings
    start: str
    pilots: dict[str, CurvePoint]
    samples: int
    curve: list[CurvePoint]
    trials: dict[str, list[CurvePoint]] = {}

    @property
    def trial_steps(self) -> int:
        """Steps that went into trials, but for those of the arm that was chosen, which goes on from its own."""
        each = [point.step for point in self.pilots.values()]
        return sum(each) - max(each, default=0)


def polish(
    outcome: Outcome,
    settings: PolishSettings,
    run: Run,
    *,
    identity: str = "",
    starts: Sequence[str] = STARTS,
) -> tuple[Outcome, PolishRecord | None]:
    """The outcome after a label-free polish, and the record of it; unchanged where there is nothing to gain.

    Where to begin and how fast is tried first: every start for a twentieth of the steps, then the better one at every
    rate. What does best on the text that chooses goes on with the steps that are left. A polish that never came to
    where the outcome stood before leaves that as it was.

    Args:
        outcome: with an attached model, which is trained; an exact one is left alone, without a record.
        settings: ``steps`` counts all of it, what was tried in vain too; ``learning_rate`` is not used.
        run: ``work`` is where an interrupted polish leaves its state, and where the same work takes it up, to the same
            result bit for bit.
        identity: what is polished with what; a state of another identity is not taken up.
        starts: of ``STARTS``, where to begin; ``gradient`` is for modules that read hidden states: LoRA and bottleneck
            adapters inside the layers.
    """
    candidate = outcome.candidate
    if not settings.steps or candidate.attached is None or outcome.is_exact:
        return outcome, None
    with run.stage(STAGE):
        course = _Course(outcome, settings, run, identity, _possible(starts, candidate))
        start, rate = course.choose()
        curve = course.train(start, rate)
        now = candidate.measure()
        raw = candidate.learning[1].raw()
        better = now.divergence <= outcome.divergence
        if not better:
            candidate.put(candidate.checkpoint)
    record = PolishRecord(
        settings=course.settings.model_copy(update={"learning_rate": rate}),
        start=start,
        pilots={f"{name} {each:g}": point for (name, each), point in course.tried.items()},
        samples=len(candidate.learning[0].lengths),
        curve=curve,
        trials={f"{name} {each:g}": points for (name, each), points in course.trials.items()},
    )
    if not better:
        return outcome, record
    polished = replace(candidate, checkpoint=candidate.read_back(raw))
    return replace(outcome, candidate=polished, found=now), record


def _point(candidate: Candidate, step: int) -> Point:
    """A point of the held-out curve, after so many steps."""
    try:
        found = candidate.measure()
    except NotFiniteError:  # the training has diverged; what was best before stays
        return Point(step, math.inf, keep=False)
    # Modules that change nothing may begin a polish, but are no result of one.
    keep = step > 0 or candidate.learning[1].is_active
    values = {} if found.agreement is None else {"agreement": found.agreement}
    return Point(step, found.divergence, values, keep=keep)


def _possible(starts: Sequence[str], candidate: Candidate) -> list[str]:
    raw = candidate.learning[0].teacher.checkpoint
    reads = reads_the_gradient(raw)
    return [start for start in starts if reads or start != "gradient"]


@dataclass
class _Course:
    """The arms of a polish: where each begins, how fast it goes, and how far the trials came.

    ``settings``: of one arm, whose steps are those that the trials leave.
    """

    outcome: Outcome
    asked: PolishSettings
    run: Run
    identity: str
    starts: Sequence[str]
    tried: dict[tuple[str, float], CurvePoint] = field(default_factory=dict)
    trials: dict[tuple[str, float], list[CurvePoint]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.pilot = self.asked.steps // PILOT
        arms = (len(self.starts) + len(self.asked.rates) - 2) if self.pilot else 0
        self.settings = self.asked.model_copy(update={"steps": self.asked.steps - arms * self.pilot})
        self._checkpoints = {"moved": self.outcome.candidate.checkpoint}
        self._stores: dict[str, StateStore] = {}
        self._arms = arms

    def choose(self) -> tuple[str, float]:
        """The start and the rate that came furthest in a trial."""
        start, rate = self.starts[0], self.asked.rates[0]
        if not self.pilot:
            return start, rate
        for each in self.starts:
            self._try(each, rate)
        start, _ = self._best()
        for other in self.asked.rates[1:]:
            self._try(start, other)
        return self._best()

    def train(self, start: str, rate: float, until: int | None = None) -> list[CurvePoint]:
        """Train from a start at a rate, from where an earlier call of the same arm stopped; the held-out curve.

        The attached model is left at its best point. With ``until`` it stops after this many of the steps, with a point
        there.
        """
        candidate, arm = self.outcome.candidate, f"{start} {rate:g}"
        if start not in self._checkpoints:
            self._checkpoints[start] = self._gradient_start()
        candidate.put(self._checkpoints[start])
        folder: Path | None = self.run.work / arm if self.run.work else None
        store = self._stores.setdefault(arm, StateStore(folder))
        settings = self.settings.model_copy(update={"learning_rate": rate})
        before = self.pilot * (self._arms if until is None else len(self.tried))
        distillation, attached = candidate.learning
        loop = TrainingLoop(
            attached.model,
            distillation.lengths,
            lambda rows: distillation.loss(attached, rows, loop.step / settings.steps),
            settings.schedule(),
            partial(_point, candidate),
            evaluate_start=True,
            store=store,
            identity=self.identity,
            on_step=lambda step, loss: self.run.step(STAGE, before + step, self.asked.steps, float(loss)),
            processes=self.run.processes,
            weight=distillation.weight,
        )
        return [
            CurvePoint(
                step=point.step,
                agreement=point.values.get("agreement"),
                divergence=point.cost if math.isfinite(point.cost) else None,
            )
            for point in loop.run(until)
        ]

    def _try(self, start: str, rate: float) -> None:
        curve = self.train(start, rate, self.pilot)
        # An arm that has gone on before an interruption has later points too.
        self.trials[start, rate] = [point for point in curve if point.step <= self.pilot]
        self.tried[start, rate] = self.trials[start, rate][-1]

    def _best(self) -> tuple[str, float]:
        def cost(arm: tuple[str, float]) -> float:
            divergence = self.tried[arm].divergence
            return math.inf if divergence is None else divergence

        return min(self.tried, key=cost)

    def _gradient_start(self) -> PeftCheckpoint:
        """Modules that change nothing and read where the gradient points, below a head fitted to such modules if the
        outcome's is fitted."""
        candidate = self.outcome.candidate
        distillation, _ = candidate.learning
        before = candidate.checkpoint
        start = replace(before, modules={site: module.neutral() for site, module in before.modules.items()})
        candidate.put(start)
        if self.outcome.head == "fitted":
            start, _ = candidate.fit_head(start)
            candidate.put(start)
        _, attached = candidate.learning
        return candidate.read_back(gradient_start(attached, distillation))
