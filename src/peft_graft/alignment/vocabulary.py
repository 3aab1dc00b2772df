"""Which tokens of two vocabularies are the same: the map of the one space that no text says anything about.

A vocabulary is a named space like any other, of which word embeddings take a unit and which an output layer writes
(``modules.embeddings``). Which of its units correspond, the tokens themselves say.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from peft_graft.alignment.maps import Selection
from peft_graft.errors import PairingError, PlanError
from peft_graft.models.loading import ModelPair
from peft_graft.models.spaces import VOCABULARY, Space
from peft_graft.models.vocabulary import embedding_similarity
from peft_graft.modules.base import Module

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: How a token of several letters says that it begins a word, or that it goes on with one.
_BYTE_LEVEL, _SENTENCEPIECE, _WORDPIECE = "Ġ", "▁", "##"
_SHOWN = 8
#: Mean cosine of word embeddings from which on vocabularies are taken for the same one.
_SAME = 0.5


@dataclass(frozen=True)
class Vocabularies:
    """Which tokens of a teacher's module and of a student are the same.

    Attributes:
        teacher: the tokenizer that the module was trained with. student: the student's.
        size: rows of the student's embeddings. same: take ids for tokens, where there are no tokenizers to ask.
        before: rows of the teacher's embeddings before tokens were added for the module; None where nothing counts.
    """

    teacher: PreTrainedTokenizerBase | None
    student: PreTrainedTokenizerBase | None
    size: int
    same: bool = False
    before: int | None = None
    _selections: dict[int, Selection] = field(default_factory=dict)

    @classmethod
    def of(cls, models: ModelPair, trained_with: PreTrainedTokenizerBase | None = None) -> Vocabularies:
        """The vocabularies of two models.

        Args:
            trained_with: the tokenizer that was saved with the module, where tokens were added for it.
        """
        similarity = embedding_similarity(models.teacher.base, models.student.base)
        found = cls.told(trained_with or models.teacher.tokenizer, models.student.tokenizer, models)
        return replace(found, same=similarity is not None and similarity > _SAME)

    @classmethod
    def told(
        cls, teacher: PreTrainedTokenizerBase | None, student: PreTrainedTokenizerBase | None, shapes: ModelPair
    ) -> Vocabularies:
        """The same as far as tokenizers and shapes tell it, before any weights."""
        first, second = (model.architecture.sizes for model in (shapes.teacher, shapes.student))
        vocabulary = Space(-1, VOCABULARY)
        return cls(teacher, student, second.get(vocabulary, 0), before=first.get(vocabulary))

    def map_for(self, module: Module) -> Selection:
        """The map of a module's vocabulary axis; its errors are those of ``selection``."""
        return self.selection(_size(module))

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
        """A remark on trained tokens that the student does not have, or that nothing names; None where it has them all.

        Raises:
            PlanError: it has none of them.
        """
        tokens, size = module.trained_tokens, _size(module)
        if not size:
            return None
        known = set(self.teacher.get_vocab().values()) if self.teacher else None
        kept = set(self.selection(size).indices.tolist())
        added = range(size if self.before is None else self.before, size)
        if nameless := [row for row in added if row not in kept and (known is None or row not in known)]:
            return (
                f"{module.site}: {len(nameless)} rows that were added to the teacher's vocabulary are left out, for no "
                "tokenizer lies beside the module to say which tokens they are"
            )
        if tokens is None:
            return None
        trained = [token for token in tokens.tolist() if known is None or token in known]
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


def _size(module: Module) -> int:
    """Number of tokens of the vocabulary that a module's axes live in, 0 where they do not."""
    sizes = (
        tensor.values.shape[axis]
        for tensor in module.tensors.values()
        for axis, label in enumerate(tensor.axes)
        if label is not None and label.space == VOCABULARY
    )
    return next(sizes, 0)


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
            return bytes(BYTE_OF[letter] for letter in token).decode()
        except (KeyError, UnicodeDecodeError):  # a part of a letter
            return f"bytes {token}"
    return token


def _byte_letters() -> dict[str, int]:
    """The letters that stand for bytes in byte-level tokenizers (Radford et al. 2019)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + place): byte for place, byte in enumerate(hidden)}


#: Letter of a byte-level token -> the byte that it stands for.
BYTE_OF = _byte_letters()
