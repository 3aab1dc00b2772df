"""Output layers give the logits that the models themselves give."""

from __future__ import annotations

import pytest
import torch
import transformers

from peft_graft.errors import ModelError
from peft_graft.models.loading import load_model, wrap_model
from peft_graft.models.output import OutputLayer, language_model

SHAPE = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0}  # fmt: skip
CONFIGS = {
    "llama": transformers.LlamaConfig(**SHAPE),
    "llama, tied": transformers.LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "gemma2, capped": transformers.Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=2.0),
    "gemma3": transformers.Gemma3TextConfig(**SHAPE, head_dim=8),
    "qwen2": transformers.Qwen2Config(**SHAPE),
    "cohere, scaled": transformers.CohereConfig(**SHAPE, logit_scale=0.25),
    "granite, scaled": transformers.GraniteConfig(**SHAPE, logits_scaling=4.0),
    "phi, with a bias": transformers.PhiConfig(**{**SHAPE, "num_key_value_heads": 2}),
    "gpt2": transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2),
    "gpt_neox": transformers.GPTNeoXConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("live", [True, False])
def test_logits_are_the_models_own(name, live, tmp_path):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        torch.nn.init.normal_(model.get_output_embeddings().bias)
    if live:
        handle = wrap_model(model)
    else:
        model.save_pretrained(tmp_path / "model")
        handle = load_model(str(tmp_path / "model"))
    speaker = language_model(handle)
    inputs = {"input_ids": torch.arange(1, 13).view(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.int64)}
    with torch.inference_mode():
        own = model(**inputs).logits
        states = speaker.forward(inputs)[1]
        output = OutputLayer.of(speaker.model)
        torch.testing.assert_close(output.logits(states), own, atol=1e-5, rtol=1e-4)
        output.check(speaker.model, states[:1], {key: value[:1] for key, value in inputs.items()})


def test_a_model_that_makes_its_logits_in_another_way_is_refused():
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(CONFIGS["llama"]).eval()
    inputs = {"input_ids": torch.arange(1, 7).view(1, 6)}
    with torch.inference_mode():
        state = model.model(**inputs).last_hidden_state
        with pytest.raises(ModelError, match="makes its logits in a way that is not known"):
            OutputLayer(model.get_output_embeddings(), scale=3.0).check(model, state, inputs)
