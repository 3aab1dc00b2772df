"""Reading and writing tensors and JSON, never through unrestricted pickle; and copies from the hub."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import pickle
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from peft_graft.errors import CheckpointError, GraftError, OutputError

#: How the system says that there is no room.
FULL = (errno.ENOSPC, errno.EDQUOT)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a .safetensors or .bin file, on the CPU; .bin goes through torch's restricted unpickler.

    Raises:
        CheckpointError: the file is truncated, corrupt, holds anything but tensors, or has values that are not finite.
    """
    try:
        if path.suffix == ".safetensors":
            tensors = load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        first = (str(error).splitlines() or ["no reason given"])[0]
        raise CheckpointError(
            f"the weights cannot be read: the file is truncated, corrupt or not a plain tensor file ({first})",
            where=str(path),
            fix="copy or download the checkpoint again; pickles with code in them are not loaded",
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise CheckpointError("the file holds no plain dictionary of tensors", where=str(path))
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"tensor {name} holds NaN or infinity",
                where=str(path),
                fix="the module's training diverged, or its file is damaged; take an earlier checkpoint",
            )
    return tensors


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as .safetensors, or as .bin for readers that know nothing else.

    What has several names is written once in a .bin, and under each of them where the format allows no sharing.
    """
    try:
        if path.suffix == ".safetensors":
            plain: dict[str, Tensor] = {}
            seen: set[int] = set()
            for name, tensor in tensors.items():
                value = tensor.detach().cpu().contiguous()
                plain[name] = value.clone() if value.data_ptr() in seen else value
                seen.add(plain[name].data_ptr())
            save_file(plain, path, metadata={"format": "pt"})
        else:  # copies, for of a view torch would write all that it looks into
            copies = {id(tensor): tensor.detach().cpu().contiguous().clone() for tensor in tensors.values()}
            torch.save({name: copies[id(tensor)] for name, tensor in tensors.items()}, path)
    except (SafetensorError, RuntimeError) as error:  # both libraries hide the operating system's error in their own
        needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        free = shutil.disk_usage(path.parent).free
        number = re.search(r"\(os error (\d+)\)", str(error))
        code = int(number[1]) if number else errno.ENOSPC if free < needed else errno.EIO
        reason = os.strerror(code) if code != errno.EIO else (str(error).splitlines() or ["write failed"])[0]
        if code in FULL:
            reason += f": more than {needed:,} bytes are needed, {free:,} are free"
        raise OSError(code, reason, str(path)) from error


def downloaded(
    name: str,
    patterns: Sequence[str],
    error: type[GraftError],
    *,
    revision: str | None,
    subfolder: str | None,
    token: str | bool | None,
) -> Path:
    """Some files of a repository of the hub, in a local copy of the repository.

    Args:
        patterns: of the files, in the sub-folder where there is one. error: raised where it cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    start = f"{subfolder.strip('/')}/" if subfolder else ""
    wanted = [f"{start}{pattern}" for pattern in patterns]
    try:
        return Path(snapshot_download(name, revision=revision, token=token, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as reason:
        raise error(
            f"no such folder, and the hub has no such repository or cannot be reached ({type(reason).__name__})",
            where=name,
            fix="check the name, or give a local folder",
        ) from reason


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: the file is not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"the file is not readable JSON ({error})", where=str(path)) from error
    if not isinstance(value, dict):
        raise CheckpointError("the file holds no JSON object", where=str(path), found=type(value).__name__)
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object, keys sorted, so that equal content gives equal files.

    Raises:
        OutputError: see ``json_text``.
    """
    text = json_text(value, str(path), indent=2, sort_keys=True) + "\n"
    path.write_text(text, encoding="utf-8", errors="backslashreplace")  # half a pair of surrogates, as JSON has it


def json_text(value: Any, where: str, **options: Any) -> str:
    """A value as JSON, which has no NaN and no infinity.

    Args:
        where: it is written, for messages. options: of ``json.dumps``.

    Raises:
        OutputError: a number in it is not finite.
    """
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, **options)
    except ValueError as error:
        raise OutputError(
            "a number is not finite, which JSON cannot say",
            where=where,
            found=next(_not_finite(value), str(error)),
            fix="check the models' and the module's weights",
        ) from error


def _not_finite(value: Any, place: str = "") -> Iterator[str]:
    """Where numbers are not finite, as ``verdict.measured.divergence nan``."""
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{place} {value}"
    parts = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    for name, part in parts:
        yield from _not_finite(part, f"{place}.{name}" if place else str(name))


def file_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file directly inside a folder."""
    hashes = {}
    for path in sorted(folder.iterdir()):
        if path.is_file():
            with path.open("rb") as file:
                hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes
