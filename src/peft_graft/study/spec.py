"""What a study file says: models, tasks, modules and the grids that combine them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from peft_graft.config import AUTO, POLISH_STEPS, Dtype, GraftConfig, HeadChoice, Library
from peft_graft.config import FRESH as METHOD_FRESH
from peft_graft.errors import PlanError
from peft_graft.metrics import METRICS as TEXT_METRICS
from peft_graft.models.tasks import Task
from peft_graft.record import Record
from peft_graft.study.plugins import Plugin
from peft_graft.study.tasks import METRICS, Metric
from peft_graft.study.training import FITTED_RATE, TrainingSettings

#: The student's own untrained module, the baseline of every comparison.
FRESH = "fresh"
#: What tables call a graft by the method ``auto``, and a fresh module that was polished on the teacher's answers.
DEFAULT, POLISHED_FRESH = "default", "polish from fresh"
Budget = Annotated[int, Field(ge=0)] | Literal["all"]
#: Controls of a grid (``study.controls``) -> what tables call them, behind ``CONTROL``.
Control = Literal["other-task", "random", "untrained", "bare-teacher", "head"]
CONTROL = "control: "
CONTROL_NAMES: dict[Control, str] = {
    "other-task": "module of another task",
    "random": "random module",
    "untrained": "untrained module, head fitted",
    "bare-teacher": "bare teacher",
    "head": "head alone",
}
#: Those that tasks of generation take.
PROMPT_CONTROLS: tuple[Control, ...] = ("other-task", "random")
#: Lists of a grid -> the options of ``transfer`` that their values are for.
GRAFT_OPTIONS = {"layers": "layers", "methods": "method", "heads": "head", "polish": "polish"}
#: The same for tasks of generated text alone.
PROMPT_OPTIONS = {"learn": "learn", "on_policy": "on_policy"}


class TaskSpec(Record):
    """A labelled task and where its examples are.

    Attributes:
        kind: ``token-classification``: columns ``tokens`` and ``ner_tags``, IOB2 tags by name or number;
            ``sequence-classification``: one column of text or two, and ``label``; ``question-answering``: ``question``,
            ``context`` and ``answers``.
        train, validation, test: a file (parquet, jsonl, csv, tsv), beginning with ``.``, ``/`` or ``~``, relative to
            the study file, or a data set of the hub, ``owner/name``, ``owner/name:config`` or
            ``owner/name:config:split``; ``{language}`` stands for the language. Without ``validation`` its examples are
            taken from the end of the shuffled training examples.
        columns, label: names of the columns, where they are not the usual ones.
        labels: names of numbered labels, where the data set has none.
        languages: where the task is to be had.
        train_examples, validation_examples, test_examples: how many to use at most; the first after shuffling, and of
            the test set the first as they come.
        unlabelled_examples: texts for grafts, which come after the ``train_examples``, so that no teacher has seen
            them; those of the training examples where it is left out.
        metric: entity F1 of tokens; of sequences accuracy, unless ``macro F1`` is asked for; of answers the F1 of their
            words, unless ``exact match`` is.
    """

    kind: Literal[Task.TOKEN_CLASSIFICATION, Task.SEQUENCE_CLASSIFICATION, Task.QUESTION_ANSWERING]
    train: str
    validation: str | None = None
    test: str
    columns: tuple[str, ...] = ()
    label: str | None = None
    labels: tuple[str, ...] = ()
    languages: tuple[str, ...] = ("en",)
    train_examples: int | None = None
    validation_examples: int = 500
    unlabelled_examples: int | None = Field(None, ge=1)
    test_examples: int | None = None
    metric: Metric

    @model_validator(mode="before")
    @classmethod
    def _usual_metric(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(kind := value.get("kind"), str) and kind in METRICS:
            value = {"metric": METRICS[Task(kind)][0], **value}
        return value

    @model_serializer(mode="wrap")
    def _as_it_always_was(self, plainly: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what is left out, so that cells keep the ids which they had before there was such a thing."""
        return {key: value for key, value in plainly(self).items() if value is not None or key != "unlabelled_examples"}

    @model_validator(mode="after")
    def _known_metric(self) -> TaskSpec:
        _check_unlabelled(self)
        if self.metric not in METRICS[self.kind]:
            raise ValueError(f"{self.kind} is not scored by {self.metric}, but by {' or '.join(METRICS[self.kind])}")
        return self


class GenerationSpec(Record):
    """A task of generated text and where its examples are.

    Attributes:
        kind: ``generation``: columns ``prompt`` and ``completion``, or ``references``, a list of accepted answers.
        train, validation, test, languages, train_examples, validation_examples, unlabelled_examples, test_examples: see
            ``TaskSpec``.
        columns: names of the columns of prompt and answer, where they are not the usual ones.
        metric: one of ``peft_graft.metrics``.
        format: how a prompt is written, such as ``"Question: {prompt}\\nAnswer:"``; the tokenizer's chat template
            where it is left out. system: a message for prompts that have none.
        template_args: for the chat template, such as ``{ enable_thinking = false }``.
        max_new_tokens: of an answer, when it is scored. max_length: tokens of prompt and answer, in training.
    """

    #: What says how prompts are put to a model.
    ASKING: ClassVar = ("format", "system", "template_args", "max_new_tokens", "max_length")
    kind: Literal["generation"]
    train: str
    validation: str | None = None
    test: str
    columns: tuple[str, ...] = Field((), max_length=2)
    languages: tuple[str, ...] = ("en",)
    train_examples: int | None = None
    validation_examples: int = 100
    unlabelled_examples: int | None = Field(None, ge=1)
    test_examples: int | None = None
    metric: str = "exact"
    format: str | None = None
    system: str | None = None
    template_args: dict[str, Any] = {}
    max_new_tokens: int = Field(256, ge=1)
    max_length: int = Field(1024, ge=2)

    @model_validator(mode="after")
    def _can_be_scored(self) -> GenerationSpec:
        _check_unlabelled(self)
        known = [name for name, metric in TEXT_METRICS.items() if metric.more_is_better]
        if self.metric not in known:
            raise ValueError(f"generation is not scored by {self.metric}, but by {' or '.join(known)}")
        for place in ("prompt", *(["system"] if self.system else [])):
            if self.format is not None and f"{{{place}}}" not in self.format:
                message = f"the format has no place for the {place}; expected {{{place}}} in it"
                raise ValueError(f"{message}, found {self.format}")
        if self.max_length <= self.max_new_tokens:
            raise ValueError(f"max_length {self.max_length} leaves a prompt no room beside max_new_tokens")
        return self

    def __hash__(self) -> int:
        return hash(self.model_dump_json())  # which frozen models with dictionaries do not have by themselves

    @property
    def transfer_options(self) -> dict[str, Any]:
        """The same for ``transfer``."""
        return {name: getattr(self, name) or None for name in self.ASKING}


def _check_unlabelled(task: TaskSpec | GenerationSpec) -> None:
    if task.unlabelled_examples and not task.train_examples:
        raise ValueError("unlabelled_examples come after the train_examples, so give these too")


SomeTask = Annotated[TaskSpec | GenerationSpec, Field(discriminator="kind")]


class ModuleSpec(Record):
    """A kind of module: the library that trains it and its configuration (``modules.new_module``)."""

    library: Library = Library.PEFT
    config: dict[str, Any] | str | None = None


class Training(Record):
    """How modules are trained: the teacher's, and every student's, whatever it starts from.

    Attributes:
        teacher_rates: learning rates of the teachers, by model, where ``teacher.learning_rate`` does not suit.
        epochs: of the students by budget, where ``student.epochs`` does not suit: ``{ 100 = 20, all = 3 }``.
        rates: learning rates from which one is chosen for the fresh module, on validation examples, once for each
            student, module, task, language and budget; every student of that budget takes it. ``student.learning_rate``
            where it is empty.
        fitted_rate: a start that was polished takes this share of the student's learning rate.
        distillation: weight of the teacher's answers in a start that goes on distilling.
        keep_best: whether modules keep the epoch that scores best on the validation examples, or the last one.
    """

    teacher: TrainingSettings = TrainingSettings()
    student: TrainingSettings = TrainingSettings()
    teacher_rates: dict[str, float] = {}
    epochs: dict[str, float] = {}
    rates: tuple[float, ...] = ()
    fitted_rate: float = FITTED_RATE
    distillation: float = 0.5
    keep_best: bool = True

    def of_teacher(self, model: str) -> TrainingSettings:
        """The schedule of a teacher, by the short name of its model."""
        return self.teacher.model_copy(
            update={"learning_rate": self.teacher_rates.get(model, self.teacher.learning_rate)}
        )

    def of_student(self, budget: Budget, seed: int) -> TrainingSettings:
        """The schedule of a student with so many labelled examples."""
        return self.student.model_copy(
            update={"epochs": self.epochs.get(str(budget), self.student.epochs), "seed": seed}
        )


class Grid(Record):
    """Every combination of its lists is a comparison; ``Study.defaults`` fills in what a grid leaves out.

    Attributes:
        teacher, student: short names of models. modules, tasks: short names. languages: of the tasks, all when empty.
        layers, methods, heads, polish: options of ``transfer`` (``GraftConfig``); with the method ``auto`` only the
            first of ``layers`` is taken.
        learn, on_policy: the same, for tasks of generation.
        distil: whether the fine-tuning goes on learning from the teacher too.
        from_fresh: whether the student's own untrained module is polished on the teacher's answers, in place of the
            teacher's module. It takes ``polish`` and ``distil`` alone, with the method ``auto``.
        controls: what its starts are compared with, for each length of polish (``study.controls``).
        texts: how many unlabelled texts grafts are made on, of those after the ``train_examples`` of the task
            (``unlabelled_examples``); what the task says where it is empty.
        through: models between teacher and student: the module moves to each and from there on, and by the alignment
            that is put together of two where the method has one.
        budgets: labelled training examples, or ``all``; students are scored before and after they learn from them.
        fresh_budgets: more of them, for the fresh module alone.
        seeds: of the labels drawn, of what is initialised and of the order of training.
    """

    teacher: str
    student: str
    modules: tuple[str, ...]
    tasks: tuple[str, ...]
    languages: tuple[str, ...] = ()
    layers: tuple[str, ...] = ("skip",)
    methods: tuple[str, ...] = (AUTO,)
    heads: tuple[HeadChoice, ...] = ("auto",)
    polish: tuple[int | Literal["auto"], ...] = ("auto",)
    learn: tuple[Literal["distributions", "text"], ...] = ("distributions",)
    on_policy: tuple[float, ...] = (0.0,)
    distil: tuple[bool, ...] = (False,)
    from_fresh: tuple[bool, ...] = (False,)
    controls: tuple[Control, ...] = ()
    texts: tuple[Annotated[int, Field(ge=1)], ...] = ()
    through: tuple[str, ...] = ()
    budgets: tuple[Budget, ...] = ("all",)
    fresh_budgets: tuple[Budget, ...] = ()
    seeds: tuple[int, ...] = (0,)

    @field_validator(*GRAFT_OPTIONS, *PROMPT_OPTIONS)
    @classmethod
    def _as_transfer_has_them(cls, values: tuple[Any, ...], info: ValidationInfo) -> tuple[Any, ...]:
        option = (GRAFT_OPTIONS | PROMPT_OPTIONS)[str(info.field_name)]
        for value in values:
            try:
                GraftConfig.model_validate({"polish": POLISH_STEPS, option: value})  # without which fresh is refused
            except PlanError as error:
                expected = f"expected {error.expected}, " if error.expected else ""
                raise ValueError(f"{error.message}; {expected}found {error.found}") from error
        return values

    @field_validator("layers")
    @classmethod
    def _layer_maps(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        for value in values:
            for part in value.split(";"):
                told = part.rpartition("=")[2].strip()
                if told not in (AUTO, "skip", "avg") and not all(one.strip().isdigit() for one in told.split(",")):
                    expected = "auto, skip, avg, or numbers such as 0,2,4"
                    raise ValueError(f"not a layer map; expected {expected}, found {value}")
        return values

    @model_validator(mode="after")
    def _each_once(self) -> Grid:
        for name in type(self).model_fields:
            values = getattr(self, name)
            if isinstance(values, tuple) and (twice := [value for value in values if values.count(value) > 1]):
                raise ValueError(f"{name}: {twice[0]} is named twice; name it once")
        return self


class Study(Record):
    """One study file.

    Attributes:
        name: of the study. models: short name -> folder (written like the files of tasks) or hub id.
        tasks, modules: by short name.
        plugins: Python files that register methods of their own; paths like those of tasks.
        device, dtype: of everything that is run. max_tokens: that alignments see.
    """

    name: str
    models: dict[str, str]
    tasks: dict[str, SomeTask]
    modules: dict[str, ModuleSpec]
    training: Training = Training()
    defaults: dict[str, Any] = Field(default_factory=dict)
    grid: tuple[Grid, ...]
    plugins: tuple[Plugin, ...] = ()
    max_tokens: int = GraftConfig.model_fields["max_tokens"].default
    device: str = "cpu"
    dtype: Dtype = "float32"

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("grid"), list | tuple):
            defaults = value.get("defaults", {})
            if not isinstance(defaults, dict):
                raise ValueError(f"defaults are no table, but {type(defaults).__name__}")
            value = {
                **value,
                "grid": [{**defaults, **grid} if isinstance(grid, dict) else grid for grid in value["grid"]],
            }
        return value

    @model_validator(mode="after")
    def _known_names(self) -> Study:
        for number, grid in enumerate(self.grid):
            for what, names, known in (
                ("model", (grid.teacher, grid.student, *grid.through), self.models),
                ("module", grid.modules, self.modules),
                ("task", grid.tasks, self.tasks),
            ):
                unknown = [name for name in names if name not in known]
                if unknown:
                    raise ValueError(
                        f"grid {number}: unknown {what} {', '.join(unknown)}; named are {', '.join(known)}"
                    )
            for task in grid.tasks:
                if grid.texts and not self.tasks[task].train_examples:
                    raise ValueError(f"grid {number}: texts come after the train_examples of {task}, so give these too")
                missing = set(grid.languages) - set(self.tasks[task].languages)
                if missing == set(grid.languages) and missing:
                    raise ValueError(f"grid {number}: {task} has none of the languages {', '.join(grid.languages)}")
                if "other-task" in grid.controls and not self.other_task(task, grid.languages):
                    raise ValueError(
                        f"grid {number}: the control other-task needs another task in the language of {task}"
                    )
                if self.tasks[task].kind == Task.QUESTION_ANSWERING and any(grid.distil):
                    raise ValueError(f"grid {number}: {task} is a task of question answering, which takes no distil")
                if isinstance(self.tasks[task], GenerationSpec):
                    self._check_generation(f"grid {number}: {task} is a task of generation, which", grid)
                elif any(getattr(grid, name) != Grid.model_fields[name].default for name in PROMPT_OPTIONS):
                    options = " and ".join(PROMPT_OPTIONS)
                    raise ValueError(f"grid {number}: {options} are for tasks of generation, which {task} is not")
        return self

    def _check_generation(self, what: str, grid: Grid) -> None:
        if any(self.modules[name].library is not Library.PEFT for name in grid.modules):
            raise ValueError(f"{what} takes modules of peft")
        if any(grid.distil) or any(grid.from_fresh):
            raise ValueError(f"{what} takes neither distil nor from_fresh, but the method fresh")
        if grid.through:
            raise ValueError(f"{what} takes no through")
        if others := [name for name in grid.controls if name not in PROMPT_CONTROLS]:
            raise ValueError(
                f"{what} takes the controls {' and '.join(PROMPT_CONTROLS)}, not {', '.join(others)}: there is no "
                "head, an untrained module is the method fresh, and a teacher without its module has nothing to teach"
            )
        if grid.controls and set(grid.methods) == {METHOD_FRESH}:
            raise ValueError(f"{what} takes controls beside methods that move weights, which fresh does not")

    def other_task(self, task: str, languages: Sequence[str] = ()) -> str | None:
        """The first task after this one, in the order of the file and from its start again, as this with labels or of
        generation, and in all of the same languages; None where there is none."""
        names, spoken = list(self.tasks), isinstance(self.tasks[task], GenerationSpec)
        after = names[names.index(task) + 1 :] + names[: names.index(task)]
        wanted = set(languages or self.tasks[task].languages) & set(self.tasks[task].languages)
        return next(
            (
                name
                for name in after
                if isinstance(self.tasks[name], GenerationSpec) == spoken and wanted <= set(self.tasks[name].languages)
            ),
            None,
        )
