"""From the entries of a checkpoint to modules at the sites of a model, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from peft_graft.checkpoints.formats import adapterhub
from peft_graft.checkpoints.raw import PREFIX, PROMPT, VIRTUAL, RawCheckpoint, has_rows
from peft_graft.errors import CheckpointError, ModelError, PlanError
from peft_graft.models.architecture import Architecture
from peft_graft.models.norms import SPACE_OF_NORM
from peft_graft.models.spaces import EMBEDDED, TOKENS_OUT, VOCABULARY, Site, Space
from peft_graft.models.spec import EMBED_ROLE, INVERTIBLE_ROLE, LM_HEAD_ROLE, PREFIX_ROLE, PROMPT_ROLE, VOCABULARY_ROLES
from peft_graft.modules.base import (
    Axis,
    BottleneckModule,
    LabelledTensor,
    LoraModule,
    Module,
    NormModule,
    PromptModule,
    ScaleModule,
    bottleneck_tensors,
    lora_tensors,
    settled,
)
from peft_graft.modules.invertible import coupling
from peft_graft.modules.vocabulary import RowsModule, rows_module, settled_rows


def modules_of(
    raw: RawCheckpoint, path: str, values: Mapping[str, Tensor], architecture: Architecture, base: Mapping[str, Tensor]
) -> tuple[list[Module], str]:
    """The modules of one entry, several where a fused layer holds several roles, and what stands before its path.

    Args:
        base: the base model's tensors by path, for values that are relative to them; may be on the meta device.

    Raises:
        CheckpointError: the path is no site of this architecture.
        ModelError: a shape shows that the module was trained on another model.
    """
    if raw.kind in VIRTUAL:
        return [_virtual_tokens(raw, path, values, architecture)], ""
    place = architecture.sites(path)
    if place is None:
        raise CheckpointError(
            f"{path} is no site of a {architecture.model_type} model",
            where=raw.base_model or raw.name,
            expected=f"a layer inside {' or '.join(stack.layers for stack in architecture.row.stacks)}",
            fix="give the module's true base with --teacher; layers outside the stack are not supported yet",
        )
    sites, prefix = place
    if sites[0].layer >= 0 and sites[0].layer >= architecture.depth(sites[0].role):
        raise ModelError(
            "the teacher is not the base of this module: it has no such layer",
            where=str(sites[0]),
            expected=f"a layer below {architecture.depth(sites[0].role)}",
            found=sites[0].layer,
            fix="name the model that the module was trained on with --teacher",
        )
    if raw.kind == "lora" and sites[0].role in VOCABULARY_ROLES:
        return [_of_vocabulary(raw, sites[0], path, values, architecture, base)], prefix
    if raw.kind in ("lora", "ia3"):
        return [_at_linear(raw, site, path, values, architecture, base) for site in sites], prefix
    if raw.kind == "norms":
        return [_norm(site, values, architecture, base) for site in sites], prefix
    if sites[0].role == INVERTIBLE_ROLE:
        return [coupling(sites[0], values, architecture.size(Space(-1, EMBEDDED)))], prefix
    return [_bottleneck(raw, site, values, architecture) for site in sites], prefix


def _virtual_tokens(
    raw: RawCheckpoint, path: str, values: Mapping[str, Tensor], architecture: Architecture
) -> PromptModule:
    if raw.kind == "prompt" and Space(-1, EMBEDDED) in architecture.sizes:
        words = LabelledTensor(values["embeddings"], (None, Axis("write", EMBEDDED)))
        return PromptModule(Site(-1, PROMPT_ROLE), {"embeddings": words})
    if raw.kind == "prompt" or len(architecture.row.stacks) > 1:
        raise CheckpointError(
            f"a {'prompt' if raw.kind == 'prompt' else 'prefix'} of such a model cannot be moved",
            where=architecture.model_type,
            fix="move a LoRA",
        )
    site = Site(int(path.removeprefix(PREFIX)), PREFIX_ROLE)
    expected = architecture.sizes.get(Space(site.layer, "attn.key.out"))
    if values["key"].shape[1] != expected:
        raise CheckpointError(
            "the prefix has another size than this model's keys: it belongs to another model, or to one that keeps a "
            "copy of its keys for every query head",
            where=str(site),
            expected=expected,
            found=values["key"].shape[1],
        )
    tensors = {name: LabelledTensor(value, (None, Axis("write", f"attn.{name}.out"))) for name, value in values.items()}
    return PromptModule(site, tensors)


def _at_linear(
    raw: RawCheckpoint, site: Site, path: str, values: Mapping[str, Tensor], architecture: Architecture,
    base: Mapping[str, Tensor],
) -> Module:  # fmt: skip
    """A LoRA or IA3's factors at a linear layer, or at the part of one that a role has in it."""
    linear = architecture.row.linears.get(site.role)
    if linear is None:
        raise CheckpointError(f"{path} is no linear layer", where=str(site))
    parts = {
        name: value if name in ("A", "input") else _part(raw, value, site, path, name, architecture)
        for name, value in values.items()
    }
    if raw.kind == "lora":
        parts.update(_base_parts(parts, site, architecture, base, raw.scalings[path]))
        return LoraModule(site, lora_tensors(parts, linear.reads, linear.writes), scaling=raw.scalings[path])
    spaces = {"input": linear.reads, "output": linear.writes}
    return ScaleModule(
        site, {name: LabelledTensor(value, (Axis("scale", spaces[name]),)) for name, value in parts.items()}
    )


def _of_vocabulary(
    raw: RawCheckpoint, site: Site, path: str, values: Mapping[str, Tensor], architecture: Architecture,
    base: Mapping[str, Tensor],
) -> Module:  # fmt: skip
    """Trained rows of word embeddings or of an output layer, or a LoRA there."""
    scale = _vocabulary_scale(site, architecture)
    if has_rows(values):
        return replace(rows_module(site, values, base.get(f"{architecture.path(site)}.weight")), scale=scale)
    parts = {name.removeprefix("embedding_"): value for name, value in values.items()}
    if parts.keys() != {"A", "B"}:
        raise CheckpointError(
            f"a LoRA of a vocabulary with {', '.join(sorted(parts.keys() - {'A', 'B'}))} cannot be moved yet",
            where=path,
            fix="train it without DoRA and biases there",
        )
    size = parts["A"].shape[1] if site.role == EMBED_ROLE else parts["B"].shape[0]
    if size != architecture.size(Space(-1, VOCABULARY)):
        raise CheckpointError(
            "a LoRA of a vocabulary that was resized cannot be moved: what it adds to is not in the base model",
            where=path,
            expected=f"{architecture.size(Space(-1, VOCABULARY))} tokens",
            found=size,
            fix="train the added tokens with modules_to_save or trainable_token_indices",
        )
    reads, writes = (VOCABULARY, EMBEDDED) if site.role == EMBED_ROLE else (TOKENS_OUT, VOCABULARY)
    return LoraModule(site, lora_tensors(parts, reads, writes), scaling=raw.scalings[path] * scale)


def _vocabulary_scale(site: Site, architecture: Architecture) -> float:
    """What the model multiplies the rows of this place by before it uses them."""
    return architecture.embed_scale if site.role == EMBED_ROLE else 1.0


def _part(raw: RawCheckpoint, value: Tensor, site: Site, path: str, name: str, architecture: Architecture) -> Tensor:
    """The rows that belong to the site's role, where its layer holds several."""
    if not architecture.row.linears[site.role].fused:
        return value
    if raw.format == "adapterhub":
        raise CheckpointError(
            "AdapterHub's module on a fused layer holds some of its projections only, which cannot be moved yet",
            where=path,
            fix="train the module with peft",
        )
    if len(value) != architecture.fused_size(site.role):
        raise ModelError(
            f"the teacher is not the base of this module: {name} has shape {list(value.shape)}",
            where=path,
            expected=f"{architecture.fused_size(site.role)} rows",
            found=len(value),
            fix="name the model that the module was trained on with --teacher",
        )
    return value[architecture.units[site.role]]


def _base_parts(
    values: Mapping[str, Tensor], site: Site, architecture: Architecture, base: Mapping[str, Tensor], scaling: float
) -> dict[str, Tensor]:
    """What the base model has where a LoRA's values are relative to it: ``row_norm`` and ``base_bias_was``."""
    found: dict[str, Tensor] = {}
    linear = architecture.row.linears[site.role]
    path = architecture.path(site)
    units = architecture.units[site.role] if linear.fused else None
    if "magnitude" in values:
        weight = base.get(f"{path}.weight")
        if weight is None or weight.is_meta:
            found["row_norm"] = torch.ones_like(values["magnitude"])
        else:
            weight = weight.T if architecture.transposed else weight
            weight = weight if units is None else weight[units.to(weight.device)]
            whole = weight.double().cpu() + scaling * values["B"].double().cpu() @ values["A"].double().cpu()
            found["row_norm"] = whole.norm(dim=1).to(values["magnitude"])
    if "base_bias" in values:
        bias = base.get(f"{path}.bias")
        if bias is None:
            raise PlanError(
                "the module trains a bias that this model's layer does not have",
                where=f"{architecture.model_type} {site}",
                fix="train the module with bias='none'",
            )
        found["base_bias_was"] = _like(bias if units is None else bias[units.to(bias.device)], values["base_bias"])
    return found


def _norm(
    site: Site, values: Mapping[str, Tensor], architecture: Architecture, base: Mapping[str, Tensor]
) -> NormModule:
    stack = architecture.row.stack(site.role)
    space = stack.full(SPACE_OF_NORM[stack.local(site.role) or ""])
    found = dict(values) | _norm_base(site, values, architecture, base)
    axes = {"norm.weight": Axis("scale", space), "norm.bias": Axis("write", space)}
    return NormModule(
        site, {name: LabelledTensor(value, (axes[name.removesuffix("_was")],)) for name, value in found.items()}
    )


def _norm_base(
    site: Site, values: Mapping[str, Tensor], architecture: Architecture, base: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    path, found = architecture.path(site), {}
    for name in ("norm.weight", "norm.bias"):
        if name not in values:
            continue
        own = base.get(f"{path}.{name.removeprefix('norm.')}")
        if own is None:
            raise PlanError(
                f"the module trains a norm's {name.removeprefix('norm.')} that this model does not have",
                where=f"{architecture.model_type} {site}",
                fix="choose a student whose norms are of the same kind, or move a LoRA",
            )
        found[f"{name}_was"] = _like(own, values[name])
    return found


def _like(own: Tensor, value: Tensor) -> Tensor:
    """A part of the base in the device and dtype of what replaces it; empty where only its shape is known."""
    return torch.empty_like(own, dtype=value.dtype) if own.is_meta else own.to(value)


def _bottleneck(
    raw: RawCheckpoint, site: Site, values: Mapping[str, Tensor], architecture: Architecture
) -> BottleneckModule:
    settings = adapterhub.module_config(raw.config)
    point = architecture.row.adapters[site.role]
    if settings.get("is_parallel"):
        space = point.parallel
    else:
        space = point.after_norm if settings.get("original_ln_before") else point.before_norm
    return BottleneckModule(site, bottleneck_tensors(values, space))


# ---- and back --------------------------------------------------------------------------------------------------------


def entries_of(
    modules: Mapping[Site, Module], architecture: Architecture, start: str, base: Mapping[str, Tensor]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, float]]:
    """Entries and scalings of modules at a model's sites: the reverse of ``modules_of``.

    Args:
        start: what stands before paths of the base model (``bert.``). base: the model's tensors by path.
    """
    entries: dict[str, dict[str, Tensor]] = {}
    scalings: dict[str, float] = {}
    together: dict[str, dict[str, Module]] = {}
    for site, module in modules.items():
        if isinstance(module, PromptModule):
            path = PROMPT if site.layer < 0 else f"{PREFIX}{site.layer}"
            entries[path] = {name: tensor.values for name, tensor in module.tensors.items()}
            continue
        path = architecture.path(site) if site.role == LM_HEAD_ROLE else start + architecture.path(site)
        if site.role in VOCABULARY_ROLES:
            entries[path] = _entry_of_vocabulary(module, architecture, base)
            if isinstance(module, LoraModule):
                scalings[path] = module.scaling / _vocabulary_scale(site, architecture)
            continue
        together.setdefault(path, {})[site.role] = _settled(module, architecture, base)
    for path, parts in together.items():
        role, module = next(iter(parts.items()))
        linear = architecture.row.linears.get(role)
        if linear and linear.fused and isinstance(module, LoraModule):
            entries[path], scalings[path] = _fused(parts, architecture)
        elif linear and linear.fused:
            entries[path] = _fused_scales(path, parts, architecture)
        else:
            entries[path] = {
                name: tensor.values
                for name, tensor in module.tensors.items()
                if name != "row_norm" and not name.endswith("_was")
            }
            if isinstance(module, LoraModule):
                scalings[path] = module.scaling
    return entries, scalings


def _entry_of_vocabulary(module: Module, architecture: Architecture, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if isinstance(module, RowsModule):
        own = base.get(f"{architecture.path(module.site)}.weight")
        if own is None:
            raise PlanError(
                "trained rows need the model's own beside them", where=str(module.site), fix="give the whole model"
            )
        return settled_rows(module, own, _vocabulary_scale(module.site, architecture))
    before = "embedding_" if module.site.role == EMBED_ROLE else ""
    return {f"{before}{name}": tensor.values for name, tensor in module.tensors.items()}


def _settled(module: Module, architecture: Architecture, base: Mapping[str, Tensor]) -> Module:
    values = {name: tensor.values for name, tensor in module.tensors.items()}
    if isinstance(module, LoraModule):
        return settled(module, _base_parts(values, module.site, architecture, base, module.scaling))
    if isinstance(module, NormModule):
        return settled(module, _norm_base(module.site, values, architecture, base))
    return module


def _fused(parts: Mapping[str, Module], architecture: Architecture) -> tuple[dict[str, Tensor], float]:
    """One LoRA for a fused linear layer from those of its projections, and its scaling.

    Projections that read through one A share it; otherwise the ranks add up: [A_q; A_v] and B in blocks.
    """
    first = next(iter(parts.values()))
    assert isinstance(first, LoraModule)
    factors: list[tuple[Tensor, dict[str, Tensor]]] = []
    for role, module in parts.items():
        assert isinstance(module, LoraModule)
        same = module.rescaled(first.scaling)
        factors.append((architecture.units[role], {name: tensor.values for name, tensor in same.tensors.items()}))
    shared: list[Tensor] = []
    for _, values in factors:
        if not any(torch.equal(values["A"], other) for other in shared):
            shared.append(values["A"])
    starts = [sum(len(a) for a in shared[:index]) for index in range(len(shared))]
    size = architecture.fused_size(next(iter(parts)))
    dtype = factors[0][1]["B"].dtype
    whole = {"B": torch.zeros(size, sum(map(len, shared)), dtype=dtype)}
    for name in ("bias", "magnitude", "base_bias"):
        if name in first.tensors:
            whole[name] = torch.zeros(size, dtype=dtype)
    for units, values in factors:
        start = starts[next(index for index, other in enumerate(shared) if torch.equal(values["A"], other))]
        whole["B"][units, start : start + len(values["A"])] = values["B"].to(dtype).cpu()
        for name in whole.keys() - {"B"}:
            whole[name][units] = values[name].to(dtype).cpu()
    return {"A": torch.cat(shared), **whole}, first.scaling


def _fused_scales(path: str, parts: Mapping[str, Module], architecture: Architecture) -> dict[str, Tensor]:
    first = next(iter(parts.values()))
    if "input" in first.tensors:
        inputs = [module.tensors["input"].values for module in parts.values()]
        if not all(torch.equal(inputs[0], other) for other in inputs):
            raise PlanError("projections of one layer cannot scale their common input differently", where=path)
        return {"input": inputs[0]}
    whole = torch.ones(architecture.fused_size(next(iter(parts))), dtype=first.tensors["output"].values.dtype)
    for role, module in parts.items():
        whole[architecture.units[role]] = module.tensors["output"].values.cpu()
    return {"output": whole}
