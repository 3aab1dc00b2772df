"""From padded activations to the rows of paired tokens, in memory that later batches use again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from peft_graft.alignment.layout import SAMPLE_SPACES
from peft_graft.models.spaces import Space


class Gather:
    """Picks token activations out of a padded batch and averages those of one block.

    Args:
        width: of the padded batch. ranges: for every sample the tokens [start, end) of its blocks.
    """

    def __init__(self, width: int, ranges: Sequence[Sequence[tuple[int, int]]], device: torch.device) -> None:
        spans = [(row * width + start, end - start) for row, part in enumerate(ranges) for start, end in part]
        rest = [(block, first + index) for block, (first, size) in enumerate(spans) for index in range(1, size)]
        self.count = len(spans)
        self._first = torch.tensor([first for first, _ in spans], dtype=torch.int64, device=device)
        self._rest = torch.tensor(rest, dtype=torch.int64, device=device).view(-1, 2).unbind(1)
        self._share = 1 / torch.tensor([float(size) for _, size in spans], device=device).unsqueeze(1)

    def __call__(self, activations: Tensor, out: Callable[[int, Tensor], Tensor] | None = None) -> Tensor:
        """[batch, length, d] -> [blocks, d], float32 at least, a new tensor or what ``out(blocks, like)`` gives."""
        flat = activations.flatten(0, 1)
        if flat.device != self._first.device:  # a layer on another device than the first
            self._first, self._rest, self._share = (
                self._first.to(flat.device), tuple(part.to(flat.device) for part in self._rest),
                self._share.to(flat.device),
            )  # fmt: skip
        dtype = torch.promote_types(flat.dtype, torch.float32)
        if out is not None and flat.dtype == dtype:
            picked = torch.index_select(flat, 0, self._first, out=out(self.count, flat))
        else:
            picked = flat.index_select(0, self._first).to(dtype)
        blocks, positions = self._rest
        if len(blocks):
            picked.index_add_(0, blocks, flat.index_select(0, positions).to(dtype))
            picked *= self._share
        return picked


class RowMemory:
    """Memory for the rows of one batch by the names of their tensors, kept from batch to batch.

    Fresh pages cost a processor as much as the products of what is written to them.
    """

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def __call__(self, name: str) -> Callable[[int, Tensor], Tensor]:
        """A function that returns memory for ``count`` rows of the dtype, device and width of another tensor."""

        def rows(count: int, like: Tensor) -> Tensor:
            held = self._held.get(name)
            if held is None or len(held) < count:
                # Batches differ a little in size; memory for the largest is taken at once.
                held = self._held[name] = like.new_empty(1 << (len(like) - 1).bit_length(), like.shape[-1])
            return held[:count]

        return rows


def rows_of(
    nodes: Mapping[Space, str], gather: Gather, memory: RowMemory, device: torch.device
) -> Callable[[Space, Tensor], Tensor]:
    """What makes of a space's activations its rows, as soon as they are seen, so that the model may let go of them.

    Args:
        nodes: the names of the tensors behind the spaces. device: where the rows are wanted.
    """

    def taken(space: Space, value: Tensor) -> Tensor:
        if space.name in SAMPLE_SPACES:
            return value.to(device, torch.promote_types(value.dtype, torch.float32), copy=True)
        return gather(value, memory(nodes[space])).to(device)

    return taken
