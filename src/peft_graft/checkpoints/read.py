"""Finding and reading checkpoints of trained modules: local folders, and repositories of the hub."""

from __future__ import annotations

from pathlib import Path

from peft_graft.checkpoints.formats.base import FORMATS
from peft_graft.checkpoints.raw import RawCheckpoint
from peft_graft.errors import CheckpointError
from peft_graft.files import downloaded
from peft_graft.outputs import kept_aside

_CONFIG = "adapter_config.json"
#: Files that belong to a module, whatever its format.
_FILES = ("*.json", "adapter*", "pytorch_*", "model_head*", "value_head*")


def locate(
    module: str | Path,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
) -> Path:
    """The local folder of a module: a path, or a repository of the hub, which is downloaded.

    Args:
        module: folder, or hub id. revision: branch, tag or commit of the repository. subfolder: where in the folder or
            repository the module is. token: of the hub.

    Raises:
        CheckpointError: no such folder, nor a repository that can be reached.
    """
    path = Path(module).expanduser()
    name = str(module)
    if not path.is_dir():
        aside = kept_aside(path)
        if aside:
            raise CheckpointError(
                "a run was killed while it replaced this folder",
                where=name,
                found=f"what was there in {aside}",
                fix="start that run again, which brings it back, or move it there",
            )
        if path.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
            raise CheckpointError(
                "no such folder",
                where=name,
                fix="give the folder that holds adapter_config.json, or a hub id owner/name",
            )
        path = downloaded(name, _FILES, CheckpointError, revision=revision, subfolder=subfolder, token=token)
    place = path / subfolder if subfolder else path
    if not place.is_dir():
        raise CheckpointError("no such sub-folder", where=name, found=subfolder, fix="check its name")
    return place


def read_checkpoint(folder: Path) -> RawCheckpoint:
    """Read a checkpoint in whichever registered format it is.

    Raises:
        CheckpointError: the folder holds no checkpoint of a known format, or one that is damaged or not supported.
    """
    for known in FORMATS.values():
        if known.detect(folder):
            return known.read(folder)
    names = sorted(path.name for path in folder.iterdir())
    inside = [path.parent.name for path in folder.glob(f"*/{_CONFIG}")]
    raise CheckpointError(
        "the folder holds no module checkpoint",
        where=str(folder),
        expected="adapter_config.json of peft or adapters",
        found=", ".join(names[:8]) or "an empty folder",
        fix=f"give one of its sub-folders: {', '.join(sorted(inside))}" if inside else None,
    )
