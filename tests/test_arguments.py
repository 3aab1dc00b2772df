"""Python's arguments: what is sensible is taken, and all else is refused in one clear error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest
import torch
import transformers

import peft_graft
import tiny
from peft_graft import Alignment, Graft, GraftError
from peft_graft.alignment.text import Sample, TextSource, rows_given

LINES = tiny.sentences(40)
PAIRS = [{"premise": line, "hypothesis": line.upper()} for line in LINES]
COPY = {"method": "copy"}


def samples(text: Any, columns: tuple[str, ...] | None = None) -> list[Sample]:
    return list(TextSource(rows_given(text), columns).samples())


@pytest.mark.parametrize(
    "text",
    [
        LINES,
        tuple(LINES),
        iter(LINES),
        [[*line.split(" ")] for line in LINES],
        [{"text": line} for line in LINES],
        [{"tokens": line.split(" ")} for line in LINES],
        pd.DataFrame({"text": LINES, "label": range(40)}),
        pd.Series(LINES),
        datasets.Dataset.from_dict({"text": LINES}),
        datasets.Dataset.from_dict({"text": LINES}).to_iterable_dataset(),
    ],
    ids=lambda text: type(text).__name__,
)
def test_text_in_memory_is_read_row_by_row(text: Any) -> None:
    assert samples(text) == [Sample(line) for line in LINES]


@pytest.mark.parametrize("text", [PAIRS, pd.DataFrame(PAIRS), datasets.Dataset.from_list(PAIRS)])
def test_pairs_are_found_by_their_columns(text: Any) -> None:
    assert samples(text) == [Sample(*row.values()) for row in PAIRS]
    assert samples(text, ("hypothesis",)) == [Sample(row["hypothesis"]) for row in PAIRS]


TEXTS: list[tuple[Any, str]] = [
    (5, "text: this cannot be read as text; expected a file, a hub data set, or strings or rows in a list, a "
        "datasets.Dataset or a pandas.DataFrame, found int"),
    (b"abc", "text: this cannot be read as text; expected a file, a hub data set, or strings or rows in a list, a "
             "datasets.Dataset or a pandas.DataFrame, found bytes"),
    ({"train": LINES, "test": LINES}, "text: a dictionary, such as a data set with several splits, holds no rows; "
                                      "found train, test. Fix: give one split, or a list of rows"),
    ([{"text": "a"}, "b"], "given in memory: a row is none; expected a dict, as the first is, found str"),
    ("Maria moved to Lisbon.", "Maria moved to Lisbon.: no such text file, nor the name of a data set. Fix: give a "
                               "file, a hub data set as owner/name, or in Python a list of strings"),
]  # fmt: skip
NO_TEXT = "given in memory: this is no text; expected strings, pairs of strings or lists of tokens, found {}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *TEXTS,
        ([None], "given in memory: the text is empty. Fix: give a source with at least a few hundred sentences"),
        *(([bad], NO_TEXT.format(type(bad).__name__)) for bad in (5, b"a", ("a", "b", "c"), (1, 2), [1, 2])),
    ],
)
def test_what_is_no_text_is_named(text: Any, message: str) -> None:
    with pytest.raises(GraftError) as caught:
        samples(text)
    assert str(caught.value) == message


WRONG: dict[str, tuple[Callable[[Path, Any], Any], str]] = {
    "adapter": (
        lambda world, bad: peft_graft.transfer(bad, world / "shallow"),
        "not a trained module; expected a folder, a hub id, or a peft.PeftModel, found {}. "
        "Fix: save the module with its library and give the folder",
    ),
    "student": (
        lambda world, bad: peft_graft.transfer(world / "lora", bad),
        "student: this is no model; expected a folder, a hub id, or a live model of transformers, found {}",
    ),
    "teacher": (
        lambda world, bad: peft_graft.transfer(world / "lora", world / "shallow", teacher=bad),
        "teacher: this is no model; expected a folder, a hub id, or a live model of transformers, found {}",
    ),
    "alignment": (
        lambda world, bad: peft_graft.transfer(world / "lora", world / "shallow", alignment=bad),
        "alignment: this is no alignment; expected a folder, a hub id, or a peft_graft.Alignment, found {}",
    ),
    "config": (
        lambda world, bad: peft_graft.transfer(world / "lora", world / "shallow", config=bad),
        "config: this holds no choices for it; expected a GraftConfig or a dict of its fields, found {}",
    ),
    "callbacks": (
        lambda world, bad: peft_graft.transfer(world / "lora", world / "shallow", config=COPY, callbacks=bad),
        "callbacks: these do not watch a run; expected a list of peft_graft.Callback, found {}",
    ),
    "tokenizers": (
        lambda world, bad: peft_graft.transfer(world / "lora", world / "shallow", tokenizers=bad),
        "tokenizers: these are not the tokenizers of two models; expected (teacher's, student's), None for one that "
        "lies where its model does, found {}",
    ),
    "out": (
        lambda world, bad: peft_graft.transfer(world / "lora", world / "shallow", out=bad),
        "out: this names no place; expected a path, found {}",
    ),
    "align": (
        lambda world, bad: peft_graft.align(bad, world / "shallow", text=LINES),
        "teacher: this is no model; expected a folder, a hub id, or a live model of transformers, found {}",
    ),
    "the text of align": (
        lambda world, bad: peft_graft.align(world / "teacher", world / "shallow", text=bad),
        TEXTS[0][1].replace("found int", "found {}"),
    ),
    "evaluate": (
        lambda world, bad: peft_graft.evaluate(bad, text=LINES),
        "this names no module; expected a folder, or a hub id owner/name, found {}",
    ),
    "metrics": (
        lambda world, bad: peft_graft.evaluate(world / "lora", text=LINES, metrics=bad),
        "--metric: no such metric of classes; expected entity-f1, accuracy, found 5",
    ),
    "Graft": (
        lambda world, bad: Graft.from_pretrained(bad),
        "this names no module; expected a folder, or a hub id owner/name, found {}",
    ),
    "Alignment": (
        lambda world, bad: Alignment.from_pretrained(bad),
        "this names no alignment; expected a folder, or a hub id owner/name, found {}",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_argument_of_another_type_is_named(name: str, world: Path) -> None:
    call, message = WRONG[name]
    with pytest.raises(GraftError) as caught:
        call(world, 5)
    assert str(caught.value) == message.format("int")
    found = peft_graft.inspect(world / "lora", 5)  # type: ignore[arg-type]
    assert found.student is not None
    assert found.student.problem == WRONG["student"][1].format("int")


@pytest.mark.parametrize(
    ("verb", "unknown", "fix"),
    [
        ("transfer", "polish", 'write config={"polish": ...}'),
        ("transfer", "student_name", "write student"),
        ("transfer_all", "teachers", "write teacher"),
        ("align", "max_tokens", 'write config={"max_tokens": ...}'),
        ("inspect", "adaptor", "write adapter"),
        ("evaluate", "metric", "write metrics"),
        ("export", "max_rank", 'write config={"max_rank": ...}'),
    ],
)
def test_an_argument_that_there_is_not_is_named_with_the_nearest(verb: str, unknown: str, fix: str) -> None:
    with pytest.raises(GraftError, match=rf"{unknown}: {verb} has no such argument; expected ") as caught:
        getattr(peft_graft, verb)("somewhere", **{unknown: 1})
    assert caught.value.fix == fix


def test_a_dictionary_holds_choices_and_a_graft_is_a_module(world: Path) -> None:
    graft = peft_graft.transfer(world / "lora", world / "shallow", config=COPY)
    assert graft.report.settings.method == "copy"
    with pytest.raises(GraftError, match="--methods: there is no such option.* Fix: write method$"):
        peft_graft.inspect(world / "lora", config={"methods": "copy"})
    onward = peft_graft.transfer(graft, world / "teacher", config=COPY)
    assert (
        onward.checkpoint.modules.keys()
        == peft_graft.transfer(world / "lora", world / "teacher", config=COPY).checkpoint.modules.keys()
    )
    assert peft_graft.inspect(graft, world / "teacher", config=COPY).student is not None


def test_models_align_in_memory_on_text_in_memory(world: Path) -> None:
    student = transformers.AutoModel.from_pretrained(world / "shallow")
    config = {"method": "ridge", "sites": ("attn.value",), "max_tokens": 300}
    text = pd.DataFrame({"text": tiny.sentences(60)})
    live = peft_graft.align(world / "teacher", student, text=text, config=config)
    assert (
        live.digest
        == peft_graft.align(world / "teacher", world / "shallow", text=tiny.sentences(60), config=config).digest
    )
    with pytest.raises(GraftError) as caught:
        peft_graft.align(world / "teacher", world / "shallow", text=LINES, config={"ray": "local"})
    assert str(caught.value) == (
        "text: processes on Ray read the text for themselves; expected a file or a hub data set, found list. "
        "Fix: write it to a file"
    )


# ---- what a prompt and a notebook show -------------------------------------------------------------------------------

HOSTILE = "<script>alert(1)</script> & \x1b[31m \u202e" + "x" * 9_000


@pytest.fixture(scope="module")
def graft(world: Path) -> Graft:
    config = {"method": "ridge", "max_tokens": 600, "polish": 1}
    return peft_graft.transfer(world / "lora", world / "shallow", text=tiny.sentences(120), config=config)


def test_what_is_shown_of_results_is_short(graft: Graft, world: Path) -> None:
    found = peft_graft.inspect(world / "lora", world / "shallow")
    for result in (graft, graft.report, graft.alignment, graft.verdict, found, *graft.report.sites):
        assert len(repr(result)) < 2_000
        assert len(str(result)) < 2_000
        shown = result._repr_html_()
        assert shown.startswith("<table>")
        assert len(shown) < 4_000
    assert graft.verdict.level in graft._repr_html_()
    assert "<a " not in graft._repr_html_(), "there is no page yet"
    assert f"<td><b>student</b></td><td>{world / 'shallow'}</td>" in graft._repr_html_()


def test_what_is_shown_in_notebooks_is_text(graft: Graft) -> None:
    report = graft.report.model_copy(
        update={
            "module_kind": HOSTILE,
            "notes": [HOSTILE],
            "student": graft.report.student.model_copy(update={"name": HOSTILE, "hub_id": None}),
        }
    )
    hostile = Graft(graft.checkpoint, report, None, graft.student)
    for shown in (hostile._repr_html_(), report._repr_html_(), report.student._repr_html_()):
        assert "<script" not in shown
        assert "&lt;script&gt;" in shown
        assert shown.isprintable()
        assert len(shown) < 4_000
    assert torch.is_tensor(next(iter(graft.checkpoint.modules.values())).tensors["A"].values)
