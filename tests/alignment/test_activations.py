"""What goes into a model: padded batches."""

from __future__ import annotations

import copy

import pytest
import torch

import tiny
from peft_graft.alignment.activations import pad, tokenize
from peft_graft.alignment.text import Sample
from peft_graft.models.loading import ModelHandle, load_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelHandle:
    return load_model(str(tiny.base_model(tmp_path_factory.mktemp("model"), layers=1)), tokenizer=True)


@pytest.mark.parametrize("change", [{}, {"pad_token": "<added>"}, {"model_input_names": ["input_ids"]}], ids=str)
def test_rows_that_are_filled_up_are_read_as_if_they_were_not(
    model: ModelHandle, change: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with a token that was added to the tokenizer alone, and where the tokenizer names no mask."""
    tokenizer = copy.deepcopy(model.tokenizer)
    for name, value in change.items():
        if name == "pad_token":
            tokenizer.add_tokens([f"zz{number}" for number in range(300)])
            tokenizer.add_special_tokens({name: value})
            assert tokenizer.pad_token_id > model.architecture.num_embeddings
        else:
            monkeypatch.setattr(tokenizer, name, value)
    monkeypatch.setattr(model, "tokenizer", tokenizer)
    rows, _ = tokenize(model, [Sample("river"), Sample("the harbour and the engine of Lisbon")], 32)
    with torch.inference_mode():
        together = model.base(**pad(model, rows, model.device)).last_hidden_state[0]
        alone = model.base(**pad(model, rows[:1], model.device)).last_hidden_state[0]
    assert torch.allclose(together[: len(alone)], alone, atol=1e-5)
