"""How the code is kept: files and functions that can be read at once, imports when they are needed, public names.

Which package may import which is a contract of import-linter (``make lint``).
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import peft_graft

PACKAGE = Path(peft_graft.__file__).parent
ROOT = Path(__file__).parent.parent
SOURCES = {path: path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))}
MAX_FILE, MAX_FUNCTION, MAX_PARAMETERS = 450, 60, 8
_REASON = re.compile(r"  # (?!noqa|type:|fmt:)")
#: Libraries that take long to import, and the packages that may do so when they are imported themselves.
LATE = {
    "transformers": {"models", "study"},
    "peft": {"checkpoints", "modules"},
    "adapters": set(),
    "datasets": set(),
    "pandas": {"study"},
    "sklearn": set(),
    "onnx": set(),
    "seqeval": set(),
    "sacrebleu": set(),
    "rouge_score": set(),
    "ray": set(),
    "matplotlib": set(),
}
PUBLIC = [
    "AlignConfig",
    "Alignment",
    "Callback",
    "EvaluateConfig",
    "Evaluation",
    "Export",
    "ExportConfig",
    "Graft",
    "GraftConfig",
    "GraftError",
    "GraftReport",
    "ProgressCallback",
    "ShelfModule",
    "ShelfReport",
    "align",
    "evaluate",
    "export",
    "inspect",
    "register_architecture",
    "register_format",
    "register_method",
    "register_module",
    "transfer",
    "transfer_all",
]


def run(script: str, *arguments: str) -> str:
    """What a script prints in a process of its own, which must end well."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@cache
def trees() -> dict[Path, ast.Module]:
    """The code, parsed once."""
    return {path: ast.parse(source) for path, source in SOURCES.items()}


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function by its place, without those whose ``def`` line carries a comment, which says why."""
    for path, source in SOURCES.items():
        lines = source.splitlines()
        for node in ast.walk(trees()[path]):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not _REASON.search(lines[node.lineno - 1]):
                yield f"{path.relative_to(PACKAGE)} {node.name}", node


def test_no_file_grows_past_reading_in_one_sitting() -> None:
    long = {str(path): len(source.splitlines()) for path, source in SOURCES.items()}
    assert not {path: lines for path, lines in long.items() if lines > MAX_FILE}


def test_no_function_is_long() -> None:
    lengths = {place: (node.end_lineno or 0) - node.lineno + 1 for place, node in functions()}
    assert not {place: lines for place, lines in lengths.items() if lines > MAX_FUNCTION}


def test_no_function_takes_many_parameters() -> None:
    counts = {}
    for place, node in functions():
        names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        counts[place] = len(names) - (names[:1] in (["self"], ["cls"]))
    assert not {place: count for place, count in counts.items() if count > MAX_PARAMETERS}


def test_slow_libraries_are_imported_late() -> None:
    for path, tree in trees().items():
        stage = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for node in tree.body:
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative imports hide the direction"
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for library in {name.split(".")[0] for name in names} & LATE.keys():
                assert stage in LATE[library], f"{path} imports {library}"


def test_the_package_and_its_command_are_there_at_once() -> None:
    """Help and mistakes on the command line wait for no library that takes a second to import."""
    script = """
import sys
from peft_graft.cli.main import main
try:
    main()
except SystemExit as end:
    assert end.code in (0, 2), end.code
slow = {"torch", "transformers", "numpy", *(["pydantic"] if sys.argv[1:] == ["--help"] else [])}
assert not slow & set(sys.modules), slow & set(sys.modules)
"""
    run("import sys, peft_graft; assert not {'torch', 'numpy', 'pydantic'} & set(sys.modules)")
    shown = run(script, "--help")
    assert all(command in shown for command in ("inspect", "transfer", "align", "evaluate", "study", "demo"))
    run(script, "trasnfer")
    assert "--quantization-config" in run(script, "transfer", "--help")


def test_importing_has_no_effects_and_a_small_transfer_imports_what_it_needs(world: Path, tmp_path: Path) -> None:
    """Without scikit-learn, which transformers imports where it is installed, and pandas and scipy.stats with it."""
    script = """
import logging, sys, warnings
sys.modules["sklearn"] = None
before = list(logging.root.handlers)
with warnings.catch_warnings():
    warnings.simplefilter("error")
    import peft_graft
    for name in peft_graft.__all__:
        getattr(peft_graft, name)
assert logging.root.handlers == before
slow = {"datasets", "pandas", "pyarrow", "scipy.stats", "adapters", "onnx", "ray", "seqeval", "aiohttp"}
assert not slow & set(sys.modules), slow & set(sys.modules)
assert "peft" not in sys.modules  # what is refused does not wait for it
from peft_graft.cli.main import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
assert not slow & set(sys.modules), slow & set(sys.modules)
"""
    options = {"student": world / "narrow", "text": world / "text.txt", "method": "prune-align", "out": tmp_path / "g"}
    command = ["transfer", str(world / "lora"), "--max-tokens", "500", "--json"]
    said = run(script, *command, *(word for name, value in options.items() for word in (f"--{name}", str(value))))
    assert said.startswith("{"), "importing prints nothing"


def test_the_picture_of_the_packages_is_of_this_code() -> None:
    pytest.importorskip("grimp")
    spec = importlib.util.spec_from_file_location("picture", ROOT / "docs" / "picture.py")
    assert spec is not None
    assert spec.loader is not None
    picture = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(picture)
    assert picture.PICTURE.read_text(encoding="utf-8") == picture.draw(), "run `make picture`"


def test_benchmarks_import_what_there_is() -> None:
    """Nothing else runs them in tests."""
    for path in (ROOT / "benchmarks").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "peft_graft":
                module = importlib.import_module(str(node.module))
                for alias in node.names:
                    found = hasattr(module, alias.name) or importlib.util.find_spec(f"{node.module}.{alias.name}")
                    assert found, f"{path.name}: {node.module} has no {alias.name}"


def test_the_public_names() -> None:
    assert peft_graft.__all__ == PUBLIC
    modules = {path.stem for path in PACKAGE.glob("*.py")}
    for name in peft_graft.__all__:
        assert getattr(peft_graft, name).__class__.__name__ != "module"
        assert name not in modules, f"the module hides peft_graft.{name}"
        assert name in dir(peft_graft)
    with pytest.raises(AttributeError, match="no attribute 'graft_everything'"):
        peft_graft.graft_everything  # noqa: B018


def test_the_docs_name_files_that_exist() -> None:
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    tables = [line for line in page.splitlines() if line.startswith("|")]
    names = [name for line in tables for name in re.findall(r"`([\w/]+(?:/|\.py))`", line)]
    assert len(names) > 20
    assert not [name for name in names if not (PACKAGE / name).exists() and name != "src/peft_graft/"]
    for doc in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        paths = re.findall(r"`([a-z_]+/[\w/.]+\.(?:py|toml|md))`", doc.read_text(encoding="utf-8"))
        missing = [path for path in paths if not any((root / path).exists() for root in (ROOT, PACKAGE, ROOT / "docs"))]
        assert not missing, f"{doc.name} names what is not there"
    first = {name.split("/")[0].removesuffix(".py") for name in names}
    stages = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert stages - {"__init__", "__main__", "templates"} <= first, "a package that the page does not mention"
