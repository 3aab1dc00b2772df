"""AdapterHub's checkpoints (library ``adapters``): bottleneck adapters, LoRA, IA3 and prefixes, with heads."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from peft_graft.checkpoints.formats import adapterhub_prefix, compacter
from peft_graft.checkpoints.raw import Kind, RawCheckpoint
from peft_graft.checkpoints.student_names import StudentNames
from peft_graft.errors import CheckpointError, DependencyError
from peft_graft.files import file_hashes, read_json, read_tensors, write_json, write_tensors
from peft_graft.models.tasks import Task

CONFIG = "adapter_config.json"
HEAD_CONFIG = "head_config.json"
_WEIGHTS = {".safetensors": "adapter.safetensors", ".bin": "pytorch_adapter.bin"}
_HEAD_WEIGHTS = {".safetensors": "model_head.safetensors", ".bin": "pytorch_model_head.bin"}

#: Kinds by what the settings call the architecture; a LoRA that scales is an IA3.
_KINDS: Mapping[str | None, Kind] = {None: "bottleneck", "lora": "lora", "prefix_tuning": "prefix"}
#: Settings of all kinds under which the weights mean something else.
_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "inv_adapter": (None, "nice"),  # the library's "glow" cannot be run on text
    "use_dora": (False, None),
    "vera_d": (None,),
    "vera_b": (None,),
    "stochastic_depth": (0, 0.0, None),
}
#: Of bottleneck adapters a gate is a part that is moved.
_UNSUPPORTED_ELSEWHERE: Mapping[str, tuple[Any, ...]] = {
    "composition_mode": ("add", "scale"),
    "use_gating": (False, None),
}
#: Where the library keeps the part that works on the embeddings.
_INVERTIBLE = "invertible_adapters"
_NEEDED: Mapping[str, set[str]] = {
    "bottleneck": {"down.weight", "down.bias", "up.weight", "up.bias"},
    "lora": {"A", "B"},
    "ia3": {"output"},
}


def detect(folder: Path) -> bool:
    """Whether a folder holds an AdapterHub checkpoint of any kind."""
    if not (folder / CONFIG).is_file():
        return False
    config = read_json(folder / CONFIG)
    return "peft_type" not in config and "config" in config and "model_type" in config


def module_config(config: Mapping[str, Any], where: str = CONFIG) -> dict[str, Any]:
    """The adapter's own settings; identifiers such as ``seq_bn`` are looked up in the library.

    Raises:
        DependencyError: the file names an identifier and ``adapters`` is not installed.
        CheckpointError: the settings are neither an identifier nor a mapping.
    """
    settings = config["config"]
    if isinstance(settings, str):
        try:
            from adapters import AdapterConfig
        except ImportError as error:
            raise DependencyError(
                f"the adapter's configuration is the identifier {settings!r}, which only the library adapters knows",
                where=where,
                fix="pip install 'peft-graft[adapters]'",
            ) from error
        settings = AdapterConfig.load(settings).to_dict()
    if not isinstance(settings, Mapping):
        raise CheckpointError("the adapter's settings are missing", where=where, found=repr(settings))
    return dict(settings)


def read(folder: Path) -> RawCheckpoint:
    """Read a bottleneck, LoRA, IA3 or prefix checkpoint and the head beside it.

    Raises:
        CheckpointError: another kind of module, a setting that is not supported, missing or damaged weights.
    """
    config = read_json(folder / CONFIG)
    settings = module_config(config, str(folder / CONFIG))
    kind = _kind(settings, folder)
    weights, suffix = _find(folder, _WEIGHTS)
    if weights is None:
        raise CheckpointError("the weights file is missing", where=str(folder), expected=" or ".join(_WEIGHTS.values()))
    name = str(config.get("name") or "default")
    tensors = read_tensors(weights)
    if settings.get("phm_layer"):
        tensors, settings = compacter.written_out(tensors, settings, name, str(weights))
        config = {**config, "config": settings}
    if kind == "prefix":
        entries = adapterhub_prefix.entries(tensors, settings, name, int(config.get("hidden_size") or 0), str(weights))
    else:
        entries = _entries(tensors, kind, name, bool(settings.get("ln_before")), str(weights))
    if kind == "ia3":  # y *= alpha * lora_B
        entries = {path: {"output": values["output"].flatten() * settings["alpha"]} for path, values in entries.items()}
    head_weights, _ = _find(folder, _HEAD_WEIGHTS)
    head_config = read_json(folder / HEAD_CONFIG) if (folder / HEAD_CONFIG).is_file() else None
    return RawCheckpoint(
        format="adapterhub",
        kind=kind,
        name=name,
        base_model=config.get("model_name") or None,
        task=Task.of_class(str(config.get("model_class") or "")),
        config=config,
        entries=entries,
        scalings=dict.fromkeys(entries, settings["alpha"] / settings["r"]) if kind == "lora" else {},
        head=_head(read_tensors(head_weights)) if head_weights and head_config else {},
        head_config=head_config,
        labels=_labels(head_config),
        files=file_hashes(folder),
        weights_suffix=suffix,
    )


def write(folder: Path, raw: RawCheckpoint, student: StudentNames) -> None:
    """Write a checkpoint for the student in the file type of the original (the library's default loader reads .bin).

    Raises:
        CheckpointError: the library cannot express the module, such as LoRA with ranks that differ by layer.
    """
    write_json(folder / CONFIG, {**raw.config, **_model_fields(raw, student), "config": _settings(raw, student)})
    write_tensors(folder / _WEIGHTS[raw.weights_suffix], _tensors(raw, student))
    if raw.head and raw.head_config:
        write_json(folder / HEAD_CONFIG, {**raw.head_config, **_model_fields(raw, student)})
        write_tensors(folder / _HEAD_WEIGHTS[raw.weights_suffix], _head_tensors(raw))


def _tensors(raw: RawCheckpoint, student: StudentNames) -> dict[str, Tensor]:
    """The module's tensors by their keys in the file."""
    if raw.kind == "prefix":
        return adapterhub_prefix.tensors(raw, student)
    entries = raw.entries
    if raw.kind == "ia3":
        alpha = module_config(raw.config)["alpha"]
        entries = {path: {"output": values["output"][:, None] / alpha} for path, values in entries.items()}
    return {
        key: tensor
        for path, values in entries.items()
        for name, tensor in values.items()
        for key in _keys(raw, path, name)
    }


def tensors_in_model(raw: RawCheckpoint, student: StudentNames) -> dict[str, Tensor]:
    """All tensors of a checkpoint, module and head, by their keys in its files, which are those of the model."""
    return _tensors(raw, student) | (_head_tensors(raw) if raw.head_config else {})


def _head_tensors(raw: RawCheckpoint) -> dict[str, Tensor]:
    name = (raw.head_config or {}).get("name")
    return {re.sub(r"^layers\.", f"heads.{name}.", key): tensor for key, tensor in raw.head.items()}


def _kind(settings: Mapping[str, Any], folder: Path) -> Kind:
    architecture = settings.get("architecture")
    if architecture not in _KINDS:
        raise CheckpointError(
            f"AdapterHub modules of architecture {architecture!r} are not supported yet",
            where=str(folder),
            expected="a bottleneck adapter, LoRA, IA3 or a prefix",
        )
    kind = _KINDS[architecture]
    if kind == "lora" and settings.get("composition_mode") == "scale":
        kind = "ia3"
    for option, harmless in {**_UNSUPPORTED, **({} if kind == "bottleneck" else _UNSUPPORTED_ELSEWHERE)}.items():
        if option in settings and settings[option] not in harmless:
            raise CheckpointError(
                f"{kind} modules with {option}={settings[option]!r} are not supported yet", where=str(folder)
            )
    return kind


def _find(folder: Path, names: Mapping[str, str]) -> tuple[Path | None, str]:
    for suffix, name in names.items():
        if (folder / name).is_file():
            return folder / name, suffix
    return None, ""


def _entries(
    tensors: Mapping[str, Tensor], kind: Kind, adapter: str, ln_before: bool, where: str
) -> dict[str, dict[str, Tensor]]:
    container = "adapters" if kind == "bottleneck" else "loras"
    entries: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        inner = re.fullmatch(rf"((?:.+\.)?{_INVERTIBLE})\.{re.escape(adapter)}\.(.+)", key)
        if inner is not None:
            entries.setdefault(inner[1], {})[inner[2]] = tensor
            continue
        match = re.fullmatch(rf"(.+)\.{container}\.{re.escape(adapter)}\.(.+)", key)
        if match is None:
            raise CheckpointError(
                f"tensor {key} belongs to no {kind} module named {adapter!r}",
                where=where,
                fix="modules made of several parts are not supported yet",
            )
        path = f"{match[1]}.adapters" if kind == "bottleneck" else match[1]
        name = _parameter(match[2], kind, ln_before)
        if name is None:
            raise CheckpointError(f"tensor {key} is not a known part of a {kind} module", where=where)
        entries.setdefault(path, {})[name] = tensor
    needed = _NEEDED[kind]
    if not entries:
        raise CheckpointError(f"the file holds no {kind} weights", where=where)
    for path, values in entries.items():
        if not _is_invertible(path) and not needed <= values.keys():
            raise CheckpointError(f"{path} lacks {', '.join(sorted(needed - values.keys()))}", where=where)
    return entries


def _is_invertible(path: str) -> bool:
    return path.rpartition(".")[2] == _INVERTIBLE


def _parameter(name: str, kind: Kind, ln_before: bool) -> str | None:
    if kind == "lora":
        return {"lora_A": "A", "lora_B": "B"}.get(name)
    if kind == "ia3":
        return {"lora_B": "output"}.get(name)
    # With ln_before the norm is also the first member of the sequence adapter_down; the linear layer comes second.
    down = "adapter_down.1" if ln_before else "adapter_down.0"
    known = {f"{down}.weight": "down.weight", f"{down}.bias": "down.bias"}
    if ln_before:
        known |= {"adapter_down.0.weight": "norm_before.weight", "adapter_down.0.bias": "norm_before.bias"}
    known |= {f"adapter_up.{part}": f"up.{part}" for part in ("weight", "bias")}
    known |= {
        f"adapter_norm_{side}.{part}": f"norm_{side}.{part}"
        for side in ("before", "after")
        for part in ("weight", "bias")
    }
    known |= {"gate.weight": "gate.weight", "gate.bias": "gate.bias", "scaling": "scaling"}
    return known.get(name)


def _keys(raw: RawCheckpoint, path: str, name: str) -> list[str]:
    if raw.kind == "lora":
        return [f"{path}.loras.{raw.name}.lora_{name}"]
    if raw.kind == "ia3":
        return [f"{path}.loras.{raw.name}.lora_B"]
    if _is_invertible(path):
        return [f"{path}.{raw.name}.{name}"]
    ln_before = bool(module_config(raw.config).get("ln_before"))
    start = f"{path}.{raw.name}."
    part = name.rpartition(".")[2]
    if name.startswith("down."):
        return [f"{start}adapter_down.{int(ln_before)}.{part}"]
    if name.startswith("norm_before."):
        return [f"{start}adapter_norm_before.{part}", f"{start}adapter_down.0.{part}"]
    if name.startswith(("up.", "norm_after.")):
        return [f"{start}adapter_{name}"]
    return [f"{start}{name}"]


def written_tensors(folder: Path, raw: RawCheckpoint) -> dict[str, Tensor]:
    """All tensors of a written checkpoint, module and head, by their keys in the library's model."""
    tensors = read_tensors(folder / _WEIGHTS[raw.weights_suffix])
    return tensors | (read_tensors(folder / _HEAD_WEIGHTS[raw.weights_suffix]) if raw.head else {})


def _head(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # Prediction heads: heads.NAME.N.weight. Static task heads keep their path in the task model.
    return {re.sub(r"^heads\.[^.]+\.", "layers.", key): tensor for key, tensor in tensors.items()}


def _labels(head_config: Mapping[str, Any] | None) -> list[str] | None:
    if not head_config:
        return None
    names = (head_config.get("config") or {}).get("label2id") or head_config.get("label2id")
    if not names or all(name.startswith("LABEL_") for name in names):  # transformers' placeholders
        return None
    return sorted(names, key=lambda label: int(names[label]))


def _model_fields(raw: RawCheckpoint, student: StudentNames) -> dict[str, Any]:
    classes = {
        Task.PREDICTION_HEADS: student.base_class.removesuffix("Model") + "AdapterModel",
        Task.BASE: student.base_class,
    }
    return {
        "hidden_size": student.hidden_size,
        "model_class": classes.get(raw.task, student.task_class),
        "model_name": student.name,
        "model_type": student.model_type,
    }


def _settings(raw: RawCheckpoint, student: StudentNames) -> dict[str, Any]:
    settings = module_config(raw.config)
    layers = {path: student.position(path) for path in raw.entries if not _is_invertible(path)}
    if len(layers) == len(raw.entries) and settings.get("inv_adapter"):
        settings.update(inv_adapter=None, inv_adapter_reduction_factor=None)
    settings["leave_out"] = sorted(set(range(student.num_layers)) - set(layers.values()))
    if raw.kind == "ia3" or not layers:  # of which nothing depends on the model
        return settings
    if raw.kind == "prefix":
        return adapterhub_prefix.settings_of(raw, settings)
    if raw.kind == "lora":
        ranks = {values["A"].shape[0] for values in raw.entries.values()}
        scalings = set(raw.scalings.values())
        if len(ranks) > 1 or len(scalings) > 1:
            raise CheckpointError(
                "AdapterHub's LoRA has one rank and one alpha for all layers",
                where=raw.name,
                found=f"ranks {sorted(ranks)}, scalings {sorted(scalings)}",
            )
        rank, scaling = ranks.pop(), scalings.pop()
        alpha = scaling * rank
        settings.update(r=rank, alpha=int(alpha) if float(alpha).is_integer() else alpha)
        return settings
    shapes = {layer: raw.entries[path]["down.weight"].shape for path, layer in layers.items()}
    factors = {layer: reduction_factor(hidden, width) for layer, (width, hidden) in shapes.items()}
    default = Counter(factors.values()).most_common(1)[0][0]
    others = {str(layer): factor for layer, factor in factors.items() if factor != default}
    settings["reduction_factor"] = {**others, "default": default} if others else default
    return settings


def reduction_factor(hidden_size: int, width: int) -> float | int:
    """The factor from which the library computes this bottleneck width, int(hidden_size // factor) == width."""
    factor = hidden_size / width
    if int(hidden_size // factor) != width:
        factor = hidden_size / (width + 0.5)
    return int(factor) if float(factor).is_integer() else factor
