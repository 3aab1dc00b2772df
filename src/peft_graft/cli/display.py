"""Results on the terminal: tables of what was inspected, aligned and moved."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from peft_graft.errors import plain

if TYPE_CHECKING:
    from peft_graft._evaluate import Evaluation
    from peft_graft._export import Export
    from peft_graft._inspect import Inspection, PromptOutlook, StudentSummary
    from peft_graft.alignment.alignment import Alignment
    from peft_graft.distill.side_by_side import Score
    from peft_graft.report import GraftReport
    from peft_graft.shelf import ShelfReport


#: Answers that a terminal shows.
_SHOWN = 3


def escaped(text: str, *, lines: bool = False) -> str:
    """Text as rich prints it unchanged, with the codes in it shown and not sent to the terminal.

    Args:
        lines: whether line ends are kept, as in answers; names and messages are shown on one line.
    """
    return escape("\n".join(map(plain, text.split("\n"))) if lines else plain(text))


def show_inspection(found: Inspection) -> None:
    """What ``inspect`` found."""
    console = Console(emoji=False)
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
                _ranges(site.layers),
                ", ".join(map(str, site.widths)),
                ", ".join(f"{scaling:g}" for scaling in site.scalings) or "-",
                _ranges(site.inactive_layers) or "-",
            )
        console.print(table)
    else:
        for path in found.paths:
            console.print(f"  {escaped(path)}")
    for path in found.left_out:
        console.print(f"without a role, and so left out: {escaped(path)}", soft_wrap=True)
    if found.teacher_problem:
        console.print(f"[yellow]teacher:[/] {escaped(found.teacher_problem)}", soft_wrap=True)
    student = found.student
    if student is None:
        return
    console.print(f"\n[bold]onto {escaped(student.name)}[/] ({student.model_type}, {student.num_layers} layers)")
    if student.problem:
        console.print(f"[red]cannot:[/] {escaped(student.problem)}", soft_wrap=True)
        return
    console.print(f"layers       {_layers(student.layers)}")
    console.print(f"modules      {student.modules}, head {'carried' if student.head else 'none'}")
    console.print(f"method       {student.method}")
    if student.products_per_token or not student.prompts:
        console.print(
            f"alignment    {student.spaces} pairs of spaces, {student.statistics_mib} MiB of statistics "
            f"in {student.passes} pass{'es' if student.passes > 1 else ''}, "
            f"{student.products_per_token / 1e6:.1f} M multiply-adds a token beside the forward passes' "
            f"{student.forwards_per_token / 1e6:.1f} M"
        )
    if student.prompts:
        _show_outlook(student, student.prompts, console)
    elif student.least_seconds:
        console.print(
            f"cost         {student.weights_mib:,.0f} MiB of weights in float32; {student.max_tokens:,} tokens take "
            f"{student.least_seconds:,.0f} s on this processor at the least"
        )
    for note in (note for note in student.notes if note not in found.notes):
        console.print(f"note         {escaped(note)}")


def _show_outlook(student: StudentSummary, asked: PromptOutlook, console: Console) -> None:
    """Prompts that the teacher would be asked, and what that would cost."""
    dropped = f", {asked.too_long} too long, {asked.duplicates} given twice" * bool(asked.too_long or asked.duplicates)
    pairs = "" if asked.strict_share is None else f"; {asked.strict_share:.0%} of the answers' tokens pair"
    if asked.strict_digits is not None:
        pairs += f", {asked.strict_digits:.0%} of those with digits"
    how = {"chat": "asked by its chat template", "list": "going on with a list of them"}
    if asked.made_by:
        dropped = f" to make from {asked.made_from} examples, by the teacher's base, {how[asked.made_by]}"
    console.print(
        f"prompts      {asked.prompts:,}{dropped}; {asked.prompt_tokens:.0f} + {asked.answer_tokens:.0f} tokens on "
        f"average{pairs}",
        soft_wrap=True,
    )
    console.print(
        f"cost         {student.weights_mib:,.0f} MiB of weights in float32, some {student.training_mib:,.0f} MiB "
        f"in training; {student.least_seconds / 60:,.0f} minutes on this processor at the least",
        soft_wrap=True,
    )


def show_graft(report: GraftReport, out: Path) -> None:
    """What ``transfer`` did."""
    console = Console(emoji=False)
    console.print(f"[bold]method[/]  {report.method}: {escaped(report.method_reason)}", soft_wrap=True)
    console.print(f"[bold]layers[/]  {_layers(report.layers)}")
    if report.pairing:
        console.print(
            f"[bold]text[/]    {report.pairing.pairs:,} paired tokens of {report.pairing.samples:,} samples "
            f"({report.pairing.student_share_paired:.0%} of the student's tokens)"
        )
    table = Table(
        "site",
        "from layer",
        "share",
        "norm kept",
        "maps: mean correlation, or variance explained reading/writing",
        title="modules",
    )
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
    if report.head:
        labels = escaped(", ".join(report.head.labels))
        console.print(f"[bold]head[/]    {report.head.task}, {report.head.how}: {labels}", soft_wrap=True)
    for name, found in report.tried.items():
        agreement = _figure(found.agreement)
        console.print(f"[bold]tried[/]   {name}: agreement {agreement}, {found.divergence:.3f} nats")
    if report.polish:
        curve = ", ".join(f"{point.step}: {_figure(point.agreement)}" for point in report.polish.curve)
        begun = f"from the {report.polish.start} modules, rate {report.polish.settings.learning_rate:g}"
        console.print(f"[bold]polish[/]  {begun}; agreement after steps {curve}")
    for note in report.notes:
        console.print(f"[bold]note[/]    {escaped(note)}", soft_wrap=True)
    if report.prompts:
        _show_prompts(report, console)
    _show_verdict(report, console)
    console.print(f"[bold green]written[/] {escaped(str(out))} (README.md shows how to load it)", soft_wrap=True)


def show_shelf(report: ShelfReport, out: Path) -> None:
    """What became of every module of a shelf."""
    console = Console(emoji=False)
    table = Table("module", "method", "verdict", "agreement", "seconds", "", title=f"onto {escaped(report.student)}")
    for one in report.modules:
        figure = one.verdict.figure if one.verdict else None
        table.add_row(
            escaped(one.name),
            one.method or "",
            one.verdict.level if one.verdict else "",
            _figure(figure.agreement) if figure else "",
            "" if one.seconds is None else f"{one.seconds:,.1f}",
            f"[red]{one.state}[/]" if one.state == "failed" else one.state,
        )
    console.print(table)
    for one in report.failed:
        console.print(f"[red]failed[/]  {escaped(one.name)}: {escaped(one.error or '')}", soft_wrap=True)
    if report.first_seconds is not None and report.next_seconds is not None:
        console.print(
            f"[bold]price[/]   the first module of a teacher took {report.first_seconds:,.1f} s, with loading and "
            f"aligning; one after it {report.next_seconds:,.1f} s"
        )
    console.print(f"[bold green]written[/] {escaped(str(out))} (shelf.json has all verdicts)", soft_wrap=True)


def _show_verdict(report: GraftReport, console: Console) -> None:
    measured, generated = report.verdict.measured, report.verdict.generated
    on = ""
    if generated:
        on = (
            f" (agreement {_figure(generated.agreement, generated.agreement_interval)}: of {generated.answers} "
            f"held-out answers {generated.exact:.0%}{_spread(generated.exact_interval)} are the teacher's, without the "
            f"graft {generated.bare_exact:.0%}; word F1 {_figure(generated.token_f1, generated.token_f1_interval)}, "
            f"without {generated.bare_token_f1:.2f})"
        )
    elif measured and measured.agreement is not None:
        agreement = _figure(measured.agreement, measured.agreement_interval)
        on = f" (agreement {agreement} over {measured.answers:,} held-out answers)"
    console.print(f"[bold]verdict[/] {report.verdict.level}: {escaped(report.verdict.text)}{on}", soft_wrap=True)
    check = report.verification
    if check and check.done:
        console.print(
            f"[bold]loads[/]   in {check.library} {check.version}, {check.tensors_loaded} tensors, "
            f"changes the output by {check.output_change:.1%} of its range"
        )


def _figure(value: float | None, spread: tuple[float, float] | None = None) -> str:
    """A figure with its 95 % interval."""
    return "undefined" if value is None else f"{value:.2f}{_spread(spread)}"


def _spread(spread: tuple[float, float] | None) -> str:
    return "" if spread is None else f" [95 % {spread[0]:.2f}–{spread[1]:.2f}]"


def _show_prompts(report: GraftReport, console: Console) -> None:
    """What a language model was asked, and three of the answers."""
    asked = report.prompts
    assert asked is not None
    left_out = [f"{asked.too_long} too long"] * bool(asked.too_long) + [f"{asked.duplicates} given twice"] * bool(
        asked.duplicates
    )
    odd = [f"{asked.cut} answers cut"] * bool(asked.cut) + [f"{asked.empty} empty"] * bool(asked.empty)
    aside = "".join(f"; {part}" for part in (*left_out, *odd))
    digits = "" if asked.strict_digits is None else f", {asked.strict_digits:.0%} of those with digits"
    console.print(
        f"[bold]prompts[/] {asked.prompts:,} to learn from, {asked.held_out} held out{aside}; the module makes the "
        f"teacher's answers {asked.module_effect:.2f} nats a token likelier; {asked.strict_share:.0%} of the answers' "
        f"tokens pair{digits}",
        soft_wrap=True,
    )
    if asked.made:
        console.print(
            f"[bold]made[/]    {asked.made.text}; {asked.no_excess} of those left out where the module makes no answer "
            f"likelier ({asked.made.seeds} examples, {asked.made.continuations} continuations)",
            soft_wrap=True,
        )
    table = Table("prompt", "teacher", "graft", title="answers to prompts that were held out", show_lines=True)
    for sample in report.answers[:_SHOWN]:
        table.add_row(*(escaped(text, lines=True) for text in (sample.prompt, sample.teacher, sample.graft)))
    console.print(table)


def show_alignment(found: Alignment, out: Path, *, as_json: bool) -> None:
    """What ``align`` found."""
    if as_json:
        sys.stdout.write(
            json.dumps(
                {
                    "out": str(out),
                    "method": found.method,
                    "details": dict(found.details),
                    "pairs": {f"{pair[0].key} -> {pair[1].key}": value for pair, value in found.diagnostics.items()},
                },
                indent=2,
            )
            + "\n"
        )
        return
    console = Console(emoji=False)
    table = Table("teacher space", "student space", "units", "mean correlation of matched units")
    for pair, space_map in found.maps.items():
        correlation = found.diagnostics.get(pair, {}).get("mean_correlation")
        table.add_row(
            str(pair[0]),
            str(pair[1]),
            f"{space_map.teacher_size} -> {space_map.student_size}",
            f"{correlation:.2f}" if correlation is not None else "-",
        )
    console.print(table)
    console.print(f"[bold green]written[/] {escaped(str(out))}; use it with `peft-graft transfer --alignment {out}`")


def show_evaluation(found: Evaluation, out: Path | None) -> None:
    """What ``evaluate`` found: scores side by side, and some of the answers."""
    console = Console(emoji=False)
    names = list(found.rows[0].scores)
    table = Table("", *names, title=f"{found.prompts:,} prompts, with 95 % intervals")
    for row in found.rows:
        table.add_row(escaped(row.name), *(_score(row.scores[name]) for name in names))
    console.print(table)
    for row in found.rows:
        odd = [f"{row.cut} cut"] * bool(row.cut) + [f"{row.empty} empty"] * bool(row.empty)
        if odd:
            console.print(f"[bold]answers[/] of the {row.name}: {', '.join(odd)}", soft_wrap=True)
    for note in found.notes:
        console.print(f"[bold]note[/]    {escaped(note)}", soft_wrap=True)
    asked = [row.name for row in found.rows if found.answers and row.name in found.answers[0].answers]
    if asked:
        table = Table("prompt", "reference", *asked, title="some of the answers", show_lines=True)
        for sample in found.answers[:_SHOWN]:
            said = (sample.prompt, sample.references[0], *(sample.answers[name] for name in asked))
            table.add_row(*(escaped(text, lines=True) for text in said))
        console.print(table)
    if out is not None:
        console.print(f"[bold green]written[/] {escaped(str(out))}", soft_wrap=True)


def _score(score: Score) -> str:
    if score.low is None or score.high is None:
        return f"{score.value:.3f}"
    return f"{score.value:.3f}\n[dim]{score.low:.2f}–{score.high:.2f}[/]"


def _ranges(numbers: list[int]) -> str:
    """``[0, 1, 2, 5]`` as ``0-2, 5``."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)


def _layers(mapping: list[list[int]] | dict[str, list[list[int]]]) -> str:
    if isinstance(mapping, dict):
        return "; ".join(f"{stack}: {_layers(layers)}" for stack, layers in mapping.items())
    return ", ".join(f"{'+'.join(map(str, sources))} → {layer}" for layer, sources in enumerate(mapping))


def show_export(found: Export) -> None:
    """What ``export`` wrote, and how it answers."""
    console = Console(emoji=False)
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
