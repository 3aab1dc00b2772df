"""PEFT's checkpoints: adapter_config.json and adapter_model.safetensors (or .bin), of every kind that can be moved."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from peft_graft.checkpoints.foreign import foreign_names, missing_weights
from peft_graft.checkpoints.formats.base import (
    FILES,
    Format,
    check_shapes,
    check_tensors,
    check_values,
    register_format,
)
from peft_graft.checkpoints.formats.peft.codec import CODECS, Codec, codec_of_type
from peft_graft.checkpoints.formats.peft.settings import PeftSettings
from peft_graft.checkpoints.raw import WEIGHTS, RawCheckpoint
from peft_graft.checkpoints.student_names import StudentNames
from peft_graft.checkpoints.wrappers import without_wrapper_patterns, without_wrappers
from peft_graft.config import Library
from peft_graft.environment import version_of
from peft_graft.errors import CheckpointError
from peft_graft.files import file_hashes, read_json, read_tensors, write_json, write_tensors
from peft_graft.labels import ProblemType, declared_names
from peft_graft.models.tasks import Task
from peft_graft.modules.base import Part

if TYPE_CHECKING:
    from peft import PeftConfig

CONFIG = "adapter_config.json"
WEIGHTS_FILES = ("adapter_model.safetensors", "adapter_model.bin")

#: Tasks whose checkpoints peft loads only with a head.
TASKS_WITH_HEAD = (Task.TOKEN_CLASSIFICATION, Task.SEQUENCE_CLASSIFICATION, Task.QUESTION_ANSWERING)
#: Types whose weights no LoRA can stand for: they change what attention does, or depend on the input.
_NO_WEIGHTS = ("MULTITASK_PROMPT_TUNING", "ADAPTION_PROMPT", "CPT", "XLORA", "POLY", "TRAINABLE_TOKENS", "CARTRIDGE")

#: Heads that peft's own classes add to ``modules_to_save`` when they load a file.
_HEADS = ("classifier", "score", "qa_outputs")
#: What trl trains beside a language model for PPO, and LLaMA-Factory after it, where it is kept, and where it may be.
_VALUE_HEAD = re.compile(r"(.*\.)?v_head\.")
_VALUE_FILES = ("value_head.safetensors", "value_head.bin")
_TRL_FILE, _SMALL = "pytorch_model.bin", 2**20
_LEFT_OUT = "the value head that was trained beside the module is left out: no language model has a place for it"


@register_format
class PeftFormat(Format):
    """PEFT's checkpoints; a type without a codec changes weights, and becomes a LoRA before it is moved."""

    library: ClassVar = Library.PEFT
    loading_template: ClassVar = "load_peft.py.jinja"

    def detect(self, folder: Path) -> bool:
        """Whether a folder holds a PEFT checkpoint of any kind."""
        return (folder / CONFIG).is_file() and "peft_type" in read_json(folder / CONFIG)

    def read(self, folder: Path) -> RawCheckpoint:
        """The checkpoint in a folder, with labels from a model configuration beside it."""
        config = read_json(folder / CONFIG)
        _checked(config, str(folder / CONFIG))
        weights = weights_file(folder)
        raw = self.parse(config, read_tensors(weights), where=str(weights))
        labels_file = folder / "config.json"
        model = read_json(labels_file) if labels_file.is_file() else {}
        return replace(
            raw,
            labels=list(declared_names(model.get("id2label"))) or None,
            problem_type=ProblemType.declared(model.get("problem_type")),
            files=file_hashes(folder, FILES),
            weights_suffix=weights.suffix,
            notes=raw.notes or _value_head_beside(folder),
        )

    def parse(
        self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], *, where: str = "the module"
    ) -> RawCheckpoint:
        """A checkpoint from memory; one of a type that has to become a LoRA first has no parts (``weights``)."""
        settings = _checked(config, where)
        check_tensors(tensors, where)
        config, tensors = without_wrapper_patterns(config), without_wrappers(tensors, where)
        codec = codec_of_type(settings.peft_type)
        parts: Mapping[str, Part] = {}
        others: dict[str, Tensor] = {}
        tensors, notes = _without_value_head(tensors)
        if codec:
            codec.check(config, where)
            found: dict[str, dict[str, Tensor]] = {}
            keys: dict[tuple[str, str], str] = {}
            for key, tensor in tensors.items():
                path = key.removeprefix(codec.prefix)
                if codec.is_copy(path):
                    continue
                if place := codec.place(path):
                    if place in keys:
                        raise CheckpointError(
                            "the file holds two adapters, or one tensor twice",
                            where=where,
                            found=f"{keys[place]} and {key}",
                            fix="keep the tensors of one adapter: load the file with peft and save_pretrained with "
                            "selected_adapters",
                        )
                    keys[place] = key
                    found.setdefault(place[0], {})[place[1]] = tensor
                else:
                    others[re.sub(r"\.modules_to_save\.[^.]+", "", path)] = tensor
            _check_others(others, config, where)
            check_values(found, where)
            parts = codec.parts(found, config, where)
            check_shapes(parts, where)
        else:
            paths = {key.removeprefix(Codec.prefix): tensor for key, tensor in tensors.items()}
            others = {path: tensor for path, tensor in paths.items() if saved_beside(path, config)}
        return RawCheckpoint(
            library=self.library,
            kind=codec.kind if codec else WEIGHTS,
            name="default",
            base_model=settings.base_model_name_or_path or None,
            task=_task(settings),
            config=config,
            parts=parts,
            head=others,
            unconverted={} if codec else dict(tensors),
            notes=notes,
        )

    def build(self, raw: RawCheckpoint, names: StudentNames) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The configuration corrected, everything else as it was."""
        codec = CODECS[raw.kind]
        tensors = {f"{codec.prefix}{path}": tensor for path, tensor in {**raw.head, **raw.beside}.items()}
        tensors |= codec.tensors(raw.parts)
        whole = {*codec.saved_whole(raw.parts), *(path.rpartition(".")[0] for path in raw.beside)}
        config = {
            **raw.config,
            "base_model_name_or_path": names.name,
            "revision": names.revision,
            "task_type": todays_task_type(raw),
            "peft_version": version_of("peft"),
            "inference_mode": True,
            "modules_to_save": sorted(_saved_modules(raw.head) | whole) or None,
        }
        if raw.config.get("auto_mapping"):
            config["auto_mapping"] = {"base_model_class": names.task_class, "parent_library": "transformers"}
        return _todays_options(codec.config(raw, config, names)), tensors

    def write(self, folder: Path, raw: RawCheckpoint, names: StudentNames) -> None:
        """Write the two files that peft's loader looks for."""
        config, tensors = self.build(raw, names)
        write_json(folder / CONFIG, config)
        write_tensors(folder / WEIGHTS_FILES[0], tensors)


def weights_file(folder: Path) -> Path:
    """The file that holds a checkpoint's tensors.

    Raises:
        CheckpointError: there is none.
    """
    for name in WEIGHTS_FILES:
        if (folder / name).is_file():
            return folder / name
    raise missing_weights(folder, WEIGHTS_FILES)


def config_dict(config: PeftConfig) -> dict[str, Any]:
    """A configuration of peft as its JSON file has it: lists in place of sets, text in place of enums."""
    plain: dict[str, Any] = json.loads(json.dumps(config.to_dict(), default=sorted))
    return plain


def _checked(config: Mapping[str, Any], where: str) -> PeftSettings:
    """The options that are read.

    Raises:
        CheckpointError: one has a value of another type, or the module is of a type that cannot be moved.
    """
    settings = PeftSettings.of(config, where)
    kind = settings.peft_type
    if kind in _NO_WEIGHTS or not (kind in _registered_types() or _is_known(kind)):
        raise CheckpointError(
            f"PEFT modules of type {kind} cannot be moved",
            where=where,
            expected=f"{', '.join(_registered_types())}, or a type that changes weights",
            fix="train a LoRA in its place",
        )
    return settings


def _is_known(kind: str) -> bool:
    import peft

    return kind in peft.PeftType.__members__


def _registered_types() -> list[str]:
    return [name for codec in CODECS.values() for name in codec.peft_types]


def _saved_modules(head: Mapping[str, Tensor]) -> set[str]:
    # peft wraps whole modules; a head of several layers is saved under its outermost name, the pooler under its own
    return {"pooler" if ".pooler." in f".{path}" else path.split(".")[0] for path in head}


def _todays_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Those options that peft still knows: it warns of others, and ignores them."""
    import peft

    kind = peft.PEFT_TYPE_TO_CONFIG_MAPPING.get(config["peft_type"])
    known = {field.name for field in fields(kind)} if kind else config
    return {name: value for name, value in config.items() if name in known}


def todays_task_type(raw: RawCheckpoint) -> str | None:
    """The ``task_type`` that is written: as it came, but for a classifier that is called a language model.

    trl's users called reward models CAUSAL_LM, as which peft does not load into a classifier any more.
    """
    named: str | None = raw.config.get("task_type")
    renamed = Task.of_peft(named) in (Task.CAUSAL_LM, Task.SEQ2SEQ_LM) and raw.task in TASKS_WITH_HEAD
    return raw.task.peft_type if renamed else named


def saved_beside(path: str, config: Mapping[str, Any]) -> bool:
    """Whether a tensor is of a part of the model that was trained whole and saved with the module.

    Args:
        path: of the tensor. config: of the module, which peft of 2023 wrote without a word of heads.
    """
    # peft compares ends of module names: "classifier" also saves DistilBERT's "pre_classifier"
    names = [*(config.get("modules_to_save") or []), *_HEADS]
    return any(path.endswith(name) or f"{name}." in path for name in names)


def _check_others(others: Mapping[str, Tensor], config: Mapping[str, Any], where: str) -> None:
    for path in others:
        outside = path.endswith((".weight", ".bias")) and not re.search(r"\.\d+\.", path)  # of the layers: a head
        other = foreign_names(others)
        if other or (not outside and not saved_beside(path, config)):
            raise CheckpointError(
                other.what
                if other
                else f"tensor {path} is neither a part of a {config['peft_type']} module nor one of modules_to_save "
                f"({', '.join(config.get('modules_to_save') or []) or 'none'})",
                where=where,
                found=path if other else None,
                fix=other.fix if other else "this kind of module is not supported yet",
            )


def _without_value_head(tensors: Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], tuple[str, ...]]:
    """The tensors but those of a value head, and what is said of it."""
    kept = {key: tensor for key, tensor in tensors.items() if not _VALUE_HEAD.match(key)}
    return kept, (_LEFT_OUT,) if len(kept) < len(tensors) else ()


def _value_head_beside(folder: Path) -> tuple[str, ...]:
    """What is said of a value head in a file of its own."""
    if any((folder / name).is_file() for name in _VALUE_FILES):
        return (_LEFT_OUT,)
    own = folder / _TRL_FILE
    if not own.is_file() or own.stat().st_size > _SMALL:
        return ()
    try:
        return (_LEFT_OUT,) if any(map(_VALUE_HEAD.match, read_tensors(own))) else ()
    except CheckpointError:  # some other file of that name, which is not the module's
        return ()


def _task(settings: PeftSettings) -> Task:
    base_class = settings.auto_mapping.base_model_class if settings.auto_mapping else None
    return Task.of_peft(settings.task_type) or Task.of_class(base_class or "")
