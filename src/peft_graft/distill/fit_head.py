"""Fitting a head to the teacher's predictions instead of its weights.

A head mapped weight by weight inherits every error of the map and of the moved modules. Fitting it to what the teacher
says about a text, through the student's own features, is a small convex problem (logistic regression on soft
targets, least squares where it gives numbers; with an inner layer it is convex no more, and starts from the mapped
layer), and uses no label.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from peft_graft.alignment.activations import pad
from peft_graft.checkpoints.attached import AttachedModel
from peft_graft.distill.finite import check_finite
from peft_graft.distill.targets import (
    NEVER,
    Kind,
    Targets,
    cross_entropy,
    kind_of,
    log_probabilities,
    pooled,
    stacked,
    variance_of,
)
from peft_graft.distill.training import length_batches
from peft_graft.models.loading import ModelHandle
from peft_graft.models.spaces import FIRST_OUT, LAST_OUT, POOLED_OUT
from peft_graft.modules.head import ACTIVATIONS, Head

#: Weight penalties to choose from, on standardised features, the heaviest first; and heavier ones for numbers, which
#: tell more of what is not so.
PENALTIES = (1e-2, 1e-3, 1e-4)
_OF_NUMBERS = (1.0, 1e-1)
STEPS = 60
#: Numbers of features that are held of samples whose every token is read: a quarter of a gigabyte.
_HELD = 1 << 26
Values = dict[str, Tensor]


def features(attached: AttachedModel, student: ModelHandle, targets: Targets, reads: str) -> tuple[Tensor, Tensor]:
    """What the head reads at every answer, [n, d] float32, and the answers' targets, as ``Targets`` has them and in
    their order. Of ``spans`` it is what stands at every token, [tokens of all samples, d].

    Raises:
        NotFiniteError: some of it is not finite.
    """
    read: dict[int, Tensor] = {}
    attached.model.eval()
    held: list[Tensor] = []
    hook = _pooler(attached).register_forward_hook(lambda *call: held.append(call[2])) if reads == POOLED_OUT else None
    with torch.inference_mode():
        for rows in length_batches(lengths := targets.lengths):
            batch = pad(student, [targets.inputs[row] for row in rows], attached.device)
            state = attached.answer(batch)[1]
            if reads == POOLED_OUT:
                found = held.pop()
            elif reads == FIRST_OUT:
                found = state[:, 0]
            elif reads == LAST_OUT:
                last = batch["attention_mask"].sum(1) - 1
                found = state[torch.arange(len(state), device=state.device), last]
            elif targets.kind == "spans":
                found = state[batch["attention_mask"].bool()]
            else:
                found = pooled(state, [targets.spans[row] for row in rows])
            counts = [lengths[row] if targets.kind == "spans" else len(targets.values[row]) for row in rows]
            found = found.float().cpu()
            check_finite(found, f"student {student.name}", (targets.text(row, student) for row in rows), counts)
            read |= dict(zip(rows, torch.split(found, counts), strict=True))
    if hook:
        hook.remove()
    return torch.cat([read[row] for row in sorted(read)]).clone(), stacked(targets.values)


def samples_to_fit(targets: Targets, width: int) -> int:
    """How many samples a head is fitted to: all, but where every token of them is read, as many as are held at ease."""
    if targets.kind != "spans":
        return len(targets)
    tokens = accumulate(targets.lengths)
    return max(1, sum(before * width <= _HELD for before in tokens))


def _pooler(attached: AttachedModel) -> torch.nn.Module:
    pooler = attached.base.pooler
    assert isinstance(pooler, torch.nn.Module)
    return pooler


def fit_head(head: Head, read: Tensor, targets: Tensor) -> tuple[Head, dict[str, float]]:
    """The head that gives the targets best from what it reads: by mean cross entropy, numbers by squared error.

    The weight penalty is the one that suits the last fifth of the answers best when fitted to the others; the head is
    then fitted to all. An inner layer is held near where it starts. A layer without a bias, as decoders have it, stays
    so.

    Args:
        head: where to start (its inner layer) and its form. read, targets: from ``features``.

    Returns:
        The head, and what to report: ``penalty``, and on the last fifth ``divergence`` (nats; of numbers the squared
        error over their variance).
    """
    first = "dense" if head.has_inner_layer else "out"
    # Only a bias can take up what features have in common.
    mean = read.mean(0) if f"{first}.bias" in head.tensors else torch.zeros_like(read[0])
    deviation = (read - mean).square().mean(0).sqrt().clamp_min(1e-6)
    known = (read - mean) / deviation
    goal, cut = _Goal.of(head, targets), max(1, len(targets) * 4 // 5)
    row = goal.rows_before(cut)
    entropy = goal.of_answers(cut).least
    start = _start(head, goal.of_answers(0, cut).common, mean, deviation)
    best, least, nearest = PENALTIES[0], float("inf"), start
    for penalty in (*_OF_NUMBERS, *PENALTIES) if goal.kind == "numbers" else PENALTIES:
        at = _solve(head, known[:row], goal.of_answers(0, cut), penalty, start, nearest)
        found = float(goal.of_answers(cut).loss(_logits(at, known[row:], head))) - entropy
        if not found < least:  # lighter ones fit the other answers closer still, and these worse
            break
        best, least, nearest = penalty, found, at
    fitted = {k: v.double() for k, v in _solve(head, known, goal, best, start, nearest).items()}
    if goal.scale is not None:
        for name, value in [(name, value) for name, value in fitted.items() if name.startswith("out.")]:
            fitted[name] = torch.einsum("o...,o->o...", value, goal.scale.double())
    # Back from standardised features: w (x - mean) / deviation + b.
    weight = fitted[f"{first}.weight"] / deviation.double()
    if f"{first}.bias" in fitted:
        fitted[f"{first}.bias"] = fitted[f"{first}.bias"] - weight @ mean.double()
    fitted[f"{first}.weight"] = weight
    values = {name: fitted[name].to(tensor.values.dtype) for name, tensor in head.tensors.items()}
    return head.with_values(values), {"penalty": best, "divergence": least}


@dataclass(frozen=True)
class _Goal:
    """What the head shall give: probabilities, or numbers, in standard deviations (``scale``).

    ``tokens``: of ``spans``, bool [n, length]: which tokens the samples have, whose features stand one below another.
    """

    kind: Kind
    values: Tensor
    scale: Tensor | None = None
    tokens: Tensor | None = None

    @classmethod
    def of(cls, head: Head, targets: Tensor) -> _Goal:
        kind = kind_of(head)
        if kind != "numbers":
            tokens = targets[:, 0] > NEVER / 2 if kind == "spans" else None
            return cls(kind, targets.exp(), tokens=tokens)
        scale = variance_of(targets).sqrt()
        return cls(kind, targets / scale, scale)

    def of_answers(self, start: int, end: int | None = None) -> _Goal:
        """Of the answers [start, end)."""
        tokens = None if self.tokens is None else self.tokens[start:end]
        return replace(self, values=self.values[start:end], tokens=tokens)

    def rows_before(self, answer: int) -> int:
        """How many rows of features the answers before this one have."""
        return answer if self.tokens is None else int(self.tokens[:answer].sum())

    @property
    def least(self) -> float:
        """The loss of a head that gives just this."""
        return 0.0 if self.kind == "numbers" else float(torch.special.entr(self.values).flatten(1).sum(-1).mean())

    @property
    def common(self) -> Tensor:
        """The logits that are best where all texts are given the same."""
        if self.kind == "spans":
            return torch.zeros(2)  # what all tokens have in common makes none of them likelier
        mean = self.values.mean(0)
        if self.kind == "numbers":
            return mean
        common = mean.log()
        return common[:, 1] - common[:, 0] if common.ndim == 2 else common

    def loss(self, logits: Tensor) -> Tensor:
        """Of logits [rows, outputs]."""
        if self.kind == "numbers":
            return (logits - self.values).square().mean()
        return cross_entropy(self._given(logits), self.values)

    def slope(self, logits: Tensor) -> Tensor:
        """The loss's derivative with respect to the logits."""
        if self.kind == "numbers":
            return 2 * (logits - self.values) / logits.numel()
        error = (self._given(logits).exp() - self.values) / len(self.values)
        if self.tokens is not None:
            return error.transpose(1, 2)[self.tokens]
        return error[..., 1] if error.ndim == 3 else error

    def _given(self, logits: Tensor) -> Tensor:
        """Log-probabilities, as the values are probabilities."""
        if self.tokens is not None:
            laid_out = logits.new_full((*self.tokens.shape, 2), NEVER)
            laid_out[self.tokens] = logits
            logits = laid_out.transpose(1, 2)
        return log_probabilities(logits, self.kind)


def _start(head: Head, common: Tensor, mean: Tensor, deviation: Tensor) -> Values:
    """The inner layer as it is, for standardised features, and an output layer that gives the same to all texts."""
    start = {name: tensor.values.detach().float().cpu() for name, tensor in head.tensors.items()}
    if head.has_inner_layer:
        if "dense.bias" in start:
            start["dense.bias"] = start["dense.bias"] + start["dense.weight"] @ mean
        start["dense.weight"] = start["dense.weight"] * deviation
    start["out.weight"] = torch.zeros_like(start["out.weight"])
    if "out.bias" in start:
        start["out.bias"] = common
    return start


def _solve(head: Head, known: Tensor, goal: _Goal, penalty: float, start: Values, at: Values) -> Values:
    """What has the least loss, sought from ``at`` on by L-BFGS."""
    sizes = [value.numel() for value in start.values()]

    def values_of(flat: np.ndarray) -> Values:
        parts = torch.split_with_sizes(torch.from_numpy(flat).float(), sizes)
        return {name: part.view_as(start[name]) for name, part in zip(start, parts, strict=True)}

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        values = {name: value.requires_grad_() for name, value in values_of(flat).items()}
        logits = _logits(values, known, head)
        with torch.no_grad():
            total, slope = goal.loss(logits), goal.slope(logits)
        slopes = dict(zip(values, torch.autograd.grad(logits, list(values.values()), slope), strict=True))
        with torch.no_grad():
            for name in [name for name in values if name.endswith(".weight")]:
                away = values[name] - start[name]  # an output layer starts at nought
                total = total + penalty * away.square().sum()
                slopes[name] = slopes[name] + 2 * penalty * away
        return float(total), torch.cat([slope.flatten() for slope in slopes.values()]).double().numpy()

    first = torch.cat([value.flatten() for value in at.values()]).double().numpy()
    found = minimize(loss, first, jac=True, method="L-BFGS-B", options={"maxiter": STEPS, "gtol": 1e-7})
    return values_of(found.x)


def _logits(values: Values, known: Tensor, head: Head) -> Tensor:
    if head.has_inner_layer:
        assert head.activation is not None
        known = ACTIVATIONS[head.activation](torch.nn.functional.linear(known, *_layer(values, "dense")))
    return torch.nn.functional.linear(known, *_layer(values, "out"))


def _layer(values: Values, name: str) -> tuple[Tensor, Tensor | None]:
    """Weight and bias."""
    return values[f"{name}.weight"], values.get(f"{name}.bias")
