"""How far predictions of classes, numbers or hidden states agree with the teacher's, with intervals over texts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from peft_graft.checkpoints.attached import AttachedModel
from peft_graft.distill.agreement import EXACT, TAUGHT, Agreement, Draws, Interval, by_group, drawn, less
from peft_graft.distill.finite import check_finite
from peft_graft.distill.targets import Kind, Targets, answers_to, log_probabilities, stacked, varying
from peft_graft.models.loading import ModelHandle

#: Divergences below, in nats, leave no room for decisions that differ on other text.
_SAME = 1e-4
#: A teacher's module that moves the last hidden state by less than this share of it, squared, does nothing there.
_IDLE = 1e-9


def compare(
    given: Tensor, targets: Tensor, kind: Kind, shift: Tensor | None = None, draws: Draws | None = None
) -> Agreement:
    """Agreement of answers [n, classes] logits with targets [n, classes] log-probabilities (``labels``:
    [n, labels, 2]; ``numbers``: [n, outputs]; ``spans``: both [n, 2, length]; ``hidden``: [n, d_s]).

    Args:
        shift: ``hidden`` only, [n, d_s]: by how much the targets differ from the bare student's states.
        draws: how to draw intervals; there are none without.

    Raises:
        NotFiniteError: an answer or a target is not finite.
    """
    for values, whose in ((given, "student"), (targets, "teacher")):
        check_finite(values, whose, (f"number {row + 1}" for row in range(len(values))))
    if not len(targets):
        nothing = "the two models read no word of the text alike; give text in a language that both read"
        return Agreement(agreement=None, divergence=0.0, answers=0, undefined=nothing)
    if kind == "hidden":
        assert shift is not None
        return _of_shifts(given, targets, shift, draws)
    if kind == "numbers":
        return _of_numbers(given, targets, draws)
    return _of_classes(given, targets, kind, draws)


def _of_numbers(given: Tensor, targets: Tensor, draws: Draws | None) -> Agreement:
    varies = varying(targets)
    errors = (given - targets).double().square()
    if not bool(varies.any()):
        same = _UNCHANGING.format("number", "its numbers")
        return Agreement(agreement=None, divergence=float(errors.mean()), answers=len(targets), undefined=same)
    # About their mean, without which sums of squares would lose what matters.
    known = targets.double() - targets.double().mean(0)
    rows = torch.cat(
        [torch.ones(len(known), 1, dtype=known.dtype), *(part[:, varies] for part in (errors, known, known**2))], 1
    )

    def unexplained(sums: Sequence[float], _: int = 0) -> float:
        count, outputs = sums[0], (len(sums) - 1) // 3
        wrong, totals, squares = (sums[1 + outputs * n : 1 + outputs * (n + 1)] for n in range(3))
        spreads = [square - total**2 / count for total, square in zip(totals, squares, strict=True)]
        # A draw in which an output does not vary says nothing of it, and counts as nothing explained.
        shares = [error / spread if spread > 0 else 1.0 for error, spread in zip(wrong, spreads, strict=True)]
        return sum(shares) / len(shares)

    error = unexplained(rows.sum(0).tolist())
    found = Agreement(agreement=1 - error, divergence=error, answers=len(targets))
    if draws is None:
        return found
    low, high = drawn(by_group(rows, draws.groups), unexplained, draws.seed)
    return found.model_copy(update={"agreement_interval": (1 - high, 1 - low), "divergence_interval": (low, high)})


def _of_shifts(given: Tensor, targets: Tensor, shift: Tensor, draws: Draws | None) -> Agreement:
    errors, shifts, states = (value.double().square().sum(1) for value in (given - targets, shift, targets - shift))
    whole = float(shifts.sum())
    if whole <= _IDLE * float(states.sum()):
        idle = "the teacher's module moves nothing on this text; give text of the task that it was trained for"
        return Agreement(agreement=None, divergence=float(errors.sum()), answers=len(targets), undefined=idle)
    error = float(errors.sum()) / whole
    found = Agreement(agreement=1 - error, divergence=error, answers=len(targets))
    if draws is None:
        return found
    constant = len(shift) * float(shift.double().mean(0).square().sum()) / whole
    if 1 - constant <= _IDLE:
        same = "the teacher's module does the same everywhere on this text; give text on which it differs"
        return found.model_copy(update={"agreement": None, "undefined": same})
    counts = by_group(torch.stack([errors, shifts], 1), draws.groups)
    low, high = drawn(counts, lambda sums, _: sums[0] / sums[1] if sums[1] else 1.0, draws.seed)
    return found.model_copy(
        update={
            "agreement_interval": (1 - high, 1 - low),
            "divergence_interval": (low, high),
            "constant": constant,
        }
    )


def _of_classes(given: Tensor, targets: Tensor, kind: Kind, draws: Draws | None) -> Agreement:
    student, teacher = log_probabilities(given.double(), kind), targets.double()
    divergences = (teacher.exp() * (teacher - student)).flatten(1).sum(-1)
    chosen, wanted = student.argmax(-1), teacher.argmax(-1)  # of labels, whether each holds
    one_hot = [torch.nn.functional.one_hot(side, targets.shape[-1]).double().flatten(1) for side in (wanted, chosen)]
    alike = (chosen == wanted).double().reshape(len(targets), -1).mean(1)
    rows = torch.cat([alike[:, None], divergences[:, None], *one_hot], 1)
    counts = torch.cat([torch.ones(len(rows), 1, dtype=rows.dtype), rows], 1)
    sums = counts.sum(0).tolist()
    divergence = max(0.0, float(divergences.mean()))
    # Distributions that differ from text to text and are met as they are: no chance, whatever they decide.
    common = teacher.exp().mean(0).clamp_min(1e-300).log()
    varied = (teacher.exp() * (teacher - common)).flatten(1).sum(-1).mean()
    exact = sums[1] == sums[0] and divergence <= EXACT and float(varied) > TAUGHT
    kappa = 1.0 if exact else _kappa(sums)
    unchanging = _OF_KIND.get(kind, ("class", "its classes"))
    found = Agreement(
        agreement=kappa,
        divergence=divergence,
        answers=len(targets),
        undefined=None if kappa is not None else _UNCHANGING.format(*unchanging),
    )
    if draws is None:
        return found
    groups = by_group(counts, draws.groups)
    spread: Interval | None = (1.0, 1.0) if exact else None
    if kappa is not None and not exact:
        # Draws with one class in them say nothing, and are counted as no agreement.
        spread = drawn(groups, lambda sums, _: _kappa(sums) or 0.0, draws.seed)
        if sums[1] == sums[0] and divergence > _SAME:
            spread = less(spread, len(groups), _chance(sums))
    return found.model_copy(
        update={
            "agreement_interval": spread,
            "divergence_interval": drawn(groups, lambda sums, _: max(0.0, sums[2] / sums[0]), draws.seed),
        }
    )


_UNCHANGING = (
    "the teacher gives the same {} to all of the held-out text, so agreement cannot be told from chance; give text on "
    "which {} differ"
)
_OF_KIND = {"labels": ("labels", "they"), "spans": ("answer", "its answers")}


def _kappa(sums: Sequence[float]) -> float | None:
    """Cohen's kappa of counts: all, alike, divergence, and how often the teacher and the student gave each class; of
    labels, how often each held and not, and of the ends of answers, how often each was at which token. Agreement and
    its chance are means over the labels, or the ends.

    None where the teacher gave one class: it is 0 then, or not defined, whatever the student says.
    """
    if all(count in (0, sums[0]) for count in _counts(sums)[0]):
        return None
    chance = _chance(sums)
    return (sums[1] / sums[0] - chance) / (1 - chance)


def _chance(sums: Sequence[float]) -> float:
    teacher, student = _counts(sums)
    decisions = sum(teacher) / sums[0]  # one, or as many as labels
    return sum(map(math.prod, zip(teacher, student, strict=True))) / sums[0] ** 2 / decisions


def _counts(sums: Sequence[float]) -> tuple[Sequence[float], Sequence[float]]:
    classes = (len(sums) - 3) // 2
    return sums[3 : 3 + classes], sums[3 + classes :]


def measure(
    attached: AttachedModel, student: ModelHandle, held_out: Targets, groups: Sequence[int] | None = None, seed: int = 0
) -> Agreement:
    """Agreement of a student with a module inside with the teacher on held-out text.

    Args:
        student: for its tokenizer. groups: of the samples, to draw intervals by; without it there are none.

    Raises:
        NotFiniteError: an answer of the student is not finite.
    """
    given, order = [], []
    for rows, answers in answers_to(attached, student, held_out, range(len(held_out))):
        given.append(answers)
        order.extend(rows)
    values = stacked(held_out.values[row] for row in order)
    shift = torch.cat([held_out.shift[row] for row in order]) if held_out.shift else None
    draws = None
    if groups is not None:
        draws = Draws([groups[row] for row in order for _ in range(len(held_out.values[row]))], seed)
    return compare(stacked(given), values, held_out.kind, shift, draws)
