"""The section of docs/extending.md on model families: its code runs, and modules find their sites in the new family."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import tiny
from peft_graft.alignment.activations import Capture
from peft_graft.checkpoints.read import read_checkpoint
from peft_graft.checkpoints.resolve import resolve
from peft_graft.errors import ArchitectureError
from peft_graft.models.families import register_architecture, rows_of
from peft_graft.models.loading import describe_config, load_model
from peft_graft.models.rows import linears
from peft_graft.models.spaces import Site, Space
from peft_graft.models.spec import ArchitectureRow, LinearRole, Stack

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """The names that the section's code defines, run from top to bottom."""
    section = re.search(r"^## Add a model family\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.M | re.S)
    assert section is not None
    names: dict[str, Any] = {"__name__": "orca"}
    for code in re.findall(r"^```python\n(.*?)^```", section[1], re.M | re.S):
        exec(code, names)
    return names


def test_the_family_is_described_as_its_row_says(page: dict[str, Any]) -> None:
    architecture = describe_config(page["OrcaConfig"](num_hidden_layers=3, hidden_size=24, wide=40))
    assert not architecture.inferred
    assert architecture.num_layers == 3
    assert architecture.vocabulary == {"embed": "words", "lm_head": "lm_head"}
    sizes = {name: architecture.size(Space(2, name)) for name in ("attn.in", "attn.key.out", "ffn.mid", "layer.out")}
    assert sizes == {"attn.in": 24, "attn.key.out": 24, "ffn.mid": 40, "layer.out": 24}


def test_its_spaces_are_the_tensors_that_it_computes(page: dict[str, Any], tmp_path: Path) -> None:
    base = tiny.saved(tmp_path / "base", page["OrcaConfig"]())
    model = load_model(str(base))
    block = model.base.blocks[1]
    names = ("attn.in", "attn.value.out", "attn.stream", "ffn.mid", "layer.out")
    ids = torch.arange(10, 26).view(2, 8)
    with torch.inference_mode(), Capture(model, [Space(1, name) for name in names]) as capture:
        held = capture.forward({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        fused = block.triple(held[Space(1, "attn.in")])
        after = held[Space(1, "attn.stream")] + block.slim(held[Space(1, "ffn.mid")])
    torch.testing.assert_close(held[Space(1, "attn.value.out")], fused[..., 64:])
    torch.testing.assert_close(held[Space(1, "layer.out")], after)


def test_a_loras_sites_are_found_in_it(page: dict[str, Any], tmp_path: Path) -> None:
    base = tiny.saved(tmp_path / "base", page["OrcaConfig"]())
    adapted = peft.get_peft_model(load_model(str(base)).base, peft.LoraConfig(r=4, target_modules=["triple", "slim"]))
    adapted.save_pretrained(tmp_path / "lora")
    checkpoint = resolve(read_checkpoint(tmp_path / "lora"), describe_config(page["OrcaConfig"]()))
    roles = ("attn.query", "attn.key", "attn.value", "ffn.down")
    assert set(checkpoint.modules) == {Site(layer, role) for layer in range(2) for role in roles}
    value = checkpoint.modules[Site(1, "attn.value")].tensors
    assert {name: tuple(part.values.shape) for name, part in value.items()} == {"A": (4, 32), "B": (32, 4)}
    other = describe_config(page["OrcaConfig"](num_hidden_layers=1))
    assert [other.has(site) for site in (Site(0, "attn.key"), Site(1, "attn.key"))] == [True, False]


def test_a_later_row_of_the_same_layers_takes_the_place_of_the_older(page: dict[str, Any]) -> None:
    (row,) = rows_of("orca")
    changed = ArchitectureRow(("orca", "killer-whale"), (Stack("blocks", linears(attn_query="a", attn_value="b")),))
    register_architecture(changed)
    assert rows_of("orca") == rows_of("killer-whale") == [changed]
    register_architecture(row)
    assert rows_of("orca") == [row]
    assert rows_of("no-such-model") == []


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (ArchitectureRow((), (Stack("blocks", {}),)), "no model type: a row needs model types and stacks"),
        (ArchitectureRow(("orca",), ()), "orca: a row needs model types and stacks"),
        (ArchitectureRow(("orca",), (Stack("a", {}), Stack("b", {}))), "needs a name of its own"),
        (
            ArchitectureRow(("orca",), (Stack("blocks", {"attn.q": LinearRole("q", "attn.in", "attn.q.out")}),)),
            "orca blocks: no such role of a linear layer; expected attn.query, .*, found attn.q",
        ),
    ],
)
def test_rows_that_cannot_be_are_refused(row: ArchitectureRow, message: str) -> None:
    with pytest.raises(ArchitectureError, match=message):
        register_architecture(row)
