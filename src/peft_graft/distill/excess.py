"""By how much a module makes its teacher's answers likelier: which prompts it matters for."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from peft_graft.checkpoints.attached import AttachedModel
from peft_graft.distill.completions import BATCH, last_states
from peft_graft.distill.distillation import ASKING
from peft_graft.distill.token_targets import chunks, text_loss
from peft_graft.distill.training import length_batches
from peft_graft.models.output import OutputLayer
from peft_graft.prompts.template import Completion, Template
from peft_graft.run import Run


def excess_of(
    teacher: AttachedModel,
    template: Template,
    completions: Sequence[Completion],
    run: Run,
) -> list[float]:
    """Mean over each answer's tokens of log p with the module - log p without it, nats (TiTok, arXiv 2510.04682)."""

    def means(rows: Sequence[int]) -> dict[int, float]:
        inputs = [completions[row].ids for row in rows]
        states, bare = (last_states(teacher, template, inputs, module=module) for module in (True, False))
        gains = gains_of(teacher, [completions[row] for row in rows], states, bare)
        return {row: float(value.mean()) if len(value) else 0.0 for row, value in zip(rows, gains, strict=True)}

    batches = list(length_batches([len(one.ids) for one in completions], BATCH))
    with torch.inference_mode():
        found = run.processes.of_batches(batches, means, partial(run.progress, ASKING))
    return [found[row] for row in range(len(completions))]


def gains_of(teacher: AttachedModel, sides: Sequence[Completion], states: Tensor, bare: Tensor) -> list[Tensor]:
    """Of each answer [its tokens]: log p with the module - log p without it, nats.

    Args:
        states, bare: [answers, length, d], last hidden states of prompt and answer with the module and without.
    """

    def losses(states: Tensor) -> list[Tensor]:
        output, found = OutputLayer.of(teacher.model), []
        for side, state in zip(sides, states, strict=True):
            wanted = torch.tensor(side.ids[side.start :], device=states.device)
            said = state[side.start - 1 : len(side.ids) - 1]
            parts = chunks(len(said), output.width)
            found.append(torch.cat([text_loss(output.logits(said[part]), wanted[part]) for part in parts]))
        return found

    with teacher.without():  # once for all: it goes through the whole model
        before = losses(bare)
    return [without - with_it for without, with_it in zip(before, losses(states), strict=True)]
