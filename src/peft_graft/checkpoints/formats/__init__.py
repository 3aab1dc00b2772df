"""Formats of checkpoints: a package or file each, which registers itself, and in it a file for each kind of module."""

from importlib import import_module
from pkgutil import walk_packages

for _found in walk_packages(__path__, f"{__name__}."):
    import_module(_found.name)
