"""Tasks of generated text: read, encoded, trained on their completions and scored by answers."""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers
from datasets import Dataset
from tokenizers import decoders

import families
import speech
import tiny
from peft_graft.config import Library
from peft_graft.errors import ModelError, StudyError, TextError
from peft_graft.metrics import METRICS, score_answers
from peft_graft.prompts.conversation import Message, Prompt
from peft_graft.study.data import read_prompts, read_task, read_unlabelled, text_file
from peft_graft.study.folder import StudyFolder
from peft_graft.study.generation import answers_of, collate_completions, completion_loss, generation_task, logits_at
from peft_graft.study.grids import cells_of
from peft_graft.study.modules import new_module
from peft_graft.study.ner import IGNORED
from peft_graft.study.read_study import paper_study, read_study
from peft_graft.study.runner import Here, run_study
from peft_graft.study.spec import CONTROL, FRESH, GenerationSpec
from peft_graft.study.tables import result_tables
from peft_graft.study.training import TrainingSettings, Validation, fine_tune, score

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None, reason="the extra study is not installed"
)

#: A word and another, for a model to learn by heart; in lower case as its tokenizer has them.
WORDS = [word for word in tiny.WORDS if word.islower()]
PROMPTS = [Prompt.of_text(word, answer) for word, answer in zip(WORDS[:4], WORDS[6:10], strict=True)]
TASK = generation_task("next", format="{prompt} :", max_new_tokens=8, max_length=32)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose tokenizer begins texts, ends answers, and joins the pieces of words."""
    folder = families.llama(tmp_path_factory.mktemp("causal"), tie_word_embeddings=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = "[SEP]"
    tokenizer.backend_tokenizer.decoder = decoders.WordPiece()
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tokenizer(model_folder: Path):
    return transformers.AutoTokenizer.from_pretrained(model_folder)


# ---- reading ---------------------------------------------------------------------------------------------------------


def write(path: Path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_prompts_are_read_with_answers_in_their_order(tmp_path: Path) -> None:
    usual = write(tmp_path / "usual.jsonl", {"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"})
    assert read_prompts(usual) == [Prompt.of_text("a", "b"), Prompt.of_text("c", "d")]
    named = write(tmp_path / "named.jsonl", {"question": "a", "says": "b", "prompt": "no"})
    assert read_prompts(named, ("question", "says")) == [Prompt.of_text("a", "b")]
    several = write(tmp_path / "several.jsonl", {"prompt": "a", "references": ["b", "c"]})
    expected = [Prompt((Message("user", "a"),), "b", ("b", "c"))]
    assert read_prompts(several) == expected
    assert read_prompts(several, ("prompt", "references")) == expected
    assert read_prompts(several, ("prompt", "completion")) == expected
    Dataset.from_list([{"prompt": "a", "references": ["b", "c"]}]).to_parquet(tmp_path / "several.parquet")
    assert read_prompts(str(tmp_path / "several.parquet")) == expected


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        ({"text": "a"}, (), "row 1: there is no prompt; expected prompt and completion, found text"),
        ({"prompt": "a"}, (), "row 1: a prompt has no answer; expected completion or references, found prompt"),
        ({"prompt": "a", "says": None}, ("prompt", "says"), "a prompt has no answer; expected says or references"),
        ({"prompt": "a"}, ("prompt", "says"), "the text has no such columns; expected some of prompt, found says"),
        ({"prompt": " ", "completion": "a"}, (), "there are no prompts"),
    ],
)
def test_rows_that_cannot_be_scored_are_named(tmp_path: Path, row: dict, columns: tuple, message: str) -> None:
    with pytest.raises(TextError, match=message):
        read_prompts(write(tmp_path / "rows.jsonl", row), columns)


def test_what_a_transfer_reads_has_no_answers(tmp_path: Path) -> None:
    turns = (Message("system", "s"), Message("user", "b"))
    examples = [PROMPTS[0], Prompt(turns, "c")]
    text_file(examples, tmp_path / "text.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "text.jsonl").read_text().splitlines()]
    system, user = ({"role": turn.role, "content": turn.content} for turn in turns)
    assert rows == [{"prompt": "river"}, {"prompt": [system, user]}]
    assert [example.text for example in examples] == ["river", "b"]


# ---- encoding --------------------------------------------------------------------------------------------------------


def test_only_the_answer_and_its_end_are_labelled(tokenizer) -> None:
    (row,) = TASK.encode([Prompt.of_text("river bridge", "green harbour")], tokenizer)
    before = tokenizer("river bridge :")["input_ids"][:-1]  # begun, not ended
    assert before[0] == tokenizer.cls_token_id
    answer = [*tokenizer("green harbour", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert row == {
        "input_ids": before + answer,
        "attention_mask": [1] * len(before + answer),
        "labels": [IGNORED] * len(before) + answer,
    }
    batch = collate_completions([row, *TASK.encode(PROMPTS[:1], tokenizer)])
    short = int(batch["attention_mask"][1].sum())
    assert short < len(row["labels"]) == batch["labels"].shape[1]
    assert (batch["labels"][1, short:] == IGNORED).all()


def test_a_chat_template_is_used_where_no_format_is_given(tokenizer) -> None:
    task = generation_task("chat")
    with pytest.raises(ModelError, match="no chat template"):
        task.encode(PROMPTS, tokenizer)
    tokenizer.chat_template = (
        "{% for message in messages %}[MASK] {{ message.content }} [SEP]{% endfor %}"
        "{% if add_generation_prompt %}[MASK]{% endif %}"
    )
    (row,) = task.encode([Prompt.of_text("river", "green")], tokenizer)
    river, green = (tokenizer.tokenize(word) for word in ("river", "green"))
    turns = ["[MASK]", *river, "[SEP]", "[MASK]", *green, "[SEP]"]
    assert tokenizer.convert_ids_to_tokens(row["input_ids"]) == turns
    answer = [label for label in row["labels"] if label != IGNORED]
    assert tokenizer.convert_ids_to_tokens(answer) == [*green, "[SEP]"]


def test_what_is_too_long_is_cut(tokenizer, caplog) -> None:
    room = 1 + len(tokenizer.tokenize("river"))  # of the prompt, with the token that begins it
    task = generation_task("short", format="{prompt}", max_length=room + 2)
    long = Prompt.of_text("river river river river", "green")
    with caplog.at_level(logging.WARNING, "peft_graft"):
        rows = task.encode([Prompt.of_text("river", "."), Prompt.of_text("river", "green green"), long], tokenizer)
    assert [len(row["input_ids"]) for row in rows] == [room + 2] * 3
    assert [sum(label != IGNORED for label in row["labels"]) for row in rows] == [2, 2, 0]
    assert rows[0]["input_ids"][-1] == tokenizer.eos_token_id != rows[1]["input_ids"][-1]
    assert f"2 of 3 examples are cut at {room + 2} tokens" in caplog.text
    with pytest.raises(TextError, match="short: no prompt leaves room for its answer; expected prompts of less than"):
        task.encode([long], tokenizer)


# ---- the loss --------------------------------------------------------------------------------------------------------


def causal(family: str):
    special = {"cohere": {"logit_scale": 0.25}, "gemma2": {"final_logit_softcapping": 2.0}}.get(family, {})
    if family == "granite":
        config = transformers.GraniteConfig(
            **families.COMMON, **families.FFN, num_key_value_heads=2, logits_scaling=3.0
        )
    else:
        config = families.DECODERS[family]
        config = type(config)(**{**config.to_dict(), **special})
    torch.manual_seed(0)
    return tiny.lively(transformers.AutoModelForCausalLM.from_config(config))


def batch_of(rows: int = 3, length: int = 9) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 200, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    labels = ids.masked_fill(mask == 0, IGNORED)
    labels[:, :4] = IGNORED
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "granite", "gpt2", "bloom", "opt"])
def test_the_loss_is_the_models_own_and_of_few_logits(family: str) -> None:
    model, batch, sizes = causal(family), batch_of(), []
    handle = model.get_output_embeddings().register_forward_hook(lambda layer, given, out: sizes.append(out.shape))
    found = completion_loss(model, batch)
    handle.remove()
    wanted = int((batch["labels"][:, 1:] != IGNORED).sum())
    assert sizes == [(1, wanted, 200)]
    torch.testing.assert_close(found, model(**batch).loss)
    assert not model.get_output_embeddings()._forward_pre_hooks


@pytest.mark.parametrize("kind", ["lora", "lora of the output", "prompt"])
def test_the_loss_of_a_model_with_a_module_has_its_gradients(kind: str) -> None:
    settings = {"target_modules": ["q_proj", "lm_head"] if "output" in kind else ["q_proj"], "init_lora_weights": False}
    config = (
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        if kind == "prompt"
        else peft.LoraConfig(task_type="CAUSAL_LM", **settings)
    )
    model, batch = peft.get_peft_model(causal("llama"), config), batch_of()
    gradients = []
    for loss in (completion_loss(model, batch), model(**batch).loss):
        model.zero_grad()
        loss.backward()
        gradients.append([value.grad.clone() for value in model.parameters() if value.requires_grad])
    assert gradients[0]
    for mine, own in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, own)


def test_a_batch_without_labels_has_no_loss_and_odd_models_work_too() -> None:
    model, batch = causal("llama"), batch_of()
    nothing = {**batch, "labels": torch.full_like(batch["labels"], IGNORED)}
    assert completion_loss(model, nothing) == 0
    whole = model(batch["input_ids"], batch["attention_mask"]).logits

    class Odd(torch.nn.Module):  # its forward pass does not call its output layer
        def get_output_embeddings(self) -> torch.nn.Module:
            return torch.nn.Identity()

        def forward(self, **inputs) -> object:
            return transformers.modeling_outputs.CausalLMOutput(logits=whole)

    wanted = batch["labels"] != IGNORED
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    torch.testing.assert_close(logits_at(Odd(), inputs, wanted), logits_at(model, inputs, wanted))


# ---- training and scoring --------------------------------------------------------------------------------------------


def test_a_fresh_module_is_lora_on_query_and_value_and_changes_nothing(model_folder: Path, tokenizer) -> None:
    model = new_module(model_folder, Library.PEFT, TASK, 0)
    config = model.peft_config["default"]
    assert config.task_type == "CAUSAL_LM"
    assert set(config.target_modules) == {"q_proj", "v_proj"}
    assert config.modules_to_save is None
    bare = transformers.AutoModelForCausalLM.from_pretrained(model_folder).eval()
    assert answers_of(model.eval(), TASK, tokenizer, PROMPTS) == answers_of(bare, TASK, tokenizer, PROMPTS)


def test_a_module_learns_its_answers_by_heart_and_is_scored_by_them(model_folder: Path, tokenizer) -> None:
    everything = {"r": 8, "lora_alpha": 32, "target_modules": "all-linear"}
    model = new_module(model_folder, Library.PEFT, TASK, 0, everything)
    rows, questions = TASK.encode(PROMPTS * 15, tokenizer), TASK.questions(PROMPTS, tokenizer)
    assert score(model, questions, tokenizer, TASK) == 0
    settings = TrainingSettings(learning_rate=1e-2, epochs=8, batch_size=4)
    tuned = fine_tune(model, rows, tokenizer, settings, Validation(questions, TASK, tokenizer))
    assert max(value for _, value in tuned.curve) == 1
    assert score(model, questions, tokenizer, TASK) == 1
    assert answers_of(model, TASK, tokenizer, PROMPTS) == [prompt.answer for prompt in PROMPTS]


def test_the_score_of_the_commonest_answer() -> None:
    prompts = [Prompt.of_text("a", "yes"), Prompt.of_text("b", "no"), Prompt.of_text("c", "yes")]
    assert generation_task("x", "accuracy").majority_score(prompts) == pytest.approx(2 / 3)


# ---- studies ---------------------------------------------------------------------------------------------------------

STUDY = """
name = "words"
max_tokens = 2000

[models]
big = "{model}"
small = "{model}"

[tasks.next]
kind = "generation"
train = "./words.jsonl"
test = "./words.jsonl"
format = "{{prompt}} :"
max_new_tokens = 4
validation_examples = 2

[modules.lora]

[[grid]]
teacher = "big"
student = "small"
modules = ["lora"]
tasks = ["next"]
methods = ["copy"]
polish = [0]
budgets = [0, 2]
"""


MOVING = """
name = "speech"

[models]
big = "./big"
small = "./small"

[tasks.letters]
kind = "generation"
train = "./train.jsonl"
test = "./test.jsonl"
format = "{prompt} ="
max_new_tokens = 8
max_length = 40
validation_examples = 4

[modules.lora]
config = { r = 8, lora_alpha = 16, target_modules = "all-linear" }

[training]
teacher = { learning_rate = 1e-2, epochs = 14, batch_size = 16 }
keep_best = false

[[grid]]
teacher = "big"
student = "small"
modules = ["lora"]
tasks = ["letters"]
methods = ["fresh"]
polish = [100]
budgets = [0]
"""


@pytest.fixture
def file(model_folder: Path, tmp_path: Path) -> Path:
    rows = [{"prompt": prompt.text, "completion": prompt.answer} for prompt in PROMPTS]
    write(tmp_path / "words.jsonl", *rows)
    path = tmp_path / "study.toml"
    path.write_text(STUDY.format(model=model_folder))
    return path


def test_a_study_of_generation_is_declared_and_read(file: Path) -> None:
    study = read_study(file)
    spec = study.tasks["next"]
    assert isinstance(spec, GenerationSpec)
    task, train, validation, test = read_task("next", spec, "en")
    assert (task.metric, task.peft_type, task.labels) == ("exact", "CAUSAL_LM", ())
    assert (task.format, task.max_new_tokens, task.max_length) == ("{prompt} :", 4, 1024)
    assert (len(train), len(validation)) == (2, 2)
    assert test == PROMPTS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("tasks.next.metric=macro F1", "tasks.next: generation is not scored by macro F1, but by exact or accuracy or"),
        ("tasks.next.format=Answer", "tasks.next: the format has no place for the prompt; .* found Answer"),
        ("tasks.next.system=s", "tasks.next: the format has no place for the system; expected {system} in it"),
        ("tasks.next.label=x", "tasks.next.label: unknown key; expected kind, train, .*found label"),
        ("tasks.next.kind=writing", "tasks.next: no such kind of task; expected .*generation, found writing"),
        ("tasks.next.max_length=1", "tasks.next.max_length: Input should be greater"),
        ("modules.lora.library=adapters", "grid 0: next is a task of generation, which takes modules of peft"),
        ("tasks.next.max_new_tokens=1024", "tasks.next: max_length 1024 leaves a prompt no room beside max_new_tokens"),
        ("tasks.next.unlabelled_examples=9", "tasks.next: unlabelled_examples come after the train_examples, so give"),
        ("grid.0.learn=['answers']", "grid.0.learn.0: Input should be 'distributions' or 'text'"),
        ("grid.0.on_policy=[2]", "grid.0.on_policy: must not be more than 1; found 2"),
        (
            "grid.0.controls=['random', 'head']",
            "takes the controls other-task and random, not head: there is no head, an",
        ),
        ("grid.0.controls=['other-task']", "grid 0: the control other-task needs another task in the language of next"),
        ("grid.0.through=['big']", "grid 0: next is a task of generation, which takes no through"),
        ("grid.0.distil=[true]", "grid 0: next is a task of generation, which takes neither distil nor from_fresh"),
    ],
)
def test_what_a_task_of_generation_cannot_be(file: Path, change: str, message: str) -> None:
    with pytest.raises(StudyError, match=message):
        read_study(file, [change])


PLUGIN = """
from peft_graft.metrics import register_metric

@register_metric("words")
def words(answers, references):
    return {value}
"""


def test_the_content_of_a_plugin_is_part_of_the_ids_of_what_its_metric_scores(file: Path) -> None:
    changes = ["plugins=['mine.py']", "tasks.next.metric='words'"]
    try:
        found = []
        for value in (0.5, 0.25, 0.25):
            (file.parent / "mine.py").write_text(PLUGIN.format(value=value))
            found.append(cells_of(read_study(file, changes)))
        assert not {*found[0]} & {*found[1]}
        assert {*found[1]} == {*found[2]}
        METRICS.pop("words")  # as on another machine, where the study was not read
        for name in [name for name in sys.modules if name.startswith("peft_graft_plugin_")]:
            del sys.modules[name]
        next(iter(found[1].values())).config.examples.read()
        assert score_answers("words", ["a"], ["b"]) == 0.25
    finally:
        METRICS.pop("words", None)
    (file.parent / "mine.py").write_text("")
    assert {*cells_of(read_study(file))} == {*cells_of(read_study(file, changes[:1]))}


def test_a_student_of_generation_is_run(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    study = read_study(file, ["training.student.epochs=1", "training.teacher.epochs=1"])
    cells = cells_of(study, "student-*fresh*")
    assert [cell.config.budget for cell in cells.values()] == [0, 2]
    run_study(study, out, Here(out), only="student-*fresh*")
    results = [json.loads((out / "cells" / f"{name}.json").read_text())["result"] for name in cells]
    assert [result["examples"] for result in results] == [0, 2]
    assert {result["metric"] for result in results} == {"exact"}
    assert results[0]["before"] == results[0]["score"] == results[1]["before"]
    assert {*StudyFolder(out).finished} == {*cells}
    longer = read_study(file, ["training.student.epochs=2", "training.teacher.epochs=1"])
    run_study(longer, out, Here(out), only="student-*fresh*-2-*")
    assert {*StudyFolder(out).finished} < {*cells_of(longer)}, "what was done with other options is not the study's"


def test_grafts_are_asked_as_the_task_says_and_align_by_themselves(file: Path) -> None:
    changes = ["methods=['auto', 'fresh', 'procrustes']", "polish=['auto', 0]", "layers=['skip', 'avg']"]
    task = ["format='{system} {prompt}'", "system='s'", "template_args={ enable_thinking = false }", "max_length=99"]
    study = read_study(
        file, [*(f"grid.0.{change}" for change in changes), *(f"tasks.next.{change}" for change in task)]
    )
    cells = list(cells_of(study).values())
    assert {cell.kind for cell in cells} == {"teacher", "graft", "student"}
    options = {cell.names.start: cell.config.transfer for cell in cells if cell.kind == "graft"}
    assert list(options) == [
        "default", "default, polish 0", "fresh/skip, polish 1000", "procrustes/skip", "procrustes/skip, polish 0",
        "procrustes/avg", "procrustes/avg, polish 0",
    ]  # fmt: skip
    for option in options.values():
        assert (option.format, option.system, option.template_args) == (
            "{system} {prompt}",
            "s",
            {"enable_thinking": False},
        )
        assert (option.max_new_tokens, option.max_length) == (4, 99)


def test_grids_list_what_is_learned_and_more_budgets_of_the_fresh_module(file: Path) -> None:
    changes = ["learn=['distributions', 'text']", "on_policy=[0.0, 0.3]", "fresh_budgets=['all']"]
    cells = list(cells_of(read_study(file, [f"grid.0.{change}" for change in changes])).values())
    options = {cell.names.start: cell.config.transfer for cell in cells if cell.kind == "graft"}
    plain = "copy/skip, polish 0"
    assert list(options) == [
        plain,
        f"{plain}, on-policy 0.3",
        f"{plain}, learn text",
        f"{plain}, learn text, on-policy 0.3",
    ]
    assert [(option.learn, option.on_policy) for option in options.values()] == [
        ("distributions", 0.0), ("distributions", 0.3), ("text", 0.0), ("text", 0.3),
    ]  # fmt: skip
    budgets = {cell.names.start: [] for cell in cells if cell.kind == "student"}
    for cell in cells:
        if cell.kind == "student":
            budgets[cell.names.start].append(cell.config.budget)
    assert budgets == {FRESH: [0, 2, "all"]} | {start: [0, 2] for start in options}


def test_grafts_may_learn_from_prompts_that_no_teacher_has_seen(file: Path, tmp_path: Path, caplog) -> None:
    rows = [{"prompt": str(number % 12), "completion": "x"} for number in range(20)]
    write(tmp_path / "words.jsonl", *rows)

    def spec(*changes: str) -> GenerationSpec:
        return read_study(file, [f"tasks.next.{change}" for change in changes]).tasks["next"]

    first = spec("train_examples=6")
    taught = [prompt.text for prompt in read_task("next", first, "en")[1]]
    assert [prompt.text for prompt in read_unlabelled(first, "en")] == taught
    others = [prompt.text for prompt in read_unlabelled(spec("train_examples=6", "unlabelled_examples=4"), "en")]
    assert len(taught) == 6
    assert len(others) == 4
    assert not set(taught) & set(others)
    assert not caplog.messages
    left = len(read_unlabelled(spec("train_examples=6", "unlabelled_examples=99"), "en"))
    (message,) = caplog.messages
    assert f"{left} texts come after the 6 training examples, fewer than the 99 that grafts" in message
    with pytest.raises(TextError, match=r"no texts beyond the training examples; expected more than .* = 18"):
        read_unlabelled(spec("train_examples=18", "unlabelled_examples=4"), "en")


def test_a_study_of_generation_moves_what_the_teacher_learned(speakers: Path, tmp_path: Path) -> None:
    """Between tokenizers of unlike makes, by prompts in the task's format."""
    words = speech.words(180)
    for name, chosen in (("train", words[:140]), ("test", words[140:])):
        speech.prompt_file(tmp_path / f"{name}.jsonl", chosen, [speech.answer(word) for word in chosen])
    path = tmp_path / "study.toml"
    path.write_text(MOVING)
    models = [f"models.big={speakers / 'teacher'}", f"models.small={speakers / 'stranger'}"]
    out, study = tmp_path / "out", read_study(path, models)
    assert not run_study(study, out, Here(out)).failed
    records = {
        f"{record['kind']} {record['names'].get('start')}": record
        for record in StudyFolder(out).records(cells_of(study))
    }
    start = "fresh/skip, polish 100"
    assert set(records) == {"teacher None", "student fresh", f"graft {start}", f"student {start}"}
    assert records[f"graft {start}"]["result"]["method"] == "fresh"
    scores = [records[name]["result"]["score"] for name in ("teacher None", "student fresh", f"student {start}")]
    assert min(scores[0], scores[2]) > 0.5 > 0.2 > scores[1]
    (table,) = result_tables(list(records.values()))
    assert (table.metric, [row.start for row in table.rows]) == ("exact", ["teacher", FRESH, start])


def test_controls_move_other_weights_while_the_same_teacher_answers(speakers: Path, tmp_path: Path) -> None:
    """Between copies of one model the task's own weights are all of it; another task's and random ones are nothing."""
    words = speech.words(180)
    for task, says in (("letters", speech.answer), ("firsts", lambda word: f"{word[0]} {word[0]}")):
        for name, chosen in (("train", words[:140]), ("test", words[140:])):
            (tmp_path / task).mkdir(exist_ok=True)
            speech.prompt_file(tmp_path / task / f"{name}.jsonl", chosen, [says(word) for word in chosen])
    path, (head, grid) = tmp_path / "study.toml", MOVING.split("\n\n[modules.lora]")
    table = head[head.index("[tasks.letters]") :]
    both = [table.replace('"./', f'"./{task}/').replace("letters", task) for task in ("letters", "firsts")]
    controls = 'controls = ["other-task", "random"]\n'
    path.write_text("\n\n".join([head.replace(table, ""), *both, f"[modules.lora]{grid}{controls}"]))
    changes = [f"models.{name}={speakers / 'teacher'}" for name in ("big", "small")]
    with pytest.raises(StudyError, match="controls beside methods that move weights, which fresh does not"):
        read_study(path, changes)
    out, study = tmp_path / "out", read_study(path, [*changes, "grid.0.methods=['fresh', 'copy']", "grid.0.polish=[0]"])
    cells = cells_of(study)
    assert not run_study(study, out, Here(out)).failed
    records = StudyFolder(out).records(cells)
    made = {one["names"]["start"]: one for one in records if one["kind"] in ("graft", "control")}
    own, other, random = (
        f"{name}, polish 0" for name in ("copy/skip", f"{CONTROL}module of another task", f"{CONTROL}random module")
    )
    assert list(made) == [own, other, random]
    assert {one["result"]["method"] for one in made.values()} == {"copy"}
    reports = {
        start: json.loads((StudyFolder(out).artifact(one["id"]) / "graft.json").read_text())
        for start, one in made.items()
    }
    answers = {start: [answer["teacher"] for answer in report["answers"]] for start, report in reports.items()}
    assert answers[own] == answers[other] == answers[random]
    scores = {one["names"]["start"]: one["result"]["score"] for one in records if one["kind"] == "student"}
    assert scores[own] > 0.5 > 0.1 > max(scores[other], scores[random])
    levels = {start: report["verdict"]["level"] for start, report in reports.items()}
    assert levels[own] == "strong"
    assert {levels[other], levels[random]} == {"no better"}
    assert len({report["identity"] for report in reports.values()}) == 3


def test_tasks_of_labels_keep_the_ids_of_their_cells() -> None:
    """Published results are found by them."""
    cells = list(cells_of(read_study(paper_study("matching"))))
    assert cells[0] == "teacher-mBERT-adapter-ner-de-5b303a7466"
    assert (
        next(cell for cell in cells if cell.startswith("student-"))
        == "student-DistilmBERT-adapter-ner-de-fresh-all-0-d934f20821"
    )
