"""Models that read images or sound, alone or beside text."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
import transformers
from peft import PeftModel
from PIL import Image

import tiny
from families import TOWERS, options, same_module, trained
from peft_graft.checkpoints.read import read_checkpoint
from peft_graft.errors import PlanError

#: By their names in transformers 4 and 5.
VIT_TARGETS = ["query", "value", "intermediate.dense", "q_proj", "v_proj", "fc1"]


def tower(folder: Path, family: str, seed: int = 0, **changes) -> Path:
    config = TOWERS[family]
    config = type(config)(**{**config.to_dict(), **changes})
    tiny.lively(transformers.AutoModel.from_config(config), seed).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", TOWERS)
def test_modules_of_towers_return_and_are_recognised(family: str, tmp_path: Path) -> None:
    base = tower(tmp_path / "base", family)
    targets = VIT_TARGETS if family in ("vit", "deit") else ["q_proj", "v_proj"]
    trained(tmp_path / "module", base, targets, None, "AutoModel")
    graft = tiny.transfer(tmp_path / "module", student=base, method="copy", out=tmp_path / "graft")
    assert graft.report.verification.done
    same_module(tmp_path / "module", tmp_path / "graft")
    found = tiny.inspect(tmp_path / "module", student=base, method="copy" if family != "clip_text_model" else "auto")
    assert found.teacher_problem is None
    assert found.student.problem is None
    stacks = {"clip": {"text", "vision"}, "siglip": {"text", "vision"}, "whisper": {"encoder", "decoder"}}
    assert {site.role.rpartition(".attn.")[0] for site in found.sites} - {""} == stacks.get(family, set())
    assert (found.student.method == "copy") == (family != "clip_text_model")


def test_a_vision_module_and_its_head_move_to_a_shallower_model(tmp_path: Path) -> None:
    base, other = tower(tmp_path / "base", "vit"), tower(tmp_path / "other", "vit", 1, num_hidden_layers=1)
    side = TOWERS["vit"].image_size
    transformers.ViTImageProcessor(size={"height": side, "width": side}).save_pretrained(other)
    model = transformers.AutoModelForImageClassification.from_pretrained(base, num_labels=3)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=VIT_TARGETS, modules_to_save=["classifier"])
    )
    tiny.randomise(adapted, 1, ("lora_", "modules_to_save.default"))
    adapted.save_pretrained(tmp_path / "module")
    graft = tiny.transfer(tmp_path / "module", student=other, method="copy", layers="avg", out=tmp_path / "graft")
    assert graft.report.verification.done
    assert graft.report.head.task == "image-classification"
    assert graft.report.layers == [[0, 1]]
    fresh = transformers.AutoModelForImageClassification.from_pretrained(other, num_labels=3)
    moved = PeftModel.from_pretrained(fresh, tmp_path / "graft")
    key = "base_model.model.classifier.modules_to_save.default.weight"
    assert torch.equal(moved.state_dict()[key], adapted.state_dict()[key])
    assert transformers.AutoImageProcessor.from_pretrained(tmp_path / "graft", use_fast=False).size["height"] == side
    assert len(graft.pipeline()(Image.new("RGB", (40, 30), "red"))) == 3


def test_one_tower_of_two_and_whisper_with_its_task(tmp_path: Path) -> None:
    both, eye = tower(tmp_path / "clip", "clip"), tower(tmp_path / "eye", "clip_vision_model", 1)
    trained(tmp_path / "module", eye, ["q_proj", "v_proj"], None, "AutoModel")
    graft = tiny.transfer(tmp_path / "module", student=both, method="copy", out=tmp_path / "graft")
    assert graft.report.verification.done
    assert {site.role for site in graft.checkpoint.modules} == {"vision.attn.query", "vision.attn.value"}
    base = tower(tmp_path / "whisper", "whisper")
    trained(tmp_path / "of-whisper", base, ["q_proj", "v_proj"], None, "AutoModelForSpeechSeq2Seq")
    small = tower(tmp_path / "small", "whisper", 1, encoder_layers=1, decoder_layers=1)
    graft = tiny.transfer(tmp_path / "of-whisper", student=small, method="copy", out=tmp_path / "speech")
    assert graft.report.verification.done
    assert read_checkpoint(tmp_path / "speech").task == "seq2seq-lm"
    assert "AutoModelForSpeechSeq2Seq" in (tmp_path / "speech" / "README.md").read_text()


@pytest.mark.parametrize(("family", "auto", "task"), [("whisper", "AutoModelForSpeechSeq2Seq", "SEQ_2_SEQ_LM"),
                                                       ("vit", "AutoModel", "FEATURE_EXTRACTION")])  # fmt: skip
def test_modules_whose_task_type_is_one_of_text(family: str, auto: str, task: str, tmp_path: Path) -> None:
    """What peft makes of them generates and merges, but its ``forward`` asks for tokens."""
    base = tower(tmp_path / "base", family)
    trained(tmp_path / "module", base, VIT_TARGETS if family == "vit" else ["q_proj", "v_proj"], task, auto)
    graft = tiny.transfer(tmp_path / "module", student=base, method="copy", out=tmp_path / "graft")
    assert graft.report.verification.done
    same_module(tmp_path / "module", tmp_path / "graft")


def test_text_is_refused_for_what_reads_images_or_sound(tmp_path: Path, text: Path) -> None:
    base = tower(tmp_path / "vit", "vit")
    trained(tmp_path / "module", base, VIT_TARGETS, None, "AutoModel")
    reason = "a vit model reads images; aligning on those is not supported yet.*--method copy"
    for how in ({}, {"text": text}, {"method": "prune-align"}, {"method": "prune-align", "text": text},
                {"method": "copy", "polish": 5}):  # fmt: skip
        with pytest.raises(PlanError, match=reason):
            tiny.transfer(tmp_path / "module", student=base, **how)
    model = transformers.AutoModel.from_pretrained(base)
    with pytest.raises(PlanError, match=reason):
        tiny.transfer_live(tmp_path / "module", model, model)
    speech = tower(tmp_path / "whisper", "whisper")
    with pytest.raises(PlanError, match="a whisper model reads sound"):
        tiny.align(speech, speech, text=text)
    narrow = tower(tmp_path / "narrow", "vit", hidden_size=24)
    with pytest.raises(PlanError, match="can only be aligned on text.*expected 32 units.*found 24"):
        tiny.transfer(tmp_path / "module", student=narrow, method="copy")
    for method, said in (("copy", "can only be aligned on text"), ("auto", "choosing a method works on text")):
        assert said in tiny.inspect(tmp_path / "module", student=narrow, method=method).student.problem
    with pytest.raises(PlanError, match="no counterpart"):
        tiny.transfer(tmp_path / "module", student=tiny.base_model(tmp_path / "bert", layers=2), method="copy")


def test_clips_text_tower_alone_aligns_on_text(tmp_path: Path, text: Path) -> None:
    base, other = tiny.base_model(tmp_path / "bert", layers=2, hidden=24), tower(tmp_path / "clip", "clip_text_model")
    tiny.tokenizer(other)
    tiny.peft_lora(tmp_path / "module", base, task="base", targets=["query", "value", "output.dense"])
    graft = tiny.transfer(tmp_path / "module", student=other, out=tmp_path / "graft", **options(text))
    assert graft.report.verification.done
