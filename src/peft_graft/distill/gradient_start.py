"""Where a polish should begin to read: the directions in which the student's own gradient wants its modules to act.

A module that begins with B = 0 learns B alone at first, and through the directions that A reads. Taken at random, most
of them are useless. The first right singular vectors of the gradient of the distillation loss with respect to the
update B A are the best ones for the first step (LoRA-GA, Wang et al. 2024, arXiv 2407.05000, for labelled fine-tuning).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from peft_graft.checkpoints.attached import AttachedModel
from peft_graft.checkpoints.raw import RawCheckpoint
from peft_graft.distill.distillation import Distillation
from peft_graft.distill.training import length_batches
from peft_graft.models.devices import free_bytes
from peft_graft.modules.base import Part

_BATCHES = 16
_OVERSAMPLING, _POWER_ITERATIONS = 8, 4


def gradient_start(attached: AttachedModel, distillation: Distillation) -> RawCheckpoint:
    """The attached checkpoint with modules that read the directions that the gradient points out.

    LoRA: A [r, d_in] has the first r right singular vectors of the gradient as rows. Bottleneck adapters: the same for
    the down projection [b, d]. All else stays.

    Args:
        attached: with trainable modules that change nothing yet; their gradient is taken without dropout.
        distillation: gives the loss.
    """
    raw, parts = attached.checkpoint, dict(attached.checkpoint.parts)
    attached.model.eval()
    left = {path for path, part in parts.items() if part.reading_matrix}
    while left:
        sums = _Sums(left)
        _run(attached, distillation, sums)
        # Nothing is known of an expert that no token was sent to.
        parts |= {path: _reading(parts[path], found) for path, found in sums.found.items()}
        left = sums.left
    return replace(raw, parts=parts)


def _run(attached: AttachedModel, distillation: Distillation, sums: _Sums) -> None:
    """Sum up gradients over the batches."""
    hooks = [attached.module_at(path).register_forward_hook(sums.hook(path)) for path in sorted(sums.paths)]
    try:
        batches = length_batches(distillation.lengths, distillation.batch_size, seed=0)
        for rows in islice(batches, _BATCHES):
            for part, share in _parts(rows, distillation):
                (distillation.loss(attached, part) * share).backward()  # type: ignore[no-untyped-call]
    finally:
        for hook in hooks:
            hook.remove()
        attached.model.zero_grad()


def _parts(rows: list[int], distillation: Distillation) -> list[tuple[list[int], float]]:
    """A batch in parts, with their shares of its loss.

    Activations are computed anew in training only, which this is not: where they shall be, a row is taken at a time.
    """
    if not distillation.gradient_checkpointing:
        return [(rows, 1.0)]
    whole, weights = distillation.weight(rows), {row: distillation.weight([row]) for row in rows}
    return [([row], weight / whole) for row, weight in weights.items() if weight]


def reads_the_gradient(raw: RawCheckpoint) -> bool:
    """Whether there is anything in a checkpoint that can be turned to the gradient's directions."""
    return not raw.trains_tokens and any(part.reading_matrix for part in raw.parts.values())


class _Sums:
    """Sums of gradients over the tokens, whole matrices in float32: for all linear layers as much as the weights.

    Attributes:
        paths: of the modules that are wanted. found: path -> [d_out, d_in], of those that half of a device's free
            memory holds, and one at least.
    """

    def __init__(self, paths: Collection[str]) -> None:
        self.paths, self.found = paths, dict[str, Tensor]()
        self._has_room: dict[str, bool] = {}
        self._room: dict[torch.device, int] = {}

    @property
    def left(self) -> set[str]:
        """The modules that there was no room for: they need another run over the same batches."""
        return {path for path, has_room in self._has_room.items() if not has_room}

    def hook(self, path: str) -> Callable[[Any, tuple[Any, ...], Any], None]:
        """A forward hook that adds up g x^T, g the loss's gradient at the output."""

        def hook(_: Any, inputs: tuple[Any, ...], output: Any) -> None:
            read = inputs[0].detach()
            given: Tensor = output[0] if isinstance(output, tuple) else output
            if path not in self._has_room:
                self._has_room[path] = self._take(given.device, 4 * given.shape[-1] * read.shape[-1])
            if self._has_room[path]:
                given.register_hook(lambda gradient: self._add(path, gradient, read))  # type: ignore[no-untyped-call]

        return hook

    def _add(self, path: str, gradient: Tensor, read: Tensor) -> None:
        share = gradient.flatten(0, -2).float().T @ read.flatten(0, -2).float()
        self.found[path] = self.found[path].add_(share) if path in self.found else share

    def _take(self, device: torch.device, size: int) -> bool:
        """Whether so many bytes fit on a device, where they are counted then; the first always do."""
        first = device not in self._room
        room = self._room.setdefault(device, free_bytes(device) // 2)
        if not first and size > room:
            return False
        self._room[device] = room - size
        return True


def _reading(part: Part, gradient: Tensor) -> Part:
    assert part.reading_matrix is not None  # of others no gradient was asked for
    matrix = part.tensors[part.reading_matrix]
    width = len(matrix)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        wanted = min(*gradient.shape, width + _OVERSAMPLING)
        directions = torch.svd_lowrank(gradient.cpu(), wanted, niter=_POWER_ITERATIONS)[2].T[:width]
    found = torch.zeros_like(matrix)
    found[: len(directions)] = directions.to(found.dtype)
    return part.with_tensors({part.reading_matrix: found})
