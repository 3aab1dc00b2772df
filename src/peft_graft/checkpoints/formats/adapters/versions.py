"""Files of earlier versions of the library, as it reads them today: names of tensors, settings, a LoRA's scale.

The library decides by the version in a file's configuration, and so does this. The first files name none; those of
adapter-transformers name a bare number, and those of its successor ``adapters.`` and a number.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from packaging.version import InvalidVersion, Version
from torch import Tensor

from peft_graft.errors import CheckpointError
from peft_graft.files import renamed

#: The version whose form is written, and what is read is brought to.
VERSION = "adapters.1.3.0"
#: The settings of a file that holds none.
DEFAULT = "seq_bn"

_PREFIX = "adapters."
#: Names inside keys, in files of adapter-transformers 1 -> those of today.
_NAMES = {
    "attention_text_task_adapters": "adapters",
    "attention_text_lang_adapters": "adapters",
    "layer_text_task_adapters": "adapters",
    "layer_text_lang_adapters": "adapters",
    "invertible_lang_adapters": "invertible_adapters",
}
#: Activations in files without a version -> what they are called today.
_ACTIVATIONS = {"gelu": "gelu_new", "gelu_orig": "gelu"}
#: Settings of a bottleneck adapter that have no default.
_NEEDED = ("mh_adapter", "output_adapter", "reduction_factor", "non_linearity")
#: Before it the library ran LoRA and IA3 without their scale, whatever the settings said.
_SCALED = Version("1.1.0")


def todays_settings(settings: Mapping[str, Any], config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """An adapter's settings as the library changes them when it loads the file.

    Args:
        settings: of the adapter. config: the configuration file that they are in. where: what errors name.

    Raises:
        CheckpointError: a setting or the version is not what any version of the library wrote.
    """
    found = dict(settings)
    if "version" not in config and str(found.get("non_linearity")) in _ACTIVATIONS:
        found["non_linearity"] = _ACTIVATIONS[found["non_linearity"]]
    if inverted := found.pop("invertible_adapter", None):
        if not isinstance(inverted, Mapping) or not {"block_type", "reduction_factor"} <= inverted.keys():
            raise CheckpointError(
                "the settings of the invertible part are not complete",
                where=where,
                expected="invertible_adapter with block_type and reduction_factor",
                found=repr(inverted),
            )
        found["inv_adapter"] = inverted["block_type"]
        found["inv_adapter_reduction_factor"] = inverted["reduction_factor"]
    if found.get("architecture") is None and (missing := [name for name in _NEEDED if name not in found]):
        raise CheckpointError(
            f"the adapter's settings lack {', '.join(missing)}, which no version of the library can do without",
            where=where,
            fix="write them into adapter_config.json under the names of today",
        )
    if found.get("architecture") == "lora":
        found = {"r": 8, "alpha": 8, **found}
        if _is_before(config, _SCALED, where):
            found["alpha"] = found["r"]
    return found


def todays_tensors(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """A file's tensors by the keys that they have today.

    Raises:
        CheckpointError: two of them have one key today.
    """

    def todays(key: str) -> str:
        for old, name in _NAMES.items():
            key = key.replace(old, name)
        return key

    clash = "two tensors of the file are at one place in today's versions of the library"
    return renamed(tensors, todays, where, clash=clash, fix="keep the tensors of one adapter in the file")


def todays_inverse(
    settings: dict[str, Any], config: Mapping[str, Any], tensors: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor], tuple[str, ...]]:
    """Settings and tensors of which both have an invertible part, or none, and remarks on what was left out.

    Settings of the first versions named one for every adapter, and only those of languages had it.
    """
    kept = {key: tensor for key, tensor in tensors.items() if "invertible_adapters." not in key}
    named, found = bool(settings.get("inv_adapter")), len(kept) < len(tensors)
    if named == found or settings.get("architecture") is not None:
        return settings, tensors, ()
    if found:
        return settings, kept, ("the invertible part is left out: the settings name none, so its library loads none",)
    without = {**settings, "inv_adapter": None, "inv_adapter_reduction_factor": None}
    task = config.get("type") == "text_task"
    return without, tensors, () if task else ("the settings name an invertible part, and the file holds none",)


def _is_before(config: Mapping[str, Any], version: Version, where: str) -> bool:
    name = str(config.get("version") or "")
    if not name.startswith(_PREFIX):
        return False
    try:
        return Version(name.removeprefix(_PREFIX)) < version
    except InvalidVersion as error:
        raise CheckpointError(
            "the version of the library that wrote the file cannot be read, and the scale depends on it",
            where=where,
            expected=f"one such as {VERSION}",
            found=name,
            fix="correct version in adapter_config.json",
        ) from error
