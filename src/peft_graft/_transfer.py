"""The one verb: transfer a module to a student; the result is a ``Graft``."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from peft_graft._align import Aligner, check_tokenizers, directions_of_modules, peeked
from peft_graft.alignment.alignment import Alignment
from peft_graft.alignment.cache import AlignmentCache, cache_folder
from peft_graft.alignment.methods import AUTO, METHODS, Method
from peft_graft.alignment.storage import load_alignment
from peft_graft.alignment.text import Sample, as_samples, read_text
from peft_graft.alignment.vocabulary import Vocabularies
from peft_graft.checkpoints.attach import library_version
from peft_graft.checkpoints.convert import as_lora, stand_in
from peft_graft.checkpoints.library import in_library
from peft_graft.checkpoints.raw import RawCheckpoint
from peft_graft.checkpoints.read import locate, read_checkpoint
from peft_graft.checkpoints.resolve import PeftCheckpoint, resolve
from peft_graft.distill.agreement import judge
from peft_graft.distill.choose import (
    EXACT,
    FIT,
    LEAST_HELD_OUT,
    TOKENS,
    Candidate,
    Outcome,
    best_graft,
    held_out_size,
    open_classroom,
    polished,
)
from peft_graft.distill.fit_layers import fit_modules
from peft_graft.distill.polish import PolishSettings
from peft_graft.environment import hardware, versions
from peft_graft.errors import AlignmentError, DependencyError, ModelError, TextError
from peft_graft.files import check_output
from peft_graft.graft import Graft, graft_head, graft_modules, model_record, pairing_record, refitted_records
from peft_graft.models.loading import ModelHandle, embedding_similarity, handle, load_config, load_model, load_tokenizer
from peft_graft.models.spaces import VOCABULARY, Space
from peft_graft.models.spec import expert_of
from peft_graft.options import MAX_TOKENS, POLISH, UNFINISHED, HeadChoice, Progress
from peft_graft.planning.checks import (
    check_labels,
    check_pooler,
    check_reading,
    learner,
    needs_predictions,
    no_predictions,
    planned,
    preflight,
    with_teacher_labels,
)
from peft_graft.planning.correspondence import ExpertMap
from peft_graft.planning.experts import SAMPLES, match_experts, matched_experts
from peft_graft.planning.plan import choose_method
from peft_graft.planning.sites import at_sites
from peft_graft.report import GraftReport
from peft_graft.settings import Clock, TransferSettings, checked_settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Mean cosine of word embeddings from which on vocabularies are taken for the same one.
_SAME = 0.5
#: Samples that are looked at beyond the alignment: to judge, fit and polish.
_POOL = 20_000
TextLike = Iterable[str | tuple[str, str] | Sequence[str] | Sample]


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
    max_tokens: int = MAX_TOKENS,
    alignment: str | Path | Alignment | None = None,
    head: HeadChoice = "auto",
    polish: int | None = None,
    sites: Sequence[str] | None = None,
    library: str | None = None,
    seed: int = 0,
    device: str = "cpu",
    student_device: str | None = None,
    dtype: str = "float32",
    cache: bool | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Graft:
    """Move a trained module to another model, everything given by name or path.

    Args:
        module: folder or hub id of a PEFT or AdapterHub checkpoint.
        student: folder or hub id of the model that receives the module.
        out: folder to write; nothing is written without it.
        teacher: the model that the module was trained on; the one that its configuration names by default.
        layers: ``skip``, ``avg``, or one teacher layer for each student layer, ``"0,2,4"``; see ``TransferSettings``.
        method: a key of ``METHODS``; when None the one whose graft agrees best with the teacher on held-out text.
        text: unlabelled text (``text.read_text``) to align, fit, polish and judge on, with ``columns``; ``max_tokens``
            limits what the alignment sees.
        alignment: a saved alignment of the two models, or a live one; no text is needed then.
        head, polish, sites, library, seed, device, student_device, dtype: see ``TransferSettings``.
        cache: keep alignments and use kept ones (``caching``); when None, where PEFT_GRAFT_CACHE names a folder.
        force: replace ``out`` if it exists.
        progress: called as (stage, done, total).

    Returns:
        The graft, also when it was not written.

    Raises:
        GraftError: one of its kinds, naming the site or option, what was expected, what came and the fix. All that
            can be known without weights is checked before any weights are loaded.
    """
    settings = checked_settings(layers, method, head, max_tokens, seed, device, dtype, polish, sites, library,
                                student_device)  # fmt: skip
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
    converting = raw.needs_conversion
    planned_raw = stand_in(raw, load_config(teacher_name, "teacher")) if converting else raw
    preflight(planned_raw, teacher_name, str(student), settings, given is not None, text is not None)
    samples = read_text(text, columns, seed) if text is not None else None
    if samples is not None:
        samples = peeked(samples)
    clock = Clock(progress)
    with clock("loading models"):
        needs_tokens = text is not None or raw.trains_tokens
        teacher_model = load_model(teacher_name, device=device, dtype=dtype, role="teacher", tokenizer=needs_tokens)
        student_model = load_model(
            str(student), device=student_device or device, dtype=dtype, role="student", tokenizer=needs_tokens
        )
    if converting:
        with clock("converting to LoRA"):
            raw = as_lora(raw, teacher_model)
    own_tokens = raw.trains_tokens and (folder / "tokenizer_config.json").is_file()
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
        work=Path(f"{out}{UNFINISHED}") if out is not None else None,
        cache=AlignmentCache.of(cache_folder(cache), text, columns, seed),
        tokens=load_tokenizer(str(folder), "module") if own_tokens else None,
    )
    if out is None:
        return graft
    with clock("writing and verifying"):
        graft = graft.save(out, force=force)
    shutil.rmtree(f"{out}{UNFINISHED}", ignore_errors=True)
    return graft


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
    max_tokens: int = MAX_TOKENS,
    alignment: Alignment | None = None,
    head: HeadChoice = "auto",
    polish: int | None = None,
    sites: Sequence[str] | None = None,
    library: str | None = None,
    seed: int = 0,
    dtype: str | None = None,
    progress: Progress | None = None,
) -> Graft:
    """Move a module between live models; ``transfer`` is the same by name or path.

    Args:
        checkpoint: from ``read_checkpoint(folder)``.
        teacher, student: models of transformers without modules inside, bare or with a task head; forward passes
            run where and in what precision they are.
        teacher_tokenizer, student_tokenizer: fast tokenizers, for methods that need text and modules that train tokens;
            the teacher's with the tokens that were added for the module.
        text: strings, pairs of strings (tuples) or lists of tokens; streamed.
        layers, method, max_tokens, alignment, head, polish, sites, library, seed, progress: as for ``transfer``.
        dtype: of the forward passes that fit, polish and judge; that of the student's weights when None.
    """
    device = str(next(student.parameters()).device)
    dtype = dtype or str(next(student.parameters()).dtype).removeprefix("torch.")
    settings = checked_settings(layers, method, head, max_tokens, seed, device, dtype, polish, sites, library)
    return _transfer(
        checkpoint,
        handle(teacher, teacher_tokenizer, ""),
        handle(student, student_tokenizer, ""),
        settings,
        as_samples(text) if text is not None else None,
        alignment,
        Clock(progress),
        module=checkpoint.name,
        text="given in memory" if text is not None else None,
    )


def _transfer(
    raw: RawCheckpoint,
    teacher: ModelHandle,
    student: ModelHandle,
    settings: TransferSettings,
    samples: Iterator[Sample] | None,
    given: Alignment | None,
    clock: Clock,
    *,
    module: str,
    text: str | None,
    alignment_name: str | None = None,
    work: Path | None = None,
    cache: AlignmentCache | None = None,
    tokens: PreTrainedTokenizerBase | None = None,
) -> Graft:
    raw = with_teacher_labels(raw, teacher.base.config)
    own = teacher.base_tensors(output=raw.trains_output)
    whole = resolve(raw, teacher.architecture, own, with_head=settings.head != "drop")
    check_labels(whole, student.base.config)
    part = at_sites(whole, settings.sites, teacher.architecture, teacher.base.config)
    checkpoint = in_library(part, settings.library)
    check_reading(teacher.architecture, student.architecture, settings, samples is not None)
    methods, reason = _methods(checkpoint, teacher, student, settings, given, has_text=samples is not None)
    pool = list(islice(samples, _POOL)) if samples is not None else []
    experts = _experts(checkpoint, teacher, student, settings, given, methods, pool)
    plan = planned(checkpoint, teacher.architecture, student.architecture, settings, methods[0], experts)
    check_pooler(plan, student)
    asked, notes = _can_learn(whole, pool, settings)
    vocabularies = _vocabularies(teacher, student, tokens) if raw.trains_tokens else Vocabularies(None, None, 0)
    notes += [note for module in checkpoint.modules.values() if (note := vocabularies.left_out(module))]
    pairs = dict(plan.pairs)
    if asked and checkpoint.head is None:
        pairs[TOKENS, TOKENS] = (teacher.architecture.size(TOKENS), student.architecture.size(TOKENS))
    judging = held_out_size(len(pool)) if asked else 0
    fitting_text = chain(pool[judging:], samples or ())
    maps_of = {method.name: METHODS["prune-align"] if method.fits_shifts else method for method in methods}
    aligner = Aligner(
        teacher,
        student,
        pairs,
        list(dict.fromkeys(maps_of.values())),
        fitting_text if pool else None,
        given,
        settings,
        clock,
        text,
        directions_of_modules(
            checkpoint.modules.values(),
            methods[0],
            head=checkpoint.head.reads if checkpoint.head else None,
            shifts=checkpoint.head is None,
        ),
        work=work,
        cache=cache.skipping(judging) if cache else None,
    )

    def candidate(method: Method) -> Candidate:
        alignment = aligner.alignment(maps_of[method.name])
        with clock("projecting"):
            modules, sites = graft_modules(checkpoint, plan, alignment, method, vocabularies)
            head, head_record = graft_head(checkpoint, plan, alignment, student.architecture)
        moved = replace(checkpoint, modules=modules, head=head)
        if method.fits_shifts:
            with clock("fitting layers"):
                fitted = fit_modules(
                    moved, plan, teacher, room.adapted, student, room.live, room.samples, clock.progress
                )  # fmt: skip
            moved = replace(moved, modules=fitted)
            sites = refitted_records(sites, checkpoint, fitted)
        return Candidate(method.name, alignment, moved, sites, head_record)

    steps = 0
    if asked:
        check_tokenizers(teacher, student)
        steps = settings.polish if settings.polish is not None else (0 if settings.method else POLISH)
        polishing = PolishSettings(steps=steps, seed=settings.seed)
        room = open_classroom(
            whole, teacher, student, pool,
            lessons=max(FIT if settings.head in ("auto", "fit") else 0, steps * polishing.batch_size),
            write=None if checkpoint.head else aligner.alignment(_writer(maps_of)),
            bf16=settings.dtype == "bfloat16", clock=clock,
        )  # fmt: skip
        outcome = best_graft(room, [partial(candidate, method) for method in methods], settings.head, clock)
        if len(methods) > 1:
            reason = "its graft agrees best with the teacher on held-out text"
        measured = outcome.verdict.measured
        if steps and measured and measured.divergence > EXACT:
            identity = f"{teacher.fingerprint}{student.fingerprint}{dict(raw.files)}{settings}{text}{len(pool)}"
            outcome = polished(room, outcome, polishing, work=work, identity=identity, clock=clock)
        elif steps:
            notes.append("not polished: the graft computes what the teacher does")
    else:
        found = candidate(methods[0])
        outcome = Outcome(found, "carried" if found.head else None, judge(None), {}, {})
    chosen = outcome.candidate
    report = GraftReport(
        module=module,
        module_files=dict(raw.files),
        module_library=raw.library,
        module_kind=raw.kind,
        teacher=model_record(teacher),
        student=model_record(student),
        settings=settings,
        method=chosen.method,
        method_reason=reason,
        text=text,
        alignment=alignment_name,
        layers=plan.recorded_layers,
        sites=chosen.sites,
        head=chosen.head.model_copy(update={"how": outcome.head, "fit": outcome.fit}) if chosen.head else None,
        pairing=pairing_record(aligner.counts) if aligner.counts else None,
        verdict=outcome.verdict,
        tried=outcome.tried,
        polish=outcome.polish,
        notes=[*plan.notes, *notes],
        seconds=clock.seconds,
        versions=versions(),
        hardware=hardware(settings.device),
    )
    return Graft(chosen.checkpoint, report, chosen.alignment, student)


def _vocabularies(teacher: ModelHandle, student: ModelHandle, tokens: PreTrainedTokenizerBase | None) -> Vocabularies:
    """Which tokens are the same: as tokenizers say, or by number where the models' embeddings agree row by row."""
    similarity = embedding_similarity(teacher.base, student.base)
    return Vocabularies(
        tokens or teacher.tokenizer,
        student.tokenizer,
        student.architecture.sizes.get(Space(-1, VOCABULARY), 0),
        same=similarity is not None and similarity > _SAME,
    )


def _writer(maps_of: Mapping[str, Method]) -> Method:
    """The method whose map of the last hidden state says where the teacher's shift of it points in the student."""
    return maps_of.get("ridge") or next(iter(maps_of.values()))


def _can_learn(
    checkpoint: PeftCheckpoint, pool: Sequence[Sample], settings: TransferSettings
) -> tuple[bool, list[str]]:
    """Whether the teacher can be asked about the text, and remarks if not.

    Raises:
        DependencyError: what was asked for needs the teacher's answers, and its module's library is not installed.
        TextError: ... and there is no text, or too little.
    """
    needed = needs_predictions(settings)
    if not pool:
        if needed:
            raise no_predictions(settings)
        return False, []
    library = checkpoint.raw.library
    if library_version(library) is None:
        if needed:
            raise DependencyError(
                f"{library} is not installed, so the teacher cannot be asked",
                where=learner(settings),
                fix="pip install 'peft-graft[adapters]'",
            )
        return False, [f"neither fitted nor judged: {library} is not installed, so the teacher could not be asked"]
    if held_out_size(len(pool)) < LEAST_HELD_OUT:
        if needed:
            raise TextError(
                "too few samples to learn from and be judged by",
                where="--text",
                expected=f"at least {LEAST_HELD_OUT * 5}",
                found=len(pool),
            )
        return False, [f"neither fitted nor judged: {len(pool)} samples of text are too few"]
    return True, []


def _experts(
    checkpoint: PeftCheckpoint,
    teacher: ModelHandle,
    student: ModelHandle,
    settings: TransferSettings,
    given: Alignment | None,
    methods: Sequence[Method],
    pool: Sequence[Sample],
) -> ExpertMap | None:
    """Which experts correspond, where the module acts in some: as the alignment says, or the text; None for copy."""
    if not any(expert_of(role) is not None for role in checkpoint.roles):
        return None
    if given is not None:
        return matched_experts(given.maps, student.architecture)
    if pool and any(method.needs_text for method in methods):
        return match_experts(teacher, student, pool[held_out_size(len(pool)) :][:SAMPLES], settings.layers)
    return None


def _methods(
    checkpoint: PeftCheckpoint,
    teacher: ModelHandle,
    student: ModelHandle,
    settings: TransferSettings,
    given: Alignment | None,
    *,
    has_text: bool,
) -> tuple[list[Method], str]:
    """The methods to try, and why."""
    if given is not None:
        wanted = METHODS[settings.method] if settings.method else None
        if wanted and wanted.name != given.method and not (wanted.fits_shifts and given.method == "prune-align"):
            raise AlignmentError(
                "the alignment was made with another method",
                where="--method",
                expected=given.method,
                found=settings.method,
                fix="leave --method out, or align again",
            )
        if wanted is None:
            return [METHODS[given.method]], "the method of the given alignment"
    if settings.method:
        return [METHODS[settings.method]], "asked for"
    plan = planned(checkpoint, teacher.architecture, student.architecture, settings, METHODS["copy"])
    first, reason = choose_method(plan, embedding_similarity(teacher.base, student.base))
    if not has_text:
        return [first], reason
    others = [METHODS[name] for name in AUTO if name != "copy"]
    return ([first] if not first.needs_text else []) + others, reason
