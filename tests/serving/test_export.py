"""Grafts merged into their base, and in the other library's format: loaded by their users' code, and compared."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from pathlib import Path

import peft
import pytest
import torch
import transformers

import families
import peft_graft
import tiny
from conftest import needs_adapters
from peft_graft import ExportConfig, GraftConfig
from peft_graft.errors import GraftError, OutputError, PlanError, VerificationError


def logits(model, folder: Path) -> torch.Tensor:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        return model.eval()(**tokenizer(tiny.sentences(8), padding=True, return_tensors="pt")).logits


@pytest.fixture(scope="module")
def graft(world: Path, tmp_path_factory) -> Path:
    """A token classifier's graft."""
    out = tmp_path_factory.mktemp("export") / "graft"
    peft_graft.transfer(
        world / "lora", world / "shallow", out=out, config=GraftConfig(method="copy", labels=tiny.LABELS)
    )
    return out


def test_a_merged_classifier_is_a_model_of_its_own(world, graft, tmp_path) -> None:
    found = peft_graft.export(graft, to="merged", out=tmp_path / "merged")
    merged = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / "merged")
    own = peft_graft.Graft.from_pretrained(graft)
    torch.testing.assert_close(logits(merged, tmp_path / "merged"), logits(own.model, world / "shallow"), atol=1e-5,
                               rtol=1e-5)  # fmt: skip
    assert tuple(merged.config.id2label.values()) == tiny.LABELS
    assert found.comparison is not None
    assert found.comparison.lost < 1e-5
    assert found.comparison.same_choices == 1
    said = json.loads((tmp_path / "merged" / "export.json").read_text())
    assert peft_graft.Export.model_validate(said) == found
    pipeline = transformers.pipeline("token-classification", model=str(tmp_path / "merged"))
    assert any(pipeline(tiny.sentences(20)))


def speaker(folder: Path, dtype: torch.dtype = torch.float32, **shape) -> Path:
    """A language model with a tokenizer that has a chat template, and sampling of its own."""
    families.llama(folder, **shape)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model.generation_config.update(max_new_tokens=7, do_sample=False)
    model.save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for message in messages %}[CLS]{{ message.content }}[SEP]{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


def module(folder: Path, base: Path, config: peft.PeftConfig, dtype: torch.dtype = torch.float32):
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of word embeddings that are the output layer too
        adapted = peft.get_peft_model(model, config)
    tiny.randomise_trained(adapted, 1)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return adapted.eval()


def lora(**options) -> peft.LoraConfig:
    return peft.LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "target_modules": ["q_proj", "down_proj"], **options})


IDS = torch.tensor([[5, 9, 20, 33, 7, 12]])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("words", [False, True])
def test_a_merged_language_model_speaks_as_the_unmerged(tmp_path, tied: bool, words: bool) -> None:
    base = speaker(tmp_path / "base", tie_word_embeddings=tied)
    options = {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": False} if words else {}
    adapted = module(tmp_path / "lora", base, lora(**options))
    peft_graft.export(tmp_path / "lora", to="merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "lora-merged", dtype=torch.float32)
    with torch.inference_mode():
        torch.testing.assert_close(merged(IDS).logits, adapted(IDS).logits, atol=1e-4, rtol=1e-4)
    assert merged.generation_config.max_new_tokens == 7
    assert merged.config.tie_word_embeddings is (tied and not words)
    assert merged.config.pad_token_id == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "lora-merged")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "green"}], tokenize=False) == "[CLS]green[SEP]"


@pytest.mark.parametrize("task", ["TokenClassification", "SequenceClassification"])
def test_a_head_of_the_base_makes_way_for_the_module_s(world, tmp_path, task: str) -> None:
    """Also where it has the same name and another number of classes."""
    base = getattr(transformers, f"AutoModelFor{task}").from_pretrained(world / "shallow", num_labels=3)
    base.save_pretrained(tmp_path / "base")
    tiny.tokenizer(tmp_path / "base")
    graft = peft_graft.transfer(
        world / "lora", tmp_path / "base", out=tmp_path / "graft", config=GraftConfig(method="copy")
    )
    peft_graft.export(graft, to="merged", out=tmp_path / "merged")
    merged, info = transformers.AutoModelForTokenClassification.from_pretrained(
        tmp_path / "merged", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert torch.equal(merged.classifier.weight, graft.raw.head["classifier.weight"])


@pytest.mark.parametrize("first", ["", "0_Transformer"])
def test_a_merged_model_of_sentence_transformers_stays_one(world, tmp_path, first: str) -> None:
    """Its pooling is in files of its own, without which another one is taken."""
    base = tmp_path / "base"
    shutil.copytree(world / "shallow", base)
    modules = [{"idx": 0, "path": first, "type": "t"}, {"idx": 1, "path": "1_Pooling", "type": "p"}]
    (base / "modules.json").write_text(json.dumps(modules))
    (base / "sentence_bert_config.json").write_text("{}")
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    tiny.peft_lora(tmp_path / "lora", base, task="base")
    found = peft_graft.export(tmp_path / "lora", to="merged", base=base)
    merged, names = tmp_path / "lora-merged", ["1_Pooling/config.json", "modules.json", "sentence_bert_config.json"]
    assert [(merged / name).is_file() for name in names] == [not first] * 3
    assert ("the merged one is not" in " ".join(found.notes)) == bool(first)
    if not first:
        assert (merged / names[0]).read_text() == (base / names[0]).read_text()


def test_a_merged_model_has_its_base_s_dtype(tmp_path) -> None:
    base = speaker(tmp_path / "base", torch.bfloat16)
    module(tmp_path / "lora", base, lora(), torch.bfloat16)
    found = peft_graft.export(tmp_path / "lora", to="merged")
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "lora-merged", dtype="auto").dtype == (
        torch.bfloat16
    )
    assert found.comparison is not None
    assert 1e-4 < found.comparison.lost < 0.25, "rounding is measured"
    peft_graft.export(tmp_path / "lora", to="merged", out=tmp_path / "wide", config=ExportConfig(dtype="float32"))
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "wide", dtype="auto").dtype == torch.float32


@pytest.mark.parametrize(
    "config",
    [
        peft.IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "up_proj"], feedforward_modules=["up_proj"]),
        peft.LoHaConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2),
        lora(use_dora=True),
    ],
    ids=lambda config: "dora" if getattr(config, "use_dora", False) else config.peft_type.value,
)  # fmt: skip
def test_all_that_changes_weights_can_be_merged(tmp_path, config) -> None:
    base = speaker(tmp_path / "base")
    adapted = module(tmp_path / "module", base, config)
    peft_graft.export(tmp_path / "module", to="merged", base=base)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "module-merged", dtype=torch.float32)
    with torch.inference_mode():
        torch.testing.assert_close(merged(IDS).logits, adapted(IDS).logits, atol=1e-3, rtol=1e-3)


def test_what_cannot_be_merged_is_refused_by_name(tmp_path) -> None:
    base = speaker(tmp_path / "base")
    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    module(tmp_path / "prompts", base, prompts)
    with pytest.raises(PlanError, match="--to merged: virtual tokens are not in the weights, so they cannot be merged"):
        peft_graft.export(tmp_path / "prompts", to="merged")
    assert not (tmp_path / "prompts-merged").exists()


def test_what_is_asked_wrongly(graft, tmp_path) -> None:
    with pytest.raises(PlanError, match="--to: unknown choice; expected merged, gguf, vllm, ollama, peft, adapters"):
        peft_graft.export(graft, to="onnx")
    (tmp_path / "there").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        peft_graft.export(graft, to="merged", out=tmp_path / "there")
    with pytest.raises(GraftError, match="no such folder"):
        peft_graft.export(tmp_path / "nowhere", to="merged")
    memory = peft_graft.Graft.from_pretrained(graft)
    object.__setattr__(memory, "folder", None)
    with pytest.raises(PlanError, match="--out: the graft is in memory"):
        peft_graft.export(memory, to="merged")


def test_a_module_that_names_no_base_is_asked_for_one(world, tmp_path) -> None:
    module = Path(shutil.copytree(world / "lora", tmp_path / "module"))
    config = json.loads((module / "adapter_config.json").read_text())
    (module / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(GraftError, match=r"names no base model\. Fix: name it with --base"):
        peft_graft.export(module, to="merged", out=tmp_path / "merged")
    with pytest.raises(GraftError, match=r"names no base model\. Fix: name it with --student"):
        peft_graft.evaluate(module, text=[{"prompt": "a", "completion": "b"}])


def test_a_wrong_base_leaves_nothing(graft, world, tmp_path) -> None:
    """It loads, for its shapes are the same, and so it answers: what is compared is that model merged and not."""
    with pytest.raises(GraftError):
        peft_graft.export(graft, to="merged", base=world / "narrow", out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


@needs_adapters
def test_the_other_library_answers_the_same(world, graft, tmp_path, command) -> None:
    said = json.loads(command("export", graft, "--to", "adapters", "--out", tmp_path / "hub", "--json").out)
    assert said["comparison"]["lost"] < 1e-4
    assert said["comparison"]["same_choices"] == 1
    shown = command("export", tmp_path / "hub", "--to", "peft", "--base", world / "shallow", "--out", tmp_path / "back")
    assert "of the module's effect lost" in shown.out
    assert "peft.PeftModel.from_pretrained(base, " in shown.out
    base = transformers.AutoModelForTokenClassification.from_pretrained(world / "shallow", num_labels=5)
    back = peft.PeftModel.from_pretrained(base, tmp_path / "back")
    own = peft_graft.Graft.from_pretrained(graft)
    torch.testing.assert_close(
        logits(back, world / "shallow"), logits(own.model, world / "shallow"), atol=1e-5, rtol=1e-5
    )
    peft_graft.export(tmp_path / "hub", to="merged", base=world / "shallow", out=tmp_path / "merged")
    merged = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(
        logits(merged, tmp_path / "merged"), logits(own.model, world / "shallow"), atol=1e-5, rtol=1e-5
    )


@needs_adapters
def test_a_library_does_not_speak_of_modules_that_are_switched_off(graft, tmp_path) -> None:
    heard: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = heard.append  # type: ignore[method-assign]
    logging.getLogger("adapters").addHandler(handler)
    try:
        peft_graft.export(graft, to="adapters", out=tmp_path / "hub")
    finally:
        logging.getLogger("adapters").removeHandler(handler)
    assert [record.getMessage() for record in heard] == []


@needs_adapters
def test_on_a_base_in_bfloat16_too(tmp_path) -> None:
    """Modules of adapters are float32, and do not read what a base in bfloat16 writes."""
    base = speaker(tmp_path / "base", torch.bfloat16)
    module(tmp_path / "lora", base, lora(target_modules=["q_proj", "v_proj"]))
    assert peft_graft.export(tmp_path / "lora", to="adapters").comparison.lost < 1e-4
    merged = peft_graft.export(tmp_path / "lora-adapters", to="merged", base=base)
    assert 0 < merged.comparison.lost < 0.25


@needs_adapters
def test_what_the_other_library_cannot_say_is_refused_by_name(world, tmp_path) -> None:
    with pytest.raises(
        PlanError, match="--to peft: only a plain LoRA means the same in both libraries; found bottleneck"
    ):
        peft_graft.export(world / "pfeiffer", to="peft", base=world / "teacher", out=tmp_path / "out")


def test_one_that_answers_otherwise_is_not_written(graft, tmp_path, monkeypatch) -> None:
    from transformers import BertForTokenClassification

    whole = BertForTokenClassification.save_pretrained

    def damaged(model, *args, **options):
        model.classifier.weight.data.neg_()
        whole(model, *args, **options)

    monkeypatch.setattr(BertForTokenClassification, "save_pretrained", damaged)
    with pytest.raises(VerificationError, match="what was written answers otherwise than the module does"):
        peft_graft.export(graft, to="merged", out=tmp_path / "merged")
    assert not list(tmp_path.iterdir())
