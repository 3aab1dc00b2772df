"""What a row of the table of families can say: roles, the spaces that they read and write, and their names.

Spaces of a layer, in the order in which a layer computes them:

    attn.in          what query, key and value read (the residual stream)
    attn.query.out   attn.key.out   attn.value.out
    attn.context     attention-weighted values, read by the attention's output projection
    attn.output.out  what that projection writes, before residual and norm
    ffn.in           what the feed-forward block reads
    ffn.up.out       (ffn.gate.out)   before the activation function
    ffn.mid          what the feed-forward block's second projection reads
    ffn.down.out     what that projection writes, before residual and norm
    layer.out        the layer's output

Where queries, or keys and values, are made from a latent vector (DeepSeek's attention):

    attn.query_down.out   attn.kv_down.out   of the projections to them, before their norms
    attn.query_latent     attn.kv_latent     what the projections from them read
    attn.kv_up.out                           keys and values of all heads, without the part that rotates

What bottleneck adapters see of the residual stream, where a row says where they are:

    layer.in         before the attention: attn.in, unless a norm comes between them
    attn.stream      between the two blocks: ffn.in, unless a norm comes between them
    layer.out        after both

Between the two blocks of a decoder that also attends to an encoder:

    cross.in         what its query reads
    cross.memory     what its key and value read, the encoder's output
    cross.query.out   cross.key.out   cross.value.out   cross.context   cross.output.out

    cross.stream     the residual stream after it, which the feed-forward block sees; attn.stream is before it

In a mixture of experts the router reads ``ffn.in`` too and writes ``ffn.router.out``, one unit for each expert; the
spaces inside expert 3 are ``expert.3.ffn.mid`` and so on, inside an expert that serves every token ``shared.ffn.mid``.

A model with several stacks of layers puts the stack's name before all of these: ``encoder.attn.in``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from torch import Tensor

from peft_graft.models.spaces import MODEL_WIDE, TOKENS_OUT
from peft_graft.models.tasks import Task

#: What a stack does and reads; stacks of different families correspond by it. The first two read text.
Kind = Literal["encoder", "decoder", "vision", "audio"]


@dataclass(frozen=True)
class Fused:
    """Several projections in one linear layer: which roles, and how their rows lie in its output.

    ``stacked``: one after another. ``grouped``: for every key-value head its query heads, its key, its value.
    """

    roles: tuple[str, ...]
    layout: Literal["stacked", "grouped"] = "stacked"


@dataclass(frozen=True)
class LinearRole:
    """A linear layer, or its part in a fused one: its path inside the layer, the spaces that it reads and writes.

    ``elsewhere``: its path in those models of the family that lack the first. ``optional``: some models, or some layers
    of a model, do without it.
    """

    path: str
    reads: str
    writes: str
    fused: Fused | None = None
    elsewhere: str | None = None
    optional: bool = False


@dataclass(frozen=True)
class Tap:
    """Where a space can be observed: the input or the output of a module, by its path inside the layer.

    ``units``: the places in it that belong to the space, int64; all of them when None. ``expert``: the paths of a
    mixture and of the expert in it that the space belongs to, which sees a part of the tokens only.
    """

    path: str
    side: Literal["input", "output"]
    units: Tensor | None = None
    expert: tuple[str, str] | None = None


@dataclass(frozen=True)
class AdapterPoint:
    """Where AdapterHub puts a bottleneck adapter, and what it sees in each of its three arrangements."""

    path: str
    before_norm: str  # the block's output, before residual and norm (Houlsby)
    after_norm: str  # the same after residual and norm (Pfeiffer)
    parallel: str  # the block's input (He et al. 2022)


@dataclass(frozen=True)
class HeadForm:
    """How a task class arranges its head: module paths seen from the task model, activation, what it reads.

    ``dense_in_base``: the inner layer is part of the base model (BERT's pooler), seen from the base model.
    """

    out: str
    reads: str
    dense: str | None = None
    activation: str | None = None
    dense_in_base: bool = False


@dataclass(frozen=True)
class Experts:
    """A mixture of experts: the paths of the block and of the list of experts in it, and the roles in each expert."""

    block: str
    path: str
    linears: Mapping[str, LinearRole]


@dataclass(frozen=True)
class Stack:
    """A list of like layers: its path in the base model, and what a layer holds.

    ``name``: what stands before its roles and spaces in a model with several stacks. ``norms``: role -> path inside a
    layer; declared for a stack with a name, found by their names elsewhere (``norms``).
    """

    layers: str
    linears: Mapping[str, LinearRole]
    taps: Mapping[str, Tap] = field(default_factory=dict)
    adapters: Mapping[str, AdapterPoint] = field(default_factory=dict)
    name: str = ""
    kind: Kind = "encoder"
    experts: Experts | None = None
    norms: Mapping[str, str] = field(default_factory=dict)

    @property
    def places(self) -> dict[str, str]:
        """Role -> path inside a layer, of all at which a module can attach."""
        linears = {role: linear.path for role, linear in self.linears.items()}
        return {**linears, **{role: point.path for role, point in self.adapters.items()}, **self.norms}

    def full(self, name: str) -> str:
        """A role or space of this stack as the whole model calls it."""
        return f"{self.name}.{name}" if self.name else name

    def local(self, name: str) -> str | None:
        """The reverse of ``full``; None for what is not of this stack."""
        if not self.name:
            return name
        return name.removeprefix(f"{self.name}.") if name.startswith(f"{self.name}.") else None


@dataclass(frozen=True)
class ArchitectureRow:
    """One row of the table: everything that peft-graft knows about a family of models.

    ``stacks``: in the order in which they compute. ``flat_tasks``: tasks whose models hold the stacks themselves, and
    not a base model with the stacks. ``lm_head``: path of the output layer in a language model.
    """

    model_types: tuple[str, ...]
    stacks: tuple[Stack, ...]
    heads: Mapping[Task, HeadForm] = field(default_factory=dict)
    flat_tasks: frozenset[Task] = frozenset()
    lm_head: str = "lm_head"

    def head(self, task: Task) -> HeadForm | None:
        """How the head of a task is arranged, None where that is not known."""
        if task is Task.QUESTION_ANSWERING and self.heads:  # alike in all whose other heads are known
            return HeadForm(out="qa_outputs", reads=TOKENS_OUT)
        return self.heads.get(task)

    @cached_property
    def linears(self) -> Mapping[str, LinearRole]:
        """The linear layers of all stacks by role, roles and spaces as the whole model calls them."""
        return {
            stack.full(role): replace(linear, reads=stack.full(linear.reads), writes=stack.full(linear.writes))
            for stack in self.stacks
            for role, linear in stack.linears.items()
        }

    @cached_property
    def adapters(self) -> Mapping[str, AdapterPoint]:
        """The same for the places of bottleneck adapters."""
        return {
            stack.full(role): AdapterPoint(
                point.path, *(stack.full(name) for name in (point.before_norm, point.after_norm, point.parallel))
            )
            for stack in self.stacks
            for role, point in stack.adapters.items()
        }

    def stack(self, name: str) -> Stack:
        """The stack that a role or space belongs to.

        Raises:
            KeyError: there is none.
        """
        for stack in self.stacks:
            if stack.local(name) is not None:
                return stack
        raise KeyError(name)

    @property
    def reads_text(self) -> bool:
        """Whether text is all that the model reads."""
        return all(stack.kind in ("encoder", "decoder") for stack in self.stacks)


SPACES_OF_ROLE = {
    "attn.query": ("attn.in", "attn.query.out"),
    "attn.key": ("attn.in", "attn.key.out"),
    "attn.value": ("attn.in", "attn.value.out"),
    "attn.query_down": ("attn.in", "attn.query_down.out"),
    "attn.query_up": ("attn.query_latent", "attn.query.out"),
    "attn.kv_down": ("attn.in", "attn.kv_down.out"),
    "attn.kv_up": ("attn.kv_latent", "attn.kv_up.out"),
    "attn.output": ("attn.context", "attn.output.out"),
    "ffn.up": ("ffn.in", "ffn.up.out"),
    "ffn.gate": ("ffn.in", "ffn.gate.out"),
    "ffn.down": ("ffn.mid", "ffn.down.out"),
    "ffn.router": ("ffn.in", "ffn.router.out"),
    "cross.query": ("cross.in", "cross.query.out"),
    "cross.key": ("cross.memory", "cross.key.out"),
    "cross.value": ("cross.memory", "cross.value.out"),
    "cross.output": ("cross.context", "cross.output.out"),
}
#: Roles of virtual tokens: before the text, and among the keys and values of a layer.
PROMPT_ROLE, PREFIX_ROLE = "prompt", "attn.prefix"
#: Word embeddings, and the output layer of a language model.
EMBED_ROLE, LM_HEAD_ROLE = "embed", "lm_head"
VOCABULARY_ROLES = (EMBED_ROLE, LM_HEAD_ROLE)
#: Behind the embeddings: the invertible part of an adapter.
INVERTIBLE_ROLE = "embed.invertible"
#: Roles of a linear layer in a stack, in the order in which tables list them.
LINEAR_ROLES = tuple(SPACES_OF_ROLE)

QKV = ("attn.query", "attn.key", "attn.value")
GATE_UP = ("ffn.gate", "ffn.up")


def of_expert(name: str, linears: Mapping[str, LinearRole], path: str = "") -> dict[str, LinearRole]:
    """The roles inside one expert, ``expert.3.ffn.up``: all read the block's input, what they write is the expert's.

    Args:
        name: ``expert.3`` or ``shared``. path: of the expert inside the layer.
    """
    return {
        f"{name}.{role}": replace(
            linear,
            path=f"{path}.{linear.path}" if path else linear.path,
            reads=linear.reads if linear.reads == "ffn.in" else f"{name}.{linear.reads}",
            writes=f"{name}.{linear.writes}",
        )
        for role, linear in linears.items()
    }


_EXPERT = re.compile(r"(.*\.)?(expert\.(\d+)|shared)\.ffn\..+")


def expert_of(name: str) -> int | None:
    """The number of the expert that a role or space belongs to; None where it belongs to none, or to a shared one."""
    match = _EXPERT.fullmatch(name)
    return int(match[3]) if match and match[3] else None


def with_expert(name: str, expert: int) -> str:
    """The same role or space of another expert."""
    return re.sub(r"(^|\.)expert\.\d+\.", rf"\g<1>expert.{expert}.", name)


def moved_space(space: str, source: str, target: str) -> str:
    """What the student calls a space of the teacher, for a module that goes from role ``source`` to ``target``.

    Example:
        >>> moved_space("attn.in", "attn.query", "encoder.attn.query")
        'encoder.attn.in'
        >>> moved_space("expert.5.ffn.mid", "expert.5.ffn.down", "expert.3.ffn.down")
        'expert.3.ffn.mid'
    """
    if space in MODEL_WIDE:
        return space
    source_expert, target_expert = expert_of(source), expert_of(target)
    if source_expert is not None and target_expert is not None and expert_of(space) == source_expert:
        space = with_expert(space, target_expert)
    before, after = (_stack_part(role) for role in (source, target))
    return after + space.removeprefix(before)


def _stack_part(role: str) -> str:
    """What stands before the part of a role that all stacks share: ``encoder.`` of ``encoder.attn.query``."""
    match = re.match(r"(.*?)((expert\.\d+|shared)\.)?[^.]+\.[^.]+$", role)
    return match[1] if match else ""
