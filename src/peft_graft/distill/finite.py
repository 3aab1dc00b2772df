"""Answers that are no numbers: never compared, never learned."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice

import torch
from torch import Tensor

from peft_graft.errors import ModelError

_SHOWN = 200


class NotFiniteError(ModelError):
    """A model answers a text with NaN or infinity."""


def check_finite(answers: Tensor, model: str, texts: Iterable[str], counts: Sequence[int] | None = None) -> None:
    """Refuse answers [n, ...] that are not finite.

    Args:
        model: what it is and what it is called. texts: that were answered, read up to the first bad one. counts:
            answers to each; one by default.

    Raises:
        NotFiniteError: it names the model and the first such text.
    """
    good = torch.isfinite(answers.detach().flatten(1)).all(1)
    if bool(good.all()):
        return
    bad = int((~good).nonzero()[0])
    text = bad if counts is None else int((torch.tensor(counts).cumsum(0) <= bad).sum())
    raise not_finite(model, next(islice(texts, text, None)))


def not_finite(model: str, text: str) -> NotFiniteError:
    """The error of a model whose answer to a text is not finite."""
    shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
    return NotFiniteError(
        f"the answer to {shown!r} is not finite (NaN or infinity)",
        where=model,
        fix="check the model's and the module's weights; in float16 large values overflow, so try --dtype float32, or "
        "leave that line out",
    )
