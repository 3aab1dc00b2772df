"""``transfer --for``: a module moved as a LoRA that a server takes.

DoRA and IA3 change weights by matrices of full rank. What moves is the LoRA nearest to them; where there is text, it
then learns what the teacher says with the module as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from peft_graft.checkpoints.convert import low_rank
from peft_graft.checkpoints.resolve import PeftCheckpoint
from peft_graft.config import Library
from peft_graft.errors import PlanError
from peft_graft.models.loading import ModelHandle
from peft_graft.models.spaces import Site
from peft_graft.models.spec import EMBED_ROLE
from peft_graft.models.tasks import Task
from peft_graft.modules.base import Base, Module
from peft_graft.modules.ia3 import ScaleModule
from peft_graft.modules.lora import EmbeddingLoraPart, LoraModule, LoraPart, lora_tensors
from peft_graft.serving.gguf import check_architecture, without_tensor
from peft_graft.serving.plain import MAX_RANK, Takes, plain_config
from peft_graft.serving.vllm import check_model, without_layer

#: Rank of the LoRA for IA3, and for DoRA of a lower one: what vLLM takes where it is told nothing.
_RANK = 16
#: By target: what refuses a model, and what says why a LoRA has no place at a path of it.
_SERVERS: Mapping[str, tuple[Callable[[ModelHandle, str], None], Callable[[ModelHandle], Takes]]] = {
    "gguf": (check_architecture, lambda base: partial(without_tensor, base)),
    "vllm": (check_model, without_layer),
}


def servable(checkpoint: PeftCheckpoint, teacher: ModelHandle, target: str | None) -> PeftCheckpoint:
    """The module that moves, as a LoRA that the server takes; values count only where the teacher has some.

    Args:
        checkpoint: at the teacher's sites. target: ``gguf`` or ``vllm``; None leaves the module as it is.

    Raises:
        PlanError: no LoRA can stand for a part of it, or it has parts beside.
    """
    if target is None:
        return checkpoint
    where, raw = f"--for {target}", checkpoint.raw
    if raw.task is not Task.CAUSAL_LM:
        raise PlanError("servers take modules of language models alone", where=where, found=raw.task,
                        fix="leave --for out, and export the graft merged")  # fmt: skip
    if checkpoint.head is not None:
        raise PlanError("servers take no trained head", where=where, fix="leave it behind with --head drop")
    for site, module in checkpoint.modules.items():
        _check(site, module, where)
    if all(isinstance(module, LoraModule) and module.is_plain for module in checkpoint.modules.values()):
        return checkpoint
    base = Base(teacher.architecture, teacher.base_tensors())
    modules = {site: _plain(module, base) for site, module in checkpoint.modules.items()}
    lora = replace(raw, library=Library.PEFT, kind="lora", config=plain_config(raw), parts={})
    return replace(checkpoint, raw=lora, modules=modules)


def check_servable(sites: Sequence[Site], student: ModelHandle, target: str | None) -> None:
    """Refuse a student, or places in it, at which the server takes no LoRA.

    Raises:
        PlanError: it takes none.
    """
    if target is None:
        return
    check, takes_of = _SERVERS[target]
    check(student, f"--for {target}")
    takes = takes_of(student)
    base = Base(student.architecture, {}, student.architecture.start(Task.CAUSAL_LM))
    nothing = torch.empty(1, 1)
    for site in sites:
        kind = EmbeddingLoraPart if site.role == EMBED_ROLE else LoraPart
        if why := takes(base.path(site), kind(nothing, nothing, 1.0)):
            raise PlanError(
                f"the server has no place for {why}",
                where=f"--for {target}, {site}",
                fix="choose what moves with --sites",
            )


def servable_note(module: PeftCheckpoint, moved: PeftCheckpoint, teacher: ModelHandle) -> tuple[str, ...]:
    """How much of the module's change of weights is in the LoRA that moves in its place."""
    changed = [
        site for site, lora in moved.modules.items() if lora.tensors.keys() != module.modules[site].tensors.keys()
    ]
    if not changed:
        return ()
    base = Base(teacher.architecture, teacher.base_tensors())
    whole = kept = 0.0
    for site in changed:
        update, lora = _update(module.modules[site], base), moved.modules[site]
        assert isinstance(lora, LoraModule)
        norm = float(update.square().sum())
        whole, kept = whole + norm, kept + norm - float((update - lora.delta()).square().sum())
    rank = max(moved.modules[site].width for site in changed)
    share = kept / max(whole, 1e-30)
    return (f"moved as a LoRA of rank {rank}, which holds {share:.1%} of the module's change of the weights",)


def _check(site: Site, module: Module, where: str) -> None:
    lora = isinstance(module, LoraModule) and module.tensors.keys() <= {"A", "B", "magnitude", "row_norm"}
    if not lora and not isinstance(module, ScaleModule):
        raise PlanError(
            "servers take A and B of linear layers alone, and no LoRA can stand for this",
            where=f"{where}, {site}",
            found=", ".join(sorted(module.tensors)) or type(module).__name__,
            fix="leave --for out, and export the graft merged; or choose what moves with --sites",
        )
    if lora and module.width > MAX_RANK:
        raise PlanError(
            "servers take no LoRA of such a rank", where=f"{where}, {site}", expected=f"{MAX_RANK} at most",
            found=module.width,
        )  # fmt: skip


def _plain(module: Module, base: Base) -> Module:
    """A module as a plain LoRA of fixed rank; without values where the base has none."""
    if isinstance(module, LoraModule) and module.is_plain:
        return module
    rank = max(_RANK, module.width)
    linear = base.architecture.row.linears[module.site.role]
    weight = base.tensor(module.site, "weight")
    assert weight is not None
    if weight.is_meta:
        rows, columns = _weight(module.site, base).shape
        rank = min(rank, rows, columns)
        a, b = torch.zeros(rank, columns), torch.zeros(rows, rank)
    else:
        update = _update(module, base)
        a, b, _ = low_rank(update, min(rank, *update.shape))
        missing = min(rank, *update.shape) - len(a)
        a, b = nn.functional.pad(a, (0, 0, 0, missing)), nn.functional.pad(b, (0, missing))
    return LoraModule(module.site, lora_tensors({"A": a, "B": b}, linear.reads, linear.writes), scaling=1.0)


def _update(module: Module, base: Base) -> Tensor:
    """What a DoRA or IA3 changes in a layer's weight [d_out, d_in], float64."""
    weight = _weight(module.site, base).double().cpu()
    values = {name: value.double().cpu() for name, value in module.values.items()}
    if isinstance(module, ScaleModule):
        factors = values["output"][:, None] if "output" in values else values["input"]
        return weight * (factors - 1)
    assert isinstance(module, LoraModule)
    whole = weight + module.delta().cpu()
    return whole * (values["magnitude"] / values["row_norm"])[:, None] - weight


def _weight(site: Site, base: Base) -> Tensor:
    """The rows of a layer's weight that belong to a site's role, [d_out, d_in]."""
    weight = base.tensor(site, "weight")
    assert weight is not None
    weight = weight.T if base.architecture.transposed else weight
    return weight[base.architecture.units[site.role].to(weight.device)] if base.is_fused(site) else weight
