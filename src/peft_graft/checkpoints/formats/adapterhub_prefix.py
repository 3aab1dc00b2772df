"""AdapterHub's prefix tuning (Li & Liang 2021, arXiv 2101.00190): keys and values that layers read before the text's.

One pool holds the prefixes of all layers and is saved under the base model, and again under each layer's attention. A
prefix that a network makes is written out: what the network gives does not depend on the text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import count, islice
from typing import Any

import torch
from torch import Tensor

from peft_graft.checkpoints.raw import RawCheckpoint, prefix_entries, prefix_pairs
from peft_graft.checkpoints.student_names import StudentNames
from peft_graft.errors import CheckpointError
from peft_graft.models.tasks import Task

#: The library's name for the only stack's prefixes, by ``model_type``.
_LOCATIONS = {"distilbert": "self"}
_FIX = "save it again with the library's save_adapter"
#: Activations that the library calls otherwise than transformers.
_ACTIVATIONS = {"gelu_orig": "gelu", "leakyrelu": "leaky_relu"}


def entries(
    tensors: Mapping[str, Tensor], settings: Mapping[str, Any], adapter: str, hidden_size: int, where: str
) -> dict[str, dict[str, Tensor]]:
    """``prefix.LAYER`` -> ``key``, ``value`` [n, d_kv].

    Args:
        tensors: as the file has them. settings: of the module. adapter: its name. hidden_size: of its model, which is
            the keys' size where the file does not show the number of layers.

    Raises:
        CheckpointError: the file holds no prefix, or those of several stacks, or one of another size.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    pools: set[str] = set()
    for key, tensor in tensors.items():
        match = re.fullmatch(rf"(.*?)prefix_tuning\.(?:pool\.)?prefix_tunings\.{re.escape(adapter)}\.(\w+)\.(.+)", key)
        if match is None:
            raise CheckpointError(f"tensor {key} belongs to no prefix named {adapter!r}", where=where, fix=_FIX)
        parts.setdefault(match[2], {})[match[3]] = tensor
        pools.add(match[1])
    if len(parts) != 1:
        raise CheckpointError(
            "prefixes of models with several stacks cannot be moved yet" if parts else "the file holds no prefix",
            where=where, found=", ".join(sorted(parts)) or None, fix="move a LoRA" if parts else None,
        )  # fmt: skip
    left_out = set(settings.get("leave_out") or ())
    length = int(settings.get("prefix_length") or 0)
    whole = _written_out(next(iter(parts.values())), settings, where)
    in_a_layer = max(2 * length * hidden_size, 1)
    layers = len(pools) - 1 - len(left_out) if len(pools) > 1 else whole.numel() // in_a_layer
    if min(length, layers) < 1 or whole.numel() % (2 * length * layers):
        raise CheckpointError(
            "the prefix has another size than its configuration says",
            where=where,
            expected=f"{length} keys and values for each of {max(layers, 0)} layers",
            found=whole.numel(),
            fix=_FIX,
        )
    numbers = islice((layer for layer in count() if layer not in left_out), layers)
    return prefix_entries(whole.view(length, layers, 2, -1), numbers)


def _written_out(parts: Mapping[str, Tensor], settings: Mapping[str, Any], where: str) -> Tensor:
    """All keys and values, in the order n, layer, key and value, units."""
    if settings.get("flat"):
        names: tuple[str, ...] = ("control_trans",)
    else:
        names = ("wte.weight", *(f"control_trans.{n}.{part}" for n in (0, 2) for part in ("weight", "bias")))
    if missing := [name for name in names if name not in parts]:
        raise CheckpointError(f"the prefix lacks {', '.join(missing)}", where=where, fix=_FIX)
    if settings.get("flat"):
        return parts["control_trans"].flatten()
    from transformers.activations import get_activation

    words, first, first_bias, second, second_bias = (parts[name].float() for name in names)
    name = str(settings.get("non_linearity", "tanh")).lower()
    try:
        activation = get_activation(_ACTIVATIONS.get(name, name))
    except KeyError as error:
        raise CheckpointError(
            "the prefix's activation is unknown",
            where=where,
            found=name,
            fix="make it flat with the library's eject_prefix_tuning and save it again",
        ) from error
    inner = activation(torch.nn.functional.linear(words, first, first_bias))
    return torch.nn.functional.linear(inner, second, second_bias).to(parts["wte.weight"].dtype).flatten()


def tensors(raw: RawCheckpoint, student: StudentNames) -> dict[str, Tensor]:
    """The tensors of the student's file: one, under the base model and under each layer's attention."""
    whole = prefix_pairs(raw.entries).flatten()
    start = "" if raw.task is Task.BASE or not student.prefix else f"{student.prefix}."
    end = f"prefix_tunings.{raw.name}.{_LOCATIONS.get(student.model_type, 'self_prefix')}.control_trans"
    attentions = dict.fromkeys(f"{start}{path}.prefix_tuning.pool.{end}" for path in student.attentions)
    return {f"{start}prefix_tuning.{end}": whole, **dict.fromkeys(attentions, whole)}


def settings_of(raw: RawCheckpoint, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a module that is kept as the vectors themselves."""
    return {**settings, "flat": True, "prefix_length": len(next(iter(raw.entries.values()))["key"])}
