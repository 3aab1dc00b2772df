"""Text sources: every file type, columns by name, a random order that depends on the seed alone."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset

from peft_graft.alignment.text import Sample, as_samples, load_rows, read_text
from peft_graft.errors import TextError

ROWS = [{"premise": f"one {i}", "hypothesis": f"two {i}", "tokens": ["a", f"b{i}", "."], "n": i} for i in range(30)]


@pytest.fixture
def folder(tmp_path):
    data = Dataset.from_list(ROWS)
    data.to_parquet(str(tmp_path / "d.parquet"))
    data.to_json(str(tmp_path / "d.jsonl"))
    data.remove_columns("tokens").to_csv(str(tmp_path / "d.csv"), index=False)
    data.remove_columns("tokens").to_csv(str(tmp_path / "d.tsv"), index=False, sep="\t")
    (tmp_path / "d.txt").write_text("\n\n".join(row["premise"] for row in ROWS))
    return tmp_path


@pytest.mark.parametrize("name", ["d.parquet", "d.jsonl", "d.csv", "d.tsv", "d.txt"])
def test_files_are_read_without_a_word_to_any_host(folder, monkeypatch, name: str) -> None:
    asked = []
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("socket.getaddrinfo", lambda *host, **_: asked.append(host))
    odd = folder / f"[1]*{name}"  # which a pattern of names would not find
    (folder / name).rename(odd)
    assert len(list(load_rows(str(odd), streaming=True))) == len(load_rows(str(odd)))
    assert len(list(read_text(odd, ["text" if name == "d.txt" else "premise"]))) == len(ROWS)
    assert not asked


@pytest.mark.parametrize("name", ["d.parquet", "d.jsonl", "d.csv", "d.tsv"])
def test_sentence_pairs_by_name(folder, name: str) -> None:
    found = set(read_text(folder / name, ["premise", "hypothesis"]))
    assert found == {Sample(row["premise"], row["hypothesis"]) for row in ROWS}


@pytest.mark.parametrize("name", ["d.csv", "d.tsv"])
def test_usual_column_names_are_found(folder, name: str) -> None:
    assert set(read_text(folder / name)) == {Sample(row["premise"], row["hypothesis"]) for row in ROWS}


@pytest.mark.parametrize("name", ["d.parquet", "d.jsonl"])
def test_token_lists_become_text(folder, name: str) -> None:
    assert set(read_text(folder / name)) == {Sample(f"a b{i} .") for i in range(30)}


def test_lines_of_a_text_file_without_the_empty_ones(folder) -> None:
    assert {sample.first for sample in read_text(folder / "d.txt")} == {row["premise"] for row in ROWS}


def test_lines_are_read_as_datasets_reads_them(tmp_path) -> None:
    """The same rows in the same order, so that alignments and studies made before go on."""
    (tmp_path / "d.txt").write_bytes("one\r\ntwo\rthree\u2028four\n\n  five\x0b six".encode())
    rows = ['{"text": "one", "n": 1}', "", '{"n": 2, "text": "two"}', '{"n": 3}', '{"text": null}', '{"text": "é"}']
    (tmp_path / "d.jsonl").write_text("\n".join(rows), encoding="utf-8")
    for name in ("d.txt", "d.jsonl"):
        load_rows(str(tmp_path / name)).to_parquet(str(tmp_path / "d.parquet"))
        assert list(read_text(tmp_path / name, seed=3)) == list(read_text(tmp_path / "d.parquet", seed=3))


def test_a_jsonl_file_of_one_array(tmp_path) -> None:
    (tmp_path / "d.jsonl").write_text(json.dumps([{"text": "one"}, {"text": "two"}], indent=1))
    assert {sample.first for sample in read_text(tmp_path / "d.jsonl")} == {"one", "two"}


@pytest.mark.parametrize(("name", "content"), [("d.txt", b"\xff\xfe"), ("d.jsonl", b"{'a'"), ("d.jsonl", b"3\n")])
def test_what_is_no_text_is_refused(tmp_path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TextError, match="the text cannot be read"):
        next(read_text(tmp_path / name))


def test_the_order_is_random_and_reproducible(folder) -> None:
    orders = [[sample.first for sample in read_text(folder / "d.txt", seed=seed)] for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    assert orders[0] != [row["premise"] for row in ROWS]


def test_python_objects() -> None:
    assert list(as_samples(["a b", ("c", "d"), ["e", "f"], Sample("g")])) == [
        Sample("a b"),
        Sample("c", "d"),
        Sample("e f"),
        Sample("g"),
    ]


@pytest.mark.parametrize("value", ["Infinity", "-Infinity", "NaN"])
def test_values_that_would_end_the_process(value: str, tmp_path) -> None:
    (tmp_path / "rows.json").write_text(f'[{value}, {{"text": "Infinity"}}]')
    with pytest.raises(TextError, match=f"the text cannot be read .*{value} is no value of JSON"):
        list(read_text(tmp_path / "rows.json"))
    (tmp_path / "rows.json").write_text('[{"text": "NaN and Infinity"}]')
    assert list(read_text(tmp_path / "rows.json")) == [Sample("NaN and Infinity")]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_a_row_of_thousands_of_columns_would_take_hours(name: str, indent: int | None, tmp_path) -> None:
    row = {"text": "a"} | {f"layer.{number}": number for number in range(4000)}
    (tmp_path / name).write_text(json.dumps(row, indent=indent))
    with pytest.raises(TextError, match="the text cannot be read .*a row has 4,001 columns"):
        load_rows(str(tmp_path / name), streaming=True)


@pytest.mark.parametrize("rows", ['\n null\n{"text": "a"}\n', '[null, {"text": "a"}]', '[ \n null,\n {"text": "a"}]'])
def test_null_for_a_row_would_end_the_process(rows: str, tmp_path) -> None:
    (tmp_path / "rows.json").write_text(rows)
    with pytest.raises(TextError, match="the text cannot be read .*the first row is null"):
        list(read_text(tmp_path / "rows.json"))


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_rows_without_a_bottom_would_end_the_process(name: str, tmp_path) -> None:
    deep, brackets = "[" * 20_000 + "]" * 20_000, "[" * 20_000
    (tmp_path / name).write_text(f'{{"text": "a", "more": {deep}}}\n')
    with pytest.raises(TextError, match="the text cannot be read .*(nested more than 500 deep|recursion depth)"):
        list(read_text(tmp_path / name))
    (tmp_path / name).write_text(f'{{"text": "{brackets}"}}\n')
    assert list(read_text(tmp_path / name)) == [Sample(brackets)]


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_text_in_another_encoding_is_named_by_its_line(tmp_path, suffix: str) -> None:
    file = tmp_path / f"latin.{suffix}"
    row = '{"text": "%s"}' if suffix == "jsonl" else "%s"
    file.write_bytes("\n".join(row % word for word in ("one", "two", "caf\u00e9", "four")).encode("latin-1"))
    with pytest.raises(TextError) as caught:
        list(read_text(file))
    assert str(caught.value).startswith(
        f"{file} line 3: the text cannot be read as UTF-8; found 'utf-8' codec can't decode"
    )
    assert "iconv -f latin1 -t utf-8" in str(caught.value)
