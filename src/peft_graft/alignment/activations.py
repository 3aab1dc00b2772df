"""What goes into a model and what is seen inside it: tokenised and padded batches, captured activations."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peft_graft.alignment.text import Sample
from peft_graft.alignment.tokens import Span, trimmed_spans
from peft_graft.errors import PairingError
from peft_graft.models.checks import check_tokens
from peft_graft.models.loading import ModelHandle
from peft_graft.models.spaces import EMBEDDED, FIRST_OUT, LAST_OUT, POOLED_OUT, TOKENS_OUT, Space
from peft_graft.models.task_models import complete

#: Tokens of a sample that are read at most.
MAX_LENGTH = 128
_OF_OUTPUT = {TOKENS_OUT, FIRST_OUT, LAST_OUT, POOLED_OUT}


#: (space, its activations) -> what is kept of them.
Take = Callable[[Space, Tensor], Tensor]


class _EnoughError(Exception):
    """Everything has been captured; what the model would still compute is not needed."""


class Capture:
    """Collects the activations of chosen spaces during forward passes of a base model.

    Use as a context manager; ``forward(inputs)`` returns space -> activations, [batch, length, d] for spaces of tokens
    and [batch, d] for spaces of samples. Tensors shared by several spaces are captured once each and not copied.

    ``stop``: once a first forward pass has shown how many captures there are, the next ones end with the last capture.
    """

    def __init__(self, model: ModelHandle, spaces: Iterable[Space], *, stop: bool = False) -> None:
        self.model = model
        self.spaces = sorted(set(spaces))
        self.stop = stop and not any(space.name in _OF_OUTPUT for space in self.spaces)
        self._enough: int | None = None
        self._now = threading.local()  # what this thread's forward pass has shown so far
        self._hooks: list[Any] = []

    def __enter__(self) -> Capture:
        experts: dict[str, set[str]] = {}
        for space in self.spaces:
            if space.name == EMBEDDED:
                words = self.model.base.get_input_embeddings()
                for module in self.model.base.modules():  # BART's stacks have one each, of the same weight
                    if module is words or (isinstance(module, nn.Embedding) and module.weight is words.weight):
                        self._hooks.append(module.register_forward_hook(self._on_output(space, None)))
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
        self.stop = self.stop and not experts  # how often an expert is called depends on the text
        for block, paths in experts.items():
            self._hooks.append(self.model.base.get_submodule(block).register_forward_hook(self._on_mixture(paths)))
        return self

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _on_input(self, space: Space) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            self._hold(space, inputs[0])

        return hook

    def _on_output(self, space: Space, units: Tensor | None) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            self._hold(space, value if units is None else value.index_select(-1, units.to(value.device)))

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

    def _hold(self, space: Space, value: Tensor) -> None:
        held = getattr(self._now, "held", None)
        if held is None:  # not our forward pass: another capture's, of the same model
            return
        if value.ndim == 2:  # OPT's feed-forward block sees all tokens in one row
            if len(value) != self._now.shape.numel():  # what a router sent an expert; all tokens follow (_on_mixture)
                return
            value = value.view(*self._now.shape, value.shape[-1])
        held[space] = self._now.take(space, value)
        self._now.captures += 1
        if self._now.captures == self._enough:
            raise _EnoughError

    def forward(self, inputs: Mapping[str, Tensor], take: Take | None = None) -> dict[Space, Tensor]:
        """Run one padded batch and return what was captured; several threads may do so at once.

        Args:
            take: makes of a space's activations what is returned of them, while the model goes on.
        """
        held: dict[Space, Tensor] = {}
        take = take or (lambda _, value: value)
        self._now.held, self._now.captures, self._now.take = held, 0, take
        self._now.shape = inputs["input_ids"].shape
        output: Any = None
        try:
            output = self.model.base(**inputs)
            self._enough = self._now.captures if self.stop else None
        except _EnoughError:
            pass
        for space in self.spaces:
            if space.name == TOKENS_OUT:
                held[space] = take(space, output.last_hidden_state)
            elif space.name == FIRST_OUT:
                held[space] = take(space, output.last_hidden_state[:, 0])
            elif space.name == LAST_OUT:
                state = output.last_hidden_state
                last = inputs["attention_mask"].sum(1) - 1 if "attention_mask" in inputs else -1
                held[space] = take(space, state[torch.arange(len(state), device=state.device), last])
            elif space.name == POOLED_OUT:
                held[space] = take(space, output.pooler_output)
        self._now.held = None
        return held


def tokenize(
    model: ModelHandle, samples: Sequence[Sample], max_length: int
) -> tuple[list[dict[str, list[int]]], list[list[Span | None]]]:
    """Model inputs of the samples and the characters of every token (``token_pairing.trimmed_spans``).

    Raises:
        PairingError: the model came without its tokenizer. ModelError: it has no embedding of a token.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise PairingError("the model came without its tokenizer", where=model.name, fix="pass its fast tokenizer")
    # RoBERTa and its relatives use two positions for padding.
    positions = getattr(model.text_config, "max_position_embeddings", max_length + 2) - 2
    limit = min(max_length, tokenizer.model_max_length, positions)
    options = {"max_length": limit, "return_offsets_mapping": True, "return_attention_mask": True}
    inputs: list[dict[str, list[int]]] = [{}] * len(samples)
    spans: list[list[Span | None]] = [[]] * len(samples)
    for paired in (False, True):  # one call for all single sentences and one for all pairs
        rows = [row for row, sample in enumerate(samples) if (sample.second is not None) == paired]
        if not rows:
            continue
        columns = zip(*(samples[row].texts for row in rows), strict=True)
        encoding = tokenizer(*map(list, columns), truncation=True, **options)
        keys = [key for key in dict.fromkeys((*tokenizer.model_input_names, "attention_mask")) if key in encoding]
        for index, row in enumerate(rows):
            offsets = encoding["offset_mapping"][index]
            spans[row] = trimmed_spans(samples[row].texts, encoding.sequence_ids(index), offsets)
            inputs[row] = {key: encoding[key][index] for key in keys}
    check_tokens((row["input_ids"] for row in inputs), model.architecture.num_embeddings, tokenizer, model.name)
    return inputs, spans


def pad(model: ModelHandle, rows: Sequence[Mapping[str, list[int]]], device: torch.device) -> dict[str, Tensor]:
    """One padded batch, [rows, longest row], int64, with the decoder's inputs too where there is an encoder."""
    assert model.tokenizer is not None  # tokenize has refused a model without one
    fill = {"input_ids": model.padding, "token_type_ids": model.tokenizer.pad_token_type_id}
    width = max(len(row["input_ids"]) for row in rows)
    batch = {
        key: torch.tensor([row[key] + [fill.get(key, 0)] * (width - len(row[key])) for row in rows], device=device)
        for key in rows[0]
    }
    return complete(model.base.config, batch)
