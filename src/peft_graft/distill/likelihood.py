"""How likely a language model holds answers that are known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peft_graft.checkpoints.attached import AttachedModel
from peft_graft.distill.completions import BATCH, last_states
from peft_graft.distill.token_targets import in_chunks, text_loss
from peft_graft.distill.training import length_batches
from peft_graft.models.output import LanguageModel, OutputLayer
from peft_graft.prompts.conversation import Prompt
from peft_graft.prompts.template import Template


@dataclass(frozen=True)
class AnswerLoss:
    """Minus the log-likelihood of one answer.

    Attributes:
        nats: summed over its tokens and the one that ends the turn. tokens: how many these are, as the model writes the
            answer. size: of the answer's text, UTF-8 bytes.
    """

    nats: float
    tokens: int
    size: int


def answer_losses(
    model: AttachedModel | LanguageModel,
    template: Template,
    prompts: Sequence[Prompt],
    answers: Sequence[str],
    progress: Callable[[int, int], None] | None = None,
    *,
    ended: bool = True,
) -> list[AnswerLoss]:
    """The losses of answers to prompts, in their order; logits are made at the answers' tokens only.

    Args:
        template: how the model reads prompts. progress: told of (losses so far, prompts).
        ended: whether the token that ends the turn counts.
    """
    sides = [template.encode(prompt, answer, ended=ended) for prompt, answer in zip(prompts, answers, strict=True)]
    output, found = OutputLayer.of(model.model), dict[int, AnswerLoss]()
    model.model.eval()
    with torch.inference_mode():
        for rows in length_batches([len(side.ids) for side in sides], BATCH):
            states = last_states(model, template, [sides[row].ids for row in rows])
            for index, row in enumerate(rows):
                side = sides[row]
                wanted = torch.tensor(side.ids[side.start :], device=states.device)
                nats = _summed(output, states[index, side.start - 1 : len(side.ids) - 1], wanted)
                before = (
                    side.spans[0][0] if side.spans else 0
                )  # of a document's first token, where nothing foretells it
                found[row] = AnswerLoss(nats, len(side), len(answers[row].encode()) - before)
            if progress:
                progress(len(found), len(sides))
    return [found[row] for row in range(len(sides))]


def _summed(output: OutputLayer, states: Tensor, wanted: Tensor) -> float:
    """The loss of tokens [n] after hidden states [n, d]."""
    return float(
        in_chunks(states, output.width, lambda part, of: text_loss(output.logits(part), wanted[of]), frozen=True)
    )
