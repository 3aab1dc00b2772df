"""Modules of any kind that changes weights, expressed as a LoRA: LoHa, LoKr, VeRA, AdaLoRA, OFT, FourierFT, ..."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peft_graft.checkpoints.attached import quiet
from peft_graft.checkpoints.formats.base import format_of
from peft_graft.checkpoints.formats.peft.format import config_dict
from peft_graft.checkpoints.formats.peft.patterns import Patterns
from peft_graft.checkpoints.raw import RawCheckpoint
from peft_graft.config import Library
from peft_graft.errors import CheckpointError, GraftError, reason
from peft_graft.models.devices import is_quantised
from peft_graft.models.loading import ModelHandle
from peft_graft.models.output import fill_output
from peft_graft.models.sizes import linear_shape
from peft_graft.models.task_models import blank_model, with_task_head
from peft_graft.models.tasks import Task
from peft_graft.modules.base import Part
from peft_graft.modules.lora import LoraPart

if TYPE_CHECKING:
    import peft
    from transformers import PretrainedConfig

#: Share of the squared singular values of every layer's update that the LoRA keeps.
ENERGY = 1 - 1e-6
_START = "base_model.model."
#: Options that search for layers by expressions, beside ``target_modules``.
_SEARCHES = {"exclude_modules", "layers_to_transform", "layers_pattern"}


def as_lora(raw: RawCheckpoint, teacher: ModelHandle) -> RawCheckpoint:
    """The LoRA that changes the teacher's weights as a module of another kind does.

    peft's own ``convert_to_lora`` where the kind supports it; otherwise the difference that merging the module makes to
    every weight, by truncated singular value decomposition. Ranks differ by layer: the smallest that keep ``ENERGY``.

    Args:
        raw: as read, of kind ``weights``. teacher: not touched.

    Raises:
        CheckpointError: peft cannot load the module, or its change of weights cannot be had.
    """
    import peft

    heads, kind = _heads(raw), raw.config["peft_type"]
    labels = tuple(raw.labels or ())
    model = with_task_head(teacher.base, raw.task, labels, len(labels) or raw.num_labels, padding=teacher.padding)
    output = f".{teacher.architecture.row.lm_head}."
    if raw.task is Task.CAUSAL_LM and any(output in f".{key}" for key in raw.unconverted):
        fill_output(model, teacher)  # some kinds multiply what is there
    if not is_quantised(teacher.base):
        model = model.float()
    where = raw.base_model or raw.name
    with quiet():
        try:
            adapted = peft.get_peft_model(model, _config(raw, [name for name, _ in model.named_modules()], where))
            loaded = peft.set_peft_model_state_dict(adapted, dict(raw.unconverted))
            _check_loaded(loaded.unexpected_keys, kind, where)
            adapted.eval()
            if adapted.supports_lora_conversion():
                config, tensors = peft.convert_to_lora(adapted, ENERGY)
                options = {name: getattr(config, name) for name in ("r", "lora_alpha", "rank_pattern", "alpha_pattern")}
            else:
                options, tensors = _by_merging(adapted, kind, where)
        except GraftError:
            raise
        except Exception as error:  # every kind has code of its own in peft, and fails in its own way
            raise CheckpointError(f"peft cannot load the {kind} module ({reason(error)})", where=where) from error
    lora = peft.LoraConfig(
        task_type=raw.config.get("task_type"),
        base_model_name_or_path=raw.base_model,
        target_modules=sorted(_paths(tensors)),
        modules_to_save=raw.config.get("modules_to_save"),
        **options,
    )
    written = {**config_dict(lora), "auto_mapping": raw.config.get("auto_mapping")}
    found = format_of(Library.PEFT).parse(written, tensors | heads)
    return replace(
        found, task=raw.task, labels=raw.labels, problem_type=raw.problem_type, files=raw.files, notes=raw.notes
    )


def _config(raw: RawCheckpoint, modules: Sequence[str], where: str) -> peft.PeftConfig:
    """The module's configuration, made by peft.

    Args:
        modules: paths of all modules of the model.

    Raises:
        ValueError: peft says that modules of the version that wrote it compute something else today.
    """
    import peft

    kind = peft.PEFT_TYPE_TO_CONFIG_MAPPING[raw.config["peft_type"]]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # it only warns of some
        try:
            kind.check_kwargs(**raw.config)
        except UserWarning as warning:
            raise ValueError(str(warning)) from warning
    return peft.PeftConfig.from_peft_type(**_without_patterns(raw, modules, where))


def _check_loaded(unexpected: Sequence[str], kind: str, where: str) -> None:
    """Refuse a module some of whose tensors no layer has taken."""
    if unexpected:
        raise CheckpointError(
            f"{len(unexpected)} tensors of the {kind} module belong to no layer of the model, {unexpected[0]} first",
            where=where,
            fix="name the model that the module was trained on with --teacher",
        )


def _without_patterns(raw: RawCheckpoint, modules: Sequence[str], where: str) -> dict[str, Any]:
    """The configuration with the paths of the layers that have tensors in place of expressions that search for them."""
    found = dict(raw.config)
    layers = _layers(raw, set(modules))
    found |= {"target_modules": layers, **dict.fromkeys(_SEARCHES & found.keys())}
    for name in ("rank_pattern", "alpha_pattern"):
        if found.get(name) and raw.config["peft_type"] != "ADALORA":  # which has masks there, by name
            patterns = Patterns[Any](found[name], where)
            values = {layer: patterns.at(layer, None) for layer in layers}
            found[name] = {re.escape(layer): value for layer, value in values.items() if value is not None}
    return found


def _layers(raw: RawCheckpoint, modules: Collection[str]) -> list[str]:
    """Paths of the modules that have tensors, heads aside."""
    found: dict[str, None] = {}
    for key in raw.unconverted.keys() - _heads(raw).keys():
        path = key.removeprefix(_START)
        while path and path not in modules:
            path = path.rpartition(".")[0]
        if path:
            found[path] = None
    return sorted(found)


def stand_in(raw: RawCheckpoint, teacher: PretrainedConfig) -> RawCheckpoint:
    """A LoRA of rank 1 without values at the layers that the module changes, to plan with before weights are loaded."""
    shapes = {path: linear_shape(module) for path, module in blank_model(teacher, raw.task).named_modules()}
    linear = {path: shape for path, shape in shapes.items() if shape}
    parts: dict[str, Part] = {}
    for path in _layers(raw, linear):
        a, b = (torch.empty(size, device="meta") for size in ((1, linear[path][0]), (linear[path][1], 1)))
        parts[path] = LoraPart(a, b, scaling=1.0)
    head = {key.removeprefix(_START): value for key, value in _heads(raw).items()}
    return replace(raw, kind="lora", parts=parts, head=head, unconverted={})


def low_rank(update: Tensor, most: int | None = None) -> tuple[Tensor, Tensor, float]:
    """The factors of smallest rank that keep ``ENERGY`` of an update of weights.

    Args:
        update: [d_out, d_in]. most: the highest rank, however much is lost by it.

    Returns:
        A [r, d_in] and B [d_out, r], float32 on the CPU, r = 0 for an update of zeros; the squared norm that is lost.
    """
    value = update.double().cpu()
    whole = float(value.square().sum())
    if most is not None and 4 * most < min(value.shape):  # all singular values of a large model's layer take minutes
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, s, transposed = torch.svd_lowrank(value, q=most + 10, niter=4)
        v = transposed.T
    else:
        u, s, v = torch.linalg.svd(value, full_matrices=False)
    energy = s.square().cumsum(0)
    if not whole:
        return v[:0].float(), u[:, :0].float(), 0.0
    rank = min(int((energy < ENERGY * whole).sum()) + 1, most or len(s), len(s))
    return v[:rank].float(), (u[:, :rank] * s[:rank]).float(), max(whole - float(energy[rank - 1]), 0.0)


def _heads(raw: RawCheckpoint) -> dict[str, Tensor]:
    """What was saved beside the module, as its file has it."""
    return {key: value for key, value in raw.unconverted.items() if key.removeprefix(_START) in raw.head}


def _paths(tensors: Mapping[str, Tensor]) -> set[str]:
    return {key.removeprefix(_START).split(".lora_")[0] for key in tensors}


def _by_merging(adapted: Any, kind: str, where: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """LoRA factors of what merging the module changes in every weight."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = {
        path.removeprefix(_START): layer for path, layer in adapted.named_modules() if isinstance(layer, BaseTunerLayer)
    }
    for path, layer in layers.items():
        if linear_shape(layer.get_base_layer()) is None:
            raise CheckpointError(
                f"{kind} changes {path}, which is no linear layer",
                where=where,
                found=type(layer.get_base_layer()).__name__,
                fix="train a LoRA in its place",
            )
    before = {path: layer.get_base_layer().weight.detach().clone() for path, layer in layers.items()}
    biases = {path: layer.get_base_layer().bias for path, layer in layers.items()}
    biases = {path: bias.detach().clone() for path, bias in biases.items() if bias is not None}
    try:
        for layer in layers.values():
            layer.merge(safe_merge=True)
    except (AttributeError, NotImplementedError, ValueError) as error:
        raise CheckpointError(
            f"{kind} modules cannot be merged, so their change of weights cannot be had",
            where=where,
            fix="train a LoRA in its place",
        ) from error
    ranks: dict[str, int] = {}
    tensors: dict[str, Tensor] = {}
    for path, layer in layers.items():
        merged = layer.get_base_layer()
        if path in biases and not torch.equal(merged.bias, biases[path]):
            raise CheckpointError(
                f"{kind} changes the bias of {path}, which no LoRA does", where=where, fix="train a LoRA in its place"
            )
        change = merged.weight.detach().double() - before[path].double()
        a, b, _ = low_rank(change if isinstance(merged, nn.Linear) else change.T)  # transformers' Conv1D
        if not len(a):
            continue
        ranks[path] = len(a)
        tensors[f"{_START}{path}.lora_A.weight"] = a
        tensors[f"{_START}{path}.lora_B.weight"] = b
    if not ranks:
        raise CheckpointError(
            f"the {kind} module changes no linear layer", where=where, fix="check that it was trained at all"
        )
    most = max(ranks.values())
    patterns = {path: rank for path, rank in ranks.items() if rank != most}
    return {"r": most, "lora_alpha": most, "rank_pattern": patterns, "alpha_pattern": dict(patterns)}, tensors
