"""What ``transfer`` did, on the terminal: the verdict first, then what moved, where it lies, how to load it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from peft_graft.cli.output import console_for_results, escaped, look
from peft_graft.cli.words import duration, figure, layers_as_text, pairing, spread

if TYPE_CHECKING:
    from peft_graft.distill.ask_documents import DocumentRecord
    from peft_graft.report import GraftReport

#: Answers that a terminal shows.
SHOWN = 3
_COLOURS = {"exact": "green", "strong": "green", "useful": "green", "weak": "yellow", "no better": "red"}


def show_graft(report: GraftReport, out: Path, pushed: str | None = None) -> None:
    """What ``transfer`` did, and where on the hub it lies."""
    from peft_graft.page.graft import PAGE

    console = console_for_results()
    if look.verbose:
        _show_details(report, console)
    elif report.answers:
        _show_answers(report, console, 1)
    console.print(_verdict(report))
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column(overflow="fold")
    for name, text in _facts(report):
        facts.add_row(name, Text.from_markup(text))
    console.print(facts)
    console.print()
    console.print("[bold green]written[/]", escaped(str(out)), soft_wrap=True)
    if pushed:
        console.print("[bold green]pushed[/] ", escaped(pushed), soft_wrap=True)
    console.print(f"[bold]load it[/] graft = peft_graft.Graft.from_pretrained({escaped(repr(str(out)))}).model",
                  soft_wrap=True)  # fmt: skip
    if report.classes:
        console.print('        graft.pipeline()("text") names classes')
    library = report.module_library
    console.print(f"        or with {library} alone, as {escaped(str(out / 'README.md'))} shows", soft_wrap=True)
    console.print(f"[bold]look at[/] {escaped(str(out / PAGE))}", soft_wrap=True)
    from peft_graft.config import POLISH_STEPS  # needs pydantic, which the list of commands does not wait for

    plain = report.polish and not report.prompts and not report.documents
    if plain and report.settings.polish_steps < POLISH_STEPS:
        better = f"without --polish {report.settings.polish} it learns for {POLISH_STEPS:,} steps"
        console.print(f"[bold]better[/]  {better}")
    for command in _next(report, out):
        console.print(f"[bold]next[/]    {escaped(command)}", soft_wrap=True)


def _verdict(report: GraftReport) -> Panel:
    verdict = report.verdict
    level, measured, generated = verdict.level, verdict.measured, verdict.generated
    lines = [Text(verdict.text[:1].upper() + verdict.text[1:])]
    if generated:
        lines.append(Text(
            f"Agreement with the teacher {figure(generated.agreement, generated.agreement_interval)}: of "
            f"{generated.answers} held-out answers {generated.exact:.0%}{spread(generated.exact_interval)} are the "
            f"teacher's, without the graft {generated.bare_exact:.0%}; word F1 "
            f"{figure(generated.token_f1, generated.token_f1_interval)}, without {generated.bare_token_f1:.2f}"
        ))  # fmt: skip
        lines += map(Text, report.answered_alike)
    elif measured and measured.agreement is not None and report.documents:
        lines.append(Text(f"Agreement with the teacher {figure(measured.agreement, measured.agreement_interval)}"))
        lines += map(Text, report.documents.verdict(measured))
    elif measured and measured.agreement is not None:
        lines.append(Text(
            f"Agreement with the teacher {figure(measured.agreement, measured.agreement_interval)} over "
            f"{measured.answers:,} held-out answers"
        ))  # fmt: skip
        lines += map(Text, report.decided_alike)
    colour = _COLOURS.get(level, "yellow")
    return Panel(Group(*lines), title=f"[bold {colour}]verdict: {level}[/]", title_align="left", border_style=colour)


def _facts(report: GraftReport) -> list[tuple[str, str]]:
    """What moved, and how, in a line each."""
    ends = f"{escaped(_short(report.teacher.name))} → {escaped(_short(report.student.name))}"
    facts = [("moved", f"{report.module_kind} for {report.module_library}: {ends}")]
    facts.append(("method", f"{report.method}: {escaped(report.method_reason)}"))
    facts.append(("layers", layers_as_text(report.layers)))
    if report.head:
        labels = list(report.head.labels)
        shown = ", ".join(labels[:8]) + (f" and {len(labels) - 8} more" if len(labels) > 8 else "")
        facts.append(("head", f"{report.head.task}, {report.head.how}" + (f": {escaped(shown)}" if shown else "")))
    if report.pairing:
        facts.append(("text", f"{report.pairing.pairs:,} paired tokens of {report.pairing.samples:,} samples "
                              f"({report.pairing.student_share_paired:.0%} of the student's tokens)"))  # fmt: skip
    if report.prompts:
        facts += _of_prompts(report)
    if report.documents:
        facts.append(("documents", _of_documents(report.documents)))
    if report.polish:
        measured = [point for point in report.polish.curve if point.divergence is not None]
        best = min(measured, key=lambda point: point.divergence or 0.0, default=None)
        ends = f"{figure(measured[0].agreement)} → {figure(best.agreement)}" if best else "undefined"
        tried = f", after {report.polish.trial_steps:,} to choose a start and a rate" if report.polish.pilots else ""
        facts.append(("polish", f"{report.polish.settings.steps:,} steps from {report.polished_from}{tried}; "
                                f"agreement {ends}"))  # fmt: skip
    check = report.verification
    if check and check.done:
        facts.append(("loads", f"in {check.library} {check.version}, {check.tensors_loaded} tensors, changes the "
                               f"output by {check.output_change:.1%} of its range"))  # fmt: skip
    facts.append(("took", duration(sum(report.seconds.values()))))
    return [*facts, *(("note", escaped(note)) for note in report.notes)]


def _of_prompts(report: GraftReport) -> list[tuple[str, str]]:
    asked = report.prompts
    assert asked is not None
    odd = [(asked.too_long, "too long"), (asked.duplicates, "given twice"), (asked.cut, "answers cut"),
           (asked.empty, "empty")]  # fmt: skip
    aside = "".join(f"; {count} {what}" for count, what in odd if count)
    text = (
        f"{asked.prompts:,} to learn from, {asked.held_out} held out{aside}; the module makes the teacher's answers "
        f"{asked.module_effect:.2f} nats a token likelier; "
        + pairing(asked.strict_share, "the answers' tokens", asked.strict_digits)
    )
    if not asked.made:
        return [("prompts", text)]
    made = (
        f"{asked.made.text}; {asked.no_excess} of those left out where the module makes no answer likelier "
        f"({asked.made.seeds} examples, {asked.made.continuations} continuations)"
    )
    return [("prompts", text), ("made", made)]


def _of_documents(found: DocumentRecord) -> str:
    odd = [(found.cut, f"cut after {found.longest} tokens"), (found.too_short, "too short")]
    aside = "".join(f"; {count} {what}" for count, what in odd if count)
    return (
        f"{found.documents:,} to learn from, {found.held_out} held out{aside}; the module makes a token of them "
        f"{found.module_effect:.2f} nats likelier or less likely; "
        + pairing(found.strict_share, "their tokens", found.strict_digits)
    )


def _next(report: GraftReport, out: Path) -> list[str]:
    if report.prompts:
        return [f"peft-graft evaluate {shlex.quote(str(out))} --text LABELLED.jsonl --metric exact,rouge"]
    if report.classes:
        return [f"peft-graft evaluate {shlex.quote(str(out))} --text LABELLED.jsonl"]
    if report.module_kind != "lora":  # of others not all can be merged
        return []
    return [f"peft-graft export {shlex.quote(str(out))} --to merged"]


def _short(name: str) -> str:
    """A model by its last part, where it is a folder's path."""
    return Path(name).name if Path(name).is_absolute() else name


def _show_details(report: GraftReport, console: Console) -> None:
    """What fills screens: every site, all that was tried, the polish's curve, answers."""
    title = "modules; norm kept: of what was moved over the teacher's, before the polish; maps by mean correlation, or "
    table = Table("site", "from layer", "share", "norm kept", "maps", title=f"{title}variance explained reading")
    for site in report.sites:
        correlations = [
            f"{record.space.split()[-1]} {record.diagnostics['mean_correlation']:.2f}"
            for record in site.maps
            if "mean_correlation" in record.diagnostics
        ] + [
            f"{record.space.split()[-1]} {record.diagnostics['read_explained']:.0%} explained"
            for record in site.maps
            if "read_explained" in record.diagnostics
        ]
        sources = " + ".join(source.split()[-2] for source in site.teacher_sites if " " in source)
        table.add_row(
            site.site, sources, f"{site.share:.0%}", f"{site.norm_kept:.2f}", ", ".join(correlations) or "same space"
        )
    console.print(table)
    for name, found in report.tried.items():
        console.print(f"[bold]tried[/]   {name}: agreement {figure(found.agreement)}, {found.divergence:.3f} nats")
    if report.polish:
        curve = ", ".join(f"{point.step}: {figure(point.agreement)}" for point in report.polish.curve)
        begun = f"from {report.polished_from}, rate {report.polish.settings.learning_rate:g}"
        console.print(f"[bold]polish[/]  {begun}; agreement after steps {curve}", soft_wrap=True)
    for stage, seconds in report.seconds.items():
        console.print(f"[bold]time[/]    {stage}: {duration(seconds)}")
    if report.answers:
        _show_answers(report, console, SHOWN)


def _show_answers(report: GraftReport, console: Console, count: int) -> None:
    table = Table("prompt", "teacher", "graft", title="answers to prompts that were held out", show_lines=True)
    for sample in report.answers[:count]:
        table.add_row(*(escaped(text, lines=True) for text in (sample.prompt, sample.teacher, sample.graft)))
    console.print(table)
