"""What peft saves whole beside a LoRA: norms move, other parts of the base model stay behind if the user says so."""

from __future__ import annotations

from collections import UserDict
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import tiny
from peft_graft.checkpoints.attach import attach
from peft_graft.checkpoints.read import read_checkpoint
from peft_graft.checkpoints.resolve import checkpoint_of_student, resolve, to_raw
from peft_graft.checkpoints.task import with_task
from peft_graft.errors import CheckpointError
from peft_graft.models.loading import ModelHandle, load_model

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
LLAMA = transformers.LlamaConfig(
    vocab_size=200, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, pad_token_id=0, tie_word_embeddings=False,
)  # fmt: skip
IDS = torch.arange(10, 20)[None]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.saved(tmp_path_factory.mktemp("llama"), LLAMA, transformers.AutoModelForCausalLM)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.base_model(tmp_path_factory.mktemp("bert"), layers=2)


def trained(folder: Path, auto: Any, base: Path, task: str | None, **options: Any) -> torch.Tensor:
    """Save such a module, and return what the model computes with it."""
    model = auto.from_pretrained(base)
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type=task, r=2, **options)).eval()
    tiny.randomise_trained(adapted, 1)
    adapted.save_pretrained(folder)
    with torch.inference_mode():
        output = adapted(input_ids=IDS)
    return output[0]


def returned(folder: Path, handle: ModelHandle, *, speaks: bool = False) -> torch.Tensor:
    """What the model computes with the module read, tied to its sites, and written again."""
    raw = with_task(read_checkpoint(folder), handle.architecture)
    again = checkpoint_of_student(resolve(raw, handle.architecture, handle.base_tensors()), handle)
    with torch.inference_mode():
        return attach(again, handle, speaks=speaks).model(input_ids=IDS)[0]


@pytest.mark.parametrize("saved", [["norm"], ["input_layernorm"], ["model.norm"]], ids=str)
def test_norms_of_a_decoder_compute_what_they_did(saved: list[str], llama: Path, tmp_path: Path) -> None:
    auto = transformers.AutoModelForCausalLM
    expected = trained(tmp_path, auto, llama, "CAUSAL_LM", target_modules=["q_proj"], modules_to_save=saved)
    assert torch.equal(returned(tmp_path, load_model(str(llama)), speaks=True), expected)


@pytest.mark.parametrize("task", ["SEQ_CLS", None])
def test_norms_of_an_encoder_compute_what_they_did(task: str | None, bert: Path, tmp_path: Path) -> None:
    auto = transformers.AutoModelForSequenceClassification if task else transformers.AutoModel
    options = {
        "target_modules": ["query"],
        "modules_to_save": ["LayerNorm", *(["classifier", "pooler"] if task else [])],
    }
    expected = trained(tmp_path, auto, bert, task, **options)
    found = returned(tmp_path, load_model(str(bert)))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_norms_move_and_can_be_left_out(llama: Path, tmp_path: Path) -> None:
    trained(tmp_path / "m", transformers.AutoModelForCausalLM, llama, "CAUSAL_LM", target_modules=["q_proj"],
            modules_to_save=["norm"])  # fmt: skip
    found = tiny.inspect(tmp_path / "m", llama, method="copy")
    assert [site.role for site in found.sites] == ["attn.norm", "attn.query", "ffn.norm", "final.norm"]
    assert found.student.problem is None
    student = tiny.saved(tmp_path / "student", LLAMA, transformers.AutoModelForCausalLM, seed=1, num_hidden_layers=1)
    graft = tiny.transfer(
        tmp_path / "m", student, method="copy", sites=("attn.query", "final.norm"), out=tmp_path / "g"
    )
    assert graft.report.verification.done
    moved, own = load_file(tmp_path / "g" / "adapter_model.safetensors"), load_model(str(student)).base.norm.weight
    was = load_file(tmp_path / "m" / "adapter_model.safetensors")["base_model.model.model.norm.weight"]
    key = "base_model.model.model.norm.weight"
    assert {name.rpartition(".layers")[0] or name for name in moved} == {"base_model.model.model", key}
    torch.testing.assert_close(moved[key], was + (own - load_model(str(llama)).base.norm.weight))


def test_a_norm_and_something_else_at_one_place_are_refused(llama: Path, tmp_path: Path) -> None:
    trained(tmp_path, transformers.AutoModelForCausalLM, llama, "CAUSAL_LM", target_modules=["q_proj"],
            modules_to_save=["model.norm"])  # fmt: skip
    file = tmp_path / "adapter_model.safetensors"
    save_file({**load_file(file), "base_model.model.model.norm.lora_A.weight": torch.ones(2, 16)}, file)
    with pytest.raises(CheckpointError, match=r"the file holds a trained norm at model\.norm and something else there"):
        read_checkpoint(tmp_path)


def test_other_parts_of_the_base_stay_behind_where_the_user_names_what_moves(bert: Path, tmp_path: Path) -> None:
    """The teacher has them when it is asked."""
    auto = transformers.AutoModelForSequenceClassification
    saved = ["classifier", "token_type_embeddings"]
    expected = trained(tmp_path, auto, bert, "SEQ_CLS", target_modules=["query"], modules_to_save=saved)
    handle = load_model(str(bert))
    raw = with_task(read_checkpoint(tmp_path), handle.architecture)
    assert list(raw.beside) == ["bert.embeddings.token_type_embeddings.weight"]
    assert raw.num_labels == 2
    with torch.inference_mode():
        assert torch.equal(attach(raw, handle).model(input_ids=IDS)[0], expected)
    refused = tiny.inspect(tmp_path, bert, method="copy").student.problem
    assert "a trained part of its base model, bert.embeddings.token_type" in refused
    assert refused.endswith("naming what moves: --sites attn.query")
    plan = tiny.inspect(tmp_path, bert, method="copy", sites=("attn.query",)).student
    assert plan.problem is None
    assert plan.head
    note = "what was trained of the base model itself is left out: bert.embeddings.token_type_embeddings"
    assert note in plan.notes
    graft = tiny.transfer(tmp_path, bert, method="copy", sites=("attn.query",), head="drop")
    assert not graft.raw.beside


def test_of_a_model_no_more_is_read_than_a_head_may_share_with_it(bert: Path, tmp_path: Path) -> None:
    """Values that are offloaded or packed take long to read."""
    read = []

    class Noted(UserDict[str, torch.Tensor]):
        def __getitem__(self, name: str) -> torch.Tensor:
            read.append(name)
            return super().__getitem__(name)

    tiny.peft_lora(tmp_path / "module", bert)
    handle = load_model(str(bert))
    checkpoint = resolve(read_checkpoint(tmp_path / "module"), handle.architecture, handle.base_tensors())
    assert to_raw(checkpoint, handle.architecture, Noted(handle.base_tensors())).head
    assert not read
