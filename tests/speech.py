"""Tiny language models that answer prompts, with tokenizers of two makes: what tests of prompts move about."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import peft
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

import permutation
from peft_graft.prompts.conversation import Prompt
from peft_graft.prompts.template import Template

FORMAT = "{prompt} ="
LETTERS = "abcdefgh"
#: Spoken by the teacher's tokenizer in one token each, and by neither of the others.
MERGED = ["ab", "cd", "ef"]
END = "<end>"


def byte_level(merges: Sequence[str] = ()) -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE over all bytes, with some pairs of letters merged."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*alphabet, *merges])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[(pair[0], pair[1]) for pair in merges]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return _wrapped(core)


def sentence_piece(merges: Sequence[str] = ()) -> transformers.PreTrainedTokenizerFast:
    """BPE with blanks as ``▁`` and bytes to fall back on, as Gemma has it."""
    characters = ["▁", *"abcdefghijklmnopqrstuvwxyz=;:,."]
    tokens = [*(f"<0x{byte:02X}>" for byte in range(256)), *characters, *merges]
    core = Tokenizer(
        models.BPE(
            vocab={token: number for number, token in enumerate(tokens)},
            merges=[(pair[0], pair[1]) for pair in merges], byte_fallback=True, fuse_unk=True,
        )
    )  # fmt: skip
    core.normalizer = normalizers.Replace(" ", "▁")
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return _wrapped(core)


def _wrapped(core: Tokenizer) -> transformers.PreTrainedTokenizerFast:
    core.add_special_tokens([AddedToken("<pad>", special=True), AddedToken(END, special=True)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token=END, clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def language_model(
    folder: Path,
    tokenizer: transformers.PreTrainedTokenizerFast,
    *,
    seed: int = 0,
    layers: int = 2,
    hidden: int = 32,
    steps: int = 150,
    **more: object,
) -> Path:
    """A Llama of this tokenizer on disk, which knows the answers of ``base_answer``."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None, max_position_embeddings=256, **more,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    teach(model, tokenizer, base_answer, steps, 4e-3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def in_another_order(model: Path, folder: Path) -> None:
    """Write a copy of a language model that says the same with its units in another order."""
    copy = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    copy.model, order = permutation.permuted(copy.model)
    copy.lm_head.weight.data = copy.lm_head.weight.data[:, order]
    copy.save_pretrained(folder)
    for file in model.glob("*token*"):
        shutil.copy(file, folder)


def lora(folder: Path, base: Path, *, seed: int = 0, r: int = 4, steps: int = 200) -> Path:
    """A LoRA on every linear layer of a model on disk, which has learned the answers of ``answer``."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(seed)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=r, lora_alpha=2 * r, target_modules="all-linear")
    adapted = peft.get_peft_model(model, config)
    teach(adapted, transformers.AutoTokenizer.from_pretrained(base), answer, steps, 1e-2)
    adapted.save_pretrained(folder)
    return folder


def base_answer(word: str) -> str:
    """What all models answer before a module has learned anything else: the first letter, and the next one."""
    return f"{word[0]} {_letter(word, 1)}"


def answer(word: str) -> str:
    """What modules learn to answer: another letter, more than once, and the first one.

    All of it are tokens that a base model has learned to say: what it never says it cannot, its output layer frozen.
    """
    return f"{_letter(word, 3) * (1 + LETTERS.index(word[0]) % 3)} {word[0]}"


def _letter(word: str, further: int) -> str:
    return LETTERS[(LETTERS.index(word[0]) + further) % len(LETTERS)]


def teach(model: object, tokenizer: object, says: Callable[[str], str], steps: int, rate: float) -> None:
    """Train what is free of a language model on prompts with answers."""
    template = Template.of(tokenizer, format=FORMAT)
    rows = [template.encode(Prompt.of_text(word), says(word)) for word in words(400, seed=9)]
    width = max(len(row.ids) for row in rows)
    # No mask: no token sees what is filled up on the right, and masks take half of so small a model's time.
    ids = torch.tensor([row.ids + [tokenizer.pad_token_id] * (width - len(row.ids)) for row in rows])
    places = torch.arange(width)
    starts, ends = (
        torch.tensor(ends)[:, None] for ends in zip(*((row.start, len(row.ids)) for row in rows), strict=True)
    )
    labels = ids.masked_fill((places < starts) | (places >= ends), -100)
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=rate, fused=True)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    draw = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(steps):
        batch = torch.randint(len(rows), (32,), generator=draw)
        model(input_ids=ids[batch], labels=labels[batch]).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay.step()
        optimizer.zero_grad()
    model.eval()


def words(count: int, seed: int = 0, length: int = 4) -> list[str]:
    """Random words over a few letters, each once."""
    draw, found = random.Random(seed), dict[str, None]()
    while len(found) < count:
        found["".join(draw.choice(LETTERS) for _ in range(length))] = None
    return list(found)


def prompt_file(path: Path, prompts: Sequence[str], answers: Sequence[str] = ()) -> Path:
    """Prompts, a line of JSON each, with answers where there are any."""
    rows = [{"prompt": prompt, **({"completion": answers[n]} if answers else {})} for n, prompt in enumerate(prompts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
