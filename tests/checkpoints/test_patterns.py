"""Patterns of layers in peft's configurations: what peft finds, in a time that does not depend on who wrote them."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import peft
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

import tiny
from peft_graft.checkpoints.formats.peft.patterns import Patterns
from peft_graft.checkpoints.read import read_checkpoint
from peft_graft.errors import CheckpointError

PATHS = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(12) for name in "qkvo"]
PATTERNS = [
    "q_proj", "layers.1.self_attn.q_proj", "layers.1..self_attn.v_proj", r"layers\.3\..*",
    r"layers\.1\.self_attn\.o_proj",
    "self.attn.o_proj", ".*v_proj", "^model.layers.7.self_attn.q_proj", "layers.(4|5).*o_proj", "proj", "attn.o_proj",
    "model.layers.2.self_attn.k_proj", "layers.11.self_attn.q_proj", "q_proj|k_proj", "self_attn",
]  # fmt: skip
#: An expression that takes longer than anyone waits, even in paths as short as these.
BOMB = r"(?:.|..|...)+\d\d\d[a-z]"


@given(st.lists(st.sampled_from(PATTERNS), min_size=1, unique=True), st.sampled_from(PATHS))
@settings(deadline=None, max_examples=200)
def test_a_path_has_the_value_that_peft_gives_it(patterns: list[str], path: str) -> None:
    values = {pattern: float(number) for number, pattern in enumerate(patterns)}
    assert Patterns(values, "").at(path, -1.0) == values.get(get_pattern_key(patterns, path), -1.0)


def test_a_hundred_thousand_names_are_looked_up() -> None:
    begun = time.process_time()
    for name in ("layers.{}.self_attn.q_proj", r"layers\.{}\.self_attn\.q_proj"):
        found = Patterns({name.format(number): float(number) for number in range(50_000)}, "")
        assert [found.at(path, -1.0) for path in PATHS[:9]] == [0, -1, -1, -1, 1, -1, -1, -1, 2]
    assert time.process_time() - begun < 5


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ([BOMB], r"take too long to search; expected .*, found \(\?:\.\|"),
        (["q(" * 2000], "take too long to search; expected regular expressions of 1,000 characters at most"),
        (["(q_proj"], r"is no regular expression \(error: missing \).*; found \(q_proj\. Fix: write the layer's path"),
    ],
)
def test_expressions_are_bounded(patterns, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft_graft.checkpoints.formats.peft.patterns.SECONDS", 0.1)
    found = Patterns(dict.fromkeys(patterns, 1.0), "adapter_config.json")
    begun = time.process_time()
    with pytest.raises(CheckpointError, match=f"^adapter_config.json: .*{message}"):
        for path in PATHS:
            found.at(path, 0.0)
    assert time.process_time() - begun < 3


@pytest.mark.parametrize("kind", ["lora", "loha"])
def test_expressions_of_a_configuration_never_run_as_they_are(kind: str, world: Path, tmp_path: Path) -> None:
    """Where peft itself is asked to load a module, it is given the layers' paths."""
    if kind == "lora":
        module = Path(shutil.copytree(world / "lora", tmp_path / "module"))
    else:
        config = peft.LoHaConfig(
            task_type="TOKEN_CLS", target_modules=["query", "value"], r=2, rank_pattern={"value": 3}
        )
        adapted = peft.get_peft_model(tiny.task_model(world / "teacher"), config)
        tiny.randomise_trained(adapted, 1)
        adapted.save_pretrained(tmp_path / "module")
        module = tmp_path / "module"
    before = read_checkpoint(module)
    path = module / "adapter_config.json"
    hostile = {"target_modules": BOMB, "exclude_modules": BOMB, "layers_pattern": BOMB}
    path.write_text(json.dumps(json.loads(path.read_text()) | hostile))
    begun = time.process_time()
    graft = tiny.transfer(module, student=world / "teacher", method="copy", out=tmp_path / "graft")
    assert graft.report.verification.done
    assert read_checkpoint(module).parts == before.parts
    assert time.process_time() - begun < 30
