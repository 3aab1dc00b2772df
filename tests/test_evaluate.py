"""Scores of a graft's answers beside its student's and the teacher's, on tiny models that speak."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers

import peft_graft
import speech
import tiny
from peft_graft import Callback, EvaluateConfig, Evaluation, Graft, GraftConfig, GraftError, evaluate
from peft_graft.cli import main
from peft_graft.cli.results import EvaluateResult
from peft_graft.metrics import METRICS, interval
from peft_graft.prompts.conversation import Prompt
from peft_graft.prompts.template import Template

CONFIG = EvaluateConfig(max_new_tokens=8)


@pytest.fixture(scope="module")
def world(speakers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher with its module, a graft of it on a copy of the teacher, and prompts with what the module answers."""
    root = tmp_path_factory.mktemp("speech")
    teacher = shutil.copytree(speakers / "teacher", root / "teacher")
    shutil.copytree(speakers / "module", root / "lora")
    config = json.loads((root / "lora" / "adapter_config.json").read_text())
    (root / "lora" / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(teacher)}))
    shutil.copytree(teacher, root / "student")
    peft_graft.transfer(
        root / "lora", root / "student", out=root / "graft",
        config=GraftConfig(method="copy", format=speech.FORMAT, max_new_tokens=8, polish=0),
    )  # fmt: skip
    prompts = speech.words(24, seed=3)
    speech.prompt_file(root / "labelled.jsonl", prompts, said(root / "lora", teacher, prompts))
    return root


def said(module: Path, base: Path, prompts: list[str]) -> list[str]:
    """What a module answers, by its library alone, to one prompt at a time."""
    model = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), module).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    found = []
    for prompt in prompts:
        inputs = tokenizer(speech.FORMAT.replace("{prompt}", prompt), return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        found.append(tokenizer.decode(ids, skip_special_tokens=True))
    assert len(set(found)) > 2
    return found


def answers(world: Path) -> dict[str, str]:
    rows = map(json.loads, (world / "labelled.jsonl").read_text().splitlines())
    return {row["prompt"]: row["completion"] for row in rows}


def test_rows_side_by_side(world: Path) -> None:
    config = EvaluateConfig(teacher_base=True, seed=1)
    found = evaluate(world / "graft", text=world / "labelled.jsonl", metrics=("exact", "token-f1"), config=config)
    assert [row.name for row in found.rows] == ["student", "graft", "teacher", "teacher base"]
    student, graft, teacher, base = found.rows
    assert graft.scores["exact"].value == teacher.scores["exact"].value == 1.0
    assert (graft.scores["exact"].low, graft.scores["exact"].high) == (1.0, 1.0)
    assert student.scores["exact"].value < 0.5
    assert student.scores == base.scores
    assert student.module is None
    assert teacher.module == str(world / "lora")
    assert (teacher.model, graft.model) == (str(world / "teacher"), str(world / "student"))
    assert found.prompts == len(found.answers) == 24
    assert found.settings.format == speech.FORMAT, "as the graft was made"
    assert found.settings.max_new_tokens == 8
    results = [(one.dataset_name, one.metric_type, one.metric_value) for one in found.eval_results]
    assert results == [("labelled.jsonl", "exact", 1.0), ("labelled.jsonl", "token-f1", 1.0)]
    assert "<td><b>teacher</b></td><td>1.000</td>" in found._repr_html_()
    for sample in found.answers:
        assert sample.references == [sample.answers["graft"]] == [answers(world)[sample.prompt]]
        assert sample.answers["student"] == sample.answers["teacher base"] == speech.base_answer(sample.prompt)
    assert found.notes == []


def test_a_likelihood_is_the_loss_of_transformers(world: Path) -> None:
    found = evaluate(world / "graft", text=world / "labelled.jsonl", metrics=("nll",))
    tokenizer = transformers.AutoTokenizer.from_pretrained(world / "student")
    template = Template.of(tokenizer, format=speech.FORMAT)
    plain = transformers.AutoModelForCausalLM.from_pretrained(world / "student").eval()
    nats, tokens, size = {}, 0, 0
    for name in ("student", "graft"):
        model = peft.PeftModel.from_pretrained(plain, world / "graft").eval() if name == "graft" else plain
        nats[name], tokens, size = 0.0, 0, 0
        for prompt, answer in answers(world).items():
            side = template.encode(Prompt.of_text(prompt), answer)
            labels = torch.tensor([[-100] * side.start + side.ids[side.start :]])
            with torch.inference_mode():
                loss = float(model(input_ids=torch.tensor([side.ids]), labels=labels).loss)
            nats[name], tokens, size = nats[name] + loss * len(side), tokens + len(side), size + len(answer.encode())
    for row in found.rows[:2]:
        assert row.scores["nll"].value == pytest.approx(nats[row.name] / tokens, rel=1e-3)
        assert row.scores["nll/byte"].value == pytest.approx(nats[row.name] / size, rel=1e-3)
        assert row.scores["nll"].low <= row.scores["nll"].value <= row.scores["nll"].high
    assert found.rows[1].scores["nll"].value < found.rows[0].scores["nll"].value
    assert found.answers[0].answers == {}, "nothing is generated that no metric asks for"


def test_a_file_holds_it_all_and_is_not_replaced(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "scores.json"
    config = EvaluateConfig(limit=5, token="hf_secret")
    found = evaluate(world / "graft", text=world / "labelled.jsonl", out=out, config=config)
    assert Evaluation.model_validate_json(out.read_text()) == found.model_copy(
        update={"settings": found.settings.model_copy(update={"token": None})}
    )
    assert "hf_secret" not in out.read_text()
    assert [path.name for path in out.parent.iterdir()] == ["scores.json"]
    assert found.prompts == 5
    with pytest.raises(GraftError, match="exists already.*--force"):
        evaluate(world / "graft", text=world / "labelled.jsonl", out=out)
    with pytest.raises(GraftError, match="is a folder"):
        evaluate(world / "graft", text=world / "labelled.jsonl", out=tmp_path, config=EvaluateConfig(force=True))
    again = EvaluateConfig(limit=2, force=True)
    assert evaluate(world / "graft", text=world / "labelled.jsonl", out=out, config=again).prompts == 2
    assert json.loads(out.read_text())["prompts"] == 2


def test_an_interrupted_run_goes_on(world: Path, tmp_path: Path) -> None:
    class Stop(Callback):
        def on_stage_begin(self, stage: str) -> None:
            if stage == "asking the teacher":
                raise KeyboardInterrupt

    class Told(Callback):
        stages: list[str] = []

        def on_progress(self, stage: str, done: int, total: int | None) -> None:
            self.stages.append(stage)

    out, given = tmp_path / "scores.json", {"text": world / "labelled.jsonl", "config": CONFIG}
    whole = evaluate(world / "graft", **given)
    with pytest.raises(KeyboardInterrupt):
        evaluate(world / "graft", out=out, callbacks=[Stop()], **given)
    assert not out.exists()
    kept = sorted(path.name.partition("-")[0] for path in (tmp_path / "scores.json.unfinished").iterdir())
    assert kept == ["graft", "student"]
    found = evaluate(world / "graft", out=out, callbacks=[Told()], **given)
    assert set(Told.stages) == {"asking the teacher"}, "what was answered before is not asked again"
    assert (found.rows, found.answers) == (whole.rows, whole.answers)
    assert [path.name for path in tmp_path.iterdir()] == ["scores.json"]


def test_a_graft_in_memory_and_a_plain_module(world: Path) -> None:
    text, config = world / "labelled.jsonl", EvaluateConfig(limit=6, format=speech.FORMAT, max_new_tokens=8)
    live = peft_graft.transfer(
        world / "lora", world / "student", config=GraftConfig(method="copy", format=speech.FORMAT, polish=0)
    )
    read = Graft.from_pretrained(world / "graft")
    results = [evaluate(graft, text=text, config=config) for graft in (live, read, world / "graft")]
    assert [[row.scores for row in found.rows] for found in results[1:]] == [
        [row.scores for row in results[0].rows] for _ in results[1:]
    ]
    assert results[0].graft == "a graft in memory"
    plain = evaluate(world / "lora", text=text, config=config)
    assert [(row.name, row.scores["exact"].value == 1) for row in plain.rows] == [("base", False), ("module", True)]
    with pytest.raises(GraftError, match="no chat template.*--format"):
        evaluate(world / "lora", text=text)
    moved = evaluate(world / "lora", text=text, config=config, student=world / "student")
    assert moved.rows[0].model == str(world / "student")


def test_a_teacher_out_of_reach_is_left_out_unless_it_is_asked_for(world: Path, tmp_path: Path) -> None:
    graft = shutil.copytree(world / "graft", tmp_path / "graft")
    report = json.loads((graft / "graft.json").read_text())
    report["module"] = str(tmp_path / "gone")
    (graft / "graft.json").write_text(json.dumps(report))
    given = {"text": world / "labelled.jsonl"}
    found = evaluate(graft, config=EvaluateConfig(limit=3), **given)
    assert [row.name for row in found.rows] == ["student", "graft"]
    assert "without the teacher: " in found.notes[0]
    assert "gone: no such folder" in found.notes[0]
    with pytest.raises(GraftError, match="gone: no such folder"):
        evaluate(graft, teacher=world / "teacher", **given)
    config = EvaluateConfig(limit=3, module=str(world / "lora"))
    assert [row.name for row in evaluate(graft, config=config, **given).rows][-1] == "teacher"
    report |= {"module": str(world / "lora"), "module_files": {"adapter_model.safetensors": "other"}}
    (graft / "graft.json").write_text(json.dumps(report))
    assert "has changed" in evaluate(graft, config=EvaluateConfig(limit=3), **given).notes[0]


def test_what_cannot_be_scored_is_refused_before_weights_are_loaded(world: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("peft_graft.distill.sides.load_model", lambda *_, **__: pytest.fail("loaded"))
    graft = world / "graft"
    rows = [{"prompt": "abcd", "completion": "x"}, {"prompt": "bcde"}, {"prompt": "cdef"}]
    for given, said in [
        ({"text": rows}, "in memory: prompts without an answer.*found 2 of 3. Fix: leave those rows out"),
        ({"text": ["plain", "text"]}, "holds no prompts"),
        ({"text": rows[:1], "metrics": ("json-f1",)}, "no reference is a JSON object"),
        ({"text": rows[:1], "metrics": ("wit",)}, "--metric: no such metric; expected exact, .*, nll, found wit"),
        ({"text": rows[:1], "metrics": ()}, "no metric is named"),
        ({"text": [{"prompt": "a" * 300, "completion": "x"}]}, "all prompts are longer.*found 1"),
    ]:
        with pytest.raises(GraftError, match=said):
            evaluate(graft, **given)
    tiny.peft_lora(tmp_path / "bare", tiny.base_model(tmp_path / "bert", layers=2), task="base")
    with pytest.raises(
        GraftError,
        match="scores generated text, classes, numbers and answers in a text, and this is a base module.*study",
    ):
        evaluate(tmp_path / "bare", text=rows[:1])


@pytest.fixture
def run(monkeypatch, capsys):
    def command(*arguments: object, code: int = 0):
        monkeypatch.setenv("COLUMNS", "140")
        monkeypatch.setattr(sys, "argv", ["peft-graft", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        done = capsys.readouterr()
        assert ended.value.code == code, done.out + done.err
        return done

    return command


def test_the_command(run, world: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.json"
    done = run("evaluate", world / "graft", "--text", world / "labelled.jsonl", "--metric", "exact, nll", "--limit", 9,
               "--out", out)  # fmt: skip
    assert all(word in done.out for word in ("9 prompts", "exact", "nll/byte", "student", "graft", "teacher", "1.000"))
    assert done.out.count(" =") == 0
    assert "reference" in done.out
    assert "written" in done.out
    done = run("evaluate", world / "graft", "--text", world / "labelled.jsonl", "--limit", "2", "--json")
    assert EvaluateResult.model_validate_json(done.out).prompts == 2
    done = run("evaluate", world / "graft", "--text", world / "labelled.jsonl", "--metric", "wit", code=1)
    assert "no such metric" in done.err


def test_an_interval_narrows_with_more_answers() -> None:
    metric = METRICS["exact"]
    widths = []
    for count in (50, 800):
        low, high = interval([(float(number % 2),) for number in range(count)], metric.of_sums)
        assert low < 0.5 < high
        assert high - low == pytest.approx(2 * 1.96 * math.sqrt(0.25 / count), rel=0.15)
        widths.append(high - low)
    assert widths[1] < widths[0] / 3
