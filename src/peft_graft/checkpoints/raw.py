"""A checkpoint as its file says it, in one shape for all formats, before any model is known."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from peft_graft.models.tasks import Task

Format = Literal["peft", "adapterhub"]
#: ``weights``: any other change of weights, which becomes a LoRA before it is moved (``conversion``).
Kind = Literal["lora", "bottleneck", "ia3", "norms", "prompt", "prefix", "weights"]

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
        task: ``token-classification``, ... .
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
    task: Task
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
