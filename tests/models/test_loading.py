"""Hugging Face's loading arguments, and models made from configurations alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers

import tiny
from families import DECODERS
from peft_graft.errors import ModelError
from peft_graft.models.architecture import Architecture
from peft_graft.models.loading import (
    Loading,
    ModelHandle,
    blank_handle,
    describe_config,
    load_config,
    load_model,
    load_tokenizer,
    wrap_model,
)

REMOTE_CONFIG = """
from transformers import BertConfig

class RemoteConfig(BertConfig):
    model_type = "remote-bert"
"""


def same_values(first: ModelHandle, second: ModelHandle) -> bool:
    one, other = first.base_tensors(), second.base_tensors()
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def llama(folder: Path, seed: int = 0) -> Path:
    return tiny.saved(folder, DECODERS["llama"], transformers.AutoModelForCausalLM, seed=seed)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A repository in huggingface_hub's cache, of which a branch has other weights than ``main``."""
    repository = tmp_path / "cache" / "models--someone--llama"
    for seed, (revision, commit) in enumerate({"main": "a" * 40, "better": "b" * 40}.items()):
        llama(repository / "snapshots" / commit, seed)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
    # transformers 5 has it no more
    monkeypatch.setattr("transformers.utils.hub.TRANSFORMERS_CACHE", str(tmp_path / "cache"), raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return "someone/llama"


def test_a_revision_is_of_the_model_its_output_layer_and_its_tokenizer(hub: str, tmp_path: Path) -> None:
    first, second = load_model(hub), load_model(hub, Loading(revision="better"), tokenizer=True)
    assert not same_values(first, second)
    assert same_values(second, load_model(str(llama(tmp_path / "same", 1))))
    assert second.tokenizer is not None
    outputs = [handle.base_tensors(output=True)["lm_head.weight"] for handle in (first, second)]
    assert not torch.equal(*outputs)
    with pytest.raises(ModelError, match="someone/llama: the student cannot be loaded"):
        load_config(hub, Loading(revision="none"), role="student")


def test_a_model_in_a_folder_of_its_repository(tmp_path: Path) -> None:
    llama(tmp_path / "repository" / "inner")
    loading = Loading(subfolder="inner")
    handle = load_model(str(tmp_path / "repository"), loading, tokenizer=True)
    assert same_values(handle, load_model(str(tmp_path / "repository" / "inner")))
    assert handle.base_tensors(output=True)["lm_head.weight"].shape == (200, 32)
    assert load_tokenizer(str(tmp_path / "repository"), loading).is_fast
    with pytest.raises(ModelError, match="the model cannot be loaded"):
        load_config(str(tmp_path / "repository"))


@pytest.mark.parametrize("where", ["cpu", {"": "cpu"}])
def test_a_device_map_is_accelerates(tmp_path: Path, where: object) -> None:
    base = llama(tmp_path / "base")
    assert same_values(load_model(str(base), Loading(device_map=where, device="cpu")), load_model(str(base)))


def test_quantised_while_it_is_loaded(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    handle = load_model(str(llama(tmp_path / "base")), Loading(quantization_config=settings))
    assert handle.base.is_quantized
    plain, found = load_model(str(tmp_path / "base")).base_tensors(), handle.base_tensors()
    name = "layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(found[name].float(), plain[name], atol=0.2, rtol=0.2)
    assert settings == {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def test_model_code_of_a_repository_runs_only_if_it_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda _: pytest.fail("asked on the terminal"))
    base = tiny.base_model(tmp_path / "base", layers=2)
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "remote-bert", "auto_map": {"AutoConfig": "code.RemoteConfig"}}
    (base / "config.json").write_text(json.dumps(config))
    (base / "code.py").write_text(REMOTE_CONFIG)
    with pytest.raises(ModelError) as refused:
        load_model(str(base), role="teacher")
    assert "the teacher needs model code that comes with its repository" in str(refused.value)
    assert "--trust-remote-code" in str(refused.value)
    assert "\n" not in str(refused.value)
    modules = tmp_path / "modules"
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(modules))
    monkeypatch.syspath_prepend(modules)
    assert load_config(str(base), Loading(trust_remote_code=True)).model_type == "remote-bert"


def test_a_token_is_not_shown() -> None:
    assert "secret" not in repr(Loading(token="secret"))


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_a_blank_model_has_the_shapes_of_a_loaded_one(family: str, tmp_path: Path) -> None:
    config = DECODERS[family]
    blank = blank_handle(config)
    loaded = load_model(str(tiny.saved(tmp_path / "base", config, transformers.AutoModelForCausalLM)))
    assert blank.is_blank
    assert not loaded.is_blank
    first, second = (handle.base_tensors(output=True) for handle in (blank, loaded))
    assert {name: value.shape for name, value in first.items()} == {name: value.shape for name, value in second.items()}
    assert all(value.is_meta for value in first.values())
    assert shape_of(blank.architecture) == shape_of(loaded.architecture) == shape_of(describe_config(config))


def shape_of(architecture: Architecture) -> tuple:
    return architecture.row, architecture.prefix, dict(architecture.sizes), dict(architecture.vocabulary)


def test_a_model_in_memory_finds_its_tokenizer_only_when_asked(tmp_path: Path) -> None:
    base = llama(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    assert wrap_model(model).tokenizer is None
    found = wrap_model(model, find_tokenizer=True)
    assert found.tokenizer is not None
    assert found.name == str(base)
    assert torch.equal(found.base_tensors(output=True)["lm_head.weight"], model.lm_head.weight)
    shutil.rmtree(base)
    with pytest.raises(ModelError, match="the student's tokenizer cannot be loaded"):
        wrap_model(model, find_tokenizer=True, role="student")


def test_weights_that_become_infinite_in_half_precision_are_named(world, tmp_path) -> None:
    model = transformers.AutoModel.from_pretrained(world / "teacher")
    with torch.no_grad():
        model.encoder.layer[1].output.dense.weight[0, 0] = 1e6
    model.save_pretrained(tmp_path / "hot")
    load_model(str(tmp_path / "hot"))
    with pytest.raises(ModelError) as refused:
        load_model(str(tmp_path / "hot"), Loading(dtype="float16"), role="teacher")
    assert str(refused.value) == (
        f"teacher {tmp_path / 'hot'}: weights are too large for float16; found infinity or NaN in "
        "encoder.layer.1.output.dense.weight. Fix: give --dtype bfloat16 or float32"
    )


@pytest.mark.parametrize("form", ["whole", "sharded", "bin"])
def test_an_output_layer_is_read_without_the_rest(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for checkpoints that are no safetensors, of which all is loaded."""
    shape = {"vocab_size": 200, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = transformers.PhiConfig(**shape, num_attention_heads=4, num_key_value_heads=2)  # with a bias
    model = transformers.AutoModelForCausalLM.from_config(config)
    torch.nn.init.normal_(model.lm_head.bias)
    options = {"whole": {}, "sharded": {"max_shard_size": "20KB"}, "bin": {"safe_serialization": False}}[form]
    if form == "bin" and int(transformers.__version__.split(".")[0]) >= 5:
        model.config.save_pretrained(tmp_path)
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    else:
        model.save_pretrained(tmp_path, **options)
    assert (form == "sharded") == (tmp_path / "model.safetensors.index.json").exists()
    handle = load_model(str(tmp_path))
    whole = []
    load = transformers.AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM, "from_pretrained", lambda *a, **k: whole.append(a) or load(*a, **k)
    )
    assert torch.equal(handle.base_tensors(output=True)["lm_head.weight"], model.lm_head.weight)
    assert torch.equal(handle.output_bias, model.lm_head.bias)
    assert len(whole) == (form == "bin")
