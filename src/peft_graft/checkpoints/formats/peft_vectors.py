"""PEFT's modules of vectors: IA3's factors and trained layer norms."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from peft_graft.checkpoints.raw import RawCheckpoint
from peft_graft.checkpoints.student_names import StudentNames

_KEY = re.compile(r"(.+)\.(?:(ia3_l)(?:\.[^.]+)?|ln_tuning_layers\.(?:[^.]+\.)?(weight|bias))")


def entry(path: str, tensor: Tensor) -> tuple[str, str] | None:
    """(module path, our name) of a tensor's path: IA3's ``input`` is [1, d], its ``output`` [d, 1]."""
    match = _KEY.fullmatch(path)
    if match is None:
        return None
    if match[2]:
        return match[1], "input" if tensor.shape[0] == 1 else "output"
    return match[1], f"norm.{match[3]}"


def scales(raw: RawCheckpoint) -> dict[str, Tensor]:
    """IA3's tensors as the file has them."""
    return {
        f"{path}.ia3_l": tensor[None] if name == "input" else tensor[:, None]
        for path, values in raw.entries.items()
        for name, tensor in values.items()
    }


def norms(raw: RawCheckpoint) -> dict[str, Tensor]:
    """Layer norms as the file has them."""
    return {
        f"{path}.ln_tuning_layers.{name.removeprefix('norm.')}": tensor
        for path, values in raw.entries.items()
        for name, tensor in values.items()
    }


def config_of(raw: RawCheckpoint, student: StudentNames) -> dict[str, Any]:
    """The options that depend on the model, for the student."""
    if raw.kind == "norms":
        return {"exclude_modules": None}
    inputs = [path for path, values in raw.entries.items() if "input" in values]
    return {
        "exclude_modules": None,
        "feedforward_modules": student.shortest_targets(inputs),
        "fan_in_fan_out": bool(set(raw.entries) & student.transposed),
    }
