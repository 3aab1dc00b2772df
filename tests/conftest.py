"""Shared fixtures: tiny models and modules, made once a session; nothing here needs a network."""

from __future__ import annotations

import gc
import importlib.metadata
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Tests run side by side, a worker for every core: more threads, also of the processes they start, would only wait.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest

# In memory, where there is room for some runs: waiting until files lie safely on a disk took a tenth of the time.
MEMORY = Path("/dev/shm")
if "TMPDIR" not in os.environ and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > 4 << 30:
    tempfile.tempdir = str(MEMORY)

# What takes long to import is imported where it is used: pytest's own process, which only hands out the tests, reads
# this file too, and before any worker is started.

needs_transformers4 = pytest.mark.skipif(
    int(importlib.metadata.version("transformers").split(".")[0]) >= 5,
    reason="transformers 5 keeps experts in one tensor, to which no role leads yet",
)
needs_adapters = pytest.mark.skipif(
    importlib.util.find_spec("adapters") is None, reason="the library adapters is not installed"
)


def pytest_collection_finish() -> None:
    """What is imported stays: looking through it for garbage took a third of the time of tests that build models."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


#: Files whose tests take longest, the longest first.
LONG = (
    *("test_studies", "test_transfer", "test_matrix", "test_families", "test_completions", "test_encoder_decoders"),
    *("test_kinds", "test_distillation", "test_snippets", "test_sharding", "test_mutants", "test_make_prompts"),
    *("test_laws", "test_generation", "test_mixtures", "test_real", "test_release", "test_house", "test_causal"),
    *(
        "test_demo",
        "test_cluster",
        "test_embeddings",
        "test_controls",
        "test_servers",
        "test_default_polish",
        "test_hub",
    ),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, so that no worker is left alone with one of them at the end."""
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONG)))


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Teachers, students, modules and text that many tests read and none writes."""
    import tiny

    root = tmp_path_factory.mktemp("world")
    teacher = tiny.base_model(root / "teacher", "bert", layers=4, hidden=32)
    tiny.base_model(root / "shallow", "bert", layers=2, hidden=32, seed=0)
    tiny.base_model(root / "narrow", "distilbert", layers=2, hidden=24, seed=5, tokens="unigram")
    tiny.base_model(root / "wide", "roberta", layers=6, hidden=48, seed=6, tokens="unigram")
    tiny.peft_lora(root / "lora", teacher)
    if tiny.HAS_ADAPTERS:
        tiny.adapterhub_module(root / "pfeiffer", teacher)
    (root / "text.txt").write_text("\n".join(tiny.sentences()) + "\n", encoding="utf-8")
    return root


@pytest.fixture(scope="session")
def permuted_pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model and a student that computes the same with its units in another order; no test writes them."""
    import transformers

    import tiny

    root = tmp_path_factory.mktemp("pair")
    base = tiny.base_model(root / "base", layers=2)
    student, _ = tiny.permuted(transformers.AutoModel.from_pretrained(base))
    student.save_pretrained(root / "student")
    tiny.tokenizer(root / "student")
    return root


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """``peft-graft`` in this process, for starting one takes longer than what it does in most tests."""
    from peft_graft.cli.main import main

    def called(*arguments: object, code: int = 0, columns: int = 120) -> Any:
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setattr(sys, "argv", ["peft-graft", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        done = capsys.readouterr()
        assert ended.value.code == code, done.out + done.err
        return done

    return called


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A file of sentences that a test may write anew."""
    import tiny

    path = tmp_path / "text.txt"
    path.write_text("\n".join(tiny.sentences(80)))
    return path


@pytest.fixture(scope="session")
def short_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many sentences as small models are aligned on, and too few to ask the teacher by; no test writes it."""
    import tiny

    path = tmp_path_factory.mktemp("short-text") / "text.txt"
    path.write_text("\n".join(tiny.sentences(45)))
    return path


@pytest.fixture(scope="session")
def speakers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Language models with tokenizers of two makes, and a module of the first, that many tests read and none writes.

    Training them takes ten seconds, so one worker does it for all.
    """
    from filelock import FileLock

    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "speakers"
    with FileLock(f"{root}.lock"):
        if not (root / "prompts.jsonl").exists():
            make_speakers(root)
    return root


def make_speakers(root: Path) -> None:
    """What ``speakers`` has, the prompts last."""
    import speech

    teacher = speech.language_model(root / "teacher", speech.byte_level(speech.MERGED), seed=2)
    speech.language_model(root / "stranger", speech.sentence_piece(["ee", "hh"]), seed=3, layers=3, hidden=56, steps=90)
    speech.lora(root / "module", teacher, steps=120)
    speech.prompt_file(root / "prompts.jsonl", speech.words(240))
