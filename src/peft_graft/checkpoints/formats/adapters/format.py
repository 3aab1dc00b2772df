"""AdapterHub's checkpoints (library ``adapters``): configuration and weights of a module, and of the head beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from peft_graft.checkpoints.foreign import missing_weights
from peft_graft.checkpoints.formats.adapters.codec import CODECS, Codec, Saved, on_fused_layer
from peft_graft.checkpoints.formats.adapters.heads import problem_type_of
from peft_graft.checkpoints.formats.adapters.settings import FileSettings, HeadFile, ModuleSettings
from peft_graft.checkpoints.formats.adapters.versions import (
    DEFAULT,
    VERSION,
    todays_inverse,
    todays_settings,
    todays_tensors,
)
from peft_graft.checkpoints.formats.base import (
    FILES,
    Format,
    check_shapes,
    check_tensors,
    check_values,
    register_format,
)
from peft_graft.checkpoints.raw import RawCheckpoint
from peft_graft.checkpoints.student_names import StudentNames
from peft_graft.config import Library
from peft_graft.errors import CheckpointError, DependencyError
from peft_graft.files import file_hashes, read_json, read_tensors, write_json, write_tensors
from peft_graft.labels import declared_names, inverted
from peft_graft.models.architecture import Architecture
from peft_graft.models.spaces import Site
from peft_graft.models.tasks import Task

CONFIG = "adapter_config.json"
HEAD_CONFIG = "head_config.json"
_WEIGHTS = {".safetensors": "adapter.safetensors", ".bin": "pytorch_adapter.bin"}
_HEAD_WEIGHTS = {".safetensors": "model_head.safetensors", ".bin": "pytorch_model_head.bin"}

#: Settings of all kinds under which the weights mean something else.
_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "inv_adapter": (None, "", "nice"),  # the library's "glow" cannot be run on text
    "use_dora": (False, None),
    "vera_d": (None,),
    "vera_b": (None,),
    "stochastic_depth": (0, 0.0, None),
}


@register_format
class AdaptersFormat(Format):
    """AdapterHub's checkpoints, in the file type of the original: the library's default loader reads .bin."""

    library: ClassVar = Library.ADAPTERS
    loading_template: ClassVar = "load_adapters.py.jinja"

    def detect(self, folder: Path) -> bool:
        """Whether a folder holds an AdapterHub checkpoint of any kind."""
        if not (folder / CONFIG).is_file():
            return False
        config = read_json(folder / CONFIG)
        return "peft_type" not in config and "config" in config and "model_type" in config

    def read(self, folder: Path) -> RawCheckpoint:
        """The module in a folder and the head beside it."""
        config = read_json(folder / CONFIG)
        FileSettings.of(config, str(folder / CONFIG))
        _codec(module_config(config, str(folder / CONFIG)), str(folder / CONFIG))
        weights, suffix = _find(folder, _WEIGHTS)
        if weights is None:
            raise missing_weights(folder, list(_WEIGHTS.values()))
        raw = self.parse(config, read_tensors(weights), where=str(weights))
        head_weights, _ = _find(folder, _HEAD_WEIGHTS)
        about = folder / HEAD_CONFIG
        head_config = read_json(about) if about.is_file() else None
        head = HeadFile.of(head_config or {}, str(about))
        task = Task.of_class(str(head.model_class)) if head_config else Task.BASE
        return replace(
            raw,
            task=task if raw.task is Task.BASE else raw.task,
            head=_head(read_tensors(head_weights), head_config) if head_weights and head_config else {},
            head_config=head_config,
            labels=_labels(head_config),
            problem_type=problem_type_of(head_config),
            files=file_hashes(folder, FILES),
            weights_suffix=suffix,
        )

    def parse(
        self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], *, where: str = "the module"
    ) -> RawCheckpoint:
        """A module from memory, without a head; one of an earlier version as the library loads it today."""
        file = FileSettings.of(config, where)
        check_tensors(tensors, where)
        check_values({file.name or "the module": tensors}, where)
        settings, found = module_config(config, where), todays_tensors(tensors, where)
        settings, found, notes = todays_inverse(settings, config, found)
        ModuleSettings.of(settings, where)
        codec = _codec(settings, where)
        _check_options(codec, settings, where)
        name = file.name or "default"
        parts, now = codec.parts(Saved(found, settings, name, file.hidden_size or 0, where))
        check_shapes(parts, where)
        return RawCheckpoint(
            library=self.library,
            kind=codec.kind,
            name=name,
            base_model=file.model_name or None,
            task=Task.of_class(file.model_class or ""),
            config={**config, "config": now, "version": VERSION},
            parts=parts,
            notes=notes,
            weights_suffix=".bin",
        )

    def build(self, raw: RawCheckpoint, names: StudentNames) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The module alone; ``build_head`` gives its head."""
        settings, codec = dict(raw.config["config"]), CODECS[raw.kind]
        layers = {codec.layer(path, names) for path in raw.parts}
        settings["leave_out"] = sorted(set(range(names.num_layers)) - layers)
        written = codec.settings(raw, settings, names)
        return {**raw.config, **_model_fields(raw, names), "config": written}, codec.tensors(raw, written, names)

    def build_head(self, raw: RawCheckpoint, names: StudentNames) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """Configuration and tensors of the head's files, None without a head."""
        if not raw.head or not raw.head_config:
            return None
        name = raw.head_config.get("name")
        start = f"heads.{name}."
        tensors = {re.sub(r"^layers\.", lambda _: start, key): tensor for key, tensor in raw.head.items()}
        return {**_named(raw.head_config, raw.labels), **_model_fields(raw, names), "version": VERSION}, tensors

    def tensors_in_model(self, raw: RawCheckpoint, names: StudentNames) -> dict[str, Tensor]:
        """All tensors of a checkpoint, module and head, by their keys in its files, which are those of the model."""
        head = self.build_head(raw, names)
        return self.build(raw, names)[1] | (head[1] if head else {})

    def write(self, folder: Path, raw: RawCheckpoint, names: StudentNames) -> None:
        """Write the module's two files, and two more for a head."""
        config, tensors = self.build(raw, names)
        write_json(folder / CONFIG, config)
        write_tensors(folder / _WEIGHTS[raw.weights_suffix], tensors)
        if head := self.build_head(raw, names):
            write_json(folder / HEAD_CONFIG, head[0])
            write_tensors(folder / _HEAD_WEIGHTS[raw.weights_suffix], head[1])

    def check_site(self, path: str, sites: Sequence[Site], architecture: Architecture) -> None:
        """Refuse fused layers, on which the library has modules of some projections only."""
        linears = [architecture.row.linears.get(site.role) for site in sites]
        if any(linear and linear.fused for linear in linears):
            raise on_fused_layer(path)


def module_config(config: Mapping[str, Any], where: str = CONFIG) -> dict[str, Any]:
    """The adapter's own settings as today's library has them; identifiers such as ``seq_bn`` are looked up in it.

    Raises:
        DependencyError: the file names an identifier and ``adapters`` is not installed.
        CheckpointError: the settings are neither an identifier that the library knows nor a mapping.
    """
    settings = DEFAULT if config["config"] is None else config["config"]
    if isinstance(settings, str):
        settings = _identified(settings, where)
    if not isinstance(settings, Mapping):
        raise CheckpointError("the adapter's settings are missing", where=where, found=repr(settings))
    return todays_settings(settings, config, where)


def _identified(name: str, where: str) -> dict[str, Any]:
    """The settings that the library keeps under a name, with what follows it in brackets changed."""
    try:
        from adapters import ADAPTER_CONFIG_MAP, AdapterConfig
    except ImportError as error:
        raise DependencyError(
            f"the adapter's configuration is the identifier {name!r}, which only the library adapters knows",
            where=where,
            fix="pip install 'peft-graft[adapters]'",
        ) from error
    try:
        if name.partition("[")[0] not in ADAPTER_CONFIG_MAP:  # the library would look for a file of that name
            raise ValueError(name)
        found: dict[str, Any] = AdapterConfig.load(name).to_dict()
    except Exception as error:  # of a text that is none the library raises what comes
        raise CheckpointError(
            "the adapter's configuration is an identifier that the library adapters does not know",
            where=where,
            expected=", ".join(ADAPTER_CONFIG_MAP),
            found=name,
            fix="replace it with the settings themselves, which the library's save_adapter writes",
        ) from error
    return found


def written_tensors(folder: Path, raw: RawCheckpoint) -> dict[str, Tensor]:
    """All tensors of a written checkpoint, module and head, by their keys in the library's model."""
    tensors = read_tensors(folder / _WEIGHTS[raw.weights_suffix])
    return tensors | (read_tensors(folder / _HEAD_WEIGHTS[raw.weights_suffix]) if raw.head else {})


def _codec(settings: Mapping[str, Any], where: str) -> Codec:
    """What reads modules of these settings.

    Raises:
        CheckpointError: nothing does.
    """
    codec = next((codec for codec in CODECS.values() if codec.claims(settings)), None)
    if codec is None:
        raise CheckpointError(
            f"AdapterHub modules of architecture {settings.get('architecture')!r} are not supported yet",
            where=where,
            expected="a bottleneck adapter, LoRA, IA3 or a prefix",
        )
    return codec


def _check_options(codec: Codec, settings: Mapping[str, Any], where: str) -> None:
    """Refuse settings that change what the weights mean.

    Raises:
        CheckpointError: there is one.
    """
    for option, harmless in {**_UNSUPPORTED, **codec.unsupported}.items():
        if option in settings and settings[option] not in harmless:
            raise CheckpointError(
                f"{codec.kind} modules with {option}={settings[option]!r} are not supported yet", where=where
            )


def _find(folder: Path, names: Mapping[str, str]) -> tuple[Path | None, str]:
    for suffix, name in names.items():
        if (folder / name).is_file():
            return folder / name, suffix
    return None, ""


def _head(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """A head's tensors by their places in it; of several in a file those of the one that its configuration names."""
    # Prediction heads: heads.NAME.N.weight. Static task heads keep their path in the task model.
    names = {match[1] for key in tensors if (match := re.match(r"heads\.([^.]+)\.", key))}
    own = names if len(names) == 1 else names & {str(config.get("name"))}
    start = f"heads.{own.pop()}." if own else ""
    return {
        f"layers.{key.removeprefix(start)}" if start else key: tensor
        for key, tensor in tensors.items()
        if key.startswith(start)
    }


def _labels(head_config: Mapping[str, Any] | None) -> list[str] | None:
    if not head_config:
        return None
    names = (head_config.get("config") or {}).get("label2id") or head_config.get("label2id")
    return list(declared_names(inverted(names))) or None


def _named(head_config: Mapping[str, Any], labels: Sequence[str] | None) -> dict[str, Any]:
    """The head's configuration with label names, where its library keeps them."""
    if not labels:
        return dict(head_config)
    names = {"label2id": {label: index for index, label in enumerate(labels)}}
    if isinstance(head_config.get("config"), Mapping):  # of a prediction head; that of a task model has none
        return {**head_config, "config": {**head_config["config"], **names}}
    return {**head_config, **names}


def _model_fields(raw: RawCheckpoint, names: StudentNames) -> dict[str, Any]:
    classes = {
        Task.PREDICTION_HEADS: names.base_class.removesuffix("Model") + "AdapterModel",
        Task.BASE: names.base_class,
    }
    return {
        "hidden_size": names.hidden_size,
        "model_class": classes.get(raw.task, names.task_class),
        "model_name": names.name,
        "model_type": names.model_type,
    }
