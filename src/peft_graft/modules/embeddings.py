"""Trained rows of word embeddings and output layers: tokens that a module brings with it.

A vocabulary is a named space like any other: word embeddings take one of its units and write ``embeddings.out``, an
output layer reads ``tokens.out`` and writes it. No text says which of its units correspond; the tokens themselves do
(``alignment.vocabulary``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from peft_graft.errors import CheckpointError, PlanError
from peft_graft.models.architecture import Architecture
from peft_graft.models.spaces import EMBEDDED, TOKENS_OUT, VOCABULARY, Site
from peft_graft.models.spec import EMBED_ROLE, VOCABULARY_ROLES
from peft_graft.modules.base import Axis, Base, LabelledTensor, Module, Part, register_module

#: What authors call output layers, and word embeddings: libraries save those beside a module if trained or resized.
OUTPUT_NAMES = ("lm_head", "embed_out")
EMBEDDING_NAMES = (
    "embed_tokens",
    "word_embeddings",
    "wte",
    "embed_in",
    "tok_embeddings",
    "token_embedding",
    "shared",
    *OUTPUT_NAMES,
)


def is_vocabulary(path: str) -> bool:
    """Whether a path is of word embeddings or of an output layer, by its last name."""
    return path.rpartition(".")[2] in EMBEDDING_NAMES


def vocabulary_scale(site: Site, architecture: Architecture) -> float:
    """What the model multiplies the rows of this site by before it uses them."""
    return architecture.embed_scale if site.role == EMBED_ROLE else 1.0


@dataclass(frozen=True, eq=False)
class RowsPart(Part):
    """All rows of word embeddings or of an output layer, ``rows`` [V, d]."""

    rows: Tensor

    SHAPES: ClassVar = {"rows": ("V", "d")}

    @property
    def is_active(self) -> bool:
        """Whether a row is anything but zero."""
        return bool(self.rows.any())

    @property
    def vocabulary_size(self) -> int | None:
        """V."""
        return len(self.rows)

    def trains_tokens(self, path: str) -> bool:
        """Always."""
        return True

    def trains_output(self, path: str) -> bool:
        """Whether the rows are of an output layer."""
        return path.rpartition(".")[2] in OUTPUT_NAMES


@dataclass(frozen=True, eq=False)
class TokenRowsPart(RowsPart):
    """The rows of some tokens, ``rows`` [n, d], and the tokens' ids."""

    ids: tuple[int, ...]

    @property
    def vocabulary_size(self) -> int | None:
        """As many as the highest id needs."""
        return max(self.ids) + 1


@register_module(RowsPart, TokenRowsPart)
@dataclass(frozen=True)
class RowsModule(Module):
    """Trained rows of word embeddings or of an output layer.

    Tensors: ``rows`` [V, d], all rows of the vocabulary, beside ``rows_was``, which are zero for tokens that the base
    model does not have; ``chosen`` [V], 1 for the tokens that were trained, where they are named one by one.
    """

    RELATIVE_TO: ClassVar = {"rows": "rows_was"}
    #: What the model multiplies these rows by before it uses them (Gemma 3's word embeddings).
    scale: float = 1.0

    @property
    def width(self) -> int:
        """1: one vector a token."""
        return 1

    @property
    def trained_tokens(self) -> Tensor:
        """Ids of the tokens whose rows were trained, int64."""
        values = self.values
        if "chosen" in values:
            return values["chosen"].nonzero().flatten()
        return (values["rows"] != values["rows_was"]).any(1).nonzero().flatten()

    @property
    def names_tokens(self) -> bool:
        """Whether they are named one by one."""
        return "chosen" in self.tensors

    @property
    def is_active(self) -> bool:
        """Whether a row differs from the base model's."""
        return self.differs_from_base

    @property
    def strength(self) -> float:
        """Norm of the change of the rows."""
        return float((self.tensors["rows"].values.double() - self.tensors["rows_was"].values.double()).norm())

    @classmethod
    def at_site(cls, part: Part, path: str, site: Site, base: Base) -> Self:
        """The rows beside the base model's own."""
        assert isinstance(part, RowsPart)
        if site.role not in VOCABULARY_ROLES:
            raise CheckpointError(f"{path} is neither word embeddings nor an output layer", where=str(site))
        own, rows = base.tensor(site, "weight"), part.rows
        if isinstance(part, TokenRowsPart):
            known = base.architecture.num_embeddings or 0
            if max(part.ids) >= 2 * known:  # no vocabulary grows so much
                raise CheckpointError(
                    "the module trains tokens far beyond the base model's",
                    where=path,
                    expected=f"ids of a vocabulary of {known} tokens, or of some more",
                    found=max(part.ids),
                    fix="correct trainable_token_indices in adapter_config.json; where the vocabulary has grown so "
                    "much, save the resized model and give it with --teacher",
                )
            ids = torch.tensor(part.ids)
            size = max(len(own) if own is not None else 0, part.vocabulary_size or 0)
            was = _resized(own, size, rows)
            chosen = torch.zeros(size, dtype=rows.dtype)
            chosen[ids] = 1
            found = {"rows": was if was.is_meta else was.index_copy(0, ids, rows), "rows_was": was, "chosen": chosen}
        else:
            found = {"rows": rows, "rows_was": _resized(own, len(rows), rows)}
        tensors = {name: LabelledTensor(value, _axes(site, name)) for name, value in found.items()}
        return cls(site, tensors, scale=vocabulary_scale(site, base.architecture))

    def to_part(self, base: Base) -> RowsPart:
        """Moved rows as the student's file has them.

        r_s = map(r_t) + (b_s - map(b_t)): where the two models' rows are equal, the values arrive bit for bit, and a
        token that the teacher does not have keeps the student's row. A token that only the teacher's module added has
        no b_t, and then b_s, which is as random as that was, does not count.

        Raises:
            PlanError: the student's rows are not among the base's tensors.
        """
        own = base.tensor(self.site, "weight")
        if own is None:
            raise PlanError(
                "trained rows need the model's own beside them", where=str(self.site), fix="give the whole model"
            )
        rows, was = self.tensors["rows"].values, self.tensors["rows_was"].values
        scale = vocabulary_scale(self.site, base.architecture)
        if scale != self.scale:
            rows, was = rows * (self.scale / scale), was * (self.scale / scale)
        added = ~was.any(1) & rows.any(1)
        now = torch.where(added[:, None], 0, own.detach().to(was))
        found = torch.where(now == was, rows, rows + (now - was))
        if "chosen" not in self.tensors:
            return RowsPart(found)
        ids = self.trained_tokens
        return TokenRowsPart(found[ids].contiguous(), tuple(ids.tolist()))


def _axes(site: Site, name: str) -> tuple[Axis, ...]:
    token = Axis("write", VOCABULARY)
    if name == "chosen":
        return (token,)
    return (token, Axis("write", EMBEDDED) if site.role == EMBED_ROLE else Axis("read", TOKENS_OUT))


def _resized(base: Tensor | None, size: int, like: Tensor) -> Tensor:
    """[size, d]: the base's rows, in the device and dtype of ``like``; zero for tokens that it does not have."""
    if base is None or base.is_meta:
        return torch.empty(size, like.shape[1], dtype=like.dtype, device="meta")
    kept = base.detach()[:size].to(like)
    return torch.cat([kept, kept.new_zeros(size - len(kept), kept.shape[1])])
