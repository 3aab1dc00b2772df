"""The verdict in its parts: classes, kinds of prompts, texts with what is decided about them, sizes and speed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

import tiny
from peft_graft import Graft
from peft_graft.distill.agreement import WORD
from peft_graft.distill.breakdown import by_kind
from peft_graft.distill.generate import Answer
from peft_graft.files import file_hashes
from peft_graft.prompts.conversation import Prompt


@pytest.fixture(scope="module")
def graft(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Graft:
    folder = tmp_path_factory.mktemp("breakdown")
    module, out = tiny.evenly_deciding_lora(folder / "module", world / "teacher"), folder / "graft"
    return tiny.transfer(
        module, student=world / "shallow", text=world / "text.txt", out=out, method="prune-align", polish=40,
        labels=tiny.LABELS, max_tokens=640,
    )  # fmt: skip


def test_every_decision_that_judges_is_counted(graft: Graft) -> None:
    report = graft.report
    assert report.classes.labels == list(tiny.LABELS)
    assert sum(count for *_, count in report.classes.counts) == report.verdict.measured.answers
    total, alike = report.verdict.measured.answers, sum(n for t, g, n in report.classes.counts if t == g)
    sides = [Counter(), Counter()]
    for *pair, count in report.classes.counts:
        for side, label in zip(sides, pair, strict=True):
            side[label] += count
    chance = sum(sides[0][label] * sides[1][label] for label in sides[0]) / total**2
    assert (alike / total - chance) / (1 - chance) == pytest.approx(report.verdict.measured.agreement)


def test_texts_are_shown_with_what_each_decides_about_their_words(graft: Graft) -> None:
    texts = graft.report.decisions
    assert [text.first for text in texts[:10]] == [True] * 10
    assert len({text.texts[0] for text in texts}) == len(texts)
    for text in texts:
        words = [decision.word for decision in text.decisions]
        assert words == WORD.findall(text.texts[0])[: len(words)]
        assert {name for one in text.decisions for name in (one.teacher, one.graft, one.bare)} <= set(tiny.LABELS)
    others = texts[10:]
    assert all(any(one.teacher != one.graft for one in text.decisions) for text in others)
    assert [text.divergence for text in others] == sorted((text.divergence for text in others), reverse=True)
    assert any(one.bare != one.graft for text in texts for one in text.decisions), "the module was not switched off"


def test_sizes_speed_and_files(graft: Graft, world: Path) -> None:
    cost = graft.report.cost
    assert cost.teacher.parameters > cost.student.parameters > 10_000
    assert cost.teacher.module_parameters == 2 * cost.student.module_parameters > 0
    assert cost.texts == 16
    assert cost.teacher.seconds > 0 < cost.student.seconds
    written = {name: digest for name, digest in file_hashes(graft.folder).items() if name in graft.report.files}
    assert written == {name: file.sha256 for name, file in graft.report.files.items()}
    assert (graft.folder / "adapter_model.safetensors").stat().st_size == graft.report.files[
        "adapter_model.safetensors"
    ].size
    assert Graft.from_pretrained(graft.folder).report == graft.report


def test_every_start_that_was_tried_has_a_curve(graft: Graft) -> None:
    polish = graft.report.polish
    assert polish.trials.keys() == polish.pilots.keys() == {"moved 0.003", "gradient 0.003", f"{polish.start} 0.01"}
    for name, curve in polish.trials.items():
        assert [point.step for point in curve] == [0, 2]
        assert curve[-1] == polish.pilots[name]


def test_kinds_of_prompts() -> None:
    prompts = [Prompt.of_text("name it"), Prompt.of_text("say " * 20), Prompt.of_text("name that")]
    teacher = [Answer("Lisbon", ended=True), Answer('{"a": 1}', ended=True), Answer("the sea", ended=True)]
    given = [Answer(" Lisbon ", ended=True), Answer('{"a": 2}', ended=True), Answer("the sky", ended=True)]
    bare = [Answer("", ended=True)] * 3
    found = {kind.kind: kind for kind in by_kind(prompts, given, teacher, bare)}
    assert {name: (kind.prompts, kind.exact) for name, kind in found.items()} == {
        "prompts of up to 12 words": (2, 0.5),
        "prompts of 13 to 40 words": (1, 0.0),
        "answered in JSON": (1, 0.0),
        "answered in one word": (1, 1.0),
        "answered in one line": (1, 0.0),
    }
    assert found["answered in one line"].token_f1 == 0.5
    assert found["answered in one word"].bare_token_f1 == 0.0
    assert by_kind(prompts[:1], given[:1], teacher[:1], bare[:1]) == []  # one kind is no breakdown
