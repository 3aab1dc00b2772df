"""Fitting a head to the teacher's predictions instead of its weights.

A head mapped weight by weight inherits every error of the map and of the moved modules. Fitting it to what the teacher
says about a text, through the student's own features, is a small convex problem (logistic regression on soft
targets; with an inner layer it is convex no more, and starts from the mapped layer), and uses no label.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from peft_graft.alignment.activations import pad
from peft_graft.checkpoints.attached import AttachedModel
from peft_graft.distill.finite import check_finite
from peft_graft.distill.targets import Targets, cross_entropy, kind_of, log_probabilities, pooled
from peft_graft.distill.training import length_batches
from peft_graft.models.loading import ModelHandle
from peft_graft.models.spaces import FIRST_OUT, LAST_OUT, POOLED_OUT
from peft_graft.modules.head import ACTIVATIONS, Head

#: Weight penalties to choose from, on standardised features, the heaviest first.
PENALTIES = (1e-2, 1e-3, 1e-4)
STEPS = 60
Values = dict[str, Tensor]


def features(attached: AttachedModel, student: ModelHandle, targets: Targets, reads: str) -> tuple[Tensor, Tensor]:
    """What the head reads at every answer, [n, d] float32, and the answers' targets [n, classes], or [n, labels, 2].

    Raises:
        NotFiniteError: some of it is not finite.
    """
    read: list[Tensor] = []
    wanted: list[Tensor] = []
    attached.model.eval()
    held: list[Tensor] = []
    hook = _pooler(attached).register_forward_hook(lambda *call: held.append(call[2])) if reads == POOLED_OUT else None
    with torch.inference_mode():
        for rows in length_batches(targets.lengths):
            batch = pad(student, [targets.inputs[row] for row in rows], attached.device)
            state, first = attached.forward(batch)[1], len(read)
            if reads == POOLED_OUT:
                read.append(held.pop().float().cpu())
            elif reads == FIRST_OUT:
                read.append(state[:, 0].float().cpu())
            elif reads == LAST_OUT:
                last = batch["attention_mask"].sum(1) - 1
                read.append(state[torch.arange(len(state), device=state.device), last].float().cpu())
            else:
                read.append(pooled(state, [targets.spans[row] for row in rows]).float().cpu())
            wanted.extend(targets.values[row] for row in rows)
            counts = [len(targets.values[row]) for row in rows]
            check_finite(
                torch.cat(read[first:]),
                f"student {student.name}",
                (targets.text(row, student) for row in rows),
                counts,
            )
    if hook:
        hook.remove()
    return torch.cat(read).clone(), torch.cat(wanted)


def _pooler(attached: AttachedModel) -> torch.nn.Module:
    pooler = attached.base.pooler
    assert isinstance(pooler, torch.nn.Module)
    return pooler


def fit_head(head: Head, read: Tensor, targets: Tensor) -> tuple[Head, dict[str, float]]:
    """The head that gives the targets best from what it reads, by mean cross entropy.

    The weight penalty is the one that suits the last fifth of the rows best when fitted to the others; the head is then
    fitted to all. An inner layer is held near where it starts.

    Args:
        head: where to start (its inner layer) and its form. read [n, d], targets [n, classes] log-probabilities, or
            [n, labels, 2] (``targets.Targets``).

    Returns:
        The head, and what to report: ``penalty``, and ``divergence`` (nats) on the last fifth.
    """
    mean, deviation = read.mean(0), read.std(0).clamp_min(1e-6)
    known = (read - mean) / deviation
    cut = max(1, len(read) * 4 // 5)
    probabilities = targets.exp()
    entropy = float(cross_entropy(targets[cut:], probabilities[cut:]))
    start = _start(head, probabilities[:cut], mean, deviation)
    best, least, nearest = PENALTIES[0], float("inf"), start
    for penalty in PENALTIES:
        at = _solve(head, known[:cut], probabilities[:cut], penalty, start, nearest)
        found = float(_cross_entropy(_logits(at, known[cut:], head), probabilities[cut:], head)) - entropy
        if not found < least:  # lighter ones fit the other rows closer still, and these worse
            break
        best, least, nearest = penalty, found, at
    fitted = {k: v.double() for k, v in _solve(head, known, probabilities, best, start, nearest).items()}
    # Back from standardised features: w (x - mean) / deviation + b.
    first = "dense" if head.has_inner_layer else "out"
    weight = fitted[f"{first}.weight"] / deviation.double()
    fitted[f"{first}.bias"] = fitted[f"{first}.bias"] - weight @ mean.double()
    fitted[f"{first}.weight"] = weight
    values = {name: fitted[name].to(tensor.values.dtype) for name, tensor in head.tensors.items()}
    return head.with_values(values), {"penalty": best, "divergence": least}


def _start(head: Head, probabilities: Tensor, mean: Tensor, deviation: Tensor) -> Values:
    """The inner layer as it is, for standardised features, and an output layer that gives the mean answer."""
    start = {name: tensor.values.detach().float().cpu() for name, tensor in head.tensors.items()}
    for layer in ("dense", "out") if head.has_inner_layer else ("out",):
        start.setdefault(f"{layer}.bias", torch.zeros(len(start[f"{layer}.weight"])))
    if head.has_inner_layer:
        start["dense.bias"] = start["dense.bias"] + start["dense.weight"] @ mean
        start["dense.weight"] = start["dense.weight"] * deviation
    common = probabilities.mean(0).log()
    common = common[:, 1] - common[:, 0] if common.ndim == 2 else common
    start["out.weight"], start["out.bias"] = torch.zeros_like(start["out.weight"]), common
    return start


def _solve(head: Head, known: Tensor, probabilities: Tensor, penalty: float, start: Values, at: Values) -> Values:
    """What has the least loss, sought from ``at`` on by L-BFGS."""
    sizes = [value.numel() for value in start.values()]

    def values_of(flat: np.ndarray) -> Values:
        parts = torch.split_with_sizes(torch.from_numpy(flat).float(), sizes)
        return {name: part.view_as(start[name]) for name, part in zip(start, parts, strict=True)}

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        values = {name: value.requires_grad_() for name, value in values_of(flat).items()}
        logits = _logits(values, known, head)
        with torch.no_grad():
            given = log_probabilities(logits, kind_of(head))
            total = cross_entropy(given, probabilities)
            error = (given.exp() - probabilities) / len(known)
            error = error[..., 1] if error.ndim == 3 else error
        slopes = dict(zip(values, torch.autograd.grad(logits, list(values.values()), error), strict=True))
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
        known = ACTIVATIONS[head.activation](known @ values["dense.weight"].T + values["dense.bias"])
    return known @ values["out.weight"].T + values["out.bias"]


def _cross_entropy(logits: Tensor, probabilities: Tensor, head: Head) -> Tensor:
    return cross_entropy(log_probabilities(logits, kind_of(head)), probabilities)
