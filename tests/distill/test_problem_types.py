"""Heads whose outputs are no classes: labels each of which holds or not, and numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import tiny
from peft_graft.checkpoints.live import read_live
from peft_graft.checkpoints.read import read_checkpoint
from peft_graft.checkpoints.task import with_problem_type
from peft_graft.distill.agreement import Draws, Verdict, judge
from peft_graft.distill.fit_head import fit_head
from peft_graft.distill.predictions import compare
from peft_graft.distill.targets import kind_of, log_probabilities
from peft_graft.errors import HeadError
from peft_graft.labels import ProblemType
from peft_graft.models.tasks import Task
from peft_graft.modules.head import Head, head_tensors

LINES = tiny.sentences(120)
TOPICS = ("sport", "music", "trade")
MULTI = {"problem_type": "multi_label_classification"}


def decisions(*rows: str, sure: float = 2.0) -> torch.Tensor:
    """[n, labels] logits: ``+`` where a label holds."""
    return torch.tensor([[sure if sign == "+" else -sure for sign in row] for row in rows])


def verdict(given: torch.Tensor, teacher: torch.Tensor) -> Verdict:
    return judge(compare(given, log_probabilities(teacher, "labels"), "labels", draws=Draws(range(len(teacher)))))


def test_of_labels_all_decisions_are_compared_and_their_divergences_summed() -> None:
    teacher, student = torch.randn(2, 50, 3, generator=torch.Generator().manual_seed(1))
    found = compare(student, log_probabilities(teacher, "labels"), "labels")
    p, q = teacher.double().sigmoid(), student.double().sigmoid()
    divergence = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum(1).mean()
    assert found.divergence == pytest.approx(float(divergence), rel=1e-6)
    (yes, said), n = ((teacher > 0).double(), (student > 0).double()), 3
    chance = sum(
        float(a.mean() * b.mean() + (1 - a.mean()) * (1 - b.mean())) for a, b in zip(yes.T, said.T, strict=True)
    )
    assert found.agreement == pytest.approx((float((yes == said).double().mean()) - chance / n) / (1 - chance / n))


def test_labels_that_softmax_would_take_for_the_same_are_not() -> None:
    """A shift of all logits changes no distribution over classes, and every label."""
    teacher = decisions(*["+--", "-+-", "--+"] * 20)
    assert compare(teacher - 5, teacher.log_softmax(-1), "samples").divergence < 1e-6
    found = verdict(teacher - 5, teacher)
    assert found.level == "no better"
    assert found.measured.agreement == pytest.approx(0)
    assert found.measured.divergence > 1


def test_a_graft_that_gives_every_label_its_commonest_answer_is_no_better() -> None:
    teacher = decisions(*["+-+"] * 90, *["-+-"] * 10)
    found = verdict(decisions(*["+-+"] * 100), teacher)
    assert (found.level, found.measured.agreement) == ("no better", pytest.approx(0))


def test_labels_that_never_change_measure_nothing() -> None:
    found = verdict(decisions(*["-+"] * 60), decisions(*["-+"] * 60))
    assert found.level == "not measured"
    assert found.text.startswith("the teacher gives the same labels to all of the held-out text")
    assert verdict(decisions(*["+-", "--"] * 30), decisions(*["+-", "--"] * 30)).level == "exact"


def test_a_head_is_fitted_to_labels_one_by_one() -> None:
    generator = torch.Generator().manual_seed(0)
    read, weight = torch.randn(600, 6, generator=generator), torch.randn(3, 6, generator=generator)
    logits = read @ weight.T + torch.tensor([2.0, 0.0, -2.0])
    tensors = head_tensors({"out.weight": torch.zeros(3, 6), "out.bias": torch.zeros(3)}, "tokens.out")
    head = Head(Task.SEQUENCE_CLASSIFICATION, tensors, "tokens.out", TOPICS, problem_type=ProblemType.MULTI_LABEL)
    fitted, report = fit_head(head, read, log_probabilities(logits, "labels"))
    assert kind_of(fitted) == "labels"
    assert report["divergence"] < 0.02
    own = read @ fitted.tensors["out.weight"].values.T + fitted.tensors["out.bias"].values
    assert float(((own > 0) == (logits > 0)).float().mean()) > 0.98


@pytest.mark.parametrize("offset", [0.0, 1.0, 3.0])
def test_a_head_without_a_bias_is_fitted_as_one_without(offset: float) -> None:
    """What features have in common cannot be taken off where nothing can put it back."""
    generator = torch.Generator().manual_seed(0)
    read, weight = torch.randn(800, 6, generator=generator) + offset, torch.randn(3, 6, generator=generator)
    wanted = (read @ weight.T).log_softmax(-1)
    head = Head(
        Task.SEQUENCE_CLASSIFICATION, head_tensors({"out.weight": torch.zeros(3, 6)}, "last.out"), "last.out", TOPICS
    )
    fitted, report = fit_head(head, read, wanted)
    assert fitted.tensors.keys() == {"out.weight"}
    found = compare(read @ fitted.tensors["out.weight"].values.T, wanted, "samples")
    assert found.divergence < 0.02
    assert report["divergence"] == pytest.approx(found.divergence, abs=0.02), "what is reported is of what is written"


# ---- who says what the outputs are -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def topics(world, tmp_path_factory) -> Path:
    """A LoRA with a head of three outputs."""
    folder = tmp_path_factory.mktemp("topics")
    tiny.peft_lora(folder, world / "teacher", task="sequence-classification", labels=TOPICS, seed=3)
    return folder


def test_the_user_or_the_files_or_the_teacher_say_it(topics, world) -> None:
    raw = read_checkpoint(topics)
    plain = transformers.AutoConfig.from_pretrained(world / "teacher", num_labels=3)
    declared = transformers.AutoConfig.from_pretrained(world / "teacher", num_labels=3, **MULTI)
    other = transformers.AutoConfig.from_pretrained(world / "teacher", num_labels=7, **MULTI)
    assert with_problem_type(raw, None, plain).problem_type is None
    assert with_problem_type(raw, None, declared).problem_type is ProblemType.MULTI_LABEL
    assert with_problem_type(raw, None, other).problem_type is None, "its head is another one"
    assert with_problem_type(raw, ProblemType.REGRESSION, declared).problem_type is ProblemType.REGRESSION
    tags = read_checkpoint(world / "lora")
    labelled = transformers.AutoConfig.from_pretrained(world / "teacher", num_labels=len(tiny.LABELS), **MULTI)
    assert with_problem_type(tags, None, labelled).problem_type is None, "transformers has it for whole texts alone"


@pytest.mark.parametrize("value", ["multi", 3, ["regression"], None])
def test_what_is_no_problem_type_says_nothing(value: object) -> None:
    assert ProblemType.declared(value) is None


def test_a_live_model_says_it(world, tmp_path) -> None:
    live = tiny.peft_lora(tmp_path / "live", world / "teacher", task="sequence-classification", labels=TOPICS)
    live.get_base_model().config.problem_type = "multi_label_classification"
    assert read_live(live)[0].problem_type is ProblemType.MULTI_LABEL


@pytest.mark.parametrize("outputs", [1, 3])
def test_what_the_outputs_are_decides_how_they_are_judged(topics, world, tmp_path, outputs) -> None:
    folder = topics
    if outputs == 1:
        folder = tmp_path / "one"
        tiny.peft_lora(folder, world / "teacher", task="sequence-classification", labels=("relevant",))
    texts = world / "text.txt"

    def judged(problem_type: str | None) -> Verdict:
        graft = tiny.transfer(folder, world / "teacher", text=texts, method="copy", polish=0, problem_type=problem_type)
        assert graft.report.head.problem_type == problem_type
        return graft.report.verdict

    unsaid = (None,) if outputs == 1 else ()  # of three it stands for classes
    for problem_type in ("regression", "multi_label_classification", *unsaid):
        found = judged(problem_type)
        assert (found.level, found.measured.agreement) == ("exact", pytest.approx(1, abs=1e-5)), problem_type


def test_only_classifiers_of_whole_texts_are_described(world) -> None:
    with pytest.raises(HeadError, match="--problem-type: no classifier of whole texts moves.*found token-class"):
        tiny.transfer(world / "lora", world / "shallow", method="copy", problem_type="regression")


@pytest.mark.skipif(not tiny.HAS_ADAPTERS, reason="adapters needs transformers 4")
def test_prediction_heads_of_labels(world, tmp_path) -> None:
    import adapters

    model = adapters.AutoAdapterModel.from_pretrained(world / "teacher")
    model.add_adapter("skill", config="lora")
    model.add_classification_head("skill", num_labels=3, multilabel=True, id2label=dict(enumerate(TOPICS)))
    tiny.randomise(model, 1, ("loras.skill", "heads.skill"))
    model.save_adapter(str(tmp_path / "skill"), "skill")
    other = tiny.transfer(tmp_path / "skill", world / "shallow", method="copy", library="peft", out=tmp_path / "peft")
    assert read_checkpoint(other.folder).problem_type is ProblemType.MULTI_LABEL
    back = tiny.transfer(other.folder, world / "shallow", method="copy", library="adapters", out=tmp_path / "back")
    assert (
        json.loads((back.folder / "head_config.json").read_text())["config"]["head_type"] == "multilabel_classification"
    )


# ---- the whole way ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def graft(topics, world, tmp_path_factory):
    out = tmp_path_factory.mktemp("graft") / "graft"
    options = {"text": LINES, "polish": 15, "method": "prune-align", "labels": TOPICS, "out": out}
    return tiny.transfer(topics, world / "shallow", problem_type="multi_label_classification", **options)


def test_a_graft_is_fitted_polished_and_judged_by_its_labels(graft, topics, world) -> None:
    report = graft.report
    assert report.polish is not None
    assert report.verdict.measured.agreement is not None
    assert report.verdict.measured.divergence < report.verdict.moved.divergence
    teacher = tiny.task_model(world / "teacher", "sequence-classification", TOPICS)
    tokens = transformers.AutoTokenizer.from_pretrained(world / "teacher")
    import peft

    with torch.no_grad():
        batch = tokens(LINES, return_tensors="pt", padding=True)
        wanted = peft.PeftModel.from_pretrained(teacher, topics).eval()(**batch).logits
        given = graft.model.eval()(**batch).logits
    assert float(((wanted > 0) == (given > 0)).float().mean()) > 0.8
    figure = compare(given, log_probabilities(wanted, "labels"), "labels")
    assert figure.divergence == pytest.approx(report.verdict.measured.divergence, rel=1)


def test_what_is_written_says_what_its_outputs_are(graft) -> None:
    assert json.loads((graft.folder / "config.json").read_text())["problem_type"] == "multi_label_classification"
    assert '    problem_type="multi_label_classification",' in (graft.folder / "README.md").read_text()
    assert read_checkpoint(graft.folder).problem_type is ProblemType.MULTI_LABEL
    assert type(graft).from_pretrained(graft.folder).checkpoint.head.problem_type is ProblemType.MULTI_LABEL
    assert graft.model.config.problem_type == "multi_label_classification"
    assert load_file(graft.folder / "adapter_model.safetensors")


def test_a_pipeline_gives_every_label_its_own_probability(graft, world) -> None:
    pipe = transformers.pipeline(
        "text-classification", graft.model, tokenizer=str(world / "shallow"), top_k=None, device="cpu"
    )
    scores = {entry["label"]: entry["score"] for entry in pipe("river mountain Lisbon.")[0]}
    with torch.no_grad():
        batch = transformers.AutoTokenizer.from_pretrained(world / "shallow")(
            "river mountain Lisbon.", return_tensors="pt"
        )
        logits = graft.model(**batch).logits[0]
    assert scores == {
        label: pytest.approx(float(logit.sigmoid()), abs=1e-4) for label, logit in zip(TOPICS, logits, strict=True)
    }
