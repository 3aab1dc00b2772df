"""Reading and writing tensors and JSON, never through unrestricted pickle; and copies from the hub."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from peft_graft.errors import CheckpointError, GraftError, OutputError, reason
from peft_graft.hub import local_only

#: What JSON of a checkpoint may take at most, and how deep it may be nested.
_MOST_JSON, _DEEPEST = 32 << 20, 64
#: In which values are kept: floating point of two bytes and more, and what counts.
_DTYPES = (
    *(torch.float32, torch.float16, torch.bfloat16, torch.float64),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)
#: First bytes of what is taken for a file of tensors now and then -> what it is, and what to do.
_BEGINNINGS = {
    b"version https://git-lfs": ("it is a pointer of git-lfs, not the file", "run `git lfs pull` in its repository"),
    b"<!doctype": ("it is a web page, not the file", "download the file itself"),
    b"<html": ("it is a web page, not the file", "download the file itself"),
    b"gguf": ("it is a GGUF file of llama.cpp", "give the checkpoint of peft that it was converted from"),
}

#: How the system says that there is no room.
FULL = (errno.ENOSPC, errno.EDQUOT)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a .safetensors or .bin file, on the CPU; .bin goes through torch's restricted unpickler.

    Raises:
        CheckpointError: the file is truncated, corrupt, holds anything but ordinary tensors by name, tensors larger
            than the file itself, or values that are not finite.
    """
    try:
        if path.suffix == ".safetensors":
            tensors = load_file(path)
        else:
            _check_archive(path)
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of a damaged file the two libraries raise what comes
        what, fix = _begun_as(path) or (
            f"the file is truncated, corrupt or not a plain tensor file ({reason(error)})",
            "copy or download the checkpoint again; pickles with code in them are not loaded",
        )
        raise CheckpointError(f"the weights cannot be read: {what}", where=str(path), fix=fix) from error
    if not isinstance(tensors, dict):
        raise CheckpointError(
            "the file holds no plain dictionary of tensors", where=str(path), found=type(tensors).__name__
        )
    odd = [f"{name} ({type(value).__name__})" for name, value in tensors.items() if not _is_tensor(name, value)]
    if odd:
        raise CheckpointError(
            "the file holds no plain dictionary of tensors",
            where=str(path),
            found=", ".join(odd[:5]),
            fix="save the module's tensors alone, by name, without what training kept beside them",
        )
    for name, tensor in tensors.items():
        _check_tensor(name, tensor, str(path))
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _check_archive(path: Path) -> None:
    """Refuse an archive of torch that unpacks to more than it is.

    Raises:
        ValueError: it does; torch itself writes none that is compressed.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if sum(part.file_size for part in archive.infolist()) > path.stat().st_size:
                raise ValueError("it is compressed, or unpacks to more than there is")


def _begun_as(path: Path) -> tuple[str, str] | None:
    """What a file is by its first bytes, and what to do; None where they are those of no known other kind."""
    try:
        with path.open("rb") as file:
            start = file.read(64).lower()
    except OSError:
        return None
    return next((found for sign, found in _BEGINNINGS.items() if start.lstrip().startswith(sign)), None)


def _is_tensor(name: object, value: object) -> bool:
    return isinstance(name, str) and type(value) in (Tensor, torch.nn.Parameter)


def _check_tensor(name: str, tensor: Tensor, where: str) -> None:
    """Refuse a tensor without values of its own, or of a kind in which nothing is computed.

    Raises:
        CheckpointError: it is one.
    """
    kind = str(tensor.dtype).removeprefix("torch.")
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized or tensor.is_nested:
        kind = "on the meta device, without values" if tensor.is_meta else f"{tensor.layout} of {kind}"
    elif tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
        raise CheckpointError(
            f"tensor {name} has fewer values in the file than its shape {list(tensor.shape)} says",
            where=where,
            fix="save it again with .contiguous(), or take the file as damaged",
        )
    elif tensor.dtype in _DTYPES:
        if bool(torch.isfinite(tensor).all()):
            return
        raise CheckpointError(
            f"tensor {name} holds NaN or infinity",
            where=where,
            fix="the module's training diverged, or its file is damaged; take an earlier checkpoint",
        )
    raise CheckpointError(
        f"tensor {name} is no ordinary tensor",
        where=where,
        expected="values of float32, float16 or bfloat16, one after the other",
        found=kind,
        fix="save it again with .to_dense() and .to(torch.bfloat16), on the CPU",
    )


def renamed(
    tensors: Mapping[str, Tensor], name_of: Callable[[str], str], where: str, *, clash: str, fix: str
) -> dict[str, Tensor]:
    """A file's tensors by other names.

    Args:
        clash, fix: what is said where two of them would have one name.

    Raises:
        CheckpointError: two of them would.
    """
    found: dict[str, Tensor] = {}
    origins: dict[str, str] = {}
    for name, tensor in tensors.items():
        new = name_of(name)
        if new in found:
            raise CheckpointError(clash, where=where, found=f"{origins[new]} and {name}", fix=fix)
        found[new], origins[new] = tensor, name
    return found


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
        return Path(snapshot_download(name, revision=revision, token=token, allow_patterns=wanted, **local_only(name)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as reason:
        raise error(
            f"no such folder, and the hub has no such repository or cannot be reached ({type(reason).__name__})",
            where=name,
            fix="check the name, or give a local folder",
        ) from reason


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: the file is not JSON, not an object, or larger or deeper than any that a library writes.
    """
    try:
        if path.exists() and not path.is_file():  # a link to a device has no end
            raise ValueError("it is no file")
        if path.stat().st_size > _MOST_JSON:
            raise ValueError(f"it is larger than {_MOST_JSON >> 20} MiB")
        value = json.loads(path.read_text(encoding="utf-8"))
        if _depth(value) > _DEEPEST:
            raise ValueError(f"it is nested more than {_DEEPEST} deep")
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"the file is not readable JSON ({reason(error)})", where=str(path)) from error
    if not isinstance(value, dict):
        raise CheckpointError("the file holds no JSON object", where=str(path), found=type(value).__name__)
    return value


def _depth(value: Any) -> int:
    """How deep lists and objects are nested, counted no further than matters."""
    level: list[Any] = [[value]]
    depth = -1
    while level and depth <= _DEEPEST:
        inner = chain.from_iterable(outer.values() if isinstance(outer, dict) else outer for outer in level)
        level, depth = [one for one in inner if isinstance(one, dict | list)], depth + 1
    return depth


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


def file_hashes(folder: Path, patterns: Sequence[str] = ("*",)) -> dict[str, str]:
    """SHA-256 of the files directly inside a folder whose names match one of the patterns."""
    hashes = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and any(fnmatch(path.name, pattern) for pattern in patterns):
            with path.open("rb") as file:
                hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes
