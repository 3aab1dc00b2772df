"""From a study to its cells: every combination of the lists of its grids, what several share once."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from peft_graft.alignment.methods import METHODS, automatic_methods
from peft_graft.config import AUTO, POLISH_STEPS, AlignConfig, GraftConfig, Library
from peft_graft.config import FRESH as METHOD_FRESH
from peft_graft.errors import StudyError
from peft_graft.metrics import METRICS
from peft_graft.study.cell import Cell, Examples, Names, Needs
from peft_graft.study.cells import (
    AlignmentCell,
    AlignmentConfig,
    FreshPolishCell,
    FreshPolishConfig,
    GraftCell,
    RateCell,
    RateConfig,
    StudentCell,
    StudentConfig,
    TeacherCell,
    TeacherConfig,
    TransferConfig,
)
from peft_graft.study.chains import ChainCell, ChainConfig, ChainGraftCell
from peft_graft.study.controls import (
    BareTeacherCell,
    ControlCell,
    ControlConfig,
    PromptControlCell,
    PromptControlConfig,
)
from peft_graft.study.plugins import Plugin
from peft_graft.study.spec import (
    CONTROL,
    CONTROL_NAMES,
    DEFAULT,
    FRESH,
    GRAFT_OPTIONS,
    POLISHED_FRESH,
    PROMPT_OPTIONS,
    Budget,
    Control,
    GenerationSpec,
    Grid,
    ModuleSpec,
    Study,
)


def cells_of(study: Study, only: str | None = None) -> dict[str, Cell]:
    """All cells by id, each after those that it needs.

    Args:
        only: a pattern (``fnmatch``) of the ids that are wanted; the cells that these need come along.

    Raises:
        StudyError: nothing matches.
    """
    found: dict[str, Cell] = {}
    for grid in study.grid:
        for module, task in product(grid.modules, grid.tasks):
            for language in study.tasks[task].languages:
                if not grid.languages or language in grid.languages:
                    for cell in _Comparison(study, grid, module, task, language).cells():
                        found.setdefault(cell.id, cell)
    if only is None:
        return found
    wanted = fnmatch.filter(found, only)
    if not wanted:
        raise StudyError("no cell matches", where=f"--only {only}", expected="a pattern of the ids that --list names")
    kept: set[str] = set()
    while wanted:
        name = wanted.pop()
        kept.add(name)
        wanted.extend(found[name].needed)
    return {name: cell for name, cell in found.items() if name in kept}


@dataclass(frozen=True)
class Start:
    """What a student starts from: a graft, or its own fresh module after a polish, and how it goes on.

    ``control``: the start stands for one of these. ``texts``: unlabelled ones that it is made on, where not those of
    the task. ``way``: by which a graft comes, where not straight.
    """

    transfer: GraftConfig
    from_fresh: bool = False
    distil: bool = False
    control: Control | None = None
    texts: int | None = None
    way: str = ""

    @property
    def name(self) -> str:
        """What it is called in tables: only what is not as usual is named."""
        return ", ".join([self.graft_name, *(["distilling"] if self.distil else [])])

    @property
    def graft_name(self) -> str:
        """The same of the graft alone."""
        option = self.transfer
        if self.control:
            parts = [CONTROL + CONTROL_NAMES[self.control]]
        elif self.from_fresh:
            parts = [POLISHED_FRESH]
        else:
            parts = [DEFAULT if option.method == AUTO else f"{option.method}/{option.layers}"]
        named = not (self.control or self.from_fresh) and option.method == AUTO
        if named and option.layers != Grid.model_fields["layers"].default[0]:
            parts.append(f"layers {option.layers}")
        if option.head != AUTO and not self.control:
            parts.append(f"head {option.head}")
        if option.polish != AUTO and self.control != "head":  # which no polish follows
            parts.append(f"polish {option.polish}")
        if option.learn != GraftConfig.model_fields["learn"].default:
            parts.append(f"learn {option.learn}")
        if option.on_policy:
            parts.append(f"on-policy {option.on_policy:g}")
        parts += [f"{self.texts} texts"] if self.texts else []
        parts += [self.way] if self.way else []
        return ", ".join(parts)

    @property
    def is_polished(self) -> bool:
        """Whether the module is polished, so that it depends on the seed and takes a lower learning rate."""
        return self.transfer.polish_steps > 0


@dataclass(frozen=True)
class _Comparison:
    """One pair, module, task and language of a grid."""

    study: Study
    grid: Grid
    module: str
    task: str
    language: str

    def cells(self) -> Iterator[Cell]:
        teacher = self._teacher()
        yield teacher
        for budget, seed in product((*self.grid.budgets, *self.grid.fresh_budgets), self.grid.seeds):
            yield from self._students(None, None, teacher, budget, seed)
        starts = list(self._starts())
        for start, seed in product(starts, self.grid.seeds):
            alignment = self._alignment(start)
            if alignment:
                yield alignment
            yield from self._grafted(start, self._graft(start, seed, teacher, alignment), teacher, seed)
            for between in () if start.from_fresh else self.grid.through:
                yield from self._chained(start, between, seed, teacher, alignment)
        for start, seed in product(self._controls(starts), self.grid.seeds):
            assert start.control
            needed = self._other_teacher(start.control)
            if needed:
                yield needed
            yield from self._grafted(start, self._control(start, seed, (teacher, needed)), teacher, seed)

    def _controls(self, starts: Sequence[Start]) -> Iterator[Start]:
        """Each control beside the first graft of each length of polish and number of texts; once, where it has no
        polish."""
        straight = [
            replace(start, distil=False)
            for start in starts
            if not start.from_fresh and start.transfer.method != METHOD_FRESH
        ]
        alike = {(start.transfer.polish, start.texts): start for start in reversed(straight)}
        for control in self.grid.controls:
            beside = [replace(start, control=control) for start in reversed(alike.values())]
            if control == "head":  # which no polish follows
                bare = [replace(one, transfer=one.transfer.model_copy(update={"polish": 0})) for one in beside]
                beside = list({one.texts: one for one in reversed(bare)}.values())[::-1]
            yield from beside

    def _grafted(self, start: Start, graft: Cell, teacher: Cell, seed: int) -> Iterator[Cell]:
        yield graft
        for budget in self.grid.budgets:
            yield from self._students(start, graft, teacher, budget, seed)

    def _chained(
        self, start: Start, between: str, seed: int, teacher: Cell, alignment: AlignmentCell | None
    ) -> Iterator[Cell]:
        """The same start by way of another model: in two grafts, and by the alignment that two make."""
        near = replace(self, grid=self.grid.model_copy(update={"student": between}))
        far = replace(self, grid=self.grid.model_copy(update={"teacher": between}))
        parts = near._alignment(start), far._alignment(start)
        yield from (part for part in parts if part)
        first = near._graft(start, seed, teacher, parts[0])
        yield first
        way = replace(start, way=f"through {between}")
        second = far._graft(way, seed, first, parts[1])
        second = second.model_copy(update={"names": self._graft(way, seed, teacher, None).names})
        yield from self._grafted(way, second, teacher, seed)
        if alignment and parts[0] and parts[1]:
            way = replace(start, way=f"composed through {between}")
            config = ChainConfig(
                examples=self._examples_of(start),
                device=self.study.device,
                teacher=self._models[0],
                through=self.study.models[between],
                student=self._models[1],
            )
            names = alignment.names.model_copy(update={"start": f"through {between}"})
            chain = ChainCell(names=names, config=config, needs=Needs(alignment=parts[0].id, other=parts[1].id))
            yield chain
            graft = ChainGraftCell(**dict(self._graft(way, seed, teacher, chain)))
            yield from self._grafted(way, graft, teacher, seed)

    def _other_teacher(self, control: Control) -> TeacherCell | None:
        """The teacher of another task, or the one whose head alone is trained, where the control needs it."""
        if control == "bare-teacher":
            teacher = self._teacher()
            return BareTeacherCell(names=teacher.names, config=teacher.config)
        if control != "other-task":
            return None
        other = self.study.other_task(self.task, [self.language])
        assert other is not None
        return replace(self, task=other)._teacher()

    def _control(self, start: Start, seed: int, teachers: tuple[TeacherCell, TeacherCell | None]) -> Cell:
        (asked, other), control = teachers, start.control
        needs = Needs(teacher=asked.id, other=other.id if other else None)
        if control == "bare-teacher" and other:
            needs = Needs(teacher=other.id)
        shared: dict[str, Any] = {
            "examples": self._examples_of(start),
            "device": start.transfer.device,
            "teacher": self._models[0],
            "student": self._models[1],
            "transfer": start.transfer.model_copy(update={"seed": seed}),
            "plugins": self._plugins(start.transfer),
            "control": control,
        }
        names = self._names(teacher=self.grid.teacher, start=start.graft_name, seed=seed)
        if isinstance(self.study.tasks[self.task], GenerationSpec):
            return PromptControlCell(names=names, config=PromptControlConfig(**shared), needs=needs)
        return ControlCell(names=names, config=ControlConfig(**shared, module=self._spec), needs=needs)

    def _starts(self) -> Iterator[Start]:
        grid = self.grid
        shared: dict[str, Any] = {
            "max_tokens": self.study.max_tokens,
            "device": self.study.device,
            "dtype": self.study.dtype,
        }
        task = self.study.tasks[self.task]
        if isinstance(task, GenerationSpec):
            shared |= task.transfer_options
        options = GRAFT_OPTIONS | PROMPT_OPTIONS
        lists = [getattr(grid, name) for name in options]
        found: dict[str, Start] = {}
        for from_fresh, *values, distil, texts in product(grid.from_fresh, *lists, grid.distil, grid.texts or (None,)):
            chosen = dict(zip(options.values(), values, strict=True))
            if chosen["method"] == METHOD_FRESH:  # nothing but its polish
                chosen["polish"] = POLISH_STEPS if chosen["polish"] == AUTO else chosen["polish"]
                if not chosen["polish"]:
                    continue
            option = GraftConfig(**chosen, **shared)
            if option.method in (AUTO, METHOD_FRESH) and option.layers != grid.layers[0]:
                continue  # each of them is one start, not one for each way of choosing layers
            if from_fresh:
                option = GraftConfig(polish=option.polish, layers=grid.layers[0], **shared)
                if not option.polish_steps:
                    continue
            start = Start(option, from_fresh, distil, texts=texts)
            found.setdefault(start.name, start)
        yield from found.values()

    def _names(self, **more: str | int | None) -> Names:
        own = {"student": self.grid.student, "module": self.module, "task": self.task, "language": self.language}
        return Names.model_validate({**own, **more})

    @property
    def _spec(self) -> ModuleSpec:
        return self.study.modules[self.module]

    @property
    def _examples(self) -> Examples:
        spec = self.study.tasks[self.task]
        built_in = not isinstance(spec, GenerationSpec) or METRICS[spec.metric].is_built_in
        plugins = () if built_in else self.study.plugins
        return Examples(task=self.task, language=self.language, spec=spec, plugins=plugins)

    def _examples_of(self, start: Start) -> Examples:
        """With the unlabelled ones that the start is made on."""
        found = self._examples
        if start.texts is None:
            return found
        return found.model_copy(update={"spec": found.spec.model_copy(update={"unlabelled_examples": start.texts})})

    @property
    def _models(self) -> tuple[str, str]:
        return self.study.models[self.grid.teacher], self.study.models[self.grid.student]

    def _teacher(self) -> TeacherCell:
        study = self.study
        config = TeacherConfig(
            examples=self._examples,
            device=study.device,
            model=self._models[0],
            module=self._spec,
            training=study.training.of_teacher(self.grid.teacher),
            keep_best=study.training.keep_best,
        )
        return TeacherCell(names=self._names(student=None, teacher=self.grid.teacher), config=config)

    def _alignment(self, start: Start) -> AlignmentCell | None:
        option = start.transfer
        if start.from_fresh or option.method == AUTO:
            return None
        if isinstance(self.study.tasks[self.task], GenerationSpec):
            return None  # transfer aligns on prompts and the teacher's answers to them, which differ with the module
        method = METHODS[option.method]
        if not method.needs_text or method.fits_layers:
            return None
        roles = _roles(self._spec)
        names = self._names(
            module=None,
            teacher=self.grid.teacher,
            method=option.method,
            layers=option.layers,
            roles="+".join(roles or ["all"]),
        )
        config = AlignmentConfig(
            examples=self._examples_of(start),
            device=option.device,
            teacher=self._models[0],
            student=self._models[1],
            align=AlignConfig(
                method=option.method,
                layers=option.layers,
                sites=roles,
                max_tokens=option.max_tokens,
                dtype=option.dtype,
                device=option.device,
            ),
            plugins=self._plugins(option),
        )
        return AlignmentCell(names=names, config=config)

    def _graft(self, start: Start, seed: int, teacher: Cell, alignment: Cell | None) -> Cell:
        # Only a polish depends on the seed; without one all seeds share the graft.
        option = start.transfer.model_copy(update={"seed": seed if start.is_polished else 0})
        names = self._names(teacher=self.grid.teacher, start=start.graft_name, seed=seed if start.is_polished else None)
        needs = Needs(teacher=teacher.id, alignment=alignment.id if alignment else None)
        config = TransferConfig(
            examples=self._examples_of(start),
            device=option.device,
            teacher=self._models[0],
            student=self._models[1],
            transfer=option,
            plugins=self._plugins(option),
        )
        if not start.from_fresh:
            return GraftCell(names=names, config=config, needs=needs)
        fresh = FreshPolishConfig(**dict(config), module=self._spec)
        return FreshPolishCell(names=names, config=fresh, needs=needs)

    def _students(
        self, start: Start | None, graft: Cell | None, teacher: Cell, budget: Budget, seed: int
    ) -> Iterator[Cell]:
        """The cell of a student and, before it, that of its learning rate."""
        training, spec, model = self.study.training, self._spec, self._models[1]
        settings = training.of_student(budget, seed)
        common: dict[str, Any] = {"examples": self._examples, "device": self.study.device}
        rate = None
        if training.rates and budget:
            config = RateConfig(
                **common,
                model=model,
                module=spec,
                rates=training.rates,
                budget=budget,
                training=settings.model_copy(update={"seed": 0}),
            )
            rate = RateCell(names=self._names(budget=budget), config=config)
            yield rate
        distil = start is not None and start.distil
        yield StudentCell(
            names=self._names(
                teacher=self.grid.teacher if start else None,
                start=start.name if start else FRESH,
                budget=budget,
                seed=seed,
            ),
            config=StudentConfig(
                **common,
                model=model,
                module=spec,
                budget=budget,
                training=settings.model_copy(update={"distillation": training.distillation if distil else 0.0}),
                share=training.fitted_rate if start and start.is_polished else 1.0,
                keep_best=training.keep_best,
                teacher=self._models[0] if distil else None,
            ),
            needs=Needs(
                graft=graft.id if graft else None,
                teacher=teacher.id if distil else None,
                rate=rate.id if rate else None,
            ),
        )

    def _plugins(self, option: GraftConfig) -> tuple[Plugin, ...]:
        """The study's, where a method that is tried is from one of them."""
        tried = automatic_methods() if option.method == AUTO else [METHODS[option.method]]
        return () if all(method.is_built_in for method in tried) else self.study.plugins


def _roles(spec: ModuleSpec) -> tuple[str, ...] | None:
    """The roles that an alignment has to cover for such a module; None for all."""
    name = spec.config if isinstance(spec.config, str) else (spec.config or {}).get("name", "")
    if spec.library is Library.ADAPTERS and "lora" not in str(name).lower():
        return ("adapter",)
    if spec.library is Library.PEFT and isinstance(spec.config, dict) and "target_modules" in spec.config:
        return None
    return ("attn.query", "attn.value")
