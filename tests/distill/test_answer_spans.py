"""Question answering: the ends of answers are learned from the teacher, judged, and scored on labelled questions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import families
import peft_graft
import tiny
from conftest import needs_adapters
from peft_graft.alignment.text import Sample, read_text
from peft_graft.alignment.tokens import Span, trimmed_spans
from peft_graft.distill.answer_spans import LONGEST_ANSWER, Answered, Places, moved_to, token_places
from peft_graft.distill.fit_head import fit_head
from peft_graft.distill.predictions import compare
from peft_graft.distill.targets import NEVER, kind_of, of_spans, stacked
from peft_graft.distill.teacher import sample_parts
from peft_graft.errors import GraftError, TextError
from peft_graft.labelled.examples import read_examples
from peft_graft.labelled.scores import CLASS_METRICS
from peft_graft.models.tasks import Task
from peft_graft.modules.head import Head, head_tensors

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
AUTO = transformers.AutoModelForQuestionAnswering
TEXTS = ("who plays", "the orchestra plays")
#: [CLS] who plays [SEP] the orchestra plays [SEP], and in other pieces.
WORDS = [None, Span(0, 0, 3), Span(0, 4, 9), None, Span(1, 0, 3), Span(1, 4, 13), Span(1, 14, 19), None]
PIECES = [None, Span(0, 0, 9), None, Span(1, 0, 3), Span(1, 4, 8), Span(1, 8, 13), Span(1, 14, 17)]


def ends(first: int, last: int, length: int = len(WORDS)) -> torch.Tensor:
    logits = torch.zeros(2, length)
    logits[0, first] = logits[1, last] = 20.0
    return logits.log_softmax(-1)


# ---- between tokens --------------------------------------------------------------------------------------------------


def test_an_answer_begins_and_ends_at_the_same_characters() -> None:
    places = token_places(WORDS, PIECES)
    assert places[5] == (4, 5)
    assert places[4] == (3, 3)
    assert places[1] == places[2] == (1, 1)
    assert places[0] == places[3] == places[7] == (0, 0)  # the student has another number of special ones
    assert places[6] == (6, 0)  # the student was cut before it ends
    back = token_places(PIECES, WORDS)
    assert back[4] == back[5] == (5, 5)
    assert token_places(WORDS, WORDS) == [(place, place) for place in range(len(WORDS))]


def test_tokens_of_bytes_share_their_character() -> None:
    student = [Span(1, 0, 1), Span(1, 0, 1), Span(1, 0, 1), Span(1, 1, 2)]
    assert [Places(student).of(span) for span in (Span(1, 0, 1), Span(1, 1, 2))] == [(0, 2), (3, 3)]


#: who plays ⏎ the orchestra, of a tokenizer of bytes without special tokens.
BYTES = [Span(0, 0, 3), Span(0, 4, 9), None, Span(1, 1, 4), Span(1, 5, 14)]


def test_the_first_token_says_that_there_is_no_answer_whatever_it_is() -> None:
    assert token_places(BYTES, WORDS)[0] == token_places(WORDS, BYTES)[0] == (0, 0)
    assert token_places(BYTES, WORDS)[1] == (2, 2)
    texts, nothing, blank = ("who plays", "\nthe orchestra"), ends(0, 0, 5), ends(2, 2, 5)
    assert not Answered.of(nothing, texts, BYTES, may_be_none=True).text
    for may_be_none in (False, True):  # a blank is neither an answer nor the sign that there is none
        assert Answered.of(blank, texts, BYTES, may_be_none=may_be_none).text


def test_an_answer_in_a_long_text_takes_no_square_of_its_length() -> None:
    count = 40_000
    spans = [None, *(Span(1, 2 * n, 2 * n + 1) for n in range(count))]
    assert Answered.of(ends(7, 9, count + 1), ("", "x " * count), spans, may_be_none=False).text == "x x x"


def test_probabilities_move_and_none_is_lost() -> None:
    given = torch.randn(2, len(WORDS) + 3, generator=torch.Generator().manual_seed(0))
    given[:, len(WORDS) :] = NEVER  # as it stands in a batch with longer ones
    given = given.log_softmax(-1)
    found = moved_to(given, token_places(WORDS, PIECES), len(PIECES))[0].exp()
    torch.testing.assert_close(found.sum(-1), torch.ones(2))
    torch.testing.assert_close(found[0, 4], given[0, 5].exp())
    torch.testing.assert_close(found[1, 5], given[1, 5].exp())
    torch.testing.assert_close(found[0, 1], given[0, 1:3].exp().sum())
    torch.testing.assert_close(found[1, 0], given[1, [0, 3, 6, 7]].exp().sum())


@pytest.mark.parametrize(
    ("first", "last", "text"), [(5, 5, "orchestra"), (4, 6, "the orchestra plays"), (0, 0, ""), (6, 4, None)]
)
def test_the_likeliest_answer(first: int, last: int, text: str | None) -> None:
    found = Answered.of(ends(first, last), TEXTS, WORDS, may_be_none=True).text
    assert found == text if text is not None else found in ("the", "plays", "the orchestra plays", "")
    assert Answered.of(ends(first, last), TEXTS, WORDS, may_be_none=False).text


def test_an_answer_is_not_longer_than_answers_are() -> None:
    spans = [None, *(Span(1, 2 * n, 2 * n + 1) for n in range(100))]
    found = Answered.of(ends(1, 100, 101), ("", "x " * 100), spans, may_be_none=False)
    assert found.last - found.first < LONGEST_ANSWER


# ---- agreement and the head ------------------------------------------------------------------------------------------


def logits_of(count: int, seed: int) -> torch.Tensor:
    return 5 * torch.randn(count, 2, 9, generator=torch.Generator().manual_seed(seed))


def test_agreement_is_of_first_and_last_tokens() -> None:
    teacher = logits_of(200, 0)
    wanted = teacher.log_softmax(-1)
    assert compare(teacher, wanted, "spans").agreement == pytest.approx(1)
    half = teacher.clone()
    half[:, 1] = logits_of(200, 1)[:, 1]
    found = compare(half, wanted, "spans")
    assert found.agreement == pytest.approx(0.5, abs=0.06)  # all of the first, a chance of the last
    assert compare(logits_of(200, 2), wanted, "spans").agreement == pytest.approx(0, abs=0.06)
    nothing = torch.zeros(50, 2, 9)
    nothing[..., 0] = 9.0
    same = compare(nothing, nothing.log_softmax(-1), "spans")
    assert same.agreement is None
    assert "gives the same answer to all of the held-out text" in same.undefined


def test_what_a_sample_does_not_have_is_never_met() -> None:
    logits = torch.randn(2, 4, 2, generator=torch.Generator().manual_seed(0))
    found = of_spans(logits, [4, 2]).log_softmax(-1)
    torch.testing.assert_close(found[1, :, :2], logits[1, :2].T.log_softmax(-1))
    longer = stacked([found[:1], found[1:, :, :2]])
    torch.testing.assert_close(longer.exp(), found.exp())
    assert compare(found, longer, "spans").divergence == pytest.approx(0, abs=1e-6)


def test_a_fitted_head_marks_what_it_shall() -> None:
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 9, (300,), generator=draw).tolist()
    read, true = 3 + torch.randn(sum(lengths), 6, generator=draw), torch.randn(2, 6, generator=draw)
    targets = stacked((part @ true.T).T.log_softmax(-1)[None] for part in torch.split(read, lengths))
    values = {"out.weight": torch.zeros(2, 6), "out.bias": torch.zeros(2)}
    head = Head(Task.QUESTION_ANSWERING, head_tensors(values, "tokens.out"), "tokens.out", ())
    assert kind_of(head) == "spans"
    assert head.can_be_fitted
    fitted, report = fit_head(head, read, targets)
    given = read @ fitted.tensors["out.weight"].values.T
    found = stacked(part.T[None] for part in torch.split(given, lengths))
    assert compare(found, targets, "spans").divergence < 0.02
    assert report["divergence"] < 0.02
    shuffled = targets[torch.randperm(300, generator=draw)]
    assert fit_head(head, read, targets)[1]["divergence"] < 0.1 * float(
        compare(torch.zeros_like(shuffled).where(shuffled > NEVER / 2, NEVER), targets, "spans").divergence
    )


# ---- of whole models -------------------------------------------------------------------------------------------------


def trained(base: Path, folder: Path) -> Path:
    """A module that finds the name in the sentence."""
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    config = peft.LoraConfig(task_type="QUESTION_ANS", r=8, target_modules=["query", "key", "value", "dense"])
    model = peft.get_peft_model(AUTO.from_pretrained(base), config)
    rows = tiny.questions(600, seed=1)
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=5e-3)
    for start in range(0, 2400, 24):
        batch = [rows[(start + number) % len(rows)] for number in range(24)]
        asked, texts, answers = map(list, zip(*batch, strict=True))
        given = tokenizer(asked, texts, padding=True, return_tensors="pt")
        starts = [text.index(answer) for text, answer in zip(texts, answers, strict=True)]
        first = [given.char_to_token(row, start, 1) for row, start in enumerate(starts)]
        last = [given.char_to_token(row, start + len(answers[row]) - 1, 1) for row, start in enumerate(starts)]
        model(**given, start_positions=torch.tensor(first), end_positions=torch.tensor(last)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher with its module, a narrower student of another tokenizer, and questions without answers."""
    root = tmp_path_factory.mktemp("world")
    base = tiny.base_model(root / "base", layers=2, hidden=32)
    tiny.base_model(root / "other", layers=2, hidden=24, seed=5, tokens="unigram")
    trained(base, root / "module")
    asked = [{"question": question, "context": text} for question, text, _ in tiny.questions(400, seed=2)]
    (root / "text.jsonl").write_text("\n".join(map(json.dumps, asked)))
    return root


def test_a_question_that_comes_again_makes_texts_no_more_alike() -> None:
    asked = [Sample(f"what is the name that the long sentence of number {n % 3} has?", t) for n, (_, t, _) in
             enumerate(tiny.questions(300))]  # fmt: skip
    assert not sample_parts(asked).judging
    parts = sample_parts(asked, questions=True)
    assert parts.judging
    assert not {one.second for one in parts.held_out} & {one.second for one in parts.learning}
    twice = sample_parts([*asked, *(Sample("who?", one.second) for one in asked)], questions=True)
    assert not {one.second for one in twice.held_out} & {one.second for one in twice.learning}


def test_an_equal_model_answers_exactly(world: Path, tmp_path: Path) -> None:
    graft = tiny.transfer(
        world / "module", world / "base", method="copy", text=world / "text.jsonl", out=tmp_path / "g"
    )
    assert graft.report.verdict.level == "exact"
    assert graft.report.verdict.measured.agreement_interval == (1.0, 1.0)
    assert graft.report.classes is None
    shown = graft.report.decisions[0].decisions[0]
    assert shown.word is None
    assert shown.teacher == shown.graft
    assert shown.teacher.strip("“”") in graft.report.decisions[0].texts[1]


def test_another_model_learns_to_answer(world: Path, tmp_path: Path) -> None:
    def graft(**options: Any) -> peft_graft.Graft:
        given = {"text": world / "text.jsonl", "max_tokens": 3000} | options
        return tiny.transfer(world / "module", world / "other", **given)

    fitted, carried = graft(head="fit", polish=0), graft(head="carry", polish=0)
    assert fitted.report.head.how == "fitted"
    assert fitted.report.verdict.measured.divergence < carried.report.verdict.measured.divergence
    polished = graft(polish=150)
    assert polished.report.verdict.measured.divergence < 0.7 * fitted.report.verdict.measured.divergence
    assert polished.report.verdict.measured.agreement > fitted.report.verdict.measured.agreement + 0.1


def labelled(path: Path, *, impossible: bool) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {"question": asked, "context": text, "answers": {"text": [answer], "answer_start": [text.index(answer)]}}
        for asked, text, answer in tiny.questions(60, seed=3)
    ]
    if impossible:
        rows += [{**row, "answers": {"text": [], "answer_start": []}} for row in rows[:20]]
    path.write_text("\n".join(map(json.dumps, rows)))
    return rows


@pytest.mark.parametrize("impossible", [False, True])
def test_labelled_questions_score_a_module(world: Path, tmp_path: Path, impossible: bool) -> None:
    rows = labelled(tmp_path / "labelled.jsonl", impossible=impossible)
    found = peft_graft.evaluate(world / "module", text=tmp_path / "labelled.jsonl", out=tmp_path / "scores.json")
    (row,) = found.rows
    tokenizer = transformers.AutoTokenizer.from_pretrained(world / "base")
    model = peft.PeftModel.from_pretrained(AUTO.from_pretrained(world / "base"), world / "module").eval()
    right = 0
    for one in rows:
        given = tokenizer(one["question"], one["context"], return_tensors="pt", return_offsets_mapping=True)
        offsets, inside = given.pop("offset_mapping")[0].tolist(), [n == 1 for n in given.sequence_ids()]
        with torch.inference_mode():
            output = model(**given)
        best, answer = -1e9, ""
        for first in range(len(inside)):
            for last in range(first, len(inside)):
                both = float(output.start_logits[0, first] + output.end_logits[0, last])
                if inside[first] and inside[last] and both > best:
                    best, answer = both, one["context"][offsets[first][0] : offsets[last][1]]
        if impossible and float(output.start_logits[0, 0] + output.end_logits[0, 0]) > best:
            answer = ""
        wanted = (one["answers"]["text"] or [""])[0]
        right += answer.lower().strip(".") == wanted.lower()
    assert row.scores["exact-match"].value == pytest.approx(right / len(rows))
    assert row.scores["token-f1"].value >= row.scores["exact-match"].value
    assert found.answers[0].references
    assert impossible == any("(no answer)" in answer.references for answer in found.answers)
    if not impossible:
        assert row.scores["exact-match"].value > 0.6  # it has learned it


def test_a_graft_is_scored_beside_its_teacher(world: Path, tmp_path: Path) -> None:
    labelled(tmp_path / "labelled.jsonl", impossible=False)
    graft = tiny.transfer(
        world / "module", world / "other", text=world / "text.jsonl", max_tokens=3000, polish=20, out=tmp_path / "graft"
    )
    found = graft and peft_graft.evaluate(tmp_path / "graft", text=tmp_path / "labelled.jsonl")
    assert {row.name for row in found.rows} == {"graft", "teacher"}
    assert all(set(row.scores) == {"exact-match", "token-f1"} for row in found.rows)
    with pytest.raises(GraftError, match="no such metric of answers; expected exact-match, token-f1, found accuracy"):
        peft_graft.evaluate(tmp_path / "graft", text=tmp_path / "labelled.jsonl", metrics=["accuracy"])


def test_answers_in_every_form(tmp_path: Path) -> None:
    forms = [
        {"text": ["x", "y"], "answer_start": [0, 2]},
        ["x", "y"],
        "x",
        None,
        [],
        {"text": [""], "answer_start": [0]},
    ]
    rows = [{"question": "q", "context": "x y", "answers": form} for form in forms]
    found = read_examples(rows, Task.QUESTION_ANSWERING)
    assert [one.labels for one in found] == [("x", "y"), ("x", "y"), ("x",), (), (), ()]
    begins = [
        ({"text": "x", "answer_start": 4}, 4),
        ({"text": ["", "x"], "answer_start": [0, 4]}, 4),
        ({"text": ["x"], "answer_start": [None]}, 0),
        ({"text": ["x"]}, 0),
        ([{"text": "x", "answer_start": 4}, {"text": "y", "answer_start": 2}], 4),
    ]
    rows = [{"question": "q", "context": "x y x", "answers": form} for form, _ in begins]
    assert [one.place[0] for one in read_examples(rows, Task.QUESTION_ANSWERING)] == [first for _, first in begins]
    renamed = [{"ask": "q", "passage": "x y", "said": "x"}]
    assert read_examples(renamed, Task.QUESTION_ANSWERING, columns=("ask", "passage"), label="said")[0].texts == (
        "q",
        "x y",
    )
    for odd in (7, {"spans": ["x"]}):  # the latter as DROP has them, which are not none
        with pytest.raises(TextError, match=r"row 1: these are no answers.*--columns question,context,answers"):
            read_examples([{"question": "q", "context": "x y", "answers": odd}], Task.QUESTION_ANSWERING)
    written = {"question": "q", "context": "x y", "answers": "{'text': ['x'], 'answer_start': [0]}"}
    with pytest.raises(TextError, match=r"these are no answers.*found an object as text: \{'text'.*\.jsonl"):
        read_examples([written], Task.QUESTION_ANSWERING)
    with pytest.raises(TextError, match=r"columns are missing.*question,context,answers"):
        read_examples([{"question": "q", "answers": 7}], Task.QUESTION_ANSWERING)


def test_files_of_squad_are_read_as_they_are_to_be_had(tmp_path: Path) -> None:
    asked = [
        {"id": "1", "question": "who?", "answers": [{"text": "Maria", "answer_start": 0}], "is_impossible": False},
        {"id": "2", "question": "where?", "answers": [], "is_impossible": True},
        {"id": "3", "question": "when?"},  # of a test file
    ]
    article = {"title": "t", "paragraphs": [{"context": "Maria plays", "qas": asked}]}
    (tmp_path / "dev-v2.0.json").write_text(json.dumps({"version": "v2.0", "data": [article, article]}))
    found = read_examples(tmp_path / "dev-v2.0.json", Task.QUESTION_ANSWERING)
    assert [(one.question, one.context, one.answers, one.place) for one in found[:3]] == [
        ("who?", "Maria plays", ("Maria",), (0, 5)),
        ("where?", "Maria plays", (), None),
        ("when?", "Maria plays", (), None),
    ]
    assert len(found) == 6
    samples = list(read_text(tmp_path / "dev-v2.0.json"))
    assert {sample.texts for sample in samples} == {(one.question, one.context) for one in found}


def test_answers_are_compared_as_squad_compares_them() -> None:
    given = [["The harbour."], ["old harbour"], [""], ["x"], [""]]
    known = [("harbour",), ("the new harbour", "Old Harbour!"), (), (), ("x",)]
    assert CLASS_METRICS["exact-match"].score(given, known, ()) == pytest.approx(3 / 5)
    assert CLASS_METRICS["token-f1"].score([["new harbour"]], [("harbour", "far")], ()) == pytest.approx(2 / 3)


@pytest.mark.parametrize("kind", ["t5", "prompt"])
def test_answers_are_those_of_the_library(kind: str, tmp_path: Path) -> None:
    """A decoder reads the text after its own first token; of a prompt peft counts the places from its start."""
    base = tiny.base_model(tmp_path / "base", layers=1)
    if kind == "t5":
        base = families.saved(tmp_path / "base", "t5")
    options = {"num_virtual_tokens": 3} if kind == "prompt" else {"r": 4, "target_modules": ["q", "v"]}
    config = (peft.PromptTuningConfig if kind == "prompt" else peft.LoraConfig)(task_type="QUESTION_ANS", **options)
    model = peft.get_peft_model(AUTO.from_pretrained(base), config).eval()
    tiny.randomise_trained(model, 1)
    with torch.no_grad():
        model.get_submodule("base_model" if kind == "prompt" else "base_model.model").qa_outputs.weight.mul_(20)
    model.save_pretrained(tmp_path / "module")
    tokenizer, expected = transformers.AutoTokenizer.from_pretrained(base), []
    rows = [{"question": asked, "context": text, "answers": [name]} for asked, text, name in tiny.questions(30, seed=3)]
    for row in rows:
        texts = row["question"], row["context"]
        given = tokenizer(*texts, return_tensors="pt", return_offsets_mapping=True)
        spans = trimmed_spans(texts, given.sequence_ids(0), given.pop("offset_mapping")[0].tolist())
        with torch.inference_mode():
            output = model(**given)
        logits = torch.cat([output.start_logits, output.end_logits])[:, : len(spans)]
        expected.append(Answered.of(logits, texts, spans, may_be_none=False).text)
    found = peft_graft.evaluate(tmp_path / "module", text=rows, out=tmp_path / "scores.json")
    said = {answer.prompt: answer.answers["module"] for answer in found.answers}
    assert [said[f"{row['question']} / {row['context']}"] for row in rows] == expected


def test_ends_of_answers_have_no_names(world: Path, tmp_path: Path) -> None:
    graft = tiny.transfer(world / "module", world / "base", method="copy", out=tmp_path / "graft")
    assert graft.report.head.labels == []
    assert peft_graft.Graft.from_pretrained(tmp_path / "graft").labels == ()
    with pytest.raises(GraftError, match="--labels: no head moves whose classes they could name.*leave --labels out"):
        tiny.transfer(world / "module", world / "base", method="copy", labels=("a", "b"))


def test_a_head_of_three_outputs_marks_no_ends(world: Path, tmp_path: Path) -> None:
    model = AUTO.from_pretrained(world / "base", num_labels=3)
    peft.get_peft_model(model, peft.LoraConfig(task_type="QUESTION_ANS", target_modules=["query"])).save_pretrained(
        tmp_path / "three"
    )
    labelled(tmp_path / "labelled.jsonl", impossible=False)
    with pytest.raises(GraftError, match="does not mark the ends of answers; expected 2 outputs, found 3"):
        peft_graft.evaluate(tmp_path / "three", text=tmp_path / "labelled.jsonl")


@needs_adapters
def test_heads_of_adapterhub_mark_answers_too(world: Path, tmp_path: Path) -> None:
    import adapters

    model = adapters.AutoAdapterModel.from_pretrained(world / "base")
    model.add_adapter("qa", config="seq_bn")
    model.add_qa_head("qa")
    with torch.no_grad():
        for name, value in model.named_parameters():
            if ".qa." in name:
                value.add_(0.5 * torch.randn(value.shape, generator=torch.Generator().manual_seed(len(name))))
    model.save_adapter(str(tmp_path / "module"), "qa")
    graft = tiny.transfer(
        tmp_path / "module", world / "base", teacher=world / "base", method="copy", text=world / "text.jsonl",
        out=tmp_path / "graft",
    )  # fmt: skip
    assert graft.report.verdict.level == "exact"
    given = transformers.AutoTokenizer.from_pretrained(world / "base")(*TEXTS, return_tensors="pt")
    other = adapters.AutoAdapterModel.from_pretrained(world / "base")
    other.load_adapter(str(tmp_path / "graft"), set_active=True)
    model.set_active_adapters("qa")
    with torch.inference_mode():
        torch.testing.assert_close(other.eval()(**given).start_logits, model.eval()(**given).start_logits)
