"""Known model families: a file for each group of relatives, which registers their rows."""

from __future__ import annotations

import pkgutil
from importlib import import_module

from peft_graft.errors import ArchitectureError
from peft_graft.models.spec import LINEAR_ROLES, ArchitectureRow

#: By model type and the paths of its layers, which differ between versions of transformers for some types.
_rows: dict[tuple[str, tuple[str, ...]], ArchitectureRow] = {}
_loaded = False


def register_architecture(*rows: ArchitectureRow) -> None:
    """Make model families known; the last row for the same model type and the same paths of layers counts.

    Raises:
        ArchitectureError: a row names no model type or no layers, one stack twice, or a role that does not exist.
    """
    _load_own()  # first, so that a row from outside takes the place of one of the package
    for row in rows:
        _check(row)
        for model_type in row.model_types:
            _rows[model_type, tuple(stack.layers for stack in row.stacks)] = row


def rows_of(model_type: str) -> list[ArchitectureRow]:
    """The rows of a model type: none for an unknown one, several where versions of transformers differ."""
    _load_own()
    return [row for (known, _), row in _rows.items() if known == model_type]


def all_rows() -> list[ArchitectureRow]:
    """Every row once, in the order in which they were registered."""
    _load_own()
    return list({id(row): row for row in _rows.values()}.values())


def _load_own() -> None:
    """Import the files of this folder, once."""
    global _loaded
    if not _loaded:
        _loaded = True
        for file in pkgutil.iter_modules(__path__):
            import_module(f"{__name__}.{file.name}")


def _check(row: ArchitectureRow) -> None:
    name = ", ".join(row.model_types) or "no model type"
    if not row.model_types or not row.stacks:
        raise ArchitectureError("a row needs model types and stacks of layers", where=name)
    stacks = [stack.name for stack in row.stacks]
    if len(set(stacks)) < len(stacks):
        raise ArchitectureError("every stack of a row needs a name of its own", where=name, found=", ".join(stacks))
    for stack in row.stacks:
        unknown = sorted({role.removeprefix("shared.") for role in stack.linears} - set(LINEAR_ROLES))
        if unknown:
            raise ArchitectureError(
                "no such role of a linear layer",
                where=f"{name} {stack.layers}",
                expected=", ".join(LINEAR_ROLES),
                found=", ".join(unknown),
            )
