"""Modules whose configuration names no task, or another: paths and heads show it, and it is written as it came."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file

import tiny
from conftest import needs_adapters
from peft_graft.checkpoints.formats.base import format_of
from peft_graft.checkpoints.raw import RawCheckpoint
from peft_graft.checkpoints.read import read_checkpoint
from peft_graft.checkpoints.student_names import written_names
from peft_graft.checkpoints.task import with_task
from peft_graft.errors import CheckpointError
from peft_graft.models.loading import ModelHandle, blank_handle
from peft_graft.models.tasks import Task
from peft_graft.modules.lora import LoraPart

IDS = torch.randint(10, 50, (1, 9), generator=torch.Generator().manual_seed(0))
LLAMA = transformers.LlamaConfig(
    vocab_size=200, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, pad_token_id=0
)
VIT = transformers.ViTConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=8, patch_size=4
)
BART = transformers.BartConfig(
    vocab_size=99, d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=48, decoder_ffn_dim=48,
    encoder_attention_heads=4, decoder_attention_heads=4,
)  # fmt: skip
BASES = {
    "bert": tiny.config("bert", layers=2),
    "roberta": tiny.config("roberta", layers=2),
    "distilbert": tiny.config("distilbert", layers=2),
    "deberta": transformers.DebertaV2Config(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    ),
    "llama": LLAMA,
    "gpt2": transformers.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4),
    "bart": BART,
    "vit": VIT,
}
LAYERS = {
    "bert": "encoder.layer.1.attention.self.query",
    "roberta": "encoder.layer.1.attention.self.query",
    "distilbert": "transformer.layer.1.attention.q_lin",
    "deberta": "encoder.layer.1.attention.self.query_proj",
    "llama": "layers.1.self_attn.q_proj",
    "gpt2": "h.1.attn.c_proj",
    "bart": "decoder.layers.1.self_attn.q_proj",
    "vit": "encoder.layer.1.attention.attention.query",
}


def handle_of(family: str) -> ModelHandle:
    return blank_handle(BASES[family], family)


def raw_of(family: str, heads: dict[str, int] | None = None, *, wrapped: bool = True, **changes: Any) -> RawCheckpoint:
    """A LoRA of one layer without a task, and heads of so many rows by their paths."""
    prefix = handle_of(family).architecture.prefix
    path = f"{prefix}.{LAYERS[family]}" if wrapped else LAYERS[family]
    parts = {path: LoraPart(torch.ones(2, 32), torch.ones(32, 2), scaling=1.0)}
    head = {path: torch.ones(rows, 32) for path, rows in (heads or {}).items()}
    given = {"library": "peft", "task": Task.BASE, "config": {}, **changes}
    return RawCheckpoint(kind="lora", name="default", base_model=None, parts=parts, head=head, **given)


TOKENS = {"classifier.weight": 3, "classifier.bias": 3}
DENSE = {"classifier.dense.weight": 32, "classifier.dense.bias": 32, "classifier.out_proj.weight": 3}


@pytest.mark.parametrize(
    ("family", "heads", "task"),
    [
        ("bert", {}, Task.MASKED_LM),
        ("llama", {}, Task.CAUSAL_LM),
        ("gpt2", {}, Task.CAUSAL_LM),
        ("bart", {}, Task.SEQ2SEQ_LM),
        ("vit", {}, Task.IMAGE_CLASSIFICATION),
        ("roberta", DENSE, Task.SEQUENCE_CLASSIFICATION),
        ("roberta", TOKENS, Task.TOKEN_CLASSIFICATION),
        ("distilbert", TOKENS, Task.TOKEN_CLASSIFICATION),
        ("distilbert", {"pre_classifier.weight": 32, **TOKENS}, Task.SEQUENCE_CLASSIFICATION),
        ("gpt2", {"score.weight": 3}, Task.SEQUENCE_CLASSIFICATION),
        ("gpt2", TOKENS, Task.TOKEN_CLASSIFICATION),
        ("llama", {"score.weight": 1}, Task.SEQUENCE_CLASSIFICATION),
        ("bert", {"qa_outputs.weight": 2, "qa_outputs.bias": 2}, Task.QUESTION_ANSWERING),
        ("bert", {"unheard_of.weight": 2}, Task.MASKED_LM),
    ],
)
def test_paths_and_heads_show_the_task(family: str, heads: dict[str, int], task: Task) -> None:
    found = with_task(raw_of(family, heads), handle_of(family).architecture)
    assert (found.task, found.notes, found.config) == (task, (), {})


def test_what_needs_no_guess() -> None:
    """Bare models, tasks that are named, and AdapterHub's classes for which there is no task."""
    architecture = handle_of("bert").architecture
    assert with_task(raw_of("bert", wrapped=False), architecture).task is Task.BASE
    named = raw_of("bert", TOKENS, task=Task.TOKEN_CLASSIFICATION)
    assert with_task(named, architecture) is named
    for heads in ({}, {"layers.1.weight": 2}):
        assert with_task(raw_of("bert", heads, library="adapters"), architecture).task is Task.PREDICTION_HEADS
    for config in (
        {"model_class": "BertForMultipleChoice"},
        {"auto_mapping": {"base_model_class": "BertForPreTraining"}},
    ):
        choice = with_task(raw_of("bert", {"classifier.weight": 1}, config=config), architecture)
        assert choice.task is Task.MASKED_LM
    changed = raw_of("llama", {"score.weight": 1}, task=Task.CAUSAL_LM)
    assert with_task(changed, handle_of("llama").architecture).task is Task.SEQUENCE_CLASSIFICATION


@pytest.mark.parametrize(
    ("family", "named", "task"),
    [
        ("bart", Task.CAUSAL_LM, Task.SEQ2SEQ_LM),
        ("llama", Task.SEQ2SEQ_LM, Task.CAUSAL_LM),
        ("bert", Task.CAUSAL_LM, Task.CAUSAL_LM),
    ],
)
def test_the_other_kind_of_language_model(family: str, named: Task, task: Task) -> None:
    """What users called causal though it has an encoder, and the reverse; BERT has a class for it."""
    assert with_task(raw_of(family, task=named), handle_of(family).architecture).task is task


@pytest.mark.parametrize(
    ("family", "first", "second"),
    [
        ("bert", "sequence-classification", "token-classification"),
        ("deberta", "token-classification", "sequence-classification"),
    ],
)
def test_a_head_of_texts_or_of_tokens_is_said_to_be_open(family: str, first: str, second: str) -> None:
    """Where the inner layer of texts is not saved with the head; without DeBERTa's the head could not be used."""
    found = with_task(raw_of(family, TOKENS), handle_of(family).architecture)
    assert found.task == first
    assert found.notes == (
        f"the files do not say whether the head is of {first} or of {second}: it is taken to be of {first} "
        "(task_type in adapter_config.json says otherwise)",
    )
    assert with_task(found, handle_of(family).architecture) is found


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return found


def change(folder: Path, **settings: Any) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(config_of(folder) | settings))


def output(base: Path, auto: Any, adapter: Path | None, **load: Any) -> torch.Tensor:
    model = auto.from_pretrained(base, **load)
    model = PeftModel.from_pretrained(model, adapter) if adapter else model
    with torch.inference_mode():
        found = model.eval()(input_ids=IDS)
    return found[0]  # logits, the first of two sorts of them, or the last hidden state


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.saved(tmp_path_factory.mktemp("task") / "llama", LLAMA, transformers.AutoModelForCausalLM)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.base_model(tmp_path_factory.mktemp("task") / "bert", layers=2)


def lora(folder: Path, model: Any, targets: list[str], **settings: Any) -> Path:
    """A "trained" LoRA as peft saves it."""
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, **settings))
    tiny.randomise(adapted, 1, ("lora_", "modules_to_save.default"))
    adapted.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("task_type", [None, "FEATURE_EXTRACTION"])
def test_a_language_models_lora_without_a_task(task_type: str | None, llama: Path, tmp_path: Path) -> None:
    """As torchtune, mergekit and ``model.add_adapter`` of transformers leave it."""
    auto = transformers.AutoModelForCausalLM
    module = lora(tmp_path / "module", auto.from_pretrained(llama), ["q_proj"])
    change(module, task_type=task_type, auto_mapping=None)
    found = tiny.inspect(module, llama, method="copy")
    assert (found.task, found.student.problem) == ("causal-lm", None)
    tiny.transfer(module, llama, out=tmp_path / "out", method="copy")
    written = config_of(tmp_path / "out")
    assert (written["task_type"], written["auto_mapping"], written["modules_to_save"]) == (task_type, None, None)
    torch.testing.assert_close(output(llama, auto, tmp_path / "out"), output(llama, auto, module))


def test_an_encoders_lora_inside_a_task_model_of_which_nothing_is_known(bert: Path, tmp_path: Path) -> None:
    auto = transformers.AutoModelForMultipleChoice
    module = lora(tmp_path / "module", auto.from_pretrained(bert), ["query"])
    assert config_of(module)["auto_mapping"]["base_model_class"] == "BertForMultipleChoice"
    graft = tiny.transfer(module, bert, out=tmp_path / "out", method="copy")
    assert not any("head" in note for note in graft.report.notes)
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (module, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


@pytest.mark.parametrize("task_type", ["SEQ_CLS", "CAUSAL_LM", None])
def test_a_reward_models_head_that_the_configuration_does_not_name(
    task_type: str | None, llama: Path, tmp_path: Path
) -> None:
    """peft of 2023 wrote heads without a word of them, and trl called reward models causal."""
    auto, load = transformers.AutoModelForSequenceClassification, {"num_labels": 1}
    module = lora(tmp_path / "module", auto.from_pretrained(llama, **load), ["q_proj"], task_type="SEQ_CLS")
    want = output(llama, auto, module, **load)
    change(module, task_type=task_type, modules_to_save=None)
    tiny.transfer(module, llama, out=tmp_path / "out", method="copy")
    torch.testing.assert_close(output(llama, auto, tmp_path / "out", **load), want)
    written = config_of(tmp_path / "out")
    assert (written["task_type"], written["modules_to_save"]) == (task_type and "SEQ_CLS", ["score"])
    graft = tiny.transfer(module, llama, out=tmp_path / "dropped", method="copy", head="drop")
    assert graft.report.head is None
    saved = [key for key in load_file(tmp_path / "dropped" / "adapter_model.safetensors") if "lora_" not in key]
    assert saved == (["base_model.model.score.weight"] if task_type else [])  # which peft demands of classifiers


HEADS = {
    "bert_texts": (transformers.AutoModelForSequenceClassification, "SEQ_CLS", {"num_labels": 3}),
    "bert_tokens": (transformers.AutoModelForTokenClassification, "TOKEN_CLS", {"num_labels": 3}),
    "bert_answers": (transformers.AutoModelForQuestionAnswering, "QUESTION_ANS", {}),
}


@pytest.mark.parametrize("kind", HEADS)
def test_heads_of_2023(kind: str, bert: Path, tmp_path: Path) -> None:
    """In the file, and not in ``modules_to_save``."""
    auto, task_type, load = HEADS[kind]
    module = lora(tmp_path / "module", auto.from_pretrained(bert, **load), ["query"], task_type=task_type)
    change(module, modules_to_save=None)
    dropped = tiny.inspect(module, bert, method="copy", head="drop")
    assert (dropped.teacher_problem, dropped.student.problem, dropped.student.head) == (None, None, False)
    want = output(bert, auto, module, **load)
    tiny.transfer(module, bert, out=tmp_path / "out", method="copy")
    assert config_of(tmp_path / "out")["modules_to_save"] == ["qa_outputs" if kind == "bert_answers" else "classifier"]
    torch.testing.assert_close(output(bert, auto, tmp_path / "out", **load), want)


def test_a_head_of_a_form_that_is_not_known_is_dropped(bert: Path, tmp_path: Path) -> None:
    auto = transformers.AutoModelForMaskedLM
    module = lora(tmp_path / "module", auto.from_pretrained(bert), ["query"])
    file = module / "adapter_model.safetensors"
    head = {"base_model.model.cls.predictions.transform.dense.weight": torch.ones(32, 32)}
    save_file(load_file(file) | head, file)
    assert "leave the head behind with --head drop" in str(tiny.inspect(module, bert).teacher_problem)
    assert tiny.inspect(module, bert, method="copy", head="drop").student.problem is None
    inside = {"base_model.model.bert.encoder.layer.0.attention.self.query.lora_E": torch.ones(4, 1)}
    save_file(load_file(file) | inside, file)
    with pytest.raises(CheckpointError, match="lora_E is neither a part of a LORA module nor one of modules_to_save"):
        read_checkpoint(module)


@pytest.mark.parametrize("place", ["adapter_model.safetensors", "value_head.safetensors", "pytorch_model.bin"])
def test_a_value_head_is_left_out_and_said(place: str, llama: Path, tmp_path: Path) -> None:
    """As trl's PPO keeps it, in one file with the module or beside it."""
    auto = transformers.AutoModelForCausalLM
    module = lora(tmp_path, auto.from_pretrained(llama), ["q_proj"], task_type="CAUSAL_LM")
    value = {"v_head.summary.weight": torch.ones(1, 32), "v_head.summary.bias": torch.zeros(1)}
    if place.endswith(".bin"):
        torch.save(value, module / place)
    else:
        save_file(value | (load_file(module / place) if (module / place).is_file() else {}), module / place)
    note = "the value head that was trained beside the module is left out: no language model has a place for it"
    found = tiny.inspect(module, llama, method="copy")
    assert found.notes == [note]
    assert note in found.student.notes
    assert read_checkpoint(module).head == {}


@pytest.mark.filterwarnings("ignore:Adapter 'default'")
def test_a_kind_that_becomes_a_lora_keeps_a_head_of_2023(bert: Path, tmp_path: Path) -> None:
    auto, load = transformers.AutoModelForTokenClassification, {"num_labels": 3}
    config = peft.LoHaConfig(r=2, target_modules=["query"], task_type="TOKEN_CLS")
    adapted = peft.get_peft_model(auto.from_pretrained(bert, **load), config)
    tiny.randomise_trained(adapted, 1)
    adapted.save_pretrained(tmp_path / "module")
    want = output(bert, auto, tmp_path / "module", **load)
    change(tmp_path / "module", modules_to_save=None)
    assert tiny.inspect(tmp_path / "module", bert, method="copy").student.head
    tiny.transfer(tmp_path / "module", bert, out=tmp_path / "out", method="copy")
    torch.testing.assert_close(output(bert, auto, tmp_path / "out", **load), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"oft_block_size": None}, "OFT has been updated since PEFT 0.14.0"),
        ({"use_cayley_neumann": True, "peft_version": "0.17.0"}, "slightly changed .* in PEFT 0.18.0"),
    ],
)
def test_a_kind_whose_meaning_changed(settings: dict[str, Any], message: str, bert: Path, tmp_path: Path) -> None:
    """peft refuses the one by its version, and only warns of the other."""
    config = peft.OFTConfig(oft_block_size=8, target_modules=["query"])
    adapted = peft.get_peft_model(transformers.AutoModel.from_pretrained(bert), config)
    tiny.randomise_trained(adapted, 1)
    adapted.save_pretrained(tmp_path)
    changed = {name: value for name, value in (config_of(tmp_path) | settings).items() if value is not None}
    (tmp_path / "adapter_config.json").write_text(json.dumps(changed))
    with pytest.raises(CheckpointError, match=message):
        tiny.transfer(tmp_path, bert, method="copy")


def test_options_that_peft_knows_no_more_are_not_written(llama: Path, tmp_path: Path) -> None:
    auto = transformers.AutoModelForCausalLM
    module = lora(tmp_path / "module", auto.from_pretrained(llama), ["q_proj"], task_type="CAUSAL_LM")
    change(module, enable_lora=None, merge_weights=False)
    handle = handle_of("llama")
    raw = read_checkpoint(module)
    written, _ = format_of("peft").build(raw, written_names(handle, raw.task))
    assert not {"enable_lora", "merge_weights"} & written.keys()
    assert written["lora_dropout"] == 0.0


def test_a_rank_that_peft_would_not_load(llama: Path, tmp_path: Path) -> None:
    """Without r peft takes 8, and the scale with it."""
    auto = transformers.AutoModelForCausalLM
    module = lora(tmp_path, auto.from_pretrained(llama), ["q_proj"], task_type="CAUSAL_LM")
    without = {name: value for name, value in config_of(module).items() if name not in ("r", "lora_alpha")}
    (module / "adapter_config.json").write_text(json.dumps(without))
    with pytest.raises(
        CheckpointError, match="another rank .* expected 8, which peft takes where r is not said, found 4"
    ):
        read_checkpoint(module)


@needs_adapters
@pytest.mark.parametrize("model_class", ["BertModelWithHeads", "BertForMultipleChoice", "BertModel", "", None])
def test_adapterhub_classes_that_say_nothing(model_class: str | None, bert: Path, tmp_path: Path) -> None:
    tiny.adapterhub_module(tmp_path, bert, head=None)
    change(tmp_path, model_class=model_class)
    raw = with_task(read_checkpoint(tmp_path), handle_of("bert").architecture)
    assert raw.task is Task.PREDICTION_HEADS


@needs_adapters
def test_an_adapterhub_module_of_a_masked_language_model(bert: Path, tmp_path: Path) -> None:
    tiny.adapterhub_module(tmp_path / "module", bert, head=None)
    change(tmp_path / "module", model_class="BertForMaskedLM")
    tiny.transfer(tmp_path / "module", bert, out=tmp_path / "out", method="copy")
    assert config_of(tmp_path / "out")["model_class"] == "BertForMaskedLM"
    before, after = (read_checkpoint(tmp_path / folder) for folder in ("module", "out"))
    assert before.parts == after.parts
