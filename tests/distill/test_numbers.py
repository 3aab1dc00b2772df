"""Regressors and reward models: numbers that are learned from the teacher, and agreement by R squared."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import peft_graft
import tiny
from peft_graft import GraftConfig
from peft_graft.alignment.text import Sample
from peft_graft.checkpoints.read import read_checkpoint
from peft_graft.distill.agreement import Draws, Verdict, judge
from peft_graft.distill.fit_head import fit_head
from peft_graft.distill.predictions import compare
from peft_graft.distill.targets import Targets, distillation_loss, kind_of, variance_of
from peft_graft.distill.teacher import can_ask, sample_parts
from peft_graft.errors import HeadError
from peft_graft.labels import ProblemType, are_numbers
from peft_graft.models.tasks import Task
from peft_graft.modules.head import Head, head_tensors

DRAW = torch.Generator().manual_seed(0)
NUMBERS = 50 + 20 * torch.randn(400, 1, generator=DRAW)


def verdict(given: torch.Tensor, wanted: torch.Tensor) -> Verdict:
    return judge(compare(given, wanted, "numbers", draws=Draws(range(len(wanted)))))


def regressor(outputs: int, inner: int = 0) -> Head:
    values = {"out.weight": torch.zeros(outputs, inner or 6), "out.bias": torch.zeros(outputs)}
    if inner:
        values |= {"dense.weight": torch.randn(inner, 6, generator=DRAW), "dense.bias": torch.zeros(inner)}
    names = tuple(f"LABEL_{number}" for number in range(outputs))
    tensors = head_tensors(values, "first.out")
    return Head(
        Task.SEQUENCE_CLASSIFICATION, tensors, "first.out", names, "tanh" if inner else None, ProblemType.REGRESSION
    )


def test_what_gives_numbers() -> None:
    assert [are_numbers(kind, 1) for kind in (None, *ProblemType)] == [True, True, False, True]
    assert [are_numbers(kind, 3) for kind in (None, *ProblemType)] == [False, False, False, True]
    assert kind_of(regressor(2)) == "numbers"


def test_agreement_is_the_share_of_the_variance_that_is_explained() -> None:
    noise = 20 * torch.randn(400, 1, generator=DRAW)
    for share in (0.0, 0.25, 0.5):
        given = 50 + (1 - share) ** 0.5 * (NUMBERS - 50)
        found = compare(given, NUMBERS, "numbers")
        expected = 1 - float((given - NUMBERS).square().sum() / (NUMBERS - NUMBERS.mean()).square().sum())
        assert found.agreement == pytest.approx(expected)
        assert found.divergence == pytest.approx(1 - expected)
        assert found.agreement_interval is None
    found = verdict(NUMBERS + 0.3 * noise, NUMBERS)
    assert found.level == "strong"
    low, high = found.measured.agreement_interval
    assert low < found.measured.agreement < high < 1
    assert found.measured.divergence_interval == pytest.approx((1 - high, 1 - low))


def test_the_same_numbers_are_exact_and_their_mean_is_no_better() -> None:
    assert verdict(NUMBERS, NUMBERS).level == "exact"
    mean = NUMBERS.mean().expand(NUMBERS.shape)
    found = verdict(mean, NUMBERS)
    assert (found.level, found.measured.agreement) == ("no better", pytest.approx(0, abs=1e-5))
    assert verdict(-NUMBERS, NUMBERS).level == "no better"


def test_agreement_has_no_unit_and_every_output_counts_the_same() -> None:
    wanted = torch.cat([NUMBERS, torch.randn(400, 1, generator=DRAW)], 1)
    given = torch.cat([NUMBERS, torch.zeros(400, 1) + wanted[:, 1:].mean()], 1)
    assert compare(given, wanted, "numbers").agreement == pytest.approx(0.5, abs=1e-5)
    scale, offset = torch.tensor([1e-3, 1e4]), torch.tensor([7.0, -3e4])
    found = compare(given * scale + offset, wanted * scale + offset, "numbers")
    assert found.agreement == pytest.approx(0.5, abs=1e-4)


def test_one_number_for_all_texts_measures_nothing() -> None:
    same = torch.full((60, 1), 3.7)
    found = verdict(same + 1, same)
    assert found.level == "not measured"
    assert found.text.startswith("the teacher gives the same number to all of the held-out text")
    half = torch.cat([same, NUMBERS[:60]], 1)
    assert verdict(half, half).level == "exact", "of the other output something can be seen"


def test_the_loss_is_one_for_the_mean_in_any_unit() -> None:
    def loss(given: torch.Tensor, wanted: torch.Tensor) -> float:
        targets = Targets(
            "numbers", [{"input_ids": [1]}] * len(wanted), [], list(wanted[:, None]), (), variance_of(wanted)
        )
        return float(distillation_loss(given, targets, range(len(wanted))))

    mean = NUMBERS.mean(0).expand(NUMBERS.shape)
    assert loss(mean, NUMBERS) == pytest.approx(1)
    assert loss(1e-4 * mean, 1e-4 * NUMBERS) == pytest.approx(1)
    assert loss(NUMBERS, NUMBERS) == 0
    assert variance_of(torch.full((9, 1), 5.0)).tolist() == [1], "what never varies has no other scale"


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_a_head_is_fitted_by_least_squares(scale: float) -> None:
    read, weight = torch.randn(600, 6, generator=DRAW), torch.randn(2, 6, generator=DRAW)
    wanted = scale * (read @ weight.T + torch.tensor([5.0, -1.0]))
    fitted, report = fit_head(regressor(2), read, wanted)
    assert report["divergence"] < 1e-3
    assert torch.allclose(fitted.tensors["out.weight"].values, scale * weight, atol=0.02 * scale)
    own = read @ fitted.tensors["out.weight"].values.T + fitted.tensors["out.bias"].values
    assert compare(own, wanted, "numbers").agreement > 0.999


def test_a_head_with_an_inner_layer_is_fitted_too() -> None:
    read = torch.randn(600, 6, generator=DRAW)
    head = regressor(1, inner=8)
    dense = head.tensors["dense.weight"].values
    wanted = 40 * torch.tanh(read @ dense.T) @ torch.randn(8, 1, generator=DRAW) + 3
    fitted, report = fit_head(head, read, wanted)
    assert report["divergence"] < 0.01
    assert fitted.tensors["dense.weight"].values.shape == dense.shape


# ---- whole moves -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def regression(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA that gives one number."""
    folder = tmp_path_factory.mktemp("numbers") / "score"
    tiny.peft_lora(folder, world / "teacher", task="sequence-classification", labels=("score",), seed=3)
    return folder


def test_a_regressor_moves_exactly_to_the_same_model(world: Path, regression: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "teacher", tmp_path / "same")
    graft = tiny.transfer(regression, tmp_path / "same", text=world / "text.txt", out=tmp_path / "graft")
    assert graft.report.verdict.level == "exact"
    assert graft.report.polish is None


def test_a_regressor_is_fitted_polished_and_judged(world: Path, regression: Path, tmp_path: Path) -> None:
    other = tiny.base_model(tmp_path / "other", seed=5, layers=2, hidden=24)

    def moved(**more: object) -> peft_graft.Graft:
        return tiny.transfer(regression, other, text=world / "text.txt", **more)

    carried = moved(method="prune-align", head="carry", polish=0, out=tmp_path / "carried").report
    fitted = moved(method="prune-align", head="fit", polish=0, out=tmp_path / "fitted").report
    polished = moved(method="prune-align", head="fit", polish=120, out=tmp_path / "polished").report
    figures = [report.verdict.measured.agreement for report in (carried, fitted, polished)]
    assert figures[0] < figures[1] < figures[2]
    assert polished.head.how == "fitted"
    assert (polished.classes, polished.decisions) == (None, [])
    assert (tmp_path / "polished" / "report.html").exists()
    loaded = peft_graft.Graft.from_pretrained(tmp_path / "polished")
    assert loaded.model.config.num_labels == 1


def test_numbers_for_words_are_not_learned(world: Path, tmp_path: Path) -> None:
    tiny.peft_lora(tmp_path / "words", world / "teacher", labels=("score",))
    config = GraftConfig(method="copy", head="carry")
    report = peft_graft.transfer(tmp_path / "words", world / "shallow", text=world / "text.txt", config=config).report
    assert report.verdict.level == "not measured"
    assert "the head gives a number for each word, for which agreement is not known" in report.verdict.text
    raw, parts = read_checkpoint(tmp_path / "words"), sample_parts(Sample(line) for line in tiny.sentences(60))
    with pytest.raises(HeadError, match="--polish: the head gives a number for each word"):
        can_ask(GraftConfig(polish=10), raw, parts)
