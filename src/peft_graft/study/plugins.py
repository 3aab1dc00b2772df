"""Python files that a study imports for what they register, such as methods of their own."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from pathlib import Path

from peft_graft.errors import StudyError
from peft_graft.record import Record


class Plugin(Record):
    """A file that registers something, and the hash of its content when the study was read."""

    path: str
    sha256: str


def load_plugin(path: str) -> Plugin:
    """Import a file, once in a process.

    Raises:
        StudyError: it cannot be read, or fails.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise StudyError(f"the plugin cannot be read ({error.strerror})", where=path) from error
    sha256 = hashlib.sha256(content).hexdigest()
    name = f"peft_graft_plugin_{sha256[:16]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise StudyError("the plugin is no Python file", where=path)
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[name]
            raise StudyError(
                f"the plugin fails when it is imported ({type(error).__name__}: {error})", where=path
            ) from error
    return Plugin(path=path, sha256=sha256)
