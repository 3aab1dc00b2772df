"""What stands below the first screen of a graft's page: pictures, text, cost, provenance."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from peft_graft.card import model_name, public_name, without_paths
from peft_graft.distill.ask_documents import DocumentRecord
from peft_graft.distill.breakdown import ClassCounts
from peft_graft.distill.polish import CurvePoint
from peft_graft.models.loading import ModelRecord
from peft_graft.page.pictures import Picture, curves, heat_map, layer_map
from peft_graft.report import GraftReport

#: Classes whose counts are drawn, at most.
_MOST_DRAWN = 12


def layer_maps(report: GraftReport) -> list[Picture]:
    """The map of layers, one picture for each stack."""
    layers = report.layers if isinstance(report.layers, dict) else {"": report.layers}
    found = []
    for stack, sources in layers.items():
        most = max((source + 1 for each in sources for source in each), default=0)
        depth = max(most, report.teacher_layers.get(stack, most if stack else report.teacher.num_layers))
        found.append(layer_map(sources, depth, f"{stack} layers".strip().capitalize()))
    return [picture for picture, sources in zip(found, layers.values(), strict=True) if sources]


def fit(report: GraftReport) -> Picture | None:
    """A value for every module by layer and role: how well its spaces matched or, of a module that came through no
    map, its share of the teacher's."""
    places = [_place(site.site) for site in report.sites]
    known = {
        name: {
            place: _mean([one.diagnostics[name] for one in site.maps if name in one.diagnostics])
            for place, site in zip(places, report.sites, strict=True)
        }
        for name in ("mean_correlation", "read_explained")
    }
    ways = {
        "mean_correlation": ("Fit", "Mean correlation of the matched units at each module: how alike the two models' "
                             "activations are there.", False),
        "read_explained": ("Fit", "Share of the activations that the map explains at each module.", True),
    }  # fmt: skip
    for name, (title, caption, percent) in ways.items():
        if any(value is not None for value in known[name].values()):
            return heat_map(known[name], title, caption, rows_are="student layer", percent=percent)
    shares = {place: site.share for place, site in zip(places, report.sites, strict=True)}
    if not any(shares.values()):
        return None
    caption = "Where the teacher's module has its weight: the share of its squared norm that each module stands for."
    return heat_map(shares, "Weight", caption, rows_are="student layer", percent=True)


def _place(site: str) -> tuple[str, str]:
    """Layer and role of a module, as a heat map has them; what belongs to no layer has a row of its own."""
    layer, _, role = site.removeprefix("layer ").partition(" ")
    return (layer, role) if role and site.startswith("layer ") else ("model", site)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def confusion(found: ClassCounts) -> Picture | None:
    """The counts of classes, teacher by graft; None where there are too many to be seen."""
    teacher = Counter[int]()
    for wanted, given, count in found.counts:
        teacher[wanted] += count
        teacher[given] += 0
    order = [label for label, _ in teacher.most_common()]
    if not 1 < len(order) <= _MOST_DRAWN:
        return None
    counts = {(wanted, given): count for wanted, given, count in found.counts}
    shares = {
        (found.labels[wanted], found.labels[given]): counts.get((wanted, given), 0) / max(1, teacher[wanted])
        for wanted in order
        for given in order
    }
    caption = "Rows: the teacher's class; columns: the graft's; of each row the share."
    return heat_map(shares, "Teacher against graft", caption, rows_are="teacher", percent=True)


def learned(report: GraftReport) -> str:
    """The polish in a sentence."""
    polish = report.polish
    if polish is None:
        return "Nothing was trained: the module is as the maps moved it."
    tried = ""
    if polish.pilots:
        tried = f" {polish.trial_steps:,} steps before them chose among {len(polish.pilots)} starts and rates."
    return (
        f"{polish.settings.steps:,} steps on what the teacher says about {polish.samples:,} samples, without labels, "
        f"from {report.polished_from}, at rate {polish.settings.learning_rate:g}.{tried}"
    )


def curve(report: GraftReport) -> Picture | None:
    """How the polish approached the teacher, and every trial before it."""
    polish = report.polish
    if polish is None or not polish.curve:
        return None
    trials = polish.trials or {name: [point] for name, point in polish.pilots.items()}
    chosen = f"{polish.start} {polish.settings.learning_rate:g}"
    lines = {f"{chosen} (chosen)": polish.curve, **{name: found for name, found in trials.items() if name != chosen}}
    with_agreement = all(point.agreement is not None for points in lines.values() for point in points)
    series = {name: points for name, found in lines.items() if (points := _points(found, agreement=with_agreement))}
    y = "agreement" if with_agreement else "nats from the teacher"
    caption = "On held-out text, after so many steps. Names are where a run began and its learning rate."
    return curves(series, "Polish", caption, x="steps", y=y) if series else None


def _points(found: Sequence[CurvePoint], *, agreement: bool) -> list[tuple[float, float]]:
    values = [(point.step, point.agreement if agreement else point.divergence) for point in found]
    return [(step, value) for step, value in values if value is not None]


def text_facts(report: GraftReport) -> list[tuple[str, str]]:
    """What was read, and how its tokens pair."""
    found, pairing, asked = list[tuple[str, str]](), report.pairing, report.prompts
    if report.text:
        found.append(("text", public_name(report.text)))
    if pairing:
        found += [
            ("samples aligned on", f"{pairing.samples:,}"),
            ("tokens paired", f"{pairing.pairs:,}, {pairing.one_to_one:,} of them one to one"),
            ("of the teacher's tokens", f"{pairing.teacher_share_paired:.1%} of {pairing.teacher_tokens:,}"),
            ("of the student's tokens", f"{pairing.student_share_paired:.1%} of {pairing.student_tokens:,}"),
        ]
    if report.documents:
        found += _of_documents(report.documents)
    if asked:
        found += [
            ("prompts learned from", f"{asked.prompts:,}"),
            ("prompts held out", f"{asked.held_out:,}" + f", {asked.judging} of them to judge" * bool(asked.judging)),
            ("tokens in both vocabularies", f"{asked.shared_tokens:,}"),
            ("positions where tokens pair", f"{asked.strict_share:.1%}"),
            ("the module makes the teacher's answers likelier by", f"{asked.module_effect:.2f} nats a token"),
        ]
        odd = (("left out, too long", asked.too_long), ("given twice", asked.duplicates), ("answers cut", asked.cut),
               ("empty answers", asked.empty), ("answers given", asked.given))  # fmt: skip
        found += [(what, f"{count:,}") for what, count in odd if count]
        if asked.made:
            found.append(("made", asked.made.text))
    return found


def _of_documents(read: DocumentRecord) -> list[tuple[str, str]]:
    found = [
        ("documents learned from", f"{read.documents:,}, {read.tokens:,} tokens"),
        ("documents held out", f"{read.held_out:,}, {read.judging} of them to judge"),
        ("tokens in both vocabularies", f"{read.shared_tokens:,}"),
        ("positions where tokens pair", f"{read.strict_share:.1%}"),
        ("the module changes the text's log-likelihood by", f"{read.module_effect:.2f} nats a token"),
    ]
    odd = ((f"cut after {read.longest} tokens", read.cut), ("left out, too short", read.too_short))
    return [*found, *((what, f"{count:,}") for what, count in odd if count)]


def cost(report: GraftReport) -> dict[str, Any]:
    """Seconds by stage, and sizes side by side."""
    longest = max(report.seconds.values(), default=0.0) or 1.0
    order = sorted(report.seconds.items(), key=lambda item: -item[1])
    stages = [{"name": name, "seconds": taken, "share": min(1.0, max(0.0, taken / longest))} for name, taken in order]
    found, sizes = report.cost, []
    if found:
        sides = found.teacher, found.student
        sizes = [
            ["parameters of the model", *(f"{side.parameters:,}" for side in sides)],
            ["parameters of the module", *(f"{side.module_parameters:,}" for side in sides)],
        ]
        if all(side.seconds is not None for side in sides):
            times = (f"{1000 * side.seconds:,.0f} ms" for side in sides if side.seconds is not None)
            sizes.append([f"to read {found.texts} held-out texts", *times])
    return {"stages": stages, "sizes": sizes}


def provenance(report: GraftReport) -> list[dict[str, Any]]:
    """Where everything came from, with hashes, and what it was made with."""
    settings = report.settings.model_dump(mode="json", exclude_defaults=True)
    loads = report.verification
    check = [("loads", _verified(report))] if loads else []
    parts: list[tuple[str, list[tuple[str, str]]]] = [
        ("Teacher", _model_rows(report.teacher)),
        ("Student", _model_rows(report.student)),
        (f"Module, {public_name(report.module)}", list(report.module_files.items())),
        ("Graft", [*check, *((name, f"{file.sha256} · {file.size:,} bytes") for name, file in report.files.items())]),
        ("Settings other than the defaults", [(name, json.dumps(value, ensure_ascii=False)) for name, value in
                                              settings.items() if name != "token"]),
        ("Versions", list(report.versions.items())),
        ("Machine", [(name, str(value)) for name, value in report.hardware.items()]),
    ]  # fmt: skip
    return [
        {"title": title, "rows": [(name, without_paths(value, report)) for name, value in rows]}
        for title, rows in parts
        if rows
    ]


def _verified(report: GraftReport) -> str:
    check = report.verification
    assert check is not None
    if not check.done:
        return f"not verified: {check.library} is not installed"
    change = "" if check.output_change is None else f", changes the output by {check.output_change:.1%} of its range"
    return f"in {check.library} {check.version}, {check.tensors_loaded} tensors{change}"


def _model_rows(record: ModelRecord) -> list[tuple[str, str]]:
    rows = [("name", model_name(record)), ("type", record.model_type)]
    return [*rows, *([("fingerprint", record.fingerprint)] if record.fingerprint else [])]
