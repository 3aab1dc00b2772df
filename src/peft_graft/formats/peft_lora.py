"""PEFT's LoRA checkpoints: adapter_config.json and adapter_model.safetensors (or .bin)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import peft
from peft.utils.other import get_pattern_key
from torch import Tensor

from peft_graft.errors import CheckpointError
from peft_graft.formats.raw import RawCheckpoint, StudentNames, task_of_class
from peft_graft.modules import rank_stabilised_scaling
from peft_graft.weights import file_hashes, read_json, read_tensors, write_json, write_tensors

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_KEY_PREFIX = "base_model.model."

#: peft's task types and ours.
_TASKS = {
    "TOKEN_CLS": "token-classification",
    "SEQ_CLS": "sequence-classification",
    "CAUSAL_LM": "causal-lm",
    "QUESTION_ANS": "question-answering",
    "SEQ_2_SEQ_LM": "seq2seq-lm",
}
#: Options that change what the weights mean; each is refused unless it holds one of these harmless values.
_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "bias": ("none", None),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, []),
    "target_parameters": (None, []),
    "use_qalora": (False, None),
    "use_bdlora": (None, False),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
}


def detect(folder: Path) -> bool:
    """Whether a folder holds a PEFT checkpoint of any kind."""
    return (folder / CONFIG).is_file() and "peft_type" in read_json(folder / CONFIG)


def read(folder: Path) -> RawCheckpoint:
    """Read a LoRA checkpoint.

    Raises:
        CheckpointError: not LoRA, an option that is not supported, missing or damaged weights, a factor without its
            twin, or tensors that belong to no known part.
    """
    config = read_json(folder / CONFIG)
    _check_supported(config, folder)
    weights = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        raise CheckpointError("the weights file is missing", where=str(folder), expected=" or ".join(WEIGHTS))
    entries: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in read_tensors(weights).items():
        path = key.removeprefix(_KEY_PREFIX)
        match = re.fullmatch(r"(.+)\.lora_([AB])(?:\.[^.]+)?\.weight", path)
        if match:
            entries.setdefault(match[1], {})[match[2]] = tensor
        else:
            others[re.sub(r"\.modules_to_save\.[^.]+", "", path)] = tensor
    _check_factors(entries, str(weights))
    _check_others(others, config, str(weights))
    labels_file = folder / "config.json"
    labels = read_json(labels_file).get("id2label") if labels_file.is_file() else None
    return RawCheckpoint(
        format="peft",
        kind="lora",
        name="default",
        base_model=config.get("base_model_name_or_path") or None,
        task=_task(config),
        config=config,
        entries=entries,
        scalings={path: _scaling(config, path, factors["A"].shape[0]) for path, factors in entries.items()},
        head=others,
        labels=[labels[str(index)] for index in range(len(labels))] if labels else None,
        files=file_hashes(folder),
        weights_suffix=weights.suffix,
    )


def write(folder: Path, raw: RawCheckpoint, student: StudentNames) -> None:
    """Write a LoRA checkpoint for the student: configuration corrected, everything else as it was."""
    tensors = {
        f"{_KEY_PREFIX}{path}.lora_{factor}.weight": tensor
        for path, factors in raw.entries.items()
        for factor, tensor in factors.items()
    }
    tensors.update({f"{_KEY_PREFIX}{path}": tensor for path, tensor in raw.head.items()})
    write_json(folder / CONFIG, student_config(raw, student))
    write_tensors(folder / WEIGHTS[0], tensors)


def student_config(raw: RawCheckpoint, student: StudentNames) -> dict[str, Any]:
    """The teacher's configuration with all that depends on the model replaced by the student's."""
    ranks = {path: factors["A"].shape[0] for path, factors in raw.entries.items()}
    rslora = bool(raw.config.get("use_rslora"))
    alphas = {
        path: _plain(scaling * rank_stabilised_scaling(1, 1, rslora=rslora) * (rank**0.5 if rslora else rank))
        for path, scaling, rank in ((path, raw.scalings[path], ranks[path]) for path in ranks)
    }
    rank, alpha = _commonest(ranks.values()), _commonest(alphas.values())
    config = dict(raw.config)
    config.update(
        base_model_name_or_path=student.name,
        revision=None,
        peft_version=peft.__version__,
        inference_mode=True,
        init_lora_weights=True,
        r=rank,
        lora_alpha=alpha,
        # peft matches pattern keys as regular expressions against the module's path
        rank_pattern={re.escape(path): value for path, value in ranks.items() if value != rank},
        alpha_pattern={re.escape(path): value for path, value in alphas.items() if value != alpha},
        target_modules=shortest_targets(ranks, student.modules),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        fan_in_fan_out=bool(set(ranks) & student.transposed),
        modules_to_save=sorted(_saved_modules(raw.head)) or None,
    )
    if raw.config.get("auto_mapping"):
        config["auto_mapping"] = {"base_model_class": student.task_class, "parent_library": "transformers"}
    return config


def shortest_targets(paths: Collection[str], modules: Collection[str]) -> list[str]:
    """Target names as a person would write them: shortest suffixes that match these modules and no others.

    Args:
        paths: modules to be targeted.
        modules: all modules of the model.

    Example:
        >>> shortest_targets(["enc.0.self.query", "enc.1.self.query"], ["enc.0.self.query", "enc.1.self.query", "cls"])
        ['query']
    """
    wanted, targets = set(paths), set()
    remaining = set(paths)
    while remaining:
        path = min(remaining)
        parts = path.split(".")
        for length in range(1, len(parts) + 1):
            suffix = ".".join(parts[-length:])
            matched = {name for name in modules if name == suffix or name.endswith(f".{suffix}")} | {path}
            if matched <= wanted:
                targets.add(suffix)
                remaining -= matched
                break
        else:  # another module's path ends in all of this one; peft takes a whole path as one more name
            targets.add(path)
            remaining.discard(path)
    return sorted(targets)


def _saved_modules(head: Mapping[str, Tensor]) -> set[str]:
    # peft wraps whole modules; a head of several layers is saved under its outermost name, the pooler under its own
    return {"pooler" if ".pooler." in f".{path}" else path.split(".")[0] for path in head}


def _check_supported(config: Mapping[str, Any], folder: Path) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(
            f"PEFT modules of type {kind} are not supported yet",
            where=str(folder),
            expected="LORA",
            fix="convert it with peft's convert_to_lora where peft can, or move a LoRA",
        )
    for option, harmless in _UNSUPPORTED.items():
        if option in config and config[option] not in harmless:
            raise CheckpointError(
                f"LoRA with {option}={config[option]!r} is not supported yet",
                where=str(folder),
                fix="train or convert the module without this option",
            )
    initialisation = str(config.get("init_lora_weights", True)).lower()
    if initialisation.split("_")[0] in {"pissa", "olora", "corda", "loftq"}:
        raise CheckpointError(
            f"the module belongs to a base model that its initialisation changed (init_lora_weights={initialisation})",
            where=str(folder),
            fix="save it with peft's path_initial_model_for_weight_conversion, which makes it an ordinary LoRA",
        )


def _check_factors(entries: Mapping[str, Mapping[str, Tensor]], where: str) -> None:
    if not entries:
        raise CheckpointError("the file holds no LoRA factors", where=where, expected="keys that end in lora_A.weight")
    for path, factors in entries.items():
        if set(factors) != {"A", "B"}:
            raise CheckpointError(f"lora_{next(iter(factors))} of {path} lacks its twin", where=where)
        a, b = factors["A"], factors["B"]
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise CheckpointError(
                f"the factors of {path} do not fit each other",
                where=where,
                expected="A [r, in] and B [out, r]",
                found=f"A {list(a.shape)} and B {list(b.shape)}",
            )


def _check_others(others: Mapping[str, Tensor], config: Mapping[str, Any], where: str) -> None:
    saved = config.get("modules_to_save") or []
    for path in others:
        # peft compares ends of module names: "classifier" also saves DistilBERT's "pre_classifier"
        if not any(re.match(rf".*{re.escape(name)}($|\..*)", path) for name in saved):
            raise CheckpointError(
                f"tensor {path} is neither a LoRA factor nor one of modules_to_save ({', '.join(saved) or 'none'})",
                where=where,
                fix="this kind of module is not supported yet",
            )


def _task(config: Mapping[str, Any]) -> str:
    if config.get("task_type") in _TASKS:
        return _TASKS[config["task_type"]]
    base_class = (config.get("auto_mapping") or {}).get("base_model_class") or ""
    return task_of_class(base_class)


def _scaling(config: Mapping[str, Any], path: str, rank: int) -> float:
    patterns = config.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(list(patterns), path), config.get("lora_alpha", 8))
    return rank_stabilised_scaling(alpha, rank, rslora=bool(config.get("use_rslora")))


def _plain(value: float) -> float | int:
    nearest = round(value)
    return nearest if abs(value - nearest) < 1e-9 * max(1, abs(value)) else value


def _commonest(values: Collection[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]
