"""Whatever peft saves of a vocabulary returns from its own model, and computes there what it did."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import peft_graft
import tiny
from peft_graft import GraftConfig
from peft_graft.checkpoints.attach import attach
from peft_graft.checkpoints.read import read_checkpoint
from peft_graft.checkpoints.resolve import checkpoint_of_student, resolve
from peft_graft.errors import CheckpointError
from peft_graft.models.loading import ModelHandle, wrap_model

SIZE, ADDED = 20, 2
EMBED, OUTPUT, LINEARS = "embed_tokens", "lm_head", ["q_proj"]
#: Tokens that were trained one by one: one of the base model's and the added ones.
IDS = [3, SIZE, SIZE + 1]
KINDS = {
    "resized alone": {},
    "embeddings saved": {"modules_to_save": [EMBED]},
    "output saved": {"modules_to_save": [OUTPUT]},
    "both saved": {"modules_to_save": [EMBED, OUTPUT]},
    "tokens": {"trainable_token_indices": IDS},
    "tokens of embeddings": {"trainable_token_indices": {EMBED: IDS}},
    "tokens of output": {"trainable_token_indices": {OUTPUT: IDS}},
    "tokens of both": {"trainable_token_indices": {EMBED: IDS, OUTPUT: IDS}},
    "other tokens of both": {"trainable_token_indices": {EMBED: IDS, OUTPUT: IDS[:2]}},
    "LoRA on embeddings": {"target_modules": [*LINEARS, EMBED]},
    "LoRA on output": {"target_modules": [*LINEARS, OUTPUT]},
    "LoRA on both": {"target_modules": [*LINEARS, EMBED, OUTPUT]},
    "output saved, tokens of embeddings": {"modules_to_save": [OUTPUT], "trainable_token_indices": {EMBED: IDS}},
    "output saved, LoRA on embeddings": {"modules_to_save": [OUTPUT], "target_modules": [*LINEARS, EMBED]},
    "embeddings saved, LoRA on output": {"modules_to_save": [EMBED], "target_modules": [*LINEARS, OUTPUT]},
    "embeddings saved and targeted": {"modules_to_save": [EMBED], "target_modules": [*LINEARS, EMBED]},
    "output saved and targeted": {"modules_to_save": [OUTPUT], "target_modules": [*LINEARS, OUTPUT]},
    "tokens of embeddings, LoRA on output": {
        "trainable_token_indices": {EMBED: IDS}, "target_modules": [*LINEARS, OUTPUT],
    },
}  # fmt: skip
#: What peft itself has none of where output and embeddings are tied.
NOT_TIED = {"output saved, tokens of embeddings", "tokens of embeddings, LoRA on output"}
NOT_ENSURED = {
    *NOT_TIED, "other tokens of both", "embeddings saved, LoRA on output", "output saved and targeted",
}  # fmt: skip
CELLS = [
    (kind, tied, resized, ensured)
    for kind in KINDS
    for tied, ensured in ((False, False), (True, False), (True, True))
    for resized in (False, True)
    if not (tied and kind in (NOT_ENSURED if ensured else NOT_TIED))
]


def model_of(*, tied: bool) -> transformers.PreTrainedModel:
    config = transformers.LlamaConfig(
        vocab_size=SIZE, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=tied, pad_token_id=0,
    )  # fmt: skip
    return tiny.lively(transformers.LlamaForCausalLM(config))


def resize(model: transformers.PreTrainedModel) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.resize_token_embeddings(SIZE + ADDED, mean_resizing=False)


def logits(model, size: int) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(input_ids=torch.arange(size)[None]).logits


def trained(folder: Path, kind: str, *, tied: bool, resized: bool, ensured: bool) -> torch.Tensor:
    """Save such a module, and return what the model computes with it."""
    model = model_of(tied=tied)
    options = copy.deepcopy(KINDS[kind])  # peft adds to its lists
    if resized:
        resize(model)
    elif indices := options.get("trainable_token_indices"):
        own = [3, 7, 11]
        options["trainable_token_indices"] = (
            {name: own[: len(ids)] for name, ids in indices.items()} if isinstance(indices, dict) else own
        )
    options.setdefault("target_modules", LINEARS)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, ensure_weight_tying=ensured, **options)
    adapted = peft.get_peft_model(model, config)
    tiny.randomise_trained(adapted, 1)
    adapted.save_pretrained(folder, save_embedding_layers=resized)
    return logits(adapted, SIZE + ADDED * resized)


def returned(folder: Path, handle: ModelHandle) -> torch.Tensor:
    """What the model computes with the module read, tied to its sites, and written again."""
    raw = read_checkpoint(folder)
    module = resolve(raw, handle.architecture, handle.base_tensors(output=raw.trains_output))
    again = checkpoint_of_student(module, handle)
    return logits(attach(again, handle, speaks=True).model, handle.base.config.vocab_size)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("kind", "tied", "resized", "ensured"), CELLS)
def test_a_vocabulary_computes_what_it_did(kind: str, tied: bool, resized: bool, ensured: bool, tmp_path: Path) -> None:
    expected = trained(tmp_path, kind, tied=tied, resized=resized, ensured=ensured)
    model = model_of(tied=tied)
    if resized:
        resize(model)
    assert torch.equal(returned(tmp_path, wrap_model(model)), expected)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", [kind for kind in KINDS if "LoRA" in kind])
def test_factors_of_a_vocabulary_that_was_resized_need_the_resized_model(kind: str, tmp_path: Path) -> None:
    trained(tmp_path, kind, tied=False, resized=True, ensured=False)
    with pytest.raises(CheckpointError, match=r"was resized .*; expected 20 tokens, found 22\. Fix: save the resized"):
        returned(tmp_path, wrap_model(model_of(tied=False)))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["tokens of embeddings", "embeddings saved", "LoRA on embeddings"])
@pytest.mark.parametrize("teacher", [True, False])
@pytest.mark.parametrize("student", [True, False])
def test_rows_that_one_model_has_in_its_output_layer_too_are_noted(
    kind: str, teacher: bool, student: bool, tmp_path: Path
) -> None:
    trained(tmp_path, kind, tied=teacher, resized=False, ensured=False)
    config = GraftConfig(method="copy")
    found = peft_graft.inspect(tmp_path, model_of(tied=student), teacher=model_of(tied=teacher), config=config)
    assert found.student is not None
    noted = [note for note in found.student.notes if "output layer" in note]
    assert bool(noted) == (kind == "tokens of embeddings" and teacher != student), found


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["lora_embedding_A", "token_adapter.trainable_tokens_delta"])
def test_rows_and_something_else_at_one_place_are_refused(name: str, tmp_path: Path) -> None:
    """Of such a file peft loads what its configuration names."""
    trained(tmp_path, "embeddings saved", tied=False, resized=False, ensured=False)
    file = tmp_path / "adapter_model.safetensors"
    save_file({**load_file(file), f"base_model.model.model.{EMBED}.{name}": torch.ones(2, SIZE)}, file)
    with pytest.raises(
        CheckpointError,
        match=rf"the file holds trained rows of model\.{EMBED} and something else there, of which peft loads one "
        rf"alone; found {name}, weight\. Fix: load the file with peft",
    ):
        read_checkpoint(tmp_path)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([3, 7, 2**31], f"the module trains tokens far beyond the base model's; .* {SIZE} tokens, .* found {2**31}"),
        (
            [3, 7, 2 * SIZE],
            f"far beyond the base model's; expected ids of a vocabulary of {SIZE} tokens, or of some more",
        ),
        ([3, 7, -1], r"trainable_token_indices\.2 has a value that means nothing here; .* greater than or equal to 0"),
        ([3, 7, 7], "trainable_token_indices disagree; expected 3 different ids, found 2"),
        (list(range(10**5)), "trainable_token_indices disagree; expected 3 different ids, found 100000"),
        (["3"], "trainable_token_indices.* has a value that means nothing here"),
        (None, "trainable_token_indices disagree; expected 3 different ids, found 0"),
    ],
    ids=["huge", "beyond", "negative", "twice", "many", "text", "none"],
)
def test_ids_that_no_vocabulary_has_are_refused(ids: object, message: str, tmp_path: Path) -> None:
    trained(tmp_path, "tokens", tied=False, resized=False, ensured=False)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "trainable_token_indices": ids}))
    with pytest.raises(CheckpointError, match=message):
        returned(tmp_path, wrap_model(model_of(tied=False)))
