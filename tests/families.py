"""Small configurations of every family of models, and models and modules made of them."""

from __future__ import annotations

from pathlib import Path

import peft
import transformers

import tiny
from peft_graft.checkpoints.read import read_checkpoint

COMMON = {"vocab_size": 200, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0,
          "bos_token_id": 2, "eos_token_id": 3}  # fmt: skip
FFN = {"intermediate_size": 48}
DECODERS = {
    "gpt2": transformers.GPT2Config(
        vocab_size=200, n_embd=32, n_layer=2, n_head=4, n_inner=48, n_positions=72, pad_token_id=0, bos_token_id=2,
        eos_token_id=3, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    ),
    "opt": transformers.OPTConfig(
        **COMMON, ffn_dim=48, max_position_embeddings=72, word_embed_proj_dim=32, dropout=0.0
    ),
    "gpt_neox": transformers.GPTNeoXConfig(**COMMON, **FFN, max_position_embeddings=72),
    "llama": transformers.LlamaConfig(**COMMON, **FFN, num_key_value_heads=2),
    "mistral": transformers.MistralConfig(**COMMON, **FFN, num_key_value_heads=2),
    "qwen2": transformers.Qwen2Config(**COMMON, **FFN, num_key_value_heads=2),
    "qwen3": transformers.Qwen3Config(**COMMON, **FFN, num_key_value_heads=2, head_dim=12),
    "gemma": transformers.GemmaConfig(**COMMON, **FFN, num_key_value_heads=1, head_dim=16),
    "gemma2": transformers.Gemma2Config(**COMMON, **FFN, num_key_value_heads=2, head_dim=8),
    "gemma3": transformers.Gemma3TextConfig(**COMMON, **FFN, num_key_value_heads=2, head_dim=8),
    "cohere": transformers.CohereConfig(**COMMON, **FFN, num_key_value_heads=2),
    "olmo2": transformers.Olmo2Config(**COMMON, **FFN, num_key_value_heads=2),
    "phi3": transformers.Phi3Config(**COMMON, **FFN, num_key_value_heads=2),
    "falcon": transformers.FalconConfig(**COMMON, ffn_hidden_size=48, multi_query=True),
    "falcon-new": transformers.FalconConfig(
        **COMMON, ffn_hidden_size=48, new_decoder_architecture=True, num_kv_heads=2
    ),
    "bloom": transformers.BloomConfig(vocab_size=200, hidden_size=32, n_layer=2, n_head=4, pad_token_id=0),
    "stablelm": transformers.StableLmConfig(**COMMON, **FFN, num_key_value_heads=2),
}  # fmt: skip
_GPT = {"vocab_size": 200, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 72, "n_inner": 48, "pad_token_id": 0,
        "bos_token_id": 2, "eos_token_id": 3, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # fmt: skip
_ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 20,
           "n_shared_experts": 1, "first_k_dense_replace": 1}  # fmt: skip
_LATENT = {"kv_lora_rank": 14, "qk_rope_head_dim": 8, "qk_nope_head_dim": 6, "v_head_dim": 10}
#: Decoders whose rows are tried by the laws of a row alone (``test_decoder_rows.py``), which take no transfer.
MORE_DECODERS = {
    "glm4": transformers.Glm4Config(**COMMON, **FFN, num_key_value_heads=2, head_dim=8),
    "starcoder2": transformers.Starcoder2Config(**COMMON, **FFN, num_key_value_heads=2),
    "gpt_neo": transformers.GPTNeoConfig(
        vocab_size=200, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
        window_size=16, intermediate_size=48, max_position_embeddings=72, pad_token_id=0,
    ),
    "gpt_bigcode": transformers.GPTBigCodeConfig(**_GPT),
    "gpt_bigcode-heads": transformers.GPTBigCodeConfig(**_GPT, multi_query=False),
    "mpt": transformers.MptConfig(
        vocab_size=200, d_model=32, n_layers=2, n_heads=4, max_seq_len=72, expansion_ratio=2, pad_token_id=0
    ),
    "persimmon": transformers.PersimmonConfig(**COMMON, **FFN),
    "lfm2": transformers.Lfm2Config(
        **{**COMMON, "num_hidden_layers": 3}, num_key_value_heads=2, block_ff_dim=48, full_attn_idxs=[1],
        block_auto_adjust_ff_dim=False,
    ),
    "deepseek_v3": transformers.DeepseekV3Config(**COMMON, **FFN, **_ROUTED, **_LATENT, q_lora_rank=12),
    "deepseek_v3-queries": transformers.DeepseekV3Config(**COMMON, **FFN, **_ROUTED, **_LATENT, q_lora_rank=None),
    "glm4_moe": transformers.Glm4MoeConfig(**COMMON, **FFN, **_ROUTED, num_key_value_heads=2, head_dim=8),
}  # fmt: skip
ENCODERS = {
    "modernbert": transformers.ModernBertConfig(
        **{**COMMON, "num_hidden_layers": 3}, **FFN, max_position_embeddings=72, cls_token_id=2, sep_token_id=3,
        reference_compile=False, attn_implementation="eager",
    ),
    "deberta-v2": transformers.DebertaV2Config(
        **COMMON, **FFN, max_position_embeddings=72, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    ),
    "albert": transformers.AlbertConfig(
        **COMMON, **FFN, embedding_size=32, max_position_embeddings=72, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    ),
}  # fmt: skip
SPECIAL = {"vocab_size": 200, "pad_token_id": 0, "decoder_start_token_id": 2, "eos_token_id": 3}
T5 = {**SPECIAL, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4,
      "dropout_rate": 0.0}  # fmt: skip
BART = {
    **SPECIAL, "bos_token_id": 2, "d_model": 32, "encoder_layers": 2, "decoder_layers": 3,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "max_position_embeddings": 72, "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0,
    "forced_eos_token_id": None, "is_encoder_decoder": True,
}  # fmt: skip
ENCODER_DECODERS = {
    "t5": transformers.T5Config(**T5, feed_forward_proj="relu"),
    "t5-gated": transformers.T5Config(**T5, feed_forward_proj="gated-gelu"),
    "mt5": transformers.MT5Config(**T5),
    "umt5": transformers.UMT5Config(**T5),
    "bart": transformers.BartConfig(**BART),
    "mbart": transformers.MBartConfig(**BART),
    "marian": transformers.MarianConfig(**BART),
    "pegasus": transformers.PegasusConfig(**BART),
    "m2m_100": transformers.M2M100Config(**BART),
}  # fmt: skip
T5_TARGETS = ["q", "k", "v", "o", "wo"]
BART_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
TOWER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
EYE = {**TOWER, "image_size": 16, "patch_size": 8}
READER = {**TOWER, "vocab_size": 200, "max_position_embeddings": 72, "eos_token_id": 3, "pad_token_id": 0,
          "bos_token_id": 2}  # fmt: skip
TOWERS = {
    "vit": transformers.ViTConfig(**EYE),
    "deit": transformers.DeiTConfig(**EYE),
    "clip": transformers.CLIPConfig(text_config=READER, vision_config=EYE, projection_dim=16),
    "clip_text_model": transformers.CLIPTextConfig(**READER),
    "clip_vision_model": transformers.CLIPVisionConfig(**EYE),
    "siglip": transformers.SiglipConfig(text_config=READER, vision_config=EYE),
    "siglip_vision_model": transformers.SiglipVisionConfig(**EYE),
    "whisper": transformers.WhisperConfig(
        **{key: value for key, value in BART.items() if "position" not in key}, num_mel_bins=8,
        max_source_positions=20, max_target_positions=40, suppress_tokens=None, begin_suppress_tokens=None,
    ),
}  # fmt: skip
MIXTURE = {"vocab_size": 200, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
           "num_key_value_heads": 2, "pad_token_id": 0, "intermediate_size": 48, "num_experts_per_tok": 2}  # fmt: skip
SMALL_EXPERTS = {"num_experts": 4, "moe_intermediate_size": 20, "norm_topk_prob": True, "decoder_sparse_step": 1}
MIXTURES = {
    "mixtral": transformers.MixtralConfig(**MIXTURE, num_local_experts=4),
    "qwen2_moe": transformers.Qwen2MoeConfig(
        **{**MIXTURE, "num_hidden_layers": 3}, **SMALL_EXPERTS, shared_expert_intermediate_size=24, mlp_only_layers=[1]
    ),
    "qwen3_moe": transformers.Qwen3MoeConfig(**MIXTURE, **SMALL_EXPERTS, head_dim=12),
    "olmoe": transformers.OlmoeConfig(**MIXTURE, num_experts=4),
}  # fmt: skip


def targets_of(family: str) -> list[str]:
    if "t5" in family:
        return [*T5_TARGETS, *(["wi"] if family == "t5" else ["wi_0", "wi_1"])]
    return BART_TARGETS


def saved(folder: Path, family: str, seed: int = 0, **changes) -> Path:
    return tiny.saved(folder, ENCODER_DECODERS[family], seed=seed, **changes)


def trained(folder: Path, base: Path, targets, task: str | None = "SEQ_2_SEQ_LM", auto: str = "AutoModelForSeq2SeqLM"):
    model = getattr(transformers, auto).from_pretrained(base).eval()
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type=task, r=4, lora_alpha=8, target_modules=targets))
    tiny.randomise(adapted, 1, ("lora_",))
    adapted.save_pretrained(folder)
    return adapted.eval()


def same_module(first: Path, second: Path) -> None:
    before, after = read_checkpoint(first), read_checkpoint(second)
    assert before.parts == after.parts


def options(text: Path, **changes) -> dict:
    return {"text": text, "method": "prune-align", "max_tokens": 1500, "polish": 0, **changes}


def llama(folder: Path, **shape) -> Path:
    config = transformers.LlamaConfig(
        **{"vocab_size": 200, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
           "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, **shape}
    )  # fmt: skip
    tiny.lively(transformers.AutoModelForCausalLM.from_config(config), 2).save_pretrained(folder)
    tiny.tokenizer(folder)
    return folder
