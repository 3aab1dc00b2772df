"""Streaming two models over one text into paired statistics: one forward pass of each, one statistic a tensor.

    samples -> chunks -> both tokenisations, paired -> batches of like length     in a thread, ahead of the models
    batch   -> both models, up to the last layer that is needed -> rows of every distinct tensor -> products

Spaces that are one tensor in the model (query, key and value read the same) are found by a probe and share their
moments. Every process, or shard, goes over the same batches and runs its own part of them, so their merged statistics
are those of one process.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from peft_graft.alignment.activations import MAX_LENGTH, Capture, pad, tokenize
from peft_graft.alignment.alignment import Pair
from peft_graft.alignment.gather import Gather, RowMemory, rows_of
from peft_graft.alignment.layout import SAMPLE_SPACES, Layout, Wanted, check_memory, is_precise, probe
from peft_graft.alignment.moments import Doubles, Moment, PairedStatistics, Products
from peft_graft.alignment.text import Sample
from peft_graft.alignment.threads import Workers, ahead, give_back_memory
from peft_graft.alignment.tokens import Block, PairingCounts, pair_tokens
from peft_graft.config import MAX_TOKENS
from peft_graft.errors import PairingError
from peft_graft.models.loading import ModelPair
from peft_graft.outputs import read_state, write_state
from peft_graft.processes import Processes
from peft_graft.run import Run

_CHUNK = 512  # samples sorted by length together, so that a batch is padded little
_BATCH_TOKENS, _BATCH_TOKENS_OF_ACCELERATORS = 1024, 4096
_HELD_OUT_EVERY = 8
SAVE_EVERY = 60.0  # seconds
PAIRING = "aligning the models"  # the stage


@dataclass(frozen=True)
class CollectionSettings:
    """How much text to stream and in what batches.

    Attributes:
        max_tokens: stop after this many paired tokens.
        max_length: tokens of a sample at most, special tokens included; longer samples are cut.
        samples: how many the text has, where that is known; by these it is told how much there is to do.
        batch_tokens: padded tokens of a batch at most, for the longer of the two tokenisations; when None few on a
            processor, which touches less memory so, and more on an accelerator, which is kept busy by them.
    """

    max_tokens: int = MAX_TOKENS
    max_length: int = MAX_LENGTH
    samples: int | None = None
    batch_tokens: int | None = None


@dataclass(frozen=True)
class Shard:
    """One part of the batches: every ``count``-th, from ``index`` on."""

    index: int = 0
    count: int = 1


WHOLE = Shard()


@dataclass(frozen=True)
class Unfinished:
    """Where the state of an interrupted pass is kept, and of which pass: the state of another is not used."""

    folder: Path
    key: str


@dataclass
class _Encoded:
    """One sample in both tokenisations."""

    teacher: dict[str, list[int]]
    student: dict[str, list[int]]
    blocks: list[Block]

    @property
    def length(self) -> int:
        return max(len(self.teacher["input_ids"]), len(self.student["input_ids"]))


@dataclass
class _Batch:
    """One batch, ready for both models."""

    teacher: dict[str, Tensor]
    student: dict[str, Tensor]
    gather_teacher: Gather
    gather_student: Gather


class Totals:
    """All products of one pass: those to fit and those held out.

    Mergeable with those of other parts of the batches, and storable.
    """

    def __init__(self, layout: Layout, wanted: Wanted, device: torch.device, *, hold_out: bool) -> None:
        self.wanted = wanted
        self.nodes, sizes, products = layout.nodes, layout.sizes, layout.products(wanted)
        precise = is_precise(wanted)
        # Tensors that no product ties together go one group after another, so that few rows are held at a time.
        self.group = _groups(sizes, products)
        groups = sorted(set(self.group.values()))
        check_memory(layout.values(wanted, hold_out=hold_out), device)
        doubles = Doubles()
        self.products = {
            (held_out, group): Products(
                {name: size for name, size in sizes.items() if self.group[name] == group},
                [pair for pair in products if self.group[pair[0]] == group],
                precise=precise,
                device=device,
                doubles=doubles,
            )
            for held_out in ((False, True) if hold_out else (False,))
            for group in groups
        }
        self.nonfinite = 0

    def update(self, rows: Mapping[str, Tensor], workers: Workers, *, held_out: bool) -> None:
        """Take in the rows of one batch by their tensors' names; they are overwritten."""
        members: dict[str, dict[str, Tensor]] = {}
        for node, value in rows.items():
            members.setdefault(self.group[node], {})[node] = value
        # Groups have no total in common, so they need no order.
        left_out = workers.each(lambda group: self.products[held_out, group].update(members[group]), members)
        self.nonfinite += max(left_out)

    def statistics(self) -> dict[Pair, tuple[PairedStatistics, PairedStatistics]]:
        """What methods see, by pair; pairs that are the same tensors share one object."""
        made: dict[tuple[str, str, frozenset[Moment]], tuple[PairedStatistics, PairedStatistics]] = {}
        found = {}
        for (first, second), moments in self.wanted.items():
            key = (self.nodes[0][first], self.nodes[1][second], frozenset(moments))
            if key not in made:
                group = self.group[key[0]]
                fit = self.products[False, group].statistics(*key)
                other = self.products.get((True, group))
                made[key] = fit, other.statistics(*key) if other else PairedStatistics.empty(
                    fit.cross.shape[1], fit.cross.shape[0], device=str(fit.cross.device)
                )  # fmt: skip
            found[first, second] = made[key]
        return found

    def tensors(self) -> dict[str, Tensor]:
        """All of the state by key; ``load`` reverses it."""
        found = {"nonfinite": torch.tensor(self.nonfinite)}
        for (held_out, group), products in self.products.items():
            found |= {f"{held_out:d} {group}: {key}": value for key, value in products.tensors().items()}
        return found

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over a state of the same pass in place of this one."""
        self.nonfinite = int(tensors["nonfinite"])
        for (held_out, group), products in self.products.items():
            mark = f"{held_out:d} {group}: "
            products.load({key.removeprefix(mark): value for key, value in tensors.items() if key.startswith(mark)})

    def merge(self, other: Totals) -> None:
        """Take in what another part of the batches gave."""
        self.nonfinite += other.nonfinite
        for key, products in self.products.items():
            products.merge(other.products[key])

    def merge_processes(self, processes: Processes) -> None:
        """Take in what the other processes have seen, in all of them alike."""
        count = torch.tensor(self.nonfinite)
        processes.add_up([count])
        self.nonfinite = int(count)
        for products in self.products.values():
            products.merge_processes(processes)


def collect(
    models: ModelPair,
    samples: Iterable[Sample],
    wanted: Wanted,
    settings: CollectionSettings | None = None,
    run: Run | None = None,
    *,
    hold_out: bool = False,
) -> tuple[dict[Pair, tuple[PairedStatistics, PairedStatistics]], PairingCounts]:
    """Statistics of every pair of spaces over the samples, in one pass of both models.

    Args:
        models: with tokenizers. samples: streamed; memory does not depend on how many there are.
        wanted: (teacher space, student space) -> what is needed of them beside the cross moment.
        hold_out: keep every eighth batch apart, for methods that choose by held-out pairs.

    Returns:
        Statistics by pair, to fit and held out (empty unless asked for), and how the tokens paired. Pairs of tokens at
        which an activation is not finite are left out and counted.
    """
    totals, counts = collect_totals(models, samples, wanted, settings, run, hold_out=hold_out)
    return totals.statistics(), counts


def collect_totals(
    models: ModelPair,
    samples: Iterable[Sample],
    wanted: Wanted,
    settings: CollectionSettings | None = None,
    run: Run | None = None,
    *,
    hold_out: bool = False,
    shard: Shard = WHOLE,
    unfinished: Unfinished | None = None,
) -> tuple[Totals, PairingCounts]:
    """What ``collect`` sums up, for one part of the batches, to be merged.

    Args:
        shard: which part; the counts are those of all parts, but for what was not finite.
        unfinished: a pass that finds its state there goes on from it, and saves it every minute.
    """
    settings, run = settings or CollectionSettings(), run or Run()
    counts = PairingCounts()
    layout, device = Layout.of(models, wanted), models.teacher.device
    with (
        torch.inference_mode(),
        Capture(models.teacher, layout.spaces[0], stop=True) as of_teacher,
        Capture(models.student, layout.spaces[1], stop=True) as of_student,
        Workers(on_processor=_on_processor(models)) as workers,
    ):
        for capture in (of_teacher, of_student):  # which learns where it can stop
            probe(capture)
        totals = Totals(layout, wanted, device, hold_out=hold_out)
        begin = _resume(totals, unfinished, shard)
        saved = time.monotonic()
        text, done = _Text(samples), 0
        batches = _mine(models, _batches(models, text, settings, counts), shard, begin)
        forward = _Forward(layout, (of_teacher, of_student), device)
        stream = ahead((*item, text.pairs(counts, settings)) for item in batches)
        for (number, batch, pairs, of_all), seen in workers.in_order(stream, forward):
            if batch is not None and seen is not None:
                totals.update(seen[0], workers, held_out=hold_out and number % _HELD_OUT_EVERY == 0)
                forward.free.append(seen[1])
            if unfinished and time.monotonic() - saved > SAVE_EVERY:
                _save(totals, unfinished, shard, number + 1)
                saved = time.monotonic()
            if _on_processor(models):
                give_back_memory()
            done += pairs
            run.progress(PAIRING, min(done, of_all), of_all)
    counts.nonfinite_pairs = totals.nonfinite
    return totals, counts


class _Text:
    """The samples, and how many pairs of tokens they are expected to give."""

    def __init__(self, samples: Iterable[Sample]) -> None:
        self._samples, self._ended = iter(samples), False

    def __iter__(self) -> Iterator[Sample]:
        yield from self._samples
        self._ended = True

    def pairs(self, counts: PairingCounts, settings: CollectionSettings) -> int:
        """All that it gave, if it has ended; else by those so far, if it is known how many samples there are."""
        found = settings.max_tokens
        if self._ended:
            found = counts.pairs
        elif settings.samples:
            found = counts.pairs * settings.samples // counts.samples
        return min(found, settings.max_tokens)


class _Forward:
    """Runs both models over a batch and keeps the rows of its paired tokens, in memory that later batches use again."""

    def __init__(self, layout: Layout, captures: tuple[Capture, Capture], device: torch.device) -> None:
        self.layout, self.captures, self.device = layout, captures, device
        self.free: list[RowMemory] = []

    def __call__(self, item: tuple[int, _Batch | None, int, int]) -> tuple[dict[str, Tensor], RowMemory] | None:
        batch = item[1]
        if batch is None or not batch.gather_teacher.count:
            return None
        memory = self.free.pop() if self.free else RowMemory()
        rows: dict[str, Tensor] = {}
        inputs = (batch.teacher, batch.gather_teacher), (batch.student, batch.gather_student)
        for capture, nodes, (texts, gather) in zip(self.captures, self.layout.nodes, inputs, strict=True):
            found = capture.forward(texts, rows_of(nodes, gather, memory, self.device))
            rows |= {nodes[space]: value for space, value in found.items()}
        return rows, memory


def _on_processor(models: ModelPair) -> bool:
    return models.teacher.device.type == models.student.device.type == "cpu"


def empty_totals(models: ModelPair, wanted: Wanted, *, hold_out: bool) -> Totals:
    """Totals that have seen nothing yet, to merge those of parts into."""
    return Totals(Layout.of(models, wanted), wanted, models.teacher.device, hold_out=hold_out)


def check_pairs(statistics: Mapping[Pair, tuple[PairedStatistics, PairedStatistics]]) -> None:
    """Refuse statistics of too few pairs: an assignment of d units from fewer than d pairs is noise.

    Raises:
        PairingError: a pair of spaces has fewer pairs than its wider space has units.
    """
    for (teacher_space, student_space), (fit, held_out) in statistics.items():
        needed, count = max(fit.cross.shape), fit.count + held_out.count
        if count < needed:
            per_sample = teacher_space.name in SAMPLE_SPACES
            raise PairingError(
                f"too few {'samples' if per_sample else 'paired tokens'} for the dimension",
                where=f"teacher {teacher_space} -> student {student_space}",
                expected=f"at least {needed}",
                found=count,
                fix="give more text or raise --max-tokens" + (", or use --head drop" if per_sample else ""),
            )


def _groups(names: Iterable[str], products: Iterable[tuple[str, str]]) -> dict[str, str]:
    """The first name of those that products tie together, for every name."""
    group = {name: name for name in names}
    for a, b in products:
        first, other = sorted((group[a], group[b]))
        group.update({name: first for name, of in group.items() if of == other})
    return group


def _mine(
    models: ModelPair, batches: Iterable[list[_Encoded]], shard: Shard, begin: int
) -> Iterator[tuple[int, _Batch | None, int]]:
    """The batches by number, prepared where they are this shard's and not done yet, and their pairs of tokens."""
    for number, batch in enumerate(batches):
        mine = number >= begin and number % shard.count == shard.index
        yield number, _prepare(models, batch) if mine else None, sum(len(sample.blocks) for sample in batch)


def _prepare(models: ModelPair, batch: Sequence[_Encoded]) -> _Batch:
    teacher, student = models.teacher, models.student
    inputs_t = pad(teacher, [sample.teacher for sample in batch], teacher.device)
    inputs_s = pad(student, [sample.student for sample in batch], student.device)
    ranges_t = [[(block.teacher_start, block.teacher_end) for block in sample.blocks] for sample in batch]
    ranges_s = [[(block.student_start, block.student_end) for block in sample.blocks] for sample in batch]
    return _Batch(
        inputs_t,
        inputs_s,
        Gather(inputs_t["input_ids"].shape[1], ranges_t, teacher.device),
        Gather(inputs_s["input_ids"].shape[1], ranges_s, student.device),
    )


def _batches(
    models: ModelPair, samples: Iterable[Sample], settings: CollectionSettings, counts: PairingCounts
) -> Iterator[list[_Encoded]]:
    usual = _BATCH_TOKENS if _on_processor(models) else _BATCH_TOKENS_OF_ACCELERATORS
    most, samples = settings.batch_tokens or usual, iter(samples)
    while chunk := list(islice(samples, _CHUNK)):
        encoded = sorted(_encode(models, chunk, settings, counts), key=lambda sample: sample.length)
        batch: list[_Encoded] = []
        for sample in encoded:
            if batch and sample.length * (len(batch) + 1) > most:
                yield batch
                batch = []
            batch.append(sample)
        if batch:
            yield batch
        if counts.pairs >= settings.max_tokens:
            return


def _encode(
    models: ModelPair, chunk: Sequence[Sample], settings: CollectionSettings, counts: PairingCounts
) -> Iterator[_Encoded]:
    (inputs_t, spans_t), (inputs_s, spans_s) = (
        tokenize(model, chunk, settings.max_length) for model in (models.teacher, models.student)
    )
    for row in range(len(chunk)):
        if counts.pairs >= settings.max_tokens:
            return
        blocks = pair_tokens(spans_t[row], spans_s[row])
        counts.add(spans_t[row], spans_s[row], blocks)
        yield _Encoded(inputs_t[row], inputs_s[row], blocks)


def _save(totals: Totals, unfinished: Unfinished, shard: Shard, done: int) -> None:
    folder, key = _state(unfinished, shard)
    write_state(folder, totals.tensors(), {"key": key, "done": done})


def _resume(totals: Totals, unfinished: Unfinished | None, shard: Shard) -> int:
    """Take over a state of the same pass, if there is one; the number of batches that need not be looked at."""
    found = read_state(*_state(unfinished, shard)) if unfinished else None
    if found is None:
        return 0
    tensors, record = found
    totals.load(tensors)
    return int(record["done"])


def _state(unfinished: Unfinished, shard: Shard) -> tuple[Path, str]:
    """The folder of a part's state, and its key."""
    return unfinished.folder / f"pass-{shard.index}", f"{unfinished.key} in {shard.count}"
