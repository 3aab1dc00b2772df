"""Finding and reading checkpoints of trained modules: local folders, and repositories of the hub."""

from __future__ import annotations

from pathlib import Path

from peft_graft.checkpoints.foreign import no_checkpoint, no_folder
from peft_graft.checkpoints.formats.base import FILES, FORMATS
from peft_graft.checkpoints.raw import RawCheckpoint
from peft_graft.errors import CheckpointError, reason
from peft_graft.files import downloaded
from peft_graft.outputs import kept_aside


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
    if not isinstance(module, str | Path):
        raise CheckpointError(
            "this names no module", expected="a folder, or a hub id owner/name", found=type(module).__name__
        )
    name = str(module)
    try:
        path = Path(module).expanduser()
        if path.is_file():
            raise no_folder(path)
        if not path.is_dir():
            _check_kept_aside(path, name)
            if path.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
                raise CheckpointError(
                    "no such folder",
                    where=name,
                    fix="give the folder that holds adapter_config.json, or a hub id owner/name",
                )
            path = downloaded(name, FILES, CheckpointError, revision=revision, subfolder=subfolder, token=token)
        place = path / subfolder if subfolder else path
        if not place.is_dir():
            raise CheckpointError("no such sub-folder", where=name, found=subfolder, fix="check its name")
    except (OSError, RuntimeError) as error:  # names that are too long, or of a user who is not there
        raise CheckpointError(f"the folder cannot be opened ({reason(error)})", where=name) from error
    return place


def _check_kept_aside(path: Path, name: str) -> None:
    aside = kept_aside(path)
    if aside:
        raise CheckpointError(
            "a run was killed while it replaced this folder",
            where=name,
            found=f"what was there in {aside}",
            fix="start that run again, which brings it back, or move it there",
        )


def read_checkpoint(folder: Path) -> RawCheckpoint:
    """Read a checkpoint in whichever registered format it is.

    Raises:
        CheckpointError: the folder holds no checkpoint of a known format, or one that is damaged or not supported.
    """
    try:
        for known in FORMATS.values():
            if known.detect(folder):
                return known.read(folder)
        raise no_checkpoint(folder)
    except OSError as error:
        raise CheckpointError(f"the folder cannot be read ({reason(error)})", where=str(folder)) from error
