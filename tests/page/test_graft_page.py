"""The page of a graft: what it says, what it leaves out, and that no string of a module or a model is markup."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

import reports
from peft_graft.cli.result import show_graft
from peft_graft.distill.candidates import HeadRecord
from peft_graft.outputs import write_aside
from peft_graft.page.details import layer_maps
from peft_graft.page.differences import differences
from peft_graft.page.figures import duration
from peft_graft.page.graft import graft_page

HOSTILE = '<script>alert("x")</script><img src=x onerror=alert(1)>&amp;\'"--></style></title>$x^2${{ 7*7 }}'


class Read(HTMLParser):
    """The elements of a page, its headings, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data) -> None:
        if self.elements and self.elements[-1][0] == "h2" and data.strip():
            self.headings.append(data)
        if self.elements and self.elements[-1][0] not in ("script", "style"):
            self.text += data


def test_the_first_screen_says_what_moved_how_good_it_is_and_what_to_do_next() -> None:
    text = Read(graft_page(reports.tagger(), "my-graft")).text
    for said in (
        "LoRA moved to new-base", "old-base", "bert · 4 layers of 32 · 22.6 M parameters", "strong",
        "agreement with the teacher 0.87 (95 % 0.82–0.99)", "Expected to keep most of the teacher's skill as it is.",
        "Of 120 held-out words it decides 115 (95.8%) as the teacher does.", "Always saying “O” would come to 66.7%",
        "22.6 M → 17.3 M", "23% fewer", "2.0× as fast", "160 kB", "peft_graft.Graft.from_pretrained('my-graft')",
    ):  # fmt: skip
        assert said in text, said
    assert "/models/" not in text, "a place of this machine"
    assert "/data/" not in text
    assert "hash-of-weights" in text
    assert "print-of-old-base" in text


@pytest.mark.parametrize(("task", "problem", "labels", "said"), [
    ("question-answering", None, ["LABEL_0", "LABEL_1"], "on where answers begin and end by 87%"),
    ("sequence-classification", "multi_label_classification", ["a", "b"], "on which labels hold by 87%"),
    ("sequence-classification", "regression", ["score"], "explains 87% of how the teacher's numbers vary"),
])  # fmt: skip
def test_what_was_agreed_on_is_said(task: str, problem: str | None, labels: list[str], said: str) -> None:
    head = HeadRecord(
        task=task, reads="tokens.out", labels=labels, dropped_inner_units=0, diagnostics={}, problem_type=problem
    )
    text = Read(graft_page(reports.tagger().model_copy(update={"classes": None, "head": head}), "g")).text
    assert said in text
    assert "hidden state" not in text


def test_the_map_of_a_stack_has_all_layers_that_the_teacher_has_there() -> None:
    shown = {"layers": {"encoder": [[0], [2]], "decoder": [[0]]}, "teacher_layers": {"encoder": 4, "decoder": 3}}
    pictures = layer_maps(reports.bare(**shown))
    assert [picture.caption.partition("; ")[2] for picture in pictures] == ["2 are left out.", "2 are left out."]
    alone = layer_maps(reports.bare(layers=[[0], [1]], teacher_layers={"": 3}))  # of a teacher with four in two stacks
    assert [picture.caption.partition("; ")[2] for picture in alone] == ["1 is left out."]


def test_a_model_whose_place_begins_as_another_s_keeps_its_own_name_in_notes() -> None:
    teacher = {**reports.model("bert", 4), "hub_id": "google/bert_uncased"}
    report = reports.bare(
        teacher=teacher, student=reports.model("bert-small", 2), notes=["/models/bert-small is shallower"]
    )
    text = Read(graft_page(report, "graft")).text
    assert "bert-small is shallower" in text
    assert "bert_uncased-small" not in text


def test_durations_are_rounded_once() -> None:
    found = [duration(seconds) for seconds in (59.4, 59.7, 119.7, 3599.7, 7199)]
    assert found == ["59 s", "1 min 0 s", "2 min 0 s", "1 h 0 min", "2 h 0 min"]


def test_a_language_model_is_shown_by_its_answers() -> None:
    found = Read(page := graft_page(reports.speaker(), "a graft"))
    assert "Of 50 held-out prompts it answers 28% word for word as the teacher does; the student without it, 0%" in (
        found.text
    )
    assert "peft-graft evaluate 'a graft' --text labelled.jsonl --metric exact" in found.text
    assert "<del>genre</del>" in page
    assert "<mark>artist</mark>" in page
    assert "merengue merengue" in found.text
    assert {"Old, new, untouched", "Answers side by side", "Agreement by kind of prompt"} <= set(found.headings)
    assert "Agreement by class" not in found.headings


def test_what_is_not_there_leaves_no_empty_section() -> None:
    found = Read(graft_page(reports.bare(), "g"))
    assert found.headings == ["How it was moved", "What it cost", "Provenance"]
    assert "not measured" in found.text
    assert "Give --text to compare the graft with its teacher." in found.text
    of_tagger = Read(graft_page(reports.tagger(), "g")).headings
    assert of_tagger == [
        "Old, new, untouched", "Agreement by class", "Where they disagree", "How it was moved", "How it learned",
        "The text", "What it cost", "Notes", "Provenance",
    ]  # fmt: skip


@pytest.mark.parametrize(("constant", "said"), [(0.78, True), (0.1, False), (None, False)])
def test_what_one_answer_to_all_prompts_would_come_to_is_said_where_it_counts(constant, said: bool, capsys) -> None:
    """Agreement may be below 0 where word F1 is above the untouched student's: it counts from the better of the two."""
    report = reports.speaker()
    generated = report.verdict.generated.model_copy(update={"constant_token_f1": constant, "agreement": -1.4})
    report = report.model_copy(update={"verdict": report.verdict.model_copy(update={"generated": generated})})
    words = "One answer to all of them would have 78% of the words: agreement is what the graft does beyond that."
    assert (words in Read(graft_page(report, "a graft")).text) is said
    show_graft(report, Path("out"))
    assert ("One answer to all of them would have 78%" in capsys.readouterr().out) is said


@pytest.mark.parametrize("report", [reports.tagger, reports.speaker])
def test_strings_of_modules_and_models_are_text(report) -> None:
    plain, hostile = (Read(graft_page(report(says), f"g{says}")) for says in ("", HOSTILE))
    assert [tag for tag, _ in hostile.elements].count("script") == 1
    assert {tag for tag, _ in hostile.elements} == {tag for tag, _ in plain.elements}
    assert not [name for _, given in hostile.elements for name in given if name.startswith("on")]
    assert HOSTILE in hostile.text


def test_a_page_needs_nothing_else() -> None:
    page = graft_page(reports.tagger(), "g")
    assert not re.findall(r"""(?:src|href)=["'](?!data:,|#)[^"']*""", page.replace("xlink:", ""))
    assert "url(http" not in page
    assert "@import" not in page
    found = Read(page)
    policy = next(given["content"] for tag, given in found.elements if given.get("http-equiv"))
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-")
    ids = [given["id"] for _, given in found.elements if "id" in given]
    assert len(ids) == len(set(ids)), "two elements of one id"
    assert page == graft_page(reports.tagger(), "g"), "the same report gives the same page"


def test_every_picture_has_a_title_and_its_numbers() -> None:
    page = graft_page(reports.tagger(), "g")
    for title in ("Layers", "Polish"):
        assert f">{title}</title>" in page
    for title in ("Fit", "Teacher against graft"):
        assert f"<caption>{title}</caption>" in page
    assert "student layer 1 from 2" in page
    assert page.count('<svg role="img"') == 2
    assert page.count('<table class="heat">') == 2
    assert "gradient 0.003 (chosen)" in page
    assert "moved 0.003" in page
    assert re.search(r'<td style="--strength:80.0%">', page), "the largest value is the darkest"
    assert not re.search("#0102[0-9a-f]{2}", page), "a colour that the page does not know"


def test_reports_of_former_versions_have_pages() -> None:
    old = json.loads(reports.tagger().model_dump_json())
    for name in ("classes", "decisions", "cost", "files", "kinds"):
        del old[name]
    del old["polish"]["trials"]
    found = Read(graft_page(type(reports.tagger()).model_validate(old), "g"))
    assert "Agreement by class" not in found.headings
    assert "How it learned" in found.headings


def test_half_a_pair_of_surrogates_is_written(tmp_path) -> None:
    write_aside(tmp_path / "report.html", graft_page(reports.speaker("\ud800"), "g"))
    assert "\\ud800" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_differences() -> None:
    assert differences("to Lisbon in winter", "to Quito in winter") == (
        [("to ", False), ("Lisbon", True), (" in winter", False)],
        [("to ", False), ("Quito", True), (" in winter", False)],
        pytest.approx(6 / 7),
    )
    assert differences("same", "same") == ([("same", False)], [("same", False)], 1.0)
    assert differences("", "said")[1] == [("said", True)]


def test_the_page_is_made_again_from_the_report_alone(command, tmp_path) -> None:
    folder = tmp_path / "graft"
    folder.mkdir()
    (folder / "graft.json").write_text(reports.tagger().model_dump_json())
    assert "written" in command("report", folder).out
    assert (folder / "report.html").read_text() == graft_page(reports.tagger(), "graft")
    command("report", folder, "--out", tmp_path / "shown.html")
    done = command("report", folder, "--out", tmp_path / "shown.html", code=1)
    assert "exists" in done.err
    assert "the folder holds no graft" in command("report", tmp_path, code=1).err
