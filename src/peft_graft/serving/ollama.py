"""Ollama: a Modelfile beside the GGUF file, with what the tokenizer says about prompts and where answers end."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from peft_graft.config import ExportConfig, Target
from peft_graft.errors import GraftError, PlanError
from peft_graft.models.loading import load_tokenizer
from peft_graft.models.places import is_folder
from peft_graft.serving.gguf import FILE, Gguf
from peft_graft.serving.subject import Subject
from peft_graft.serving.target import Written, register_form

_SYSTEM, _PROMPT, _ANSWER, _NEXT = "Sssystem", "Ppprompt", "Aaanswer", "Nnnext"


@register_form
class Ollama(Gguf):
    """A folder for ``ollama create``."""

    target: ClassVar = Target.OLLAMA

    def check(self, subject: Subject, config: ExportConfig) -> None:
        """Refuse what llama.cpp does not take, and a base that Ollama cannot find."""
        super().check(subject, config)
        if config.ollama_from is None and not is_folder(subject.base.place):
            raise PlanError(
                "Ollama does not load models from the hub by their name",
                where="--to ollama",
                found=subject.base.place,
                fix="say what the base is called there with --ollama-from: a GGUF file, or a name such as llama3.2:1b",
            )

    def write(self, folder: Path, subject: Subject, config: ExportConfig) -> Written:
        """Write both files."""
        written = super().write(folder, subject, config)
        given, notes = config.ollama_from, []
        base = str(Path(given).absolute()) if given and Path(given).exists() else given or subject.base.place
        lines = [f"FROM {base}", f"ADAPTER ./{FILE}"]
        try:
            tokenizer = load_tokenizer(subject.base.name, subject.base.loading, role="base")
        except GraftError:
            tokenizer = None
            notes.append("the base has no tokenizer, so the Modelfile says nothing of prompts")
        if tokenizer is not None:
            found = template_of(tokenizer, subject.template_args) if subject.format is None else None
            text = found.text if found else _of_format(subject.format)
            system = subject.system or (found.system if found else "")
            if text is None:
                notes.append(f"no TEMPLATE: {_why_none(tokenizer, subject.format)}, so Ollama takes its own")
            else:
                lines.append(f"TEMPLATE {_quoted(text)}")
            if system:
                lines.append(f"SYSTEM {_quoted(system)}")
            lines += [f"PARAMETER stop {json.dumps(word, ensure_ascii=False)}" for word in _ends(tokenizer, found)]
        (folder / "Modelfile").write_text("\n".join(lines) + "\n", encoding="utf-8", errors="backslashreplace")
        use = "ollama create graft --file {out}/Modelfile && ollama run graft"
        return written.model_copy(update={"use": use, "notes": [*written.notes, *notes]})


@dataclass(frozen=True)
class GoTemplate:
    """A chat template as Ollama knows them: fixed texts around a system message, a prompt and an answer.

    Attributes:
        before, middle: around the system message. start, rest: around a prompt. end: what follows an answer.
        inside: whether the system message stands inside the first prompt's place.
        system: the message that stands there where none is given; empty for none.
    """

    before: str
    middle: str
    start: str
    rest: str
    end: str
    inside: bool
    system: str

    @property
    def text(self) -> str:
        """The template in Go's words."""
        message = f"{{{{ .System }}}}{self.middle}{{{{ end }}}}"
        if self.inside:
            first = f"{{{{ if .Prompt }}}}{self.start}{{{{ if .System }}}}{message}"
        else:
            first = f"{{{{ if .System }}}}{self.before}{message}{{{{ if .Prompt }}}}{self.start}"
        return f"{first}{{{{ .Prompt }}}}{self.rest}{{{{ end }}}}{{{{ .Response }}}}{self.end}"

    def said(self, turns: Sequence[tuple[str, str | None]], system: str | None = None) -> str:
        """What Ollama makes of a conversation, where the Modelfile says the template's own system message."""
        system = system or self.system
        text = ""
        for number, (prompt, answer) in enumerate(turns):
            message = f"{system}{self.middle}" if system and not number else ""
            opening = self.start + message if self.inside else (self.before + message) * bool(message) + self.start
            text += f"{opening}{prompt}{self.rest}" + ("" if answer is None else f"{answer}{self.end}")
        return text


def _of_format(format: str | None) -> str | None:
    """A format in Go's words, None where there is none or it has Go's marks in it."""
    if format is None:
        return None
    text = format.replace("\\n", "\n").replace("{prompt}", "\0Prompt\1").replace("{system}", "\0System\1")
    if "{{" in text or "{\0" in text:  # a brace before a place would be a part of Go's own
        return None
    return text.replace("\0", "{{ .").replace("\1", " }}") + "{{ .Response }}"


def _why_none(tokenizer: Any, format: str | None) -> str:
    if format is None and not getattr(tokenizer, "chat_template", None):
        return "the base has no chat template"
    return f"the {'chat template' if format is None else 'format'} cannot be said in Ollama's words"


def template_of(tokenizer: Any, args: Mapping[str, Any] | None = None) -> GoTemplate | None:
    """The chat template of a tokenizer, None where there is none or another rendering of it would differ.

    What stands around a system message, a prompt and an answer is found by rendering some, and has to give the same
    text as the template itself for conversations of one turn and of two, with a system message and without.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    # llama.cpp puts first what the tokenizer does; others have a token for it, and begin with it only in the template.
    begins = tokenizer.bos_token is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]

    def rendered(*messages: str, system: str | None = None, asks: bool = True) -> str:
        turns = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(messages)]
        first = [{"role": "system", "content": system}] if system is not None else []
        asked = {**(args or {}), "tokenize": False, "add_generation_prompt": asks}
        text: str = tokenizer.apply_chat_template([*first, *turns], **asked)
        return text.removeprefix(tokenizer.bos_token) if begins else text

    try:
        bare, talk = rendered(_PROMPT), rendered(_PROMPT, _ANSWER, _NEXT)
        with_system, both = rendered(_PROMPT, system=_SYSTEM), rendered(_PROMPT, _ANSWER, _NEXT, system=_SYSTEM)
        head, rest = bare.split(_PROMPT)
        before, middle = with_system.split(_PROMPT)[0].split(_SYSTEM)
        end = rendered(_PROMPT, _ANSWER, asks=False).split(_ANSWER)[1]
        start = talk.split(_ANSWER)[1].split(_NEXT)[0].removeprefix(end)
    except Exception:  # templates are programs, and many raise an error for what they do not know
        return None
    default = head.removeprefix(before).removesuffix(middle) if head != start else ""
    inside = before == start and not middle.endswith(start)  # Gemma's is a part of the first prompt
    found = GoTemplate(before, middle if inside else middle.removesuffix(start), start, rest, end, inside, default)
    same = (
        found.said([(_PROMPT, None)]) == bare
        and found.said([(_PROMPT, None)], _SYSTEM) == with_system
        and found.said([(_PROMPT, _ANSWER), (_NEXT, None)]) == talk
        and found.said([(_PROMPT, _ANSWER), (_NEXT, None)], _SYSTEM) == both
    )
    return found if same and "{{" not in "".join((before, middle, start, rest, end)) else None


def _ends(tokenizer: Any, template: GoTemplate | None) -> list[str]:
    """Texts at which an answer ends."""
    found = [getattr(tokenizer, "eos_token", None), template.end.strip() if template else None]
    return [word for word in dict.fromkeys(found) if word and '"""' not in word]


def _quoted(text: str) -> str:
    """Text of several lines in a Modelfile, which knows no escape in it."""
    if '"""' in text:
        raise PlanError('a Modelfile has no way to say three quotes (""")', where="--to ollama", found=text[:80])
    return f'"""{text}"""'
