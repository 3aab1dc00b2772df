"""Learning from the teacher's answers: asked, fitted, polished, judged."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import islice

import pytest
import torch
import transformers
from peft import PeftModel

import tiny
from conftest import needs_adapters
from peft_graft.alignment.activations import pad, tokenize
from peft_graft.alignment.text import Sample, read_text
from peft_graft.checkpoints.attach import attach
from peft_graft.checkpoints.read import read_checkpoint
from peft_graft.checkpoints.resolve import checkpoint_of_student, resolve
from peft_graft.distill.agreement import LEVELS, Agreement, judge
from peft_graft.distill.fit_head import fit_head
from peft_graft.distill.gradient_start import gradient_start
from peft_graft.distill.predictions import compare
from peft_graft.distill.targets import Targets, distillation_loss, student_answers
from peft_graft.distill.teacher import TextDistillation, ask_teacher, sample_parts
from peft_graft.distill.training import Schedule, length_batches
from peft_graft.errors import AlignmentError, HeadError, PlanError, TextError
from peft_graft.models.loading import ModelPair, load_model
from peft_graft.models.spaces import FIRST_OUT, TOKENS_OUT
from peft_graft.modules.head import Head, head_tensors
from peft_graft.run import UNFINISHED, Run


@pytest.fixture(scope="module")
def module(world, tmp_path_factory):
    """A LoRA whose head, unlike a random one, gives every class its share."""
    return tiny.evenly_deciding_lora(tmp_path_factory.mktemp("distillation") / "module", world / "teacher")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Less text, where it does not matter how well it is learned from."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(tiny.sentences(100)))
    return path


def transfer(world, module, **options):
    options = {"student": world / "narrow", "text": world / "text.txt", "method": "prune-align", **options}
    return tiny.transfer(module, **options)


# ---- agreement -------------------------------------------------------------------------------------------------------


def test_agreement_is_cohens_kappa_and_the_divergence_from_the_teacher() -> None:
    teacher = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0], [0.0, 2.0]]).log_softmax(-1)
    same = compare(teacher, teacher, "words")
    assert same.agreement == pytest.approx(1)
    assert same.divergence == pytest.approx(0, abs=1e-12)
    # three of four alike, shares (1/2, 1/2) and (3/4, 1/4): chance 1/2, kappa 1/2
    other = compare(torch.tensor([[1.0, 0], [1.0, 0], [1.0, 0], [0, 1.0]]), teacher, "words")
    assert other.agreement == pytest.approx(0.5)
    p, q = teacher.exp(), torch.tensor([[1.0, 0], [1.0, 0], [1.0, 0], [0, 1.0]]).softmax(-1)
    assert other.divergence == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-5)


def test_a_student_that_always_says_the_commonest_class_has_no_agreement() -> None:
    teacher = torch.tensor([[2.0, 0.0]] * 9 + [[0.0, 2.0]]).log_softmax(-1)
    assert compare(torch.tensor([[1.0, 0.0]] * 10), teacher, "samples").agreement == pytest.approx(0)


def test_without_a_head_agreement_is_the_share_of_the_shift_reproduced() -> None:
    shift = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    assert compare(shift, shift, "hidden", shift).agreement == pytest.approx(1)
    assert compare(torch.zeros(20, 6), shift, "hidden", shift).agreement == pytest.approx(0)
    assert compare(-shift, shift, "hidden", shift).agreement == pytest.approx(-3)


def test_the_verdict_follows_the_levels() -> None:
    for level, least, text in LEVELS:
        verdict = judge(Agreement(agreement=least, divergence=1.0, answers=5))
        assert (verdict.level, verdict.text) == (level, text)
    assert judge(Agreement(agreement=0.1, divergence=1.0, answers=5)).text.endswith(
        "no better than an untrained module"
    )
    assert judge(None).level == "not measured"


# ---- fitting ---------------------------------------------------------------------------------------------------------


def soft_task(classes: int = 4, width: int = 12, rows: int = 600):
    generator = torch.Generator().manual_seed(0)
    read = torch.randn(rows, width, generator=generator) * torch.linspace(0.1, 20, width) + 5
    weight = torch.randn(classes, width, generator=generator) / torch.linspace(0.1, 20, width)
    logits = read @ weight.T
    return read, (logits - logits.mean(0)).log_softmax(-1)


def test_a_fitted_head_gives_the_teachers_predictions_from_features_of_any_scale() -> None:
    read, targets = soft_task()
    blank = Head("token-classification", head_tensors({"out.weight": torch.zeros(4, 12), "out.bias": torch.zeros(4)},
                                                      TOKENS_OUT), TOKENS_OUT, ())  # fmt: skip
    fitted, report = fit_head(blank, read, targets)
    logits = read @ fitted.tensors["out.weight"].values.T + fitted.tensors["out.bias"].values
    assert compare(logits, targets, "words").agreement > 0.97
    assert report["divergence"] < 0.02


def test_a_head_with_an_inner_layer_starts_from_the_mapped_one_and_improves() -> None:
    generator = torch.Generator().manual_seed(1)
    read = torch.randn(500, 10, generator=generator)
    dense, out = torch.randn(8, 10, generator=generator), torch.randn(3, 8, generator=generator)
    targets = (torch.tanh(read @ dense.T) @ out.T).log_softmax(-1)
    tensors = {
        "dense.weight": dense + 0.3 * torch.randn(8, 10, generator=generator), "dense.bias": torch.zeros(8),
        "out.weight": torch.zeros(3, 8), "out.bias": torch.zeros(3),
    }  # fmt: skip
    head = Head("sequence-classification", head_tensors(tensors, FIRST_OUT), FIRST_OUT, (), "tanh")
    fitted, _ = fit_head(head, read, targets)

    def logits(of: Head) -> torch.Tensor:
        values = {name: tensor.values for name, tensor in of.tensors.items()}
        inner = torch.tanh(read @ values["dense.weight"].T + values["dense.bias"])
        return inner @ values["out.weight"].T + values["out.bias"]

    assert compare(logits(fitted), targets, "samples").agreement > 0.9
    assert compare(logits(head), targets, "samples").agreement < 0.1


# ---- transfer --------------------------------------------------------------------------------------------------------


def test_batches_cover_every_row_once_and_depend_on_the_seed() -> None:
    lengths = [(7 * index) % 31 for index in range(101)]
    plain = list(length_batches(lengths, 8))
    assert sorted(row for rows in plain for row in rows) == list(range(101))
    first, again, other = (list(length_batches(lengths, 8, seed)) for seed in (1, 1, 2))
    assert first == again != other
    assert sorted(row for rows in first for row in rows) == list(range(101))


@pytest.mark.parametrize("paired", [False, True])
def test_held_out_text_is_never_learned_from(world, module, paired: bool) -> None:
    models = ModelPair(*(load_model(str(world / name), tokenizer=True) for name in ("teacher", "narrow")))
    checkpoint = resolve(read_checkpoint(module), models.teacher.architecture, models.teacher.base_tensors())
    texts = tiny.sentences(200, seed=8)
    pool = [Sample(a, b if paired else None) for a, b in zip(texts[:100], texts[100:], strict=True)]
    run = Run()
    found = ask_teacher(checkpoint, models, sample_parts(pool), run, train=1000)
    assert len(found.held_out) == len(found.judging) == 10
    assert len(found.train) == len(found.samples) == (160 if paired else 80), "pairs the other way round too"
    held_out = {text for sample in pool[:20] for text in sample.texts}
    assert not held_out & {text for sample in found.samples for text in sample.texts}
    assert "asking the teacher" in run.seconds


def test_fitting_the_head_agrees_better_than_carrying_it(world, module, text) -> None:
    carried, fitted = (transfer(world, module, text=text, head=head).report for head in ("carry", "fit"))
    assert carried.head.how == "carried"
    assert fitted.head.how == "fitted"
    assert fitted.verdict.measured.divergence < carried.verdict.measured.divergence / 2
    assert fitted.verdict.moved.divergence == pytest.approx(carried.verdict.measured.divergence, rel=1e-4)
    assert transfer(world, module, text=text).report.head.how == "fitted"  # auto takes the better


@pytest.mark.parametrize("kind", ["lora", pytest.param("pfeiffer", marks=needs_adapters)])
def test_a_polish_agrees_better_and_says_so_in_the_report(world, module, tmp_path, kind: str) -> None:
    source = module if kind == "lora" else world / "pfeiffer"
    graft = transfer(world, source, polish=100, head="carry", out=tmp_path / "graft")
    polish, curve = graft.report.polish, graft.report.polish.curve
    # Three trials of a twentieth of the steps each; the best of them went on.
    assert [point.step for point in curve] == [0, 5, 15, 30, 45, 60, 75, 90]
    best = min(polish.pilots, key=lambda name: polish.pilots[name].divergence)
    assert best == f"{polish.start} {polish.settings.learning_rate:g}"
    assert polish.pilots[best] == curve[1]
    assert {"moved 0.003", "gradient 0.003"} < polish.pilots.keys()
    assert min(point.divergence for point in curve) < 0.9 * curve[0].divergence
    verdict = graft.report.verdict  # by other text than the curve
    assert verdict.measured.divergence < 0.9 * verdict.moved.divergence
    assert verdict.measured.divergence not in [point.divergence for point in curve]
    assert "polish" in (tmp_path / "graft" / "README.md").read_text()
    assert not (tmp_path / f"graft{UNFINISHED}").exists()


def test_what_was_measured_is_what_was_written(world, module, text, tmp_path) -> None:
    """The verdict's divergence, computed again from the written checkpoint and the teacher's own library."""
    graft = transfer(world, module, text=text, polish=20, out=tmp_path / "graft", seed=4)
    held_out = [sample.first for sample in islice(read_text(text, None, 4), 10)]
    answers = []
    for base, folder in ((world / "teacher", module), (world / "narrow", tmp_path / "graft")):
        model = PeftModel.from_pretrained(tiny.task_model(base), folder).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(base)
        rows = []
        for line in held_out:
            batch = tokenizer(line, return_offsets_mapping=True, return_tensors="pt")
            offsets = batch.pop("offset_mapping")[0].tolist()
            starts = {}
            for index, (start, end) in enumerate(offsets):
                while start < end and line[start] == " ":
                    start += 1
                if end > start:
                    starts.setdefault(start, index)
            words = [i for i, c in enumerate(line) if c != " " and (i == 0 or line[i - 1] == " " or c == ".")]
            with torch.inference_mode():
                logits = model(**batch).logits[0]
            rows.append({word: logits[starts[word]].log_softmax(-1) for word in words if word in starts})
        answers.append(rows)
    kl = [float((t[w].exp() * (t[w] - s[w])).sum()) for t, s in zip(*answers, strict=True) for w in t if w in s]
    assert len(kl) == graft.report.verdict.measured.answers
    assert sum(kl) / len(kl) == pytest.approx(graft.report.verdict.measured.divergence, rel=1e-3)


def test_an_interrupted_polish_goes_on_to_the_same_result(world, module, text, tmp_path) -> None:
    options = {"polish": 40, "text": text}
    whole = transfer(world, module, **options)

    def stop(stage: str, done: int, total: int | None) -> None:
        done_in_all.append(stage == "polishing" and done > 0)
        if sum(done_in_all) == 13:
            raise KeyboardInterrupt

    done_in_all: list[bool] = []

    with pytest.raises(KeyboardInterrupt):
        transfer(world, module, **options, out=tmp_path / "graft", progress=stop)
    assert not (tmp_path / "graft").exists()
    assert (tmp_path / f"graft{UNFINISHED}").is_dir()
    steps = []

    def watch(stage: str, done: int, total: int | None) -> None:
        if stage == "polishing" and done:
            steps.append(done)

    resumed = transfer(world, module, **options, out=tmp_path / "graft", progress=watch)
    # Three trials of two steps (which do not run again), then the rest of the best one: seven more were done.
    assert steps == list(range(14, 41))
    assert not (tmp_path / f"graft{UNFINISHED}").exists()
    assert resumed.report.polish == whole.report.polish
    for site, module in whole.checkpoint.modules.items():
        for name, tensor in module.tensors.items():
            torch.testing.assert_close(resumed.checkpoint.modules[site].tensors[name].values, tensor.values)


@pytest.mark.parametrize("kind", ["lora", pytest.param("pfeiffer", marks=needs_adapters)])
def test_a_gradient_start_changes_nothing_and_reads_where_the_gradient_points(
    world, module, text, kind: str, monkeypatch
) -> None:
    """Its directions are those of the exact gradient with respect to the weight that the module stands beside."""
    source = module if kind == "lora" else world / "pfeiffer"
    graft = transfer(world, source, method="copy", student=world / "shallow", text=text, head="carry")
    student = load_model(str(world / "shallow"), tokenizer=True)
    modules = {site: module.neutral() for site, module in graft.checkpoint.modules.items()}
    raw = checkpoint_of_student(replace(graft.checkpoint, modules=modules), student)
    labels = graft.checkpoint.head.labels
    attached = attach(raw, student, labels, trainable=True)
    texts = [Sample(text) for text in tiny.sentences(40)]
    inputs, _ = tokenize(student, texts, 64)
    targets = Targets("words", inputs, [[(1, 2), (2, 3)]] * 40, [torch.randn(2, 5).log_softmax(-1) for _ in texts])
    models = ModelPair(student, student)
    asked = TextDistillation(
        models, attached, labels, bf16=False, samples=texts, train=targets, held_out=targets, judging=targets,
        groups=range(40),
    )  # fmt: skip
    found = gradient_start(attached, asked)
    # Without the memory for more than one module's gradient at a time it is found module by module.
    monkeypatch.setattr("peft_graft.distill.gradient_start.free_bytes", lambda device: 0)
    one_by_one = gradient_start(attached, asked)
    assert len(one_by_one.parts) > 1
    for path, part in found.parts.items():
        for name, tensor in part.tensors.items():
            torch.testing.assert_close(one_by_one.parts[path].tensors[name], tensor)
    inactive = attach(found, student, labels)
    batch = pad(student, inputs[:8], torch.device("cpu"))
    torch.testing.assert_close(inactive.forward(batch)[1], inactive.forward(batch, module=False)[1], atol=1e-5, rtol=0)
    path, part = next(iter(found.parts.items()))
    if kind != "lora":
        assert part.tensors["down.weight"].abs().sum() > 0
        assert not part.tensors["up.weight"].any()
        return
    layer = attached.module_at(path)
    layer.base_layer.weight.requires_grad_(True)
    for rows in length_batches(targets.lengths, seed=0):
        distillation_loss(student_answers(attached, student, targets, rows), targets, rows).backward()
    wanted = torch.linalg.svd(layer.base_layer.weight.grad)[2][: part.rank]
    cosines = (part.A @ wanted.T).diagonal().abs()
    torch.testing.assert_close(cosines, torch.ones_like(cosines), atol=1e-3, rtol=0)


def test_the_state_of_other_work_is_not_taken_up(world, module, text, tmp_path, caplog) -> None:
    options = {"polish": 20, "text": text, "head": "carry"}

    def stop(stage: str, done: int, total: int | None) -> None:
        if stage == "polishing" and done == 6:  # of the one that goes on after the trials
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        transfer(world, module, **options, out=tmp_path / "graft", progress=stop)
    assert "begins anew" not in caplog.text
    other = transfer(world, module, **options, out=tmp_path / "graft", seed=5)
    assert f"the work begins anew: {tmp_path / 'graft'}.unfinished" in caplog.text
    assert other.report.polish == transfer(world, module, **options, seed=5).report.polish


def test_the_state_of_other_text_in_memory_is_not_taken_up(world, module, tmp_path) -> None:
    def watch(stage: str, done: int, total: int | None) -> None:
        if stage == "polishing":
            steps.append(done)
            if len(steps) == last:
                raise KeyboardInterrupt

    for last, seed in ((9, 0), (1, 0), (1, 1)):
        steps: list[int] = []
        with pytest.raises(KeyboardInterrupt):
            transfer(
                world, module, student=world / "shallow", method="copy", polish=20, text=tiny.sentences(100, seed),
                head="carry", out=tmp_path / "graft", progress=watch,
            )  # fmt: skip
        first = steps[0]
        assert (first == 1) == (last == 9 or seed == 1), "the first step is done again with other text alone"


def test_a_module_without_a_head_is_judged_and_polished_by_hidden_states(world, tmp_path) -> None:
    tiny.peft_lora(tmp_path / "module", world / "teacher", task="base")
    graft = tiny.transfer(
        tmp_path / "module", student=world / "narrow", text=world / "text.txt", method="ridge", polish=60
    )
    curve = graft.report.polish.curve
    assert graft.report.verdict.measured.agreement > curve[0].agreement + 0.05
    assert graft.report.verdict.measured.agreement == pytest.approx(1 - graft.report.verdict.measured.divergence)


def test_functional_grafting_makes_the_student_move_as_the_teacher_does(world, tmp_path) -> None:
    """On a student that computes what the teacher does, by layers fitted to its shifts alone, no weight copied."""
    tiny.peft_lora(tmp_path / "module", world / "teacher", task="base")
    options = {"method": "functional", "polish": 0}
    same = tiny.transfer(tmp_path / "module", student=world / "teacher", text=world / "text.txt", **options)
    assert same.report.verdict.measured.agreement > 0.9
    assert all(record.norm_kept > 0.3 and not record.maps for record in same.report.sites)


@needs_adapters
def test_functional_grafting_refuses_what_it_cannot_fit(world) -> None:
    with pytest.raises(AlignmentError, match="--method functional: functional grafting fits the updates"):
        transfer(world, world / "pfeiffer", method="functional")
    with pytest.raises(TextError, match="--method functional learns from the teacher's predictions"):
        tiny.transfer(world / "lora", student=world / "shallow", method="functional")
    with pytest.raises(PlanError, match="align with prune-align"):
        tiny.align(world / "teacher", world / "narrow", text=world / "text.txt", method="functional")


def test_the_default_chooses_by_held_out_agreement(world, module, text) -> None:
    report = tiny.transfer(module, student=world / "narrow", text=text, polish=0).report
    best = min(report.tried, key=lambda name: report.tried[name].divergence)
    assert best.startswith(report.method)
    assert report.verdict.measured.agreement_interval is not None  # by text that chose nothing
    assert all(found.agreement_interval is None for found in report.tried.values())
    assert {name.split(",")[0] for name in report.tried} == {"prune-align", "procrustes", "ridge", "functional"}
    assert "held-out" in report.method_reason


def test_without_text_nothing_is_measured_and_the_verdict_says_so(world) -> None:
    report = tiny.transfer(world / "lora", student=world / "shallow").report
    assert report.verdict.measured is None
    assert "--text" in report.verdict.text


def test_what_cannot_be_learned_is_refused_by_name(world, module, tmp_path) -> None:
    with pytest.raises(TextError, match="--polish learns from the teacher's predictions"):
        tiny.transfer(world / "lora", student=world / "shallow", polish=5)
    with pytest.raises(TextError, match="--head fit"):
        tiny.transfer(world / "lora", student=world / "shallow", head="fit")
    with pytest.raises(PlanError, match="--polish: must not be negative"):
        transfer(world, module, polish=-1)
    tiny.peft_lora(tmp_path / "bare", world / "teacher", task="base")
    with pytest.raises(HeadError, match="there is no head to fit"):
        transfer(world, tmp_path / "bare", head="fit")
    few = tmp_path / "few.txt"
    few.write_text("\n".join(tiny.sentences(40)))
    with pytest.raises(TextError, match="expected at least 50, found 40"):
        transfer(world, module, text=few, polish=5)


def test_learning_rate_warms_up_and_decays_to_nothing() -> None:
    schedule = Schedule(steps=100, batch_size=1, learning_rate=2.0)
    rates = [schedule.rate_at(step) for step in range(100)]
    assert max(rates) < 2.0
    assert rates.index(max(rates)) == 5
    assert rates[0] == pytest.approx(2.0 / 6)
    assert math.isclose(rates[-1], 2.0 / 100)
