"""Where a model is, and what others call it."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

#: Where huggingface_hub keeps its copies.
_CACHED = re.compile(r"models--([^/\\]+)[/\\]snapshots[/\\][^/\\]+")


def is_folder(name: str) -> bool:
    """Whether a name is a folder's; else transformers takes it for a hub id."""
    return Path(name).is_dir()


def place_of(name: str) -> str:
    """What is found from anywhere: a folder's or file's absolute path, anything else as it is."""
    return os.path.abspath(name) if name and Path(name).exists() else name  # noqa: PTH100 - links are not followed


def hub_id_of(name: str) -> str | None:
    """A model's hub id: its name, or what huggingface_hub or its own configuration call a folder; None without one."""
    if not is_folder(name):
        return _valid(name)
    if cached := _CACHED.search(place_of(name)):
        return _valid(cached[1].replace("--", "/"))
    try:
        config = json.loads((Path(name) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    saved_from = config.get("_name_or_path") if isinstance(config, dict) else None
    return None if not isinstance(saved_from, str) or Path(saved_from).exists() else _valid(saved_from)


def _valid(name: str) -> str | None:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name
