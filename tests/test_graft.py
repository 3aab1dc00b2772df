"""Grafts in Python: a live PeftModel in, a PeftModel out, saved and read back."""

from __future__ import annotations

import json
import re
from pathlib import Path

import peft
import pytest
import torch
import transformers

import peft_graft
import tiny
from conftest import needs_adapters
from peft_graft import Graft, GraftConfig

COPY = GraftConfig(method="copy")


@pytest.fixture
def adapted(world: Path) -> peft.PeftModel:
    """The teacher with its LoRA inside, as it comes out of a training run."""
    config = peft.PeftConfig.from_pretrained(world / "lora")
    assert config.task_type == "TOKEN_CLS"
    base = transformers.AutoModelForTokenClassification.from_pretrained(world / "teacher", num_labels=5)
    return peft.PeftModel.from_pretrained(base, world / "lora")


def logits(model, folder: Path) -> torch.Tensor:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        return model.eval()(**tokenizer(tiny.sentences(8), padding=True, return_tensors="pt")).logits


def test_a_live_peft_model_gives_the_graft_of_its_files(world, adapted) -> None:
    before = logits(adapted, world / "teacher")
    student = transformers.AutoModel.from_pretrained(world / "narrow")
    config = GraftConfig(method="prune-align", head="fit")
    by_name = peft_graft.transfer(world / "lora", world / "narrow", text=world / "text.txt", config=config)
    live = peft_graft.transfer(adapted, student, text=world / "text.txt", config=config)
    assert live.checkpoint.modules.keys() == by_name.checkpoint.modules.keys()
    for site, module in by_name.checkpoint.modules.items():
        for name, tensor in module.tensors.items():
            assert torch.equal(tensor.values, live.checkpoint.modules[site].tensors[name].values)
    assert torch.equal(logits(adapted, world / "teacher"), before), "the teacher was touched"
    assert not any("lora" in name for name, _ in student.named_parameters()), "the student was touched"


def test_the_model_computes_what_the_files_do_and_trains_on(world, adapted, tmp_path, monkeypatch) -> None:
    graft = peft_graft.transfer(adapted, world / "shallow", config=COPY)
    assert isinstance(graft.model, peft.PeftModel)
    saved = graft.save_pretrained(tmp_path / "graft")
    base = transformers.AutoModelForTokenClassification.from_pretrained(world / "shallow", num_labels=5)
    loaded = peft.PeftModel.from_pretrained(base, saved.folder)
    assert torch.equal(logits(graft.model, world / "shallow"), logits(loaded, world / "shallow"))
    trained = {name for name, value in graft.model.named_parameters() if value.requires_grad}
    assert trained
    assert all("lora_" in name or "classifier" in name for name in trained)
    assert f'<a href="{(tmp_path / "graft" / "report.html").as_uri()}"' in saved._repr_html_()
    monkeypatch.chdir(tmp_path)
    again = Graft.from_pretrained("graft")
    assert '<a href="graft/report.html"' in again._repr_html_()
    assert again.report == saved.report
    assert again.labels == graft.labels
    assert torch.equal(logits(again.model, world / "shallow"), logits(loaded, world / "shallow"))
    moved = peft_graft.transfer(again.model, world / "teacher", config=COPY)  # a graft is a module like any other
    assert len(moved.checkpoint.modules) == 8


def test_a_causal_model_speaks_at_once(tmp_path) -> None:
    for name, layers in (("teacher", 3), ("student", 2)):
        torch.manual_seed(layers)
        config = transformers.LlamaConfig(
            vocab_size=150, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / name)
        tiny.tokenizer(tmp_path / name)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "teacher", dtype=torch.float32)
    adapted = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False))
    student = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.float32)
    inputs = torch.tensor([[1, 20, 30, 40]])
    bare = student(inputs).logits
    graft = peft_graft.transfer(adapted, student, config=COPY)
    saved = graft.save_pretrained(tmp_path / "graft")
    loaded = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.float32), saved.folder
    )
    with torch.inference_mode():
        assert torch.equal(graft.model(inputs).logits, loaded(inputs).logits)
        assert not torch.allclose(graft.model(inputs).logits, bare, atol=1e-3)
        assert torch.equal(student(inputs).logits, bare), "the student was touched"
    said = graft.model.generate(input_ids=inputs, max_new_tokens=8, do_sample=False)
    assert torch.equal(said, loaded.generate(input_ids=inputs, max_new_tokens=8, do_sample=False))


def test_a_graft_that_is_read_back_is_loaded_as_it_was_made_or_as_is_asked(world, tmp_path) -> None:
    config = {"method": "copy", "dtype": "bfloat16"}
    peft_graft.transfer(world / "lora", world / "shallow", out=tmp_path / "graft", config=config)
    assert Graft.from_pretrained(tmp_path / "graft").model.base_model.dtype == torch.bfloat16
    whole = Graft.from_pretrained(tmp_path / "graft", dtype="float32", device="cpu")
    assert (whole.model.base_model.dtype, whole.student.loading.device) == (torch.float32, "cpu")
    four = {"load_in_4bit": True}
    assert Graft.from_pretrained(tmp_path / "graft", quantization_config=four).student.loading.weights == {
        "dtype": torch.bfloat16,
        "quantization_config": four,
    }
    report = json.loads((tmp_path / "graft" / "graft.json").read_text())
    report["settings"]["quantization_config"] = four
    (tmp_path / "graft" / "graft.json").write_text(json.dumps(report))
    assert Graft.from_pretrained(tmp_path / "graft").student.loading.quantization_config == four
    assert (
        Graft.from_pretrained(tmp_path / "graft", quantization_config=None).student.loading.quantization_config is None
    )
    with pytest.raises(peft_graft.GraftError, match="--dtype: unknown choice"):
        Graft.from_pretrained(tmp_path / "graft", dtype="float8")
    with pytest.raises(peft_graft.GraftError, match="tpu"):
        assert Graft.from_pretrained(tmp_path / "graft", device="tpu", quantization_config=None).model


def test_another_student_than_the_graft_was_made_for_is_warned_of(world, tmp_path, caplog) -> None:
    peft_graft.transfer(world / "lora", world / "shallow", out=tmp_path / "graft", config=COPY)
    tiny.base_model(tmp_path / "other", "bert", layers=2, hidden=32, seed=9)
    assert Graft.from_pretrained(tmp_path / "graft", dtype="bfloat16").model  # whose values cannot be compared
    assert Graft.from_pretrained(tmp_path / "graft").model
    assert not caplog.records
    assert Graft.from_pretrained(tmp_path / "graft", student=tmp_path / "other").model
    assert re.search(
        r"other: this is not the model that the graft was made for; expected .*Fix: name .*shallow", caplog.text
    )


@needs_adapters
def test_an_adapter_lies_in_a_model_of_its_library(world, tmp_path) -> None:
    graft = peft_graft.transfer(world / "pfeiffer", world / "shallow", out=tmp_path / "graft", config=COPY)
    first = logits(graft.model, world / "shallow")
    assert first.shape[-1] == 5
    again = Graft.from_pretrained(tmp_path / "graft")
    assert torch.equal(logits(again.model, world / "shallow"), first)


def test_what_is_no_graft_is_named(world, tmp_path) -> None:
    with pytest.raises(peft_graft.GraftError, match="holds no graft"):
        Graft.from_pretrained(world / "lora")
    with pytest.raises(peft_graft.GraftError, match=r"a folder, a hub id, or a peft\.PeftModel"):
        peft_graft.transfer(torch.nn.Linear(2, 2), world / "shallow", config=COPY)
