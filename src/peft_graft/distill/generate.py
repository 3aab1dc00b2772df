"""Answers of language models to prompts: batched, in groups of like length, kept so that an interrupted run goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from peft_graft.distill.training import length_batches
from peft_graft.models.devices import bytes_by_device, free_bytes, seed_generators
from peft_graft.models.task_models import quiet_libraries
from peft_graft.outputs import writing
from peft_graft.processes import ALONE, Processes
from peft_graft.prompts.conversation import Prompt
from peft_graft.prompts.template import Template
from peft_graft.record import Record

#: Prompts that are answered at a time: on processors, and at most on GPUs, which hardly take longer for many; and the
#: share of a GPU's free memory that these may take.
BATCH, GPU_BATCH, _SHARE = 48, 256, 0.5
#: Answers batches of encoded prompts, by the number of the prompt, and gives what it has when it has it.
Elsewhere = Callable[[Sequence[Mapping[int, Sequence[int]]], "Reading"], Iterator[Mapping[int, Sequence[int]]]]
#: Prompts are padded to multiples of this, so that processors do not keep a kernel for every length.
_MULTIPLE = 16


class Sampling(Record):
    """How answers are drawn.

    Attributes:
        max_new_tokens: an answer that is longer is cut, and counts as not ended.
        temperature: 0 takes the likeliest token always. top_p: the least set of tokens with this probability.
        seed: of the draws.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        text: without special tokens. ended: whether the model ended it, or it was cut.
    """

    text: str
    ended: bool


@dataclass(frozen=True)
class Reading:
    """What generation has to know beside the prompts' tokens.

    Attributes:
        sampling: how answers are drawn. stops: tokens at which they end. pad: what fills rows up.
    """

    sampling: Sampling
    stops: tuple[int, ...]
    pad: int


class AnswerStore:
    """Answers in a file, a line of JSON each, added batch by batch.

    Args:
        folder: where the file is made. name: says whose answers these are.
        key: what the answers depend on; answers of another key are in another file.
    """

    def __init__(self, folder: Path, name: str, key: str) -> None:
        self.path = folder / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.jsonl"

    def load(self) -> dict[int, Answer]:
        """The answers so far, by the number of their prompt; a last line that a kill cut off is left out."""
        found: dict[int, Answer] = {}
        if self.path.is_file():
            # A kill may have cut a character in two; and answers hold ends of lines of many kinds.
            for line in self.path.read_text(encoding="utf-8", errors="replace").split("\n"):
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    continue
                found[row["prompt"]] = Answer(row["text"], row["ended"])
        return found

    def add(self, answers: dict[int, Answer]) -> None:
        """Add answers by the number of their prompt.

        Raises:
            OutputError: they cannot be written.
        """
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            cut_off = self.path.is_file() and not self.path.read_bytes().endswith(b"\n")
            with self.path.open("a", encoding="utf-8") as file:
                if cut_off:
                    file.write("\n")
                for number, answer in answers.items():
                    row = {"prompt": number, "text": answer.text, "ended": answer.ended}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")


def generate_answers(  # the model, what it is asked and how; the rest says where answers are kept and who watches
    model: Any,
    template: Template,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    batch_size: int | None = None,
    store: AnswerStore | None = None,
    progress: Callable[[int, int], None] | None = None,
    bf16: bool = False,
    processes: Processes = ALONE,
    elsewhere: Elsewhere | None = None,
) -> list[Answer]:
    """What a language model answers to prompts.

    Args:
        model: a language model of transformers, or one with a module inside, in evaluation mode.
        template: how it reads prompts.
        batch_size: prompts at a time; what suits the device where it is not given (``batch_size_of``).
        store: answers that are in it are not generated again. progress: told of (answers so far, prompts).
        bf16: forward passes in mixed precision.
        processes: each answers a batch at a time, and has the answers of all; the first one's store is used.
        elsewhere: answers the batches in place of ``model`` here.

    Returns:
        An answer to every prompt, in their order.
    """
    inputs = [template.ids(prompt) for prompt in prompts]
    found = processes.of_first(lambda: store.load() if store else {})
    left = [number for number in range(len(prompts)) if number not in found]
    model.eval()
    lengths = [len(inputs[number]) for number in left]
    if batch_size is None:
        batch_size = batch_size_of(model, max(lengths, default=0) + sampling.max_new_tokens)
    batches = [{left[index]: inputs[left[index]] for index in batch} for batch in length_batches(lengths, batch_size)]
    reading = Reading(sampling, template.stops, template.pad)

    def here() -> Iterator[Mapping[int, Sequence[int]]]:
        for at in range(0, len(batches), processes.count):
            rows = batches[at + processes.index] if at + processes.index < len(batches) else {}
            said = generate_batch(model, list(rows.values()), reading, bf16=bf16) if rows else []
            yield from processes.of_all(dict(zip(rows, said, strict=True)))

    for part in elsewhere(batches, reading) if elsewhere and batches else here():
        answers = {number: _answer(template, ids) for number, ids in part.items()}
        found |= answers
        if store and processes.first:
            store.add(answers)
        if progress:
            progress(len(found), len(prompts))
    return [found[number] for number in range(len(prompts))]


def batch_size_of(model: Any, tokens: int) -> int:
    """How many prompts a model answers at a time, where the longest has so many tokens, its answer among them."""
    value = next(model.parameters())
    if value.device.type == "cpu":
        return BATCH
    sizes = bytes_by_device(model)
    whole = sum(sizes.values())
    # Layers are taken to be spread as weights are.
    room = min(free_bytes(device) * whole // own for device, own in sizes.items() if device.type == "cuda")
    return prompts_within(model.config, tokens, value.element_size(), room)


def prompts_within(config: Any, tokens: int, element: int, free: int) -> int:
    """How many prompts a GPU answers at a time: ``GPU_BATCH`` at most, and 1 at least.

    Counted are keys and values of all layers, what one layer makes of the tokens, and the logits of one position.

    Args:
        config: of the model. tokens: of the longest prompt and its answer. element: bytes of a value.
        free: bytes that GPUs have left which each have their part of the layers.
    """
    config = getattr(config, "text_config", config)
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    shared = getattr(config, "num_key_value_heads", None) or heads
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    held = 2 * config.num_hidden_layers * shared * head_size
    layer = 6 * config.hidden_size + 3 * inner
    one: int = element * max(1, tokens) * (held + layer) + 2 * 4 * config.vocab_size
    return max(1, min(GPU_BATCH, int(free * _SHARE) // one))


def generate_batch(model: Any, rows: Sequence[Sequence[int]], reading: Reading, *, bf16: bool) -> list[list[int]]:
    """The tokens that a model goes on with after each of some encoded prompts, which are padded on the left.

    Args:
        model: see ``generate_answers``. rows: the tokens of each prompt. bf16: forward passes in mixed precision.

    Returns:
        The tokens of each answer with the one that ends it, and what the row is filled up with after that.
    """
    from transformers import GenerationConfig

    sampling, pad = reading.sampling, reading.pad
    width = max(map(len, rows))
    width += -width % _MULTIPLE
    device = next(model.parameters()).device
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    drawn: dict[str, Any] = {"do_sample": False}
    if sampling.temperature:
        drawn = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=list(reading.stops),
        pad_token_id=pad,
        use_cache=True,
        **drawn,
    )
    mixed = torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()
    fork = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=fork), torch.inference_mode(), quiet_libraries(), mixed:
        seed = hashlib.sha256(repr((sampling.seed, rows)).encode()).digest()
        seed_generators(int.from_bytes(seed[:7]), device)
        output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    return [row.tolist() for row in output[:, width:]]


def _answer(template: Template, ids: Sequence[int]) -> Answer:
    """The text up to the first token that ends an answer."""
    end = next((index for index, token in enumerate(ids) if token in template.stops), None)
    text = template.tokenizer.decode(ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Answer(text, end is not None)
