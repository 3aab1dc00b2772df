"""Checkpoints of other programs, and of training: told by their files and names, and what to do about each."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from safetensors import safe_open

from peft_graft.errors import CheckpointError, GraftError
from peft_graft.files import read_json


@dataclass(frozen=True)
class Foreign:
    """What something is that is no module checkpoint of peft or adapters, and what to do about it."""

    what: str
    fix: str


_IMAGES = "modules of models that make images cannot be moved"
_KOHYA = Foreign(f"this is a LoRA of Kohya's scripts: {_IMAGES}", "give a module of a language model, saved by peft")
_DIFFUSERS = Foreign(f"this is a LoRA of diffusers: {_IMAGES}", "give a module of a language model, saved by peft")
_MLX = Foreign(
    "this is an adapter of mlx-lm, which names and lays out its factors in its own way",
    "write its lora_a and lora_b, transposed, as base_model.model.PATH.lora_A.weight and lora_B.weight, with a "
    "LoraConfig of peft whose lora_alpha is scale times rank",
)
_GGUF = Foreign("this is an adapter of llama.cpp (GGUF)", "give the checkpoint of peft that it was converted from")
_NEMO = Foreign(
    "this is a checkpoint of NeMo", "export it for peft first: nemo's llm.export_ckpt with target='hf-peft'"
)
_TORCHTUNE = Foreign(
    "torchtune wrote the weights as .pt",
    "where adapter_model.pt stands beside adapter_config.json, name it adapter_model.bin; else save again with "
    "save_adapter_weights_only=True",
)
_SHARDED = Foreign(
    "the weights are in several files, which peft does not load either",
    "join them: load each with safetensors.torch.load_file, and save_file all of them as adapter_model.safetensors",
)
_FSDP = Foreign(
    "this is a checkpoint of FSDP, each process's share for itself",
    "merge it with `accelerate merge-weights`, and save the module with save_pretrained",
)
_FSDP_WHOLE = Foreign(
    "FSDP wrote the state of the whole model",
    "load pytorch_model_fsdp.bin into the model with the module, and save the module with save_pretrained",
)
_DEEPSPEED = Foreign(
    "this is a checkpoint of DeepSpeed, whose weights are not gathered",
    "gather them with its zero_to_fp32.py, load them into the model with the module, and save_pretrained",
)
_FUSION = Foreign(
    "this is a fusion of several adapters, which cannot be moved as one", "give the folder of one of the adapters"
)
_HEAD = Foreign("this is a prediction head without a module", "give the folder of the module that it was trained with")
_INVERSION = Foreign(f"these are embeddings for a model that makes images: {_IMAGES}", "give a module saved by peft")
_MODEL = Foreign(
    "this is a whole model, with no module in it or one that was merged into it",
    "give the folder that save_pretrained wrote for the module before it was merged",
)
_LIGHTNING = Foreign(
    "this is a checkpoint of PyTorch Lightning, of a whole run of training",
    "load it with the code that trained it, and save the module with save_pretrained",
)
_TRAINER = Foreign(
    "this is a checkpoint of a training run, whose weights are those of the whole model",
    "load pytorch_model.bin or model.safetensors into the model with the module, and save the module with "
    "save_pretrained",
)
_ARCHIVE = Foreign("this is an archive", "unpack it, and give the folder in it that holds adapter_config.json")
_NO_CONFIG = Foreign(
    "these are a module's weights without adapter_config.json, which says what they mean",
    "copy adapter_config.json beside them too",
)
#: Patterns of names in a folder, any of which says what it is; the first that fits.
_BY_FILES: Sequence[tuple[tuple[str, ...], Foreign]] = (
    (("adapters.safetensors", "adapters.npz"), _MLX),
    (("adapter_fusion_config.json", "*adapter_fusion*"), _FUSION),
    (("pytorch_lora_weights.*",), _DIFFUSERS),
    (("learned_embeds.*",), _INVERSION),
    (("*.gguf",), _GGUF),
    (("*.nemo", "adapter_metadata.json", "context"), _NEMO),
    (("adapter_model*.index.json", "adapter_model-*-of-*", "adapter_model.*-of-*"), _SHARDED),
    (("pytorch_model_fsdp*.bin",), _FSDP_WHOLE),
    (("pytorch_model_fsdp*", "*.distcp", ".metadata"), _FSDP),
    (("global_step*", "zero_to_fp32.py", "*_optim_states.pt", "mp_rank_*"), _DEEPSPEED),
    (("adapter_*.pt", "recipe_state.pt"), _TORCHTUNE),
    (("*.ckpt",), _LIGHTNING),
)
#: The same, where the configuration of a module is not there either.
_WITHOUT_CONFIG: Sequence[tuple[tuple[str, ...], Foreign]] = (
    (("adapter_model.safetensors", "adapter_model.bin", "pytorch_adapter.bin", "adapter.safetensors"), _NO_CONFIG),
    (("head_config.json", "model_head.safetensors", "pytorch_model_head.bin"), _HEAD),
    (("trainer_state.json", "optimizer.pt", "optimizer.bin"), _TRAINER),
    (("*.zip", "*.tar", "*.tar.gz", "*.tgz"), _ARCHIVE),
)
_OF_A_MODEL = ("model*.safetensors", "pytorch_model*.bin", "*.safetensors.index.json", "tf_model.h5")


def foreign_folder(folder: Path) -> Foreign | None:
    """What a folder is whose weights or configuration are not those of a module."""
    names = [path.name for path in folder.iterdir() if path.is_file() or path.is_dir()]
    has_config = "adapter_config.json" in names
    for patterns, found in (*_BY_FILES, *(() if has_config else _WITHOUT_CONFIG)):
        if any(fnmatch(name, pattern) for name in names for pattern in patterns):
            return found
    if has_config:
        return _foreign_config(folder / "adapter_config.json")
    if "config.json" in names and any(fnmatch(name, pattern) for name in names for pattern in _OF_A_MODEL):
        return _MODEL
    lone = [name for name in names if name.endswith(".safetensors")]
    return _foreign_tensors(folder / lone[0]) if len(lone) == 1 else None


def foreign_file(path: Path) -> Foreign | None:
    """What a file is that was given in place of a folder."""
    for patterns, found in (*_BY_FILES, *_WITHOUT_CONFIG):
        if any(fnmatch(path.name, pattern) for pattern in patterns):
            return found
    return _foreign_tensors(path) if path.suffix == ".safetensors" else None


def foreign_names(names: Iterable[str]) -> Foreign | None:
    """Whose tensors these are, by their names; None where they are not known."""
    for name in names:
        if name.startswith(("lora_te", "lora_unet_", "lora_prior_")) or ".lora_down." in name:
            return _KOHYA
        if name.startswith(("unet.", "text_encoder.", "text_encoder_2.", "transformer.transformer_blocks.")):
            return _DIFFUSERS
        if name.endswith((".lora_a", ".lora_b")):
            return _MLX
        if name.endswith((".loraA", ".loraB")):
            return _GGUF
        if name.endswith((".adapter.linear_in.weight", ".adapter.linear_out.weight")):
            return _NEMO
    return None


def missing_weights(folder: Path, expected: Sequence[str]) -> CheckpointError:
    """The error for a folder that has a module's configuration and not its weights."""
    other = foreign_folder(folder)
    return CheckpointError(
        f"the weights file is missing{f': {other.what}' if other else ''}",
        where=str(folder),
        expected=" or ".join(expected),
        found=_listed(folder) if other else None,
        fix=other.fix if other else None,
    )


def no_checkpoint(folder: Path) -> CheckpointError:
    """The error for a folder that holds no module."""
    config = "adapter_config.json"
    inside = [path.parent.relative_to(folder) for depth in ("*", "*/*") for path in folder.glob(f"{depth}/{config}")]
    other = None if inside else foreign_folder(folder)
    fix = other.fix if other else None
    if inside:
        fix = f"give one of its sub-folders: {', '.join(str(path) for path in sorted(inside)[:20])}"
    return CheckpointError(
        f"the folder holds no module checkpoint{f': {other.what}' if other else ''}",
        where=str(folder),
        expected=f"{config} of peft or adapters",
        found=_listed(folder),
        fix=fix,
    )


def no_folder(path: Path) -> CheckpointError:
    """The error for a file that was given in place of a folder."""
    beside = (path.parent / "adapter_config.json").is_file()
    other = None if beside else foreign_file(path)
    return CheckpointError(
        f"a file was given, not a folder{f': {other.what}' if other else ''}",
        where=str(path),
        expected="the folder that holds adapter_config.json",
        fix=f"give its folder: {path.parent}" if beside else other.fix if other else None,
    )


def _listed(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" * (len(names) > 8)) or "an empty folder"


def _foreign_config(path: Path) -> Foreign | None:
    """What an ``adapter_config.json`` is of that is neither peft's nor AdapterHub's."""
    try:
        config: Mapping[str, object] = read_json(path)
    except GraftError:
        return None
    if "fine_tune_type" in config or "lora_parameters" in config:
        return _MLX
    if "peft_type" in config or "config" in config:
        return None
    if "architectures" in config or "model_type" in config:
        return Foreign(
            "adapter_config.json is the configuration of a model, not of a module",
            "put back the adapter_config.json that peft wrote when it saved the module",
        )
    return Foreign(
        "adapter_config.json is neither peft's, which has peft_type, nor AdapterHub's, which has config and model_type",
        "save the module again with save_pretrained of peft, or save_adapter of adapters",
    )


def _foreign_tensors(path: Path) -> Foreign | None:
    """Whose tensors a .safetensors file holds."""
    try:
        with safe_open(path, "pt") as file:
            names, about = list(file.keys()), json.dumps(file.metadata() or {})
    except Exception:  # the file says nothing of what it is
        return None
    if '"ss_' in about:
        return _KOHYA
    return foreign_names(names) or (_NO_CONFIG if any(".lora_A." in name for name in names) else None)
