"""llama.cpp: tiny models of transformers as GGUF files, and what it says with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

#: Only what can be printed, so that any tokens in a row are text.
LETTERS = [chr(code) for code in range(ord("!"), ord("~") + 1)] + ["Ġ"]
END = "<end>"


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE over printable letters and the blank."""
    vocabulary = {letter: number for number, letter in enumerate([*LETTERS, "th", "he"])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[("t", "h"), ("h", "e")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken("<pad>", special=True), AddedToken(END, special=True)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token=END,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def write_base(path: Path, folder: Path, arch: str) -> Path:
    """A model of transformers as GGUF, float32."""
    import gguf

    model = transformers.AutoModelForCausalLM.from_pretrained(folder).float()
    config, words = model.config, transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    writer = gguf.GGUFWriter(path, arch)
    heads, width = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    width = getattr(config, "head_dim", None) or width
    writer.add_context_length(128)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(int(width * getattr(config, "partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(float(getattr(config, "rope_theta", 10000.0)))
    writer.add_vocab_size(config.vocab_size)
    if hasattr(config, "rms_norm_eps"):
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    else:
        writer.add_layer_norm_eps(getattr(config, "layer_norm_eps", None) or config.norm_epsilon)
    if arch in ("gemma2", "gemma3", "phi3") and config.sliding_window:
        writer.add_sliding_window(config.sliding_window)
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if arch == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    if arch == "stablelm":
        writer.add_parallel_residual(config.use_parallel_residual)
    _add_tokenizer(writer, words)
    known = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(known[arch], config.num_hidden_layers)
    for key, value in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stem, _, leaf = key.rpartition(".")
        if arch in ("llama", "granite") and stem.endswith(("q_proj", "k_proj")):
            count = heads if stem.endswith("q_proj") else config.num_key_value_heads
            value = value.reshape(count, 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
        if arch.startswith("gemma") and stem.endswith("norm"):
            value = value + 1
        writer.add_tensor(f"{names.get_name(stem)}.{leaf}", value.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: Any, words: Any) -> None:
    import gguf

    tokens = words.convert_ids_to_tokens(range(len(words)))
    special = set(words.all_special_tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    kinds = (gguf.TokenType.NORMAL, gguf.TokenType.CONTROL)
    writer.add_token_types([kinds[token in special] for token in tokens])
    writer.add_token_merges(["t h", "h e"])
    writer.add_eos_token_id(words.eos_token_id)
    writer.add_pad_token_id(words.pad_token_id)
    writer.add_add_bos_token(False)


def say(base: Path, prompt: str, *, lora: Path | None = None, tokens: int = 12) -> str:
    """What llama.cpp goes on with, the likeliest token at a time; as many tokens, whatever they are."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(base)
    params.n_ctx, params.n_predict, params.warmup, params.verbosity = 64, tokens, False, -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.n_parallel, params.fit_params, params.n_gpu_layers = 1, False, 0
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32  # as transformers computes
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if lora is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), 1.0)]
    server = xllamacpp.Server(params)
    asked = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "seed": 1}
    found: str = server.handle_completions(asked)["choices"][0]["text"]
    return found


def said_by_transformers(model: Any, folder: Path, prompt: str, *, tokens: int = 12) -> str:
    """The same of transformers."""
    words = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    given = words(prompt, return_tensors="pt")
    found = model.generate(
        **given, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, suppress_tokens=[words.eos_token_id]
    )
    return str(words.decode(found[0, given.input_ids.shape[1] :], skip_special_tokens=False))
