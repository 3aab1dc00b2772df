"""PEFT's LoRA: factors of linear layers, with DoRA's magnitudes, biases, and ranks and alphas that differ by layer."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from torch import Tensor

from peft_graft.checkpoints.raw import EMBEDDING_NAMES, RawCheckpoint, has_rows
from peft_graft.checkpoints.student_names import StudentNames
from peft_graft.errors import CheckpointError
from peft_graft.modules.base import rank_stabilised_scaling

#: Options that change what the weights mean; each is refused unless it holds one of these harmless values.
_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "bias": ("none", "lora_only", None),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "use_qalora": (False, None),
    "use_bdlora": (None, False),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
}
#: Names in the file, after the path of the layer -> ours.
_NAMES = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_B.bias": "bias",
    "lora_magnitude_vector": "magnitude",
    "base_layer.bias": "base_bias",
    "lora_embedding_A": "embedding_A",
    "lora_embedding_B": "embedding_B",
    "token_adapter.trainable_tokens_delta": "token_rows",
    "weight": "rows",
}
_KEY = re.compile(rf"(.+)\.({'|'.join(re.escape(name) for name in _NAMES if name != 'weight')})")
#: Copies of embeddings and output layers, untrained or already there, which peft saves beside those that count.
_COPY = re.compile(r".+\.((token_adapter\.)?base_layer|modules_to_save|original_module)\.weight")
#: Names of a LoRA's two factors.
FACTORS = (("A", "B"), ("embedding_A", "embedding_B"))


def check(config: Mapping[str, Any], folder: Path) -> None:
    """Refuse options under which the weights mean something else.

    Raises:
        CheckpointError: there is one.
    """
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


def entry(path: str) -> tuple[str, str] | None:
    """(module path, our name) of a tensor's path, None for one that is no part of a LoRA."""
    # older versions of peft wrote the adapter's name, and DoRA's magnitudes as a weight
    plain = re.sub(r"(lora_[AB])\.[^.]+\.(weight|bias)$", r"\1.\2", path)
    plain = re.sub(r"(lora_magnitude_vector)(\.[^.]+)?(\.weight)?$", r"\1", plain)
    plain = re.sub(r"(lora_embedding_[AB])\.[^.]+$", r"\1", plain)
    match = _KEY.fullmatch(plain)
    if match:
        return match[1], _NAMES[match[2]]
    owner, _, last = re.sub(r"\.modules_to_save\.[^.]+", "", plain).rpartition(".")
    return (owner, "rows") if last == "weight" and owner.rpartition(".")[2] in EMBEDDING_NAMES else None


def is_copy(path: str) -> bool:
    """Whether a tensor says nothing that no other does: the base model's own, or one that is saved twice."""
    return bool(_COPY.fullmatch(path))


def factors_of(values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
    """A [r, d_in] and B [d_out, r] of an entry, None for one without."""
    return next(((values[a], values[b]) for a, b in FACTORS if a in values and b in values), None)


def with_token_ids(entries: Mapping[str, dict[str, Tensor]], config: Mapping[str, Any], where: str) -> None:
    """Put the ids of tokens that were trained one by one, which the configuration names, beside their rows.

    Raises:
        CheckpointError: it names none, or as many as there are not.
    """
    named = config.get("trainable_token_indices") or []
    for path, values in entries.items():
        if "token_rows" not in values:
            continue
        own = (
            {name: ids for name, ids in named.items() if path.endswith(name)}
            if isinstance(named, dict)
            else {"": named}
        )
        ids = next(iter(own.values()), [])
        if len(ids) != len(values["token_rows"]):
            raise CheckpointError(
                f"the rows of {path} and trainable_token_indices disagree",
                where=where, expected=f"{len(values['token_rows'])} ids", found=len(ids),
                fix="save the module again with save_pretrained, which writes both",
            )  # fmt: skip
        values["token_ids"] = torch.tensor(ids)


def check_entries(entries: Mapping[str, Mapping[str, Tensor]], config: Mapping[str, Any], where: str) -> None:
    """Refuse factors without their twin, or that do not fit each other.

    Raises:
        CheckpointError: there are such.
    """
    if not any(factors_of(values) for values in entries.values()):
        raise CheckpointError("the file holds no LoRA factors", where=where, expected="keys that end in lora_A.weight")
    for path, factors in entries.items():
        if has_rows(factors):
            continue
        pair = factors_of(factors)
        if pair is None:
            raise CheckpointError(f"lora_{next(iter(factors))} of {path} lacks its twin", where=where)
        if config.get("use_dora") and "magnitude" not in factors:
            raise CheckpointError(f"DoRA at {path} lacks its magnitudes", where=where)
        a, b = pair
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise CheckpointError(
                f"the factors of {path} do not fit each other",
                where=where,
                expected="A [r, in] and B [out, r]",
                found=f"A {list(a.shape)} and B {list(b.shape)}",
            )


def tensors(raw: RawCheckpoint) -> dict[str, Tensor]:
    """The tensors as the file has them, by path."""
    names = {ours: theirs for theirs, ours in _NAMES.items()}
    return {
        f"{path}.{names[name]}": tensor
        for path, values in raw.entries.items()
        for name, tensor in values.items()
        if name != "token_ids"  # which the configuration names
    }


def scaling(config: Mapping[str, Any], path: str, rank: int) -> float:
    """What B A is multiplied by at this path."""
    patterns = config.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(list(patterns), path), config.get("lora_alpha", 8))
    return rank_stabilised_scaling(alpha, rank, rslora=bool(config.get("use_rslora")))


def config_of(raw: RawCheckpoint, student: StudentNames) -> dict[str, Any]:
    """The options of LoRA that depend on the model, for the student."""
    ranks = {path: len(pair[0]) for path, values in raw.entries.items() if (pair := factors_of(values))}
    tokens = {path: values["token_ids"].tolist() for path, values in raw.entries.items() if "token_ids" in values}
    rslora = bool(raw.config.get("use_rslora"))
    alphas = {path: _plain(raw.scalings[path] * (rank**0.5 if rslora else rank)) for path, rank in ranks.items()}
    rank, alpha = _commonest(ranks.values()), _commonest(alphas.values())
    return {
        "init_lora_weights": True,
        "r": rank,
        "lora_alpha": alpha,
        # peft matches pattern keys as regular expressions against the module's path
        "rank_pattern": {re.escape(path): value for path, value in ranks.items() if value != rank},
        "alpha_pattern": {re.escape(path): value for path, value in alphas.items() if value != alpha},
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "fan_in_fan_out": bool(set(ranks) & student.transposed),
        "trainable_token_indices": {path.rpartition(".")[2]: ids for path, ids in tokens.items()} or None,
    }


def _plain(value: float) -> float | int:
    nearest = round(value)
    return nearest if abs(value - nearest) < 1e-9 * max(1, abs(value)) else value


def _commonest(values: Collection[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]
