"""Texts, tables and lists as people's programs write them: marks of order, fields too many, rows without a prompt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import peft_graft
import speech
import tiny
from peft_graft import GraftConfig
from peft_graft.alignment.text import first_row, shuffled_rows
from peft_graft.errors import PlanError, TextError
from peft_graft.graft import Graft
from peft_graft.labelled.examples import read_examples
from peft_graft.prompts.read import PromptSource
from peft_graft.shelf import read_list

BOM = "\ufeff"


def test_a_mark_of_byte_order_is_no_part_of_a_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(f"{BOM}hello there\nand you\n", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text(f'{BOM}{{"text": "hello"}}\n{{"text": "you"}}\n', encoding="utf-8")
    (tmp_path / "a.csv").write_text(f"{BOM}text,label\nhello,0\n", encoding="utf-8")
    assert first_row(str(tmp_path / "a.txt")) == {"text": "hello there"}
    assert first_row(str(tmp_path / "a.jsonl")) == {"text": "hello"}
    assert first_row(str(tmp_path / "a.csv")) == {"text": "hello", "label": 0}
    (tmp_path / "list").write_text(f"{BOM}one/a\none/b\n", encoding="utf-8")
    assert [module.adapter for module in read_list(tmp_path / "list")] == ["one/a", "one/b"]


def test_a_list_may_be_one_array(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text(json.dumps(["a", {"adapter": "b", "name": "other"}], indent=1))
    assert [(one.adapter, one.folder) for one in read_list(tmp_path / "list.json")] == [("a", "a"), ("b", "other")]
    (tmp_path / "list.json").write_text('["a", 3]')
    with pytest.raises(PlanError, match=r"not a module.*found 3"):
        read_list(tmp_path / "list.json")
    (tmp_path / "list.json").write_text('["a", ')
    with pytest.raises(PlanError, match="the list cannot be read"):
        read_list(tmp_path / "list.json")


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize(
    "columns",
    [{"text": ["one two", "three"], "n": [1, 2]}, {"text": {"0": "one two", "1": "three"}, "n": {"0": 1, "1": 2}}],
)
def test_a_json_file_may_be_one_object_of_columns(columns: object, indent: int | None, tmp_path: Path) -> None:
    """As ``to_dict`` of datasets and pandas make it."""
    file = tmp_path / "a.json"
    file.write_text(json.dumps(columns, indent=indent))
    assert [row for _, row in sorted(shuffled_rows(str(file), 0))] == [
        {"text": "one two", "n": 1},
        {"text": "three", "n": 2},
    ]


def test_prompts_in_columns_are_read_and_one_conversation_is_one(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    for found in ({"prompt": ["hi", "you"], "completion": ["ho", "me"]}, {"messages": turns}, {"messages": [turns]}):
        file.write_text(json.dumps(found))
        source = PromptSource.of(str(file))
        assert source is not None
        assert ("hi", "ho") in [(prompt.text, prompt.answer) for prompt in source.prompts()]
    file.write_text(json.dumps({"prompt": ["hi", "you"], "completion": ["ho"]}))
    with pytest.raises(TextError, match="differ in length.*found 2 of prompt, 1 of completion. Fix: fill"):
        PromptSource.of(str(file))


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_a_text_with_the_separator_in_it_is_not_cut(suffix: str, tmp_path: Path) -> None:
    mark, file = {"csv": ",", "tsv": "\t"}[suffix], tmp_path / f"a.{suffix}"
    file.write_text(f"text{mark}label\n" + "".join(f"one{mark} two{mark}{label}\n" for label in (0, 1)))
    with pytest.raises(TextError, match="more fields than the first line has names; expected text, label"):
        first_row(str(file))
    with pytest.raises(TextError, match="more fields than the first line has names"):
        read_examples(str(file), "sequence-classification")
    file.write_text(f'text{mark}label\n"one{mark} two"{mark}0\n')
    assert first_row(str(file)) == {"text": f"one{mark} two", "label": 0}


@pytest.mark.parametrize("labels", [["0", "1", "2"], [0.0, 1.0, 2.0], [0, 1, 2]])
def test_numbers_of_classes_may_be_text_or_floats(labels: list[object]) -> None:
    rows = [{"text": "x", "label": label} for label in labels]
    names = ("a", "b", "c")
    assert [one.label for one in read_examples(rows, "sequence-classification", labels=names)] == ["a", "b", "c"]
    own = [{"text": "x", "label": "1"}]
    assert read_examples(own, "sequence-classification", labels=("1", "2"))[0].label == "1", "a name of its own"


def test_rows_without_a_prompt_are_counted(speakers: Path, tmp_path: Path) -> None:
    words = speech.words(100)
    rows = [{"prompt": word} for word in words] + [{"text": word} for word in words[:30]] + [{"prompt": None}] * 4
    (tmp_path / "mixed.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = GraftConfig(format=speech.FORMAT, max_new_tokens=8, polish=4)
    given = speakers / "module", speakers / "stranger"
    expected = f"34 rows of {tmp_path / 'mixed.jsonl'} without a prompt left out"
    planned = peft_graft.inspect(*given, text=tmp_path / "mixed.jsonl", config=config).student
    assert expected in planned.notes
    assert planned.prompts.prompts == 100
    assert expected in peft_graft.transfer(*given, text=tmp_path / "mixed.jsonl", config=config).report.notes


@pytest.mark.parametrize("in_memory", [True, False])
def test_columns_of_no_usual_name_are_asked_for_as_those_of_prompts(
    in_memory: bool, speakers: Path, tmp_path: Path
) -> None:
    rows = [{"question": word} for word in speech.words(80)]
    (tmp_path / "q.csv").write_text("\n".join(["question", *(row["question"] for row in rows)]))
    given = speakers / "module", speakers / "stranger"
    text = rows if in_memory else tmp_path / "q.csv"
    expected = "expected prompt, messages, .*; or, of plain text, text or .*found question. Fix: name the prompt's"
    with pytest.raises(TextError, match=expected):
        peft_graft.transfer(*given, text=text, config=GraftConfig(format=speech.FORMAT))
    assert "expected prompt, messages" in peft_graft.inspect(*given, text=text).student.problem
    named = GraftConfig(format=speech.FORMAT, columns=("question",), max_new_tokens=8)
    assert peft_graft.inspect(*given, text=text, config=named).student.prompts.prompts == len(rows)


def test_inspect_says_where_the_text_is_too_little_to_compare_methods(world: Path, tmp_path: Path) -> None:
    (tmp_path / "few.txt").write_text("\n".join(tiny.sentences(30)))
    found = peft_graft.inspect(world / "lora", world / "narrow", text=tmp_path / "few.txt").student
    assert found.problem is None or "too short" in found.problem
    (tmp_path / "few.txt").write_text("\n".join([" ".join(tiny.sentences(40, seed=9))] * 1 + tiny.sentences(30)))
    found = peft_graft.inspect(world / "lora", world / "shallow", text=tmp_path / "few.txt").student
    assert any("30 samples of text are too few" in note or "31 samples" in note for note in found.notes)
    assert found.method.startswith("copy, if the student shares the teacher's word embeddings, else prune-align")


@pytest.mark.parametrize("composed", [False, True])
def test_an_alignment_brings_its_layers(world: Path, tmp_path: Path, composed: bool) -> None:
    """Those between the ends of a chain cannot be known from anything else."""
    texts = tiny.sentences(120)
    options = {"text": texts, "method": "procrustes", "max_tokens": 600}
    if composed:
        there = tiny.align(world / "teacher", world / "shallow", **options)
        back = tiny.align(world / "shallow", world / "teacher", **options)
        found, student, layers = peft_graft.Alignment.compose(there, back), world / "teacher", "0,0,1,1"
    else:
        found, student, layers = tiny.align(
            world / "teacher", world / "shallow", layers="1,3", **options
        ), world / "shallow", "1,3"  # fmt: skip
    assert found.layers == layers
    graft = tiny.transfer(world / "lora", student, teacher=world / "teacher", alignment=found, polish=0)
    assert [",".join(map(str, one)) for one in graft.report.layers] == layers.split(",")


def test_modules_for_features_have_a_pipeline(world: Path, tmp_path: Path) -> None:
    tiny.peft_lora(tmp_path / "features", world / "teacher", task="base")
    tiny.transfer(tmp_path / "features", world / "shallow", method="copy", polish=0, out=tmp_path / "graft")
    (tokens,) = Graft.from_pretrained(tmp_path / "graft").pipeline()("river mountain")
    assert len(tokens[0]) == 32
