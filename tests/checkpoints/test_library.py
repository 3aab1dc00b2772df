"""LoRA between the two libraries, and parts of a module by site."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
import transformers
from peft import PeftModel

import tiny
from conftest import needs_adapters
from peft_graft.checkpoints.attach import attach
from peft_graft.checkpoints.read import read_checkpoint
from peft_graft.errors import PlanError
from peft_graft.models.loading import load_model

WORDS = {"tagging": "token-classification", "classification": "sequence-classification"}


def logits(model, base: Path) -> torch.Tensor:
    batch = transformers.AutoTokenizer.from_pretrained(base)(
        tiny.sentences(8, seed=99), padding=True, return_tensors="pt"
    )
    with torch.inference_mode():
        return model(**batch).logits


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny.base_model(tmp_path / "base", layers=2)


@needs_adapters
@pytest.mark.parametrize("head", ["tagging", "classification"])
def test_adapterhub_to_peft_and_back(head: str, base: Path, tmp_path: Path) -> None:
    """The same logits in the other library, and on the way back the same tensors."""
    adapted = tiny.adapterhub_module(tmp_path / "hub", base, "lora", head=head)
    graft = tiny.transfer(tmp_path / "hub", student=base, out=tmp_path / "peft", library="peft")
    assert graft.report.verification.library == "peft"
    labels = tiny.LABELS if head == "tagging" else ("LABEL_0", "LABEL_1", "LABEL_2")
    moved = PeftModel.from_pretrained(tiny.task_model(base, WORDS[head], labels), tmp_path / "peft").eval()
    torch.testing.assert_close(logits(moved, base), logits(adapted, base), atol=1e-5, rtol=1e-5)
    tiny.transfer(tmp_path / "peft", student=base, out=tmp_path / "again", library="adapters")
    before, after = read_checkpoint(tmp_path / "hub"), read_checkpoint(tmp_path / "again")
    assert before.parts == after.parts
    assert before.head.keys() == after.head.keys()
    assert all(torch.equal(value, after.head[key]) for key, value in before.head.items())
    if head == "tagging":
        assert after.labels == list(tiny.LABELS)


@needs_adapters
def test_a_bare_lora_without_a_head(base: Path, tmp_path: Path) -> None:
    tiny.adapterhub_module(tmp_path / "hub", base, "lora", head=None)
    tiny.transfer(tmp_path / "hub", student=base, out=tmp_path / "peft", library="peft")
    model = PeftModel.from_pretrained(transformers.AutoModel.from_pretrained(base), tmp_path / "peft")
    assert "encoder.layer.0.attention.self.query" in model.base_model.targeted_module_names


@needs_adapters
def test_what_the_other_library_cannot_say(base: Path, tmp_path: Path) -> None:
    tiny.peft_lora(tmp_path / "output", base, targets=["attention.output.dense"])
    with pytest.raises(PlanError, match="AdapterHub has no LoRA at these sites"):
        tiny.transfer(tmp_path / "output", student=base, library="adapters")
    tiny.adapterhub_module(tmp_path / "pfeiffer", base, "seq_bn")
    with pytest.raises(PlanError, match="only a plain LoRA means the same"):
        tiny.transfer(tmp_path / "pfeiffer", student=base, library="peft")


def test_some_sites_alone(base: Path, tmp_path: Path) -> None:
    tiny.peft_lora(tmp_path / "module", base, targets=["query", "value"])
    whole = tiny.transfer(tmp_path / "module", student=base)
    values = tiny.transfer(tmp_path / "module", student=base, out=tmp_path / "values", sites=["*.value"])
    assert {site.role for site in values.checkpoint.modules} == {"attn.value"}
    first = tiny.transfer(tmp_path / "module", student=base, out=tmp_path / "first", sites=["0/attn.query"])
    assert [str(site) for site in first.checkpoint.modules] == ["layer 0 attn.query"]
    config = peft.PeftConfig.from_pretrained(tmp_path / "first")
    assert (
        set(config.target_modules) == {"bert.encoder.layer.0.attention.self.query"} or len(config.target_modules) == 1
    )
    assert sum(site.share for site in whole.report.sites) == pytest.approx(1)
    assert all(0 < site.share < 1 for site in whole.report.sites)
    with pytest.raises(PlanError, match=r"--sites attn\.key: the module has no such site"):
        tiny.transfer(tmp_path / "module", student=base, sites=["attn.key"])


@needs_adapters
@pytest.mark.parametrize("settings", ["seq_bn", "lora", "ia3"])
def test_a_module_runs_here_as_in_its_library(world, tmp_path, settings: str) -> None:
    """What candidates are judged by: every weight of the base model arrives, those with several names too."""
    adapted = tiny.adapterhub_module(tmp_path / "m", world / "teacher", settings)
    raw = read_checkpoint(tmp_path / "m")
    attached = attach(raw, load_model(str(world / "teacher")), tuple(raw.labels or ()))
    ids = torch.randint(10, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(attached.forward({"input_ids": ids})[0], adapted(input_ids=ids).logits)
