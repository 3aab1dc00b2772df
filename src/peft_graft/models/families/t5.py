"""T5, mT5, UMT5."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from peft_graft.models.families import register_architecture
from peft_graft.models.rows import adapter_points, crossing, crossing_points, linears, optional, pre_norm
from peft_graft.models.spec import ArchitectureRow, Stack, Tap
from peft_graft.models.tasks import Task


def _t5(name: Literal["encoder", "decoder"]) -> Stack:
    attention = {f"attn_{role}": f"layer.0.SelfAttention.{role[0]}" for role in ("query", "key", "value", "output")}
    cross = {f"cross_{role}": f"layer.1.EncDecAttention.{role[0]}" for role in ("query", "key", "value", "output")}
    last = "layer.1" if name == "encoder" else "layer.2"
    block = f"{last}.DenseReluDense"
    found = linears(**attention, ffn_up=f"{block}.wi_1", ffn_down=f"{block}.wo", **(cross if name == "decoder" else {}))
    # Version 1.0 has no gate, and calls its first projection otherwise.
    found["ffn.up"] = replace(found["ffn.up"], elsewhere=f"{block}.wi")
    found |= optional(linears(ffn_gate=f"{block}.wi_0"))
    taps, points = pre_norm("layer.0", last), adapter_points("layer.0.adapters", f"{last}.adapters")
    norms = {"attn.norm": "layer.0.layer_norm", "ffn.norm": f"{last}.layer_norm"}
    if name == "decoder":
        taps = crossing(taps, Tap("layer.1", "input"))
        points = crossing_points("layer.0.adapters", "layer.1.adapters", f"{last}.adapters")
        norms["cross.norm"] = "layer.1.layer_norm"
    return Stack(f"{name}.block", found, taps=taps, adapters=points, name=name, kind=name, norms=norms)


register_architecture(
    ArchitectureRow(
        model_types=("t5", "mt5", "umt5"),
        stacks=(_t5("encoder"), _t5("decoder")),
        flat_tasks=frozenset({Task.SEQ2SEQ_LM, Task.QUESTION_ANSWERING}),
    ),
)
