"""A language model's module moves by the teacher's answers to prompts, between tokenizers of two makes."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
from tokenizers import AddedToken

import peft_graft
import speech
from peft_graft import Callback, Graft, GraftConfig
from peft_graft.checkpoints.read import read_checkpoint
from peft_graft.checkpoints.resolve import resolve
from peft_graft.distill import generate, prompt_targets
from peft_graft.distill.ask_prompts import Asking
from peft_graft.distill.completions import Templates
from peft_graft.distill.finite import NotFiniteError
from peft_graft.distill.generate import Answer, AnswerStore, Sampling, generate_answers
from peft_graft.distill.gradient_start import gradient_start
from peft_graft.errors import GraftError, ModelError, PlanError, TextError
from peft_graft.models.loading import ModelPair, load_model
from peft_graft.prompts.conversation import Prompt
from peft_graft.prompts.template import Template
from peft_graft.run import Run

FORMAT, LONGEST = speech.FORMAT, 8
CONFIG = GraftConfig(format=FORMAT, max_new_tokens=LONGEST)


def ask(root: Path, student: str = "stranger", prompts: int = 60, **options):
    """What the student learns from, without a transfer around it."""
    models = ModelPair(*(load_model(str(root / name), tokenizer=True) for name in ("teacher", student)))
    raw = read_checkpoint(root / "module")
    checkpoint = resolve(raw, models.teacher.architecture, models.teacher.base_tensors())
    templates = Templates(*(Template.of(one.tokenizer, format=FORMAT) for one in (models.teacher, models.student)))
    asking = Asking(templates, Sampling(max_new_tokens=LONGEST), **options)
    given = [Prompt.of_text(word, speech.answer(word)) for word in speech.words(prompts, seed=3)]
    return checkpoint, asking.ask(checkpoint, models, given, Run())


@pytest.fixture(scope="module")
def asked(speakers):
    return ask(speakers)[1]


@pytest.fixture(scope="module")
def moved(speakers, tmp_path_factory) -> Graft:
    out = tmp_path_factory.mktemp("moved") / "graft"
    config = CONFIG.model_copy(update={"polish": 180})
    return peft_graft.transfer(
        speakers / "module", speakers / "stranger", text=speakers / "prompts.jsonl", config=config, out=out
    )


def test_a_module_moves_to_a_stranger_by_its_answers(moved, speakers):
    report = moved.report
    assert report.verdict.generated.exact > 0.8
    assert report.verdict.generated.bare_exact == 0
    assert report.verdict.level in ("strong", "exact")
    assert report.verdict.measured.agreement > 0.8
    assert report.polish.curve[0].agreement == pytest.approx(0, abs=1e-4)
    assert report.prompts.held_out == 48
    assert report.prompts.prompts == 192
    assert 0.5 < report.prompts.strict_share < 1  # two letters that the student has one token for
    assert report.prompts.module_effect > 1
    assert report.settings.format == FORMAT
    assert report.answers[0].teacher != report.answers[0].bare


def test_the_written_graft_answers_new_prompts_as_the_teacher_was_taught(moved, speakers):
    base = transformers.AutoModelForCausalLM.from_pretrained(speakers / "stranger", dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, moved.folder)
    template = Template.of(transformers.AutoTokenizer.from_pretrained(speakers / "stranger"), format=FORMAT)
    words = speech.words(60, seed=77)
    said = generate_answers(model, template, [Prompt.of_text(word) for word in words], Sampling(max_new_tokens=LONGEST))
    assert sum(answer.text == speech.answer(word) for answer, word in zip(said, words, strict=True)) > 45
    assert Graft.from_pretrained(moved.folder).report.prompts == moved.report.prompts


def test_prompts_that_judge_choose_and_teach_have_nothing_in_common(asked):
    parts = [asked.judging, asked.held_out, asked.train]
    assert [len(part) for part in parts] == [8, 6, 46]
    assert (asked.record.judging, asked.record.held_out, asked.record.prompts) == (8, 14, 46)
    assert len(asked.asked) == len(asked.answers) == len(asked.bare_answers) == len(asked.groups) == 8
    inputs = [tuple(row) for part in parts for row in part.inputs]
    assert len(set(inputs)) == len(inputs) == 60
    judging = [row[:start] for row, start in zip(asked.judging.inputs, asked.judging.starts, strict=True)]
    assert judging == [asked.templates.student.ids(prompt) for prompt in asked.asked]


def test_figures_of_prompts_have_intervals(moved):
    verdict = moved.report.verdict
    for found in (verdict.measured, verdict.moved, verdict.generated):
        low, high = found.agreement_interval
        assert low <= found.agreement <= high
    assert verdict.generated.constant_token_f1 < 0.5


def test_an_answer_that_is_not_finite_names_model_and_prompt(asked, speakers, monkeypatch):
    attached = asked.attach(untrained(asked))
    with torch.no_grad():
        next(iter(attached.trainable().values())).fill_(float("nan"))
    student = f"student {asked.models.student.name}: the answer to "
    with pytest.raises(NotFiniteError, match=f"{re.escape(student)}'[a-h]{{4}} =.*' is not finite"):
        asked.measure(attached)
    right = prompt_targets.last_states
    monkeypatch.setattr(prompt_targets, "last_states", lambda *given, **how: right(*given, **how) * float("nan"))
    with pytest.raises(
        NotFiniteError, match="^teacher .*teacher with its module: the answer to '[a-h]{4}' is not finite"
    ):
        ask(speakers)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_the_loss_does_not_depend_on_what_stands_beside_a_row(asked, padding):
    models = asked.models
    attached = asked.attach(untrained(asked))
    asked.templates.student.tokenizer.padding_side = padding
    rows = list(range(9))
    with torch.no_grad():
        whole = float(asked.loss(attached, rows))
        sizes = [len(asked.train.strict[row]) + len(asked.train.text[row]) for row in rows]
        single = [float(asked.loss(attached, [row])) for row in rows]
    assert models.student.tokenizer is not None
    assert whole == pytest.approx(sum(a * b for a, b in zip(sizes, single, strict=True)) / sum(sizes), rel=1e-4)


def untrained(asked):
    """A module of the student that changes nothing."""
    folder = Path(asked.models.student.name)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"])
    peft.get_peft_model(model, config).save_pretrained(folder.parent / "neutral")
    raw = read_checkpoint(folder.parent / "neutral")
    return resolve(raw, asked.models.student.architecture, asked.models.student.base_tensors())


def test_the_same_model_and_module_are_at_one_everywhere(speakers):
    checkpoint, asked = ask(speakers, student="teacher")
    assert asked.record.strict_share == 1
    attached = asked.attach(checkpoint)
    assert asked.measure(attached).divergence < 1e-6
    assert _largest_gradient(asked, attached) < 1e-3 * _largest_gradient(asked, asked.attach(untrained(asked)))


def _largest_gradient(asked, attached) -> float:
    attached.model.eval()
    asked.loss(attached, list(range(8))).backward()
    return max(float(value.grad.abs().max()) for value in attached.trainable().values())


def test_what_the_student_alone_may_say_counts_against_it(asked):
    assert asked.columns.shared < len(asked.columns.student.ids)
    index = asked.columns.index()
    for row, start, text in zip(asked.train.inputs, asked.train.starts, asked.train.text, strict=True):
        for place, column in text.tolist():
            assert index[row[start + place]] == column >= 0


def test_answers_that_were_given_are_learned_where_they_are_asked_for(speakers):
    asked = ask(speakers, use_given=True)[1]
    assert asked.record.given == asked.record.prompts
    tokenizer = asked.templates.student.tokenizer
    for prompt, row, start in zip(asked.prompts, asked.train.inputs, asked.train.starts, strict=True):
        assert tokenizer.decode(row[start:], skip_special_tokens=True) == prompt.answer
    lengths = [len(row) - start for row, start in zip(asked.train.inputs, asked.train.starts, strict=True)]
    assert [len(text) for text in asked.train.text] == lengths  # every token of it, and not only those that pair


def test_given_answers_that_are_longer_than_the_models_read_are_left_out(speakers, tmp_path, monkeypatch):
    """A prompt leaves room for the teacher's longest answer; one that was given may be longer than that."""
    words = speech.words(120)
    given = [speech.answer(word) + " a" * 200 * (number % 3 == 0) for number, word in enumerate(words)]
    speech.prompt_file(tmp_path / "given.jsonl", words, given)
    longest, real = [], prompt_targets.last_states

    def seen(model, template, rows, **more):
        longest.append(max(map(len, rows)))
        return real(model, template, rows, **more)

    monkeypatch.setattr(prompt_targets, "last_states", seen)
    config = CONFIG.model_copy(update={"labels": "use", "max_length": 32, "polish": 5})
    module, student, text = speakers / "module", speakers / "stranger", tmp_path / "given.jsonl"
    found = peft_graft.transfer(module, student, text=text, config=config).report.prompts
    assert max(longest) <= 32
    assert found.too_long > 20
    assert found.prompts + found.held_out + found.too_long == 120
    ignored = peft_graft.transfer(module, student, text=text, config=config.model_copy(update={"labels": "ignore"}))
    assert ignored.report.prompts.too_long == 0, "answers that are not learned are not read"


@pytest.mark.parametrize("side", ["teacher", "stranger"])
def test_tokenizers_may_have_more_tokens_than_their_models(speakers, tmp_path, side):
    """As Gemma 3's have one for images beside models that read text alone."""
    for name in ("teacher", "stranger"):
        shutil.copytree(speakers / name, tmp_path / name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / side)
    tokenizer.add_tokens([AddedToken("<image>", special=True)])
    tokenizer.save_pretrained(tmp_path / side)
    config = CONFIG.model_copy(update={"polish": 20, "max_prompts": 100})
    for student in ("stranger", "teacher"):
        graft = peft_graft.transfer(
            speakers / "module",
            tmp_path / student,
            teacher=speakers / "teacher",
            text=speakers / "prompts.jsonl",
            config=config,
        )
        assert graft.report.prompts.shared_tokens > 200


def test_on_its_own_answers_a_student_comes_nearer_to_the_teacher(asked):
    own = replace(asked, on_policy=1.0)
    attached = own.attach(untrained(asked))
    optimizer = torch.optim.AdamW(attached.trainable().values(), lr=1e-2)
    before = own.measure(attached).divergence
    torch.manual_seed(0)
    for _ in range(12):
        attached.model.train()
        own.loss(attached, list(range(16)), done=0.5).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert own.measure(attached).divergence < before


@pytest.mark.parametrize("bf16", [False, True])
def test_activations_that_are_computed_anew_give_the_same_gradient(asked, bf16):
    found = []
    for again in (False, True):
        attached = replace(asked, gradient_checkpointing=again, bf16=bf16).attach(untrained(asked))
        attached.model.train()
        computed_anew = [part for part in attached.base.modules() if getattr(part, "gradient_checkpointing", False)]
        assert bool(computed_anew) == again
        torch.manual_seed(0)
        asked.loss(attached, list(range(8))).backward()
        found.append({name: value.grad for name, value in attached.trainable().items()})
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value)


def test_where_memory_is_short_a_start_is_found_a_row_at_a_time(asked):
    found, rows = [], []
    for again in (False, True):
        own = replace(asked, gradient_checkpointing=again)
        attached = own.attach(untrained(asked))
        attached.base.register_forward_pre_hook(lambda *call: rows.append(len(call[2]["input_ids"])), with_kwargs=True)
        found.append(gradient_start(attached, own))
    assert rows[0] > 1
    assert rows[-1] == 1
    for path, part in found[0].parts.items():
        torch.testing.assert_close(found[1].parts[path].A, part.A, atol=1e-3, rtol=0)


def test_a_copy_in_another_order_generates_the_same_text(speakers, tmp_path):
    speech.in_another_order(speakers / "teacher", tmp_path / "copy")
    config = CONFIG.model_copy(update={"method": "prune-align", "max_prompts": 100})
    graft = peft_graft.transfer(
        speakers / "module", tmp_path / "copy", text=speakers / "prompts.jsonl", config=config
    )  # fmt: skip
    assert graft.report.verdict.generated.exact == 1
    assert graft.report.verdict.measured.divergence < 1e-4


def test_a_relative_begins_where_the_copied_module_stands(speakers, tmp_path):
    relative = transformers.AutoModelForCausalLM.from_pretrained(speakers / "teacher", dtype=torch.float32)
    torch.manual_seed(5)
    for value in relative.parameters():
        value.data += 0.02 * value.data.std() * torch.randn(value.shape) if value.ndim > 1 else 0
    relative.save_pretrained(tmp_path / "relative")
    for file in (speakers / "teacher").glob("*token*"):
        shutil.copy(file, tmp_path / "relative")
    config = CONFIG.model_copy(update={"polish": 20, "max_prompts": 100})
    graft = peft_graft.transfer(
        speakers / "module", tmp_path / "relative", text=speakers / "prompts.jsonl", config=config
    )  # fmt: skip
    assert graft.report.method == "copy"
    assert graft.report.verdict.moved.agreement > 0.5
    assert set(graft.report.tried) == {"copy, as moved", "fresh, as moved"}
    assert graft.report.tried["fresh, as moved"].agreement == pytest.approx(0, abs=1e-4)


class StopAt(Callback):
    """Interrupts a stage once so much of it is done."""

    def __init__(self, stage: str, done: int) -> None:
        self.stage, self.done = stage, done

    def on_progress(self, stage: str, done: int, total: int | None) -> None:
        if stage == self.stage and done >= self.done:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def undisturbed(speakers) -> tuple[dict[str, object], Graft]:
    """A transfer's options, and what comes of it at one go."""
    config = CONFIG.model_copy(update={"polish": 20, "max_prompts": 60})
    options = {"text": speakers / "prompts.jsonl", "config": config}
    return options, peft_graft.transfer(speakers / "module", speakers / "stranger", **options)


@pytest.mark.parametrize(("stage", "done"), [("asking the teacher", 1), ("polishing", 12)])
def test_an_interrupted_run_goes_on_to_the_same_graft(speakers, undisturbed, tmp_path, stage, done):
    options, whole = undisturbed
    with pytest.raises(KeyboardInterrupt):
        peft_graft.transfer(
            speakers / "module", speakers / "stranger", out=tmp_path / "graft", callbacks=[StopAt(stage, done)],
            **options,
        )  # fmt: skip
    assert list((tmp_path / "graft.unfinished").glob("teacher-answers-*.jsonl"))
    again = peft_graft.transfer(speakers / "module", speakers / "stranger", out=tmp_path / "graft", **options)
    for path, part in whole.checkpoint.modules.items():
        for name, tensor in part.tensors.items():
            assert torch.equal(tensor.values, again.checkpoint.modules[path].tensors[name].values)
    assert again.report.answers == whole.report.answers
    assert not (tmp_path / "graft.unfinished").exists()


def test_a_line_that_a_kill_cut_off_is_asked_for_again(tmp_path):
    store = AnswerStore(tmp_path, "answers", "key")
    store.add({0: Answer("one\n", ended=True), 1: Answer("two", ended=False)})
    store.path.write_bytes(store.path.read_bytes()[:-5])
    assert store.load() == {0: Answer("one\n", ended=True)}
    store.add({1: Answer("two", ended=False)})
    assert store.load() == {0: Answer("one\n", ended=True), 1: Answer("two", ended=False)}
    assert AnswerStore(tmp_path, "answers", "another").load() == {}


def test_a_gpu_answers_as_many_prompts_at_a_time_as_its_memory_holds(monkeypatch) -> None:
    config = transformers.LlamaConfig(
        hidden_size=8192, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8, intermediate_size=28672
    )
    of_a_token = 2 * (80 * 8 * 128 * 2 + 3 * 28672 + 6 * 8192)
    found = generate.prompts_within(config, 512, 2, 40 << 30)
    assert found == (20 << 30) // (512 * of_a_token + 8 * config.vocab_size) == 70
    assert generate.prompts_within(config, 512, 2, 400 << 30) == generate.GPU_BATCH
    assert generate.prompts_within(config, 1 << 20, 2, 1 << 30) == 1
    # Where layers are spread, the GPU that has the least left for its share of them counts.
    free = {torch.device("cuda:0"): 4 << 30, torch.device("cuda:1"): 30 << 30}
    monkeypatch.setattr(generate, "free_bytes", free.__getitem__)
    weights = [SimpleNamespace(device=device, nbytes=100, is_meta=False, element_size=lambda: 2) for device in free]
    model = SimpleNamespace(config=config, parameters=lambda: iter(weights))
    assert generate.batch_size_of(model, 512) == generate.prompts_within(config, 512, 2, 8 << 30)
    assert generate.batch_size_of(torch.nn.Linear(1, 1), 512) == generate.BATCH


def test_answers_to_other_prompts_in_memory_are_not_taken_up(speakers, tmp_path):
    for seed in (0, 1, 1):
        prompts = [Prompt.of_text(word) for word in speech.words(60, seed=seed)]
        with pytest.raises(KeyboardInterrupt):
            peft_graft.transfer(
                speakers / "module", speakers / "stranger", text=prompts, config=CONFIG, out=tmp_path / "graft",
                callbacks=[StopAt("asking the teacher", 1)],
            )  # fmt: skip
    assert len(list((tmp_path / "graft.unfinished").glob("teacher-answers-*.jsonl"))) == 2


def test_answers_outlive_a_kill_within_a_character_and_ends_of_lines_of_their_own(tmp_path):
    store = AnswerStore(tmp_path, "answers", "key")
    store.add({0: Answer("one\u2028line\x85", ended=True), 1: Answer("\u00e9", ended=False)})
    content = store.path.read_bytes()
    store.path.write_bytes(content[: content.rindex("\u00e9".encode()) + 1])
    assert store.load() == {0: Answer("one\u2028line\x85", ended=True)}


def test_drawn_answers_are_the_same_again_and_others_by_another_seed(speakers):
    model = transformers.AutoModelForCausalLM.from_pretrained(speakers / "teacher", dtype=torch.float32)
    template = Template.of(transformers.AutoTokenizer.from_pretrained(speakers / "teacher"), format=FORMAT)
    prompts = [Prompt.of_text(word) for word in speech.words(20)]

    def drawn(seed: int) -> list[Answer]:
        return generate_answers(model, template, prompts, Sampling(max_new_tokens=6, temperature=3.0, seed=seed))

    assert drawn(0) == drawn(0) != drawn(1)
    one = generate_answers(model, template, prompts, Sampling(max_new_tokens=6))
    assert one == generate_answers(model, template, prompts, Sampling(max_new_tokens=6), batch_size=1)


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.fixture
def refused(speakers, tmp_path):
    """The error of a transfer; what is known before weights are loaded, ``inspect`` says in the same words."""

    def run(kind: type[GraftError], match: str, *, late: bool = False, **options) -> None:
        module = options.pop("module", speakers / "module")
        student = options.pop("student", speakers / "stranger")
        text = options.pop("text", speakers / "prompts.jsonl")
        settings = {"format": FORMAT, "max_new_tokens": LONGEST, "polish": 5, **options}
        with pytest.raises(kind, match=match) as error:
            peft_graft.transfer(module, student, text=text, out=tmp_path / "out", config=GraftConfig(**settings))
        assert not (tmp_path / "out").exists()
        if not late:
            found = peft_graft.inspect(module, student, text=text, config=GraftConfig(**settings))
            assert found.student.problem == str(error.value)

    return run


def test_a_model_without_a_template_needs_a_format(refused):
    refused(ModelError, "teacher .*: the model has no chat template. Fix: give --format", format=None)
    refused(ModelError, "student .*: the model has no chat template. Fix: give --format", student_format="chat")


def test_a_format_needs_a_place_for_the_prompt(refused):
    refused(PlanError, "the format has no place for the prompt; expected {prompt} in it", format="Question:")


def test_prompts_that_are_too_long_are_refused_when_all_of_them_are(refused, tmp_path):
    long = speech.prompt_file(tmp_path / "long.jsonl", [word * 100 for word in speech.words(50)])
    refused(TextError, "all prompts are longer than the models read, with the answer; found 50", text=long)
    refused(TextError, "too few prompts to learn from", text=speech.prompt_file(tmp_path / "few.jsonl", ["a", "b"]))


def test_a_broken_line_is_named_by_its_number(refused, tmp_path):
    file = tmp_path / "broken.jsonl"
    file.write_text('{"prompt": "ab"}\n{"prompt": \n')
    refused(TextError, "line 2", text=file)


def test_functional_grafting_is_for_plain_text(refused):
    refused(PlanError, "--method functional: functional grafting fits layers on plain text", method="functional")


def test_a_fresh_module_needs_a_polish():
    with pytest.raises(PlanError, match="--method fresh: a fresh module is of no use without a polish"):
        GraftConfig(method="fresh", polish=0)


def test_answers_that_are_all_cut_teach_no_end(refused):
    refused(TextError, "the teacher's answers: all of them were cut", max_new_tokens=1, late=True)


def test_answers_that_are_all_the_same_teach_nothing(refused, tmp_path):
    same = speech.prompt_file(tmp_path / "same.jsonl", [f"ac{word}" for word in speech.words(60, length=2)])
    refused(TextError, "the teacher's answers: all of them are the same; found 'd a'", text=same, late=True)


def test_a_module_that_changes_nothing_on_the_prompts_is_not_moved_by_them(refused, speakers, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(speakers / "teacher", dtype=torch.float32)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
    adapted = peft.get_peft_model(model, config)
    for name, value in adapted.named_parameters():
        if "lora_B" in name:
            value.data += 1e-7
    adapted.save_pretrained(tmp_path / "idle")
    refused(TextError, "makes the teacher's answers no likelier", module=tmp_path / "idle", late=True)


def test_answers_that_are_all_empty_are_refused(refused, speakers, tmp_path):
    silent = tmp_path / "silent"
    model = transformers.AutoModelForCausalLM.from_pretrained(speakers / "teacher", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(speakers / "teacher")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    adapted = peft.get_peft_model(model, config)
    speech.teach(adapted, tokenizer, lambda word: "", 60, 1e-2)
    adapted.save_pretrained(silent)
    refused(TextError, "the teacher's answers: all of them are empty", module=silent, late=True)


def test_prompts_as_columns_of_their_own_names(refused, speakers, tmp_path):
    file = tmp_path / "named.jsonl"
    file.write_text("".join(json.dumps({"ask": word, "say": "x"}) + "\n" for word in speech.words(60)))
    config = CONFIG.model_copy(update={"columns": ("ask", "say")})
    found = peft_graft.inspect(speakers / "module", speakers / "stranger", text=file, config=config)
    assert found.student.prompts.prompts == 60
    assert found.student.prompts.strict_share is not None
    assert found.student.training_mib > 0
