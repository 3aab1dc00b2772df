"""PEFT's checkpoints: adapter_config.json and adapter_model.safetensors (or .bin), of every kind that can be moved."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
from torch import Tensor

from peft_graft.checkpoints.formats import peft_lora, peft_prompts, peft_vectors
from peft_graft.checkpoints.raw import VIRTUAL, Kind, RawCheckpoint, has_rows
from peft_graft.checkpoints.student_names import StudentNames
from peft_graft.errors import CheckpointError
from peft_graft.files import file_hashes, read_json, read_tensors, write_json, write_tensors
from peft_graft.models.tasks import Task

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")

#: peft's types -> what kind of module they are; all others change weights, and become a LoRA (``conversion``).
_KINDS: Mapping[str, Kind] = {
    "LORA": "lora",
    "IA3": "ia3",
    "LN_TUNING": "norms",
    "PROMPT_TUNING": "prompt",
    "P_TUNING": "prompt",
    "PREFIX_TUNING": "prefix",
}
#: Types whose weights no LoRA can stand for: they change what attention does, or depend on the input.
_NO_WEIGHTS = ("MULTITASK_PROMPT_TUNING", "ADAPTION_PROMPT", "CPT", "XLORA", "POLY", "TRAINABLE_TOKENS", "CARTRIDGE")


def detect(folder: Path) -> bool:
    """Whether a folder holds a PEFT checkpoint of any kind."""
    return (folder / CONFIG).is_file() and "peft_type" in read_json(folder / CONFIG)


def weights_file(folder: Path) -> Path:
    """The file that holds a checkpoint's tensors.

    Raises:
        CheckpointError: there is none.
    """
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError("the weights file is missing", where=str(folder), expected=" or ".join(WEIGHTS))


def read(folder: Path) -> RawCheckpoint:
    """Read a checkpoint; one of a kind that has to become a LoRA first comes without its tensors (``weights``).

    Raises:
        CheckpointError: a kind or an option that is not supported, missing or damaged weights, or tensors that belong
            to no known part.
    """
    config = read_json(folder / CONFIG)
    kind = _kind(config, str(folder))
    weights = weights_file(folder)
    if kind == "lora":
        peft_lora.check(config, folder)
    found = parse(config, read_tensors(weights) if kind != "weights" else {}, str(weights))
    labels_file = folder / "config.json"
    labels = read_json(labels_file).get("id2label") if labels_file.is_file() else None
    return replace(
        found,
        labels=[labels[str(index)] for index in range(len(labels))] if labels else None,
        files=file_hashes(folder),
        weights_suffix=weights.suffix,
    )


def parse(config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> RawCheckpoint:
    """A checkpoint from its configuration and its tensors by their keys in the file.

    Args:
        where: what the tensors come from, for messages.

    Raises:
        CheckpointError: a kind that is not supported, or tensors that belong to no known part.
    """
    kind = _kind(config, where)
    entries: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        path = key.removeprefix(_key_prefix(kind))
        if kind == "lora" and peft_lora.is_copy(path):
            continue
        place = _entry(kind, path, tensor)
        if place:
            values = {place[1]: tensor.flatten() if kind == "ia3" else tensor}
            entries.setdefault(place[0], {}).update(values)
        else:
            others[re.sub(r"\.modules_to_save\.[^.]+", "", path)] = tensor
    _check_others(others, config, where)
    if kind == "lora":
        peft_lora.check_entries(entries, config, where)
        peft_lora.with_token_ids(entries, config, where)
    elif kind in VIRTUAL:
        entries = peft_prompts.check(kind, entries, config, where)
    elif kind != "weights" and not entries:
        raise CheckpointError("the file holds no tensors of its kind", where=where, expected=str(config["peft_type"]))
    return RawCheckpoint(
        format="peft",
        kind=kind,
        name="default",
        base_model=config.get("base_model_name_or_path") or None,
        task=_task(config),
        config=config,
        entries=entries,
        scalings={
            path: peft_lora.scaling(config, path, len(pair[0]))
            for path, values in entries.items()
            if (pair := peft_lora.factors_of(values))
        },
        head=others,
    )


def write(folder: Path, raw: RawCheckpoint, student: StudentNames) -> None:
    """Write a checkpoint for the student: configuration corrected, everything else as it was."""
    config, tensors = build(raw, student)
    write_json(folder / CONFIG, config)
    write_tensors(folder / WEIGHTS[0], tensors)


def build(raw: RawCheckpoint, student: StudentNames) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration of a checkpoint for the student, and its tensors by their keys in the file."""
    writers = {"lora": peft_lora.tensors, "ia3": peft_vectors.scales, "norms": peft_vectors.norms}
    found = writers[raw.kind](raw) if raw.kind in writers else peft_prompts.tensors(raw)
    tensors = {
        (key if key == peft_prompts.KEY else f"{_key_prefix(raw.kind)}{key}"): tensor
        for key, tensor in {**found, **raw.head}.items()
    }
    return student_config(raw, student), tensors


def student_config(raw: RawCheckpoint, student: StudentNames) -> dict[str, Any]:
    """The teacher's configuration with all that depends on the model replaced by the student's."""
    config = dict(raw.config)
    config.update(
        base_model_name_or_path=student.name,
        revision=None,
        peft_version=peft.__version__,
        inference_mode=True,
        modules_to_save=sorted(_saved_modules(raw.head) | {path.rpartition(".")[2] for path in _whole(raw)}) or None,
    )
    if raw.config.get("auto_mapping"):
        config["auto_mapping"] = {"base_model_class": student.task_class, "parent_library": "transformers"}
    if raw.kind in VIRTUAL:
        return peft_prompts.config_of(raw, config, student)
    config.update((peft_lora if raw.kind == "lora" else peft_vectors).config_of(raw, student))
    targets = [path for path, values in raw.entries.items() if not has_rows(values)]
    return {**config, "target_modules": student.shortest_targets(targets)}


def _kind(config: Mapping[str, Any], where: str) -> Kind:
    peft_type = str(config.get("peft_type"))
    if peft_type in _NO_WEIGHTS or peft_type not in peft.PeftType.__members__:
        raise CheckpointError(
            f"PEFT modules of type {peft_type} cannot be moved",
            where=where,
            expected=f"{', '.join(_KINDS)}, or a type that changes weights",
            fix="train a LoRA in its place",
        )
    return _KINDS.get(peft_type, "weights")


def _whole(raw: RawCheckpoint) -> list[str]:
    """Paths of embeddings and output layers that are saved whole."""
    return [path for path, values in raw.entries.items() if "rows" in values]


def _key_prefix(kind: Kind) -> str:
    # what stands before the text has no tuner around the model
    return "base_model." if kind in VIRTUAL else "base_model.model."


def _entry(kind: Kind, path: str, tensor: Tensor) -> tuple[str, str] | None:
    if kind == "lora":
        return peft_lora.entry(path)
    if kind in VIRTUAL:
        return ("", peft_prompts.KEY) if path == peft_prompts.KEY else None
    return peft_vectors.entry(path, tensor)


def _saved_modules(head: Mapping[str, Tensor]) -> set[str]:
    # peft wraps whole modules; a head of several layers is saved under its outermost name, the pooler under its own
    return {"pooler" if ".pooler." in f".{path}" else path.split(".")[0] for path in head}


def _check_others(others: Mapping[str, Tensor], config: Mapping[str, Any], where: str) -> None:
    saved = config.get("modules_to_save") or []
    for path in others:
        # peft compares ends of module names: "classifier" also saves DistilBERT's "pre_classifier"
        if not any(re.match(rf".*{re.escape(name)}($|\..*)", path) for name in saved):
            raise CheckpointError(
                f"tensor {path} is neither a part of a {config['peft_type']} module nor one of modules_to_save "
                f"({', '.join(saved) or 'none'})",
                where=where,
                fix="this kind of module is not supported yet",
            )


def _task(config: Mapping[str, Any]) -> Task:
    base_class = (config.get("auto_mapping") or {}).get("base_model_class") or ""
    return Task.of_peft(config.get("task_type")) or Task.of_class(base_class)
