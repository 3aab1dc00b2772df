"""What tells models, configurations, tokenizers and modules apart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import peft
import torch
import transformers

import tiny
from peft_graft.checkpoints.read import read_checkpoint
from peft_graft.models.fingerprint import config_fingerprint, fingerprint, hash_tensors, tokenizer_fingerprint
from peft_graft.models.loading import load_model


def test_every_value_counts_and_its_place_does_not(world: Path) -> None:
    model = transformers.AutoModel.from_pretrained(world / "teacher")
    first = fingerprint(model)
    assert first == load_model(str(world / "teacher")).fingerprint
    for name, value in model.named_parameters():
        with torch.no_grad():
            before = value.view(-1)[-1].item()
            value.view(-1)[-1] += 1
            assert (fingerprint(model) == first) == name.startswith("pooler."), name
            value.view(-1)[-1] = before
    assert fingerprint(model) == first


def test_a_large_tensor_is_hashed_to_its_end_and_in_any_dtype() -> None:
    large = torch.zeros(3, (1 << 18) + 5, dtype=torch.bfloat16)
    first = hash_tensors([("large", large)])
    assert first == hash_tensors([("large", large.float().T.contiguous().T)])
    large[1, -1] = 1
    assert first != hash_tensors([("large", large)])
    assert first != hash_tensors([("large", torch.zeros(large.T.shape))])


def test_running_means_count(world: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    first = fingerprint(model)
    model[1].running_mean += 1
    assert fingerprint(model) != first


def test_the_key_also_tells_poolers_configurations_and_tokenizers_apart(world: Path) -> None:
    def handle():
        return load_model(str(world / "teacher"), tokenizer=True)

    first, keys = handle(), set[str]()
    assert first.key == handle().key
    heads, words, pooler = handle(), handle(), handle()
    heads.base.config.num_attention_heads = 2
    words.tokenizer.add_tokens(["riverbank"])
    with torch.no_grad():
        pooler.base.pooler.dense.weight[0, 0] += 1
    for other in (heads, words, pooler):
        assert other.fingerprint == first.fingerprint
        keys.add(other.key)
    assert len({first.key, *keys}) == 4


def test_names_and_use_do_not_count(world: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(world / "teacher")
    first = config_fingerprint(config)
    config.id2label, config.name_or_path, config.architectures = {0: "no", 1: "yes"}, "elsewhere", ["Other"]
    assert config_fingerprint(config) == first
    config.layer_norm_eps = 1e-3
    assert config_fingerprint(config) != first
    tokenizer = transformers.AutoTokenizer.from_pretrained(world / "teacher")
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(tiny.sentences(3), truncation=True, max_length=4, padding="max_length")
    assert tokenizer_fingerprint(tokenizer) == before
    tokenizer.chat_template = "{{ messages }}"
    assert tokenizer_fingerprint(tokenizer) != before


def test_a_language_models_key_tells_output_layers_apart(speakers: Path) -> None:
    first, other = (load_model(str(speakers / "teacher"), tokenizer=True) for _ in range(2))
    assert first.speaking_key == load_model(str(speakers / "teacher"), tokenizer=True).speaking_key
    other.output = first.output.clone()
    other.output[-1, -1] += 1
    assert other.key == first.key
    assert other.speaking_key != first.speaking_key


def test_a_modules_digest_tells_scales_and_heads_apart(world: Path) -> None:
    raw = read_checkpoint(world / "lora")
    assert raw.digest == read_checkpoint(world / "lora").digest
    louder = replace(raw, config={**raw.config, "lora_alpha": 99})
    name, value = next(iter(raw.head.items()))
    headed = replace(raw, head={**raw.head, name: value + 1})
    assert len({raw.digest, louder.digest, headed.digest}) == 3
    sets = [replace(raw, config={"targets": set(order)}).digest for order in (["a", "b", "c"], ["c", "b", "a"])]
    assert sets[0] == sets[1]
    assert isinstance(peft.PeftConfig.from_pretrained(world / "lora").target_modules, set)
