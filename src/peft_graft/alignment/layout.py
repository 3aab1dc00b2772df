"""Which tensors the spaces of two models are, which products of them a pass takes, and how many passes it takes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor

from peft_graft.alignment.activations import Capture, pad, tokenize
from peft_graft.alignment.alignment import Pair
from peft_graft.alignment.moments import Moment
from peft_graft.alignment.text import Sample
from peft_graft.errors import AlignmentError
from peft_graft.models.devices import free_bytes
from peft_graft.models.loading import ModelPair
from peft_graft.models.spaces import FIRST_OUT, LAST_OUT, POOLED_OUT, Space

#: Spaces of which a sample has one vector, and not one for every token.
SAMPLE_SPACES = {FIRST_OUT, LAST_OUT, POOLED_OUT}
#: What a method needs of every pair of spaces beside the cross moment.
Wanted = Mapping[Pair, Collection[Moment]]
#: The share of free memory that the totals of one pass may take: solving holds copies, and batches need some too.
_SHARE = 0.5


class Layout:
    """The tensors behind the spaces of two models, found by one probe of both.

    Spaces that are one tensor in the model (query, key and value read the same) are one node.

    Attributes:
        nodes: of the teacher and of the student, space -> name of the tensor.
        sizes: units of a tensor by its name.
    """

    def __init__(self, of_teacher: Capture, of_student: Capture) -> None:
        self.nodes = _nodes("teacher", of_teacher), _nodes("student", of_student)
        self.sizes = {
            node: capture.model.architecture.size(space)
            for nodes, capture in zip(self.nodes, (of_teacher, of_student), strict=True)
            for space, node in nodes.items()
        }

    @property
    def spaces(self) -> tuple[list[Space], list[Space]]:
        """One space of the teacher, and one of the student, for every tensor."""
        first, second = (list({node: space for space, node in nodes.items()}.values()) for nodes in self.nodes)
        return first, second

    @classmethod
    def of(cls, models: ModelPair, pairs: Iterable[Pair]) -> Layout:
        """The layout of the spaces of these pairs, from a forward pass of a few words through each model."""
        pairs = list(pairs)
        with (
            torch.inference_mode(),
            Capture(models.teacher, (pair[0] for pair in pairs)) as of_teacher,
            Capture(models.student, (pair[1] for pair in pairs)) as of_student,
        ):
            return cls(of_teacher, of_student)

    def products(self, wanted: Wanted) -> list[tuple[str, str]]:
        """The products that are needed, each once: (rows, columns) by the tensors' names."""
        found: dict[tuple[str, str], None] = {}
        for (first, second), moments in wanted.items():
            teacher, student = self.nodes[0][first], self.nodes[1][second]
            found[student, teacher] = None
            for moment, node in (("teacher", teacher), ("student", student)):
                if moment in moments:
                    found[node, node] = None
        return list(found)

    def values(self, wanted: Wanted, *, hold_out: bool) -> int:
        """Memory for the totals of a pass over what is wanted, in float64 values."""
        totals = sum(self.sizes[a] * self.sizes[b] for a, b in self.products(wanted)) * (1 + hold_out)
        return totals if is_precise(wanted) else totals * 3 // 2  # with float32 products that they do not have yet

    def parts(self, wanted: Wanted, limit: int, *, hold_out: bool) -> list[Wanted]:
        """What is wanted in parts of neighbouring layers, each of ``limit`` values at most where that is possible.

        One part where everything fits; a pair of spaces that does not is a part of its own.
        """
        parts: list[dict[Pair, Collection[Moment]]] = [{}]
        # Pairs that are the same tensors follow one another, so that they share a part and its products.
        for pair in sorted(wanted, key=lambda pair: (pair[1].layer % (1 << 30), self.nodes[1][pair[1]], pair)):
            longer = {**parts[-1], pair: wanted[pair]}
            if parts[-1] and self.values(longer, hold_out=hold_out) > limit:
                parts.append({pair: wanted[pair]})
            else:
                parts[-1] = longer
        return list(parts)


def is_precise(wanted: Wanted) -> bool:
    """Whether products are float64 and not of the activations' precision: a regression inverts what it is given."""
    return any(set(moments) - {"cross"} for moments in wanted.values())


def memory_of_a_pass(device: torch.device, sharers: int = 1) -> int:
    """How many float64 values the totals of one pass should have at most, where ``sharers`` run side by side."""
    return int(free_bytes(device) // 8 * _SHARE) // sharers


def check_memory(values: int, device: torch.device) -> None:
    """Refuse totals that do not fit, before hours go by.

    Raises:
        AlignmentError: so many values in float64 are more than the device has free.
    """
    free = free_bytes(device)
    if 8 * values > free:
        raise AlignmentError(
            "the statistics of one pair of spaces do not fit in memory",
            where=str(device),
            expected=f"at most {free / 2**30:,.1f} GiB",
            found=f"{8 * values / 2**30:,.1f} GiB",
            fix="free some, or name one --method: prune-align needs the least",
        )


def probe(capture: Capture) -> dict[Space, Tensor]:
    """What is captured in a forward pass of a few words."""
    model = capture.model
    rows, _ = tokenize(model, [Sample("a probe of some words")], 16)
    return capture.forward(pad(model, rows, model.device))


def _nodes(side: str, capture: Capture) -> dict[Space, str]:
    """A name for the tensor behind every captured space, the same for spaces that are one tensor."""
    held = probe(capture)
    names: dict[object, str] = {}
    return {
        space: names.setdefault(
            (value.data_ptr(), tuple(value.shape), value.stride(), space.name in SAMPLE_SPACES), f"{side} {space.key}"
        )
        for space, value in sorted(held.items())
    }
