"""Published results: lines of records, and the pages that are made from them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from peft_graft.config import StudyConfig
from peft_graft.errors import OutputError, StudyError
from peft_graft.study import command as studies
from peft_graft.study.page import entries_of, main, render
from peft_graft.study.results import export, read_results, write_results

pytestmark = pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="the extra study is missing")
PUBLISHED = ("quality.jsonl", "decoders.jsonl", "controls.jsonl", "texts.jsonl", "kinship.jsonl", "answers.jsonl")
DOCS = Path(__file__).parent.parent.parent / "docs" / "results"


def names(**more) -> dict:
    return {"student": "S", "module": "lora", "task": "ner", "language": "en", **more}


def records() -> list[dict]:
    """A teacher of 0.8, and fresh and grafted students over two seeds."""
    teacher = {"teacher": "T", **names()}
    del teacher["student"]
    found = [{"id": "teacher", "kind": "teacher", "names": teacher, "config": {"model": "/home/me/T"},
              "result": {"score": 0.8, "majority": 0.0, "metric": "entity F1"}}]  # fmt: skip
    verdict = {"measured": {"agreement": 0.7, "divergence": 0.1, "answers": 9}}
    found.append({"id": "graft", "kind": "graft", "names": {"teacher": "T", **names(start="default")},
                  "config": {"teacher": "/home/me/T", "transfer": {"method": "auto", "columns": None}},
                  "result": {"verdict": verdict, "polish": None}})  # fmt: skip
    for seed in (0, 1):
        fresh = {"metric": "entity F1", "before": 0.1, "score": 0.4 + seed / 10, "curve": [[10, 0.2], [20, 0.4]]}
        graft = {**fresh, "before": 0.6, "score": 0.7, "curve": [[10, 0.5], [20, 0.6]]}
        found.append({"id": f"fresh-{seed}", "kind": "student", "names": names(start="fresh", budget=1000, seed=seed),
                      "config": {}, "result": fresh})  # fmt: skip
        moved = {"teacher": "T", **names(start="default", budget=1000, seed=seed)}
        found.append({"id": f"graft-{seed}", "kind": "student", "names": moved, "needs": {"graft": "graft"},
                      "config": {}, "result": graft})  # fmt: skip
    return found


def test_a_page_is_made_where_nothing_was_watched_and_the_teacher_is_no_better_than_one_class() -> None:
    found = [{**one, "study": "mine", "result": {**one["result"], "majority": 0.8, "curve": []}} for one in records()]
    page = render("<!-- comparison: mine -->\n<!-- /comparison -->\n", found)
    assert "majority class 0.800" in page
    assert "| default | 2 |" in page


def test_results_are_replaced_whole_by_one_process_at_a_time(tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "results.jsonl"
    export(records(), file, study="mine")
    before = file.read_bytes()

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", stopped)
        write_results([], file)
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["results.jsonl"]
    with pytest.raises(OutputError, match="cannot be written"):
        studies.study(None, paper="matching", config=StudyConfig(export=str(file / "x")))


def test_exported_results_come_back_once_and_name_no_path(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    alignment = {"id": "alignment", "kind": "alignment", "names": {}, "config": {}, "result": {}}
    assert export([*records(), alignment], file, study="mine") == 6
    assert export(records(), file, study="other") == 0
    found = read_results(file)
    assert [record["id"] for record in found] == [record["id"] for record in records()]
    assert {record["study"] for record in found} == {"mine"}
    assert "/home/me" not in file.read_text()
    assert found[1]["config"] == {"transfer": {"method": "auto"}}


def test_a_page_is_filled_between_its_marks(tmp_path: Path) -> None:
    file, page = tmp_path / "results.jsonl", tmp_path / "page.md"
    export(records(), file, study="mine")
    page.write_text(
        "Before.\n<!-- comparison: mine -->\nold\n<!-- /comparison -->\nBetween.\n"
        "<!-- tables: mine -->\n<!-- /tables -->\n<!-- scores: mine -->\n<!-- /scores -->\nAfter.\n"
    )
    main([str(file), str(page), "--curves", str(tmp_path / "curves.svg")])
    text = page.read_text()
    assert "old" not in text
    assert text.startswith("Before.\n<!-- comparison: mine -->\n| start |")
    assert text.endswith("<!-- /scores -->\nAfter.\n")
    assert "| fresh | 0.100 ± 0.000 (2) |  | 0.450 ± 0.071 (2) |  | | |" in text
    # shares: (0.6 - 0.1) / 0.7 without labels, (0.7 - 0.45) / 0.35 with 1,000
    assert "### " in text
    assert "| default | 60.0 ± 0.0 | +50.0 | +71% |  |" in text
    row = "| default | 0.600 ± 0.000 (2) |  | 0.700 ± 0.000 (2) |  | +0.71 / – / +0.71 | 10 |"
    assert row in text
    assert "| default | 2 | 0 of 2 | 2 of 2 | +0.71 | 0.75 |  |" in text
    before = text
    main([str(file), str(page)])
    assert page.read_text() == before


def test_what_a_page_cannot_show_is_said(tmp_path: Path) -> None:
    mine = [{**record, "study": "mine"} for record in records()]
    known = "comparison, scores, lift, lifts, prices, ablation, tables"
    with pytest.raises(StudyError, match=f"unknown mark; expected {known}"):
        render("<!-- figure: mine -->\n<!-- /figure -->", mine)
    with pytest.raises(StudyError, match="<!-- scores: other -->: the results have no student of this study"):
        render("<!-- scores: other -->\n<!-- /scores -->", mine)
    with pytest.raises(StudyError, match="graft-0: the results have no record of its teacher"):
        entries_of(mine[1:])
    file = tmp_path / "results.jsonl"
    file.write_text('{"id": "x"}\n')
    with pytest.raises(StudyError, match="line 1: not the record of a cell; expected kind, names, result"):
        read_results(file)
    file.write_text("nonsense\n")
    with pytest.raises(SystemExit, match="line 1: not JSON"):
        main([str(file), str(file)])


def test_new_runs_take_the_place_of_old_ones_with_the_same_seed(tmp_path: Path) -> None:
    newer = [{**record, "id": f"{record['id']}-newer"} for record in records() if record["kind"] == "student"]
    for record in newer:
        record["result"] = {**record["result"], "score": 0.9}
    entry = next(entry for entry in entries_of([*records(), *newer]) if entry.budget == 1000)
    assert entry.mean == pytest.approx(0.9)
    assert len(entry.runs) == 2


@pytest.mark.parametrize(
    "page",
    ["index.md", "quality.md", "decoders.md", "controls.md", "texts.md", "kinship.md", "answers.md", "../../README.md"],
)
def test_published_pages_are_made_from_published_results(page: str) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    assert render(text, [record for name in PUBLISHED for record in read_results(DOCS / name)]) == text


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_results_are_compact_and_name_no_machine(name: str, tmp_path: Path) -> None:
    file = DOCS / name
    found = read_results(file)
    assert file.stat().st_size < 2_000 * len(found)
    assert len({record["id"] for record in found}) == len(found)
    assert all(not value.startswith(("/", "~")) for record in found for value in map(str, record["names"].values()))
    write_results(found, tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == file.read_bytes()
    assert json.loads(file.read_text().splitlines()[0])["kind"] == "teacher"
