"""AdapterHub's prefix tuning (Li & Liang 2021, arXiv 2101.00190): keys and values that layers read before the text's.

One pool holds the prefixes of all layers and is saved under the base model, and again under each layer's attention. A
prefix that a network makes is written out: what the network gives does not depend on the text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import count, islice
from typing import Any, ClassVar

import torch
from torch import Tensor

from peft_graft.checkpoints.formats.adapters.codec import Codec, Saved, Settings, register_codec
from peft_graft.checkpoints.raw import RawCheckpoint
from peft_graft.checkpoints.student_names import StudentNames
from peft_graft.errors import CheckpointError, reason
from peft_graft.models.tasks import Task
from peft_graft.modules.base import Part
from peft_graft.modules.prompts import prefix_layer, prefix_pairs, prefix_parts

#: The library's name for the only stack's prefixes, by ``model_type``.
_LOCATIONS = {"distilbert": "self"}
_FIX = "save it again with the library's save_adapter"
#: Activations that the library calls otherwise than transformers.
_ACTIVATIONS = {"leakyrelu": "leaky_relu"}


@register_codec
class PrefixCodec(Codec):
    """Prefix tuning of a model with one stack."""

    kind: ClassVar = "prefix"

    def claims(self, settings: Settings) -> bool:
        """Whether the settings are of a prefix."""
        return settings.get("architecture") == "prefix_tuning"

    def parts(self, saved: Saved) -> tuple[dict[str, Part], Settings]:
        """Every layer's keys and values."""
        own: dict[str, dict[str, Tensor]] = {}
        pools: set[str] = set()
        name = re.escape(saved.adapter)
        for key, tensor in saved.tensors.items():
            match = re.fullmatch(rf"(.*?)prefix_tuning\.(?:pool\.)?prefix_tunings\.{name}\.(\w+)\.(.+)", key)
            if match is None:
                raise CheckpointError(
                    f"tensor {key} belongs to no prefix named {saved.adapter!r}", where=saved.where, fix=_FIX
                )
            own.setdefault(match[2], {})[match[3]] = tensor
            pools.add(match[1])
        if len(own) != 1:
            raise CheckpointError(
                "prefixes of models with several stacks cannot be moved yet" if own else "the file holds no prefix",
                where=saved.where,
                found=", ".join(sorted(own)) or None,
                fix="move a LoRA" if own else None,
            )
        whole = _written_out(next(iter(own.values())), saved.settings, saved.where)
        return _by_layer(whole, len(pools), saved), saved.settings

    def tensors(self, raw: RawCheckpoint, settings: Settings, names: StudentNames) -> dict[str, Tensor]:
        """The tensors of the student's file: one, under the base model and under each layer's attention."""
        whole = prefix_pairs(raw.parts).flatten()
        start = "" if raw.task is Task.BASE or not names.prefix else f"{names.prefix}."
        end = f"prefix_tunings.{raw.name}.{_LOCATIONS.get(names.model_type, 'self_prefix')}.control_trans"
        attentions = dict.fromkeys(f"{start}{path}.prefix_tuning.pool.{end}" for path in names.attentions)
        return {f"{start}prefix_tuning.{end}": whole, **dict.fromkeys(attentions, whole)}

    def settings(self, raw: RawCheckpoint, settings: Settings, names: StudentNames) -> dict[str, Any]:
        """The settings of a module that is kept as the vectors themselves."""
        return {**settings, "flat": True, "prefix_length": len(next(iter(raw.parts.values())).tensors["key"])}

    def layer(self, path: str, names: StudentNames) -> int | None:
        """The layer's number, which is all that the path says."""
        return prefix_layer(path)


def _by_layer(whole: Tensor, pools: int, saved: Saved) -> dict[str, Part]:
    """The parts of all keys and values.

    Args:
        pools: under how many modules the file has them: the base model, and the attention of every layer.
    """
    left_out = set(saved.settings.get("leave_out") or ())
    length = int(saved.settings.get("prefix_length") or 0)
    in_a_layer = max(2 * length * saved.hidden_size, 1)
    layers = pools - 1 - len(left_out) if pools > 1 else whole.numel() // in_a_layer
    if min(length, layers) < 1 or whole.numel() % (2 * length * layers):
        raise CheckpointError(
            "the prefix has another size than its configuration says",
            where=saved.where,
            expected=f"{length} keys and values for each of {max(layers, 0)} layers",
            found=whole.numel(),
            fix=_FIX,
        )
    numbers = islice((layer for layer in count() if layer not in left_out), layers)
    return prefix_parts(whole.view(length, layers, 2, -1), numbers)


def _written_out(parts: Mapping[str, Tensor], settings: Settings, where: str) -> Tensor:
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

    words, *network = (parts[name].float() for name in names)
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
    try:
        inner = activation(torch.nn.functional.linear(words, *network[:2]))
        return torch.nn.functional.linear(inner, *network[2:]).to(parts["wte.weight"].dtype).flatten()
    except RuntimeError as error:
        raise CheckpointError(
            f"the layers of the prefix's network do not fit each other ({reason(error)})", where=where, fix=_FIX
        ) from error
