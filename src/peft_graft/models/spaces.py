"""Sites, at which modules attach, and the activation spaces that their weights read from and write to."""

from __future__ import annotations

from dataclasses import dataclass

#: Spaces that belong to the whole model and not to one layer.
TOKENS_OUT = "tokens.out"  # last hidden state, one vector a token
FIRST_OUT = "first.out"  # last hidden state of the first token ([CLS], <s>), one vector a sample
LAST_OUT = "last.out"  # last hidden state of the last token, which decoders classify by, one vector a sample
POOLED_OUT = "pooled.out"  # the model's own pooler output, one vector a sample
GLOBAL_SPACES = (TOKENS_OUT, FIRST_OUT, LAST_OUT, POOLED_OUT)
EMBEDDED = "embeddings.out"  # word embeddings as the first layer is given them, one vector a token
VOCABULARY = "vocabulary"  # the tokens themselves; tokenizers say which correspond, not text
#: All spaces without a layer.
MODEL_WIDE = (*GLOBAL_SPACES, EMBEDDED, VOCABULARY)


@dataclass(frozen=True, order=True)
class Site:
    """A place in a model where a module attaches: a layer index and a role such as ``attn.query``."""

    layer: int
    role: str

    def __str__(self) -> str:
        return self.role if self.layer < 0 else f"layer {self.layer} {self.role}"


@dataclass(frozen=True, order=True)
class Space:
    """An activation space of one model, such as ``attn.in`` of layer 3; ``layer`` is -1 for model-wide spaces."""

    layer: int
    name: str

    def __str__(self) -> str:
        return self.name if self.layer < 0 else f"layer {self.layer} {self.name}"

    @property
    def key(self) -> str:
        """The space as a file key, ``3/attn.in`` or ``tokens.out``; ``Space.from_key`` reverses it."""
        return self.name if self.layer < 0 else f"{self.layer}/{self.name}"

    @staticmethod
    def from_key(key: str) -> Space:
        """The space of a file key."""
        layer, _, name = key.rpartition("/")
        return Space(int(layer) if layer else -1, name)


def space_at(layer: int, name: str) -> Space:
    """The space of this name that a module of this layer lives in; those of the whole model have no layer."""
    return Space(-1 if name in MODEL_WIDE else layer, name)
