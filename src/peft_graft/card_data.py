"""What a model card says to machines: the metadata that the hub reads, and the licences of what went in."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from peft_graft.checkpoints.raw import RawCheckpoint
from peft_graft.config import Library
from peft_graft.errors import plain
from peft_graft.models.places import hub_id_of, is_folder
from peft_graft.models.tasks import Task
from peft_graft.report import GraftReport

#: What the hub tells checkpoints of a library by, where that is not the library's name.
_TAGS: Mapping[str, list[str]] = {Library.ADAPTERS: ["adapter-transformers"]}
#: Values that the hub knows: identifiers of licences, codes of languages.
_LICENCE, _LANGUAGE = re.compile(r"[a-z0-9][\w.+-]{0,60}", re.ASCII), re.compile(r"[a-z]{2,3}(-[A-Za-z]{2,8})?|code")
_LONGEST_CARD, _LONGEST = 1_000_000, 200
_WHO = ("the new base", "the old base", "the module")


@dataclass(frozen=True)
class Provenance:
    """What the cards of the new base, the old base and the module say of themselves.

    Attributes:
        licences: by whose card says so. unknown: whose card names none. languages, datasets: of the module's card.
    """

    licences: Mapping[str, str]
    unknown: Sequence[str]
    languages: Sequence[str]
    datasets: Sequence[str]

    @classmethod
    def of(cls, report: GraftReport, token: str | None = None) -> Provenance:
        """Read the cards in the models' folders, or on the hub where it can be reached."""
        places = report.student.reachable, report.teacher.reachable, report.module
        cards = {who: _card_of(place, token) for who, place in zip(_WHO, places, strict=True)}
        licences = {who: found[0] for who, card in cards.items() if (found := _strings(card.get("license"), _LICENCE))}
        module = cards[_WHO[2]]
        return cls(
            licences=licences,
            unknown=[who for who in _WHO if who not in licences],
            languages=_strings(module.get("language"), _LANGUAGE),
            datasets=[name for name in _strings(module.get("datasets")) if hub_id_of(name) == name],
        )

    @property
    def licence(self) -> str | None:
        """The one licence of them all; ``other`` where they differ, None where nothing is known of the new base."""
        if len(set(self.licences.values())) > 1:
            return "other"
        return self.licences.get(_WHO[0])

    @property
    def remark(self) -> str:
        """What a reader has to know of the licences, in words."""
        named = "; ".join(f"{who}: {licence}" for who, licence in self.licences.items())
        unknown = f"the card of {' and of '.join(self.unknown)} names none that could be read" if self.unknown else ""
        if len(set(self.licences.values())) > 1:
            named = f"They differ, and what is made from all of them has to keep to each ({named})"
        return ". ".join(part[0].upper() + part[1:] for part in (named, unknown) if part)


def card_data(  # all that the card itself is made from
    report: GraftReport,
    raw: RawCheckpoint,
    task: Task,
    provenance: Provenance,
    graft: str,
    results: Iterable[EvalResult],
) -> ModelCardData:
    """The metadata.

    Args:
        task: of the graft, with its head. graft: what the card calls it. results: of evaluations, beside the verdict.
    """
    base, text = report.student.hub_id, (report.text or "").partition(":")[0]
    found = [*_verdict(report, task), *map(_plain, results)]
    on_hub = "/" in text and not Path(text).exists() and hub_id_of(text) == text
    datasets = [*provenance.datasets, *([text] if on_hub else [])]
    tags = ["peft-graft", report.module_kind, *_TAGS.get(raw.library, [])]
    if base:
        tags.append(f"base_model:adapter:{base}")
    return ModelCardData(
        base_model=base,
        base_model_relation="adapter" if base else None,
        library_name=report.module_library,
        pipeline_tag=task.pipeline_tag,
        tags=[_short(tag) for tag in tags],
        license=provenance.licence,
        license_name="several" if provenance.licence == "other" else None,
        language=list(provenance.languages) or None,
        datasets=list(dict.fromkeys(datasets)) or None,
        model_name=(_short(graft) or "graft") if found else None,
        eval_results=found or None,
    )


def _verdict(report: GraftReport, task: Task) -> list[EvalResult]:
    """The figures of the verdict, where there are any."""
    verdict = report.verdict
    figure = verdict.figure
    if figure is None:
        return []
    values = {("agreement", "Agreement with the teacher"): figure.agreement}
    if verdict.measured:
        values["kl_divergence", "Divergence from the teacher (nats)"] = verdict.measured.divergence
    if verdict.generated:
        values["exact_match", "Answers that are the teacher's"] = verdict.generated.exact
        values["f1", "Word F1 with the teacher's answers"] = verdict.generated.token_f1
    return [
        EvalResult(
            task_type=task.pipeline_tag or "feature-extraction",
            dataset_type="held-out",
            dataset_name="Unlabelled text that was held out",
            metric_type=metric,
            metric_name=name,
            metric_value=round(value, 4),
        )
        for (metric, name), value in values.items()
        if value is not None and math.isfinite(value)
    ]


def _plain(result: EvalResult) -> EvalResult:
    """The same with text that YAML and the hub show as it is."""
    found = copy.copy(result)
    for name, value in vars(result).items():
        setattr(found, name, _short(value) if isinstance(value, str) else value)
    return found


def _card_of(place: str, token: str | None) -> Mapping[str, Any]:
    """The metadata of a model's or module's own card; empty where there is none that can be read."""
    try:
        if is_folder(place):
            with (Path(place) / "README.md").open(encoding="utf-8") as file:
                card = ModelCard(file.read(_LONGEST_CARD), ignore_metadata_errors=True)
        elif hub_id_of(place) == place:
            card = ModelCard.load(place, token=token, ignore_metadata_errors=True)
        else:
            return {}
        found: Mapping[str, Any] = card.data.to_dict()  # type: ignore[no-untyped-call]
    except Exception:  # others wrote it, and nothing depends on it
        return {}
    return found


def _strings(value: object, form: re.Pattern[str] | None = None) -> list[str]:
    """The strings in a value of a card, of one form; none where it holds anything else."""
    found = value if isinstance(value, list) else [value]
    return [one for one in found[:20] if isinstance(one, str) and (form is None or form.fullmatch(one))]


def _short(text: str) -> str:
    return plain(text)[:_LONGEST]
