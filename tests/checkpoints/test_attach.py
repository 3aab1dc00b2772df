"""Modules put into models in memory: as their libraries load them from files, read back, and changed in place."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
import transformers

import tiny
from conftest import needs_adapters
from peft_graft.checkpoints.attach import attach, attach_written
from peft_graft.checkpoints.formats.base import write_checkpoint
from peft_graft.checkpoints.raw import RawCheckpoint
from peft_graft.checkpoints.read import read_checkpoint
from peft_graft.checkpoints.student_names import written_names
from peft_graft.models.loading import ModelHandle, load_model, wrap_model

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
CLASSES = {"SEQ_CLS": "SequenceClassification", "TOKEN_CLS": "TokenClassification", "CAUSAL_LM": "CausalLM"}
KINDS = {
    "lora": lambda: peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"]),
    "lora with biases": lambda: peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], bias="lora_only", lora_bias=True
    ),
    "dora": lambda: peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], use_dora=True),
    "ia3": lambda: peft.IA3Config(
        task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "norms": lambda: peft.LNTuningConfig(task_type="CAUSAL_LM"),
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "rows of a vocabulary": lambda: peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]
    ),
    "rows of some tokens": lambda: peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], trainable_token_indices=[3, 7]
    ),
    "lora of embeddings": lambda: peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "embed_tokens"]
    ),
    "a classification head": lambda: peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj"]),
    "a head of tokens": lambda: peft.LoraConfig(task_type="TOKEN_CLS", r=4, target_modules=["q_proj"]),
    "a prompt and a head": lambda: peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3),
}
ADDED_TOKENS = 3


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    config = transformers.LlamaConfig(
        vocab_size=150, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, attention_bias=True,
    )  # fmt: skip
    return tiny.saved(tmp_path_factory.mktemp("base") / "llama", config, transformers.AutoModelForCausalLM)


def trained(folder: Path, base: Path, kind: str) -> RawCheckpoint:
    config = KINDS[kind]()
    auto = getattr(transformers, f"AutoModelFor{CLASSES[config.task_type]}")
    model = auto.from_pretrained(base)
    if kind == "rows of a vocabulary":
        model.resize_token_embeddings(150 + ADDED_TOKENS)
    adapted = peft.get_peft_model(model, config)
    tiny.randomise_trained(adapted, 2)
    adapted.save_pretrained(folder)
    return read_checkpoint(folder)


def outputs(attached, ids: torch.Tensor) -> list[torch.Tensor]:
    with torch.inference_mode():
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return [*attached.forward(batch), attached.forward(batch, module=False)[1]]


def written(folder: Path, raw: RawCheckpoint, model: ModelHandle) -> Path:
    folder.mkdir()
    write_checkpoint(folder, raw, written_names(model, raw.task))
    return folder


IDS = torch.randint(10, 100, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trainable", [False, True])
def test_in_memory_a_module_computes_what_its_file_does(base, tmp_path, kind: str, trainable: bool) -> None:
    raw, model = trained(tmp_path / "m", base, kind), load_model(str(base))
    attached = attach(raw, model, trainable=trainable)
    if trainable:
        assert attached.trainable()
        assert all(value.dtype == torch.float32 for value in attached.trainable().values())
    loaded = attach_written(written(tmp_path / "w", raw, model), raw, model)
    for found, expected in zip(outputs(attached, IDS), outputs(loaded, IDS), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", [*KINDS, pytest.param("pfeiffer", marks=needs_adapters)])
def test_values_go_in_and_come_out(world, base, tmp_path, kind: str) -> None:
    if kind == "pfeiffer":
        raw, model = read_checkpoint(world / "pfeiffer"), load_model(str(world / "teacher"))
    else:
        raw, model = trained(tmp_path / "m", base, kind), load_model(str(base))
    attached = attach(raw, model, trainable=True)
    before = outputs(attached, IDS)[1]

    def changed(values):
        return {name: 1.5 * value for name, value in values.items()}

    other = replace(
        raw,
        parts={path: part.with_tensors(changed(part.tensors)) for path, part in raw.parts.items()},
        head=changed(raw.head),
    )
    assert attached.takes(other)
    attached.load(other)
    found = attached.raw()
    assert found.parts.keys() == other.parts.keys()
    for path, part in other.parts.items():
        for name, value in part.tensors.items():
            torch.testing.assert_close(found.parts[path].tensors[name], value, rtol=0, atol=0)
    for name, value in other.head.items():
        torch.testing.assert_close(found.head[name], value, rtol=0, atol=0)
    after = outputs(attached, IDS)[1]
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, outputs(attach(other, model), IDS)[1])
    attached.load(raw)
    torch.testing.assert_close(outputs(attached, IDS)[1], before, rtol=0, atol=0)
    if raw.kind == "lora":
        path = next(iter(raw.parts))
        assert not attached.takes(replace(raw, parts={path: raw.parts[path]}))


@pytest.mark.parametrize("whole", [True, False])
def test_a_module_is_attached_beside_offloaded_weights(base, tmp_path, whole: bool) -> None:
    """With a task model around the base and without, which peft's own loader tells apart."""
    auto = transformers.AutoModelForCausalLM if whole else transformers.AutoModel
    adapted = peft.get_peft_model(
        auto.from_pretrained(base),
        peft.LoraConfig(task_type="CAUSAL_LM" if whole else None, r=4, target_modules=["q_proj", "down_proj"]),
    )
    tiny.randomise_trained(adapted, 2)
    adapted.save_pretrained(tmp_path / "m")
    raw = read_checkpoint(tmp_path / "m")
    where = {"embed_tokens": "cpu", "layers": "disk", "norm": "cpu", "rotary_emb": "cpu"}
    offloaded = wrap_model(
        transformers.AutoModel.from_pretrained(base, device_map=where, offload_folder=tmp_path / "offloaded")
    )
    expected = outputs(attach(raw, load_model(str(base))), IDS)
    attached = attach(raw, offloaded, trainable=True)
    assert not any(value.is_meta for value in attached.trainable().values())
    for found, wanted in zip(outputs(attached, IDS)[1:], expected[1:], strict=True):
        torch.testing.assert_close(found, wanted)
    attached.forward({"input_ids": IDS})[1].sum().backward()
    assert all(value.grad is not None for value in attached.trainable().values())
