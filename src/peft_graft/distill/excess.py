"""By how much a module makes its teacher's answers likelier: which prompts it matters for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from peft_graft.checkpoints.attached import AttachedModel
from peft_graft.distill.completions import BATCH, last_states
from peft_graft.distill.token_targets import chunks, text_loss
from peft_graft.distill.training import length_batches
from peft_graft.models.output import OutputLayer
from peft_graft.prompts.template import Completion, Template


def excess_of(
    teacher: AttachedModel,
    template: Template,
    completions: Sequence[Completion],
    progress: Callable[[int, int], None] | None = None,
) -> list[float]:
    """Mean over each answer's tokens of log p with the module - log p without it, nats (TiTok, arXiv 2510.04682)."""
    found = [0.0] * len(completions)
    done = 0
    with torch.inference_mode():
        for rows in length_batches([len(one.ids) for one in completions], BATCH):
            inputs = [completions[row].ids for row in rows]
            states, bare = (last_states(teacher, template, inputs, module=module) for module in (True, False))
            for row, gains in zip(
                rows, gains_of(teacher, [completions[row] for row in rows], states, bare), strict=True
            ):
                if len(completions[row]):
                    found[row] = float(gains.mean())
            done += len(rows)
            if progress:
                progress(done, len(completions))
    return found


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
