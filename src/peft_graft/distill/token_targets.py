"""What the student shall say after each token of an answer: the teacher's distributions, over tokens that both know.

A position is *strict* where one token of the student and one of the teacher cover the same bytes of the answer: there
their next-token distributions can be compared, over the tokens that are the same bytes in both vocabularies. Elsewhere
the student learns the answer's text. Positions are counted from the first token of the answer; what is said there is
read off the hidden state one token earlier.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peft_graft.models.output import OutputLayer

#: Of the teacher's distribution the likeliest tokens are kept one by one, the rest as one.
TOP = 16
#: Logits computed at a time, at most, float32.
CHUNK_BYTES = 256 << 20


@dataclass(frozen=True)
class VocabularyPart:
    """Some tokens of a vocabulary, in an order.

    Attributes:
        ids: [c], int64. size: of the whole vocabulary.
    """

    ids: Tensor
    size: int

    def logits(self, output: OutputLayer, states: Tensor) -> Tensor:
        """[n, d] hidden states -> [n, c] logits of these tokens, float32; others are not computed where they are many.

        Args:
            output: of the model that the vocabulary belongs to.
        """
        ids = self.ids.to(states.device)
        if self.is_whole:
            return output.logits(states)[:, : self.size]
        frozen = output.frozen
        if frozen is None or 2 * len(ids) > len(frozen[0]):
            return output.logits(states).index_select(1, ids)
        weight, bias = (value if value is None else value.index_select(0, ids.to(value.device)) for value in frozen)
        assert weight is not None
        return output.finish(torch.nn.functional.linear(states.to(weight.dtype), weight, bias))

    @property
    def is_whole(self) -> bool:
        """Whether these are all tokens in their own order."""
        return len(self.ids) == self.size and bool((self.ids == torch.arange(self.size)).all())


@dataclass(frozen=True)
class Columns:
    """The tokens of the student that its distributions are taken over, and which of the teacher's some of them are.

    Attributes:
        student: tokens of the student; the first are the shared ones, then what else it is likely to say. Mass on the
            latter is mass that the teacher's distribution has not.
        teacher: the shared tokens as the teacher numbers them.
    """

    student: VocabularyPart
    teacher: VocabularyPart

    @property
    def shared(self) -> int:
        """How many tokens are the same bytes in both vocabularies."""
        return len(self.teacher.ids)

    def index(self) -> Tensor:
        """[V]: the column of every token of the student, -1 where it has none."""
        found = torch.full((self.student.size,), -1, dtype=torch.int64)
        found[self.student.ids] = torch.arange(len(self.student.ids))
        return found


@dataclass(frozen=True)
class CompletionTargets:
    """Answers as the student reads them, after their prompts, with what it shall say at every position.

    Attributes:
        inputs: token ids of prompt and answer. starts: where the answer begins.
        strict: of each answer [m], int64: strict positions. top: [m, TOP], int64: columns of the teacher's likeliest
            tokens there. log_p: [m, TOP], float32: their log-probabilities over the shared tokens.
        text: [t, 2], int64: positions whose text is learned, and its column.
    """

    inputs: Sequence[list[int]]
    starts: Sequence[int]
    strict: Sequence[Tensor]
    top: Sequence[Tensor]
    log_p: Sequence[Tensor]
    text: Sequence[Tensor]

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def lengths(self) -> list[int]:
        """Tokens of every prompt with its answer."""
        return [len(row) for row in self.inputs]

    @property
    def tokens(self) -> int:
        """Tokens of all answers."""
        return sum(len(row) - start for row, start in zip(self.inputs, self.starts, strict=True))

    @property
    def sizes(self) -> list[int]:
        """Strict positions of every answer."""
        return list(map(len, self.strict))

    @property
    def positions(self) -> int:
        """Strict positions in all."""
        return sum(self.sizes)

    def part(self, rows: Sequence[int]) -> CompletionTargets:
        """Some of the answers."""
        return CompletionTargets(
            [self.inputs[row] for row in rows],
            [self.starts[row] for row in rows],
            [self.strict[row] for row in rows],
            [self.top[row] for row in rows],
            [self.log_p[row] for row in rows],
            [self.text[row] for row in rows],
        )


def likeliest(log_p: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest tokens of distributions [n, m]: their columns and log-probabilities, [n, TOP] each."""
    values, columns = log_p.topk(min(TOP, log_p.shape[1]), -1)
    return columns, values


def divergence(logits: Tensor, top: Tensor, log_p: Tensor) -> Tensor:
    """[n]: KL divergence of the student's from the teacher's distribution, nats, the rest of each taken as one token.

    It is at most the divergence of the whole distributions, and 0 with gradient 0 where they are equal.

    Args:
        logits: [n, c] of the student. top: [n, TOP] columns. log_p: [n, TOP] of the teacher.
    """
    log_q = logits.gather(1, top) - logits.logsumexp(1, keepdim=True)
    p, q = log_p.exp(), log_q.exp()
    rest_p, rest_q = (1 - p.sum(1)).clamp_min(0), (1 - q.sum(1)).clamp_min(1e-9)
    rest = torch.xlogy(rest_p, rest_p.clamp_min(1e-9)) - rest_p * rest_q.log()
    return (p * (log_p - log_q)).sum(1) + torch.where(rest_p > 1e-9, rest, 0.0)


def text_loss(logits: Tensor, column: Tensor) -> Tensor:
    """[n]: minus the log-probability of each text token, nats."""
    return torch.nn.functional.cross_entropy(logits, column, reduction="none")


def reverse_divergence(logits: Tensor, teacher_log_p: Tensor) -> Tensor:
    """[n]: KL divergence of the teacher's from the student's distribution over the student's likeliest shared tokens.

    Args:
        logits: [n, c] of the student, the shared tokens first. teacher_log_p: [n, m], over the shared tokens.
    """
    shared = logits[:, : teacher_log_p.shape[1]]
    columns = shared.detach().topk(min(TOP, shared.shape[1]), -1).indices
    log_q = shared.gather(1, columns).log_softmax(1)
    log_p = teacher_log_p.gather(1, columns).log_softmax(1)
    return (log_q.exp() * (log_q - log_p)).sum(1)


def chunks(rows: int, width: int) -> list[slice]:
    """Parts of so many rows, of which the logits, ``width`` in a row, can be held at a time; at least one."""
    size = max(1, CHUNK_BYTES // (4 * width))
    return [slice(start, start + size) for start in range(0, max(1, rows), size)]


def in_chunks(states: Tensor, width: int, of: Callable[[Tensor, slice], Tensor], *, frozen: bool) -> Tensor:
    """The sum of a loss over rows of hidden states, with no more than a chunk of logits at any time.

    Args:
        states: [n, d]. width: logits of one row. of: (rows of states, which) -> losses [rows].
        frozen: whether the loss depends on parameters through the states alone. Then its gradient is taken at once,
            chunk by chunk, and no logits are computed a second time; else they are, in the backward pass.
    """
    if not len(states):
        return states.sum() * 0
    parts = chunks(len(states), width)
    if not torch.is_grad_enabled() or not states.requires_grad:
        return torch.stack([of(states[part], part).sum() for part in parts]).sum()
    if frozen:
        total: Tensor = _AtOnce.apply(states, parts, of)  # type: ignore[no-untyped-call]
        return total
    from torch.utils.checkpoint import checkpoint

    sums = [
        checkpoint(lambda rows, part=part: of(rows, part).sum(), states[part], use_reentrant=False) for part in parts
    ]
    return torch.stack(sums).sum()


class _AtOnce(torch.autograd.Function):
    """A sum over chunks whose gradient is found in the forward pass."""

    @staticmethod
    def forward(
        context: torch.autograd.function.FunctionCtx,
        states: Tensor,
        parts: Sequence[slice],
        of: Callable[[Tensor, slice], Tensor],
    ) -> Tensor:
        gradient = torch.empty_like(states)
        total = torch.zeros((), device=states.device)
        for part in parts:
            rows = states[part].detach().requires_grad_()
            with torch.enable_grad():
                value = of(rows, part).sum()
            total += value.detach()
            gradient[part] = torch.autograd.grad(value, rows)[0]
        context.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(context: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> tuple[Tensor | None, None, None]:
        (own,) = context.saved_tensors  # type: ignore[attr-defined]
        return gradients[0] * own, None, None
