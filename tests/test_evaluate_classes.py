"""Scores of classifiers beside their teachers, on tiny encoders and labels that are known."""

from __future__ import annotations

import csv
import json
from itertools import chain
from pathlib import Path

import pandas
import peft
import pytest
import scipy
import torch
import transformers
from seqeval.metrics import f1_score as entity_f1
from sklearn.metrics import accuracy_score, f1_score, mean_squared_error

import peft_graft
import tiny
from peft_graft import EvaluateConfig, Evaluation, Graft, GraftError, evaluate
from peft_graft.alignment.text import as_samples, rows_given
from peft_graft.labelled.scores import CLASS_METRICS

CLASSES = ("no", "yes", "maybe")
OPTIONS = {"method": "copy", "polish": 0}


def grafted(root: Path, teacher: Path, labels: tuple[str, ...], **options: object) -> None:
    """A graft of ``root / "lora"`` that computes what its teacher does: its student is the teacher's base."""
    peft_graft.transfer(root / "lora", teacher, out=root / "graft", config={**OPTIONS, "labels": labels, **options})


def logits(model, tokenizer, *texts: str) -> torch.Tensor:
    with torch.inference_mode():
        return model(**tokenizer(*texts, return_tensors="pt")).logits[0]


@pytest.fixture(scope="module")
def tagger(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    """The folder of a tagger's graft, and sentences with the tags that its teacher gives, by transformers alone."""
    root = tmp_path_factory.mktemp("tagger")
    tiny.evenly_deciding_lora(root / "lora", world / "teacher")
    grafted(root, world / "teacher", tiny.LABELS)
    model = peft.PeftModel.from_pretrained(tiny.task_model(world / "teacher"), root / "lora").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(world / "teacher")
    rows = []
    for line in tiny.sentences(30):
        words = line.split()
        encoded = tokenizer(words, is_split_into_words=True)
        first = [encoded.word_ids().index(number) for number in range(len(words))]
        with torch.inference_mode():
            found = model(**tokenizer(words, is_split_into_words=True, return_tensors="pt")).logits[0].argmax(-1)
        rows.append({"tokens": words, "ner_tags": [tiny.LABELS[found[place]] for place in first]})
    return root / "graft", rows


def test_entities_are_those_of_seqeval(tagger: tuple[Path, list[dict]], world: Path) -> None:
    graft, rows = tagger
    found = evaluate(graft, text=rows)
    assert [row.name for row in found.rows] == ["commonest class", "graft", "teacher"]
    assert found.task == "token-classification"
    common, own, teacher = (row.scores["entity-f1"] for row in found.rows)
    assert (own.value, own.low, own.high) == (teacher.value, 1.0, 1.0) == (1.0, 1.0, 1.0)
    assert common.value < 0.5
    # Half of the truth is another: the score is seqeval's.
    wrong = [{**row, "ner_tags": row["ner_tags"][::-1] if number % 2 else row["ner_tags"]}
             for number, row in enumerate(rows)]  # fmt: skip
    score = evaluate(graft, text=wrong, metrics=["entity-f1", "accuracy"]).rows[1].scores
    truth, given = ([row["ner_tags"] for row in side] for side in (wrong, rows))
    assert score["entity-f1"].value == pytest.approx(entity_f1(truth, given))
    assert score["accuracy"].value == pytest.approx(accuracy_score([*chain(*truth)], [*chain(*given)]))
    assert score["entity-f1"].low < score["entity-f1"].value < score["entity-f1"].high
    by_text = {" ".join(row["tokens"]): row for row in wrong}
    for sample in evaluate(graft, text=wrong).answers:
        row = by_text[sample.prompt]
        tagged = zip(row["tokens"], row["ner_tags"], strict=True)
        assert sample.references == [" ".join(f"{word}/{tag}" for word, tag in tagged if tag != "O") or "O"]
        assert sample.answers["graft"] == sample.answers["teacher"]


def test_numbers_stand_for_the_modules_classes_and_words_beyond_are_outside(tagger, tmp_path: Path) -> None:
    graft, rows = tagger
    numbered = [{**row, "ner_tags": [tiny.LABELS.index(tag) for tag in row["ner_tags"]]} for row in rows]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in numbered))
    found = evaluate(graft, text=tmp_path / "rows.jsonl", config=EvaluateConfig(limit=7))
    assert found.rows[1].scores["entity-f1"].value == 1.0
    assert found.prompts == len(found.answers) == 7
    assert found.rows[1].cut == 0
    long = {key: [*chain.from_iterable(row[key] for row in rows)] for key in ("tokens", "ner_tags")}
    row = evaluate(graft, text=[long], metrics=["accuracy"]).rows[1]
    assert row.cut == 1
    assert 0 < row.scores["accuracy"].value < 1


def test_classes_of_pairs(world: Path, tmp_path: Path) -> None:
    task = "sequence-classification"
    model = tiny.peft_lora(tmp_path / "lora", world / "teacher", task=task, labels=CLASSES)
    grafted(tmp_path, world / "teacher", CLASSES)
    tokenizer = transformers.AutoTokenizer.from_pretrained(world / "teacher")
    lines = tiny.sentences(60)
    pairs = list(zip(lines[::2], lines[1::2], strict=True))
    given = [CLASSES[logits(model, tokenizer, *pair).argmax()] for pair in pairs]
    truth = [given[number] if number % 3 else CLASSES[number % 2] for number in range(len(pairs))]
    with (tmp_path / "pairs.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["one", "other", "gold"])
        writer.writerows((*pair, label) for pair, label in zip(pairs, truth, strict=True))
    config = EvaluateConfig(columns=("one", "other", "gold"))
    out = tmp_path / "scores.json"
    found = evaluate(tmp_path / "graft", text=tmp_path / "pairs.csv", config=config, out=out)
    assert Evaluation.model_validate_json(out.read_text()) == found
    scores = found.rows[1].scores
    assert scores["accuracy"].value == pytest.approx(accuracy_score(truth, given))
    macro = f1_score(truth, given, labels=CLASSES, average="macro", zero_division=0)
    assert scores["macro-f1"].value == pytest.approx(macro)
    assert scores == found.rows[2].scores, "the teacher decides alike"
    commonest = max(CLASSES, key=truth.count)
    assert found.rows[0].scores["accuracy"].value == pytest.approx(truth.count(commonest) / len(truth))
    assert found.eval_results[0].task_type == "text-classification"
    assert "30 texts of" in found._repr_html_()
    named = EvaluateConfig(columns=config.columns, labels=CLASSES)
    plain = evaluate(tmp_path / "lora", text=tmp_path / "pairs.csv", config=named)
    assert [row.name for row in plain.rows] == ["commonest class", "module"]
    assert plain.rows[1].scores == scores
    live = Graft.from_pretrained(tmp_path / "graft")
    assert evaluate(live, text=tmp_path / "pairs.csv", config=config).rows[1].scores == scores


@pytest.mark.parametrize("missing", [None, float("nan"), -1])
def test_rows_without_a_label_are_left_out_and_counted(missing: object, world: Path, tmp_path: Path) -> None:
    tiny.peft_lora(tmp_path / "lora", world / "teacher", task="sequence-classification", labels=CLASSES)
    grafted(tmp_path, world / "teacher", CLASSES)
    rows = [{"text": text, "label": CLASSES[number % 3]} for number, text in enumerate(tiny.sentences(9))]
    rows += [{"text": text, "label": missing} for text in tiny.sentences(2, seed=1)]
    for text in (rows, pandas.DataFrame(rows)):
        found = evaluate(tmp_path / "graft", text=text)
        assert found.prompts == 9
        assert "given in memory: 2 rows without a label left out" in found.notes
    assert not any("left out" in note for note in evaluate(tmp_path / "graft", text=rows[:9]).notes)


def test_tables_hold_lists_of_words_as_arrays(tagger: tuple[Path, list[dict]], tmp_path: Path) -> None:
    graft, rows = tagger
    pandas.DataFrame(rows).to_parquet(tmp_path / "rows.parquet")
    frame = pandas.read_parquet(tmp_path / "rows.parquet")
    assert evaluate(graft, text=frame).rows[1].scores["entity-f1"].value == 1.0
    assert len(list(as_samples(rows_given(frame)))) == len(rows)
    answers = {"text": ["a", "b"], "answer_start": [0, 4]}
    pandas.DataFrame([{"question": "q", "answers": answers}]).to_parquet(tmp_path / "answers.parquet")
    assert rows_given(pandas.read_parquet(tmp_path / "answers.parquet"))[0]["answers"] == answers


def test_labels_that_hold_or_not(world: Path, tmp_path: Path) -> None:
    kind = "multi_label_classification"
    task = "sequence-classification"
    model = tiny.peft_lora(tmp_path / "lora", world / "teacher", task=task, labels=CLASSES)
    grafted(tmp_path, world / "teacher", CLASSES, problem_type=kind)
    tokenizer = transformers.AutoTokenizer.from_pretrained(world / "teacher")
    lines = tiny.sentences(24)
    holds = [(logits(model, tokenizer, line) > 0).tolist() for line in lines]
    assert any(sum(row) != 1 for row in holds)
    rows = [{"text": line, "labels": [name for name, value in zip(CLASSES, row, strict=True) if value]}
            for line, row in zip(lines, holds, strict=True)]  # fmt: skip
    scores = evaluate(tmp_path / "graft", text=rows, metrics=["micro-f1", "exact"]).rows[1].scores
    assert (scores["micro-f1"].value, scores["exact"].value) == (1.0, 1.0)
    rows[0]["labels"] = [name for name in CLASSES if name not in rows[0]["labels"]]
    scores = evaluate(tmp_path / "graft", text=rows, metrics=["micro-f1", "macro-f1", "exact"]).rows[1].scores
    truth = [[name in row["labels"] for name in CLASSES] for row in rows]
    for average in ("micro", "macro"):
        wanted = f1_score(truth, holds, average=average, zero_division=0)
        assert scores[f"{average}-f1"].value == pytest.approx(wanted)
    assert scores["exact"].value == pytest.approx(23 / 24)
    nothing = evaluate(tmp_path / "graft", text=[{"text": "none holds", "labels": []}], metrics=["micro-f1"])
    assert nothing.rows[0].scores["micro-f1"].value == 0


def test_a_class_that_the_module_lacks_counts_as_missed(tagger: tuple[Path, list[dict]]) -> None:
    graft, rows = tagger
    entity = next(number for number, row in enumerate(rows) if set(row["ner_tags"]) - {"O"})
    place = next(number for number, tag in enumerate(rows[entity]["ner_tags"]) if tag != "O")
    tags = [*rows[entity]["ner_tags"]]
    tags[place] = "B-MISC"
    known = [*rows[:entity], {**rows[entity], "ner_tags": tags}, *rows[entity + 1 :]]
    found = evaluate(graft, text=known)
    assert found.notes == ["given in memory: 1 labels that the module does not give count as missed: B-MISC"]
    wanted = entity_f1([row["ner_tags"] for row in known], [row["ner_tags"] for row in rows])
    assert found.rows[1].scores["entity-f1"].value == pytest.approx(wanted)
    assert wanted < 1


def test_texts_of_a_class_that_the_module_lacks_lower_every_average(world: Path, tmp_path: Path) -> None:
    tiny.peft_lora(tmp_path / "lora", world / "teacher", task="sequence-classification", labels=CLASSES)
    grafted(tmp_path, world / "teacher", CLASSES)
    lines = tiny.sentences(20)
    asked = evaluate(tmp_path / "graft", text=[{"text": line, "label": "no"} for line in lines])
    given = {answer.prompt: answer.answers["graft"] for answer in asked.answers}
    rows = [{"text": line, "label": "never" if number < 5 else given[line]} for number, line in enumerate(lines)]
    found = evaluate(tmp_path / "graft", text=rows)
    scores = found.rows[1].scores
    truth, said = [row["label"] for row in rows], [given[line] for line in lines]
    assert scores["accuracy"].value == 0.75
    assert scores["macro-f1"].value == pytest.approx(
        f1_score(truth, said, labels=[*CLASSES, "never"], average="macro", zero_division=0)
    )
    assert "5 labels that the module does not give count as missed: never" in found.notes[0]


def test_numbers_far_from_zero_correlate_as_they_do_near_it() -> None:
    said, truth = [2001.0, 2003.0, 2002.0, 2006.0], [2000.0, 2002.0, 2004.0, 2005.0]
    years = [[[value] for value in values] for values in (said, truth)]
    expected = scipy.stats.pearsonr(said, truth).statistic
    assert CLASS_METRICS["pearson"].score(*years, names=()) == pytest.approx(expected, abs=1e-6)
    constant = [[2001.3]] * 4
    assert CLASS_METRICS["pearson"].score(constant, years[1], names=()) == 0


def test_numbers_are_scored_as_scipy_scores_them(world: Path, tmp_path: Path, command) -> None:
    tiny.peft_lora(tmp_path / "lora", world / "teacher", task="sequence-classification", labels=("score",))
    grafted(tmp_path, world / "teacher", ("score",))
    base = transformers.AutoModelForSequenceClassification.from_pretrained(world / "teacher", num_labels=1)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "lora").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(world / "teacher")
    lines = tiny.sentences(20)
    said = [float(logits(model, tokenizer, line)) for line in lines]
    rows = [{"text": line, "score": value} for line, value in zip(lines, said, strict=True)]
    found = evaluate(tmp_path / "graft", text=rows)
    assert [row.name for row in found.rows] == ["graft", "teacher"]
    assert found.rows[0].scores["pearson"].value == pytest.approx(1)
    assert found.rows[0].scores["rmse"].value == pytest.approx(0, abs=1e-5)
    truth = [value + number % 3 for number, value in enumerate(said)]
    known = [{**row, "score": value} for row, value in zip(rows, truth, strict=True)]
    scores = evaluate(tmp_path / "graft", text=known, metrics=["rmse", "pearson"]).rows[0].scores
    assert scores["pearson"].value == pytest.approx(scipy.stats.pearsonr(said, truth).statistic, abs=1e-4)
    assert scores["rmse"].value == pytest.approx(mean_squared_error(truth, said) ** 0.5, abs=1e-4)
    assert scores["rmse"].low < scores["rmse"].value < scores["rmse"].high
    same = evaluate(tmp_path / "graft", text=[{**row, "score": 3} for row in rows], metrics=["pearson"])
    assert same.rows[0].scores["pearson"].value == 0
    with pytest.raises(GraftError, match="row 2: this is no number; expected a number in score.*found 'high'"):
        evaluate(tmp_path / "graft", text=[rows[0], {**rows[1], "score": "high"}])
    with pytest.raises(GraftError, match="no such metric of numbers; expected pearson, rmse, found accuracy"):
        evaluate(tmp_path / "graft", text=rows, metrics=["accuracy"])
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = command("evaluate", tmp_path / "graft", "--text", tmp_path / "rows.jsonl")
    assert "pearson" in done.out
    assert "commonest class" not in done.out


def test_what_cannot_be_scored_is_refused_before_weights_are_loaded(tagger, world: Path, monkeypatch, tmp_path) -> None:
    graft, rows = tagger
    tiny.peft_lora(tmp_path / "numbers", world / "teacher", task="sequence-classification", labels=("a", "b"))
    monkeypatch.setattr("peft_graft.distill.sides.load_model", lambda *_, **__: pytest.fail("loaded"))
    other, short = {**rows[0], "ner_tags": ["B-ORG"] * len(rows[0]["tokens"])}, {**rows[0], "ner_tags": ["O"]}
    config = {"config": EvaluateConfig(columns=("tokens", "other", "ner_tags"))}
    for given, said in [
        ({"text": [other]}, "labels that the module does not give.*B-PER.*found B-ORG.*in that order"),
        ({"text": [rows[0], short]}, "row 2: words and tags do not belong together.*and 1"),
        ({"text": [{"tokens": "one word", "ner_tags": ["O"]}]}, "row 1: words and tags.*found str and 1"),
        ({"text": [{"words": ["a"]}]}, "columns are missing; expected tokens, ner_tags, found words.*--columns"),
        ({"text": rows, "metrics": ["rouge"]}, "no such metric of classes; expected entity-f1, accuracy, found rouge"),
        (
            {"text": rows, **config},
            "--columns: these columns are not those of a text and its label; expected tokens,ner_tags",
        ),
        ({"text": ["plain", "text"]}, "no labelled rows; expected dictionaries by column, found str"),
        ({"text": [{"tokens": [], "ner_tags": []}]}, "there are no labelled examples"),
    ]:
        with pytest.raises(GraftError, match=said):
            evaluate(graft, **given)
    with pytest.raises(GraftError, match="--labels: there are not as many names as classes; expected 5, found 1"):
        evaluate(graft, text=rows, config=EvaluateConfig(labels=("O",)))
    with pytest.raises(GraftError, match="is a sequence-classification module that gives several numbers"):
        config = EvaluateConfig(problem_type="regression")
        evaluate(tmp_path / "numbers", text=[{"text": "a", "label": 1}], config=config)
    tiny.peft_lora(tmp_path / "number", world / "teacher", task="token-classification", labels=("score",))
    with pytest.raises(GraftError, match="is a token-classification module that gives numbers"):
        evaluate(tmp_path / "number", text=rows)


def test_the_command(command, tagger, tmp_path: Path) -> None:
    graft, rows = tagger
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = command("evaluate", graft, "--text", tmp_path / "rows.jsonl")
    words = ("30 texts, with 95 % intervals", "commonest class", "graft", "teacher", "entity-f1", "1.000", "label")
    assert all(word in done.out for word in words)
    done = command("evaluate", graft, "--text", tmp_path / "rows.jsonl", "--metric", "wit", code=1)
    assert "no such metric of classes" in done.err
