"""What the verbs read, write and learn from, and what that costs in operations, memory, traffic and seconds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from shapes import Batch, Shape, Step, described, parameters_of, whole_step

from peft_graft.alignment.layout import _SHARE, SAMPLE_SPACES
from peft_graft.alignment.methods import METHODS, automatic_methods
from peft_graft.config import GraftConfig
from peft_graft.distill.ask_prompts import HELD_OUT
from peft_graft.distill.completions import BATCH, CompletionDistillation
from peft_graft.distill.cost import _TIMES
from peft_graft.distill.distillation import READ
from peft_graft.distill.fit_layers import SAMPLES
from peft_graft.distill.generate import prompts_within
from peft_graft.distill.gradient_start import _BATCHES
from peft_graft.distill.polish import PROMPT_RATES, STARTS, PolishSettings
from peft_graft.distill.teacher import FIT, POOL
from peft_graft.distill.teacher import HELD_OUT as HELD_OUT_TEXT
from peft_graft.planning.spaces import directions_of_roles, spaces_of_roles

GB = 1e9


# ---- what each verb does ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """One text: its tokens, and how many of them are an answer."""

    length: int
    answer: int = 0


@dataclass(frozen=True)
class Stage:
    """What one stage does.

    Attributes:
        teacher, student: texts that each reads. learned: texts that are learned from. started: texts whose gradients
            are summed up as whole matrices.
        written: answers that are generated, by the teacher if ``by_teacher``.
        tokens: that both models read for statistics.
        shared: among how many processes it can be shared out, in batches; 1 where each does all of it.
    """

    name: str
    teacher: int = 0
    student: int = 0
    learned: int = 0
    started: int = 0
    written: int = 0
    by_teacher: bool = False
    tokens: int = 0
    shared: int = 1


#: Trials of a polish, and points of held-out curves: two of every trial, those of the course, and what came of it.
TRIALS = len(STARTS) + len(PROMPT_RATES) - 1
POINTS = 2 * TRIALS + PolishSettings(steps=1).evaluations + 1
#: Texts in a step of the polish, of language models and of encoders.
ROWS, ROWS_OF_SENTENCES = CompletionDistillation.batch_size, PolishSettings(steps=1).batch_size


def timing(held: int) -> list[Stage]:
    """Texts that both models read to see how long they take."""
    texts = _TIMES * min(READ, held)
    return [Stage("time of reading", teacher=texts, student=texts)]


def aligning(tokens: int) -> list[Stage]:
    """A pass over text."""
    return [Stage("pass over text", tokens=tokens, shared=10**6)]


def polishing(steps: int, rows: int, texts: int, held: int, fitted: int = 0) -> list[Stage]:
    """A polish on so many texts, chosen by others; ``fitted``: texts that a head is fitted to for a start."""
    if not steps:
        return []
    start, shared = min(texts, _BATCHES * rows), rows == ROWS
    return [
        Stage("gradients for a start", student=fitted, started=start),
        Stage("polish", learned=steps * rows, shared=rows),
        Stage("measuring on the way", student=POINTS * held, shared=math.ceil(held / BATCH) if shared else 1),
    ]


def from_prompts(config: GraftConfig, *, alike: bool = False, held: int = HELD_OUT) -> list[Stage]:
    """A transfer by prompts, which begins from an untrained module or, between models of one size, from moved weights.

    Args:
        alike: whether the models are of one size, so that one method that moves weights is tried too.
        held: prompts that judge, and that choose.
    """
    prompts, few = config.max_prompts, math.ceil(held / BATCH)
    return [
        Stage("answers of the teacher", written=prompts + 2 * held, by_teacher=True, shared=10**6),
        Stage("asking the teacher", teacher=prompts + 4 * held, shared=prompts // BATCH),
        Stage("answers of the student", written=held, shared=few),
        *(aligning(config.max_tokens) if alike else []),
        Stage("fitting", student=(6 if alike else 4) * held, shared=few),
        *polishing(config.polish_steps_on(prompts, ROWS), ROWS, prompts, held),
        Stage("answers of the graft", written=held, shared=few),
        Stage("judging", student=held, shared=few),
        *timing(held),
    ]


def from_documents(config: GraftConfig, depth: int, held: int = HELD_OUT) -> list[Stage]:
    """A transfer of a language model's module by plain text; with a polish from an untrained module."""
    steps = config.polish_steps_on(config.max_prompts, ROWS) if config.polish_steps else 0
    tried, documents = ([], config.max_prompts) if steps else (tried_methods(), SAMPLES)
    return [
        *(aligning(config.max_tokens) if tried else []),
        Stage("asking the teacher", teacher=documents + 6 * held),
        Stage("fitting", student=(3 + 2 * max(1, len(tried))) * held),
        *fitting_layers(tried, depth),
        *polishing(steps, ROWS, documents, held),
        Stage("judging", student=2 * held),
        *timing(held),
    ]


def from_sentences(config: GraftConfig, depth: int, held: int = HELD_OUT_TEXT) -> list[Stage]:
    """A transfer of an encoder's module with its head by plain text."""
    steps, tried = config.polish_steps, tried_methods()
    learned = min(POOL - 2 * held, max(FIT, SAMPLES, steps * ROWS_OF_SENTENCES))
    return [
        *aligning(config.max_tokens),
        Stage("asking the teacher", teacher=learned + 2 * held),
        Stage("fitting", student=len(tried) * (3 * held + FIT)),
        *fitting_layers(tried, depth),
        *polishing(steps, ROWS_OF_SENTENCES, learned, held, FIT),
        Stage("judging", student=2 * held),
        *timing(held),
    ]


def tried_methods() -> list[str]:
    """What is tried where weights are moved between models of unlike sizes."""
    return [method.name for method in automatic_methods() if method.needs_text]


def fitting_layers(tried: Sequence[str], depth: int) -> list[Stage]:
    """The student reads the texts once more for every layer."""
    fits = any(METHODS[name].fits_layers for name in tried)
    return [Stage("fitting layers", teacher=2 * SAMPLES, student=(1 + depth) * SAMPLES)] if fits else []


# ---- what that costs -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Statistics:
    """Of one pass: operations for each token, bytes of all totals, whether in float64, and seconds of assignments."""

    operations: int = 0
    held: int = 0
    precise: bool = False
    assigning: float = 0.0

    def passes(self, free: float) -> int:
        """How often the text is read where so many bytes are free on the teacher's first device."""
        return max(1, math.ceil(self.held / (_SHARE * free)))


@dataclass(frozen=True)
class Costs:
    """What a pair of models takes for one text, in operations.

    Attributes:
        teacher, student: to read one. learn: to learn from one. start: to sum up its gradients as whole matrices.
        tokens: of both models to read one token. statistics: for one token.
    """

    teacher: float
    student: float
    learn: float
    start: float
    tokens: float
    statistics: Statistics

    def of_models(self, stage: Stage) -> float:
        """Operations of both models in a stage."""
        read = stage.teacher * self.teacher + stage.student * self.student + stage.tokens * self.tokens
        written = stage.written * (self.teacher if stage.by_teacher else self.student)
        return read + written + stage.learned * self.learn + stage.started * self.start

    def of_products(self, stage: Stage) -> float:
        """Operations of the statistics in a stage."""
        return stage.tokens * self.statistics.operations


@dataclass(frozen=True)
class Pair:
    """A teacher and a student with a LoRA of so many ranks at these roles."""

    teacher: Shape
    student: Shape
    roles: tuple[str, ...]
    rank: int

    @property
    def both(self) -> tuple[Shape, Shape]:
        return self.teacher, self.student

    @property
    def weights(self) -> int:
        """Bytes of both models in bfloat16."""
        return sum(2 * sum(parameters_of(shape)) for shape in self.both)

    def free(self, way: Way, rates) -> float:
        """Bytes that each GPU has beside the weights."""
        return rates.gpu_memory * GB - self.weights / way.holds

    def sums(self, way: Way, rates) -> tuple[float, int]:
        """Bytes of whole gradients that each GPU holds at a time for a start, and how often that is done."""
        whole = 4 * self.step("student", COUNTED, Text(COUNTED, 2)).adapted / way.holds
        most = self.free(way, rates) / 2
        return min(whole, most), math.ceil(whole / most)

    @property
    def alike(self) -> bool:
        """Whether all spaces that the LoRA touches are of one size."""
        return all(first == second for first, second in self._spaces.values())

    @property
    def _spaces(self):
        architectures = (described(shape).architecture for shape in self.both)
        found = spaces_of_roles(*architectures, roles=self.roles)
        return {pair: sizes for pair, sizes in found.items() if pair[1].name not in SAMPLE_SPACES}

    def step(self, side: str, rows: int, text: Text, *, checkpointing: bool = False) -> Step:
        """One of the polish, were it the teacher's, or the student's."""
        shape = self.teacher if side == "teacher" else self.student
        batch = Batch(rows, text.length, text.answer, bf16=shape.speaks, checkpointing=checkpointing)
        return whole_step(shape, batch, self.rank, self.roles)

    def statistics(self, methods: Sequence[str], rates) -> Statistics:
        """What a pass for these methods takes."""
        directions = directions_of_roles(described(self.student).architecture, self.roles)
        operations, values, precise, assigning = 0, 0, False, 0.0
        for pair, (teacher, student) in self._spaces.items() if methods else ():
            way = directions.get(pair[1].name, ("read", "write"))
            moments = {moment for name in methods for moment in METHODS[name].moments_for(way)}
            own = (teacher**2 if "teacher" in moments else 0) + (student**2 if "student" in moments else 0)
            operations += 2 * teacher * student + own  # of a symmetric product one half
            values += teacher * student + own
            precise = precise or own > 0
            if set(methods) & ASSIGNING:
                assigning += rates.assignment * (max(teacher, student) / 8192) ** 3 / rates.cores
        values *= 2 if any(METHODS[name].holds_out for name in methods) else 1
        return Statistics(operations, int(8 * values * (1 if precise else 1.5)), precise, assigning)

    def costs(self, text: Text, methods: Sequence[str], rates, *, checkpointing: bool = False) -> Costs:
        """What everything takes for one text."""
        teacher, plain, student = (
            self.step(side, COUNTED, text, checkpointing=again)
            for side, again in (("teacher", False), ("student", False), ("student", checkpointing))
        )
        read = [(of.forward + of.loss / 2) / COUNTED for of in (teacher, student)]
        learn = [(of.forward + of.loss + of.backward) / COUNTED for of in (plain, student)]
        return Costs(
            teacher=read[0],
            student=read[1],
            learn=learn[1],
            start=learn[0] + 2 * text.length * student.adapted,
            tokens=(teacher.forward + student.forward) / COUNTED / text.length,
            statistics=self.statistics(methods, rates),
        )


#: Texts in the steps that are counted. Methods that solve assignments.
COUNTED, ASSIGNING = 8, {"prune-align", "functional"}


# ---- seconds ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """How GPUs work.

    Attributes:
        name: ``alone``; ``spread``, on their layers one after the other, in one process; ``processes``, each on texts
            of its own, in a process with both models; ``cut``, all of them on their part of every layer.
        count: of GPUs. checkpointing: whether activations are computed anew.
    """

    name: str = "alone"
    count: int = 1
    checkpointing: bool = False

    @property
    def holds(self) -> int:
        """Over how many GPUs models are spread."""
        return self.count if self.name in ("spread", "cut") else 1


def keys_and_values(pair: Pair, shape: Shape, tokens: int, way: Way, rates) -> tuple[int, int]:
    """Prompts that are answered at a time, as the package chooses, and bytes of keys and values of one token of all."""
    sizes = dict(shape.sizes)
    head = sizes.get("head_dim") or sizes["hidden_size"] // sizes["num_attention_heads"]
    free = way.holds * pair.free(way, rates)
    batch = prompts_within(described(shape).base.config, tokens, 2, free)
    return batch, batch * 4 * shape.layers * sizes["num_key_value_heads"] * head


def seconds_of(stage: Stage, costs: Costs, pair: Pair, text: Text, way: Way, rates) -> float:
    """How long a stage takes."""
    parts = {"cut": way.count, "processes": min(way.count, stage.shared)}.get(way.name, 1)
    found = costs.of_models(stage) / rates.products("bfloat16") / parts
    if stage.tokens:
        # A pass goes no deeper than its layers ask for.
        found *= (costs.statistics.passes(pair.free(way, rates)) + 1) / 2
        products = rates.products("float64" if costs.statistics.precise else "float32")
        found += costs.of_products(stage) / products / parts + costs.statistics.assigning
    if stage.started:
        found *= pair.sums(way, rates)[1]
    if stage.written:
        found = max(found, writing(stage, pair, text, way, rates))
    if way.name == "cut":
        found += passed_within_layers(stage, pair, text, way) / rates.between_gpus
    if way.name == "processes" and stage.name == "polish":
        found += stage.learned / ROWS * gradients_passed(pair, text, way) / (rates.host_link * GB)
    return found


def writing(stage: Stage, pair: Pair, text: Text, way: Way, rates) -> float:
    """Seconds in which weights, keys and values are read for every token of a batch, or layers are started at all."""
    shape = pair.teacher if stage.by_teacher else pair.student
    batch, each = keys_and_values(pair, shape, text.length - text.answer + rates.longest, way, rates)
    batches = math.ceil(stage.written / batch)
    if way.name == "processes":
        batches = math.ceil(batches / way.count)
    moved = (2 * sum(parameters_of(shape)) + each * text.length) / (rates.bandwidth * rates.bandwidth_share * 1e12)
    moved /= way.count if way.name == "cut" else 1
    return batches * rates.longest * max(moved, shape.layers * rates.layer_ms / 1e3)


def around(count: int) -> float:
    """How often each GPU passes on a tensor that is summed up over so many."""
    return 2 * (count - 1) / count


def gradients_passed(pair: Pair, text: Text, way: Way) -> float:
    """Bytes of a step that each process passes on: gradients of the LoRA, in float32."""
    return around(way.count) * 4 * pair.step("student", COUNTED, text).lora


def passed_within_layers(stage: Stage, pair: Pair, text: Text, way: Way) -> float:
    """Bytes that each GPU passes on where every layer is cut: two sums a layer and direction, in bfloat16."""
    teacher, student = (
        around(way.count) * 2 * 2 * shape.layers * dict(shape.sizes)["hidden_size"] * text.length for shape in pair.both
    )
    learned = (3 if way.checkpointing else 2) * stage.learned + 2 * stage.started
    written = (stage.written, 0) if stage.by_teacher else (0, stage.written)
    both = stage.tokens / text.length
    return (stage.teacher + written[0] + both) * teacher + (stage.student + written[1] + both + learned) * student


# ---- memory ----------------------------------------------------------------------------------------------------------

#: Lines of ``memory_of``.
GENERATING, START, POLISH = (f"**all, {what}**" for what in ("generating", "for a start", "polish"))
ANEW = " with `--gradient-checkpointing`"


def memory_of(pair: Pair, text: Text, rows: int, way: Way, rates) -> dict[str, float]:
    """Bytes on the fullest GPU, by what they are."""
    parts = way.holds
    plain, anew = (pair.step("student", rows, text, checkpointing=each) for each in (False, True))
    longest = text.length - text.answer + rates.longest
    keys = keys_and_values(pair, pair.teacher, longest, way, rates)[1] * longest / parts
    sizes = [[2 * values for values in parameters_of(shape)] for shape in pair.both]
    module = (4 * pair.step("teacher", rows, text).lora + 8 * plain.lora + plain.state) / parts
    # What is left off here lies on every GPU in its part; output layers and logits are on the first.
    weights = sum(base for base, _ in sizes) / parts
    output = sum(own for _, own in sizes)
    trials = TRIALS * 16 * plain.lora / parts
    sums = pair.sums(way, rates)[0]
    first, second = (of.activations / parts + of.working for of in (plain, anew))
    # Processes do not share a start, and activations are computed anew in training only: then it takes a row at a time.
    whole = pair.step("student", ROWS, text)
    at_once = whole.activations / parts + whole.working
    always = weights + output + module
    return {
        "weights of the teacher": sizes[0][0] / parts,
        "weights of the student": sizes[1][0] / parts,
        "output layers of both": output,
        "keys and values of answers": keys,
        "LoRAs, gradients, moments of AdamW, best point": module,
        "states that trials of the polish go on from": trials,
        "whole gradients of the adapted matrices, for a start": sums,
        "activations": first,
        f"activations,{ANEW}": second,
        "logits, a chunk at a time": plain.logits,
        GENERATING: always + keys,
        START: always + sums + at_once + plain.logits,
        START + ANEW: always + sums + at_once / ROWS + plain.logits,
        POLISH: always + trials + first + plain.logits,
        POLISH + ANEW: always + trials + second + plain.logits,
    }


def checkpointing_needed(memory: dict[str, float], rates) -> bool:
    """Whether it does not fit without."""
    return max(memory[START], memory[POLISH]) > rates.gpu_memory * GB
