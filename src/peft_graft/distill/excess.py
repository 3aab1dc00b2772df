"""By how much a module makes its teacher's answers likelier: which prompts it matters for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from peft_graft.checkpoints.attached import AttachedModel
from peft_graft.distill.completions import BATCH, last_states
from peft_graft.distill.token_targets import text_loss
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
            for index, row in enumerate(rows):
                if len(completions[row]):
                    gains = gains_of(teacher, completions[row], states[index], bare[index])
                    found[row] = float(gains.mean())
            done += len(rows)
            if progress:
                progress(done, len(completions))
    return found


def gains_of(teacher: AttachedModel, side: Completion, states: Tensor, bare: Tensor) -> Tensor:
    """[tokens of the answer]: log p with the module - log p without it, nats.

    Args:
        states, bare: [length, d], last hidden states of prompt and answer with the module and without.
    """
    places = slice(side.start - 1, len(side.ids) - 1)
    wanted = torch.tensor(side.ids[side.start :], device=states.device)
    with teacher.without():
        before = text_loss(OutputLayer.of(teacher.model).logits(bare[places]), wanted)
    return before - text_loss(OutputLayer.of(teacher.model).logits(states[places]), wanted)
