"""A causal language model's LoRA moves between models of different size, and serves better than a copy or nothing."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
import transformers

import tiny

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def language(seed: int) -> torch.Tensor:
    """Which word follows which: a Markov chain over the words, [words, words]."""
    size = len(tiny.WORDS)
    return torch.softmax(2.5 * torch.randn(size, size, generator=torch.Generator().manual_seed(seed)), -1)


def lines(chain: torch.Tensor, count: int, seed: int, length: int = 9) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(len(chain), (count,), generator=generator)
    found = [words]
    for _ in range(length - 1):
        words = torch.multinomial(chain[words], 1, generator=generator).flatten()
        found.append(words)
    return [" ".join(tiny.WORDS[index] for index in row) for row in torch.stack(found, 1).tolist()]


def batch(tokenizer, chosen: list[str]):
    found = tokenizer(chosen, padding=True, return_tensors="pt")
    found["labels"] = found["input_ids"].masked_fill(found["attention_mask"] == 0, -100)
    return found


def train(model, tokenizer, text: list[str], steps: int) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3, fused=True)
    generator = torch.Generator().manual_seed(0)
    # Lines have as many words, each one token: nothing needs a mask, which takes half of so small a model's time.
    ids = torch.tensor(tokenizer(text)["input_ids"])
    model.train()
    for _ in range(steps):
        rows = ids[torch.randint(len(ids), (32,), generator=generator)]
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def loss(model, tokenizer, text: list[str]) -> float:
    with torch.inference_mode():
        return float(model(**batch(tokenizer, text)).loss)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Three models of one language, and a LoRA that teaches the first of them another one."""
    root = tmp_path_factory.mktemp("causal")
    known, new = language(1), language(2)
    text = lines(known, 1000, 0)
    for seed, (name, hidden, layers) in enumerate((("teacher", 32, 3), ("shallow", 32, 2), ("larger", 48, 4))):
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(
            vocab_size=150, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
            num_attention_heads=4, num_key_value_heads=2, pad_token_id=0,
        )  # fmt: skip
        model, tokenizer = transformers.LlamaForCausalLM(config), tiny.tokenizer(root / name, kind="words")
        train(model, tokenizer, text, 70)
        model.save_pretrained(root / name)
    teacher = transformers.AutoModelForCausalLM.from_pretrained(root / "teacher")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=LINEAR)
    adapted = peft.get_peft_model(teacher, config)
    train(adapted, tokenizer, lines(new, 1000, 1), 90)
    adapted.save_pretrained(root / "module")
    (root / "text.txt").write_text("\n".join(lines(new, 400, 2)))
    return root, tokenizer, lines(new, 200, 9), loss(adapted, tokenizer, lines(new, 200, 9))


@pytest.mark.parametrize("student", ["shallow", "larger"])
def test_a_causal_lora_moves_down_and_up(world, student: str, tmp_path: Path) -> None:
    """On held-out text of the new language: better than the bare student, which a fresh module is, and than a copy."""
    root, tokenizer, held_out, teacher = world

    def scored(folder: Path) -> float:
        model = transformers.AutoModelForCausalLM.from_pretrained(root / student)
        return loss(peft.PeftModel.from_pretrained(model, folder).eval(), tokenizer, held_out)

    fresh = loss(transformers.AutoModelForCausalLM.from_pretrained(root / student).eval(), tokenizer, held_out)
    options = {"student": root / student, "text": root / "text.txt", "max_tokens": 500}
    method = {} if student == "shallow" else {"method": "ridge"}  # the default, which tries four, is tried once
    graft = tiny.transfer(root / "module", out=tmp_path / "graft", polish=55, **options, **method)
    assert graft.report.verdict.measured.divergence < 1
    grafted = scored(tmp_path / "graft")
    assert grafted < fresh - 0.5 * (fresh - teacher), (teacher, grafted, fresh)
    if student == "shallow":  # a copy is possible
        tiny.transfer(root / "module", out=tmp_path / "copy", method="copy", **options)
        assert grafted < scored(tmp_path / "copy")
