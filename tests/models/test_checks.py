"""What is no model, or none that can be loaded here, is said in one line before any weights are read."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers

import tiny
from families import COMMON, FFN
from peft_graft.errors import DependencyError, ModelError
from peft_graft.models.loading import Loading, describe_config, load_config, load_model, load_tokenizer
from peft_graft.models.task_models import blank_model
from peft_graft.models.tasks import Task

LLAMA = transformers.LlamaConfig(**COMMON, **FFN)


def same_words(module: Path, student: Path, **options) -> str:
    """Why ``transfer`` refuses, which ``inspect`` says in the same words."""
    with pytest.raises((ModelError, DependencyError)) as refused:
        tiny.transfer(module, student, method="copy", **options)
    found = tiny.inspect(module, student, method="copy", **options)
    assert found.student.problem == str(refused.value)
    return str(refused.value)


def test_weights_that_cannot_be_read_here(world: Path, tmp_path: Path) -> None:
    base = shutil.copytree(world / "teacher", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    settings = {"quant_method": "unheard-of", "bits": 4}
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    said = same_words(world / "lora", world / "narrow", teacher=base)
    assert said.startswith(f"{base}: the teacher's weights are quantised by unheard-of, and cannot be loaded here (")
    assert said.endswith("Fix: install that library, or give the same model in 16 bit with --teacher")
    if transformers.utils.is_bitsandbytes_available():
        return
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    assert "the student's weights are quantised by bitsandbytes" in same_words(world / "lora", base)
    with pytest.raises(DependencyError, match="quantised by bitsandbytes"):
        load_config(str(world / "teacher"), Loading(quantization_config={"load_in_8bit": True}))


def test_a_module_is_no_model(world: Path, tmp_path: Path) -> None:
    module = world / "lora"
    for role, said in (
        ("student", same_words(module, module)),
        ("teacher", same_words(module, world / "narrow", teacher=module)),
    ):
        assert said == (
            f"{module}: the {role} is a trained module, not a model; expected config.json, found adapter_config.json. "
            f"Fix: give {world / 'teacher'} with --{role}; for a model with this module inside, merge it into "
            f"{world / 'teacher'} first (merge_and_unload, save_pretrained) and give that"
        )
    both = shutil.copytree(world / "teacher", tmp_path / "both")
    shutil.copy(module / "adapter_config.json", both)
    assert same_words(module, both) == (
        f"{both}: a trained module lies beside the student, and transformers would put it into the model; found "
        "adapter_config.json. Fix: give a folder without it, or the model with the module merged into it "
        "(merge_and_unload, save_pretrained)"
    )


def test_a_folder_or_file_that_is_no_model(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "narrow", tmp_path / "outer" / "0_Transformer")
    assert same_words(world / "lora", tmp_path / "outer") == (
        f"{tmp_path / 'outer'}: the student cannot be loaded: the folder holds no model; expected config.json, found "
        "0_Transformer. Fix: give one of its sub-folders: 0_Transformer"
    )
    weights = world / "narrow" / "model.safetensors"
    assert "the student cannot be loaded: this is a file" in same_words(world / "lora", weights)
    gone = tmp_path / "gone"
    assert same_words(world / "lora", world / "narrow", teacher=gone) == (
        f"{gone}: the teacher cannot be loaded: there is no folder of this name. Fix: with --teacher, give a model's "
        "folder, or a hub id that can be reached from here"
    )


def test_a_base_on_the_hub_that_cannot_be_reached() -> None:
    with pytest.raises(
        ModelError, match=r"there is no folder .*: with --teacher, give .*from here; the same model in 16"
    ):
        load_config("unsloth/llama-3-8b-bnb-4bit", role="teacher")


def test_no_code_runs_that_was_not_asked_for(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, ran = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(world / "teacher", folder)
    (folder / "code.py").write_text(f"open({str(ran)!r}, 'w').close()")
    config = json.loads((folder / "config.json").read_text())
    classes = [*("AutoModel", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForImageClassification"),
               "AutoAdapterModel"]  # fmt: skip
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": dict.fromkeys(classes, "code.Class")}))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 20))
    found = load_config(str(folder))
    for task in Task:
        if task not in (Task.SEQ2SEQ_LM, Task.IMAGE_CLASSIFICATION):
            blank_model(found, task)
            continue
        with pytest.raises(ModelError, match="has no .* model of this kind"):
            blank_model(found, task)
    assert type(load_model(str(folder)).base).__name__ == "BertModel"
    load_tokenizer(str(folder))
    unknown = {**config, "model_type": "of-its-own", "auto_map": {"AutoConfig": "code.Config"}}
    (folder / "config.json").write_text(json.dumps(unknown))
    with pytest.raises(ModelError, match="needs model code that comes with its repository"):
        load_config(str(folder))
    assert not ran.exists()
    assert sys.stdin.read() == "y\n" * 20


def test_a_task_that_the_model_has_no_class_for(world: Path) -> None:
    with pytest.raises(ModelError, match=r"has no seq2seq-lm model of this kind; expected.*found llama"):
        blank_model(LLAMA, Task.SEQ2SEQ_LM)


@pytest.mark.skipif(not hasattr(transformers, "ApertusConfig"), reason="transformers is older than this model")
def test_a_model_that_looks_at_its_buffers_while_it_is_built() -> None:
    config = transformers.ApertusConfig(**COMMON, **FFN, num_key_value_heads=2)
    assert describe_config(config).depths == {"": 2}
    assert all(value.device == torch.device("meta") for value in blank_model(config, Task.CAUSAL_LM).parameters())


def test_a_model_that_cannot_be_built() -> None:
    broken = transformers.LlamaConfig(**COMMON, **FFN, hidden_act="unheard-of")
    with pytest.raises(ModelError, match=r"llama: the model cannot be built from its configuration \(.*unheard-of"):
        describe_config(broken)
