"""Sources of prompts: which they are, in what order they come, each once, and errors by line."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset

from peft_graft.alignment.text import read_text
from peft_graft.errors import TextError
from peft_graft.prompts.conversation import Prompt
from peft_graft.prompts.read import PromptSource

ROWS = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(30)]
PROMPTS = [Prompt.of_text(row["prompt"], row["completion"]) for row in ROWS]


def source(*given, **options) -> PromptSource:
    found = PromptSource.of(*given, **options)
    assert found is not None
    return found


def lines(folder, *rows: object, name: str = "d.jsonl"):
    path = folder / name
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def texts(found: PromptSource) -> list[str]:
    return [prompt.text for prompt in found.prompts()]


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.csv", "d.parquet"])
def test_files_of_every_type(tmp_path, name: str) -> None:
    data, path = Dataset.from_list(ROWS), str(tmp_path / name)
    {"csv": data.to_csv, "parquet": data.to_parquet}.get(name[2:], data.to_json)(path)
    assert sorted(source(path).prompts(), key=lambda prompt: prompt.key) == sorted(
        PROMPTS, key=lambda prompt: prompt.key
    )


@pytest.mark.parametrize("name", ["d.json", "d.parquet"])
def test_conversations_in_files(tmp_path, name: str) -> None:
    rows = [{"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}]
    if name == "d.json":
        (tmp_path / name).write_text(json.dumps(rows))
    else:
        Dataset.from_list(rows).to_parquet(str(tmp_path / name))
    assert list(source(tmp_path / name).prompts()) == [Prompt.of_text("Q", "A")]


def test_plain_text_is_none_of_ours(tmp_path) -> None:
    (tmp_path / "d.txt").write_text("prompt")
    for plain in (
        tmp_path / "d.txt",
        lines(tmp_path, {"text": "x"}),
        lines(tmp_path, name="empty.jsonl"),
        ["a", "b"],
        [("a", "b")],
        [{"text": "x"}],
        [],
        iter([{"prompt": "x"}]),
    ):
        assert PromptSource.of(plain) is None


def test_an_iterator_of_prompts_is_not_read_as_text() -> None:
    from peft_graft.alignment.text import as_samples

    for first in ({"prompt": "x"}, Prompt.of_text("x")):
        with pytest.raises(TextError, match="this is no text.*give prompts as a list"):
            list(as_samples(iter([first])))


def test_python_objects() -> None:
    found = source([PROMPTS[0], ROWS[1], "question 2"])
    assert sorted(texts(found)) == ["question 0", "question 1", "question 2"]
    assert (found.name, found.key) == ("given in memory", None)
    assert sorted(texts(source(({"q": "a"}, {"q": "b"}), ["q"]))) == ["a", "b"]


def test_the_order_is_that_of_text(tmp_path) -> None:
    path = lines(tmp_path, *ROWS)
    for seed in (0, 3):
        expected = [sample.first for sample in read_text(path, ["prompt"], seed)]
        assert texts(source(path, seed=seed)) == texts(source(str(path), seed=seed)) == expected
        assert texts(source(ROWS, seed=seed)) == expected
    assert texts(source(path, seed=0)) != texts(source(path, seed=3))


def test_the_key_tells_content_columns_and_seed(tmp_path) -> None:
    path = lines(tmp_path, *ROWS)
    keys = {source(path, ["prompt"]).key, source(path, seed=1).key, source(path).key}
    assert len(keys) == 3
    assert source(path).key in keys
    assert source(lines(tmp_path, *ROWS[1:])).key not in keys


def test_duplicates_are_dropped_and_counted() -> None:
    found = source([{"prompt": "Q", "completion": "A"}, {"prompt": "Q", "completion": "B"}, {"prompt": "R"}])
    for _ in range(2):  # counted anew
        assert sorted(texts(found)) == ["Q", "R"]
        assert found.dropped_duplicates == 1


def test_broken_lines_are_named(tmp_path) -> None:
    path = lines(tmp_path, ROWS[0], "", '{"prompt": "x"')
    with pytest.raises(TextError, match=r"d\.jsonl line 3: the text cannot be read \(JSONDecodeError"):
        source(path).prompts()
    with pytest.raises(TextError, match=r"d\.jsonl line 3: the text cannot be read \(JSONDecodeError"):
        list(read_text(path, ["prompt"]))
    with pytest.raises(TextError, match=r"d\.jsonl line 1: the text cannot be read.*no object but int"):
        PromptSource.of(lines(tmp_path, "3"))


def test_bad_rows_are_named(tmp_path) -> None:
    with pytest.raises(TextError, match=r"d\.jsonl line 2 column prompt: content that is not text"):
        list(source(lines(tmp_path, {"prompt": "x"}, {"prompt": 3})).prompts())
    with pytest.raises(TextError, match="given in memory row 2: there is no prompt; expected prompt, .*found text"):
        list(source([{"prompt": "x"}, {"text": "y"}]).prompts())
    with pytest.raises(TextError, match="given in memory row 2: there is no prompt.*found int"):
        list(source([{"prompt": "x"}, 3]).prompts())


def test_no_prompts_at_all(tmp_path) -> None:
    with pytest.raises(TextError, match=r"d\.jsonl: there are no prompts"):
        source(lines(tmp_path, {"prompt": " "}, {"prompt": None})).prompts()
    with pytest.raises(TextError, match="no such text file"):
        PromptSource.of(tmp_path / "other.jsonl")
