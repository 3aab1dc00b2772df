"""``transfer --for``: modules that a server takes, and those that none does, said before anything is computed."""

from __future__ import annotations

import warnings
from pathlib import Path

import peft
import pytest
import torch
import transformers

import families
import peft_graft
import tiny
from peft_graft import GraftConfig
from peft_graft.checkpoints.convert import low_rank
from peft_graft.errors import PlanError

TARGETS = ["q_proj", "down_proj"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return families.llama(tmp_path_factory.mktemp("for") / "teacher")


def module(folder: Path, base: Path, config: peft.PeftConfig) -> Path:
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, config)
        tiny.randomise_trained(adapted, 1)
        adapted.save_pretrained(folder, save_embedding_layers=False)
    return folder


def ia3() -> peft.IA3Config:
    return peft.IA3Config(task_type="CAUSAL_LM", target_modules=TARGETS, feedforward_modules=["down_proj"])


@pytest.mark.parametrize("target", ["gguf", "vllm"])
@pytest.mark.parametrize("kind", ["dora", "ia3"])
def test_what_has_full_rank_moves_as_a_lora(teacher, tmp_path, kind: str, target: str) -> None:
    config = ia3() if kind == "ia3" else peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=TARGETS, use_dora=True
    )  # fmt: skip
    path = module(tmp_path / "module", teacher, config)
    graft = peft_graft.transfer(path, teacher, out=tmp_path / "graft", config=GraftConfig(method="copy", for_=target))
    said = peft.PeftConfig.from_pretrained(tmp_path / "graft")
    assert (said.peft_type, said.use_dora, said.r) == ("LORA", False, 16)
    note = next(note for note in graft.report.notes if note.startswith("moved as a LoRA of rank 16, which holds "))
    assert 50 < float(note.split("holds ")[1].split("%")[0]) < 100
    found = peft_graft.export(tmp_path / "graft", to=target)
    assert found.kept == 1
    assert found.comparison.lost < 1e-4
    exact = peft_graft.transfer(path, teacher, config=GraftConfig(method="copy"))
    ids = torch.tensor([[5, 9, 20, 33, 7]])
    with torch.inference_mode(), graft.model.disable_adapter():
        bare = graft.model(ids).logits
    with torch.inference_mode():
        own, lora = exact.model(ids).logits, graft.model(ids).logits
    assert (lora - own).norm() < (bare - own).norm()


def test_a_plain_lora_moves_as_ever(teacher, tmp_path) -> None:
    path = module(tmp_path / "lora", teacher, peft.LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=TARGETS))
    found = peft_graft.transfer(path, teacher, config=GraftConfig(method="copy", for_="vllm"))
    plain = peft_graft.transfer(path, teacher, config=GraftConfig(method="copy"))
    assert found.raw.parts == plain.raw.parts
    assert not any(note.startswith("moved as") for note in found.report.notes)
    assert "for_" not in GraftConfig().record()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "no LoRA can stand for this"),
        (peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=["norm"]), "no LoRA can stand for this"),
        (peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=TARGETS, modules_to_save=["lm_head"]), "lm_head"),
        (peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=TARGETS, lora_bias=True), "found A, B, bias"),
    ],
    ids=["prompts", "norms", "modules_to_save", "bias"],
)
def test_what_no_server_takes_is_refused_by_the_plan(teacher, tmp_path, config, said: str) -> None:
    path = module(tmp_path / "module", teacher, config)
    with pytest.raises(PlanError) as caught:
        peft_graft.transfer(path, teacher, out=tmp_path / "graft", config=GraftConfig(method="copy", for_="vllm"))
    assert str(caught.value).startswith("--for vllm, ")
    assert said in str(caught.value)
    problem = peft_graft.inspect(path, teacher, config=GraftConfig(method="copy", for_="vllm")).student.problem
    assert problem == str(caught.value)


def test_a_student_that_no_server_takes_lora_for_is_refused_by_the_plan(teacher, world, tmp_path, command) -> None:
    words = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "embed_tokens"])
    path = module(tmp_path / "words", teacher, words)
    done = command("transfer", path, "--student", teacher, "--method", "copy", "--for", "vllm", "--out",
                   tmp_path / "graft", code=1)  # fmt: skip
    assert "the server has no place for a LoRA of word embeddings or of the output layer" in done.err.replace("\n", " ")
    tiny.saved(tmp_path / "neox", families.DECODERS["gpt_neox"], transformers.AutoModelForCausalLM)
    lora = module(tmp_path / "lora", teacher, peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
    with pytest.raises(
        PlanError, match="--for gguf, .*neox: LoRA for this architecture cannot be written for llama.cpp"
    ):
        peft_graft.transfer(lora, tmp_path / "neox", config=GraftConfig(for_="gguf", method="ridge"),
                            text=tiny.sentences(60))  # fmt: skip
    with pytest.raises(PlanError, match="--for vllm: servers take modules of language models alone"):
        peft_graft.transfer(world / "lora", world / "shallow", config=GraftConfig(for_="vllm", method="copy"))


def test_a_low_rank_is_found_without_all_singular_values() -> None:
    """As in layers of large models, of which all of them take minutes."""
    generator = torch.Generator().manual_seed(0)
    update = torch.randn(300, 6, generator=generator) @ torch.randn(6, 200, generator=generator)
    update += 0.01 * torch.randn(300, 200, generator=generator)
    before = torch.random.get_rng_state()
    a, b, lost = low_rank(update, 6)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert a.shape == (6, 200)
    assert lost == pytest.approx(float((update - b @ a).double().square().sum()), rel=1e-3)
    u, s, v = torch.linalg.svd(update)
    torch.testing.assert_close(b @ a, (u[:, :6] * s[:6]) @ v[:6], atol=1e-3, rtol=1e-3)
