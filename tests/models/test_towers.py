"""Models that read images beside text: a module of theirs is known by the text tower, whatever its layers' names."""

from __future__ import annotations

import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import tiny
from families import EYE, trained
from peft_graft.errors import CheckpointError
from peft_graft.models.loading import describe_config
from peft_graft.models.spaces import Site
from peft_graft.models.tasks import Task

TEXT = {"vocab_size": 200, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}  # fmt: skip
ROPE = {"rope_type": "default", "type": "default", "mrope_section": [1, 1, 1]}
SEES = {
    "llava": lambda: transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT), vision_config=transformers.CLIPVisionConfig(**EYE),
        image_token_index=190,
    ),
    "gemma3": lambda: transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(**TEXT, head_dim=6),
        vision_config=transformers.SiglipVisionConfig(**EYE), mm_tokens_per_image=4,
    ),
    "qwen2_vl": lambda: transformers.Qwen2VLConfig(
        text_config={**TEXT, "rope_scaling": ROPE, "rope_parameters": {**ROPE, "rope_theta": 1e4},
                     "tie_word_embeddings": False},
        vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 24, "num_heads": 2, "mlp_ratio": 2},
    ),
    "idefics3": lambda: transformers.Idefics3Config(
        text_config=transformers.LlamaConfig(**TEXT), vision_config=dict(EYE)
    ),
}  # fmt: skip
#: How files name a layer of a text tower: since transformers 4.52, before it, and Qwen2-VL before it.
NAMES = ("model.language_model.layers.1.", "language_model.model.layers.1.", "model.layers.1.")
LEFT_OUT = (
    "{} tensors of vision_tower are left out: what reads images or sound is not moved, and stays the student's own"
)


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA, the language model that it is made of, and a module of each."""
    root = tmp_path_factory.mktemp("towers")
    config = SEES["llava"]()
    both = tiny.lively(transformers.LlavaForConditionalGeneration(config), 1)
    both.save_pretrained(root / "both")
    alone = transformers.LlamaForCausalLM(config.text_config)
    alone.model.load_state_dict(both.model.language_model.state_dict())
    alone.lm_head.load_state_dict(both.lm_head.state_dict())
    alone.save_pretrained(root / "alone")
    for name in ("both", "alone"):
        tiny.tokenizer(root / name)
    trained(root / "of-both", root / "both", ["q_proj", "v_proj"], "CAUSAL_LM", "AutoModelForImageTextToText")
    trained(root / "of-alone", root / "alone", ["q_proj", "v_proj"], "CAUSAL_LM", "AutoModelForCausalLM")
    return root


def renamed(module: Path, folder: Path, old: str, new: str) -> Path:
    """A copy of a module whose tensors are called otherwise."""
    shutil.copytree(module, folder)
    file = folder / "adapter_model.safetensors"
    save_file({key.replace(old, new): value for key, value in load_file(file).items()}, file)
    return folder


def logits(base: Path, module: Path) -> torch.Tensor:
    auto = "AutoModelForCausalLM" if base.name == "alone" else "AutoModelForImageTextToText"
    model = peft.PeftModel.from_pretrained(getattr(transformers, auto).from_pretrained(base), module).eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(10, 40).view(3, 10)).logits


@pytest.mark.parametrize("family", SEES)
def test_the_text_tower_has_the_roles_of_a_language_model(family: str) -> None:
    found = describe_config(SEES[family]())
    alone = describe_config(transformers.LlamaConfig(**TEXT))
    assert found.tower in ("language_model", "text_model")
    assert found.model_type == family
    assert set(alone.row.linears) == set(found.row.linears)
    shared = {space: size for space, size in alone.sizes.items() if space.name not in alone.row.stacks[0].taps}
    assert found.sizes.items() >= shared.items()
    assert found.row.reads_text
    for name in NAMES:
        assert found.sites(f"{name}self_attn.q_proj") == ([Site(1, "attn.query")], "model.")
    assert found.sites("layers.1.mlp.up_proj") == ([Site(1, "ffn.up")], "")
    assert found.sites("language_model.lm_head")[0] == found.sites("lm_head")[0] == [Site(-1, "lm_head")]
    for name in ("model.language_model", "language_model.model", "model"):
        assert found.sites(f"{name}.embed_tokens") == ([Site(-1, "embed")], "model.")


def test_names_of_text_towers_lead_to_a_text_model_and_those_of_others_nowhere() -> None:
    alone = describe_config(transformers.LlamaConfig(**TEXT))
    for name in NAMES:
        assert alone.sites(f"{name}self_attn.q_proj") == ([Site(1, "attn.query")], "model.")
    assert alone.sites("language_model.layers.1.self_attn.q_proj") == ([Site(1, "attn.query")], "")
    assert alone.sites("model.language_model.embed_tokens") == ([Site(-1, "embed")], "model.")
    for name in ("model.vision_tower.vision_model.encoder", "vision_model.encoder", "model.audio_tower"):
        assert alone.sites(f"{name}.layers.1.self_attn.q_proj") is None
        assert alone.other_tower(f"{name}.layers.1.self_attn.q_proj")


@pytest.mark.parametrize("new", ["model.language_model.", "language_model.model."])
@pytest.mark.parametrize("teacher", ["both", "alone"])
def test_a_module_goes_to_the_language_model_alone_and_its_vision_tower_is_counted(
    towers: Path, tmp_path: Path, teacher: str, new: str
) -> None:
    module = renamed(towers / "of-both", tmp_path / "module", "model.language_model.", new)
    options = {"teacher": towers / teacher, "method": "copy"}
    found = tiny.inspect(module, towers / "alone", **options)
    assert found.student.problem is None
    assert found.student.notes == [LEFT_OUT.format(8)]
    graft = tiny.transfer(module, towers / "alone", **options, out=tmp_path / "graft")
    assert graft.report.notes == [LEFT_OUT.format(8)]
    assert torch.equal(logits(towers / "alone", tmp_path / "graft"), logits(towers / "both", towers / "of-both"))


def test_a_module_of_a_language_model_goes_into_the_text_tower(towers: Path, tmp_path: Path) -> None:
    graft = tiny.transfer(towers / "of-alone", towers / "both", method="copy", out=tmp_path / "graft")
    assert graft.report.verification.done
    assert all(".language_model." in key for key in load_file(tmp_path / "graft" / "adapter_model.safetensors"))
    assert torch.equal(logits(towers / "both", tmp_path / "graft"), logits(towers / "alone", towers / "of-alone"))
    assert "AutoModelForImageTextToText" in (tmp_path / "graft" / "README.md").read_text()


def test_it_is_aligned_on_text_as_any_language_model(towers: Path, tmp_path: Path, text: Path) -> None:
    other = tiny.saved(tmp_path / "other", transformers.LlamaConfig(**{**TEXT, "hidden_size": 32}), seed=3)
    options = {"teacher": towers / "both", "text": text, "method": "prune-align", "max_tokens": 1500, "polish": 2}
    graft = tiny.transfer(towers / "of-both", other, **options)
    assert graft.report.verdict.measured is not None
    assert graft.report.method == "prune-align"


def test_a_class_that_sees_is_no_encoder_decoder() -> None:
    assert Task.of_class("LlavaForConditionalGeneration") is Task.CAUSAL_LM
    assert Task.of_class("Qwen2_5_VLForConditionalGeneration") is Task.CAUSAL_LM
    assert Task.of_class("T5ForConditionalGeneration") is Task.SEQ2SEQ_LM
    assert Task.of_class("WhisperForConditionalGeneration") is Task.SEQ2SEQ_LM
    assert Task.CAUSAL_LM.auto_class_of("llama") == "AutoModelForCausalLM"
    assert Task.CAUSAL_LM.auto_class_of("llava") == "AutoModelForImageTextToText"


def test_a_module_of_the_vision_tower_alone_is_refused(towers: Path, tmp_path: Path) -> None:
    targets = ["vision_model.encoder.layers.0.self_attn.q_proj", "vision_tower.encoder.layers.0.self_attn.q_proj"]
    trained(tmp_path / "eye", towers / "both", targets, "CAUSAL_LM", "AutoModelForImageTextToText")
    with pytest.raises(CheckpointError, match=r"both: the module acts on images or sound alone.*found vision_tower"):
        tiny.transfer(tmp_path / "eye", towers / "alone", teacher=towers / "both", method="copy")


def test_the_task_of_a_file_that_names_the_class_alone(towers: Path, tmp_path: Path) -> None:
    trained(tmp_path / "module", towers / "both", ["up_proj"], None, "AutoModelForImageTextToText")
    graft = tiny.transfer(tmp_path / "module", towers / "alone", teacher=towers / "alone", method="copy")
    assert graft.checkpoint.raw.task is Task.CAUSAL_LM
