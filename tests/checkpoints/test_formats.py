"""Both libraries' formats in memory: what is built is what is written, and reads as what it was."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers

import tiny
from conftest import needs_adapters
from peft_graft.checkpoints.formats.base import format_of
from peft_graft.checkpoints.formats.peft.format import config_dict
from peft_graft.checkpoints.read import read_checkpoint
from peft_graft.checkpoints.student_names import written_names
from peft_graft.config import Library
from peft_graft.files import read_tensors
from peft_graft.models.loading import blank_handle
from peft_graft.models.tasks import Task
from peft_graft.modules.lora import LoraPart

pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type", "ignore:Adapter 'default'")
TOKENS = {"task_type": "TOKEN_CLS", "num_virtual_tokens": 5}
CONFIGS = {
    "lora": peft.LoraConfig(task_type="TOKEN_CLS", target_modules=["query"], r=4, use_dora=True, bias="lora_only"),
    "ia3": peft.IA3Config(
        task_type="TOKEN_CLS", target_modules=["key", "output.dense"], feedforward_modules=["output.dense"]
    ),
    "norms": peft.LNTuningConfig(task_type="TOKEN_CLS", target_modules=["LayerNorm"]),
    "prompt": peft.PromptTuningConfig(**TOKENS),
    "prefix": peft.PrefixTuningConfig(**TOKENS),
}


def names_of(base: Path, task: Task):
    config = transformers.AutoConfig.from_pretrained(base)
    return written_names(blank_handle(config, str(base)), task)


@pytest.mark.parametrize("kind", CONFIGS)
def test_peft_in_memory_is_peft_in_files(kind: str, tmp_path: Path) -> None:
    base = tiny.base_model(tmp_path / "base", layers=2)
    adapted = peft.get_peft_model(tiny.task_model(base), CONFIGS[kind])
    tiny.randomise_trained(adapted, 1)
    adapted.save_pretrained(tmp_path / "module")
    own = format_of(Library.PEFT)
    state = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    living = own.parse(config_dict(adapted.peft_config["default"]), state)
    stored = read_checkpoint(tmp_path / "module")
    assert (living.library, living.kind) == (Library.PEFT, kind)
    assert living.parts == stored.parts
    assert living.head.keys() == stored.head.keys()
    config, tensors = own.build(stored, names_of(base, stored.task))
    assert own.parse(config, tensors).parts == stored.parts
    (tmp_path / "written").mkdir()
    own.write(tmp_path / "written", stored, names_of(base, stored.task))
    assert json.loads((tmp_path / "written" / "adapter_config.json").read_text()) == json.loads(json.dumps(config))
    written = read_tensors(tmp_path / "written" / "adapter_model.safetensors")
    assert written.keys() == tensors.keys() == state.keys()
    assert all(torch.equal(written[key], state[key]) for key in state)


@needs_adapters
@pytest.mark.parametrize("settings", ["seq_bn", "seq_bn_inv", "lora", "ia3", "prefix_tuning"])
def test_adapters_in_memory_is_adapters_in_files(settings: str, tmp_path: Path) -> None:
    base = tiny.base_model(tmp_path / "base", layers=2)
    tiny.adapterhub_module(tmp_path / "module", base, settings, head=None)
    own, stored = format_of(Library.ADAPTERS), read_checkpoint(tmp_path / "module")
    assert stored.library == Library.ADAPTERS
    config, tensors = own.build(stored, names_of(base, stored.task))
    assert own.parse(config, tensors).parts == stored.parts
    own.write(tmp_path / "module", stored, names_of(base, stored.task))
    assert read_checkpoint(tmp_path / "module").parts == stored.parts


def test_parts_are_equal_bit_for_bit_and_of_one_type() -> None:
    a, b = torch.ones(2, 3), torch.ones(4, 2)
    part = LoraPart(a, b, scaling=2.0)
    assert part == LoraPart(a.clone(), b.clone(), scaling=2.0)
    assert part != LoraPart(a, b, scaling=1.0)
    assert part != LoraPart(a, b, scaling=2.0, bias=torch.zeros(4))
    assert part != part.with_tensors({"B": b + 1})
    assert part.with_tensors({"B": b + 1}).tensors["B"].eq(2).all()
