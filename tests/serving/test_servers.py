"""LoRA for llama.cpp, Ollama and vLLM: run where they can be, and checked by the servers' rules."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing

import llama_cpp
import peft_graft
import tiny
from peft_graft import ExportConfig
from peft_graft.errors import PlanError
from peft_graft.serving.ollama import template_of

PROMPT = "the river"
WORDS = llama_cpp.tokenizer()
COMMON = {
    "vocab_size": len(WORDS), "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 96, "max_position_embeddings": 128,
    "pad_token_id": WORDS.pad_token_id, "eos_token_id": WORDS.eos_token_id, "bos_token_id": None,
}  # fmt: skip
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 64}
#: ``model_type`` -> a configuration, and llama.cpp's architecture.
DECODERS = {
    "llama": (transformers.LlamaConfig(**COMMON), "llama"),
    "mistral": (transformers.MistralConfig(**COMMON, sliding_window=None), "llama"),
    "qwen2": (transformers.Qwen2Config(**COMMON), "qwen2"),
    "qwen3": (transformers.Qwen3Config(**COMMON, head_dim=24), "qwen3"),
    "gemma": (transformers.GemmaConfig(**COMMON, head_dim=16), "gemma"),
    "gemma2": (transformers.Gemma2Config(**COMMON, **GEMMA), "gemma2"),
    "gemma3_text": (transformers.Gemma3TextConfig(**COMMON, **GEMMA), "gemma3"),
    "phi3": (transformers.Phi3Config(**COMMON), "phi3"),
    "granite": (
        transformers.GraniteConfig(**COMMON, attention_multiplier=0.25, embedding_multiplier=2.0,
                                   residual_multiplier=0.5, logits_scaling=2.0), "granite",
    ),
    "olmo2": (transformers.Olmo2Config(**COMMON), "olmo2"),
    "starcoder2": (transformers.Starcoder2Config(**COMMON), "starcoder2"),
    "stablelm": (transformers.StableLmConfig(**COMMON, partial_rotary_factor=0.5), "stablelm"),
}  # fmt: skip
LORA = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"}


def base(folder: Path, kind: str = "llama", **changes) -> Path:
    config = DECODERS[kind][0]
    model = transformers.AutoModelForCausalLM.from_config(type(config)(**{**config.to_dict(), **changes}))
    tiny.lively(model, 2).save_pretrained(folder)
    WORDS.save_pretrained(folder)
    return folder


def module(folder: Path, model: Path, config: peft.PeftConfig | None = None):
    """A trained module on disk, and the model with it."""
    config = config or peft.LoraConfig(task_type="CAUSAL_LM", **LORA)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(loaded, config)
        tiny.randomise_trained(adapted, 1)
        adapted.save_pretrained(folder, save_embedding_layers=False)
    return adapted.eval()


def lora(**options) -> peft.LoraConfig:
    return peft.LoraConfig(task_type="CAUSAL_LM", **{**LORA, **options})


def logits(model, ids=(5, 9, 20, 33, 7)) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits


# ---- llama.cpp -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DECODERS)
def test_llama_cpp_says_what_peft_does(kind: str, tmp_path) -> None:
    pytest.importorskip("xllamacpp")
    model = base(tmp_path / "base", kind)
    options = {} if kind == "phi3" else {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"o_proj": 3}}
    adapted = module(tmp_path / "lora", model, lora(**options))
    found = peft_graft.export(tmp_path / "lora", to="gguf")
    gguf = llama_cpp.write_base(tmp_path / "base.gguf", model, DECODERS[kind][1])
    own = llama_cpp.said_by_transformers(adapted, model, PROMPT)
    assert llama_cpp.say(gguf, PROMPT, lora=tmp_path / "lora-gguf" / "adapter.gguf") == own
    spoken = logits(adapted).argmax(-1)
    with adapted.disable_adapter():
        assert not torch.equal(logits(adapted).argmax(-1), spoken)
    assert found.kept == 1
    assert found.comparison.lost < 1e-4
    assert found.use == f"llama-server --model BASE.gguf --lora {tmp_path}/lora-gguf/adapter.gguf"


@pytest.mark.parametrize(
    "config",
    [
        lora(use_rslora=True),
        lora(use_dora=True, target_modules=["q_proj", "down_proj"]),
        peft.IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "up_proj"], feedforward_modules=["up_proj"]),
        peft.LoHaConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2),
        lora(target_modules=["q_proj", "embed_tokens", "lm_head"]),
    ],
    ids=["rslora", "dora", "ia3", "loha", "words"],
)
def test_llama_cpp_says_what_other_kinds_do(config, tmp_path) -> None:
    pytest.importorskip("xllamacpp")
    model = base(tmp_path / "base")
    adapted = module(tmp_path / "module", model, config)
    found = peft_graft.export(tmp_path / "module", to="gguf", base=model)
    gguf = llama_cpp.write_base(tmp_path / "base.gguf", model, "llama")
    own = llama_cpp.said_by_transformers(adapted, model, PROMPT, tokens=8)
    assert llama_cpp.say(gguf, PROMPT, lora=tmp_path / "module-gguf" / "adapter.gguf", tokens=8) == own
    assert found.kept > 0.9999
    assert found.comparison.lost < 0.01


def test_what_a_lower_rank_loses_is_measured(tmp_path) -> None:
    model = base(tmp_path / "base")
    module(tmp_path / "dora", model, lora(use_dora=True, target_modules=["q_proj", "v_proj"]))
    kept = []
    for rank in (64, 20, 10):
        config = ExportConfig(max_rank=rank, force=True)
        found = peft_graft.export(tmp_path / "dora", to="vllm", out=tmp_path / "out", config=config)
        kept.append(found.kept)
        said = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert said["r"] <= rank
        assert f"DoRA as a LoRA of rank {said['r']}, which holds {found.kept:.4%}" in found.notes[0]
    assert kept[0] > 0.999999 > kept[1] > kept[2] > 0.2
    assert found.comparison.lost > 0.01


# ---- vLLM ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"o_proj": 3}}]
)
def test_what_vllm_reads_is_what_peft_computes(options, tmp_path) -> None:
    """One rank and one alpha for all layers: vLLM passes over patterns."""
    model = base(tmp_path / "base", "qwen3")
    adapted = module(tmp_path / "lora", model, lora(**options))
    found = peft_graft.export(tmp_path / "lora", to="vllm")
    said = json.loads((tmp_path / "lora-vllm" / "adapter_config.json").read_text())
    assert not said["rank_pattern"]
    assert not said["alpha_pattern"]
    assert not said["use_rslora"]
    assert said["bias"] == "none"
    assert said["modules_to_save"] is None
    tensors = load_file(tmp_path / "lora-vllm" / "adapter_model.safetensors")
    assert all(
        re.fullmatch(r"base_model\.model\.model\.layers\.\d\.\w+\.\w+\.lora_[AB]\.weight", key) for key in tensors
    )
    merged = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        for key in (key for key in tensors if "lora_A" in key):
            b, a = tensors[key.replace("lora_A", "lora_B")], tensors[key]
            layer = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            merged.get_submodule(layer).weight += said["lora_alpha"] / said["r"] * b @ a
    torch.testing.assert_close(logits(merged), logits(adapted), atol=1e-4, rtol=1e-4)
    assert found.notes == ["checked by the rules of vLLM 0.11, which was not run"]
    assert f"--max-lora-rank 8 --lora-modules graft={tmp_path}/lora-vllm" in found.use


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["gguf", "vllm"])
@pytest.mark.parametrize(
    ("config", "said"),
    [
        (lora(modules_to_save=["lm_head"]), "an output layer trained whole (modules_to_save) at lm_head"),
        (lora(trainable_token_indices={"embed_tokens": [4, 5]}), "embeddings of single tokens at model.embed_tokens"),
        (lora(lora_bias=True), "a trained bias at model.layers.0."),
        (peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=["norm"]), "changes no linear layer's weights"),
        (peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "no LoRA can stand for it"),
    ],
    ids=["whole", "tokens", "bias", "norms", "prompts"],
)
def test_what_servers_cannot_have_is_refused_by_name(to: str, config, said: str, tmp_path) -> None:
    model = base(tmp_path / "base")
    module(tmp_path / "module", model, config)
    with pytest.raises(PlanError) as caught:
        peft_graft.export(tmp_path / "module", to=to)
    assert said in str(caught.value)
    assert str(caught.value).startswith(f"--to {to}: ")
    assert not (tmp_path / f"module-{to}").exists()


def test_what_is_left_out_on_demand_is_said(tmp_path) -> None:
    model = base(tmp_path / "base")
    module(tmp_path / "module", model, lora(trainable_token_indices={"embed_tokens": [4, 5]}))
    found = peft_graft.export(tmp_path / "module", to="gguf", config=ExportConfig(drop=True))
    assert found.notes[0] == "left out: embeddings of single tokens (1)"
    assert found.comparison.lost >= 0


def test_models_that_servers_do_not_know_are_refused_by_name(world, tmp_path) -> None:
    with pytest.raises(
        PlanError, match="--to gguf, .*: LoRA for this architecture cannot be written for llama.cpp yet"
    ):
        peft_graft.export(world / "lora", to="gguf")
    with pytest.raises(PlanError, match=r"--to vllm, .*: vLLM 0\.11 is not known to take LoRA for this model"):
        peft_graft.export(world / "lora", to="vllm")
    tied = base(tmp_path / "tied", tie_word_embeddings=True)
    module(tmp_path / "words", tied, lora(target_modules=["embed_tokens"]))
    with pytest.raises(PlanError, match="word embeddings that are the output layer too at model.embed_tokens"):
        peft_graft.export(tmp_path / "words", to="gguf")
    with pytest.raises(
        PlanError, match="--max-rank: vLLM takes no LoRA of such a rank; expected 512 at most, found 513"
    ):
        peft_graft.export(tmp_path / "words", to="vllm", config=ExportConfig(max_rank=513))
    biased = base(tmp_path / "biased", "qwen2")
    module(tmp_path / "ia3", biased, peft.IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"],
                                                    feedforward_modules=[]))  # fmt: skip
    with pytest.raises(PlanError, match="a bias that IA3 multiplies at model.layers.0.self_attn.k_proj and 1 more"):
        peft_graft.export(tmp_path / "ia3", to="gguf")


# ---- Ollama ----------------------------------------------------------------------------------------------------------

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
#: SmolLM2's and Qwen's: with a system message where none is given.
DEFAULT = "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}" + CHATML
GEMMA_CHAT = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}"
    "{% set loop_messages = messages[1:] %}{% else %}{% set first = '' %}{% set loop_messages = messages %}{% endif %}"
    "{% for message in loop_messages %}<start_of_turn>{{ 'model' if message.role == 'assistant' else 'user' }}\n"
    "{{ first if loop.first else '' }}{{ message.content }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
REFUSES = (
    "{% for message in messages %}{{ raise_exception('no') if message.role == 'system' }}"
    "{{ message.content }}{% endfor %}"
)


def in_go(template: str, system: str, turns: list[tuple[str, str]]) -> str:
    """What Ollama makes of a template with .System, .Prompt and .Response: it is filled once for every turn."""
    text = ""
    for number, (prompt, response) in enumerate(turns):
        values = {"System": "" if number else system, "Prompt": prompt, "Response": response}
        filled = template
        while found := re.search(r"\{\{ if \.(\w+) \}\}((?:(?!\{\{ if).)*?)\{\{ end \}\}", filled, re.DOTALL):
            filled = filled[: found.start()] + (found[2] if values[found[1]] else "") + filled[found.end() :]
        if not response:
            filled = filled.partition("{{ .Response }}")[0]
        for name, value in values.items():
            filled = filled.replace(f"{{{{ .{name} }}}}", value)
        text += filled
    return text


@pytest.mark.parametrize("chat", [CHATML, DEFAULT, GEMMA_CHAT])
def test_a_template_says_in_ollama_what_it_says_in_transformers(chat: str) -> None:
    words = llama_cpp.tokenizer()
    words.chat_template, words.bos_token = chat, "<pad>"
    if chat == GEMMA_CHAT:  # which puts the token first itself, and so does llama.cpp
        words.backend_tokenizer.post_processor = TemplateProcessing("<pad> $A", special_tokens=[("<pad>", 97)])
        assert words("a").input_ids[0] == words.bos_token_id
    else:  # SmolLM2's and others' is a part of the template alone
        words.bos_token = "<|im_start|>"
    found = template_of(words)
    assert found is not None
    for system in ("", "Speak up."):
        messages = [{"role": "system", "content": system}] * bool(system)
        messages += [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
        messages += [{"role": "user", "content": "three"}]
        own = words.apply_chat_template(messages, tokenize=False, add_generation_prompt=True).removeprefix("<pad>")
        assert in_go(found.text, system or found.system, [("one", "two"), ("three", "")]) == own
    assert found.system == ("Be kind." if chat == DEFAULT else "")


def test_a_template_that_ollama_has_no_words_for_is_left_to_it() -> None:
    words = llama_cpp.tokenizer()
    assert template_of(words) is None
    words.chat_template = REFUSES
    assert template_of(words) is None
    words.chat_template = "{{ messages | length }}" + CHATML
    assert template_of(words) is None


def test_a_modelfile_lies_beside_the_adapter(tmp_path, command) -> None:
    model = base(tmp_path / "base")
    words = llama_cpp.tokenizer()
    words.chat_template = DEFAULT
    words.save_pretrained(model)
    module(tmp_path / "lora", model)
    shown = command("export", tmp_path / "lora", "--to", "ollama")
    assert f"ollama create graft --file {tmp_path}/lora-ollama/Modelfile" in shown.out.replace("\n", "")
    lines = (tmp_path / "lora-ollama" / "Modelfile").read_text()
    assert lines.startswith(
        f'FROM {model}\nADAPTER ./adapter.gguf\nTEMPLATE """{{{{ if .System }}}}<|im_start|>system\n'
    )
    assert 'SYSTEM """Be kind."""\n' in lines
    assert lines.endswith('PARAMETER stop "<end>"\nPARAMETER stop "<|im_end|>"\n')
    assert (tmp_path / "lora-ollama" / "adapter.gguf").stat().st_size > 1000
    named = ExportConfig(ollama_from="llama3.2:1b", force=True)
    peft_graft.export(tmp_path / "lora", to="ollama", config=named)
    assert (tmp_path / "lora-ollama" / "Modelfile").read_text().startswith("FROM llama3.2:1b\n")


@pytest.mark.parametrize(
    ("config", "template", "note"),
    [
        ({"format": r"Ask: {prompt}\nSay:"}, 'TEMPLATE """Ask: {{ .Prompt }}\nSay:{{ .Response }}"""\n', None),
        (
            {"format": "{system}|{prompt}", "system": "Be kind."},
            'TEMPLATE """{{ .System }}|{{ .Prompt }}{{ .Response }}"""\nSYSTEM """Be kind."""\n',
            None,
        ),
        ({"format": "{{prompt}}"}, "", "no TEMPLATE: the format cannot be said in Ollama's words"),
        (
            {"template_args": {"shout": True}},
            "<|im_start|>user LOUD\n{{ .Prompt }}<|im_end|>",
            None,
        ),
        ({}, "<|im_start|>user\n{{ .Prompt }}<|im_end|>", None),
    ],
)
def test_a_modelfile_asks_as_the_graft_was_taught(config, template, note, tmp_path) -> None:
    """What it was moved with counts, not what its base's tokenizer says."""
    model = base(tmp_path / "base")
    words = llama_cpp.tokenizer()
    words.chat_template = CHATML.replace(
        "message.role +", "message.role + (' LOUD' if shout and message.role == 'user' else '') +"
    )
    words.save_pretrained(model)
    module(tmp_path / "lora", model)
    graft = peft_graft.transfer(tmp_path / "lora", model, config={"method": "copy", **config})
    found = peft_graft.export(graft, to="ollama", out=tmp_path / "out")
    assert template in (tmp_path / "out" / "Modelfile").read_text()
    assert ("TEMPLATE" not in (tmp_path / "out" / "Modelfile").read_text()) == bool(note)
    assert [said for said in found.notes if "TEMPLATE" in said] == (
        [f"{note}, so Ollama takes its own"] if note else []
    )


def test_a_base_without_a_chat_template_is_said_to_have_none(tmp_path) -> None:
    model = base(tmp_path / "base")
    module(tmp_path / "lora", model)
    found = peft_graft.export(tmp_path / "lora", to="ollama")
    assert "no TEMPLATE: the base has no chat template, so Ollama takes its own" in found.notes
