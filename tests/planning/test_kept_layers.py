"""Layers that a student has kept of its teacher, told by their weights."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import peft_graft
import tiny
from peft_graft.config import GraftConfig
from peft_graft.errors import PlanError
from peft_graft.models.loading import ModelPair, blank_handle, load_config
from peft_graft.models.pair import load_pair
from peft_graft.planning.kept_layers import with_kept_layers


def cut(folder: Path, teacher: Path, layers: list[int], *, noise: float = 0.0) -> Path:
    """A student of some of a teacher's layers, which have changed a little since."""
    shutil.copytree(teacher, folder)
    model = transformers.AutoModel.from_pretrained(teacher)
    model.encoder.layer = nn.ModuleList([copy.deepcopy(model.encoder.layer[layer]) for layer in layers])
    model.config.num_hidden_layers = len(layers)
    with torch.no_grad():
        for value in model.encoder.parameters():
            value.add_(noise * value.std(correction=0) * torch.randn(value.shape))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.base_model(tmp_path_factory.mktemp("kept") / "teacher", layers=4)


def planned(teacher: Path, student: Path) -> tuple[str, list[str]]:
    """The same before any weights are loaded."""
    handles = (blank_handle(load_config(str(model)), str(model)) for model in (teacher, student))
    return with_kept_layers("auto", ModelPair(*handles))


def found(teacher: Path, student: Path, layers: str = "auto") -> tuple[str, list[str]]:
    return with_kept_layers(layers, load_pair(str(teacher), str(student), GraftConfig(), tokenizers=False))


@pytest.mark.parametrize("layers", [[1, 3], [0, 1, 3], [2], [3, 3, 0]])
def test_kept_layers_are_found_though_they_were_trained_on(teacher: Path, tmp_path: Path, layers: list[int]) -> None:
    spec = ",".join(map(str, layers))
    expected = (spec, [f"the student's layers have the weights of the teacher's layers {spec}"])
    assert found(teacher, cut(tmp_path / "student", teacher, layers, noise=0.5)) == expected


@pytest.mark.parametrize("form", ["one file", "shards", "a task model's", "no safetensors", "broken"])
def test_a_plan_tells_them_by_files_alone(teacher: Path, tmp_path: Path, form: str) -> None:
    student = cut(tmp_path / "student", teacher, [1, 3])
    file = student / "model.safetensors"
    if form == "shards":
        model = transformers.AutoModel.from_pretrained(student)
        file.unlink()
        model.save_pretrained(student, max_shard_size="20KB")
        assert len(list(student.glob("*.safetensors"))) > 2
    elif form == "a task model's":
        transformers.AutoModelForTokenClassification.from_pretrained(student).save_pretrained(student)
        assert "bert.encoder.layer.0.output.dense.weight" in load_file(file)
    elif form == "no safetensors":
        torch.save(load_file(file), student / "pytorch_model.bin")
        file.unlink()
    elif form == "broken":
        file.write_bytes(file.read_bytes()[:100])
    told = form not in ("no safetensors", "broken")
    assert planned(teacher, student) == (found(teacher, student) if told else ("auto", []))
    assert planned(teacher, student)[0] == ("1,3" if told else "auto")


def test_inspect_shows_the_layers_that_transfer_takes(teacher: Path, tmp_path: Path) -> None:
    student = cut(tmp_path / "student", teacher, [1, 3])
    tiny.peft_lora(tmp_path / "lora", teacher)
    summary = peft_graft.inspect(tmp_path / "lora", student).student
    assert summary.layers == [[1], [3]]
    assert summary.notes[0] == "the student's layers have the weights of the teacher's layers 1,3"
    assert peft_graft.inspect(tmp_path / "lora", student, config={"layers": "skip"}).student.layers == [[0], [2]]


def test_what_skip_takes_anyway_needs_no_remark(teacher: Path, tmp_path: Path) -> None:
    assert found(teacher, cut(tmp_path / "student", teacher, [0, 2])) == ("auto", [])


@pytest.mark.parametrize("shape", [{"seed": 5, "layers": 2}, {"seed": 5, "layers": 2, "hidden": 16}])
def test_layers_of_another_model_are_none_of_the_teachers(teacher: Path, tmp_path: Path, shape: dict[str, int]) -> None:
    assert found(teacher, tiny.base_model(tmp_path / "student", **shape)) == ("auto", [])


def test_one_new_layer_leaves_the_choice_as_it_was(teacher: Path, tmp_path: Path) -> None:
    student = cut(tmp_path / "student", teacher, [1, 3])
    model = transformers.AutoModel.from_pretrained(student)
    tiny.lively(model.encoder.layer[1], seed=9)
    model.save_pretrained(student)
    assert found(teacher, student) == ("auto", [])


@pytest.mark.parametrize("layers", ["skip", "avg", "0,1"])
def test_what_is_asked_for_is_done(teacher: Path, tmp_path: Path, layers: str) -> None:
    assert found(teacher, cut(tmp_path / "student", teacher, [1, 3]), layers) == (layers, [])


def test_a_stack_that_kept_others_is_named(tmp_path: Path) -> None:
    config = transformers.BartConfig(
        vocab_size=200, d_model=32, encoder_layers=4, decoder_layers=4, encoder_attention_heads=4, pad_token_id=0,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=72,
    )  # fmt: skip
    teacher = tiny.saved(tmp_path / "teacher", config)
    shutil.copytree(teacher, tmp_path / "student")
    model = transformers.AutoModel.from_pretrained(teacher)
    model.encoder.layers = nn.ModuleList([model.encoder.layers[layer] for layer in (2, 3)])
    model.config.encoder_layers = 2
    model.save_pretrained(tmp_path / "student")
    layers, notes = found(teacher, tmp_path / "student")
    assert layers == "encoder=2,3;decoder=auto"
    assert notes == ["the student's encoder layers have the weights of the teacher's layers 2,3"]


def test_layers_that_are_not_all_alike_are_told_by_what_they_have_in_common(tmp_path: Path) -> None:
    """Only the first layer of a T5 has a table of positions."""
    config = transformers.T5Config(
        vocab_size=200, d_model=32, d_kv=8, d_ff=48, num_layers=4, num_decoder_layers=2, num_heads=4, pad_token_id=0
    )
    teacher = tiny.saved(tmp_path / "teacher", config)
    shutil.copytree(teacher, tmp_path / "student")
    model = transformers.AutoModel.from_pretrained(teacher)
    positions = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
    model.encoder.block = nn.ModuleList([model.encoder.block[layer] for layer in (1, 3)])
    attention = model.encoder.block[0].layer[0].SelfAttention
    attention.relative_attention_bias, attention.has_relative_attention_bias = positions, True
    model.config.num_layers = 2
    model.save_pretrained(tmp_path / "student")
    assert found(teacher, tmp_path / "student")[0] == "encoder=1,3;decoder=auto"


@pytest.mark.parametrize("aligned", [False, True])
def test_modules_move_from_the_layers_that_were_kept(teacher: Path, tmp_path: Path, *, aligned: bool) -> None:
    """And so are models aligned, without a word of it in the command."""
    student = cut(tmp_path / "student", teacher, [1, 3])
    tiny.peft_lora(tmp_path / "lora", teacher)
    options = {}
    if aligned:
        tiny.align(teacher, student, text=tiny.sentences(), out=tmp_path / "alignment", method="procrustes")
        options = {"alignment": tmp_path / "alignment"}
    else:
        options = {"method": "copy"}
    graft = tiny.transfer(tmp_path / "lora", student, out=tmp_path / "graft", **options)
    assert graft.report.layers == [[1], [3]]
    assert "the student's layers have the weights of the teacher's layers 1,3" in graft.report.notes
    assert not any("left out" in note and "1, 3" in note for note in graft.report.notes)
    with pytest.raises(PlanError, match="the layer map has the wrong length"):
        tiny.transfer(tmp_path / "lora", student, method="copy", layers="1")
