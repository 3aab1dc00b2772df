"""What a transfer would do and what it would cost, known from its plan before any weights are loaded."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from peft_graft.alignment.collect import PAIRING
from peft_graft.alignment.layout import memory_of_a_pass
from peft_graft.alignment.methods import Method
from peft_graft.config import AUTO, MAX_TOKENS, GraftConfig
from peft_graft.distill.ask_documents import LOOKED_AT
from peft_graft.distill.ask_prompts import Asking
from peft_graft.distill.ask_seeds import STAGE as MAKING
from peft_graft.distill.ask_seeds import listing_of
from peft_graft.distill.candidates import FITTING
from peft_graft.distill.completions import PromptDistillation
from peft_graft.distill.distillation import ASKING
from peft_graft.distill.fit_head import PENALTIES, STEPS
from peft_graft.distill.fit_layers import SAMPLES
from peft_graft.distill.fit_layers import STAGE as FITTING_LAYERS
from peft_graft.distill.generate import Answer
from peft_graft.distill.polish import STAGE as POLISHING
from peft_graft.distill.teacher import FIT, POOL
from peft_graft.errors import GraftError
from peft_graft.material import DocumentMaterial, PromptMaterial, TextMaterial
from peft_graft.models.loading import ModelHandle
from peft_graft.models.spaces import TOKENS_OUT
from peft_graft.move import Move
from peft_graft.planning.method_choice import same_sizes
from peft_graft.planning.plan import Plan
from peft_graft.planning.sources import ModelLike, ModelSources, described
from peft_graft.prompts.seeds import Seeds
from peft_graft.record import Record

#: Prompts whose answers are paired for an outlook, and values that a layer keeps for the backward pass, in widths.
_PAIRED, _STORED = 200, 24
#: Tokens that are written for each one of a prompt that is made: half of them are dropped, at a guess.
_WRITTEN = 2
#: Texts in a step of learning from them.
_BATCH = PromptDistillation.batch_size


class PromptOutlook(Record):
    """Prompts that the teacher would answer.

    ``prompt_tokens``, ``answer_tokens``: of the student, on average; the latter from the answers that came with the
    prompts, else a quarter of the longest. ``strict_share``, ``strict_digits``: of the positions of such answers, and
    of those with digits, where the models' distributions can be compared; None where there are none.
    ``made_from``: examples that the prompts would be made from. ``made_by``: ``chat``, where the teacher's base is
    asked for more through its chat template, or ``list``, where it goes on with a list; None where prompts are given.
    """

    prompts: int
    too_long: int
    duplicates: int
    prompt_tokens: float
    answer_tokens: float
    strict_share: float | None
    strict_digits: float | None
    made_from: int | None = None
    made_by: Literal["chat", "list"] | None = None


class DocumentOutlook(Record):
    """Plain text on which the student would learn what the teacher says next.

    ``documents``: that are learned from. ``held_out``: that choose or judge. Of the first ``looked_at`` of all:
    ``cut``, that are longer than ``longest`` tokens; ``too_short``, of a single token; ``tokens``, of the student in
    each on average; ``strict_share``, ``strict_digits`` as in ``PromptOutlook``.
    """

    documents: int
    held_out: int
    looked_at: int
    cut: int
    longest: int
    too_short: int
    tokens: float
    strict_share: float
    strict_digits: float | None


class StudentSummary(Record):
    """What a transfer to a student would do, or why it cannot.

    ``method``: the methods that would be tried. ``needs_text``: whether it cannot be done without text; None where that
    depends on the models' weights. ``statistics_mib``: memory of the statistics that these methods gather; ``passes``:
    over the text, so that they fit in this machine's memory; ``products_per_token``: multiply-adds for them;
    ``forwards_per_token``: those of both models' forward passes; ``weights_mib``: memory of both models in float32;
    ``least_seconds``: what the multiply-adds of ``max_tokens`` tokens take at the rate of a matrix product here; where
    there is text, those of its ``text_tokens`` and of ``polish_steps`` of learning from it; of prompts, those of all
    their answers and of learning from them; of documents, those of reading and of learning from them.
    ``stage_seconds``: what of these each stage takes that grows with the text; ``stage_rounds``: how often one begins
    that comes in rounds. ``training_mib``: memory of learning, about.
    """

    name: str
    model_type: str | None = None
    num_layers: int | None = None
    layers: list[list[int]] | dict[str, list[list[int]]] = []
    modules: int = 0
    spaces: int = 0
    same_sizes: bool | None = None
    method: str | None = None
    needs_text: bool | None = None
    max_tokens: int = MAX_TOKENS
    statistics_mib: float = 0.0
    passes: int = 1
    products_per_token: int = 0
    forwards_per_token: int = 0
    weights_mib: float = 0.0
    least_seconds: float = 0.0
    stage_seconds: dict[str, float] = {}
    stage_rounds: dict[str, int] = {}
    text_tokens: int | None = None
    polish_steps: int | None = None
    prompts: PromptOutlook | None = None
    documents: DocumentOutlook | None = None
    training_mib: float | None = None
    head: bool = False
    notes: list[str] = []
    problem: str | None = None


def unplanned(student: ModelLike, config: GraftConfig, problem: str) -> StudentSummary:
    """Why a module cannot be moved to a student, which is described as far as it can be."""
    known = StudentSummary(name=_name(student), max_tokens=config.max_tokens, problem=problem)
    try:
        architecture = described(student, config, "student").architecture
    except GraftError:
        return known
    return known.model_copy(update={"model_type": architecture.model_type, "num_layers": architecture.num_layers})


def _name(model: ModelLike) -> str:
    return str(model) if isinstance(model, str | Path) else type(model).__name__


def outlook(move: Move) -> StudentSummary:
    """What a planned transfer would do; plain text and prompts are those that it was planned with."""
    plan, material = move.plan, move.material
    architecture = plan.models.student.architecture
    found = StudentSummary(
        name=_name(move.sources.student),
        max_tokens=plan.config.max_tokens,
        model_type=architecture.model_type,
        num_layers=architecture.num_layers,
    )
    known = _outlook(plan)
    if isinstance(material, PromptMaterial):
        asked = _prompts_for(material, plan)
        known |= {"prompts": asked, **_cost_of_prompts(plan, asked)}
    elif isinstance(material, DocumentMaterial):
        known |= _documents_for(material, plan)
    elif material.samples:
        known |= _cost_of_text(plan, material, move.sources)
    known["notes"] = [*plan.sites.notes, *material.remarks, *move.unknown_tokens(plan.models)]
    if isinstance(material, TextMaterial) and material.source is not None and not material.asked:
        known["method"] = _uncompared(plan)
    return found.model_copy(update=known)


def _prompts_for(material: PromptMaterial, plan: Plan) -> PromptOutlook:
    """What is known of prompts before any answer; of the answers that came with them, if any, how they pair."""
    source, asking = material.source, material.asking
    if isinstance(source, Seeds):
        return _made_prompts_for(source, asking, plan)
    assert material.fitting is not None
    fitting = material.fitting.held_out + material.fitting.learning
    answered = [(prompt, Answer(prompt.answer, ended=True)) for prompt in fitting if prompt.answer][:_PAIRED]
    shares = asking.templates.encoded(answered).shares
    lengths = [len(asking.templates.student.ids(prompt)) for prompt in fitting[:_PAIRED]]
    answer = shares.tokens / len(answered) if answered else asking.sampling.max_new_tokens / 4
    return PromptOutlook(
        prompts=len(fitting),
        too_long=len(material.prompts) - len(fitting),
        duplicates=source.dropped_duplicates,
        prompt_tokens=round(sum(lengths) / len(lengths), 1),
        answer_tokens=round(answer, 1),
        strict_share=shares.share if answered else None,
        strict_digits=shares.digit_share,
    )


def _made_prompts_for(seeds: Seeds, asking: Asking, plan: Plan) -> PromptOutlook:
    """What is known of prompts before they are made: the examples stand for them."""
    listing = listing_of(seeds, asking, plan.models, plan.config)
    lengths = [len(asking.templates.student.ids(prompt)) for prompt in seeds.prompts]
    return PromptOutlook(
        prompts=plan.config.prompts_to_make,
        too_long=0,
        duplicates=0,
        prompt_tokens=round(sum(lengths) / len(lengths), 1),
        answer_tokens=round(asking.sampling.max_new_tokens / 4, 1),
        strict_share=None,
        strict_digits=None,
        made_from=len(seeds.texts),
        made_by="chat" if listing.chat else "list",
    )


def _cost_of_prompts(plan: Plan, asked: PromptOutlook) -> dict[str, object]:
    """Multiply-adds and memory: every answer generated, read once, and learned from in some passes."""
    tokens = asked.prompt_tokens + asked.answer_tokens
    written = _WRITTEN * asked.prompt_tokens if asked.made_from else 0
    by_teacher = {MAKING: asked.prompts * written, ASKING: asked.prompts * 2 * tokens}
    return _cost_of_learning(plan, by_teacher, plan.config.polish_steps_on(asked.prompts, _BATCH), tokens)


def _documents_for(material: DocumentMaterial, plan: Plan) -> dict[str, object]:
    """What is known of documents, and what it costs to learn from them: each is read by the teacher with its module."""
    asking, parts = material.asking, material.parts
    looked_at = [*parts.held_out, *parts.learning][:LOOKED_AT]
    read = asking.read(looked_at)
    shares = asking.shares(read)
    found = DocumentOutlook(
        documents=material.learned(plan),
        held_out=len(parts.held_out),
        looked_at=len(looked_at),
        cut=read.cut,
        longest=asking.longest,
        too_short=read.too_short,
        tokens=round(shares.tokens / max(1, len(read.answers)), 1),
        strict_share=shares.share,
        strict_digits=shares.digit_share,
    )
    steps = material.polishing(plan.config).steps
    tokens = (found.documents + found.held_out) * found.tokens
    aligned = min(plan.config.max_tokens, tokens) * _products(plan, plan.methods)
    return {
        "documents": found,
        "text_tokens": round(tokens),
        "polish_steps": steps,
        **_cost_of_learning(plan, {ASKING: tokens}, steps, found.tokens, aligned),
    }


def _cost_of_learning(
    plan: Plan, by_teacher: Mapping[str, float], steps: int, tokens: float, aligned: float = 0.0
) -> dict[str, object]:
    """Multiply-adds and memory of asking the teacher and of learning from what it says.

    Args:
        by_teacher: tokens that the teacher reads and writes, by stage.
        tokens: of one of the texts that are learned from.
        aligned: multiply-adds of aligning the models.
    """
    (teacher, _), (student, size) = _costs(plan.models.teacher), _costs(plan.models.student)
    # Backward passes take another product for every one of the forward pass; the modules' own are small.
    operations = {stage: count * teacher for stage, count in by_teacher.items()}
    operations |= {PAIRING: aligned, POLISHING: 2 * steps * _BATCH * tokens * student}
    hidden = plan.models.student.architecture.hidden_size
    layers = plan.models.student.architecture.num_layers
    activations = 4 * _BATCH * tokens * hidden * layers * _STORED
    return {
        **_times(operations, 1),
        "training_mib": round((size + activations) / 2**20, 1),
    }


def _cost_of_text(plan: Plan, material: TextMaterial, sources: ModelSources) -> dict[str, object]:
    """Multiply-adds of this text: what is aligned on, what the teacher is asked, and what is fitted and polished."""
    tokenizer, samples = sources.tokenizer_pair()[1], material.samples
    first = samples[:_PAIRED]
    length = sum(len(tokenizer(*sample.texts)["input_ids"]) for sample in first) / len(first)
    tokens = plan.config.max_tokens if len(samples) >= POOL // 2 else round(len(samples) * length)
    tokens = min(tokens, plan.config.max_tokens)
    settings = material.polishing(plan.config)
    (teacher, _), (student, _) = _costs(plan.models.teacher), _costs(plan.models.student)
    polished = settings.steps * settings.batch_size
    fits = _cost_of_fits(plan, material, length, polished) if material.asked else {}
    # In the order in which they begin. Backward passes take another product for every one of the forward pass.
    operations: dict[str, float] = {
        ASKING: fits.pop(ASKING, 0.0),
        PAIRING: tokens * (teacher + student + _products(plan, plan.methods)),
        **fits,
        POLISHING: 2 * polished * length * student,
    }
    return {
        "text_tokens": tokens,
        "polish_steps": settings.steps,
        "stage_rounds": {FITTING: 2 * len(plan.methods)} if FITTING in fits else {},
        **_times(operations, 3),
    }


def _cost_of_fits(plan: Plan, material: TextMaterial, length: float, polished: int) -> dict[str, float]:
    """Multiply-adds of asking the teacher and of every method's modules: measured, their head fitted, their layers.

    Args:
        length: tokens of a sample. polished: samples that the polish sees.
    """
    (teacher, _), (student, _) = _costs(plan.models.teacher), _costs(plan.models.student)
    parts, head = material.parts, plan.moved.head
    by_layers = sum(method.fits_layers for method in plan.methods)
    fitted = plan.may_fit_head
    learned = min(len(parts.learning), max(FIT * fitted, SAMPLES * bool(by_layers), polished))
    asked = (len(parts.held_out) + learned) * length * teacher
    read = len(parts.judging) + len(parts.choosing) * (1 + fitted)
    fit = 0.0
    if head is not None and fitted:
        rows = min(learned, FIT)
        read += rows
        answers = rows * (length if head.reads == TOKENS_OUT else 1)
        width = plan.models.student.architecture.hidden_size
        # Every penalty on a part of the answers and the best on all, with a product for the loss and one for its slope.
        fit = 2 * (len(PENALTIES) + 1) * STEPS * answers * width * head.num_labels
    layers = plan.models.student.architecture.num_layers
    sites = min(len(parts.learning), SAMPLES) * length * (2 * teacher + student * (1 + layers / 2))
    found = {
        ASKING: asked,
        FITTING: len(plan.methods) * (read * length * student + fit),
        FITTING_LAYERS: by_layers * sites,
    }
    return {stage: count for stage, count in found.items() if count}


def _times(operations: Mapping[str, float], digits: int) -> dict[str, object]:
    """What the multiply-adds of every stage take at the least, and all of them."""
    seconds = {stage: count / _products_per_second() for stage, count in operations.items() if count}
    return {"least_seconds": round(sum(seconds.values()), digits), "stage_seconds": seconds}


def _outlook(plan: Plan) -> dict[str, object]:
    """What the plan would do, and what it costs at least."""
    found: dict[str, object] = {
        "layers": plan.sites.recorded_layers,
        "modules": len(plan.sites.sites),
        "spaces": len(plan.sites.pairs),
        "same_sizes": same_sizes(plan.sites),
        "head": plan.sites.head,
        "notes": list(plan.sites.notes),
        "method": _methods(plan),
        "needs_text": _needs_text(plan),
    }
    reads_text = all(model.architecture.row.reads_text for model in (plan.models.teacher, plan.models.student))
    if not reads_text:
        return found | {"method": "copy", "needs_text": False}
    products = _products(plan, plan.methods)
    costs = _costs(plan.models.teacher), _costs(plan.models.student)
    forwards = sum(operations for operations, _ in costs)
    operations = plan.config.max_tokens * (forwards + products)
    return found | {
        "statistics_mib": round(2 * products * 8 / 2**20, 1),
        "passes": 1 + 2 * products // max(1, memory_of_a_pass(torch.device("cpu"))),
        "products_per_token": products,
        "forwards_per_token": forwards,
        "weights_mib": round(sum(size for _, size in costs) / 2**20, 1),
        "least_seconds": round(operations / _products_per_second(), 3),
    }


def _methods(plan: Plan) -> str:
    names = ", ".join(method.name for method in plan.methods)
    if plan.config.method != AUTO:
        return names
    if plan.speaks:
        what = "the teacher's answers are learned" if plan.has_prompts else "what the teacher says next is learned"
        return f"the best of {names} to begin with, then {what}"
    if plan.has_text:
        return f"the best of {names}, by agreement with the teacher on held-out text"
    without = "; else copy, if the student shares the teacher's word embeddings" if same_sizes(plan.sites) else ""
    return f"the best of {names} by agreement with the teacher, given text{without}"


def _uncompared(plan: Plan) -> str:
    """The method where the teacher is not asked, so that there is nothing to compare methods by."""
    if plan.config.method != AUTO or plan.speaks:
        return _methods(plan)
    kept = "copy, if the student shares the teacher's word embeddings, else " if same_sizes(plan.sites) else ""
    return f"{kept}prune-align, since methods are compared by the teacher's answers alone"


def _needs_text(plan: Plan) -> bool | None:
    if plan.config.method != AUTO:
        return plan.methods[0].needs_text
    return None if same_sizes(plan.sites) else True


def _products(plan: Plan, methods: Iterable[Method]) -> int:
    """Multiply-adds for each token of the moments that the methods need."""
    moments = {moment for method in methods for moment in method.moments if method.needs_text}
    sizes = {"cross": lambda t, s: t * s, "teacher": lambda t, s: t * t, "student": lambda t, s: s * s}
    return sum(sizes[moment](*pair) for moment in moments for pair in plan.sites.pairs.values())


def _costs(model: ModelHandle) -> tuple[int, int]:
    """Multiply-adds of a forward pass for each token, attention's own aside, and bytes of float32 weights."""
    words = {id(module.weight) for module in model.base.modules() if isinstance(module, nn.Embedding)}
    sizes = [(value.numel(), value.ndim > 1 and id(value) not in words) for value in model.base.parameters()]
    return sum(size for size, multiplies in sizes if multiplies), 4 * sum(size for size, _ in sizes)


@cache
def _products_per_second() -> float:
    """Multiply-adds a second of a float32 matrix product on this machine's processor, measured in some 0.1 seconds."""
    size = 768
    first = torch.rand(size, size)
    first @ first
    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < 0.1:
        first @ first
        count += 1
    return count * size**3 / (time.perf_counter() - begin)
