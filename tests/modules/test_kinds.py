"""Every kind of PEFT module: exact on its own model and on a permuted one, and moved to another size."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers
from peft import PeftModel

import tiny
from peft_graft.alignment.alignment import Alignment
from peft_graft.checkpoints.read import read_checkpoint

# peft's own, about layer norms and one-dimensional tensors of LoRA
pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type", "ignore:Adapter 'default'")
QV = {"task_type": "TOKEN_CLS", "target_modules": ["query", "value"]}
PROMPT = {"task_type": "TOKEN_CLS", "num_virtual_tokens": 5}
#: kind -> configuration of peft
KINDS = {
    "lora": peft.LoraConfig(**QV, r=4),
    "rslora": peft.LoraConfig(**QV, r=4, use_rslora=True),
    "dora": peft.LoraConfig(**QV, r=4, use_dora=True),
    "lora with bias": peft.LoraConfig(**QV, r=4, lora_bias=True),
    "lora and the layers' biases": peft.LoraConfig(**QV, r=4, bias="lora_only"),
    "lora, ranks by pattern": peft.LoraConfig(
        **QV, r=4, rank_pattern={"value": 2}, alpha_pattern={"layer.1.attention.self.query": 3}
    ),
    "ia3": peft.IA3Config(
        task_type="TOKEN_CLS", target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"]
    ),
    "ln tuning": peft.LNTuningConfig(task_type="TOKEN_CLS", target_modules=["LayerNorm"]),
    "prompt tuning": peft.PromptTuningConfig(**PROMPT),
    "p-tuning": peft.PromptEncoderConfig(**PROMPT, encoder_hidden_size=16),
    "prefix tuning": peft.PrefixTuningConfig(**PROMPT),
    "prefix tuning, projected": peft.PrefixTuningConfig(**PROMPT, prefix_projection=True, encoder_hidden_size=16),
}  # fmt: skip
#: Kinds that become a LoRA, and how near it comes to what they compute.
CONVERTED = {
    "loha": (peft.LoHaConfig(**QV, r=2), 1e-5),
    "lokr": (peft.LoKrConfig(**QV, r=2), 1e-5),
    "adalora": (peft.AdaLoraConfig(**QV, init_r=4, total_step=10), 1e-5),
    "vera": (peft.VeraConfig(**QV, r=4), 1e-5),
    "oft": (peft.OFTConfig(**QV, oft_block_size=8), 2e-2),
    "boft": (peft.BOFTConfig(**QV, boft_block_size=8), 2e-2),
    "fourierft": (peft.FourierFTConfig(**QV, n_frequency=20), 2e-2),
    "hra": (peft.HRAConfig(**QV, r=4), 1e-5),
    "miss": (peft.MissConfig(**QV, r=4), 1e-5),
}


def trained(folder: Path, base: Path, config: peft.PeftConfig) -> PeftModel:
    """A module with random values in all that it would train, and the model that it is in."""
    adapted = peft.get_peft_model(tiny.task_model(base), config)
    tiny.randomise_trained(adapted, 1)
    adapted.save_pretrained(folder)
    return adapted.eval()


def loaded(base: Path, folder: Path) -> PeftModel:
    return PeftModel.from_pretrained(tiny.task_model(base), folder).eval()


def logits(model, base: Path) -> torch.Tensor:
    batch = transformers.AutoTokenizer.from_pretrained(base)(
        tiny.sentences(8, seed=99), padding=True, return_tensors="pt"
    )
    with torch.inference_mode():
        return model(**batch).logits


@pytest.fixture(scope="module")
def place(permuted_pair: Path, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("kinds")
    for name in ("base", "student"):
        shutil.copytree(permuted_pair / name, root / name)
    tiny.base_model(root / "narrow", layers=3, hidden=24, ffn=40, seed=2)
    return root


@pytest.fixture(scope="module")
def modules(place: Path) -> Callable[[str], tuple[Path, PeftModel]]:
    """A kind's module, and the model that it is in."""
    made = {}

    def module(kind: str) -> tuple[Path, PeftModel]:
        if kind not in made:
            folder = place / f"module {len(made)}"
            made[kind] = folder, trained(folder, place / "base", KINDS[kind])
        return made[kind]

    return module


@pytest.fixture(scope="module")
def to_narrow(place: Path) -> dict[str, Alignment]:
    """By method, how the base and the narrower model correspond; the same for every kind."""
    return {
        method: tiny.align(place / "base", place / "narrow", text=tiny.sentences(150), method=method)
        for method in ("prune-align", "ridge")
    }


@pytest.fixture(scope="module")
def to_permuted(place: Path) -> Alignment:
    """The same for the base and its copy in another order."""
    return tiny.align(place / "base", place / "student", text=tiny.sentences(150), method="prune-align")


@pytest.mark.parametrize("kind", KINDS)
def test_a_module_returns_from_its_own_model_as_it_was(kind: str, place: Path, modules, tmp_path: Path) -> None:
    base, (module, adapted) = place / "base", modules(kind)
    graft = tiny.transfer(module, student=base, out=tmp_path / "graft")
    assert graft.report.verification.done
    before, after = read_checkpoint(module), read_checkpoint(tmp_path / "graft")
    assert before.parts == after.parts
    torch.testing.assert_close(logits(loaded(base, tmp_path / "graft"), base), logits(adapted, base))


@pytest.mark.parametrize("kind", KINDS)
def test_a_permuted_student_computes_what_the_teacher_does(
    kind: str, place: Path, modules, to_permuted, tmp_path: Path
) -> None:
    base, student, (module, adapted) = place / "base", place / "student", modules(kind)
    tiny.transfer(module, student=student, alignment=to_permuted, out=tmp_path / "graft")
    expected = logits(adapted, base)
    assert (expected - logits(tiny.task_model(base), base)[..., : expected.shape[1], :].mean()).abs().max() > 0.1
    torch.testing.assert_close(logits(loaded(student, tmp_path / "graft"), base), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_to_a_narrower_and_deeper_student(kind: str, place: Path, modules, to_narrow, tmp_path: Path) -> None:
    """Assigned and regressed, then polished: what is written loads and acts (``transfer`` verifies both)."""
    module, _ = modules(kind)
    for method, polish in (("prune-align", 0), ("ridge", 4)):
        graft = tiny.transfer(
            module, student=place / "narrow", alignment=to_narrow[method], out=tmp_path / method,
            text=tiny.sentences(60) if polish else None, polish=polish, head="carry",
        )  # fmt: skip
        assert graft.report.method == method
        assert graft.report.verification.output_change > 0
        assert bool(graft.report.polish) == bool(polish)


@pytest.mark.filterwarnings("ignore")  # of the many methods themselves
@pytest.mark.parametrize("kind", CONVERTED)
def test_other_changes_of_weights_become_a_lora(kind: str, place: Path, tmp_path: Path) -> None:
    base = place / "base"
    config, error = CONVERTED[kind]
    adapted = trained(tmp_path / "module", base, config)
    found = tiny.inspect(tmp_path / "module", student=base)
    assert found.student.problem is None
    assert {site.role for site in found.sites} == {"attn.query", "attn.value"}
    graft = tiny.transfer(tmp_path / "module", student=base, out=tmp_path / "graft")
    assert graft.report.module_kind == "lora"
    expected, bare = logits(adapted, base), logits(tiny.task_model(base), base)
    difference = (logits(loaded(base, tmp_path / "graft"), base) - expected).abs().max()
    assert difference < error * (expected - bare).abs().max()
