"""Imports go downward only, and importing has no effects."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import peft_graft

PACKAGE = Path(peft_graft.__file__).parent
#: Modules by level: each may import from lower levels only.
LEVELS = (
    ("errors", "options"),
    ("modules",),
    ("roles", "norms", "pipelining", "placement", "statistics", "text", "token_pairing", "weights"),
    ("rows", "couplings"),
    ("stacked_families",),
    ("families", "task_models"),
    ("architectures", "maps", "formats.raw"),
    ("methods", "heads", "layer_maps", "vocabulary"),
    (
        "alignment",
        "formats.adapterhub_prefix",
        "formats.compacter",
        "formats.peft_lora",
        "formats.peft_prompts",
        "formats.peft_vectors",
    ),
    ("formats.peft_format", "formats.adapterhub", "alignment_files", "projection", "models"),
    ("settings", "entries", "correspondence"),
    ("checkpoints", "conversion"),
    ("activations", "planning", "site_selection", "live", "libraries"),
    ("predictions", "verification", "layout", "caching"),
    ("gathering",),
    ("collecting",),
    ("agreement", "fitting", "sharding", "experts"),
    ("directions", "functional", "polishing", "preflight", "inspection"),
    ("report",),
    ("graft", "aligning"),
    ("teaching",),
    ("transferring",),
    ("experiments.ner", "experiments.packaged_models"),
    ("experiments.tasks",),
    ("experiments.training", "experiments.examples"),
    ("experiments.comparison",),
    ("experiments.demo", "studies.spec"),
    ("studies.data",),
    ("studies.cells",),
    ("studies.runner",),
    ("studies.tables",),
    ("studies.command", "display"),
    ("cli",),
)
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
#: The only modules that may import these libraries when they are imported themselves.
HEAVY = {
    "transformers": {
        "models",
        "task_models",
        "experiments.training",
        "experiments.comparison",
        "experiments.demo",
        "studies.cells",
    },
    "peft": {"formats.peft_format", "formats.peft_lora"},
    "adapters": set(),
    "datasets": set(),
    "onnx": set(),
    "seqeval": set(),
    "ray": set(),
    "matplotlib": set(),
}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def sources() -> dict[str, ast.Module]:
    paths = [path for path in PACKAGE.rglob("*.py") if path.name not in ("__init__.py", "__main__.py")]
    return {name_of(path): ast.parse(path.read_text()) for path in paths}


def imported(tree: ast.AST, *, top_only: bool = False) -> set[str]:
    nodes = tree.body if top_only and isinstance(tree, ast.Module) else ast.walk(tree)
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, "relative imports hide the direction"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_every_module_has_a_level() -> None:
    assert sources().keys() == LEVEL.keys()


def test_imports_go_downward_only() -> None:
    for name, tree in sources().items():
        for other in imported(tree):
            target = other.removeprefix("peft_graft.")
            if other.startswith("peft_graft.") and target in LEVEL:
                assert LEVEL[target] < LEVEL[name], f"{name} imports {target}"


def test_heavy_libraries_are_imported_where_they_belong() -> None:
    for name, tree in sources().items():
        roots = {module.split(".")[0] for module in imported(tree, top_only=True)}
        for library, allowed in HEAVY.items():
            assert library not in roots or name in allowed, f"{name} imports {library}"


def test_no_module_grows_past_reading_in_one_sitting() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 450, path


def test_importing_has_no_effects() -> None:
    script = (
        "import logging, sys, warnings; warnings.simplefilter('error'); before = list(logging.root.handlers);"
        "import peft_graft; [getattr(peft_graft, name) for name in peft_graft.__all__];"
        "assert logging.root.handlers == before;"
        "assert not {'adapters', 'datasets', 'onnx', 'matplotlib'} & set(sys.modules), sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == done.stderr == ""


def test_the_command_is_there_at_once() -> None:
    """Help and mistakes on the command line wait for no library that takes a second to import."""
    script = "import sys, peft_graft.cli.main; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_benchmarks_import_what_there_is() -> None:
    """Nothing else runs them in tests."""
    for path in (Path(__file__).parent.parent / "benchmarks").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "peft_graft":
                module = importlib.import_module(str(node.module))
                for alias in node.names:
                    found = (
                        hasattr(module, alias.name)
                        or f"{node.module}.{alias.name}".removeprefix("peft_graft.") in LEVEL
                    )
                    assert found, f"{path.name}: {node.module} has no {alias.name}"


def test_the_public_names() -> None:
    assert peft_graft.__all__ == [
        "METHODS",
        "Alignment",
        "Graft",
        "GraftError",
        "GraftReport",
        "PeftCheckpoint",
        "align",
        "inspect",
        "load_alignment",
        "read_checkpoint",
        "save_alignment",
        "transfer",
        "transfer_checkpoint",
    ]
    modules = {path.stem for path in PACKAGE.glob("*.py")}
    for name in peft_graft.__all__:
        assert getattr(peft_graft, name).__class__.__name__ != "module"
        assert name not in modules, f"the module hides peft_graft.{name}"
    with pytest.raises(AttributeError, match="no attribute 'graft_everything'"):
        peft_graft.graft_everything  # noqa: B018
