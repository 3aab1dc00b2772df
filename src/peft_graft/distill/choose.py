"""Choosing among candidates by the teacher's answers on held-out text.

candidates, each moved by one method -> its head fitted -> the best on held-out text (-> polished, ``polish``)

All that a verb has to call, of this package:

    distillation = ask_teacher(checkpoint, models, pool, run, train=...)    # teacher.py; left out without text
    builder = CandidateBuilder(..., run, distillation)                      # candidates.py
    outcome = choose(builder, methods, config.head)
    outcome, record = polish(outcome, settings, run, identity=...)          # polish.py
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from peft_graft.alignment.methods import Method
from peft_graft.config import HeadChoice
from peft_graft.distill.agreement import EXACT, Agreement, Verdict, judge
from peft_graft.distill.candidates import Candidate, CandidateBuilder
from peft_graft.errors import AlignmentError
from peft_graft.run import Run


@dataclass(frozen=True)
class Outcome:
    """The graft that the teacher's answers led to.

    Attributes:
        candidate: the chosen one; its attached model holds the values of its checkpoint.
        head: ``carried`` through the maps, or ``fitted`` to the answers; None without a head.
        verdict: how it agrees with the teacher now. tried: agreement of every candidate, by what it is.
        fit: what the fit of the head reports.
    """

    candidate: Candidate
    head: str | None
    verdict: Verdict
    tried: dict[str, Agreement] = field(default_factory=dict)
    fit: dict[str, float] = field(default_factory=dict)


def choose(builder: CandidateBuilder, methods: Sequence[Method], head: HeadChoice) -> Outcome:
    """The candidate, with its head carried or fitted, that agrees best with the teacher on held-out text.

    Candidates are made one by one and no more after an exact one, so that what is not needed is not computed; no more
    than the best one's model and the present one's are held. Where the teacher is not asked (``builder.distillation``
    is None) the first method's is taken unmeasured.

    Args:
        methods: to try, in this order. head: as in ``GraftConfig``.

    Raises:
        AlignmentError: no method can move the module.
    """
    if builder.distillation is None:
        found = builder.build(methods[0])
        return Outcome(found, "carried" if found.head else None, judge(None))
    best: Outcome | None = None
    tried: dict[str, Agreement] = {}
    refused: AlignmentError | None = None
    for method in methods:
        try:
            outcome = _fitted(builder.build(method), head, tried, builder.run)
        except AlignmentError as error:  # such as a module that this method's maps cannot move
            refused = error
            continue
        if best is None or _divergence(outcome) < _divergence(best):
            best = outcome
        moved = outcome.verdict.moved
        del outcome  # with its model, unless it is the best
        if moved is not None and moved.divergence <= EXACT:
            break
    if best is None:
        assert refused is not None
        raise refused
    return best


def _fitted(candidate: Candidate, head: HeadChoice, tried: dict[str, Agreement], run: Run) -> Outcome:
    """A candidate with its head fitted, where that is wanted and better; what was measured is added to ``tried``."""
    with run.stage("fitting"):
        moved = candidate.measure()
        tried[f"{candidate.method}, as moved"] = moved
        own = candidate.checkpoint
        carried = Outcome(candidate, "carried" if own.head else None, judge(moved, moved), tried)
        if not own.head or head not in ("auto", "fit") or not own.head.can_be_fitted or moved.divergence <= EXACT:
            return carried
        checkpoint, report = candidate.fit_head(own)
        candidate.put(checkpoint)
        found = candidate.measure()
        tried[f"{candidate.method}, head fitted"] = found
        if head == "fit" or found.divergence < moved.divergence:
            candidate.checkpoint = checkpoint
            return Outcome(candidate, "fitted", judge(found, moved), tried, report)
        candidate.put(own)
        return carried


def _divergence(outcome: Outcome) -> float:
    assert outcome.verdict.measured is not None
    return outcome.verdict.measured.divergence
