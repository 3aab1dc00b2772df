"""Ways in which a verdict could be better than its graft: each says what is true, or that nothing was measured."""

from __future__ import annotations

import json
import re
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch

import tiny
from peft_graft.alignment.maps import LinearMap
from peft_graft.alignment.text import Sample
from peft_graft.checkpoints.read import read_checkpoint
from peft_graft.checkpoints.resolve import PeftCheckpoint, resolve
from peft_graft.config import GraftConfig
from peft_graft.distill.agreement import Agreement, Draws, Verdict, compare_answers, compare_divergences, judge
from peft_graft.distill.candidates import Candidate
from peft_graft.distill.choose import Outcome, choose, judged
from peft_graft.distill.finite import NotFiniteError
from peft_graft.distill.generate import Answer
from peft_graft.distill.polish import PolishRecord, PolishSettings, polish
from peft_graft.distill.predictions import compare, measure
from peft_graft.distill.teacher import TextDistillation, ask_teacher, can_ask, sample_parts
from peft_graft.distill.training import Point, Schedule, StateStore, TrainingLoop
from peft_graft.errors import OutputError, PairingError, TextError
from peft_graft.files import json_text, write_json
from peft_graft.models.loading import ModelPair, load_model
from peft_graft.run import Run
from peft_graft.study.results import write_results

LINES = tiny.sentences(60, seed=8)


def classes(*chosen: int, of: int = 3, sure: float = 2.0) -> torch.Tensor:
    """[n, classes] logits of these decisions."""
    return sure * torch.nn.functional.one_hot(torch.tensor(chosen), of).float()


def spoilt(values: torch.Tensor, value: float = float("nan")) -> torch.Tensor:
    values.view(-1)[0] = value
    return values


def level(given: torch.Tensor, teacher: torch.Tensor, groups: object = None) -> Verdict:
    draws = Draws(groups if groups is not None else range(len(teacher)))
    return judge(compare(given, teacher.log_softmax(-1), "samples", draws=draws))


# ---- figures and their intervals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("student", [[1] * 40, [0] * 40, [0, 1] * 20])
def test_a_teacher_that_answers_one_class_measures_nothing(student: list[int]) -> None:
    verdict = level(classes(*student), classes(*[1] * 40))
    assert verdict.level == "not measured"
    assert verdict.measured.agreement is None
    assert verdict.measured.agreement_interval is None
    assert verdict.text == verdict.measured.undefined
    assert verdict.text.endswith("give text on which its classes differ")


def test_distributions_that_vary_within_one_class_are_measured_where_they_are_met() -> None:
    draw = torch.Generator().manual_seed(0)
    teacher = torch.tensor([5.0, 0.0, 0.0]) + torch.randn(40, 3, generator=draw)
    assert (teacher.argmax(-1) == 0).all()
    assert level(teacher, teacher).level == "exact"
    for student in (teacher + 0.1 * torch.randn(40, 3, generator=draw), teacher.mean(0).expand(40, 3)):
        assert level(student, teacher).level == "not measured"
    saturated = classes(*[1] * 40, sure=60.0)
    assert level(saturated, saturated).level == "not measured"


def test_few_texts_that_all_agree_are_not_exact() -> None:
    teacher = [0, 1, 2] * 3
    verdict = level(classes(*teacher, sure=9.0), classes(*teacher))
    assert verdict.measured.agreement == 1
    assert verdict.measured.agreement_interval == (0.5, 1)  # 1 - (3 / 9) / (1 - 1 / 3)
    assert verdict.level == "strong"
    many = level(classes(*teacher * 40, sure=9.0), classes(*teacher * 40))
    assert many.level == "exact"
    assert level(classes(*teacher), classes(*teacher)).level == "exact"  # the same distributions, not decisions alone


def test_one_text_of_another_class_is_no_evidence() -> None:
    teacher = [0] * 39 + [1]
    verdict = level(classes(*teacher, sure=9.0), classes(*teacher))
    assert verdict.measured.agreement == 1
    assert verdict.measured.agreement_interval[0] == 0
    assert verdict.level == "weak"


def test_the_interval_holds_the_figure_and_narrows_with_more_text() -> None:
    draw = torch.Generator().manual_seed(0)
    widths = []
    for count in (50, 800):
        teacher = torch.randn(count, 4, generator=draw)
        student = teacher + torch.randn(count, 4, generator=draw)
        found = compare(student, teacher.log_softmax(-1), "samples", draws=Draws(range(count)))
        for value, (low, high) in (
            (found.agreement, found.agreement_interval), (found.divergence, found.divergence_interval)
        ):  # fmt: skip
            assert low < value < high
        widths.append(found.agreement_interval[1] - found.agreement_interval[0])
    assert widths[0] > 2.5 * widths[1]


def test_words_of_one_text_are_drawn_together_and_by_the_seed() -> None:
    draw = torch.Generator().manual_seed(0)
    teacher = torch.randn(20, 4, generator=draw).repeat_interleave(30, 0)
    student = teacher + torch.randn(20, 4, generator=draw).repeat_interleave(30, 0)
    groups = [number // 30 for number in range(600)]

    def spread(draws: Draws) -> tuple[float, float]:
        return compare(student, teacher.log_softmax(-1), "words", draws=draws).agreement_interval

    alone, together = spread(Draws(range(600))), spread(Draws(groups))
    assert together[1] - together[0] > 2 * (alone[1] - alone[0])
    assert spread(Draws(groups)) == together != spread(Draws(groups, seed=1))


def test_a_wide_interval_lowers_the_level() -> None:
    for low, found in ((0.85, "strong"), (0.6, "strong"), (0.4, "useful"), (0.1, "weak"), (-0.2, "weak")):
        given = Agreement(agreement=0.9, divergence=1.0, answers=5, agreement_interval=(low, 1.0))
        assert judge(given).level == found


def test_not_measured_and_no_better_are_two_words() -> None:
    assert (judge(None).level, judge(None).text) == (
        "not measured", "give --text to compare the graft with its teacher"
    )  # fmt: skip
    assert judge(Agreement(agreement=-3.0, divergence=1.0, answers=5)).level == "no better"
    for former, now in ((None, "not measured"), ("none", "no better"), ("weak", "weak")):
        assert Verdict.model_validate({"level": former, "text": "as a report before has it"}).level == now


def test_a_shift_that_is_noise_measures_nothing() -> None:
    states = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    noise = 1e-6 * torch.randn(50, 8, generator=torch.Generator().manual_seed(1))
    found = compare(states + noise, states + noise, "hidden", noise, Draws(range(50)))
    assert found.agreement is None
    assert "moves nothing on this text" in judge(found).text
    moved = compare(states, states, "hidden", 0.1 * states, Draws(range(50)))
    assert (moved.agreement, judge(moved).level) == (1, "exact")


def test_a_shift_that_is_always_the_same_is_not_credited() -> None:
    draw = torch.Generator().manual_seed(0)
    states, own = (torch.randn(200, 8, generator=draw) for _ in range(2))
    shift = 3 + own
    found = compare(states + shift.mean(0), states + shift, "hidden", shift, Draws(range(200)))
    assert found.agreement == pytest.approx(found.constant)
    assert found.agreement > 0.85
    assert judge(found).level == "no better"
    always = compare(states + 3, states + 3, "hidden", torch.full((200, 8), 3.0), Draws(range(200)))
    assert "does the same everywhere" in judge(always).text


def test_a_graft_that_gives_one_answer_to_all_is_no_better() -> None:
    teacher, bare = said(*["yes"] * 60, *["no"] * 40), said(*["hm"] * 100)
    found = compare_answers(said(*["yes"] * 100), teacher, bare)
    assert (found.token_f1, found.constant_token_f1, found.agreement) == (0.6, 0.6, 0)
    always = compare_answers(said(*["yes"] * 9), said(*["yes"] * 9), said(*["hm"] * 9))
    assert always.agreement is None
    measured = compare_divergences([0.0] * 9, [3.0] * 9, [3] * 9)
    assert judge(measured, None, always).level == "not measured"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_compared(value: float) -> None:
    teacher = classes(0, 1, 2)
    for given, wanted, whose in ((spoilt(classes(0, 1, 2), value), teacher, "student"),
                                 (teacher, spoilt(classes(0, 1, 2), value), "teacher")):  # fmt: skip
        with pytest.raises(NotFiniteError, match=f"{whose}: the answer to 'number 1' is not finite"):
            compare(given, wanted, "samples")


def test_what_the_map_does_not_carry_is_not_credited() -> None:
    found = Agreement(agreement=1.0, divergence=0.0, answers=9, carried=0.6)
    assert judge(found).level == "useful"
    unrelated = judge(found.model_copy(update={"carried": 0.04}))
    assert unrelated.level == "not measured"
    assert unrelated.text.startswith("of the student's last hidden state the teacher's explains 4%")
    assert judge(found.model_copy(update={"carried": 1.0})).level == "exact"


def test_no_answers_measure_nothing() -> None:
    found = compare(torch.zeros(0, 3), torch.zeros(0, 3), "words", draws=Draws([]))
    assert judge(found).level == "not measured"
    assert (found.answers, found.divergence) == (0, 0.0)


def said(*texts: str) -> list[Answer]:
    return [Answer(text, ended=True) for text in texts]


def test_a_student_that_answers_as_the_teacher_does_by_itself_measures_nothing() -> None:
    teacher = said(*"abcdefghij")
    idle = compare_answers(teacher, teacher, teacher)
    assert (idle.agreement, idle.agreement_interval, idle.exact) == (None, None, 1)
    measured = compare_divergences([0.0] * 10, [1e-5] * 10, [3] * 10, Draws(range(10)))
    assert measured.agreement is None
    verdict = judge(measured, None, idle)
    assert verdict.level == "not measured"
    assert "without any module" in verdict.text
    assert "without any module" in judge(measured).text


def test_few_prompts_that_all_agree_are_not_exact() -> None:
    measured = compare_divergences([0.0] * 9, [3.0] * 9, [3] * 9)
    for count, found in ((9, "strong"), (60, "exact")):
        teacher, bare = said(*map(str, range(count))), said(*["x"] * count)
        generated = compare_answers(teacher, teacher, bare)
        assert judge(measured, None, generated).level == found
        assert generated.agreement_interval == pytest.approx((1 - 3 / count / (1 - 1 / count), 1))


def test_intervals_of_generated_answers() -> None:
    teacher, bare = said(*map(str, range(100))), said(*["x"] * 100)
    given = [*teacher[:70], *bare[70:]]
    found = compare_answers(given, teacher, bare)
    for value, (low, high) in (
        (found.agreement, found.agreement_interval), (found.exact, found.exact_interval),
        (found.token_f1, found.token_f1_interval),
    ):  # fmt: skip
        assert 0.55 < low < value < high < 0.85
    assert (found.exact, found.token_f1) == (0.7, 0.7)
    assert found.agreement == pytest.approx((0.7 - 0.01) / (1 - 0.01))
    alike = compare_answers(given, teacher, bare, groups=[number // 10 for number in range(100)])
    assert alike.exact_interval[0] < found.exact_interval[0] - 0.1


def test_divergences_of_prompts_have_intervals() -> None:
    draw = torch.Generator().manual_seed(0)
    own, bare = (scale * torch.rand(40, generator=draw) for scale in (1, 8))
    found = compare_divergences(own.tolist(), bare.tolist(), [4] * 40, Draws(range(40)))
    assert found.agreement == pytest.approx(1 - float(own.sum() / bare.sum()))
    assert found.agreement_interval[0] < found.agreement < found.agreement_interval[1]
    assert found.divergence_interval[0] < found.divergence < found.divergence_interval[1]


# ---- what is asked of models -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(world) -> ModelPair:
    return ModelPair(*(load_model(str(world / name), tokenizer=True) for name in ("teacher", "shallow")))


def checkpoint_of(folder, model) -> PeftCheckpoint:
    return resolve(read_checkpoint(folder), model.architecture, model.base_tensors())


@pytest.fixture(scope="module")
def asked(world, models) -> TextDistillation:
    pool = [Sample(line) for line in LINES]
    return ask_teacher(checkpoint_of(world / "lora", models.teacher), models, sample_parts(pool), Run(), train=1000)


@pytest.fixture(scope="module")
def own(tmp_path_factory, world, models) -> PeftCheckpoint:
    """A module of the student's, which has nothing of the teacher's."""
    folder = tmp_path_factory.mktemp("own") / "lora"
    tiny.peft_lora(folder, world / "shallow", seed=9)
    return checkpoint_of(folder, models.student)


def candidate(asked: TextDistillation, checkpoint: PeftCheckpoint) -> Candidate:
    return Candidate("copy", None, checkpoint, [], None, asked, asked.attach(checkpoint))


def of_kind(kind: type[TextDistillation], asked: TextDistillation) -> TextDistillation:
    return kind(**{field.name: getattr(asked, field.name) for field in fields(asked)})


def moved_by(asked: TextDistillation, own: PeftCheckpoint) -> tuple[Outcome, PolishRecord]:
    builder = SimpleNamespace(distillation=asked, run=Run(), build=lambda method: candidate(asked, own))
    outcome = choose(builder, [SimpleNamespace(name="copy")], "auto")
    return polish(outcome, PolishSettings(steps=20), Run())


def test_nothing_is_chosen_by_the_text_that_judges(asked, own) -> None:
    """The same graft comes out where that text says the opposite of all else."""

    class Opposite(TextDistillation):
        def judge(self, attached):
            return Agreement(agreement=-self.measure(attached).divergence, divergence=1e9, answers=1)

    (outcome, record), (other, same) = (moved_by(one, own) for one in (asked, of_kind(Opposite, asked)))
    assert record == same
    assert outcome.found == other.found
    assert judged(other, Run()).level == "no better"
    verdict = judged(outcome, Run(), seed=3)
    assert verdict.seed == 3
    assert verdict.measured.divergence < verdict.moved.divergence
    assert verdict.measured != outcome.found
    parts = (asked.held_out, asked.judging, asked.train)
    texts = [{part.text(row, asked.models.student) for row in range(len(part))} for part in parts]
    assert len(set.union(*texts)) == sum(map(len, texts)) == len(LINES)


def test_an_answer_of_the_teacher_that_is_not_finite_names_model_and_text(world, models, monkeypatch) -> None:
    parts = sample_parts(Sample(line) for line in LINES)
    bad = models.teacher.tokenizer(parts.learning[3].first)["input_ids"]
    from peft_graft.checkpoints.attached import AttachedModel

    forward = AttachedModel.forward

    def broken(self, inputs, *, module=True):
        logits, state = forward(self, inputs, module=module)
        for row, ids in enumerate(inputs["input_ids"].tolist()):
            if ids[: len(bad)] == bad:
                spoilt(logits[row, 1])
        return logits, state

    monkeypatch.setattr(AttachedModel, "forward", broken)
    with pytest.raises(NotFiniteError) as refusal:
        ask_teacher(checkpoint_of(world / "lora", models.teacher), models, parts, Run(), train=1000)
    where = f"teacher {world / 'teacher'} with its module"
    assert str(refusal.value).startswith(f"{where}: the answer to {parts.learning[3].first!r} is not finite")


def test_an_answer_of_the_student_that_is_not_finite_is_never_exact(asked, own, world) -> None:
    attached = asked.attach(own)
    word = asked.held_out.inputs[2]["input_ids"][1]
    with torch.no_grad():
        attached.base.embeddings.word_embeddings.weight[word] = float("nan")
    student = asked.models.student
    with pytest.raises(
        NotFiniteError, match=f"student {re.escape(student.name)}: the answer to .* is not finite"
    ) as refusal:
        measure(attached, student, asked.held_out)
    assert student.tokenizer.decode([word]) in str(refusal.value)
    with torch.no_grad():  # the base shares its values
        attached.base.embeddings.word_embeddings.weight[word] = 0.1


def test_a_candidate_that_is_not_finite_is_left_out_by_name(asked, own) -> None:
    site = next(iter(own.modules))
    broken = {name: spoilt(tensor.values.clone()) for name, tensor in own.modules[site].tensors.items()}
    bad = replace(own, modules={**own.modules, site: own.modules[site].with_values(broken)})
    found = {"bad": bad, "good": own}
    builder = SimpleNamespace(
        distillation=asked, run=Run(), build=lambda method: replace(candidate(asked, found[method.name]), method="good")
    )
    methods = [SimpleNamespace(name=name) for name in found]
    outcome = choose(builder, methods, "carry")
    assert outcome.candidate.checkpoint is own
    assert len(outcome.notes) == 1
    assert outcome.notes[0].startswith(f"bad left out: student {asked.models.student.name}: the answer to ")
    with pytest.raises(NotFiniteError):
        choose(builder, methods[:1], "carry")


def test_a_training_that_diverges_is_no_success(asked, own) -> None:
    """Its points have no divergence, it is not chosen, and what was there before stays."""

    class Diverging(TextDistillation):
        def loss(self, attached, rows, done=0.0):
            return super().loss(attached, rows, done) * float("nan")

    diverging = of_kind(Diverging, asked)
    start = candidate(diverging, own)
    outcome = Outcome(start, "carried", found=start.measure())
    found, record = polish(outcome, PolishSettings(steps=40), Run(), starts=("moved",))
    assert found is outcome or found.found.divergence == pytest.approx(outcome.found.divergence)
    assert [point.divergence is None for point in record.curve] == [False] + [True] * (len(record.curve) - 1)
    json_text(record.model_dump(mode="json"), "here")
    assert start.measure().divergence == pytest.approx(outcome.found.divergence, rel=1e-4)


def test_a_module_that_hardly_acts_is_not_judged_by_hidden_states(world, tmp_path, models) -> None:
    adapted = tiny.peft_lora(tmp_path / "idle", world / "teacher", task="base")
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "lora_B" in name:
                value.mul_(1e-7)
    adapted.save_pretrained(tmp_path / "idle")
    checkpoint = checkpoint_of(tmp_path / "idle", models.teacher)
    pool = sample_parts(Sample(line) for line in LINES)
    same = LinearMap(torch.eye(32), torch.eye(32), torch.zeros(32))
    asked = ask_teacher(checkpoint, ModelPair(models.teacher, models.teacher), pool, Run(), train=50, shift_map=same)
    verdict = judge(asked.judge(asked.teacher))  # whatever it is that is judged
    assert verdict.level == "not measured"
    assert "the teacher's module moves nothing on this text" in verdict.text


def test_unrelated_models_are_not_judged_by_hidden_states(world, tmp_path) -> None:
    """A map that carries next to nothing leaves next to nothing to reproduce."""
    tiny.peft_lora(tmp_path / "module", world / "teacher", task="base")
    teacher, student = (load_model(str(world / name), tokenizer=True) for name in ("teacher", "narrow"))
    checkpoint = checkpoint_of(tmp_path / "module", teacher)
    pool = sample_parts(Sample(line) for line in LINES)
    draw = torch.Generator().manual_seed(0)
    by_chance = LinearMap(None, 1e-3 * torch.randn(24, 32, generator=draw), torch.zeros(32))
    asked = ask_teacher(checkpoint, ModelPair(teacher, student), pool, Run(), train=50, shift_map=by_chance)
    assert asked.carried < 0.15
    same = ask_teacher(
        checkpoint, ModelPair(teacher, teacher), pool, Run(), train=50,
        shift_map=LinearMap(None, 3 * torch.eye(32), torch.zeros(32)),
    )  # fmt: skip
    assert same.carried == pytest.approx(1, abs=1e-6)


def test_models_that_read_no_word_alike_are_refused(world, models) -> None:
    parts = sample_parts(Sample(line) for line in LINES)
    blank = replace(parts, **{name: [Sample("\u2003") for _ in getattr(parts, name)]
                              for name in ("judging", "choosing", "learning")})  # fmt: skip
    with pytest.raises(PairingError, match="no word of the text is read alike by both models"):
        ask_teacher(checkpoint_of(world / "lora", models.teacher), models, blank, Run(), train=50)


def test_text_that_repeats_itself_is_named(world) -> None:
    raw, few = read_checkpoint(world / "lora"), LINES[:20]
    parts = sample_parts(Sample(few[number % 20]) for number in range(400))
    asked, remarks = can_ask(GraftConfig(), raw, parts)
    assert not asked
    assert remarks == ["neither fitted nor judged: 20 different of 400 samples of text are too few; give at least 50"]
    with pytest.raises(TextError, match="--text: too few samples .* expected at least 50, found 20 different of 400"):
        can_ask(GraftConfig(head="fit"), raw, parts)
    twice = sample_parts(Sample(line) for line in LINES * 2)
    assert can_ask(GraftConfig(), raw, twice) == (True, ["60 of 120 samples of text repeat others, and count once"])


def test_a_transfer_that_is_not_judged_says_why(world, tmp_path, command) -> None:
    few = tmp_path / "few.txt"
    few.write_text("\n".join(LINES[:20] * 10))
    done = command("transfer", world / "lora", "--student", world / "shallow", "--text", few, "--out", tmp_path / "out")
    reason = "neither fitted nor judged: 20 different of 200 samples of text are too few; give at least 50"
    assert "verdict: not measured" in done.out
    assert reason[1:] in " ".join(done.out.replace("│", " ").split())
    verdict = json.loads((tmp_path / "out" / "graft.json").read_text())["verdict"]
    assert (verdict["level"], verdict["text"], verdict["measured"]) == ("not measured", reason, None)
    assert f"| verdict | not measured: {reason} |" in (tmp_path / "out" / "README.md").read_text()


# ---- what is written -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_json_has_no_number_that_is_none(tmp_path, value: float) -> None:
    with pytest.raises(OutputError, match=re.escape(f"graft.json: a number is not finite, which JSON cannot say; found "
                                                    f"verdict.curve.1.divergence {value}")):  # fmt: skip
        write_json(tmp_path / "graft.json", {"verdict": {"curve": [{}, {"divergence": value}]}})
    assert not (tmp_path / "graft.json").exists()
    with pytest.raises(OutputError, match="results.jsonl: a number is not finite"):
        write_results([{"result": {"score": value}}], tmp_path / "results.jsonl")


def test_a_state_without_a_best_point_is_kept_and_taken_up(tmp_path) -> None:
    def loop() -> TrainingLoop:
        torch.manual_seed(0)
        model = torch.nn.Linear(2, 1)
        return TrainingLoop(
            model, [1] * 8, lambda rows: model(torch.ones(len(rows), 2)).sum(), Schedule(steps=4, batch_size=2,
            learning_rate=0.1, evaluations=(2,)), lambda step: Point(step, float("inf"), keep=False),
            store=StateStore(tmp_path / "state"),
        )  # fmt: skip

    loop().run(2)
    json.loads((tmp_path / "state" / "state.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert [(point.step, point.cost) for point in loop().run()] == [(2, float("inf")), (4, float("inf"))]
