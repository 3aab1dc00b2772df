"""Alignments on disk: ``alignment.json`` says what was aligned and how, ``alignment.safetensors`` holds the maps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from peft_graft.alignment.alignment import Alignment
from peft_graft.alignment.maps import LinearMap, Selection, SpaceMap
from peft_graft.alignment.methods import METHODS
from peft_graft.errors import AlignmentError, CheckpointError
from peft_graft.files import read_json, read_tensors, write_json, write_tensors, written_aside
from peft_graft.models.spaces import Space

CONFIG = "alignment.json"
MAPS = "alignment.safetensors"
_SEPARATOR = " -> "
_MATRICES = ("reading", "writing", "shift")


def save_alignment(alignment: Alignment, folder: Path, *, force: bool = False) -> None:
    """Write an alignment to a new folder.

    Raises:
        OutputError: the folder exists and ``force`` is not set, or cannot be written.
    """
    keys = {pair: f"{pair[0].key}{_SEPARATOR}{pair[1].key}" for pair in alignment.maps}
    with written_aside(folder, force=force) as staging:
        write_json(
            staging / CONFIG,
            {
                "format_version": 1,
                "method": alignment.method,
                "teacher": alignment.teacher,
                "student": alignment.student,
                "details": dict(alignment.details),
                "pairs": {
                    keys[pair]: {
                        "teacher_size": space_map.teacher_size,
                        "student_size": space_map.student_size,
                        **alignment.diagnostics.get(pair, {}),
                    }
                    for pair, space_map in alignment.maps.items()
                },
            },
        )
        write_tensors(
            staging / MAPS,
            {
                f"{keys[pair]}{suffix}": tensor
                for pair, space_map in alignment.maps.items()
                for suffix, tensor in _tensors(space_map).items()
            },
        )


def load_alignment(folder: Path) -> Alignment:
    """Read an alignment.

    Raises:
        AlignmentError: the folder holds none, or one of a method that this version does not know.
        CheckpointError: its files are damaged.
    """
    if not (folder / CONFIG).is_file() or not (folder / MAPS).is_file():
        raise AlignmentError(
            "the folder holds no alignment",
            where=str(folder),
            expected=f"{CONFIG} and {MAPS}",
            fix="make one with `peft-graft align TEACHER STUDENT --text SOURCE --out DIR`",
        )
    config = read_json(folder / CONFIG)
    if config.get("method") not in METHODS or config.get("format_version") != 1:
        raise AlignmentError(
            "the alignment was written by another version",
            where=str(folder),
            found=f"method {config.get('method')!r}, format {config.get('format_version')!r}",
            fix="make it again with `peft-graft align`",
        )
    tensors = read_tensors(folder / MAPS)
    maps, diagnostics = {}, {}
    try:
        for key, entry in config["pairs"].items():
            first, _, second = key.partition(_SEPARATOR)
            pair = Space.from_key(first), Space.from_key(second)
            maps[pair] = _map(tensors, key, entry["teacher_size"])
            diagnostics[pair] = {k: v for k, v in entry.items() if k not in ("teacher_size", "student_size")}
        teacher, student = config["teacher"], config["student"]
    except (KeyError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{CONFIG} and {MAPS} do not fit each other ({error})", where=str(folder)) from error
    return Alignment(config["method"], teacher, student, maps, diagnostics, config.get("details", {}))


def _tensors(space_map: SpaceMap) -> dict[str, Tensor]:
    """A map's tensors by the suffix of their key in the file."""
    if isinstance(space_map, LinearMap):
        parts = ((part, getattr(space_map, part)) for part in _MATRICES)
        return {f" {part}": value.float() for part, value in parts if value is not None}
    assert isinstance(space_map, Selection)
    return {"": space_map.indices}


def _map(tensors: Mapping[str, Tensor], key: str, teacher_size: int) -> SpaceMap:
    if key in tensors:
        return Selection(tensors[key], teacher_size)
    reading, writing = (tensors.get(f"{key} {part}") for part in ("reading", "writing"))
    return LinearMap(reading, writing, tensors[f"{key} shift"])
