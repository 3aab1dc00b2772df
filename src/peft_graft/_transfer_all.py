"""``transfer_all``: a shelf of modules moved to one model, which is loaded once."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from peft_graft._transfer import written
from peft_graft.alignment.aligner import SharedAlignments
from peft_graft.alignment.alignment import Alignment
from peft_graft.alignment.sharding import check_models_on_ray
from peft_graft.alignment.text import TextLike, rows_given
from peft_graft.cluster import Tasks
from peft_graft.config import GraftConfig, known_arguments
from peft_graft.errors import GraftError, OutputError, PlanError, reason
from peft_graft.files import json_text, read_json
from peft_graft.models.devices import gpus_of, on_worker, placed
from peft_graft.models.loading import ModelHandle, ModelPair
from peft_graft.models.places import place_of
from peft_graft.move import Move
from peft_graft.outputs import check_apart, check_place, reserved, reserving_output, write_aside
from peft_graft.page.graft import PAGE
from peft_graft.page.shelf import shelf_page
from peft_graft.planning.sources import ModelLike, ModelSources, config_of_live, given_alignment
from peft_graft.processes import Processes
from peft_graft.progress import watchers
from peft_graft.prompts.read import PromptLike
from peft_graft.report import REPORT, GraftReport
from peft_graft.run import UNFINISHED, Callback, Run
from peft_graft.shelf import SHELF, ShelfEntry, ShelfModule, ShelfReport, check_names, read_shelf
from peft_graft.surroundings import undisturbed

logger = logging.getLogger("peft_graft")
#: The stage in which modules move side by side.
MOVING = "moving modules"


@known_arguments(GraftConfig)
@reserving_output
@undisturbed
def transfer_all(  # as ``transfer``, and all that it takes is for every module
    adapters: Sequence[str | Path | ShelfModule],
    student: ModelLike,
    *,
    out: str | Path,
    teacher: ModelLike | None = None,
    text: TextLike | PromptLike | None = None,
    seeds: PromptLike | None = None,
    alignment: str | Path | Alignment | None = None,
    config: GraftConfig | Mapping[str, Any] | None = None,
    callbacks: Sequence[Callback] | None = None,
) -> ShelfReport:
    """Move several modules to one model: models are loaded once, and aligned once on plain text.

    Modules of one teacher follow one another. Each graft is what ``transfer`` makes of the module alone, and is written
    to ``out``/NAME as soon as it is done; one that is there already and depends on the same is kept. A module that
    cannot be moved is listed, and the rest go on. On Ray each module is a task of its own, which loads and aligns
    for itself; that of a worker that dies starts again.

    Args:
        adapters: folders or hub ids of modules; ``ShelfModule`` says more of one.
        out: folder of the grafts, and of ``shelf.json`` and ``report.html``, which say what became of each.
        student, teacher, text, seeds, alignment, config: as for ``transfer``; text in memory is read once.
        callbacks: watch the run; stages carry the name of their module.

    Raises:
        PlanError: there is no module, two would be written to the same folder, or this is one of several processes; on
            Ray, a model is live, or no node is large enough for a module.
        OutputError: ``out`` cannot be written.
        AlignmentError: there is no alignment of that name.
    """
    if not Processes.started().alone:
        raise PlanError(
            "a shelf is moved by one process",
            where="torchrun",
            fix="start one, or let several of them move one module after another with transfer",
        )
    config = config_of_live(placed(GraftConfig.of(config)), student)
    modules = [one if isinstance(one, ShelfModule) else ShelfModule(adapter=str(one)) for one in adapters]
    check_names(modules)
    _check_shelf(Path(out), force=config.force)
    _check_ray(config, student, teacher)
    given = given_alignment(alignment, config.token)
    shelf = _Shelf(
        student,
        teacher,
        _kept(text, "text"),
        _kept(seeds, "seeds"),
        (given, str(alignment) if isinstance(alignment, str | Path) else None),
        config,
        Path(out),
        watchers(callbacks),
    )
    return shelf.moved(modules)


def _check_shelf(out: Path, *, force: bool) -> None:
    """Refuse a folder that is something else.

    Raises:
        OutputError: it is a graft, or has a page that is not a shelf's.
    """
    graft, other = (out / REPORT).is_file(), (out / PAGE).is_file() and not (out / SHELF).is_file()
    if graft or (other and not force):
        raise OutputError(
            "is a graft, and no shelf of them" if graft else f"has a {PAGE} of something else, which would be lost",
            where=str(out),
            fix="choose another --out",
        )


def _check_ray(config: GraftConfig, student: ModelLike, teacher: ModelLike | None) -> None:
    """Refuse Ray where its workers do not find what they need.

    Raises:
        PlanError: a model is live, or parts are asked for.
    """
    if config.ray is None:
        return
    check_models_on_ray(teacher=teacher, student=student)
    if config.shards is not None:
        raise PlanError(
            "each module of a shelf goes to a worker as a whole",
            where="--shards",
            found=config.shards,
            fix="leave it out, or move one module by itself",
        )


def _kept(text: Any, where: str) -> Any:
    """Text in memory as what can be read once for every module."""
    given = None if text is None else rows_given(text, where)
    return given if given is None or isinstance(given, str | Path) else list(given)


class _Named(Callback):
    """Tells another callback of the stages of one module."""

    def __init__(self, inner: Callback, name: str) -> None:
        self._inner, self._name = inner, name

    def on_stage_begin(self, stage: str) -> None:
        self._inner.on_stage_begin(f"{self._name}: {stage}")

    def on_progress(self, stage: str, done: int, total: int | None) -> None:
        self._inner.on_progress(f"{self._name}: {stage}", done, total)

    def on_loss(self, stage: str, loss: float) -> None:
        self._inner.on_loss(f"{self._name}: {stage}", loss)

    def on_stage_end(self, stage: str, seconds: float) -> None:
        self._inner.on_stage_end(f"{self._name}: {stage}", seconds)


@dataclass
class _Loaded:
    """The student and the last teacher, as they were loaded."""

    held: dict[str, tuple[object, ModelHandle]] = field(default_factory=dict)

    def has(self, sources: ModelSources, *, tokenizers: bool) -> bool:
        """Whether both models are there."""
        return all(role in self.held and self.held[role][0] == key for role, key in _keys(sources, tokenizers).items())

    def pair(self, sources: ModelSources, *, tokenizers: bool) -> ModelPair:
        """The models of these sources; what is not there takes the place of what is."""
        for role, key in _keys(sources, tokenizers).items():
            if role not in self.held or self.held[role][0] != key:
                self.held.pop(role, None)  # before another takes as much memory
                self.held[role] = key, sources.load(role, tokenizers=tokenizers)
        return ModelPair(self.held["teacher"][1], self.held["student"][1])


def _keys(sources: ModelSources, tokenizers: bool) -> dict[str, object]:
    sides = {"student": sources.student, "teacher": sources.teacher}
    return {role: (model if isinstance(model, nn.Module) else str(model), tokenizers) for role, model in sides.items()}


@dataclass
class _Shelf:
    """One run over all modules; attributes as the arguments of ``transfer_all``.

    Attributes:
        alignment: and the name that it was given by.
    """

    student: ModelLike
    teacher: ModelLike | None
    text: TextLike | PromptLike | None
    seeds: PromptLike | None
    alignment: tuple[Alignment | None, str | None]
    config: GraftConfig
    out: Path
    callbacks: Sequence[Callback]
    loaded: _Loaded = field(default_factory=_Loaded)
    shared: dict[object, SharedAlignments] = field(default_factory=dict)
    entries: dict[str, ShelfEntry] = field(default_factory=dict)

    def moved(self, modules: Sequence[ShelfModule]) -> ShelfReport:
        """All modules moved, one teacher after another."""
        groups: dict[object, list[ShelfModule]] = {}
        earlier, order = self._earlier(), [module.folder for module in modules]
        for module in modules:
            try:
                move = self._planned(module)
            except GraftError as error:
                self.entries[module.folder] = _failure(module, error)
                continue
            teacher = _keys(move.sources, tokenizers=True)["teacher"]
            groups.setdefault(teacher, []).append(module)
            if wanted := move.wanted:
                known = self.shared.get(teacher)
                self.shared[teacher] = SharedAlignments(known.wanted.widened(wanted) if known else wanted)
        self.out.mkdir(parents=True, exist_ok=True)
        report = self._report(order)
        if self.config.ray:
            return self._moved_on_ray([module for group in groups.values() for module in group], earlier, order)
        for teacher, group in groups.items():
            for module in group:
                self.entries[module.folder] = self.entry(module, self.shared.get(teacher), earlier)
                report = self._report(order)
            self.shared.pop(teacher, None)
        return report

    def _moved_on_ray(
        self, modules: Sequence[ShelfModule], earlier: dict[str, ShelfEntry], order: Sequence[str]
    ) -> ShelfReport:
        """The same with a task of Ray for each module, which shares nothing with the others."""
        config, run, report = self.config, Run(self.callbacks), self._report(order)
        of_worker = replace(self, config=on_worker(config.model_copy(update={"ray": None})), callbacks=())
        tasks = Tasks(
            str(config.ray),
            move_module,
            of="module",
            gpus=len(gpus_of(config.device, config.student_device)),
            shared=(of_worker, earlier),
            lost=lambda number, error: _failure(modules[number], error),
        )
        with run.stage(MOVING), closing(tasks.results([module] for module in modules)) as found:
            for number, entry in found:
                self.entries[modules[number].folder] = entry
                report = self._report(order)
                run.progress(MOVING, len(self.entries), len(order))
        return report

    def _report(self, order: Sequence[str]) -> ShelfReport:
        """All that is known by now, also written."""
        name = self.student if isinstance(self.student, str | Path) else type(self.student).__name__
        report = ShelfReport.of(place_of(str(name)), [self.entries[one] for one in order if one in self.entries])
        content = json_text(report.model_dump(mode="json"), str(self.out / SHELF), indent=2)
        write_aside(self.out / SHELF, content, force=True)
        write_aside(self.out / PAGE, shelf_page(report, self.out.absolute().name), force=True)
        return report

    def _earlier(self) -> dict[str, ShelfEntry]:
        """What an earlier run says of its modules, for the time that they took."""
        try:
            return {one.name: one for one in read_shelf(self.out).modules}
        except GraftError:  # there was none, or one of another version
            return {}

    def _planned(self, module: ShelfModule) -> Move:
        # A module's own text or examples take the place of both.
        own = module.text is not None or module.seeds is not None
        given, name = self.alignment
        move = Move.planned(
            module.adapter,
            self.student,
            teacher=module.teacher or self.teacher,
            text=module.text if own else self.text,
            seeds=module.seeds if own else self.seeds,
            alignment=given,
            config=self.config,
        )
        return replace(move, alignment=name)

    def entry(self, module: ShelfModule, shared: SharedAlignments | None, earlier: dict[str, ShelfEntry]) -> ShelfEntry:
        """What becomes of a module: moved, kept or failed."""
        start = time.perf_counter()
        out = self.out / module.folder
        try:
            move = self._planned(module)
            run = Run([_Named(one, module.folder) for one in self.callbacks], work=Path(f"{out}{UNFINISHED}"))
            named = [module.text or self.text, module.seeds or self.seeds, self.alignment[1]]
            check_apart(out, [module.adapter, move.sources.teacher, move.sources.student, *named])
            first = not self.loaded.has(move.sources, tokenizers=move.reads_text)
            with reserved(out):
                with run.stage("loading models"):
                    models = self.loaded.pair(move.sources, tokenizers=move.reads_text)
                report = self._kept(move, models, out)
                kept = report is not None
                if report is None:
                    report = written(move.carried_out(models, run, shared), out, run).report
        except Exception as error:  # whatever it is, the others go on, and this one says why
            self.loaded = _Loaded()  # what it has left in them is not known
            if not isinstance(error, GraftError):
                logger.exception("%s cannot be moved", module.adapter)
            return _failure(module, error)
        before = earlier.get(module.folder)
        if kept and before is not None and before.state != "failed":
            return before.model_copy(update={"state": "kept"})
        return ShelfEntry(
            name=module.folder,
            module=report.module,
            teacher=report.teacher.name,
            state="kept" if kept else "written",
            method=report.method,
            verdict=report.verdict,
            first=first,
            seconds=None if kept else round(time.perf_counter() - start, 1),
        )

    def _kept(self, move: Move, models: ModelPair, out: Path) -> GraftReport | None:
        """The report of a finished graft of the same work; None where there is none, or it shall be replaced.

        Raises:
            OutputError: something else is there.
        """
        if self.config.force or not out.exists():
            check_place(out, force=True)
            return None
        try:
            report = GraftReport.model_validate(read_json(out / REPORT))
        except (GraftError, OSError, ValueError):
            report = None
        if report is None or report.identity != move.identity(models):
            raise OutputError(
                "something else is there, and no graft of this module with these models, choices and text",
                where=str(out),
                fix="choose another --out, or replace it with --force",
            )
        return report


def move_module(shelf: _Shelf, earlier: dict[str, ShelfEntry], module: ShelfModule) -> ShelfEntry:
    """What becomes of one module, on a worker."""
    return shelf.entry(module, None, earlier)


def _failure(module: ShelfModule, error: Exception) -> ShelfEntry:
    said = str(error) if isinstance(error, GraftError) else reason(error)
    return ShelfEntry(name=module.folder, module=module.adapter, teacher=module.teacher, state="failed", error=said)
