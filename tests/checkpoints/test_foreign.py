"""Checkpoints of other programs, and of training: each is named for what it is, with what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import tiny
from peft_graft.checkpoints.read import locate, read_checkpoint
from peft_graft.errors import CheckpointError

LORA = {"unet.attn.to_q.lora_A.weight": torch.ones(2, 4), "unet.attn.to_q.lora_B.weight": torch.ones(4, 2)}
KOHYA = {f"lora_te_layers_0_q_proj.lora_{name}.weight": torch.ones(2, 2) for name in ("down", "up")}
MLX = {f"model.layers.0.self_attn.q_proj.lora_{name}": torch.ones(2, 2) for name in "ab"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A module as peft saves it."""
    folder = tmp_path_factory.mktemp("saved")
    words = transformers.LlamaConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                                     intermediate_size=8)  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(words)
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2)
    peft.get_peft_model(model, config).save_pretrained(folder)
    return folder


def touched(*names: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        for name in names:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"GGUF" if path.suffix == ".gguf" else b"{}")

    return make


def tensors(name: str, values: dict[str, torch.Tensor], **about: str) -> Callable[[Path], None]:
    return lambda folder: save_file(values, folder / name, metadata=about or None)


def config(**content: object) -> Callable[[Path], None]:
    return lambda folder: (folder / "adapter_config.json").write_text(json.dumps(content))


FOLDERS: dict[str, tuple[list[Callable[[Path], object]], str]] = {
    "mlx-lm": ([tensors("adapters.safetensors", MLX), config(fine_tune_type="lora")], "an adapter of mlx-lm"),
    "Kohya": ([tensors("my style.safetensors", KOHYA)], "a LoRA of Kohya's scripts"),
    "Kohya by its metadata": (
        [tensors("x.safetensors", {"a": torch.ones(1)}, ss_network_module="networks.lora")],
        "a LoRA of Kohya's scripts",
    ),
    "diffusers": ([tensors("pytorch_lora_weights.safetensors", LORA)], "a LoRA of diffusers"),
    "diffusers by names": ([tensors("some.safetensors", LORA)], "a LoRA of diffusers"),
    "GGUF": ([touched("lora-f16.gguf")], r"an adapter of llama.cpp \(GGUF\)"),
    "NeMo": ([touched("weights/__0_0.distcp", "context/io.json", "adapter_metadata.json")], "a checkpoint of NeMo"),
    "NeMo, one file": ([touched("model.nemo")], "a checkpoint of NeMo"),
    "torchtune": ([touched("adapter_0.pt", "recipe_state.pt")], "torchtune wrote the weights as .pt"),
    "FSDP": ([touched("pytorch_model_fsdp_0/__0_0.distcp", "trainer_state.json")], "a checkpoint of FSDP"),
    "DeepSpeed": ([touched("global_step5/mp_rank_00_model_states.pt", "latest")], "a checkpoint of DeepSpeed"),
    "Lightning": ([touched("epoch=3.ckpt")], "a checkpoint of PyTorch Lightning"),
    "fusion": ([touched("adapter_fusion_config.json")], "a fusion of several adapters"),
    "head alone": ([touched("head_config.json", "pytorch_model_head.bin")], "a prediction head without a module"),
    "inversion": ([touched("learned_embeds.safetensors")], "embeddings for a model that makes images"),
    "archive": ([touched("ner.zip")], "this is an archive"),
    "whole model": ([touched("config.json", "model-00001-of-00002.safetensors")], "a whole model, with no module"),
    "no configuration": ([touched("adapter_model.safetensors")], "weights without adapter_config.json"),
    "model's configuration": (
        [config(model_type="chatglm", architectures=["ChatGLM"])], "the configuration of a model, not of a module",
    ),
    "unknown configuration": ([config(rank=4)], "neither peft's, which has peft_type, nor AdapterHub's"),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_is_named_for_what_it_is(name: str, tmp_path: Path) -> None:
    made, expected = FOLDERS[name]
    for make in made:
        make(tmp_path)
    with pytest.raises(CheckpointError, match=rf"holds no module checkpoint: .*{expected}.*found .*\. Fix: "):
        read_checkpoint(tmp_path)


WEIGHTS = {
    "GGUF": (touched("lora.gguf"), "llama.cpp"),
    "torchtune": (touched("adapter_model.pt"), "name it adapter_model.bin"),
    "sharded": (touched("adapter_model.safetensors.index.json"), "in several files, .*save_file all of them"),
    "DeepSpeed": (touched("global_step500/x.pt", "zero_to_fp32.py"), "Fix: gather them with its zero_to_fp32.py"),
    "FSDP": (touched("pytorch_model_fsdp.bin"), "FSDP wrote the state of the whole model"),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_missing_weights_say_where_they_are(name: str, saved: Path, tmp_path: Path) -> None:
    shutil.copy(saved / "adapter_config.json", tmp_path)
    make, expected = WEIGHTS[name]
    make(tmp_path)
    with pytest.raises(CheckpointError, match=f"the weights file is missing: .*{expected}"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(("values", "expected"), [(KOHYA, "a LoRA of Kohya's scripts"), (MLX, "an adapter of mlx-lm")])
def test_foreign_tensors_beside_a_configuration_of_peft(values, expected: str, saved: Path, tmp_path: Path) -> None:
    shutil.copy(saved / "adapter_config.json", tmp_path)
    save_file(values, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=f"this is {expected}.*; found {next(iter(values))[:8]}.*Fix: "):
        read_checkpoint(tmp_path)


def test_a_file_in_place_of_a_folder(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"a file was given, not a folder; .*Fix: give its folder: {saved}"):
        locate(saved / "adapter_model.safetensors")
    save_file(KOHYA, tmp_path / "style.safetensors")
    with pytest.raises(CheckpointError, match=r"a file was given, not a folder: this is a LoRA of Kohya's scripts"):
        locate(tmp_path / "style.safetensors")
    (tmp_path / "module.zip").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match=r"a file was given, not a folder: this is an archive.*Fix: unpack it"):
        locate(tmp_path / "module.zip")


def test_modules_two_levels_down_are_named(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "checkpoint-500" / "default")
    shutil.copytree(saved, tmp_path / "last")
    with pytest.raises(CheckpointError, match=r"give one of its sub-folders: checkpoint-500/default, last"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\n",
            "a pointer of git-lfs.*Fix: run `git lfs pull`",
        ),
        (b"<!DOCTYPE html><html>", "a web page, not the file"),
        (b"GGUF\3\0\0\0", "a GGUF file of llama.cpp"),
    ],
)
def test_other_files_in_place_of_the_weights(start: bytes, expected: str, saved: Path, tmp_path: Path) -> None:
    shutil.copy(saved / "adapter_config.json", tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(start)
    with pytest.raises(CheckpointError, match=f"the weights cannot be read: it is {expected}"):
        read_checkpoint(tmp_path)


# ---- DeepSpeed's ZeRO-3 ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0, 1])
def test_tensors_that_zero3_left_empty(kept: int, saved: Path, tmp_path: Path) -> None:
    shutil.copy(saved / "adapter_config.json", tmp_path)
    values = load_file(saved / "adapter_model.safetensors")
    emptied = {name: value if index < kept else torch.zeros(0) for index, (name, value) in enumerate(values.items())}
    save_file(emptied, tmp_path / "adapter_model.safetensors")
    with pytest.raises(
        CheckpointError, match=rf"{2 - kept} of the module's 2 tensors are empty, .*ZeRO-3.*Fix: save it"
    ):
        read_checkpoint(tmp_path)
    save_file({}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"the file holds no tensors at all.*ZeRO-3.*stage3_gather_16bit_weights"):
        read_checkpoint(tmp_path)


def test_a_head_that_zero3_left_empty_can_be_dropped(world: Path, tmp_path: Path) -> None:
    module = Path(shutil.copytree(world / "lora", tmp_path / "module"))
    values = load_file(module / "adapter_model.safetensors")
    emptied = {name: value if "lora" in name else torch.zeros(0) for name, value in values.items()}
    save_file(emptied, module / "adapter_model.safetensors")
    found = tiny.inspect(module, student=world / "shallow", method="copy")
    assert "the head's classifier.bias is empty, as DeepSpeed's ZeRO-3" in str(found.student.problem)
    assert tiny.inspect(module, student=world / "shallow", method="copy", head="drop").student.problem is None
