"""The page of a study: the same figures as its tables, failed cells with their errors, and a server of it."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from peft_graft.study.folder import StudyFolder
from peft_graft.study.lift import lifts
from peft_graft.study.report import StudyResults, study_page
from peft_graft.study.results import read_results
from peft_graft.study.serve import serving
from peft_graft.study.tables import grid_of, result_tables

PUBLISHED = Path(__file__).parents[2] / "docs" / "results" / "decoders.jsonl"
HOSTILE = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def records() -> list[dict]:
    """What was published about one task and two models."""
    return [
        record
        for record in read_results(PUBLISHED)
        if record["names"]["task"] == "sick"
        and record["names"].get("teacher", "SmolLM2") in ("SmolLM2", "Gemma-3")
        and record["names"].get("student", "Gemma-3") == "Gemma-3"
    ]


def folder_of(records: list[dict], path: Path) -> Path:
    """A study's folder with these cells, one of another kind of failure."""
    for name in ("cells", "failures"):
        (path / name).mkdir(parents=True)
    (path / "study.json").write_text(json.dumps({"name": f"sick {HOSTILE}"}))
    for record in records:
        (path / "cells" / f"{record['id']}.json").write_text(json.dumps(record))
    failed = {"id": "student-x", "error": f"ModelError: {HOSTILE}"}
    (path / "failures" / "student-x.json").write_text(json.dumps(failed))
    return path


def test_a_page_has_the_figures_of_the_tables(records) -> None:
    page = study_page(StudyResults("sick", records, {}))
    header, _, *rows = lifts(records)
    for line in (header, *rows):
        for cell in line.strip("| ").split(" | "):
            assert cell.strip("*") in page
    for table in result_tables(records):
        for row in grid_of(table)[1]:
            assert all(f">{cell}</td>" in page for cell in row)
    assert "Cells that failed" not in page
    assert "Languages" not in page, "there is one language"
    assert 'http-equiv="refresh"' not in page


def test_failed_cells_are_there_and_nothing_in_a_study_is_markup(records, tmp_path) -> None:
    page = study_page(StudyResults.read(folder_of(records, tmp_path / "out")))
    assert "Cells that failed" in page
    assert "student-x" in page
    assert HOSTILE not in page
    assert "ModelError: &lt;script&gt;" in page


def test_cells_of_the_study_with_other_options_are_not_on_its_page(records, tmp_path) -> None:
    changed = [{**one, "id": f"{one['id']}-long", "result": {**one["result"], "score": 0.123}} for one in records]
    place = folder_of([*records, *changed], tmp_path / "out")
    StudyFolder(place).prepare({"name": "sick", "cells": [one["id"] for one in records]})
    found = StudyResults.read(place)
    assert {one["id"] for one in found.records} == {one["id"] for one in records}
    assert found.failures == {}
    assert study_page(found) == study_page(StudyResults("sick", found.records, {}))


def test_a_study_without_results_yet_says_so(tmp_path) -> None:
    (tmp_path / "study.json").write_text('{"name": "new"}')
    assert "No student has been scored yet." in study_page(StudyResults.read(tmp_path))


def test_languages_have_a_picture(records) -> None:
    two = [
        {**record, "names": {**record["names"], "language": language}, "id": f"{record['id']}-{language}"}
        for record in records
        for language in ("en", "de")
    ]
    page = study_page(StudyResults("two", two, {}))
    assert "<h2>Languages</h2>" in page
    assert "student starts from" in page


def test_the_command_writes_a_page_of_a_study_and_of_exported_results(command, records, tmp_path) -> None:
    folder = folder_of([], tmp_path / "out")
    command("report", folder)
    assert "Cells that failed" in (folder / "report.html").read_text()
    results = tmp_path / "results.jsonl"
    results.write_text("".join(json.dumps(record) + "\n" for record in records))
    command("report", results)
    assert "results · study report" in (tmp_path / "results.html").read_text()
    graft = tmp_path / "graft"
    graft.mkdir()
    assert "only a study's page is served" in command("report", graft, "--serve", code=1).err


def test_a_running_study_is_served_to_this_machine_alone(tmp_path) -> None:
    folder = folder_of([], tmp_path / "out")
    with serving(folder) as server:
        assert server.server_address[0] == "127.0.0.1"
        address = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            page = urllib.request.urlopen(address).read().decode()
            assert 'http-equiv="refresh" content="10"' in page
            (folder / "failures" / "student-y.json").write_text('{"id": "student-y", "error": "too little memory"}')
            assert "too little memory" in urllib.request.urlopen(address).read().decode()
            for request, code in (
                (f"{address}/graft.json", 404),
                (urllib.request.Request(address, headers={"Host": "elsewhere.example"}), 403),
            ):
                with pytest.raises(urllib.error.HTTPError) as error:
                    urllib.request.urlopen(request)
                assert error.value.code == code
                error.value.close()
        finally:
            server.shutdown()
            thread.join()
