"""Alignments: the maps between the spaces of two models, found once and used for every module of that pair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from peft_graft.alignment.compose import compose_maps
from peft_graft.alignment.distinct import key_of
from peft_graft.alignment.maps import LinearMap, Selection, SpaceMap
from peft_graft.alignment.methods import METHODS, Diagnostics, Method, Solver
from peft_graft.alignment.moments import PairedStatistics
from peft_graft.errors import AlignmentError, CheckpointError, reason
from peft_graft.files import downloaded, read_json, read_tensors, write_json, write_tensors
from peft_graft.models.fingerprint import hash_tensors
from peft_graft.models.spaces import Space
from peft_graft.modules.base import misfit
from peft_graft.outputs import check_place, written_aside
from peft_graft.record import Stored, html_table

Pair = tuple[Space, Space]  # teacher space, student space
CONFIG, MAPS = "alignment.json", "alignment.safetensors"
_TEXT = "text"  # what MAPS has beside maps
_SEPARATOR = " -> "
_FORMAT = 2  # raised with the way in which models are told apart
_MATRICES = ("reading", "writing", "shift")


class _Sizes(Stored):
    teacher_size: int = Field(ge=1, le=2**31)
    student_size: int = Field(ge=1, le=2**31)


class _File(Stored):
    """``alignment.json``."""

    format_version: int
    method: str
    teacher: str
    student: str
    pairs: dict[str, _Sizes]
    details: dict[str, Any] = {}


@dataclass(frozen=True)
class Alignment:
    """Maps for the pairs of spaces of two models, found once and used for every module of that pair.

    ``teacher`` and ``student`` are fingerprints of the models (``models.fingerprint``); ``details`` records how the
    alignment was made (text, tokens, versions) and ends up in its JSON file. ``seen`` are keys of the texts that it was
    made from (``distinct.key_of``), None where they are not known.
    """

    method: str
    teacher: str
    student: str
    maps: Mapping[Pair, SpaceMap]
    diagnostics: Mapping[Pair, Diagnostics] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    seen: frozenset[int] | None = field(default=None, repr=False)

    def __repr__(self) -> str:
        return f"Alignment({self.method}: {len(self.maps)} pairs of spaces)"

    def _repr_html_(self) -> str:
        found = [value["mean_correlation"] for value in self.diagnostics.values() if "mean_correlation" in value]
        how = [("mean correlation of matched units", f"{sum(found) / len(found):.2f}")] if found else []
        return html_table("Alignment", [("method", self.method), ("pairs of spaces", len(self.maps)), *how])

    def as_stored(self) -> Alignment:
        """The same with maps as exact as files have them, so that what moves through it does so through the file."""
        return replace(self, maps={pair: _as_stored(space_map) for pair, space_map in self.maps.items()})

    @property
    def layers(self) -> str | None:
        """The layer map that it was made with, as ``--layers`` takes it; None where several layers of the teacher go to
        one of the student's, or a model has several stacks."""
        served: dict[int, set[int]] = {}
        for near, far in self.maps:
            if "/" in near.name or "/" in far.name:
                return None
            if far.layer >= 0:
                served.setdefault(far.layer, set()).add(near.layer)
        if sorted(served) != list(range(len(served))) or any(len(layers) > 1 for layers in served.values()):
            return None
        return ",".join(str(*served[layer]) for layer in range(len(served))) or None

    @property
    def digest(self) -> str:
        """A hash of its maps, as they are written."""
        return hash_tensors(
            (f"{self.method} {first.key}{_SEPARATOR}{second.key}{suffix}", tensor)
            for (first, second), space_map in sorted(self.maps.items(), key=lambda item: str(item[0]))
            for suffix, tensor in _tensors(space_map).items()
        )

    def remark(self, judging: Sequence[Sequence[str]]) -> str | None:
        """What is to be said of a verdict by these samples' texts on a graft that moves through these maps."""
        if not judging or not METHODS[self.method].needs_text:
            return None
        if self.seen is None:
            return (
                "the alignment does not say which text it was made from, which may have had what judges the graft in "
                "it; align again, or give other text"
            )
        count = sum(all(key_of(text) in self.seen for text in texts) for texts in judging)
        if not count:
            return None
        return (
            f"the alignment was made from text that has {count} of the {len(judging)} samples that judge the graft in "
            "it, which may flatter the verdict; give other text"
        )

    def map(self, pair: Pair) -> SpaceMap:
        """The map of one pair of spaces.

        Raises:
            AlignmentError: the alignment was made without this pair.
        """
        if pair not in self.maps:
            raise AlignmentError(
                "the alignment lacks this pair of spaces",
                where=f"teacher {pair[0]} -> student {pair[1]}",
                fix="give the --layers and --sites that it was made with, run `peft-graft align` again for these, or "
                "leave --alignment out",
            )
        return self.maps[pair]

    def save_pretrained(self, folder: str | Path, *, force: bool = False) -> None:
        """Write the alignment to a folder: ``alignment.json``, and its maps as ``alignment.safetensors``.

        Raises:
            OutputError: the folder exists and ``force`` is not set, or cannot be written.
        """
        keys = {pair: f"{pair[0].key}{_SEPARATOR}{pair[1].key}" for pair in self.maps}
        check_place(Path(folder), force=force)
        with written_aside(Path(folder), force=force) as staging:
            write_json(
                staging / CONFIG,
                {
                    "format_version": _FORMAT,
                    "method": self.method,
                    "teacher": self.teacher,
                    "student": self.student,
                    "details": dict(self.details),
                    "pairs": {
                        keys[pair]: {
                            "teacher_size": space_map.teacher_size,
                            "student_size": space_map.student_size,
                            **self.diagnostics.get(pair, {}),
                        }
                        for pair, space_map in self.maps.items()
                    },
                },
            )
            tensors = {
                f"{keys[pair]}{suffix}": tensor
                for pair, space_map in self.maps.items()
                for suffix, tensor in _tensors(space_map).items()
            }
            if self.seen is not None:
                tensors[_TEXT] = torch.tensor(sorted(self.seen), dtype=torch.int64)
            write_tensors(staging / MAPS, tensors)

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, revision: str | None = None, token: str | None = None, subfolder: str | None = None
    ) -> Alignment:
        """Read an alignment from a folder or a repository of the hub.

        Raises:
            AlignmentError: there is none, or one of a method that this version does not know.
            CheckpointError: its files are damaged.
        """
        return _read(_located(name, revision, token, subfolder))

    @staticmethod
    def compose(first: Alignment, second: Alignment) -> Alignment:
        """The alignment of A -> C from those of A -> B and B -> C, with no pass over A and C together.

        It is exact where B keeps all that C has of A, as between permutations or rotations of one model; regressions
        are multiplied, each direction on its own. A layer of C is served by the layers of A that serve, in B, the
        layers that serve it. Where several ways lead from one space to another, the first is taken.

        Args:
            first: of A -> B. second: of B -> C, by the same method; or one of them by ``copy``.

        Raises:
            AlignmentError: they do not meet in one model, are by different methods, or share no space of B.
        """
        where = "first and second alignment"
        if first.student != second.teacher:
            raise AlignmentError(
                "the student of the first is not the teacher of the second",
                where=where,
                expected=f"weights with fingerprint {first.student[:12]}",
                found=second.teacher[:12],
                fix="give A -> B, then B -> C, both made with the same B",
            )
        methods = {first.method, second.method} - {"copy"}
        if len(methods) > 1:
            raise AlignmentError(
                "alignments by different methods do not compose",
                where=where,
                expected=f"{first.method} for both",
                found=second.method,
                fix="make one of them again with the other's --method",
            )
        maps: dict[Pair, SpaceMap] = {}
        for (start, middle), before in first.maps.items():
            for (known, end), after in second.maps.items():
                if middle == known and (start, end) not in maps:
                    _check_meeting(middle, before, after)
                    if composed := compose_maps(before, after):
                        maps[start, end] = composed
        if not maps:
            raise AlignmentError(
                "the alignments share no space of the model between, in one direction",
                where=where,
                fix="make both with the same --sites, or with all",
            )
        details = {
            "teacher": first.details.get("teacher"),
            "student": second.details.get("student"),
            "composed": [dict(first.details), dict(second.details)],
        }
        method = next(iter(methods), "copy")
        seen = None if first.seen is None or second.seen is None else first.seen | second.seen
        return Alignment(method, first.teacher, second.student, maps, {pair: {} for pair in maps}, details, seen)


def _check_meeting(space: Space, before: SpaceMap, after: SpaceMap) -> None:
    if before.student_size != after.teacher_size:
        raise AlignmentError(
            "the alignments have this space in different sizes",
            where=str(space),
            expected=before.student_size,
            found=after.teacher_size,
            fix="make both again",
        )


def _located(name: str | Path, revision: str | None, token: str | None, subfolder: str | None) -> Path:
    if not isinstance(name, str | Path):
        raise AlignmentError(
            "this names no alignment", expected="a folder, or a hub id owner/name", found=type(name).__name__
        )
    try:
        folder = Path(name).expanduser()
    except RuntimeError as error:
        raise AlignmentError(f"the folder cannot be opened ({reason(error)})", where=str(name)) from error
    if not folder.is_dir() and str(name).count("/") == 1 and not str(name).startswith((".", "/", "~")):
        folder = downloaded(
            str(name), (CONFIG, MAPS), AlignmentError, revision=revision, subfolder=subfolder, token=token
        )
    return folder / subfolder if subfolder else folder


def _read(folder: Path) -> Alignment:
    if not (folder / CONFIG).is_file() or not (folder / MAPS).is_file():
        raise AlignmentError(
            "the folder holds no alignment",
            where=str(folder),
            expected=f"{CONFIG} and {MAPS}",
            fix="make one with `peft-graft align TEACHER STUDENT --text SOURCE --out DIR`",
        )
    config = read_json(folder / CONFIG)
    file = _File.of(config, str(folder / CONFIG))
    if file.method not in METHODS or file.format_version != _FORMAT:
        raise AlignmentError(
            "the alignment was written by another version",
            where=str(folder),
            found=f"method {file.method!r}, format {file.format_version}",
            fix="make it again with `peft-graft align`",
        )
    tensors = read_tensors(folder / MAPS)
    maps: dict[Pair, SpaceMap] = {}
    diagnostics: dict[Pair, Diagnostics] = {}
    for key, sizes in file.pairs.items():
        first, _, second = key.partition(_SEPARATOR)
        try:
            pair = Space.from_key(first), Space.from_key(second)
            if pair in maps:
                raise ValueError("the pair stands there twice")
            maps[pair] = _map(tensors, key, sizes)
        except (KeyError, ValueError) as error:
            raise CheckpointError(
                f"{CONFIG} and {MAPS} do not fit each other at {key} ({reason(error)})",
                where=str(folder),
                fix="make it again with `peft-graft align`",
            ) from error
        entry = config["pairs"][key]
        diagnostics[pair] = {k: v for k, v in entry.items() if k not in ("teacher_size", "student_size")}
    seen = tensors.get(_TEXT)  # earlier versions wrote none
    known = seen is not None and seen.dtype == torch.int64 and seen.ndim == 1
    texts = frozenset(seen.tolist()) if seen is not None and known else None
    return Alignment(file.method, file.teacher, file.student, maps, diagnostics, file.details, texts)


def _tensors(space_map: SpaceMap) -> dict[str, Tensor]:
    """A map's tensors by the suffix of their key in the file."""
    if isinstance(space_map, LinearMap):
        parts = ((part, getattr(space_map, part)) for part in _MATRICES)
        return {f" {part}": value.float() for part, value in parts if value is not None}
    assert isinstance(space_map, Selection)
    return {"": space_map.indices}


def _as_stored(space_map: SpaceMap) -> SpaceMap:
    if isinstance(space_map, LinearMap):
        return replace(space_map, **{suffix.strip(): value for suffix, value in _tensors(space_map).items()})
    return space_map


def _map(tensors: Mapping[str, Tensor], key: str, sizes: _Sizes) -> SpaceMap:
    """The map of a pair of spaces.

    Raises:
        KeyError, ValueError: its tensors are missing, or have other shapes than its entry says.
    """
    d_t, d_s = sizes.teacher_size, sizes.student_size
    if key in tensors:
        indices = tensors[key]
        if (
            indices.dtype != torch.int64
            or list(indices.shape) != [d_s]
            or not bool(((indices >= -1) & (indices < d_t)).all())
        ):
            raise ValueError(f"expected {d_s} numbers of units below {d_t}")
        return Selection(indices, d_t)
    found = {part: tensors[f"{key} {part}"] for part in _MATRICES if f"{key} {part}" in tensors}
    shapes: dict[str, tuple[str | int, ...]] = {"reading": (d_t, d_s), "writing": (d_s, d_t), "shift": (d_t,)}
    if wrong := misfit(found, shapes):
        raise ValueError(f"its {wrong[0]} has shape {wrong[2]}, expected {wrong[1]}")
    if not all(value.is_floating_point() for value in found.values()):
        raise ValueError("its matrices hold whole numbers")
    return LinearMap(found.get("reading"), found.get("writing"), found["shift"])


def copy_alignment(pairs: Mapping[Pair, tuple[int, int]], teacher: str, student: str) -> Alignment:
    """The alignment of ``copy``: identity maps for ``pairs``, given with their (teacher, student) sizes.

    Raises:
        AlignmentError: a pair of spaces differs in size.
    """
    for (teacher_space, student_space), (teacher_size, student_size) in pairs.items():
        if teacher_size != student_size:
            raise AlignmentError(
                "spaces of different size cannot be copied",
                where=f"teacher {teacher_space} -> student {student_space}",
                expected=f"{teacher_size} units in the student",
                found=student_size,
                fix="use --method prune-align with --text",
            )
    maps = {pair: Selection.identity(sizes[0]) for pair, sizes in pairs.items()}
    return Alignment("copy", teacher, student, maps, seen=frozenset())


def shape_alignment(pairs: Mapping[Pair, tuple[int, int]], teacher: str, student: str) -> Alignment:
    """The alignment of ``fresh``: maps that say how large the student's spaces are, and nothing else."""
    maps = {
        pair: Selection(torch.where(torch.arange(wide) < size, torch.arange(wide), -1), size)
        for pair, (size, wide) in pairs.items()
    }
    return Alignment("fresh", teacher, student, maps, seen=frozenset())


def solve_alignment(
    method: Method,
    statistics: Mapping[Pair, tuple[PairedStatistics, PairedStatistics]],
    teacher: str,
    student: str,
    details: Mapping[str, Any],
) -> Alignment:
    """Solve every pair of spaces with a method that uses text.

    Args:
        statistics: for each pair of spaces those to fit and those of held-out text.
    """
    if method.solve is None:
        raise ValueError(f"{method.name} needs no statistics")
    # Pairs of spaces that are the same tensors share their statistics, and so the solution.
    distinct = {id(moments[0]): moments for moments in statistics.values()}
    solutions = dict(zip(distinct, _solved(method.solve, list(distinct.values())), strict=True))
    solved = {pair: solutions[id(moments[0])] for pair, moments in statistics.items()}
    return Alignment(
        method.name,
        teacher,
        student,
        {pair: space_map for pair, (space_map, _) in solved.items()},
        {pair: diagnostics for pair, (_, diagnostics) in solved.items()},
        details,
    )


def _solved(
    solve: Solver, statistics: Sequence[tuple[PairedStatistics, PairedStatistics]]
) -> list[tuple[SpaceMap, Diagnostics]]:
    """Every problem solved; on a CPU as many at a time as torch has threads, each in one, for they are small."""
    threads = torch.get_num_threads()
    if threads == 1 or any(fit.cross.device.type != "cpu" for fit, _ in statistics):
        return [solve(*moments) for moments in statistics]
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(lambda moments: solve(*moments), statistics))
    finally:
        torch.set_num_threads(threads)
