"""The page of a graft, made from its report alone."""

from __future__ import annotations

import shlex
from collections import Counter
from typing import Any

from peft_graft.card import model_name, without_paths
from peft_graft.distill.agreement import LEVELS, GenerationAgreement
from peft_graft.distill.breakdown import ClassCounts, DecidedText
from peft_graft.labels import are_numbers
from peft_graft.models.loading import ModelRecord
from peft_graft.models.tasks import Task
from peft_graft.page import details, figures
from peft_graft.page.differences import differences, shortened
from peft_graft.page.render import render
from peft_graft.report import KINDS, AnswerSample, GraftReport

#: Examples at the top of the page.
_EXAMPLES = 3
#: Its file, beside the checkpoint.
PAGE = "report.html"
#: Kinds of modules as people write them.
_OLD, _NEW, _UNTOUCHED = "teacher (old)", "graft (new)", "without the graft"


def graft_page(report: GraftReport, name: str) -> str:
    """One HTML file that says what a graft is and how good. It names no folder of this machine.

    Args:
        name: the graft's folder, or its id on the hub.
    """
    everyday = _everyday_class(report)
    values: dict[str, Any] = {
        "title": f"{name} · graft report",
        "report": report,
        "name": name,
        "kind": KINDS.get(report.module_kind, report.module_kind),
        "teacher": _model(report, report.teacher, "teacher"),
        "student": _model(report, report.student, "student"),
        "moved": _moved(report),
        "gauge": _gauge(report),
        "practice": _practice(report),
        "facts": _facts(report),
        "next": _next(report, name),
        **_examples(report, everyday),
        "classes": _classes(report.classes),
        **_disagreements(report),
        "answers": [_answer(sample) for sample in report.answers],
        "method": f"By {report.method}: {without_paths(report.method_reason, report)}.",
        "layer_maps": details.layer_maps(report),
        "fit": details.fit(report),
        "tried": [
            [what, figures.number(found.agreement), f"{found.divergence:.3f}"] for what, found in report.tried.items()
        ],
        "learned": details.learned(report),
        "curve": details.curve(report),
        "text_facts": details.text_facts(report),
        **details.cost(report),
        "notes": [without_paths(note, report) for note in report.notes],
        "provenance": details.provenance(report),
    }
    return render("graft.html.jinja", **values)


# ---- the first screen ------------------------------------------------------------------------------------------------


def _model(report: GraftReport, record: ModelRecord, side: str) -> dict[str, str]:
    cost = getattr(report.cost, side) if report.cost else None
    parts = [record.model_type, f"{record.num_layers} layers of {record.hidden_size}"]
    if cost:
        parts.append(f"{figures.millions(cost.parameters)} parameters")
    return {"name": model_name(record), "about": " · ".join(parts)}


def _moved(report: GraftReport) -> str:
    sites = f"{len(report.sites)} module" + "s" * (len(report.sites) != 1)
    head = f", head {report.head.how or 'carried'}" if report.head else ""
    return f"{KINDS.get(report.module_kind, report.module_kind)}, {sites}{head}"


def _gauge(report: GraftReport) -> dict[str, Any] | None:
    """The verdict's figure on the scale of its levels; None where nothing was measured."""
    figure = report.verdict.figure
    if figure is None or figure.agreement is None:
        return None
    bounds = [max(0.0, least) for _, least, _ in reversed(LEVELS)] + [1.0]
    steps = [
        {
            "name": name,
            "start": round(100 * start, 1),
            "width": round(100 * (end - start), 1),
            "held": figure.agreement >= start,
            "minor": name == LEVELS[-1][0],
        }
        for (name, _, _), start, end in zip(reversed(LEVELS), bounds, bounds[1:], strict=False)
        if name != "exact"  # too narrow to be drawn
    ]
    low, high = figure.agreement_interval or (None, None)
    low_at = None if low is None else 100 * _within(low)
    return {
        "figure": figures.with_interval(figure.agreement, figure.agreement_interval),
        "steps": steps,
        "at": round(100 * _within(figure.agreement), 1),
        "low": low_at,
        "width": None if low_at is None else round(max(0.6, 100 * _within(high or 0.0) - low_at), 1),
    }


def _within(value: float) -> float:
    return min(1.0, max(0.0, value))


def _practice(report: GraftReport) -> list[str]:
    """What the verdict's figure means, in counts."""
    generated, measured = report.verdict.generated, report.verdict.measured
    if generated is not None:
        return [*_practice_of_answers(generated), *report.answered_alike]
    if measured is None or measured.agreement is None:
        return ["Nothing was measured, so nothing is promised."]
    if report.classes is not None:
        return report.decided_alike
    if report.documents is not None:
        return report.documents.verdict(measured)
    head = report.head
    if head is None:
        return [f"It reproduces {measured.agreement:.0%} of what the module does to the last hidden state."]
    if are_numbers(head.problem_type, len(head.labels)):
        return [f"It explains {measured.agreement:.0%} of how the teacher's numbers vary from text to text."]
    what = "where answers begin and end" if head.task is Task.QUESTION_ANSWERING else "which labels hold"
    return [f"It agrees with the teacher on {what} by {measured.agreement:.0%}, beyond what chance would."]


def _practice_of_answers(found: GenerationAgreement) -> list[str]:
    return [
        f"Of {found.answers} held-out prompts it answers {found.exact:.0%} word for word as the teacher does; the "
        f"student without it, {found.bare_exact:.0%}.",
        f"Its answers share {found.token_f1:.0%} of their words with the teacher's (F1); without it "
        f"{found.bare_token_f1:.0%}.",
    ]


def _facts(report: GraftReport) -> list[dict[str, str]]:
    """Cost and sizes, as far as they are known."""
    total = sum(report.seconds.values())
    device = report.hardware.get("gpu") or f"{report.hardware.get('cpus', '?')} CPU cores"
    longest = max(report.seconds, key=lambda stage: report.seconds[stage], default="")
    facts = [
        figures.fact("the move took", figures.duration(total), f"on {device}" + f", mostly {longest}" * bool(longest)),
        figures.fact("labels used", "0", "unlabelled text only" if report.text else "no text either"),
    ]
    cost = report.cost
    if cost:
        old, new = cost.teacher, cost.student
        facts.append(
            figures.fact(
                "parameters", f"{figures.millions(old.parameters)} → {figures.millions(new.parameters)}",
                figures.change(new.parameters / max(1, old.parameters)),
            )
        )  # fmt: skip
        if old.seconds and new.seconds:
            ratio = old.seconds / new.seconds
            words = f"{ratio:.1f}× as fast" if ratio >= 1 else f"{1 / ratio:.1f}× as slow"
            facts.append(
                figures.fact("reading the same text", words, f"{cost.texts} held-out texts in a batch, on {device}")
            )
    if report.files:
        weights = sum(file.size for name, file in report.files.items() if name.endswith((".safetensors", ".bin")))
        facts.append(figures.fact("the graft's weights", figures.size(weights), f"{len(report.files)} files in all"))
    return facts


def _next(report: GraftReport, name: str) -> str:
    """What to do with it."""
    if report.prompts:
        return f"peft-graft evaluate {shlex.quote(name)} --text labelled.jsonl --metric exact"
    return f"graft = peft_graft.Graft.from_pretrained({name!r})\ngraft.model  # ready to use, or to be trained further"


# ---- examples --------------------------------------------------------------------------------------------------------


def _examples(report: GraftReport, everyday: str | None) -> dict[str, Any]:
    """Three of what was held out, as they came: nothing is picked for being good."""
    found: list[dict[str, Any]] = []
    for sample in report.answers[:_EXAMPLES]:
        shown = _answer(sample)
        sides = [
            {"name": _OLD, "parts": shown["teacher"], "tag": "del", "untouched": False},
            {"name": _NEW, "parts": shown["graft"], "tag": "mark", "untouched": False},
            {"name": _UNTOUCHED, "parts": [(_visible(sample.bare), False)], "tag": "mark", "untouched": True},
        ]
        found.append({"text": shown["prompt"], "sides": sides})
    # Texts of which the teacher says something; where it says the same of every word there is nothing to see.
    telling = [one for one in report.decisions if one.first and any(d.teacher != everyday for d in one.decisions)]
    for text in (telling or report.decisions)[:_EXAMPLES]:
        sides = [
            {"name": label, "words": _words(text, side, everyday), "untouched": side == "bare"}
            for label, side in ((_OLD, "teacher"), (_NEW, "graft"), (_UNTOUCHED, "bare"))
            if side != "bare" or all(decision.bare is not None for decision in text.decisions)
        ]
        found.append({"text": None if _is_tagged(text) else shortened(" / ".join(text.texts)), "sides": sides})
    what = "the first held-out prompts" if report.answers else "the first held-out texts"
    if not report.answers and report.tags_words and everyday is not None:
        what += f" in which the teacher finds more than “{everyday}”, which is not written"
    return {
        "examples": found,
        "examples_note": f"These are {what}; none is picked. Marked is where the new one differs from the old one.",
    }


def _answer(sample: AnswerSample) -> dict[str, Any]:
    teacher, graft, alike = differences(_visible(sample.teacher), _visible(sample.graft))
    return {"prompt": shortened(sample.prompt), "teacher": teacher, "graft": graft, "alike": alike}


def _visible(answer: str) -> str:
    return shortened(answer.strip()) or "(no answer)"


def _everyday_class(report: GraftReport) -> str | None:
    """The class of most words, which need no tag; None where a text has one class."""
    if report.classes is None or not report.tags_words:
        return None
    counts = Counter[str]()
    for wanted, _, count in report.classes.counts:
        counts[report.classes.labels[wanted]] += count
    return counts.most_common(1)[0][0] if counts else None


def _is_tagged(text: DecidedText) -> bool:
    return any(decision.word is not None for decision in text.decisions)


def _words(text: DecidedText, side: str, everyday: str | None) -> list[dict[str, Any]]:
    """A text in parts: words with their class, where it is not the everyday one, and what stands between them."""
    found: list[dict[str, Any]] = []
    whole, at = " / ".join(text.texts), 0
    for decision in text.decisions:
        label = getattr(decision, side)
        differs = side != "teacher" and label != decision.teacher
        if decision.word is None:
            return [_part(label, differs=differs)]
        place = whole.find(decision.word, at)
        if place < 0:
            continue
        found += [_part(whole[at:place])] * (place > at)
        found.append(_part(decision.word, label if differs or label != everyday else None, differs=differs))
        at = place + len(decision.word)
    return [*found, _part(shortened(whole[at:]))]


def _part(text: str, label: str | None = None, *, differs: bool = False) -> dict[str, Any]:
    return {"text": text, "label": label, "differs": differs}


def _disagreements(report: GraftReport) -> dict[str, Any]:
    rows = []
    for text in sorted(report.decisions, key=lambda one: -one.divergence):
        differing = [decision for decision in text.decisions if decision.teacher != decision.graft]
        if not differing:
            continue
        if not _is_tagged(text):
            sides = [[_part(differing[0].teacher)], [_part(differing[0].graft, differs=True)]]
        else:
            sides = [
                [
                    part
                    for decision in differing
                    for part in (
                        _part(str(decision.word), getattr(decision, side), differs=side == "graft"),
                        _part(" "),
                    )
                ]
                for side in ("teacher", "graft")
            ]
        rows.append(
            {
                "text": shortened(" / ".join(text.texts)), "teacher": sides[0], "graft": sides[1],
                "divergence": text.divergence,
            }
        )  # fmt: skip
    note = "Of the held-out texts those on which the two are furthest apart, and those of the first ten that differ."
    return {"disagreements": rows, "disagreements_note": note}


def _classes(found: ClassCounts | None) -> dict[str, Any] | None:
    if found is None or not found.counts:
        return None
    teacher, graft, same, others = Counter[int](), Counter[int](), Counter[int](), dict[int, Counter[int]]()
    for wanted, given, count in found.counts:
        teacher[wanted] += count
        graft[given] += count
        if wanted == given:
            same[wanted] += count
        else:
            others.setdefault(wanted, Counter())[given] += count
    rows = []
    for label in sorted({*teacher, *graft}, key=lambda one: -teacher[one]):
        other = others[label].most_common(1)[0] if label in others else None
        rows.append(
            {
                "label": found.labels[label],
                "teacher": teacher[label],
                "graft": graft[label],
                "kept": same[label] / teacher[label] if teacher[label] else None,
                "otherwise": f"{found.labels[other[0]]} ({other[1]})" if other else "",
            }
        )
    return {
        "note": "How often each class is given on the held-out text, and how much of the teacher's the graft keeps.",
        "rows": rows,
        "picture": details.confusion(found),
    }
