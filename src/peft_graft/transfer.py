"""The one verb: transfer a module to a student; the result is a ``Graft``."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from torch import nn

from peft_graft.activations import CollectionSettings, Progress, check_pairs, collect
from peft_graft.alignment import METHODS, Alignment, Method, Pair, copy_alignment, solve_alignment
from peft_graft.alignment_files import load_alignment, save_alignment
from peft_graft.architectures import SEQUENCE_CLASSIFICATION, TOKEN_CLASSIFICATION, Architecture
from peft_graft.checkpoints import PeftCheckpoint, head_form, locate, read_checkpoint, resolve, to_raw, write_checkpoint
from peft_graft.errors import AlignmentError, HeadError, ModelError, PairingError, PlanError, TextError
from peft_graft.formats.raw import RawCheckpoint
from peft_graft.models import (
    DTYPES,
    ModelHandle,
    blank_model,
    check_device,
    check_tokenizer,
    describe_config,
    embedding_similarity,
    fresh_head,
    handle,
    load_config,
    load_model,
    own_labels,
    set_labels,
    student_names,
)
from peft_graft.modules import POOLED_OUT, Axis, LoraModule, Module, Site, Space, average
from peft_graft.planning import (
    HeadChoice,
    SitePlan,
    TransferPlan,
    choose_method,
    map_axis,
    plan_alignment,
    plan_transfer,
)
from peft_graft.projection import project, resize_inner_layer
from peft_graft.report import (
    GraftReport,
    HeadRecord,
    MapRecord,
    ModelRecord,
    PairingRecord,
    SiteRecord,
    TransferSettings,
    hardware,
    versions,
    write_model_card,
)
from peft_graft.text import Sample, as_samples, read_text
from peft_graft.token_pairing import PairingCounts
from peft_graft.verification import verify
from peft_graft.weights import check_output, write_json, written_aside

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

CLASSIFICATION_TASKS = (TOKEN_CLASSIFICATION, SEQUENCE_CLASSIFICATION)
TextLike = Iterable[str | tuple[str, str] | Sequence[str] | Sample]


@dataclass(frozen=True)
class Graft:
    """The result of every transfer: the student's checkpoint, how each site came about, and how to keep it.

    Attributes:
        checkpoint: the modules at the student's sites, and the head if one was carried.
        report: everything that ``graft.json`` will say.
        alignment: the maps that were used, reusable for every module of the same pair of models.
        student: the student's base model; ``save`` loads the written checkpoint into a copy of it.
    """

    checkpoint: PeftCheckpoint
    report: GraftReport
    alignment: Alignment
    student: ModelHandle = field(repr=False)
    folder: Path | None = None

    def raw(self) -> RawCheckpoint:
        """The checkpoint with the student's own paths, as it will be written.

        peft demands a head in every checkpoint of a classification task; where none is carried, an untrained one of
        as many labels stands in.
        """
        raw = to_raw(self.checkpoint, self.student.architecture, self.student.base_tensors())
        if raw.head or raw.format != "peft" or raw.task not in CLASSIFICATION_TASKS:
            return raw
        num_labels = self.checkpoint.raw.num_labels
        config = self.student.base.config
        return replace(raw, head=fresh_head(config, raw.task, num_labels, self.report.settings.seed))

    def save(self, folder: str | Path, *, force: bool = False) -> Graft:
        """Write the checkpoint, verify it in its library, and only then put it in place.

        Returns:
            The same graft with ``folder`` and the verification in its report.

        Raises:
            OutputError: the folder exists and ``force`` is not set, or cannot be written.
            VerificationError: the written checkpoint does not load cleanly or changes nothing.
        """
        out, raw, task = Path(folder), self.raw(), self.checkpoint.raw.task
        labels = self.checkpoint.head.labels if self.checkpoint.head else ()
        config = self.student.base.config
        names = student_names(self.report.student.name, config, task, self.student.architecture)
        with written_aside(out, force=force) as staging:
            write_checkpoint(staging, raw, names)
            if labels and raw.format == "peft":
                _write_labels(staging, config, labels)
            verification = verify(staging, raw, self.student, labels)
            skipped = [] if verification.done else [f"not verified: {verification.library} is not installed"]
            report = self.report.model_copy(
                update={"verification": verification, "notes": [*self.report.notes, *skipped]}
            )
            write_model_card(staging, report, task, labels)
            write_json(staging / "graft.json", report.model_dump(mode="json"))
        return replace(self, report=report, folder=out)


def transfer(
    module: str | Path,
    *,
    student: str | Path,
    out: str | Path | None = None,
    teacher: str | Path | None = None,
    layers: str = "skip",
    method: str | None = None,
    text: str | Path | None = None,
    columns: Sequence[str] | None = None,
    max_tokens: int = 50_000,
    alignment: str | Path | Alignment | None = None,
    head: HeadChoice = "carry",
    seed: int = 0,
    device: str = "cpu",
    dtype: str = "float32",
    force: bool = False,
    progress: Progress | None = None,
) -> Graft:
    """Move a trained module to another model, everything given by name or path.

    Args:
        module: folder or hub id of a PEFT or AdapterHub checkpoint.
        student: folder or hub id of the model that receives the module.
        out: folder to write; nothing is written without it.
        teacher: the model that the module was trained on; the one that its configuration names by default.
        layers: ``skip``, ``avg``, or one teacher layer for each student layer, ``"0,2,4"``.
        method: a key of ``METHODS``; chosen by ``planning.choose_method`` when None.
        text: source for alignment (``text.read_text``), with ``columns`` and ``max_tokens``.
        alignment: a saved alignment of the two models, or a live one; no text is needed then.
        head: ``carry`` the saved classification head, or ``drop`` it.
        seed, device, dtype: see ``TransferSettings``.
        force: replace ``out`` if it exists.
        progress: called as (stage, done, total).

    Returns:
        The graft, also when it was not written.

    Raises:
        GraftError: one of its kinds, naming the site or option, what was expected, what came and the fix. All that
            can be known without weights is checked before any weights are loaded.
    """
    settings = _settings(layers, method, head, max_tokens, seed, device, dtype)
    if out is not None:
        check_output(Path(out), force=force)
    folder = locate(module)
    raw = read_checkpoint(folder)
    teacher_name = str(teacher or raw.base_model or "")
    if not teacher_name:
        raise ModelError(
            "the module's configuration names no base model", where=str(module), fix="name it with --teacher"
        )
    given = load_alignment(Path(alignment)) if isinstance(alignment, str | Path) else alignment
    _preflight(raw, teacher_name, str(student), settings, given is not None, text is not None)
    samples = read_text(text, columns, seed) if text is not None else None
    if samples is not None and given is None:
        samples = _peeked(samples)
    clock = _Clock(progress)
    with clock("loading models"):
        needs_tokens = given is None and text is not None
        teacher_model = load_model(teacher_name, device=device, dtype=dtype, role="teacher", tokenizer=needs_tokens)
        student_model = load_model(str(student), device=device, dtype=dtype, role="student", tokenizer=needs_tokens)
    graft = _transfer(
        raw,
        teacher_model,
        student_model,
        settings,
        samples,
        given,
        clock,
        module=str(module),
        text=str(text) if text is not None else None,
        alignment_name=str(alignment) if isinstance(alignment, str | Path) else None,
    )
    if out is None:
        return graft
    with clock("writing and verifying"):
        return graft.save(out, force=force)


def transfer_checkpoint(
    checkpoint: RawCheckpoint,
    teacher: nn.Module,
    student: nn.Module,
    *,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
    student_tokenizer: PreTrainedTokenizerBase | None = None,
    text: TextLike | None = None,
    layers: str = "skip",
    method: str | None = None,
    max_tokens: int = 50_000,
    alignment: Alignment | None = None,
    head: HeadChoice = "carry",
    progress: Progress | None = None,
) -> Graft:
    """Move a module between live models; ``transfer`` is the same by name or path.

    Args:
        checkpoint: from ``read_checkpoint(folder)``.
        teacher, student: models of transformers without modules inside, bare or with a task head; forward passes
            run where and in what precision they are.
        teacher_tokenizer, student_tokenizer: fast tokenizers, for methods that need text.
        text: strings, pairs of strings (tuples) or lists of tokens; streamed.
        layers, method, max_tokens, alignment, head, progress: as for ``transfer``.
    """
    device = str(next(student.parameters()).device)
    dtype = str(next(student.parameters()).dtype).removeprefix("torch.")
    settings = _settings(layers, method, head, max_tokens, 0, device, dtype)
    return _transfer(
        checkpoint,
        handle(teacher, teacher_tokenizer, ""),
        handle(student, student_tokenizer, ""),
        settings,
        as_samples(text) if text is not None else None,
        alignment,
        _Clock(progress),
        module=checkpoint.name,
        text="given in memory" if text is not None else None,
    )


def align(
    teacher: str | Path,
    student: str | Path,
    *,
    text: str | Path,
    out: str | Path | None = None,
    columns: Sequence[str] | None = None,
    layers: str = "skip",
    method: str = "prune-align",
    sites: Sequence[str] | None = None,
    max_tokens: int = 50_000,
    seed: int = 0,
    device: str = "cpu",
    dtype: str = "float32",
    force: bool = False,
    progress: Progress | None = None,
) -> Alignment:
    """Align two models once, for every module that will move between them.

    Args:
        sites: roles to cover, such as ``("attn.query", "attn.value")``, ``adapter`` for bottleneck adapters; all by
            default. The other arguments are those of ``transfer``.

    Raises:
        GraftError: as for ``transfer``.
    """
    settings = _settings(layers, method, "carry", max_tokens, seed, device, dtype)
    chosen = METHODS[method]
    if not chosen.needs_text:
        raise PlanError(f"{method} needs no alignment", where="--method", fix="call transfer without one")
    if out is not None:
        check_output(Path(out), force=force)
    shapes = [
        describe_config(load_config(str(name), role)) for name, role in ((teacher, "teacher"), (student, "student"))
    ]
    pairs = plan_alignment(shapes[0], shapes[1], layers=layers, roles=sites)
    samples = _peeked(read_text(text, columns, seed))
    clock = _Clock(progress)
    with clock("loading models"):
        first = load_model(str(teacher), device=device, dtype=dtype, role="teacher", tokenizer=True)
        second = load_model(str(student), device=device, dtype=dtype, role="student", tokenizer=True)
    found, _ = _align(first, second, samples, pairs, chosen, settings, clock, str(text), lenient=True)
    if out is not None:
        save_alignment(found, Path(out), force=force)
    return found


# ---- steps -----------------------------------------------------------------------------------------------------------


class _Clock:
    """Times the stages and reports them as progress."""

    def __init__(self, progress: Progress | None) -> None:
        self.progress = progress
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        if self.progress:
            self.progress(stage, 0, None)
        start = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - start, 3)


def _settings(
    layers: str, method: str | None, head: str, max_tokens: int, seed: int, device: str, dtype: str
) -> TransferSettings:
    for option, value, known in (
        ("--method", method, [None, *METHODS]),
        ("--head", head, get_args(HeadChoice)),
        ("--dtype", dtype, DTYPES),
    ):
        if value not in known:
            choices = ", ".join(str(name) for name in known if name is not None)
            raise PlanError("unknown choice", where=option, expected=choices, found=value)
    if max_tokens < 1:
        raise PlanError("must be positive", where="--max-tokens", found=max_tokens)
    check_device(device)
    return TransferSettings(
        layers=layers, method=method, head=head, max_tokens=max_tokens, seed=seed, device=device, dtype=dtype
    )


def _preflight(
    raw: RawCheckpoint, teacher: str, student: str, settings: TransferSettings, has_alignment: bool, has_text: bool
) -> None:
    """Plan on configurations alone, so that what cannot work fails before weights are loaded."""
    config_t, config_s = load_config(teacher, "teacher"), load_config(student, "student")
    shape_t, shape_s = describe_config(config_t), describe_config(config_s)
    blank = dict(blank_model(config_t, "base").state_dict())
    raw = _with_teacher_labels(raw, config_t)
    checkpoint = resolve(raw, shape_t, blank, with_head=settings.head == "carry")
    _check_labels(checkpoint, config_s)
    method = METHODS[settings.method or "copy"]
    plan = _plan(checkpoint, shape_t, shape_s, settings, method)
    if settings.method == "copy":
        copy_alignment(plan.pairs, "", "")
    elif not has_text and not has_alignment:
        sizes_differ = any(first != second for first, second in plan.pairs.values())
        if settings.method or sizes_differ:
            _refuse_without_text(settings.method or "prune-align")


def _check_labels(checkpoint: PeftCheckpoint, student: PretrainedConfig) -> None:
    head, own = checkpoint.head, own_labels(student)
    if head is None or not own:
        return
    if (head.labels and head.labels != own) or head.num_labels != len(own):
        raise HeadError(
            "the student has a head with other labels",
            where=str(student.name_or_path or student.model_type),
            expected=", ".join(head.labels) or f"{head.num_labels} labels",
            found=", ".join(own),
            fix="leave the module's head behind with --head drop, or give the student's base model",
        )


def _with_teacher_labels(raw: RawCheckpoint, teacher: PretrainedConfig) -> RawCheckpoint:
    """Label names from the teacher's configuration, for a head saved without them that they fit."""
    labels = own_labels(teacher)
    rows = {tensor.shape[0] for tensor in raw.head.values()}
    return replace(raw, labels=labels) if labels and not raw.labels and len(labels) in rows else raw


def _refuse_without_text(method: str) -> None:
    raise TextError(
        f"{method} aligns the two models on text, and none was given",
        where="--text",
        fix="name a text file or data set with --text, or a saved alignment with --alignment",
    )


def _plan(
    checkpoint: PeftCheckpoint, teacher: Architecture, student: Architecture, settings: TransferSettings, method: Method
) -> TransferPlan:
    head: HeadChoice = "carry" if settings.head == "carry" else "drop"
    return plan_transfer(checkpoint, teacher, student, layers=settings.layers, method=method, head=head)


def _peeked(samples: Iterator[Sample]) -> Iterator[Sample]:
    """The same samples, the first already read, so that a bad source fails before models are loaded."""
    first = next(samples)

    def chained() -> Iterator[Sample]:
        yield first
        yield from samples

    return chained()


def _transfer(
    raw: RawCheckpoint,
    teacher: ModelHandle,
    student: ModelHandle,
    settings: TransferSettings,
    samples: Iterator[Sample] | None,
    given: Alignment | None,
    clock: _Clock,
    *,
    module: str,
    text: str | None,
    alignment_name: str | None = None,
) -> Graft:
    raw = _with_teacher_labels(raw, teacher.base.config)
    checkpoint = resolve(raw, teacher.architecture, teacher.base_tensors(), with_head=settings.head == "carry")
    _check_labels(checkpoint, student.base.config)
    method, reason = _choose(checkpoint, teacher, student, settings, given)
    plan = _plan(checkpoint, teacher.architecture, student.architecture, settings, method)
    _check_pooler(plan, student)
    counts: PairingCounts | None = None
    if given is not None:
        _check_alignment(given, teacher, student)
        alignment = given
    elif not method.needs_text:
        alignment = copy_alignment(plan.pairs, teacher.fingerprint, student.fingerprint)
    else:
        if samples is None:
            _refuse_without_text(method.name)
            raise AssertionError
        alignment, counts = _align(teacher, student, samples, plan.pairs, method, settings, clock, text or "")
    with clock("projecting"):
        modules, sites = _graft_modules(checkpoint, plan, alignment, method)
        head, head_record = _graft_head(checkpoint, plan, alignment, student.architecture)
    report = GraftReport(
        module=module,
        module_files=dict(raw.files),
        module_format=raw.format,
        module_kind=raw.kind,
        teacher=_record(teacher),
        student=_record(student),
        settings=settings,
        method=method.name,
        method_reason=reason,
        text=text,
        alignment=alignment_name,
        layers=[list(sources) for sources in plan.layers],
        sites=sites,
        head=head_record,
        pairing=_pairing_record(counts) if counts else None,
        notes=list(plan.notes),
        seconds=clock.seconds,
        versions=versions(),
        hardware=hardware(settings.device),
    )
    return Graft(replace(checkpoint, modules=modules, head=head), report, alignment, student)


def _choose(
    checkpoint: PeftCheckpoint,
    teacher: ModelHandle,
    student: ModelHandle,
    settings: TransferSettings,
    given: Alignment | None,
) -> tuple[Method, str]:
    if given is not None:
        if settings.method not in (None, given.method):
            raise AlignmentError(
                "the alignment was made with another method",
                where="--method",
                expected=given.method,
                found=settings.method,
                fix="leave --method out, or align again",
            )
        return METHODS[given.method], "the method of the given alignment"
    if settings.method:
        return METHODS[settings.method], "asked for"
    plan = _plan(checkpoint, teacher.architecture, student.architecture, settings, METHODS["copy"])
    return choose_method(plan, embedding_similarity(teacher.base, student.base))


def _check_pooler(plan: TransferPlan, student: ModelHandle) -> None:
    pooled = Space(-1, POOLED_OUT)
    if any(pair[1] == pooled for pair in plan.pairs) and any("pooler" in name for name in student.missing):
        raise HeadError(
            "the head reads the pooler's output, and the student's checkpoint has no pooler",
            where=student.name,
            fix="leave the head behind with --head drop",
        )


def _check_alignment(alignment: Alignment, teacher: ModelHandle, student: ModelHandle) -> None:
    for role, model, expected in (("teacher", teacher, alignment.teacher), ("student", student, alignment.student)):
        if model.fingerprint != expected:
            raise AlignmentError(
                f"the alignment was made for another {role}",
                where=model.name,
                expected=f"weights with fingerprint {expected[:12]}",
                found=model.fingerprint[:12],
                fix="make one for these models with `peft-graft align`",
            )


def _align(
    teacher: ModelHandle,
    student: ModelHandle,
    samples: Iterator[Sample],
    pairs: dict[Pair, tuple[int, int]] | Any,
    method: Method,
    settings: TransferSettings,
    clock: _Clock,
    text: str,
    *,
    lenient: bool = False,
) -> tuple[Alignment, PairingCounts]:
    """Stream, check and solve; ``lenient`` leaves out spaces of samples that too few samples were seen for."""
    for model, role in ((teacher, "teacher"), (student, "student")):
        if model.tokenizer is None:
            raise PairingError("the model came without its tokenizer", where=role, fix="pass its fast tokenizer")
        check_tokenizer(model.tokenizer, model.name, role)
    with clock("pairing tokens"):
        statistics, counts = collect(
            teacher,
            student,
            samples,
            list(pairs),
            method.moments,
            CollectionSettings(max_tokens=settings.max_tokens),
            clock.progress,
        )
    if counts.nonfinite_pairs * 2 > counts.pairs:
        raise PairingError(
            "most activations are not finite", where=f"--dtype {settings.dtype}", fix="use --dtype float32 or bfloat16"
        )
    if lenient:
        few = [pair for pair, moments in statistics.items() if pair[0].layer < 0 and moments.count < max(pairs[pair])]
        statistics = {pair: moments for pair, moments in statistics.items() if pair not in few}
    check_pairs(statistics)
    with clock("solving alignments"):
        details = {
            "teacher": teacher.name,
            "student": student.name,
            "text": text,
            "settings": settings.model_dump(mode="json"),
            "pairing": asdict(counts),
            "versions": versions(),
            "hardware": hardware(settings.device),
        }
        found = solve_alignment(method, statistics, teacher.fingerprint, student.fingerprint, details)
    return found, counts


def _graft_modules(
    checkpoint: PeftCheckpoint, plan: TransferPlan, alignment: Alignment, method: Method
) -> tuple[dict[Site, Module], list[SiteRecord]]:
    modules: dict[Site, Module] = {}
    records: list[SiteRecord] = []
    for site in plan.sites:
        moved, maps = [], {}
        for source in site.teacher:
            module = checkpoint.modules[source]
            used = {
                axis: (Space(source.layer, name), Space(site.student.layer, name))
                for axis, name in ((axis, map_axis(method, module, axis)) for axis in _named_axes(module))
            }
            moved.append(project(module, lambda axis, used=used: alignment.map(used[axis])))  # type: ignore[misc]
            maps.update({pair: alignment.diagnostics.get(pair, {}) for pair in used.values()})
        module = average(moved)
        modules[site.student] = module.with_values(
            {name: tensor.values for name, tensor in module.tensors.items()}, site.student
        )
        records.append(_site_record(site, checkpoint, modules[site.student], maps))
    return modules, records


def _named_axes(module: Module) -> set[Axis]:
    return {axis for tensor in module.tensors.values() for axis in tensor.axes if axis is not None}


def _graft_head(
    checkpoint: PeftCheckpoint, plan: TransferPlan, alignment: Alignment, student: Architecture
) -> tuple[Any, HeadRecord | None]:
    if checkpoint.head is None or not plan.head:
        return None, None
    space = Space(-1, checkpoint.head.reads)
    moved = project(checkpoint.head, lambda axis: alignment.map((space, space)))
    head_form(moved, checkpoint.raw, student)
    moved, dropped = resize_inner_layer(moved, student.size(space))
    return moved, HeadRecord(
        task=moved.task,
        reads=moved.reads,
        labels=list(moved.labels) or [f"LABEL_{index}" for index in range(moved.num_labels)],
        dropped_inner_units=dropped,
        diagnostics=alignment.diagnostics.get((space, space), {}),
    )


def _write_labels(folder: Path, config: PretrainedConfig, labels: tuple[str, ...]) -> None:
    """Label names beside the module, which peft does not store: the student's configuration as its users need it."""
    named = copy.deepcopy(config)
    set_labels(named, labels)
    named.save_pretrained(folder)


def _norm(module: Module) -> float:
    if isinstance(module, LoraModule):
        return float(module.delta().norm())
    up, down = (module.tensors[name].values.double() for name in ("up.weight", "down.weight"))
    return float((up @ down).norm())


def _site_record(
    site: SitePlan, checkpoint: PeftCheckpoint, module: Module, maps: dict[Pair, dict[str, float]]
) -> SiteRecord:
    before = sum(_norm(checkpoint.modules[source]) for source in site.teacher) / len(site.teacher)
    return SiteRecord(
        site=str(site.student),
        teacher_sites=[str(source) for source in site.teacher],
        norm_kept=_norm(module) / before if before else 0.0,
        maps=[
            MapRecord(space=str(second), teacher_space=str(first), diagnostics=diagnostics)
            for (first, second), diagnostics in maps.items()
        ],
    )


def _record(model: ModelHandle) -> ModelRecord:
    architecture = model.architecture
    return ModelRecord(
        name=model.name,
        model_type=architecture.model_type,
        num_layers=architecture.num_layers,
        hidden_size=int(model.base.config.hidden_size),
        inferred_architecture=architecture.inferred,
        fingerprint=model.fingerprint,
    )


def _pairing_record(counts: PairingCounts) -> PairingRecord:
    return PairingRecord(
        samples=counts.samples,
        pairs=counts.pairs,
        one_to_one=counts.one_to_one,
        teacher_tokens=counts.teacher_tokens,
        student_tokens=counts.student_tokens,
        teacher_share_paired=counts.paired_teacher_tokens / max(1, counts.teacher_tokens),
        student_share_paired=counts.paired_student_tokens / max(1, counts.student_tokens),
        nonfinite_pairs=counts.nonfinite_pairs,
    )
