"""Heads that mark the ends of an answer in a text."""

from __future__ import annotations

import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import tiny
from families import DECODERS
from peft_graft.errors import HeadError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
AUTO = transformers.AutoModelForQuestionAnswering
IDS = torch.arange(10, 20)[None]


def trained(folder: Path, base: Path, targets: list[str]) -> torch.Tensor:
    """Save such a module, and return the scores of beginnings that it gives."""
    adapted = peft.get_peft_model(
        AUTO.from_pretrained(base), peft.LoraConfig(task_type="QUESTION_ANS", r=2, target_modules=targets)
    ).eval()
    tiny.randomise_trained(adapted, 1)
    adapted.save_pretrained(folder)
    with torch.inference_mode():
        return adapted(input_ids=IDS).start_logits


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, torch.Tensor]:
    """A model, a module, and what the module computes on it."""
    root = tmp_path_factory.mktemp("bert")
    base = tiny.base_model(root / "base", layers=1)
    return base, root / "module", trained(root / "module", base, ["query", "value"])


def loaded(base: Path, folder: Path) -> torch.Tensor:
    with torch.inference_mode():
        return peft.PeftModel.from_pretrained(AUTO.from_pretrained(base), folder).eval()(input_ids=IDS).start_logits


def test_an_encoders_head_arrives(bert: tuple[Path, Path, torch.Tensor], tmp_path: Path) -> None:
    base, module, expected = bert
    graft = tiny.transfer(module, base, method="copy", out=tmp_path / "graft")
    assert graft.report.head.task == "question-answering"
    torch.testing.assert_close(loaded(base, tmp_path / "graft"), expected)


def test_a_head_of_other_outputs_is_refused(bert: tuple[Path, Path, torch.Tensor], tmp_path: Path) -> None:
    base, module, _ = bert
    shutil.copytree(module, tmp_path / "module")
    weights = tmp_path / "module" / "adapter_model.safetensors"
    wider = {key: torch.ones(3, *value.shape[1:]) if "qa_outputs" in key else value
             for key, value in load_file(weights).items()}  # fmt: skip
    save_file(wider, weights, metadata={"format": "pt"})
    with pytest.raises(HeadError, match="does not mark the ends of answers; expected 2 rows.*found 3 rows"):
        tiny.transfer(tmp_path / "module", base, method="copy")


@pytest.mark.parametrize("head", ["carry", "drop"])
def test_a_decoders_head_arrives_where_its_class_calls_the_base_otherwise(head: str, tmp_path: Path) -> None:
    base = tiny.saved(tmp_path / "base", DECODERS["llama"])
    expected = trained(tmp_path / "module", base, ["q_proj"])
    graft = tiny.transfer(tmp_path / "module", base, method="copy", head=head, out=tmp_path / "graft")
    assert graft.report.verification.done
    assert torch.allclose(loaded(base, tmp_path / "graft"), expected) == (head == "carry")


def test_by_text_without_questions_it_is_neither_fitted_nor_judged(
    bert: tuple[Path, Path, torch.Tensor], tmp_path: Path
) -> None:
    _, module, _ = bert
    text = tmp_path / "text.txt"
    text.write_text("\n".join(tiny.sentences(200)))
    student = tiny.base_model(tmp_path / "student", hidden=24, layers=1)
    graft = tiny.transfer(module, student, text=text, polish="auto", max_tokens=1000)
    assert graft.checkpoint.head is not None
    assert graft.report.verdict.level == "not measured"
    assert (
        "neither fitted nor judged: the head marks answers to questions, and the text has none; give columns of "
        "questions and of the texts that answer them, with --columns question,context"
    ) in graft.report.verdict.text
    for options in ({"polish": 5}, {"head": "fit", "polish": "auto"}):
        refused = tiny.inspect(module, student, text=text, **options).student.problem
        assert "the head marks answers to questions, and the text has none" in refused
