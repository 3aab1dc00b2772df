"""Choosing among candidates by the teacher's answers on one part of the held-out text, judging the result on another.

candidates, each moved by one method -> its head fitted -> the best (-> polished, ``polish``) -> judged

All that a verb has to call, of this package:

    distillation = ask_teacher(checkpoint, models, parts, run, train=...)   # teacher.py; left out without text
    builder = CandidateBuilder(..., run, distillation)                      # candidates.py
    outcome = choose(builder, methods, config.head)
    outcome, record = polish(outcome, settings, run, identity=...)          # polish.py
    verdict = judged(outcome, run)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from peft_graft.alignment.methods import Method
from peft_graft.config import HeadChoice
from peft_graft.distill.agreement import EXACT, Agreement, Verdict, judge
from peft_graft.distill.candidates import FITTING, Candidate, CandidateBuilder
from peft_graft.distill.finite import NotFiniteError
from peft_graft.errors import AlignmentError
from peft_graft.run import Run


@dataclass(frozen=True)
class Outcome:
    """The graft that the teacher's answers led to.

    Attributes:
        candidate: the chosen one; its attached model holds the values of its checkpoint.
        head: ``carried`` through the maps, or ``fitted`` to the answers; None without a head.
        moved: how it agreed with the teacher as moved by the maps, nothing fitted, on the text that judges; nothing is
            chosen by that. None where the teacher is not asked.
        found: how it agrees with the teacher now, on the text that chooses; None where the teacher is not asked.
        tried: the same of every candidate, by what it is. notes: on candidates that were left out.
        fit: what the fit of the head reports.
    """

    candidate: Candidate
    head: str | None
    moved: Agreement | None = None
    found: Agreement | None = None
    tried: dict[str, Agreement] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    fit: dict[str, float] = field(default_factory=dict)

    @property
    def is_exact(self) -> bool:
        """Whether it computes what the teacher does."""
        return self.found is not None and self.found.divergence <= EXACT

    @property
    def divergence(self) -> float:
        """What is to be small, of an outcome that was measured."""
        assert self.found is not None
        return self.found.divergence


def choose(builder: CandidateBuilder, methods: Sequence[Method], head: HeadChoice) -> Outcome:
    """The candidate, with its head carried or fitted, that agrees best with the teacher on the text that chooses.

    Candidates are made one by one and no more after an exact one, so that what is not needed is not computed; no more
    than the best one's model and the present one's are held. Where the teacher is not asked (``builder.distillation``
    is None) the first method's is taken unmeasured.

    Args:
        methods: to try, in this order. head: as in ``GraftConfig``.

    Raises:
        AlignmentError: no method can move the module. NotFiniteError: with none of them the student's answers are
            finite.
    """
    if builder.distillation is None:
        found = builder.build(methods[0])
        return Outcome(found, "carried" if found.head else None)
    best: Outcome | None = None
    tried, notes = dict[str, Agreement](), list[str]()
    refused: AlignmentError | NotFiniteError | None = None
    for method in methods:
        try:
            outcome, exact = _fitted(builder.build(method), head, tried, builder.run)
        except AlignmentError as error:  # such as a module that this method's maps cannot move
            refused = error
            continue
        except NotFiniteError as error:
            refused = error
            notes.append(f"{method.name} left out: {error}")
            continue
        if best is None or outcome.divergence < best.divergence:
            best = outcome
        del outcome  # with its model, unless it is the best
        if exact:
            break
    if best is None:
        assert refused is not None
        raise refused
    return replace(best, notes=notes)


def judged(outcome: Outcome, run: Run, *, seed: int = 0) -> Verdict:
    """The verdict on an outcome, with the values that are written, by text that nothing was fitted to or chosen by.

    Args:
        seed: of the intervals.

    Raises:
        NotFiniteError: an answer of the student is not finite.
    """
    candidate = outcome.candidate
    if candidate.attached is None:
        return judge(None)
    with run.stage("judging"):
        candidate.put(candidate.checkpoint)
        measured = candidate.judge()
    return judge(measured, outcome.moved, seed=seed)


def _fitted(candidate: Candidate, head: HeadChoice, tried: dict[str, Agreement], run: Run) -> tuple[Outcome, bool]:
    """A candidate with its head fitted, where that is wanted and better, and whether it was exact as moved; what was
    measured is added to ``tried``."""
    with run.stage(FITTING):
        moved = candidate.measure()
        tried[f"{candidate.method}, as moved"] = moved
        own = candidate.checkpoint
        carried = Outcome(candidate, "carried" if own.head else None, candidate.judge(), moved, tried)
        if not own.head or head not in ("auto", "fit") or not own.head.can_be_fitted or carried.is_exact:
            return carried, carried.is_exact
        checkpoint, report = candidate.fit_head(own)
        candidate.put(checkpoint)
        found = candidate.measure()
        tried[f"{candidate.method}, head fitted"] = found
        if head == "fit" or found.divergence < moved.divergence:
            candidate.checkpoint = checkpoint
            return replace(carried, head="fitted", found=found, fit=report), False
        candidate.put(own)
        return carried, False
