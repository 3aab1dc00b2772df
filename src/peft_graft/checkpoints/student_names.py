"""What the files of a checkpoint say about the model that it is for."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peft_graft.models.architecture import Architecture
from peft_graft.models.fingerprint import config_fingerprint
from peft_graft.models.loading import ModelHandle
from peft_graft.models.places import is_folder
from peft_graft.models.sizes import head_counts
from peft_graft.models.spaces import Site
from peft_graft.models.task_models import blank_model, is_remote
from peft_graft.models.tasks import Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class StudentNames:
    """What a written configuration says about the student.

    Attributes:
        name: hub id, or absolute path. revision: of the hub, where it is not the newest.
        model_type: ``config.model_type``. hidden_size: of the student.
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
    revision: str | None = None

    def position(self, path: str) -> int:
        """The layer that a path leads into, layers counted through all stacks."""
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


def written_names(model: ModelHandle, task: Task) -> StudentNames:
    """What a checkpoint for this model says about it."""
    config, architecture = model.base.config, model.architecture
    task_class, modules, transposed = _task_modules(model.base, task)
    heads, kv_heads = head_counts(model.text_config)
    return StudentNames(
        name=model.place,
        revision=None if is_folder(model.place) else model.loading.revision,
        model_type=config.model_type,
        hidden_size=int(getattr(model.text_config, "hidden_size", 0) or getattr(config, "dim", 0)),
        base_class=type(model.base).__name__,
        task_class=task_class,
        prefix=architecture.prefix,
        modules=modules,
        num_layers=architecture.num_layers,
        stacks=tuple((stack.layers, architecture.depths[stack.name]) for stack in architecture.row.stacks),
        transposed=transposed,
        num_heads=heads,
        num_kv_heads=kv_heads,
        attentions=_attentions(architecture),
    )


def _task_modules(base: PreTrainedModel, task: Task) -> tuple[str, frozenset[str], frozenset[str]]:
    """The class of a base model's task model, and the paths of its modules and of those that are ``Conv1D``.

    A configuration decides them, and making a model takes longer than all else that is asked for here.
    """
    known = (type(base), config_fingerprint(base.config), task)
    if known not in _MODULES:
        model = blank_model(base.config, task, trust_remote_code=is_remote(base))
        paths = {path: type(module).__name__ for path, module in model.named_modules()}
        transposed = frozenset(path for path, name in paths.items() if name == "Conv1D")
        _MODULES[known] = (type(model).__name__, frozenset(paths), transposed)
    return _MODULES[known]


_MODULES: dict[tuple[type, str, Task], tuple[str, frozenset[str], frozenset[str]]] = {}


def _attentions(architecture: Architecture) -> tuple[str, ...]:
    """The path of every layer's attention, of a model with one stack."""
    if len(architecture.row.stacks) > 1 or "attn.query" not in architecture.row.linears:
        return ()
    queries = (architecture.path(Site(layer, "attn.query")) for layer in range(architecture.num_layers))
    return tuple(path.rpartition(".")[0] for path in queries)
