"""What was trained of a vocabulary moves by its tokens: rows, factors of embeddings and output layers, added tokens."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner

import permutation
import tiny
from peft_graft.alignment.vocabulary import Vocabularies
from peft_graft.checkpoints.read import read_checkpoint
from peft_graft.cli.main import app
from peft_graft.errors import CheckpointError, PlanError

WORDS = ["[PAD]", "[UNK]", *tiny.WORDS]
SIZE = len(WORDS)
CONFIGS = {
    "llama": transformers.LlamaConfig(vocab_size=SIZE, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                      num_attention_heads=4, tie_word_embeddings=False),
    "gpt2": transformers.GPT2Config(vocab_size=SIZE, n_embd=32, n_layer=2, n_head=4, n_inner=48),
    "gpt_neox": transformers.GPTNeoXConfig(vocab_size=SIZE, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                           num_attention_heads=4, tie_word_embeddings=False),
    "gemma3_text": transformers.Gemma3TextConfig(vocab_size=SIZE, hidden_size=32, intermediate_size=48, head_dim=8,
                                                 num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                                                 tie_word_embeddings=False, pad_token_id=0),
}  # fmt: skip
#: family -> names of its word embeddings, output layer, and some linear layers.
NAMES = {
    "llama": ("embed_tokens", "lm_head", ["q_proj", "v_proj"]),
    "gpt2": ("wte", "lm_head", ["c_attn"]),
    "gpt_neox": ("embed_in", "embed_out", ["query_key_value"]),
    "gemma3_text": ("embed_tokens", "lm_head", ["q_proj", "v_proj"]),
}
ORDER = torch.randperm(SIZE, generator=torch.Generator().manual_seed(5))


def vocabulary(folder: Path, words: list[str]) -> transformers.PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(folder)
    return fast


def base_of(folder: Path, family: str = "llama", *, seed: int = 0, words: list[str] = WORDS, **changes) -> Path:
    tiny.saved(folder, CONFIGS[family], transformers.AutoModelForCausalLM, seed=seed, vocab_size=len(words), **changes)
    vocabulary(folder, words)
    return folder


def reordered(folder: Path, base: Path) -> Path:
    """The same model with another numbering of its tokens."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for weight in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
            weight.copy_(weight[ORDER])
    model.save_pretrained(folder)
    vocabulary(folder, [WORDS[index] for index in ORDER])
    return folder


def trained(folder: Path, base: Path, linears: list[str], *, add: int = 0, **options) -> peft.PeftModel:
    """A module with random values in all that it trains; ``add`` tokens were added to the model before."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base).eval()
    if add:
        model.resize_token_embeddings(SIZE + add, mean_resizing=False)
    options.setdefault("target_modules", linears)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, fan_in_fan_out="c_attn" in linears, **options)
    )
    tiny.randomise_trained(adapted, 1)
    with torch.no_grad():  # not all of the vocabulary is ever trained
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name:
                own = adapted.get_submodule(name.partition(".modules_to_save")[0]).original_module.weight
                parameter[::2] = own[::2]
    adapted.save_pretrained(folder)
    return adapted.eval()


def logits(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=ids).logits


def loaded(base: Path, folder: Path, size: int | None = None) -> peft.PeftModel:
    model = transformers.AutoModelForCausalLM.from_pretrained(base).eval()
    if size is not None:
        model.resize_token_embeddings(size, mean_resizing=False)
    return peft.PeftModel.from_pretrained(model, folder).eval()


def options_of(what: str, family: str) -> dict:
    embed, output, linears = NAMES[family]
    return {
        "saved": {"modules_to_save": [embed, output]},
        "factors": {"target_modules": [*linears, embed, output]},
        "tokens": {"trainable_token_indices": {embed: [3, 7, 11]}},
    }[what]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("what", ["saved", "factors", "tokens"])
def test_a_vocabulary_arrives_by_its_tokens_in_a_model_that_numbers_them_otherwise(
    family: str, what: str, tmp_path: Path
) -> None:
    base = base_of(tmp_path / "base", family)
    adapted = trained(tmp_path / "module", base, NAMES[family][2], **options_of(what, family))
    student = reordered(tmp_path / "student", base)
    graft = tiny.transfer(tmp_path / "module", teacher=base, student=student, method="copy", out=tmp_path / "graft")
    assert graft.report.verification.done
    ids = torch.randint(SIZE, (3, 8), generator=torch.Generator().manual_seed(2))
    expected = logits(adapted, ORDER[ids])[..., ORDER]  # token i of the student is the teacher's ORDER[i]
    found = logits(loaded(student, tmp_path / "graft"), ids)
    plain = logits(transformers.AutoModelForCausalLM.from_pretrained(student).eval(), ids)
    scale = expected.abs().max()
    assert torch.allclose(found, expected, rtol=0, atol=1e-4 * float(scale))
    assert not torch.allclose(found, plain, rtol=0, atol=1e-2 * float(scale))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("what", ["saved", "factors", "tokens"])
def test_a_vocabulary_returns_from_its_own_model_bit_for_bit(what: str, tmp_path: Path) -> None:
    base = base_of(tmp_path / "base")
    trained(tmp_path / "module", base, NAMES["llama"][2], **options_of(what, "llama"))
    tiny.transfer(tmp_path / "module", teacher=base, student=base, method="copy", out=tmp_path / "graft")
    before, after = (read_checkpoint(tmp_path / name) for name in ("module", "graft"))
    assert before.parts == after.parts
    config, own = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("graft", "module"))
    assert set(config["target_modules"]) == set(own["target_modules"])
    assert sorted(config["modules_to_save"] or []) == sorted(own["modules_to_save"] or [])
    assert config["trainable_token_indices"] == own["trainable_token_indices"]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("what", ["saved", "factors", "tokens"])
def test_a_vocabulary_arrives_where_hidden_units_stand_in_another_order(what: str, tmp_path: Path) -> None:
    base = base_of(tmp_path / "base")
    adapted = trained(tmp_path / "module", base, NAMES["llama"][2], **options_of(what, "llama"))
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    bare, stream = permutation.permuted(model.model)
    model.model = bare
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight[:, stream])
    model.save_pretrained(tmp_path / "student")
    vocabulary(tmp_path / "student", WORDS)
    text = tmp_path / "text.txt"
    text.write_text("\n".join(tiny.sentences(200)))
    tiny.transfer(
        tmp_path / "module", teacher=base, student=tmp_path / "student", method="prune-align", text=text,
        out=tmp_path / "graft",
    )  # fmt: skip
    ids = torch.randint(SIZE, (3, 8), generator=torch.Generator().manual_seed(2))
    expected = logits(adapted, ids)
    found = logits(loaded(tmp_path / "student", tmp_path / "graft"), ids)
    assert torch.allclose(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_added_tokens_find_their_places_and_those_that_only_the_teacher_has_are_named(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base")
    ids = [SIZE, SIZE + 1]
    adapted = trained(tmp_path / "module", base, ["q_proj"], add=2, modules_to_save=["embed_tokens", "lm_head"])
    vocabulary(tmp_path / "module", [*WORDS, "<one>", "<two>"])
    student = base_of(tmp_path / "student", words=["<two>", *WORDS], seed=0)
    graft = tiny.transfer(tmp_path / "module", teacher=base, student=student, method="copy")
    assert any("1 of" in note and "<one>" in note for note in graft.report.notes)
    rows = graft.raw.parts["model.embed_tokens"].rows
    theirs = adapted.get_input_embeddings().weight.detach()
    assert rows.shape == (SIZE + 1, 32)
    assert torch.equal(rows[0], theirs[ids[1]])  # no base had it, so what the teacher learned is all there is
    graft.save_pretrained(tmp_path / "graft")
    assert torch.equal(loaded(student, tmp_path / "graft").get_input_embeddings().weight[0], theirs[ids[1]])


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("words", [WORDS, [*WORDS, "<two>"]])
def test_added_tokens_that_the_student_lacks_are_told_in_the_plan(words: list[str], tmp_path: Path) -> None:
    base = base_of(tmp_path / "base")
    ids = {"embed_tokens": [SIZE, SIZE + 1]}
    trained(tmp_path / "module", base, ["q_proj"], add=2, trainable_token_indices=ids)
    vocabulary(tmp_path / "module", [*WORDS, "<one>", "<two>"])
    student = base_of(tmp_path / "student", words=words, seed=0)
    student.joinpath("model.safetensors").unlink()
    planned = tiny.inspect(tmp_path / "module", student, teacher=base, method="copy").student
    if words == WORDS:
        assert "has none of the tokens that the module trains; expected <one>, <two>. Fix: add them" in planned.problem
    else:
        assert "embed: 1 of 2 trained tokens are unknown to the student (<one>)" in planned.notes


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tokens_that_the_student_lacks_altogether_are_refused_with_what_to_do(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base")
    trained(tmp_path / "module", base, ["q_proj"], trainable_token_indices={"embed_tokens": [SIZE - 1]})
    student = base_of(tmp_path / "student", words=WORDS[:-1])
    with pytest.raises(PlanError, match=r"none of the tokens") as caught:
        tiny.transfer(tmp_path / "module", teacher=base, student=student, method="copy")
    assert WORDS[-1] in str(caught.value)
    assert "resize_token_embeddings" in str(caught.value)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_factors_of_a_resized_vocabulary_are_refused(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base")
    trained(tmp_path / "module", base, ["q_proj"], add=2, target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(CheckpointError, match="resized"):
        tiny.transfer(tmp_path / "module", teacher=base, student=base, method="copy")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_default_moves_fits_and_polishes_a_module_with_a_trained_vocabulary(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base")
    trained(tmp_path / "module", base, ["q_proj", "v_proj"], add=1, modules_to_save=["embed_tokens", "lm_head"])
    vocabulary(tmp_path / "module", [*WORDS, "<one>"])
    student = base_of(tmp_path / "student", seed=4, hidden_size=24, words=[*WORDS, "<one>"])
    text = tmp_path / "text.txt"
    text.write_text("\n".join(tiny.sentences(200)))
    graft = tiny.transfer(
        tmp_path / "module", teacher=base, student=student, text=text, polish=6, out=tmp_path / "graft"
    )
    assert graft.report.verification.done
    assert graft.report.polish is not None
    assert "functional, as moved" in graft.report.tried
    assert graft.raw.parts["model.embed_tokens"].rows.shape == (SIZE + 1, 24)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_inspect_shows_a_trained_vocabulary(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base")
    trained(tmp_path / "module", base, ["q_proj"], modules_to_save=["embed_tokens"])
    result = CliRunner().invoke(
        app, ["inspect", str(tmp_path / "module"), "--teacher", str(base), "--student", str(base)]
    )
    assert result.exit_code == 0, result.output
    assert "embed" in result.output


def test_tokens_are_the_same_however_a_tokenizer_marks_words(tmp_path: Path) -> None:
    wordpiece = vocabulary(tmp_path / "a", ["[PAD]", "[UNK]", "river", "##s", "é", "##_"])
    byte_level = vocabulary(tmp_path / "b", ["[UNK]", "s", "Ġriver", "[PAD]", "ĠÃ©", "ĠĠ"])
    pieces = vocabulary(tmp_path / "c", ["▁river", "s", "[PAD]", "[UNK]", "▁é", "▁▁"])
    for student, expected in ((byte_level, [1, 3, 2, 0, 4, -1]), (pieces, [2, 3, 0, 1, 4, -1])):
        assert Vocabularies(wordpiece, student, 6).selection(6).indices.tolist() == expected
    assert Vocabularies(byte_level, pieces, 6).selection(6).indices.tolist() == [2, 1, 3, 0, 4, 5]
