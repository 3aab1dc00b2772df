"""A checkpoint as its file says it, in one shape for all formats, before any model is known."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Format = Literal["peft", "adapterhub"]
#: ``weights``: any other change of weights, which becomes a LoRA before it is moved (``conversion``).
Kind = Literal["lora", "bottleneck", "ia3", "norms", "prompt", "prefix", "weights"]

#: Endings of task model classes; ``AdapterModel`` is AdapterHub's model with prediction heads.
_TASK_OF_CLASS = {
    "ForTokenClassification": "token-classification",
    "ForSequenceClassification": "sequence-classification",
    "ForCausalLM": "causal-lm",
    "ForQuestionAnswering": "question-answering",
    "ForConditionalGeneration": "seq2seq-lm",
    "ForImageClassification": "image-classification",
    "AdapterModel": "prediction-heads",
}


def task_of_class(name: str) -> str:
    """The task that a model class of transformers or adapters is for, ``base`` for a bare model."""
    return next((task for ending, task in _TASK_OF_CLASS.items() if name.endswith(ending)), "base")


#: What authors call output layers, and word embeddings: peft saves those beside a module if trained or resized.
OUTPUT_NAMES = ("lm_head", "embed_out")
EMBEDDING_NAMES = (
    "embed_tokens",
    "word_embeddings",
    "wte",
    "embed_in",
    "tok_embeddings",
    "token_embedding",
    "shared",
    *OUTPUT_NAMES,
)


def has_rows(values: Mapping[str, Tensor]) -> bool:
    """Whether an entry is of trained rows of a vocabulary, all of them or some, and not of factors."""
    return "rows" in values or "token_rows" in values


#: Paths of the entries of virtual tokens: of a prompt, and of a prefix before the layer's number.
PROMPT, PREFIX = "prompt", "prefix."
#: Kinds that put vectors before the text, or among what attention reads; nothing in the model is changed.
VIRTUAL: tuple[Kind, ...] = ("prompt", "prefix")


def prefix_entries(pairs: Tensor, layers: Iterable[int]) -> dict[str, dict[str, Tensor]]:
    """``prefix.LAYER`` -> ``key``, ``value`` [n, d_kv], of these layers' pairs [n, layers, 2, d_kv]."""
    return {
        f"{PREFIX}{layer}": {"key": pairs[:, index, 0].contiguous(), "value": pairs[:, index, 1].contiguous()}
        for index, layer in enumerate(layers)
    }


def prefix_pairs(entries: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
    """The reverse, layers in their order."""
    ordered = sorted(entries, key=lambda path: int(path.removeprefix(PREFIX)))
    return torch.stack([torch.stack([entries[path]["key"], entries[path]["value"]], 1) for path in ordered], 1)


@dataclass(frozen=True)
class RawCheckpoint:
    """What a checkpoint's files say, keyed by module path.

    Attributes:
        format, kind: which library wrote it, and what sort of module it is.
        name: the adapter's name in its library.
        base_model: name or path of the teacher, as recorded.
        task: ``token-classification``, ... (``models.TASKS``), or ``base`` for a module on a bare model.
        config: the configuration file, unchanged.
        entries: module path (no library prefix) -> parameter name -> tensor. LoRA: ``A`` [r, d_in], ``B`` [d_out, r],
            ``bias``, ``magnitude``, ``base_bias`` [d_out]; of word embeddings ``embedding_A`` [r, V], ``embedding_B``
            [d, r]; trained rows of embeddings or output layer ``rows`` [V, d], or ``token_rows`` [n, d] and
            ``token_ids`` [n]. Bottleneck: ``down.weight`` [b, d], ``down.bias``,
            ``up.weight`` [d, b], ``up.bias``, ... IA3: ``input`` [d_in] or ``output`` [d_out]. Norms: ``norm.weight``,
            ``norm.bias`` [d]. Prompts: path ``prompt`` -> ``embeddings`` [n, d]. Prefixes: path ``prefix.LAYER`` ->
            ``key``, ``value`` [n, d_kv].
        scalings: LoRA's factors only, module path -> alpha / r or alpha / sqrt(r).
        head: tensors saved beside the module, by their path in the task model, or ``layers.N.weight`` for
            AdapterHub's prediction heads.
        head_config: AdapterHub only, the head's configuration file, unchanged.
        labels: label names in order, where the files have them.
        files: file name -> SHA-256.
        weights_suffix: ``.safetensors`` or ``.bin``.
    """

    format: Format
    kind: Kind
    name: str
    base_model: str | None
    task: str
    config: Mapping[str, Any]
    entries: Mapping[str, Mapping[str, Tensor]]
    scalings: Mapping[str, float] = field(default_factory=dict)
    head: Mapping[str, Tensor] = field(default_factory=dict)
    head_config: Mapping[str, Any] | None = None
    labels: Sequence[str] | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    weights_suffix: str = ".safetensors"

    @property
    def trains_output(self) -> bool:
        """Whether rows of a language model's output layer were saved, which are no part of the bare model."""
        return any(
            has_rows(values) and path.rpartition(".")[2] in OUTPUT_NAMES for path, values in self.entries.items()
        )

    @property
    def trains_tokens(self) -> bool:
        """Whether tokens were trained, one by one or all, or factors for their embeddings."""
        return any(
            path.rpartition(".")[2] in EMBEDDING_NAMES or has_rows(values) or "embedding_A" in values
            for path, values in self.entries.items()
        )

    @property
    def num_labels(self) -> int | None:
        """Rows of the head's output layer, None without a head."""
        inner = ("dense", "pre_classifier")
        outputs = [tensor for key, tensor in self.head.items() if not any(name in key for name in inner)]
        return outputs[-1].shape[0] if outputs else None


@dataclass(frozen=True)
class StudentNames:
    """What a written configuration says about the student.

    Attributes:
        name: model name or path. model_type: ``config.model_type``. hidden_size: of the student.
        base_class, task_class: class names of the bare model and of the task model (equal for ``base``).
        prefix: attribute of the base model in its task models, such as ``bert``.
        modules: paths of all modules of the task model, to tell which short names are unambiguous.
        num_layers, num_heads, num_kv_heads: of the student.
        transposed: paths of linear layers that keep their weight as [in, out] (``Conv1D``).
        stacks: path and number of layers of every stack, in the order in which they compute.
        attentions: of a model with one stack, the path of every layer's attention in the bare model.
    """

    name: str
    model_type: str
    hidden_size: int
    base_class: str
    task_class: str
    prefix: str
    modules: frozenset[str]
    num_layers: int
    transposed: frozenset[str] = frozenset()
    num_heads: int = 0
    num_kv_heads: int = 0
    stacks: tuple[tuple[str, int], ...] = ()
    attentions: tuple[str, ...] = ()

    def position(self, path: str) -> int:
        """The layer that a path leads into, layers counted through all stacks."""
        if path.startswith(PREFIX):
            return int(path.removeprefix(PREFIX))
        before = 0
        for layers, depth in self.stacks:
            if match := re.search(rf"(?:^|\.){re.escape(layers)}\.(\d+)\.", path):
                return before + int(match[1])
            before += depth
        raise ValueError(f"{path} is in no layer")

    def shortest_targets(self, paths: Collection[str]) -> list[str]:
        """Target names as a person would write them: shortest suffixes that match these modules and no others.

        Args:
            paths: modules to be targeted.

        Example:
            ``enc.0.self.query`` and ``enc.1.self.query`` of a model that has no other ``query`` are ``["query"]``.
        """
        wanted, targets = set(paths), set()
        remaining = set(paths)
        while remaining:
            path = min(remaining)
            parts = path.split(".")
            for length in range(1, len(parts) + 1):
                suffix = ".".join(parts[-length:])
                matched = {name for name in self.modules if name == suffix or name.endswith(f".{suffix}")} | {path}
                if matched <= wanted:
                    targets.add(suffix)
                    remaining -= matched
                    break
            else:  # another module's path ends in all of this one; peft takes a whole path as one more name
                targets.add(path)
                remaining.discard(path)
        return sorted(targets)
