"""Tasks of generated text: a prompt is read by a model's own template, and its whole answer is trained and scored."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from peft_graft.distill.generate import Sampling, generate_answers
from peft_graft.errors import TextError
from peft_graft.metrics import score_answers
from peft_graft.models.tasks import Task
from peft_graft.prompts.conversation import Prompt
from peft_graft.prompts.template import Template
from peft_graft.study.ner import IGNORED
from peft_graft.study.tasks import Example, StudyTask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("peft_graft")
#: How the rows of a batch are filled up, by what they hold.
_FILLING = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}


@dataclass(frozen=True)
class GenerationTask(StudyTask):
    """A task whose answers are text.

    Attributes:
        metric: one of ``peft_graft.metrics.METRICS``. labels: none.
        format, system, template_args: see ``Template``; the tokenizer's chat template is used where there is no format.
        max_new_tokens: of an answer, when it is scored. max_length: tokens of prompt and answer, in training.
    """

    format: str | None = None
    system: str | None = None
    template_args: Mapping[str, Any] = field(default_factory=dict)
    max_new_tokens: int = 256
    max_length: int = 1024

    def template(self, tokenizer: PreTrainedTokenizerBase) -> Template:
        """How a model with this tokenizer reads prompts.

        Raises:
            ModelError: there is neither a format nor a chat template.
            PlanError: the format has no place for the prompt or the system message.
        """
        return Template.of(
            tokenizer,
            format=self.format,
            system=self.system,
            args=self.template_args,
            name=tokenizer.name_or_path,
            role="model",
            option="format",
        )

    def encode(self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
        """Tokens of prompts, answers and ends, labelled from the answer on; not padded.

        What is longer than ``max_length`` is cut, and a row whose prompt alone is that long has no label.

        Raises:
            TextError: no row has a label. ModelError: see ``template``.
        """
        template = self.template(tokenizer)
        rows, cut = [], 0
        for example in examples:
            assert isinstance(example, Prompt)
            before, answer = template.ids(example), template.answer_ids(example.answer or "")
            ids = [*before, *answer, template.end]
            labels = [*[IGNORED] * len(before), *ids[len(before) :]]
            cut += len(ids) > self.max_length
            ids, labels = ids[: self.max_length], labels[: self.max_length]
            rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
        if rows and all(row["labels"][-1] == IGNORED for row in rows):
            expected = f"prompts of less than max_length = {self.max_length} tokens"
            raise TextError("no prompt leaves room for its answer", where=self.name, expected=expected)
        if cut:
            logger.warning("%s: %d of %d examples are cut at %d tokens", self.name, cut, len(rows), self.max_length)
        return rows

    def questions(self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
        """The prompts that a model is scored on, as ``prompt``."""
        return [{"prompt": example} for example in examples]

    def score_texts(self, answers: Sequence[str], prompts: Sequence[Prompt]) -> float:
        """The metric of answers to prompts, against the prompts' references."""
        return score_answers(self.metric, answers, [prompt.references for prompt in prompts])

    def majority_score(self, test: Sequence[Example]) -> float:
        """The score of always giving the most frequent answer."""
        prompts = [example for example in test if isinstance(example, Prompt)]
        commonest = Counter(prompt.references[0] for prompt in prompts).most_common(1)[0][0]
        return self.score_texts([commonest] * len(prompts), prompts)


def generation_task(name: str, metric: str = "exact", **options: Any) -> GenerationTask:
    """A task of generated text; options are its other attributes."""
    return GenerationTask(name, Task.CAUSAL_LM, (), metric, **options)


def collate_completions(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """A batch [rows, tokens] of ``GenerationTask.encode``'s rows, filled up on the right."""
    return {
        key: pad_sequence([torch.tensor(row[key]) for row in rows], batch_first=True, padding_value=filling)
        for key, filling in _FILLING.items()
    }


def completion_loss(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean cross-entropy of a causal model over the labelled tokens of a batch, as its own loss is.

    Args:
        batch: ``input_ids`` and ``labels`` [rows, tokens], filled up on the right, which no token before sees, and
            attention is quicker where nothing is masked. The latter are ``IGNORED`` where nothing is to be learnt.
    """
    labels = batch["labels"]
    next_labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    wanted = next_labels != IGNORED
    ids = batch["input_ids"]
    logits = logits_at(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, wanted).float()
    if not bool(wanted.any()):
        return logits.sum() * 0
    return torch.nn.functional.cross_entropy(logits, next_labels[wanted].to(logits.device))


def logits_at(model: Any, inputs: Mapping[str, Tensor], wanted: Tensor) -> Tensor:
    """Logits [n, vocabulary] of a causal model after those n tokens of a batch that are wanted, row by row.

    The output layer is given these hidden states alone, so that the logits of a whole batch, which a large vocabulary
    makes the greatest tensor of all, never exist. What a model does to logits after that layer (Gemma caps, Cohere and
    Granite scale them) it does itself.

    Args:
        model: of transformers, or one with a module inside. wanted: bool [rows, tokens].
    """
    narrowed = False

    def narrow(layer: Any, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        nonlocal narrowed
        narrowed = True
        return (_chosen(arguments[0], wanted)[None], *arguments[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(narrow)
    try:
        logits: Tensor = model(**inputs, use_cache=False).logits
    finally:
        handle.remove()
    return logits[0] if narrowed else _chosen(logits, wanted)


def _chosen(values: Tensor, wanted: Tensor) -> Tensor:
    """Rows [n, width] of values [rows, tokens, width], before whose tokens those of a learned prompt may stand."""
    return values[:, -wanted.shape[1] :][wanted.to(values.device)]


def answers_of(model: Any, task: GenerationTask, tokenizer: Any, prompts: Sequence[Prompt]) -> list[str]:
    """What a model answers to prompts, the likeliest token always; the model is left in evaluation mode."""
    sampling = Sampling(max_new_tokens=task.max_new_tokens)
    return [answer.text for answer in generate_answers(model, task.template(tokenizer), prompts, sampling)]
