"""Names that wrappers leave in a file's keys mean nothing, wherever they stand and whatever the tensor is."""

from __future__ import annotations

import peft
import pytest
import torch
import transformers

import tiny
from families import COMMON, FFN
from peft_graft.checkpoints.formats.base import format_of
from peft_graft.checkpoints.formats.peft.format import config_dict
from peft_graft.checkpoints.raw import RawCheckpoint
from peft_graft.errors import CheckpointError

KINDS = {
    "lora": peft.LoraConfig(
        target_modules=["q_proj", "embed_tokens"], modules_to_save=["score"], use_dora=True, task_type="SEQ_CLS"
    ),
    "vocabulary": peft.LoraConfig(
        target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"], task_type="CAUSAL_LM"
    ),
    "tokens": peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3, 5], task_type="CAUSAL_LM"),
    "ia3": peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM"),
    "norms": peft.LNTuningConfig(target_modules=["input_layernorm"], task_type="CAUSAL_LM"),
    "prompt": peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    "loha": peft.LoHaConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"),
}  # fmt: skip
WRAPPERS = ("_orig_mod.", "module.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def parsed(config: dict, tensors: dict[str, torch.Tensor]) -> RawCheckpoint:
    return format_of("peft").parse(config, tensors)


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
@pytest.mark.parametrize("kind", KINDS)
def test_a_wrapped_file_is_read_like_the_plain_one(kind: str) -> None:
    task = KINDS[kind].task_type
    auto = transformers.AutoModelForSequenceClassification if task == "SEQ_CLS" else transformers.AutoModelForCausalLM
    model = peft.get_peft_model(auto.from_config(transformers.LlamaConfig(**COMMON, **FFN)), KINDS[kind])
    tiny.randomise_trained(model, 1)
    config = config_dict(model.peft_config["default"])
    tensors = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    plain = parsed(config, tensors)
    for wrapper in WRAPPERS:
        for place in ("", "base_model.", "base_model.model.", "model.layers.0.", "self_attn."):
            found = parsed(config, {key.replace(place, place + wrapper, 1): value for key, value in tensors.items()})
            assert found.parts == plain.parts
            assert found.head.keys() == plain.head.keys()
            assert found.unconverted.keys() == plain.unconverted.keys()


def test_alphas_by_layer_are_named_likewise() -> None:
    key = "base_model.model.model.layers.0._orig_mod.self_attn.q_proj"
    tensors = {f"{key}.lora_A.weight": torch.ones(2, 8), f"{key}.lora_B.weight": torch.ones(8, 2)}
    pattern = {r"model\.layers\.0\._orig_mod\.self_attn\.q_proj": 10}
    raw = parsed({"peft_type": "LORA", "r": 2, "lora_alpha": 2, "alpha_pattern": pattern}, tensors)
    assert raw.parts["model.layers.0.self_attn.q_proj"].scaling == 5


def test_a_tensor_with_a_wrapper_and_without_is_refused() -> None:
    plain = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    wrapped = f"_orig_mod.{plain}"
    with pytest.raises(CheckpointError, match=f"one tensor twice.*found {plain} and {wrapped}"):
        parsed({"peft_type": "LORA"}, {plain: torch.ones(2, 8), wrapped: torch.ones(2, 8)})
