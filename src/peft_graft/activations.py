"""Streaming two models over one text into paired statistics, one per pair of spaces."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from peft_graft.alignment import Pair
from peft_graft.errors import PairingError
from peft_graft.models import ModelHandle, complete
from peft_graft.modules import EMBEDDED, FIRST_OUT, LAST_OUT, POOLED_OUT, TOKENS_OUT, Space
from peft_graft.settings import Progress
from peft_graft.statistics import Moment, PairedStatistics
from peft_graft.text import Sample
from peft_graft.token_pairing import Block, PairingCounts, Span, pair_tokens, trimmed_spans

_CHUNK = 512  # samples sorted by length together, so that a batch is padded little
_HELD_OUT_EVERY = 8
_SAMPLE_SPACES = {FIRST_OUT, LAST_OUT, POOLED_OUT}


@dataclass(frozen=True)
class CollectionSettings:
    """How much text to stream and in what batches.

    Attributes:
        max_tokens: stop after this many paired tokens.
        max_length: tokens of a sample at most, special tokens included; longer samples are cut.
        batch_tokens: padded tokens of a batch at most, for the longer of the two tokenisations.
    """

    max_tokens: int = 50_000
    max_length: int = 128
    batch_tokens: int = 4096


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
class _Gather:
    """Picks token activations out of a padded batch and averages those of one block."""

    positions: list[int] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    count: int = 0

    def add(self, row: int, width: int, starts_ends: Iterable[tuple[int, int]]) -> None:
        for start, end in starts_ends:
            self.positions.extend(range(row * width + start, row * width + end))
            self.groups.extend([self.count] * (end - start))
            self.count += 1

    def __call__(self, activations: Tensor) -> Tensor:
        """[batch, length, d] -> [blocks, d], float32 at least."""
        flat = activations.flatten(0, 1)
        picked = flat.index_select(0, torch.tensor(self.positions, device=flat.device))
        picked = picked.to(torch.promote_types(picked.dtype, torch.float32))
        if len(self.positions) == self.count:
            return picked
        groups = torch.tensor(self.groups, device=flat.device)
        sums = torch.zeros(self.count, picked.shape[1], dtype=picked.dtype, device=flat.device)
        sums.index_add_(0, groups, picked)
        return sums / torch.bincount(groups, minlength=self.count).unsqueeze(1).to(sums.dtype)


class Capture:
    """Collects the activations of chosen spaces during forward passes of a base model.

    Use as a context manager; ``forward(inputs)`` returns space -> activations, [batch, length, d] for spaces of tokens
    and [batch, d] for spaces of samples. Tensors shared by several spaces are captured once each and not copied.
    """

    def __init__(self, model: ModelHandle, spaces: Iterable[Space]) -> None:
        self.model = model
        self.spaces = sorted(set(spaces))
        self._held: dict[Space, Tensor] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> Capture:
        experts: dict[str, set[str]] = {}
        for space in self.spaces:
            if space.name == EMBEDDED:
                self._hooks.append(
                    self.model.base.get_input_embeddings().register_forward_hook(self._on_output(space, None))
                )
            if space.layer < 0:
                continue
            tap = self.model.architecture.tap(space)
            if tap.expert:
                experts.setdefault(tap.expert[0], set()).add(tap.expert[1])
            module = self.model.base.get_submodule(tap.path)
            if tap.side == "input":
                self._hooks.append(module.register_forward_pre_hook(self._on_input(space)))
            else:
                self._hooks.append(module.register_forward_hook(self._on_output(space, tap.units)))
        for block, paths in experts.items():
            self._hooks.append(self.model.base.get_submodule(block).register_forward_hook(self._on_mixture(paths)))
        return self

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._held.clear()

    def _on_input(self, space: Space) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            self._held[space] = inputs[0]

        return hook

    def _on_output(self, space: Space, units: Tensor | None) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            self._held[space] = value if units is None else value.index_select(-1, units.to(value.device))

        return hook

    def _on_mixture(self, paths: Iterable[str]) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        """Run experts on all of their block's input, in place of what the router sent them.

        Each model sends an expert tokens of its own choice, few of which both models' experts see, and of some experts
        none. But an expert is a function of the stream that can be asked about any token; that it is seldom called
        for this one does not change which of its units are which.
        """

        def hook(_: nn.Module, inputs: tuple[Any, ...], __: Any) -> None:
            for path in paths:
                self.model.base.get_submodule(path)(inputs[0])

        return hook

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[Space, Tensor]:
        """Run one padded batch and return what was captured."""
        self._held.clear()
        output = self.model.base(**inputs)
        shape = inputs["input_ids"].shape
        for space, value in self._held.items():
            if value.ndim == 2:  # OPT's feed-forward block sees all tokens in one row
                self._held[space] = value.view(*shape, value.shape[-1])
        for space in self.spaces:
            if space.name == TOKENS_OUT:
                self._held[space] = output.last_hidden_state
            elif space.name == FIRST_OUT:
                self._held[space] = output.last_hidden_state[:, 0]
            elif space.name == LAST_OUT:
                state = output.last_hidden_state
                last = inputs["attention_mask"].sum(1) - 1 if "attention_mask" in inputs else -1
                self._held[space] = state[torch.arange(len(state), device=state.device), last]
            elif space.name == POOLED_OUT:
                self._held[space] = output.pooler_output
        return dict(self._held)


def collect(
    teacher: ModelHandle,
    student: ModelHandle,
    samples: Iterable[Sample],
    pairs: Sequence[Pair],
    moments: Sequence[Moment] = ("cross",),
    settings: CollectionSettings | None = None,
    progress: Progress | None = None,
    *,
    hold_out: bool = False,
) -> tuple[dict[Pair, tuple[PairedStatistics, PairedStatistics]], PairingCounts]:
    """Statistics of every pair of spaces over the samples, in one pass of both models.

    Args:
        teacher, student: with tokenizers. samples: streamed; memory does not depend on how many there are.
        pairs: (teacher space, student space). moments: what the method needs beside the cross moment.
        hold_out: keep every eighth batch apart, for methods that choose by held-out pairs.

    Returns:
        Statistics by pair, to fit and held out (empty unless asked for), and how the tokens paired. Pairs of a batch
        whose activations are not finite are left out and counted.
    """
    settings = settings or CollectionSettings()
    counts = PairingCounts()
    fit, held_out = (
        {
            pair: PairedStatistics.empty(
                teacher.architecture.size(pair[0]), student.architecture.size(pair[1]), wanted, str(teacher.base.device)
            )
            for pair in pairs
        }
        for wanted in (moments, moments if hold_out else ())
    )
    with (
        torch.inference_mode(),
        Capture(teacher, (pair[0] for pair in pairs)) as of_teacher,
        Capture(student, (pair[1] for pair in pairs)) as of_student,
    ):
        for number, batch in enumerate(_batches(teacher, student, iter(samples), settings, counts)):
            statistics = held_out if hold_out and number % _HELD_OUT_EVERY == 0 else fit
            _update(statistics, of_teacher, of_student, batch, counts)
            if progress:
                progress("pairing tokens", min(counts.pairs, settings.max_tokens), settings.max_tokens)
    return {pair: (fit[pair], held_out[pair]) for pair in pairs}, counts


def check_pairs(statistics: Mapping[Pair, tuple[PairedStatistics, PairedStatistics]]) -> None:
    """Refuse statistics of too few pairs: an assignment of d units from fewer than d pairs is noise.

    Raises:
        PairingError: a pair of spaces has fewer pairs than its wider space has units.
    """
    for (teacher_space, student_space), (fit, held_out) in statistics.items():
        needed, count = max(fit.cross.shape), fit.count + held_out.count
        if count < needed:
            per_sample = teacher_space.name in _SAMPLE_SPACES
            raise PairingError(
                f"too few {'samples' if per_sample else 'paired tokens'} for the dimension",
                where=f"teacher {teacher_space} -> student {student_space}",
                expected=f"at least {needed}",
                found=count,
                fix="give more text or raise --max-tokens" + (", or use --head drop" if per_sample else ""),
            )


def _update(
    statistics: Mapping[Pair, PairedStatistics],
    of_teacher: Capture,
    of_student: Capture,
    batch: Sequence[_Encoded],
    counts: PairingCounts,
) -> None:
    inputs_t = pad(of_teacher.model, [sample.teacher for sample in batch], of_teacher.model.base.device)
    inputs_s = pad(of_student.model, [sample.student for sample in batch], of_student.model.base.device)
    gather_t, gather_s = _Gather(), _Gather()
    for row, sample in enumerate(batch):
        gather_t.add(row, inputs_t["input_ids"].shape[1], ((b.teacher_start, b.teacher_end) for b in sample.blocks))
        gather_s.add(row, inputs_s["input_ids"].shape[1], ((b.student_start, b.student_end) for b in sample.blocks))
    if not gather_t.count:
        return
    held_t, held_s = of_teacher.forward(inputs_t), of_student.forward(inputs_s)
    picked_t = {space: _picked(space, value, gather_t) for space, value in held_t.items()}
    picked_s = {space: _picked(space, value, gather_s) for space, value in held_s.items()}
    worst = 0
    for (space_t, space_s), moments in statistics.items():
        x_t, x_s = picked_t[space_t], picked_s[space_s].to(picked_t[space_t].device)
        finite = torch.isfinite(x_t).all(1) & torch.isfinite(x_s).all(1)
        if not bool(finite.all()):
            worst = max(worst, int((~finite).sum()))
            x_t, x_s = x_t[finite], x_s[finite]
        moments.update(x_t, x_s)
    counts.nonfinite_pairs += worst


def _picked(space: Space, value: Tensor, gather: _Gather) -> Tensor:
    if space.name in _SAMPLE_SPACES:
        return value.to(torch.promote_types(value.dtype, torch.float32))
    return gather(value)


def _batches(
    teacher: ModelHandle,
    student: ModelHandle,
    samples: Iterator[Sample],
    settings: CollectionSettings,
    counts: PairingCounts,
) -> Iterator[list[_Encoded]]:
    while chunk := list(islice(samples, _CHUNK)):
        encoded = sorted(_encode(teacher, student, chunk, settings, counts), key=lambda sample: sample.length)
        batch: list[_Encoded] = []
        for sample in encoded:
            if batch and sample.length * (len(batch) + 1) > settings.batch_tokens:
                yield batch
                batch = []
            batch.append(sample)
        if batch:
            yield batch
        if counts.pairs >= settings.max_tokens:
            return


def _encode(
    teacher: ModelHandle,
    student: ModelHandle,
    chunk: Sequence[Sample],
    settings: CollectionSettings,
    counts: PairingCounts,
) -> Iterator[_Encoded]:
    sides = [(*tokenize(model, chunk, settings.max_length), model) for model in (teacher, student)]
    (inputs_t, spans_t, _), (inputs_s, spans_s, _) = sides
    for row in range(len(chunk)):
        if counts.pairs >= settings.max_tokens:
            return
        blocks = pair_tokens(spans_t[row], spans_s[row])
        counts.add(spans_t[row], spans_s[row], blocks)
        yield _Encoded(inputs_t[row], inputs_s[row], blocks)


def tokenize(
    model: ModelHandle, samples: Sequence[Sample], max_length: int
) -> tuple[list[dict[str, list[int]]], list[list[Span | None]]]:
    """Model inputs of the samples and the characters of every token (``token_pairing.trimmed_spans``).

    Raises:
        PairingError: the model came without its tokenizer.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise PairingError("the model came without its tokenizer", where=model.name, fix="pass its fast tokenizer")
    # RoBERTa and its relatives use two positions for padding.
    positions = getattr(model.base.config, "max_position_embeddings", max_length + 2) - 2
    limit = min(max_length, tokenizer.model_max_length, positions)
    inputs, spans = [], []
    for sample in samples:
        encoding = tokenizer(*sample.texts, truncation=True, max_length=limit, return_offsets_mapping=True)
        spans.append(trimmed_spans(sample.texts, encoding.sequence_ids(0), encoding["offset_mapping"]))
        inputs.append({key: encoding[key] for key in tokenizer.model_input_names if key in encoding})
    return inputs, spans


def pad(model: ModelHandle, rows: Sequence[Mapping[str, list[int]]], device: torch.device) -> dict[str, Tensor]:
    """One padded batch, [rows, longest row], int64, with the decoder's inputs too where there is an encoder."""
    tokenizer = model.tokenizer
    assert tokenizer is not None  # tokenize has refused a model without one
    fill = {"input_ids": tokenizer.pad_token_id or 0, "token_type_ids": tokenizer.pad_token_type_id}
    width = max(len(row["input_ids"]) for row in rows)
    batch = {
        key: torch.tensor([row[key] + [fill.get(key, 0)] * (width - len(row[key])) for row in rows], device=device)
        for key in rows[0]
    }
    return complete(model.base.config, batch)
