"""LoRA where no role is known: merged into the head that reads it, left out by name, or refused for the true reason."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
import transformers
from peft import PeftModel

import tiny
from families import ENCODER_DECODERS, ENCODERS
from peft_graft.checkpoints.live import read_live
from peft_graft.checkpoints.resolve import PeftCheckpoint, resolve
from peft_graft.errors import CheckpointError, ModelError
from peft_graft.models.loading import describe_config, wrap_model

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # peft's, about ties and biases
CLASSIFIER = transformers.AutoModelForSequenceClassification


def lora(auto: Any, config: Any, targets: Any, task: str | None = None, **options: Any) -> PeftModel:
    """A model with a trained LoRA inside."""
    model = tiny.lively(auto.from_config(config))
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=2, lora_alpha=8, target_modules=targets, task_type=task, **options)
    )
    tiny.randomise_trained(adapted, 1)
    return adapted.eval()


def resolved(adapted: PeftModel, **options: Any) -> PeftCheckpoint:
    raw, base = read_live(adapted)
    handle = wrap_model(base)
    return resolve(raw, handle.architecture, handle.base_tensors(), **options)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True}, {"bias": "lora_only"}], ids=str)
@pytest.mark.parametrize("family", ["bert", "albert"])
def test_a_lora_on_the_pooler_becomes_a_part_of_the_head_that_reads_it(family: str, options: dict[str, Any]) -> None:
    config = ENCODERS["albert"] if family == "albert" else tiny.config(layers=1)
    adapted = lora(CLASSIFIER, config, "all-linear", "SEQ_CLS", **options)
    found = resolved(adapted)
    unread = ["albert.encoder.embedding_hidden_mapping_in"] if family == "albert" else []
    assert list(found.left_out) == unread
    assert found.head is not None
    values = {name: tensor.values for name, tensor in found.head.tensors.items()}
    model = adapted.base_model.model
    ids = torch.arange(10, 20)[None]
    with torch.inference_mode():
        expected = model(input_ids=ids)
        state = getattr(model, family)(input_ids=ids).last_hidden_state[:, 0]
        inner = torch.tanh(torch.nn.functional.linear(state, values["dense.weight"], values["dense.bias"]))
        logits = torch.nn.functional.linear(inner, values["out.weight"], values["out.bias"])
    torch.testing.assert_close(logits, expected.logits)


def test_a_classifier_with_a_lora_on_its_pooler_arrives_whole(tmp_path) -> None:
    config = tiny.config(layers=1)
    adapted = lora(CLASSIFIER, config, ["query", "dense"], "SEQ_CLS")
    base = tmp_path / "base"
    adapted.unload().bert.save_pretrained(base)
    adapted = lora(CLASSIFIER, config, ["query", "dense"], "SEQ_CLS")
    graft = tiny.transfer(adapted, base, method="copy", out=tmp_path / "graft")
    assert graft.report.verification.done
    assert not any("pooler" in note for note in graft.report.notes)
    moved = PeftModel.from_pretrained(CLASSIFIER.from_pretrained(base), tmp_path / "graft").eval()
    ids = torch.arange(10, 20)[None]
    with torch.inference_mode():
        torch.testing.assert_close(moved(input_ids=ids).logits, adapted(input_ids=ids).logits)


def test_a_lora_on_a_layer_of_a_head_stays_behind_with_the_head() -> None:
    adapted = lora(CLASSIFIER, tiny.config(layers=1), ["query", "dense"], "SEQ_CLS")
    _, base = read_live(adapted)
    plan = tiny.inspect(adapted, base, head="drop", method="copy").student
    assert plan.problem is None
    assert plan.notes == ["what the module trained at bert.pooler.dense is left out with the head that reads it"]


@pytest.mark.parametrize("family", ["bert", "roberta", "mpnet"])
def test_a_pooler_that_no_head_reads_is_left_out_by_name(family: str) -> None:
    adapted = lora(transformers.AutoModel, tiny.config(family, layers=2), ["dense"])
    _, base = read_live(adapted)
    found = tiny.inspect(adapted, base, method="copy")
    assert found.left_out == ["pooler.dense"]
    parts = len(found.paths)
    assert found.student.notes == [f"1 of the module's {parts} parts have no role yet and are left out: pooler.dense"]
    assert found.student.modules == parts - 1


def test_layers_outside_the_base_model_are_left_out_by_name() -> None:
    adapted = lora(transformers.AutoModelForMaskedLM, tiny.config(layers=1), ["query", "dense"])
    assert resolved(adapted).left_out == ("cls.predictions.transform.dense",)


def test_many_layers_without_a_role_are_counted_and_named_once() -> None:
    config = transformers.GraniteMoeConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_local_experts=2, pad_token_id=0,
    )  # fmt: skip
    adapted = lora(transformers.AutoModel, config, ["q_proj", "layer"])
    _, base = read_live(adapted)
    (note,) = tiny.inspect(adapted, base, method="copy").student.notes
    assert note == (
        "3 of the module's 6 parts have no role yet and are left out: layers.*.block_sparse_moe.router.layer"
    )


def test_a_module_of_which_nothing_has_a_role_is_refused_and_its_base_not_blamed() -> None:
    adapted = lora(transformers.AutoModel, tiny.config(layers=1), ["pooler.dense"])
    with pytest.raises(CheckpointError) as caught:
        resolved(adapted)
    assert caught.value.message == (
        "no role is known yet for pooler.dense of a bert model, and the module has nothing else"
    )
    assert caught.value.expected == "a layer inside encoder.layer that has a role"
    assert "register_architecture" in caught.value.fix


@pytest.mark.parametrize("targets", [["query"], ["query", "dense"]])
def test_a_base_that_has_no_such_layers_is_blamed(targets: list[str]) -> None:
    raw, _ = read_live(lora(transformers.AutoModel, tiny.config(layers=1), targets))
    for other in (tiny.config("distilbert"), tiny.config("mpnet")):
        with pytest.raises(ModelError, match=r"the teacher is not the base of this module: a \w+ model has no encoder"):
            resolve(raw, describe_config(other))


@pytest.mark.parametrize("saved", [{"modules_to_save": ["lm_head"]}, {"target_modules": ["q", "shared"]}], ids=str)
def test_a_trained_vocabulary_without_a_role_stays_behind_if_the_user_says_so(saved: dict[str, Any]) -> None:
    options = {"targets": ["q"], **saved}
    targets = options.pop("target_modules", options.pop("targets"))
    adapted = lora(transformers.AutoModelForSeq2SeqLM, ENCODER_DECODERS["t5"], targets, "SEQ_2_SEQ_LM",
                   modules_to_save=options.get("modules_to_save"))  # fmt: skip
    _, base = read_live(adapted)
    path = "lm_head" if "modules_to_save" in saved else "shared"
    refused = tiny.inspect(adapted, base, method="copy").student.problem
    assert refused == (
        f"{path}: the module trains this part of the vocabulary, which has no role in this model yet. Fix: leave it "
        "behind by naming what moves: --sites decoder.attn.query,decoder.cross.query,encoder.attn.query"
    )
    plan = tiny.inspect(adapted, base, method="copy", sites=("*.attn.query",)).student
    assert plan.problem is None
    assert f"left out: {path}" in " ".join(plan.notes)
