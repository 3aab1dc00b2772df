"""The software and the machine that a result was made with."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from functools import cache

import torch

_PACKAGES = ("peft-graft", "torch", "transformers", "peft", "adapters", "safetensors", "numpy", "scipy", "datasets")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    found = {package: version_of(package) for package in _PACKAGES}
    return {"python": platform.python_version()} | {name: version for name, version in found.items() if version}


@cache
def version_of(package: str) -> str | None:
    """The version of a package, None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def hardware(device: str) -> dict[str, str | int]:
    """The machine that a result was made on."""
    found: dict[str, str | int] = {
        "machine": platform.machine(),
        "system": platform.system(),
        "cpus": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "device": device,
    }
    if device.startswith("cuda"):
        found["gpu"] = torch.cuda.get_device_name(torch.device(device))
    return found
