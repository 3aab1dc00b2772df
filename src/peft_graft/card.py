"""The model card: what a graft is, how it was made, and how it is loaded, for people."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard
from jinja2 import Environment, PackageLoader, StrictUndefined

from peft_graft.card_data import Provenance, card_data
from peft_graft.checkpoints.beside import TOKENIZER, pipeline_options, tokenizer_of
from peft_graft.checkpoints.formats.base import format_of
from peft_graft.checkpoints.raw import RawCheckpoint
from peft_graft.checkpoints.student_names import StudentNames
from peft_graft.config import Library
from peft_graft.models.loading import ModelHandle, ModelRecord
from peft_graft.models.places import place_of
from peft_graft.models.tasks import Task
from peft_graft.report import KINDS, GraftReport

_MARKUP = re.compile(r"([\\`*_{}\[\]<>|#~$&@]|:(?=//)|(?<=www)\.)")  # of Markdown, and what makes links of addresses


@dataclass(frozen=True)
class Usage:
    """What is needed to load a graft.

    Attributes:
        graft: what the card calls it, its folder's name or its hub id. base: the student's hub id, None where only the
            graft's configuration says where the student is.
        auto_class: of transformers. options: further arguments of ``from_pretrained``, by name.
        brings_tokenizer: whether the student's tokenizer lies beside the module.
        num_labels: None where no head is written. problem_type: what its outputs are, None where nothing says so.
        vocabulary: what the embeddings are resized to, where they are.
        reads_text, is_encoder_decoder: what the student does. asking: further arguments of a pipeline.
        prompt: an example of what it is asked.
        chat, chat_args: the same as messages, where it is asked by its chat template, and arguments of that template.
        one_line: code that loads it and asks, None where no pipeline is for its task. auto_peft: the class of peft that
            loads it by itself, if there is one.
    """

    graft: str
    base: str | None
    auto_class: str
    options: dict[str, object]
    brings_tokenizer: bool
    labels: tuple[str, ...]
    num_labels: int | None
    problem_type: str | None
    vocabulary: int | None
    reads_text: bool
    asking: dict[str, str]
    is_encoder_decoder: bool
    prompt: str
    chat: list[dict[str, str]] | None
    chat_args: dict[str, object]
    one_line: str | None
    auto_peft: str | None

    @classmethod
    def of(
        cls,
        raw: RawCheckpoint,
        student: ModelHandle,
        report: GraftReport,
        labels: tuple[str, ...],
        *,
        names: StudentNames,
        graft: str,
        brings_tokenizer: bool,
    ) -> Usage:
        """What the card of a written checkpoint has to say; the arguments are those of ``write_model_card``."""
        settings, config = report.settings, student.base.config
        options: dict[str, object] = {"revision": names.revision} if names.revision else {}
        if student.loading.trust_remote_code:
            options["trust_remote_code"] = True
        example = "Maria moved to Lisbon in winter."
        format = settings.format_of_student if report.prompts else None
        messages = [{"role": "system", "content": settings.system}] if settings.system else []
        size = student.base.get_input_embeddings().num_embeddings if raw.vocabulary_size else 0
        auto_class = raw.task.auto_class_of(report.student.model_type)
        chat = [*messages, {"role": "user", "content": example}] if report.prompts and not format else None
        prompt = _filled(format, example, settings.system) if format else example
        return cls(
            graft=graft,
            base=names.name if names.name == report.student.hub_id else None,
            auto_class=auto_class,
            options=options,
            brings_tokenizer=brings_tokenizer,
            labels=labels,
            num_labels=raw.num_labels,
            problem_type=raw.problem_type.value if raw.problem_type else None,
            vocabulary=raw.vocabulary_size if raw.vocabulary_size > size else None,
            reads_text=student.architecture.row.reads_text,
            asking=pipeline_options(raw.task, tokenizer_of(student)),
            is_encoder_decoder=bool(config.is_encoder_decoder),
            prompt=prompt,
            chat=chat,
            chat_args=settings.template_args or {},
            one_line=None if chat and settings.template_args else _in_one_line(raw, graft, chat or prompt),
            auto_peft=f"AutoPeft{auto_class.removeprefix('Auto')}" if raw.task.peft_type else None,
        )


def _in_one_line(raw: RawCheckpoint, graft: str, asked: str | list[dict[str, str]]) -> str | None:
    """Code that loads a graft and asks it; by transformers alone where that loads it whole."""
    if raw.library == Library.PEFT and raw.task is Task.CAUSAL_LM:
        loaded = f'transformers.pipeline("text-generation", model={python(graft)})'
        return f"import transformers\n\nprint({loaded}({python(asked)}, max_new_tokens=64))"
    if raw.task in (Task.TOKEN_CLASSIFICATION, Task.SEQUENCE_CLASSIFICATION):
        return (
            f"import peft_graft\n\nprint(peft_graft.Graft.from_pretrained({python(graft)}).pipeline()({python(asked)}))"
        )
    return None


def write_model_card(
    folder: Path,
    report: GraftReport,
    raw: RawCheckpoint,
    student: ModelHandle,
    labels: tuple[str, ...],
    *,
    names: StudentNames,
    graft: str,
    results: Sequence[EvalResult] = (),
) -> None:
    """Write README.md: what the checkpoint is, how it was made and how to load it. It names no path of this machine.

    Args:
        folder: where to. report: about the graft. raw: as it was written. student: what it is for.
        labels: names of the head's classes, empty where they are not known.
        names: what the checkpoint's configuration says of the student.
        graft: the name of the folder that it will be in, or its id on the hub.
        results: of evaluations, beside the verdict.
    """
    task = report.head.task if report.head else raw.task
    provenance = Provenance.of(report, student.loading.token)
    about = card_data(report, raw, task, provenance, graft, results)
    loading = format_of(raw.library).loading_template
    usage = Usage.of(
        raw, student, report, labels, names=names, graft=graft, brings_tokenizer=(folder / TOKENIZER).is_file()
    )
    kind = KINDS.get(report.module_kind, f"{report.module_kind} module")
    values = {"report": report, "kind": kind, "task": raw.task, "Task": Task, "usage": usage, "raw": raw}
    content = (
        _environment()
        .get_template("model_card.md.jinja")
        .render(
            **values,
            card_data=about.to_yaml(),
            licence=provenance.licence,
            licences=provenance.remark,
            module=public_name(report.module),
            results=results,
            figure=report.verdict.figure,
            labels=labels,
            text=public_name(report.text) if report.text else None,
            notes=[without_paths(note, report) for note in report.notes],
            loading=_environment().get_template(loading).render(**values).strip() if loading else None,
        )
    )
    ModelCard(content).save(folder / "README.md")


def model_name(record: ModelRecord) -> str:
    """What a card calls a model: its hub id, or the name of its folder."""
    return record.hub_id or public_name(record.name)


def public_name(name: str) -> str:
    """The last part of a path, anything else as it is."""
    return Path(name).name if Path(name).is_absolute() or Path(name).exists() else name


def without_paths(note: str, report: GraftReport) -> str:
    """A note without places of this machine."""
    models = {record.name: model_name(record) for record in (report.teacher, report.student)}
    others = {name: public_name(name) for name in (report.module, report.text, report.alignment) if name}
    # The longest first: the beginning of another's place is no place.
    for place, name in sorted((models | others).items(), key=lambda found: -len(found[0])):
        note = note.replace(place_of(place), name).replace(place, name)
    return note


def _filled(format: str, prompt: str, system: str | None) -> str:
    return format.replace("\\n", "\n").replace("{prompt}", prompt).replace("{system}", system or "")


def escaped(text: object) -> str:
    """Foreign text inside Markdown, as it reads: one line, without markup, HTML or control characters."""
    line = " ".join("".join(sign if sign.isprintable() else " " for sign in str(text)).split())
    return _MARKUP.sub(r"\\\1", line)


def as_code(text: object) -> str:
    """The same as code, where it has nothing that would end it."""
    return f"`{text}`" if re.fullmatch(r"[\w./@:+-]+", str(text)) else escaped(text)


def python(value: object) -> str:
    """A value as Python has it; text in double quotes, as in the rest of the code, where it has no quotes itself."""
    if isinstance(value, list):
        return f"[{', '.join(map(python, value))}]"
    text = repr(value)
    return f'"{text[1:-1]}"' if isinstance(value, str) and not {"'", '"'} & set(text[1:-1]) else text


@cache
def _environment() -> Environment:
    # huggingface_hub's own rendering of templates leaves the lines of blocks in, which would break tables.
    environment = Environment(
        loader=PackageLoader("peft_graft", "templates"),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"escaped": escaped, "as_code": as_code, "python": python, "model_name": model_name}
    return environment
