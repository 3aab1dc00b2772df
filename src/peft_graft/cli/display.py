"""Results on the terminal: tables of what was inspected, aligned and moved."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from peft_graft.cli.output import console_for_results, escaped, look
from peft_graft.cli.result import SHOWN
from peft_graft.cli.words import duration, figure, layers_as_text, memory, pairing, ranges

if TYPE_CHECKING:
    from peft_graft._evaluate import Evaluation
    from peft_graft._export import Export
    from peft_graft._inspect import Inspection
    from peft_graft.alignment.alignment import Alignment
    from peft_graft.distill.sides import Score
    from peft_graft.outlook import DocumentOutlook, PromptOutlook, StudentSummary
    from peft_graft.shelf import ShelfReport

#: Steps of a polish that shows whether a longer one is worth its time.
FIRST_LOOK = 100


def show_inspection(found: Inspection, command: str | None = None) -> None:
    """What ``inspect`` found, and the command that carries it out."""
    console = console_for_results()
    console.print(
        f"[bold]{escaped(found.module)}[/]: {found.module_library} {found.kind}, {found.parameters:,} parameters"
    )
    console.print(f"base model   {escaped(found.base_model or 'not named')}")
    console.print(f"task         {found.task}")
    console.print(f"head         {escaped(found.head or 'none')}")
    if found.labels:
        console.print(f"labels       {escaped(', '.join(found.labels))}")
    for note in found.notes:
        console.print(f"note         {escaped(note)}", soft_wrap=True)
    if found.sites:
        table = Table("role", "layers", "rank or bottleneck", "scaling", "inactive", title="where it attaches")
        for site in found.sites:
            table.add_row(
                site.role,
                ranges(site.layers),
                ", ".join(map(str, site.widths)),
                ", ".join(f"{scaling:g}" for scaling in site.scalings) or "-",
                ranges(site.inactive_layers) or "-",
            )
        console.print(table)
    else:
        for path in found.paths:
            console.print(f"  {escaped(path)}")
    for path in found.left_out:
        console.print(f"without a role, and so left out: {escaped(path)}", soft_wrap=True)
    if found.teacher_problem:
        console.print(f"[yellow]teacher:[/] {escaped(found.teacher_problem)}", soft_wrap=True)
    if found.student is not None:
        _show_student(found, found.student, command)


def _show_student(found: Inspection, student: StudentSummary, command: str | None) -> None:
    """What would become of the module on a student."""
    console = console_for_results()
    known = f" ({student.model_type}, {student.num_layers} layers)" if student.model_type else ""
    console.print(f"\n[bold]onto {escaped(student.name)}[/]{known}")
    if student.problem:
        why = student.problem if student.problem != found.teacher_problem else "not without the teacher, see above"
        console.print(f"[red]cannot:[/] {escaped(why)}", soft_wrap=True)
        return
    console.print(planned(student, [note for note in student.notes if note not in found.notes]))
    if command:
        console.print(f"[bold]next[/]         {escaped(command)}", soft_wrap=True)
        if seconds := _first_look(student):
            console.print(f"[bold]first look[/]   the same with --polish {FIRST_LOOK}: at least {duration(seconds)}")


def planned(student: StudentSummary, notes: Sequence[str] = ()) -> Table:
    """What a transfer would do and what it would cost, in a line each."""
    rows = [
        ("layers", layers_as_text(student.layers)),
        ("modules", f"{student.modules}, head {'carried' if student.head else 'none'}"),
        ("method", str(student.method)),
    ]
    if student.products_per_token or not (student.prompts or student.documents):
        text = (
            f"{student.spaces} maps between activations, {memory(student.statistics_mib)} of statistics "
            f"in {student.passes} pass{'es' if student.passes > 1 else ''}"
        )
        if look.verbose:
            text += (
                f", {student.products_per_token / 1e6:.1f} M multiply-adds a token beside the forward passes' "
                f"{student.forwards_per_token / 1e6:.1f} M"
            )
        rows.append(("alignment", text))
    if student.prompts:
        rows += _outlook(student, student.prompts)
    elif student.documents:
        rows += _of_documents(student, student.documents)
    elif student.least_seconds:
        tokens = student.max_tokens if student.text_tokens is None else student.text_tokens
        polish = f" and {student.polish_steps:,} steps of polish" if student.polish_steps else ""
        rows.append((
            "cost",
            f"{memory(student.weights_mib)} of weights in float32; {tokens:,} tokens{polish} take {_least(student)}",
        ))  # fmt: skip
    facts = Table.grid(padding=(0, 1))
    facts.add_column(width=12, no_wrap=True)
    facts.add_column(overflow="fold")
    for name, text in [*rows, *(("note", note) for note in notes)]:
        facts.add_row(name, escaped(text))
    return facts


def _outlook(student: StudentSummary, asked: PromptOutlook) -> list[tuple[str, str]]:
    """Prompts that the teacher would be asked, and what that would cost."""
    dropped = f", {asked.too_long} too long, {asked.duplicates} given twice" * bool(asked.too_long or asked.duplicates)
    pairs = ""
    if asked.strict_share is not None:
        pairs = "; " + pairing(asked.strict_share, "the answers' tokens", asked.strict_digits)
    how = {"chat": "asked by its chat template", "list": "going on with a list of them"}
    if asked.made_by:
        dropped = f" to make from {asked.made_from} examples, by the teacher's base, {how[asked.made_by]}"
    prompts = (
        f"{asked.prompts:,}{dropped}; {asked.prompt_tokens:.0f} + {asked.answer_tokens:.0f} tokens on average{pairs}"
    )
    return [("prompts", prompts), ("cost", _cost_of_learning(student))]


def _of_documents(student: StudentSummary, found: DocumentOutlook) -> list[tuple[str, str]]:
    """Plain text that would be learned from, and what that would cost."""
    odd = [(found.cut, f"cut after {found.longest} tokens"), (found.too_short, "too short")]
    aside = "".join(f", {count} {what}" for count, what in odd if count)
    text = (
        f"{found.documents:,} documents to learn from, {found.held_out} held out; of the first {found.looked_at}"
        f"{aside}: {found.tokens:.0f} tokens on average, {pairing(found.strict_share, 'which', found.strict_digits)}; "
        f"{student.polish_steps:,} steps of polish"
    )
    return [("text", text), ("cost", _cost_of_learning(student))]


def _cost_of_learning(student: StudentSummary) -> str:
    return (
        f"{memory(student.weights_mib)} of weights in float32, some {memory(student.training_mib or 0)} in training; "
        f"{_least(student)}"
    )


def _least(student: StudentSummary) -> str:
    """The time, by stage where there are several."""
    found = f"at least {duration(student.least_seconds)} on this processor"
    if len(student.stage_seconds) > 1:
        found += ": " + ", ".join(f"{stage} {duration(seconds)}" for stage, seconds in student.stage_seconds.items())
    polish = _of_polish(student)
    return found + (f" ({polish / student.polish_steps:.2g} s a step)" if polish and student.polish_steps else "")


def _first_look(student: StudentSummary) -> float:
    """The least seconds with a short polish, where a long one is most of the work; else 0."""
    steps, polish = student.polish_steps or 0, _of_polish(student)
    if steps <= FIRST_LOOK or polish < student.least_seconds / 2:
        return 0.0
    return student.least_seconds - polish * (1 - FIRST_LOOK / steps)


def _of_polish(student: StudentSummary) -> float:
    from peft_graft.distill.polish import STAGE  # needs torch, which other results do not wait for

    return student.stage_seconds.get(STAGE, 0.0)


def show_alignment(found: Alignment, out: Path) -> None:
    """What ``align`` found."""
    console = console_for_results()
    table = Table("teacher space", "student space", "units", "mean correlation of matched units")
    for pair, space_map in found.maps.items():
        correlation = found.diagnostics.get(pair, {}).get("mean_correlation")
        table.add_row(
            str(pair[0]),
            str(pair[1]),
            f"{space_map.teacher_size} → {space_map.student_size}",
            f"{correlation:.2f}" if correlation is not None else "-",
        )
    if look.verbose:
        console.print(table)
    known = [values["mean_correlation"] for values in found.diagnostics.values() if "mean_correlation" in values]
    mean = f"; matched units correlate by {sum(known) / len(known):.2f} on average" if known else ""
    console.print(f"[bold]aligned[/] {len(found.maps)} pairs of spaces by {found.method}{mean}", soft_wrap=True)
    console.print(f"[bold green]written[/] {escaped(str(out))}", soft_wrap=True)
    student = shlex.quote(str(found.details.get("student", "STUDENT")))
    settings = found.details.get("settings")
    sites = settings.get("sites") if isinstance(settings, Mapping) else None
    named = f" --sites {shlex.quote(','.join(map(str, sites)))}" if sites else ""
    if found.layers is None and isinstance(settings, Mapping) and settings.get("layers") not in (None, "auto"):
        named += f" --layers {shlex.quote(str(settings['layers']))}"
    console.print(
        f"[bold]next[/]    peft-graft transfer MODULE --student {escaped(student)} "
        f"--alignment {escaped(shlex.quote(str(out)))}{escaped(named)} -o out/graft",
        soft_wrap=True,
    )


def show_evaluation(found: Evaluation, out: Path | None) -> None:
    """What ``evaluate`` found: scores side by side, and some of the answers."""
    console = console_for_results()
    names = list(found.rows[0].scores)
    table = Table("", *names, title=f"{found.prompts:,} {found.asked}, with 95 % intervals")
    for row in found.rows:
        table.add_row(escaped(row.name), *(_score(row.scores[name]) for name in names))
    console.print(table)
    for row in found.rows:
        odd = [f"{row.cut} cut"] * bool(row.cut) + [f"{row.empty} empty"] * bool(row.empty)
        if odd and found.asked == "prompts":
            console.print(f"[bold]answers[/] of the {row.name}: {', '.join(odd)}", soft_wrap=True)
        elif row.cut:
            console.print(f"[bold]texts[/]   that the {row.name} does not read to the end: {row.cut}", soft_wrap=True)
    for note in found.notes:
        console.print(f"[bold]note[/]    {escaped(note)}", soft_wrap=True)
    asked = [row.name for row in found.rows if found.answers and row.name in found.answers[0].answers]
    if asked:
        heading = ("prompt", "reference") if found.asked == "prompts" else ("text", "label")
        table = Table(*heading, *asked, title="some of the answers", show_lines=True)
        for sample in found.answers[:SHOWN]:
            said = (sample.prompt, sample.references[0], *(sample.answers[name] for name in asked))
            table.add_row(*(escaped(text, lines=True) for text in said))
        console.print(table)
    if out is not None:
        console.print(f"[bold green]written[/] {escaped(str(out))}", soft_wrap=True)


def _score(score: Score) -> str:
    if score.low is None or score.high is None:
        return f"{score.value:.3f}"
    return f"{score.value:.3f}\n[dim]{score.low:.2f}–{score.high:.2f}[/]"


def show_export(found: Export) -> None:
    """What ``export`` wrote, and how it answers."""
    console = console_for_results()
    same = found.comparison
    if same is None:
        console.print("[yellow]not compared[/] with the module as it was")
    else:
        choices = (
            "" if same.same_choices is None else f", {same.same_choices:.1%} of the likeliest answers are the same"
        )
        console.print(f"[bold]compared[/]  {same.lost:.2%} of the module's effect lost{choices}", soft_wrap=True)
    if found.kept is not None and found.kept < 1:
        console.print(f"[bold]converted[/] the LoRA holds {found.kept:.2%} of the module's change of the weights")
    for note in found.notes:
        console.print(f"note      {escaped(note)}", soft_wrap=True)
    console.print(f"[bold]written[/]   {escaped(found.out)}", soft_wrap=True)
    console.print(f"[bold]use it[/]    {escaped(found.use, lines=True)}", soft_wrap=True)


def show_shelf(report: ShelfReport, out: Path) -> None:
    """What became of every module of a shelf."""
    from peft_graft.page.graft import PAGE

    console = console_for_results()
    table = Table("module", "method", "verdict", "agreement", "took", "", title=f"onto {escaped(report.student)}")
    for one in report.modules:
        found = one.verdict.figure if one.verdict else None
        table.add_row(
            escaped(one.name),
            one.method or "",
            one.verdict.level if one.verdict else "",
            figure(found.agreement) if found else "",
            "" if one.seconds is None else duration(one.seconds),
            f"[red]{one.state}[/]" if one.state == "failed" else one.state,
        )
    console.print(table)
    for one in report.failed:
        console.print(f"[red]failed[/]  {escaped(one.name)}: {escaped(one.error or '')}", soft_wrap=True)
    if report.first_seconds is not None and report.next_seconds is not None:
        console.print(
            f"[bold]price[/]   the first module of a teacher took {duration(report.first_seconds)}, with loading and "
            f"aligning; one after it {duration(report.next_seconds)}"
        )
    console.print(f"[bold green]written[/] {escaped(str(out))}", soft_wrap=True)
    console.print(f"[bold]look at[/] {escaped(str(out / PAGE))}", soft_wrap=True)
