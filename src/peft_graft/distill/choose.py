"""Choosing, fitting and polishing a graft by the teacher's predictions on unlabelled text.

    candidates, each moved by one method -> its head fitted -> the best on held-out text -> polished -> judged

Held-out text is never fitted or polished on.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from peft_graft.alignment.alignment import Alignment
from peft_graft.alignment.text import Sample
from peft_graft.checkpoints.attach import LiveModule, attach_raw
from peft_graft.checkpoints.raw import RawCheckpoint
from peft_graft.checkpoints.resolve import PeftCheckpoint, resolve
from peft_graft.distill.agreement import Agreement, Verdict, judge, measure
from peft_graft.distill.fit_head import can_fit, features, fit_head
from peft_graft.distill.gradient_start import reading_the_gradient, reads_the_gradient
from peft_graft.distill.polish import CurvePoint, PolishSettings, polish
from peft_graft.distill.targets import Kind, Predictions, kind_of, predict
from peft_graft.errors import AlignmentError
from peft_graft.graft import checkpoint_of_student, written_names
from peft_graft.models.loading import ModelHandle
from peft_graft.models.spaces import TOKENS_OUT, Space
from peft_graft.options import HeadChoice
from peft_graft.report import HeadRecord, PolishRecord, SiteRecord
from peft_graft.settings import Clock

#: Samples that judge, at most (a fifth of a short text), and that a head is fitted to.
HELD_OUT, LEAST_HELD_OUT, FIT = 300, 10, 1500
#: A graft this close to its teacher, in nats, is exact: it is left alone.
EXACT = 1e-6
TOKENS = Space(-1, TOKENS_OUT)
#: Where a polish may begin: the modules as they were moved, or idle ones that read where the gradient points.
STARTS = ("moved", "gradient")
#: Learning rates to choose from, and the share of the steps that one trial takes (one part in ``PILOT``).
RATES, PILOT = (3e-3, 1e-2), 20


@dataclass(frozen=True)
class Candidate:
    """A module moved to the student by one method."""

    method: str
    alignment: Alignment
    checkpoint: PeftCheckpoint
    sites: list[SiteRecord]
    head: HeadRecord | None


@dataclass(frozen=True)
class Outcome:
    """The graft that the teacher's predictions led to.

    Attributes:
        candidate: the chosen one, with the values that it has now.
        head: ``carried`` through the maps, or ``fitted`` to the predictions; None without a head.
        verdict: how it agrees with the teacher now. tried: agreement of every candidate, by what it is.
        fit: what the fit of the head reports. polish: the record of the polish, if there was one.
    """

    candidate: Candidate
    head: str | None
    verdict: Verdict
    tried: dict[str, Agreement]
    fit: dict[str, float]
    polish: PolishRecord | None = None


@dataclass
class Classroom:
    """Teacher, student and the teacher's predictions on the text to learn from and on the text that judges.

    ``adapted``: the teacher with its module inside. ``samples``: the text of ``lessons``.
    """

    adapted: LiveModule
    samples: Sequence[Sample]
    student: ModelHandle
    lessons: Predictions
    held_out: Predictions
    labels: tuple[str, ...]
    bf16: bool

    def live(self, checkpoint: PeftCheckpoint, *, trainable: bool = False) -> LiveModule:
        """The student with a checkpoint inside."""
        raw = checkpoint_of_student(checkpoint, self.student)
        names = written_names(self.student, raw.task)
        return attach_raw(raw, names, self.student, self.labels, trainable=trainable, bf16=self.bf16)

    def with_fitted_head(self, checkpoint: PeftCheckpoint) -> tuple[PeftCheckpoint, dict[str, float]]:
        """The checkpoint with its head fitted to the teacher's predictions, and the report of the fit."""
        assert checkpoint.head is not None
        read, targets = features(
            self.live(checkpoint), self.student, self.lessons.part(0, FIT), checkpoint.head.reads
        )  # fmt: skip
        head, report = fit_head(checkpoint.head, read, targets)
        return replace(checkpoint, head=head), report

    def read_back(self, raw: RawCheckpoint, outcome: Outcome) -> PeftCheckpoint:
        """The outcome's checkpoint with the values of a raw one that has the student's own paths."""
        student, before = self.student, outcome.candidate.checkpoint
        own = student.base_tensors(output=raw.trains_output)
        found = resolve(raw, student.architecture, own, with_head=before.head is not None)
        head = replace(found.head, labels=before.head.labels) if found.head and before.head else None
        return replace(before, modules=found.modules, head=head)

    def agreement(self, checkpoint: PeftCheckpoint) -> Agreement:
        """How a checkpoint agrees with the teacher on the held-out text."""
        return measure(self.live(checkpoint), self.student, self.held_out)


def open_classroom(
    checkpoint: PeftCheckpoint,
    teacher: ModelHandle,
    student: ModelHandle,
    pool: Sequence[Sample],
    *,
    lessons: int,
    write: Alignment | None,
    bf16: bool,
    clock: Clock,
) -> Classroom:
    """Ask the teacher about the text.

    Args:
        checkpoint: the teacher's module and, where it shall be carried, its head. pool: the first samples judge, the
            next ``lessons`` teach; sentence pairs, where there are fewer, teach the other way round too. write: for
            modules without a head, the map of the last hidden state.
    """
    judging = held_out_size(len(pool))
    chosen = list(pool[: judging + lessons])
    lacking = judging + lessons - len(chosen)
    chosen += [Sample(pair.second, pair.first) for pair in chosen[judging:] if pair.second is not None][:lacking]
    kind: Kind = kind_of(checkpoint.head)
    labels = checkpoint.head.labels if checkpoint.head else ()
    with clock("asking the teacher"):
        names = written_names(teacher, checkpoint.raw.task)
        module = attach_raw(checkpoint.raw, names, teacher, labels, bf16=bf16)
        found = predict(
            teacher,
            student,
            module,
            chosen,
            kind,
            write=(lambda shift: write.map((TOKENS, TOKENS)).apply(shift, 1, "write")) if write else None,
            progress=clock.progress,
        )
    return Classroom(module, chosen[judging:], student, found.part(judging), found.part(0, judging), labels, bf16)


def held_out_size(samples: int) -> int:
    """How many of the samples judge."""
    return min(HELD_OUT, samples // 5)


def best_graft(room: Classroom, candidates: Iterable[Callable[[], Candidate]], head: HeadChoice,
               clock: Clock) -> Outcome:  # fmt: skip
    """The candidate, with its head carried or fitted, that agrees best with the teacher on the held-out text.

    Candidates are made one by one and no more after an exact one, so that what is not needed is not computed.

    Raises:
        AlignmentError: no method can move the module.
    """
    best: tuple[float, Outcome] | None = None
    tried: dict[str, Agreement] = {}
    refused: AlignmentError | None = None
    for make in candidates:
        try:
            candidate = make()
        except AlignmentError as error:  # such as a module that this method's maps cannot move
            refused = error
            continue
        with clock("fitting"):
            live = room.live(candidate.checkpoint)
            moved = measure(live, room.student, room.held_out)
            tried[f"{candidate.method}, as moved"] = moved
            options = [(moved, candidate, "carried" if candidate.checkpoint.head else None, dict[str, float]())]
            own = candidate.checkpoint.head
            if own and head in ("auto", "fit") and can_fit(own) and moved.divergence > EXACT:
                fitted, report = room.with_fitted_head(candidate.checkpoint)
                changed = replace(candidate, checkpoint=fitted)
                found = room.agreement(changed.checkpoint)
                tried[f"{candidate.method}, head fitted"] = found
                if head == "fit" or found.divergence < moved.divergence:
                    options = [(found, changed, "fitted", report)]
        for agreement, option, how, report in options:
            if best is None or agreement.divergence < best[0]:
                best = agreement.divergence, Outcome(option, how, judge(agreement, moved), tried, report)
        if moved.divergence <= EXACT:
            break
    if best is None:
        assert refused is not None
        raise refused
    return best[1]


def polished(
    room: Classroom,
    outcome: Outcome,
    settings: PolishSettings,
    *,
    work: Path | None,
    identity: str,
    clock: Clock,
    starts: Sequence[str] = STARTS,
) -> Outcome:
    """The outcome after a label-free polish.

    Where to begin and how fast is tried first: every start for a twentieth of the steps, then the better one at every
    rate. What does best on the held-out text goes on with the steps that are left.

    Args:
        settings: ``steps`` counts all of it, what was tried in vain too; ``learning_rate`` is not used.
        work: a folder for the state of an interrupted run. identity: see ``polish``.
        starts: of ``STARTS``, where to begin; ``gradient`` is for modules that read hidden states: LoRA and bottleneck
            adapters inside the layers.
    """
    if not reads_the_gradient(room.adapted.raw):
        starts = [start for start in starts if start != "gradient"]
    pilot = settings.steps // PILOT
    arms = (len(starts) + len(RATES) - 2) if pilot else 0
    main = settings.model_copy(update={"steps": settings.steps - arms * pilot})
    with clock("polishing"), _folder(work) as folder:
        checkpoints = {"moved": outcome.candidate.checkpoint}

        def run(start: str, rate: float, until: int | None = None) -> tuple[LiveModule, list[CurvePoint]]:
            if start not in checkpoints:
                checkpoints[start] = _gradient_start(room, outcome)
            live = room.live(checkpoints[start], trainable=True)
            return live, polish(
                live, room.student, room.lessons, room.held_out, main.model_copy(update={"learning_rate": rate}),
                work=folder / f"{start} {rate:g}", identity=identity, until=until, progress=clock.progress,
            )  # fmt: skip

        def trial(start: str, rate: float) -> CurvePoint:
            # An arm that has gone on before an interruption has later points too.
            return next(point for point in run(start, rate, pilot)[1] if point.step == pilot)

        start, rate, tried = starts[0], RATES[0], dict[tuple[str, float], CurvePoint]()
        if pilot:
            tried = {(each, rate): trial(each, rate) for each in starts}
            start, _ = min(tried, key=lambda arm: tried[arm].divergence)
            tried |= {(start, each): trial(start, each) for each in RATES[1:]}
            start, rate = min(tried, key=lambda arm: tried[arm].divergence)
        live, curve = run(start, rate)
        now = measure(live, room.student, room.held_out)
        checkpoint = room.read_back(live.checkpoint(), outcome)
    record = PolishRecord(
        settings=main.model_copy(update={"learning_rate": rate}),
        start=start,
        pilots={f"{name} {each:g}": point for (name, each), point in tried.items()},
        samples=len(room.lessons),
        curve=curve,
    )
    before = outcome.verdict.measured
    if before and before.divergence < now.divergence:  # the start that was taken never came to where another one stood
        return replace(outcome, polish=record)
    return replace(
        outcome,
        candidate=replace(outcome.candidate, checkpoint=checkpoint),
        verdict=judge(now, outcome.verdict.moved),
        polish=record,
    )


def _gradient_start(room: Classroom, outcome: Outcome) -> PeftCheckpoint:
    """Neutral modules that read where the gradient points, below a head of their own where the outcome's is fitted."""
    before = outcome.candidate.checkpoint
    neutral = replace(before, modules={site: module.neutral() for site, module in before.modules.items()})
    if outcome.head == "fitted":
        neutral, _ = room.with_fitted_head(neutral)
    return room.read_back(
        reading_the_gradient(room.live(neutral, trainable=True), room.student, room.lessons), outcome
    )  # fmt: skip


@contextmanager
def _folder(work: Path | None) -> Iterator[Path]:
    """The folder for the states of a polish, a passing one where none is named."""
    if work is not None:
        yield work
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
