"""What modules train of a vocabulary, and which tokens of two vocabularies are the same.

A vocabulary is a named space like any other: word embeddings take one of its units and write ``embeddings.out``, an
output layer reads ``tokens.out`` and writes it. No text says which of its units correspond; the tokens themselves do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from peft_graft.alignment.maps import Selection
from peft_graft.errors import PairingError, PlanError
from peft_graft.models.spaces import EMBEDDED, TOKENS_OUT, VOCABULARY, Site
from peft_graft.models.spec import EMBED_ROLE
from peft_graft.modules.base import Axis, LabelledTensor, Module

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: How a token of several letters says that it begins a word, or that it goes on with one.
_BYTE_LEVEL, _SENTENCEPIECE, _WORDPIECE = "Ġ", "▁", "##"
_SHOWN = 8


@dataclass(frozen=True)
class RowsModule(Module):
    """Trained rows of word embeddings or of an output layer.

    Tensors: ``rows`` [V, d], all rows of the vocabulary, beside ``rows_was``, which are zero for tokens that the base
    model does not have; ``chosen`` [V], 1 for the tokens that were trained, where they are named one by one.
    """

    #: What the model multiplies these rows by before it uses them (Gemma 3's word embeddings).
    scale: float = 1.0

    @property
    def width(self) -> int:
        """1: one vector a token."""
        return 1

    @property
    def changed(self) -> Tensor:
        """Ids of the tokens whose rows were trained, int64."""
        tensors = self.tensors
        if "chosen" in tensors:
            return tensors["chosen"].values.nonzero().flatten()
        return (tensors["rows"].values != tensors["rows_was"].values).any(1).nonzero().flatten()

    @property
    def acts(self) -> bool:
        """Whether a row differs from the base model's."""
        return not torch.equal(self.tensors["rows"].values, self.tensors["rows_was"].values)

    @property
    def strength(self) -> float:
        """Norm of the change of the rows."""
        return float((self.tensors["rows"].values.double() - self.tensors["rows_was"].values.double()).norm())


def rows_module(site: Site, values: Mapping[str, Tensor], base: Tensor | None) -> RowsModule:
    """The module of rows that were saved whole (``rows``), or one by one (``token_rows``, ``token_ids``).

    Args:
        base: [V, d], the rows of the base model; None or on the meta device where they are not known yet.
    """
    if "rows" in values:
        rows, was = values["rows"], _resized(base, len(values["rows"]), values["rows"])
        found = {"rows": rows, "rows_was": was}
    else:
        ids, new = values["token_ids"], values["token_rows"]
        size = max(len(base) if base is not None else 0, int(ids.max()) + 1)
        was = _resized(base, size, new)
        chosen = torch.zeros(size, dtype=new.dtype)
        chosen[ids] = 1
        rows = was if was.is_meta else was.index_copy(0, ids, new)
        found = {"rows": rows, "rows_was": was, "chosen": chosen}
    return RowsModule(site, {name: LabelledTensor(value, _axes(site, name)) for name, value in found.items()})


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


def settled_rows(module: RowsModule, own: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
    """Moved rows as the student's file will have them, by the names of ``rows_module``'s values.

    r_s = map(r_t) + (b_s - map(b_t)): where the two models' rows are equal, the values arrive bit for bit, and a token
    that the teacher does not have keeps the student's row. A token that only the teacher's module added has no b_t, and
    then b_s, which is as random as that was, does not count.

    Args:
        own: [V, d], the student's rows. scale: ``RowsModule.scale`` in the student.
    """
    rows, was = module.tensors["rows"].values, module.tensors["rows_was"].values
    if scale != module.scale:
        rows, was = rows * (module.scale / scale), was * (module.scale / scale)
    added = ~was.any(1) & rows.any(1)
    base = torch.where(added[:, None], 0, own.detach().to(was))
    found = torch.where(base == was, rows, rows + (base - was))
    if "chosen" not in module.tensors:
        return {"rows": found}
    ids = module.changed
    return {"token_rows": found[ids].contiguous(), "token_ids": ids}


@dataclass(frozen=True)
class Vocabularies:
    """Which tokens of a teacher's module and of a student are the same.

    Attributes:
        teacher: the tokenizer that the module was trained with. student: the student's.
        size: rows of the student's embeddings. same: take ids for tokens, where there are no tokenizers to ask.
    """

    teacher: PreTrainedTokenizerBase | None
    student: PreTrainedTokenizerBase | None
    size: int
    same: bool = False
    _selections: dict[int, Selection] = field(default_factory=dict)

    def map_for(self, module: Module) -> Selection:
        """The map of a module's vocabulary axis; its errors are those of ``selection``."""
        return self.selection(
            next(
                tensor.values.shape[axis]
                for tensor in module.tensors.values()
                for axis, label in enumerate(tensor.axes)
                if label is not None and label.space == VOCABULARY
            )
        )

    def selection(self, size: int) -> Selection:
        """The map of a vocabulary of ``size`` teacher tokens: for each of the student's its counterpart, or none.

        Raises:
            PairingError: a tokenizer is missing, and the vocabularies are not known to be the same.
        """
        if size not in self._selections:
            indices = torch.full((self.size,), -1)
            if self.teacher is None or self.student is None:
                if not self.same:
                    raise PairingError(
                        "the module trains tokens, and a model came without its tokenizer to say which they are",
                        where="student" if self.teacher else "teacher",
                        fix="pass its tokenizer",
                    )
                pairs = _same_ids(size, self.size)
            elif self.teacher.get_vocab() == self.student.get_vocab():
                pairs = _same_ids(size, self.size)  # rows without a token, which only fill a matrix up, included
            else:
                pairs = self._pairs
            for token, index in pairs:
                if index < size and token < self.size:
                    indices[token] = index
            self._selections[size] = Selection(indices, size)
        return self._selections[size]

    @cached_property
    def _pairs(self) -> list[tuple[int, int]]:
        """(student id, teacher id) of the tokens that are the same."""
        assert self.teacher is not None
        assert self.student is not None
        plain = _style(self.teacher) == _style(self.student)
        theirs, ours = (_keys(tokenizer, plain=plain) for tokenizer in (self.teacher, self.student))
        found = {ours[key]: theirs[key] for key in ours.keys() & theirs.keys()}
        # What marks a text's beginning is written otherwise in every family.
        for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"):
            first, second = (getattr(one, f"{name}_token_id", None) for one in (self.teacher, self.student))
            if first is not None and second is not None:
                found.setdefault(second, first)
        return sorted(found.items())

    def left_out(self, module: Module) -> str | None:
        """A remark on trained tokens that the student does not have, None where it has them all.

        Raises:
            PlanError: it has none of them.
        """
        if not isinstance(module, RowsModule):
            return None
        known = set(self.teacher.get_vocab().values()) if self.teacher else None
        trained = [token for token in module.changed.tolist() if known is None or token in known]
        kept = set(self.selection(len(module.tensors["rows"].values)).indices.tolist())
        lost = [token for token in trained if token not in kept]
        if not lost:
            return None
        shown = [str(self.teacher.convert_ids_to_tokens(token)) if self.teacher else str(token) for token in lost]
        names = ", ".join(shown[:_SHOWN]) + (", ..." if len(shown) > _SHOWN else "")
        if len(lost) == len(trained):
            raise PlanError(
                "the student has none of the tokens that the module trains",
                where=str(module.site),
                expected=names,
                fix="add them to the student (tokenizer.add_tokens, model.resize_token_embeddings), save both, and "
                "give that folder as --student",
            )
        return f"{module.site}: {len(lost)} of {len(trained)} trained tokens are unknown to the student ({names})"


def _same_ids(first: int, second: int) -> list[tuple[int, int]]:
    return [(index, index) for index in range(min(first, second))]


def _style(tokenizer: PreTrainedTokenizerBase) -> str | None:
    vocabulary = tokenizer.get_vocab()
    marks = (_BYTE_LEVEL, _SENTENCEPIECE, _WORDPIECE)
    counts = {mark: sum(token.startswith(mark) for token in vocabulary) for mark in marks}
    return max(counts, key=counts.__getitem__) if any(counts.values()) else None


def _keys(tokenizer: PreTrainedTokenizerBase, *, plain: bool) -> dict[str, int]:
    """Token, as text that begins with a space where a word does -> id; as it is written when ``plain``."""
    style, keys = _style(tokenizer), dict[str, int]()
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    for token, index in tokenizer.get_vocab().items():
        key = token if plain or token in added else _text(token, style)
        keys.setdefault(key, index)
    return keys


def _text(token: str, style: str | None) -> str:
    if style == _WORDPIECE:
        return token.removeprefix(_WORDPIECE) if token.startswith(_WORDPIECE) else f" {token}"
    if style == _SENTENCEPIECE:
        return token.replace(_SENTENCEPIECE, " ")
    if style == _BYTE_LEVEL:
        try:
            return bytes(_BYTE_OF[letter] for letter in token).decode()
        except (KeyError, UnicodeDecodeError):  # a part of a letter
            return f"bytes {token}"
    return token


def _byte_letters() -> dict[str, int]:
    """The letters that stand for bytes in byte-level tokenizers (Radford et al. 2019)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + place): byte for place, byte in enumerate(hidden)}


_BYTE_OF = _byte_letters()
