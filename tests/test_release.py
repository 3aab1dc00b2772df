"""What is released: a wheel, built from the source distribution, that works where the repository is not."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import processes

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "peft_graft"
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]


def use(site: Path, module: Path, student: Path) -> None:
    """The installed package, in Python and as a command, in a process that has imported what it needs, for that takes
    long, and nothing of the repository.
    """
    for name in [name for name in sys.modules if name.split(".")[0] == "peft_graft"]:
        del sys.modules[name]
    sys.path[:] = [str(site), *(path for path in sys.path if not Path(path).resolve().is_relative_to(ROOT / "src"))]
    package = importlib.import_module("peft_graft")
    main = importlib.import_module("peft_graft.cli.main").main
    sys.stdout.write(f"{package.__version__}\n")
    for words in (["--version"], ["inspect", str(module), "--student", str(student)]):
        sys.argv = ["peft-graft", *words]
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code, ended.value.code
    used = [found for name, found in sys.modules.items() if name.split(".")[0] == "peft_graft"]
    assert all(str(found.__file__).startswith(str(site)) for found in used), used


def run(*words: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        list(map(str, words)), cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two distributions, of a copy of the files that are under version control."""
    source = tmp_path_factory.mktemp("source")
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines()
    for name in listed:
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, cwd=source, PYTHONPATH="")
    return out


def test_the_wheel_has_every_file_of_the_package(built: Path) -> None:
    names = set(zipfile.ZipFile(built / f"peft_graft-{VERSION}-py3-none-any.whl").namelist())
    there = {
        str(path.relative_to(PACKAGE.parent))
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {"peft_graft/py.typed", "peft_graft/study/corpus/sentences.txt"} <= there
    assert there <= names
    assert all(name in there or ".dist-info/" in name for name in names)


def test_the_source_distribution_has_docs_and_tests(built: Path) -> None:
    with tarfile.open(built / f"peft_graft-{VERSION}.tar.gz") as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    for name in ("LICENSE", "CHANGELOG.md", "CITATION.cff", "docs/index.md", "tests/tiny.py", "mkdocs.yml"):
        assert name in names
    assert not [name for name in names if "__pycache__" in name]


def test_the_wheel_works_without_the_repository(
    built: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    wheel = next(built.glob("*.whl"))
    run(
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-index",
        "--no-compile",
        "--target",
        site,
        wheel,
        cwd=elsewhere,
    )
    assert (site / "bin" / "peft-graft").exists()
    monkeypatch.chdir(elsewhere)
    started = processes.start(use, site, world / "lora", world / "shallow", out=tmp_path / "out", err=tmp_path / "err")
    started.join(120)
    said = (tmp_path / "out").read_text()
    assert started.exitcode == 0, said + (tmp_path / "err").read_text()
    assert said.startswith(f"{VERSION}\npeft-graft {VERSION}\n")
    assert "attn.query" in said


def test_the_version_and_the_licence_stand_in_one_place() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert "version" not in citation, "pyproject.toml has it"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert citation["license"] == project["license"]
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert not [path for path in PACKAGE.rglob("*.py") if f'"{VERSION}"' in path.read_text(encoding="utf-8")]
