"""A checkpoint as its file says it, in one shape for all formats, before any model is known."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from peft_graft.labels import ProblemType, are_numbers
from peft_graft.models.fingerprint import hash_tensors
from peft_graft.models.tasks import Task
from peft_graft.modules.base import Part

#: The kind of a checkpoint whose change of weights becomes a LoRA before it is moved (``convert``).
WEIGHTS = "weights"


@dataclass(frozen=True)
class RawCheckpoint:
    """What a checkpoint's files say, keyed by module path.

    Attributes:
        library: a ``Library``, or the name under which a format from outside this package is registered.
        kind: what sort of module it is, such as ``lora`` or ``bottleneck``; ``weights`` for one that has to become a
            LoRA first (``convert``), which has no parts.
        name: the adapter's name in its library.
        base_model: name or path of the teacher, as recorded.
        task: ``token-classification``, ... .
        config: the configuration file; one of an earlier version as its library reads it today.
        parts: module path (no library prefix) -> what is stored there. Virtual tokens are at paths of their own
            (``modules.prompts``).
        head: tensors saved beside the module, by their path in the task model, or ``layers.N.weight`` for
            AdapterHub's prediction heads.
        beside: tensors of the base model itself that were trained whole and have no place among ``parts``, by their
            path in the task model; told from the head's once the base is known (``task.with_task``).
        head_config: AdapterHub only, the head's configuration file, unchanged.
        labels: label names in order, where the files have them. problem_type: what the head's outputs are, likewise.
        files: file name -> SHA-256, where it comes from files.
        weights_suffix: ``.safetensors`` or ``.bin``.
        unconverted: of kind ``weights`` alone, all tensors by their keys in the file.
        notes: remarks on what the files hold and is not moved.
    """

    library: str
    kind: str
    name: str
    base_model: str | None
    task: Task
    config: Mapping[str, Any]
    parts: Mapping[str, Part]
    head: Mapping[str, Tensor] = field(default_factory=dict)
    beside: Mapping[str, Tensor] = field(default_factory=dict)
    head_config: Mapping[str, Any] | None = None
    labels: Sequence[str] | None = None
    problem_type: ProblemType | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    weights_suffix: str = ".safetensors"
    unconverted: Mapping[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def needs_conversion(self) -> bool:
        """Whether it has to become a LoRA before it can be moved."""
        return self.kind == WEIGHTS

    @property
    def is_virtual(self) -> bool:
        """Whether it consists of virtual tokens and changes nothing in the model."""
        return any(part.is_virtual for part in self.parts.values())

    @property
    def is_active(self) -> bool:
        """Whether the checkpoint as it is stored can change anything."""
        return any(part.is_active for part in self.parts.values())

    @property
    def virtual_tokens(self) -> int:
        """How many vectors it puts before the text in what the model computes."""
        return sum(part.virtual_tokens for part in self.parts.values())

    @property
    def vocabulary_size(self) -> int:
        """How many tokens a model must have at least to take it, 0 where it does not matter."""
        return max((part.vocabulary_size or 0 for part in self.parts.values()), default=0)

    @property
    def trains_output(self) -> bool:
        """Whether rows of a language model's output layer were saved, which are no part of the bare model."""
        return any(part.trains_output(path) for path, part in self.parts.items())

    @property
    def trains_tokens(self) -> bool:
        """Whether tokens were trained, one by one or all, or factors for their embeddings."""
        return any(part.trains_tokens(path) for path, part in self.parts.items())

    @property
    def num_parameters(self) -> int:
        """Number of values in all parts, or in the file of a module that has none."""
        tensors = [value for part in self.parts.values() for value in part.tensors.values()]
        return sum(value.numel() for value in (*tensors, *self.unconverted.values()))

    @property
    def digest(self) -> str:
        """Hash of all that decides what it does: its values, its head's and its configuration."""
        parts = {f"{path} {name}": value for path, part in self.parts.items() for name, value in part.tensors.items()}
        values = hash_tensors(sorted({**parts, **self.head, **self.beside, **self.unconverted}.items()))
        said = [self.library, self.kind, self.task, self.config, self.head_config, self.labels]
        said += [self.problem_type] if self.problem_type else []
        text = json.dumps(said, sort_keys=True, default=_plain)
        return f"{values} {hashlib.sha256(text.encode()).hexdigest()}"

    @property
    def gives_numbers(self) -> bool:
        """Whether the head gives numbers and decides nothing (``labels.are_numbers``)."""
        return bool(self.head) and are_numbers(self.problem_type, self.num_labels)

    @property
    def num_labels(self) -> int | None:
        """Rows of the head's output layer, None without a head."""
        inner = ("dense", "pre_classifier", "pooler")
        outputs = [tensor for key, tensor in self.head.items() if not any(name in key for name in inner)]
        return outputs[-1].shape[0] or None if outputs and outputs[-1].ndim else None


def _plain(value: Any) -> Any:
    """What JSON has no word for, the same in every process: sets are in another order in each."""
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)
