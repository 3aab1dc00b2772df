"""Any change of weights as the LoRA that servers take: A and B of one rank and one scaling, and nothing beside them.

LoRA with patterns of ranks and alphas, or rank-stabilised, becomes that exactly. DoRA and IA3 change weights by
matrices of full rank: the LoRA has as much of them as the highest rank allows, and how much is said.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from peft_graft.checkpoints.convert import low_rank
from peft_graft.checkpoints.formats.peft.format import config_dict
from peft_graft.checkpoints.raw import RawCheckpoint
from peft_graft.config import ExportConfig, Library
from peft_graft.errors import PlanError
from peft_graft.models.tasks import Task
from peft_graft.modules.base import Part
from peft_graft.modules.embeddings import RowsPart, TokenRowsPart
from peft_graft.modules.ia3 import ScalePart
from peft_graft.modules.lora import EmbeddingLoraPart, LoraPart
from peft_graft.serving.subject import Subject

#: Highest rank where nothing else is said: vLLM's.
MAX_RANK = 512
#: Why a server has no place for a LoRA at a path, None where it has.
Takes = Callable[[str, LoraPart], str | None]


@dataclass(frozen=True)
class PlainLora:
    """A LoRA of ``peft`` of one rank and scaling, and what became of the module.

    ``kept``: share of the squared norm of the module's change of weights.
    """

    raw: RawCheckpoint
    kept: float
    notes: list[str]

    @property
    def parts(self) -> Mapping[str, LoraPart]:
        """The factors by the path of their layer."""
        return {path: part for path, part in self.raw.parts.items() if isinstance(part, LoraPart)}


def check_plain(subject: Subject, takes: Takes, config: ExportConfig, where: str) -> None:
    """Refuse a module that is no change of a decoder's weights, or has more in it than a plain LoRA, from shapes alone.

    Args:
        takes: what the server has a place for. where: the option, for messages.

    Raises:
        PlanError: it is such a module.
    """
    raw = subject.raw
    if raw.task is not Task.CAUSAL_LM:
        raise PlanError(
            "only modules of language models can be had there",
            where=where,
            found=raw.task,
            fix="use --to merged, and serve the merged model",
        )
    if raw.needs_conversion:
        return
    parts = raw.parts
    if not any(isinstance(part, LoraPart | ScalePart) for part in parts.values()):
        raise PlanError(
            "the module changes no linear layer's weights, so no LoRA can stand for it",
            where=where,
            found=raw.kind,
            fix="load it with its own library" if raw.is_virtual else "use --to merged",
        )
    without = _without_place(raw, takes)
    without |= dict.fromkeys(_scaled_biases(subject), "a bias that IA3 multiplies")
    if without and not config.drop:
        path, why = next(iter(without.items()))
        more = f" and {len(without) - 1} more" * (len(without) > 1)
        raise PlanError(
            f"the module has something that cannot be had there: {why} at {path}{more}",
            where=where,
            fix="use --to merged, which holds all of it, or leave it out with --drop, which says what that loses",
        )


def plain_lora(subject: Subject, takes: Takes, config: ExportConfig) -> PlainLora:
    """The module as one plain LoRA; what the server has no place for is left out.

    Args:
        subject: on a loaded base, where the module is no plain LoRA already.

    Raises:
        PlanError: nothing is left.
    """
    raw, most = subject.raw, config.max_rank or MAX_RANK
    left_out = _without_place(raw, takes)
    found: dict[str, LoraPart] = {}
    lost = whole = 0.0
    truncated = 0
    for path, part in raw.parts.items():
        if not isinstance(part, LoraPart | ScalePart) or _why_not(path, part, takes, with_biases=False):
            continue
        a, b, scaling, gone, norm = _factors(subject, path, part, most)
        lost, whole, truncated = lost + gone, whole + norm, truncated + bool(gone)
        if len(a):
            kind = EmbeddingLoraPart if isinstance(part, EmbeddingLoraPart) else LoraPart
            found[path] = kind(a, b, scaling)
    if not found:
        raise PlanError("nothing of the module is left", where="--drop", fix="use --to merged")
    notes = [f"left out: {_summary(left_out)}"] if left_out else []
    notes += [f"left out: the change of {len(biases)} biases"] if (biases := _scaled_biases(subject)) else []
    was = _kind(raw)
    if was != "LoRA" or truncated:
        notes.append(
            f"{was} as a LoRA of rank {max(map(_rank, found.values()))}, which holds "
            f"{1 - lost / max(whole, 1e-30):.4%} of its change of the weights"
        )
    plain = replace(
        raw, library=Library.PEFT, kind="lora", config=plain_config(raw), parts=_uniform(found), head={},
        head_config=None, unconverted={},
    )  # fmt: skip
    return PlainLora(plain, 1 - lost / max(whole, 1e-30), notes)


def _factors(
    subject: Subject, path: str, part: LoraPart | ScalePart, most: int
) -> tuple[Tensor, Tensor, float, float, float]:
    """A, B and scaling of a layer's update, and the squared norms of what is lost of it and of all of it."""
    if isinstance(part, LoraPart) and part.magnitude is None:
        update = part.scaling * part.B.double() @ part.A.double()
        norm = float(update.square().sum())
        if part.rank <= most:
            return part.A.float(), part.B.float(), part.scaling, 0.0, norm
    else:
        weight, bias = _layer(subject, path)
        update = part.merged(weight, bias)[0].double().cpu() - weight.double().cpu()
        norm = float(update.square().sum())
    a, b, lost = low_rank(update, most)
    return a, b, 1.0, lost, norm


def _layer(subject: Subject, path: str) -> tuple[Tensor, Tensor | None]:
    """Weight [d_out, d_in] and bias [d_out] of the base's linear layer at a path of the module."""
    architecture, tensors = subject.base.architecture, subject.base.base_tensors()
    sites = architecture.sites(path)
    own = architecture.path(sites[0][0]) if sites else path.removeprefix(architecture.start(subject.raw.task))
    weight = tensors[f"{own}.weight"]
    return weight.T if architecture.transposed else weight, tensors.get(f"{own}.bias")


def _scaled_biases(subject: Subject) -> list[str]:
    """Layers with a bias that IA3 multiplies together with what they compute."""
    paths = [
        path for path, part in subject.raw.parts.items() if isinstance(part, ScalePart) and part.output is not None
    ]
    return [path for path in paths if (bias := _layer(subject, path)[1]) is not None and (bias.is_meta or bias.any())]


def _without_place(raw: RawCheckpoint, takes: Takes) -> dict[str, str]:
    """What is no part of a plain LoRA, or at no place that the server knows: path -> what it is."""
    found = {path: why for path, part in raw.parts.items() if (why := _why_not(path, part, takes, with_biases=True))}
    return found | dict.fromkeys(raw.head, "a trained head")


def _why_not(path: str, part: Part, takes: Takes, *, with_biases: bool) -> str | None:
    if isinstance(part, TokenRowsPart):
        return "embeddings of single tokens"
    if isinstance(part, RowsPart):
        return "embeddings or an output layer trained whole (modules_to_save)"
    if isinstance(part, ScalePart):
        return takes(path, LoraPart(torch.empty(1, 1), torch.empty(1, 1), 1.0))
    if not isinstance(part, LoraPart):
        return "a trained norm" if "norm" in type(part).__name__.lower() else "a module that is no LoRA"
    if with_biases and (part.bias is not None or part.base_bias is not None):
        return "a trained bias"
    return takes(path, part)


def _uniform(parts: Mapping[str, LoraPart]) -> dict[str, Part]:
    """The same updates with one rank and one scaling: smaller ranks filled with zeros, B scaled."""
    rank, scaling = (
        max(map(_rank, parts.values())),
        Counter(part.scaling for part in parts.values()).most_common(1)[0][0],
    )
    return {path: _as_wide(part, rank, scaling) for path, part in parts.items()}


def _as_wide(part: LoraPart, rank: int, scaling: float) -> LoraPart:
    b = part.B if part.scaling == scaling else (part.B.double() * (part.scaling / scaling)).float()
    missing = rank - part.rank
    pad = torch.nn.functional.pad
    return type(part)(pad(part.A, (0, 0, 0, missing)), pad(b, (0, missing)), scaling)


def plain_config(raw: RawCheckpoint) -> dict[str, Any]:
    """A new configuration; ranks, alphas and targets are filled in as it is written."""
    from peft import LoraConfig

    return config_dict(LoraConfig(task_type="CAUSAL_LM", base_model_name_or_path=raw.base_model))


def _kind(raw: RawCheckpoint) -> str:
    parts = raw.parts.values()
    if any(isinstance(part, ScalePart) for part in parts):
        return "IA3"
    return "DoRA" if any(isinstance(part, LoraPart) and part.magnitude is not None for part in parts) else "LoRA"


def _rank(part: LoraPart) -> int:
    return part.rank


def _summary(left_out: Mapping[str, str]) -> str:
    """What was left out, each sort once."""
    counts: Sequence[tuple[str, int]] = Counter(left_out.values()).most_common()
    return "; ".join(f"{why} ({count})" for why, count in counts)
