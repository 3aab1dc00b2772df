"""Modules in rare places: output layers, transposed layers, heads of poolers, and in models in memory that changed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import tiny
from families import DECODERS, ENCODERS
from peft_graft import Graft
from peft_graft.errors import CheckpointError
from peft_graft.labelled.examples import read_examples

IDS = torch.randint(6, 200, (2, 8), generator=torch.Generator().manual_seed(0))
COPY: dict[str, Any] = {"method": "copy", "polish": 0}


def decoder(folder: Path, family: str, seed: int = 0, **changes: Any) -> Path:
    return tiny.saved(folder, DECODERS[family], transformers.AutoModelForCausalLM, seed=seed, **changes)


def speaker(base: Path, config: peft.PeftConfig) -> Any:
    """A language model with a module whose values are random."""
    model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), config)
    tiny.randomise_trained(model, 3)
    return model.eval()


def said(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(IDS).logits


def classifier(base: Path, folder: Path, targets: Sequence[str] = ("query", "value")) -> Path:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", target_modules=list(targets)))
    tiny.randomise_trained(model, 3)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("head", ["carry", "fit"])
def test_albert_classifiers_whose_inner_layer_is_the_pooler(head: str, tmp_path: Path) -> None:
    teacher, student = (tiny.saved(tmp_path / str(seed), ENCODERS["albert"], seed=seed) for seed in (0, 1))
    module = classifier(teacher, tmp_path / "module")
    texts = tiny.sentences(80)
    graft = tiny.transfer(module, student, text=texts, head=head, out=tmp_path / "graft", **COPY)
    assert graft.report.verification.done
    assert len(graft.raw.labels or graft.report.head.labels) == 3
    assert Graft.from_pretrained(tmp_path / "graft").model.config.num_labels == 3


def test_a_classifier_of_a_model_that_projects_its_output(tmp_path: Path) -> None:
    """As the 350m model of OPT does."""
    shape = {"word_embed_proj_dim": 16}
    teacher, student = (decoder(tmp_path / str(seed), "opt", seed, **shape) for seed in (0, 1))
    module = classifier(teacher, tmp_path / "module", ["q_proj", "v_proj"])
    graft = tiny.transfer(module, student, out=tmp_path / "graft", **COPY)
    assert graft.report.verification.done
    assert graft.checkpoint.head.tensors["out.weight"].values.shape == (3, 16)


def test_a_module_of_the_output_layer_alone_is_seen_to_act(tmp_path: Path) -> None:
    teacher, student = (decoder(tmp_path / str(seed), "llama", seed, tie_word_embeddings=False) for seed in (0, 1))
    model = speaker(teacher, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"]))
    model.save_pretrained(tmp_path / "module", save_embedding_layers=False)
    graft = tiny.transfer(tmp_path / "module", student, out=tmp_path / "graft", **COPY)
    assert graft.report.verification.output_change > 0


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["q_proj", "lm_head"]])
def test_what_multiplies_weights_is_converted_with_the_output_layer(targets: list[str], tmp_path: Path) -> None:
    base = decoder(tmp_path / "base", "llama", tie_word_embeddings=False)
    model = speaker(base, peft.HRAConfig(task_type="CAUSAL_LM", target_modules=targets))
    model.save_pretrained(tmp_path / "module", save_embedding_layers=False)
    graft = tiny.transfer(tmp_path / "module", base, **COPY)
    torch.testing.assert_close(said(graft.model), said(model), atol=1e-3, rtol=1e-3)


def test_transposed_layers_are_converted(tmp_path: Path) -> None:
    base = decoder(tmp_path / "base", "gpt2")
    config = peft.AdaLoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"], total_step=10, fan_in_fan_out=True)
    model = speaker(base, config)
    model.save_pretrained(tmp_path / "module")
    graft = tiny.transfer(tmp_path / "module", base, **COPY)
    torch.testing.assert_close(said(graft.model), said(model), atol=1e-4, rtol=1e-4)


def test_scales_of_what_is_read_and_of_what_is_written_have_names_of_their_own(world: Path, tmp_path: Path) -> None:
    """``dense`` would name both, and peft wants those of the former kind among all of them."""
    config = peft.IA3Config(
        task_type="TOKEN_CLS", feedforward_modules=["output.dense"],
        target_modules=["key", "value", "output.dense", "intermediate.dense"],
    )  # fmt: skip
    model = peft.get_peft_model(tiny.task_model(world / "teacher"), config)
    tiny.randomise_trained(model, 3)
    model.save_pretrained(tmp_path / "module")
    other = tiny.base_model(tmp_path / "other", seed=1)
    graft = tiny.transfer(tmp_path / "module", other, out=tmp_path / "graft", **COPY)
    assert graft.report.verification.done


def test_a_merged_module_in_memory_is_refused(tmp_path: Path) -> None:
    """The model without it is gone, and with it once more it would be another teacher."""
    base = decoder(tmp_path / "base", "llama")
    live = speaker(base, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]))
    expected = said(live).clone()
    live.merge_adapter()
    with pytest.raises(CheckpointError, match=r"merged into the model.*Fix: call unmerge_adapter\(\) on it"):
        tiny.transfer(live, base, **COPY)
    live.unmerge_adapter()
    torch.testing.assert_close(said(tiny.transfer(live, base, **COPY).model), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("named", [False, True])
def test_biases_that_were_trained_in_a_model_in_memory(named: bool, tmp_path: Path) -> None:
    """peft trains them in the model itself, so what they were is known from its name alone."""
    base = decoder(tmp_path / "base", "opt")
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "fc1"], bias="lora_only")
    live = speaker(base, config)
    graft = tiny.transfer(live, base, **({"teacher": base} if named else {}), **COPY)
    torch.testing.assert_close(said(graft.model), said(live), atol=1e-4, rtol=1e-4)


def test_labels_that_hold_or_not_are_read_as_a_trainer_takes_them() -> None:
    rows = [{"text": "x", "labels": labels} for labels in ([0, 1, 1], [0, 0, 0], [1.0, 0.0, 0.0])]
    names = ("a", "b", "c")

    def read(*labels: Any) -> list[tuple[str, ...]]:
        given = [{"text": "x", "labels": each} for each in labels]
        return [one.labels for one in read_examples(given, "sequence-classification", labels=names, of="labels")]

    assert read(*(row["labels"] for row in rows)) == [("b", "c"), (), ("a",)]
    assert read([0, 2], [1], []) == [("a", "c"), ("b",), ()], "numbers of those that hold"
    assert read(["a"], ["b", "c"]) == [("a",), ("b", "c")]
