"""Models that are quantised, offloaded or in half precision: moved to and from as others are."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
import transformers

import peft_graft
import tiny
from peft_graft.models.devices import BaseTensors, seed_generators
from peft_graft.models.loading import Loading, load_model, wrap_model
from peft_graft.models.task_models import with_task_head
from peft_graft.models.tasks import Task

pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type", "ignore:MatMul8bitLt")
QUANTISED = {
    "nf4": lambda: transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "int8": lambda: transformers.BitsAndBytesConfig(load_in_8bit=True),
}


def llama(layers: int) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        vocab_size=150, hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Path:
    """A teacher, a shallower student made from it, and modules of the teacher's."""
    root = tmp_path_factory.mktemp("shelf")
    tiny.saved(root / "teacher", llama(3), transformers.AutoModelForCausalLM)
    student = transformers.LlamaForCausalLM.from_pretrained(root / "teacher")
    del student.model.layers[1]
    student.config.num_hidden_layers = 2
    student.save_pretrained(root / "student")
    tiny.tokenizer(root / "student")
    for name, options in {"lora": {}, "dora": {"use_dora": True}, "norms": None}.items():
        model = transformers.AutoModelForCausalLM.from_pretrained(root / "teacher")
        target = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "down_proj"], "r": 4}
        config = peft.LNTuningConfig(task_type="CAUSAL_LM") if options is None else peft.LoraConfig(**target, **options)
        adapted = peft.get_peft_model(model, config)
        tiny.randomise_trained(adapted, 4)
        adapted.save_pretrained(root / name)
    (root / "text.txt").write_text("\n".join(tiny.sentences(300)))
    return root


def test_a_seed_is_that_of_torch() -> None:
    seed_generators(2**40 + 5, torch.device("cpu"))
    found = torch.rand(3)
    torch.manual_seed(2**40 + 5)
    assert torch.equal(found, torch.rand(3))


def quantised(shelf: Path, role: str, how: str, folder: Path) -> Path:
    pytest.importorskip("bitsandbytes")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        shelf / role, quantization_config=QUANTISED[how](), device_map={"": "cpu"}
    )
    model.save_pretrained(folder)
    tiny.tokenizer(folder)
    return folder


def values(graft: peft_graft.Graft) -> dict[str, torch.Tensor]:
    found = graft.checkpoint.modules.items()
    return {f"{site} {name}": part.values for site, module in found for name, part in module.tensors.items()}


@pytest.mark.parametrize("how", QUANTISED)
@pytest.mark.parametrize("module", ["lora", "dora", "norms"])
def test_modules_move_to_quantised_models(shelf, tmp_path, how: str, module: str) -> None:
    if (how, module) == ("int8", "dora"):
        pytest.skip("on processors, peft loses the scales of 8-bit weights when it takes their norms")
    student = quantised(shelf, "student", how, tmp_path / "quantised")
    plain = tiny.transfer(shelf / module, student=shelf / "student", method="copy")
    graft = tiny.transfer(shelf / module, student=student, method="copy", out=tmp_path / "graft")
    expected, found = values(plain), values(graft)
    assert expected.keys() == found.keys()
    for name, value in expected.items():  # a magnitude or a norm follows the weights, which are rounded
        torch.testing.assert_close(found[name].float(), value, rtol=0.1, atol=0.02)
    model = transformers.AutoModelForCausalLM.from_pretrained(student, device_map={"": "cpu"})
    loaded = peft.PeftModel.from_pretrained(model, tmp_path / "graft")
    ids = torch.arange(10, 26)[None]
    with torch.inference_mode():
        moved = loaded(input_ids=ids).logits
        with loaded.disable_adapter():
            assert (moved - loaded(input_ids=ids).logits).abs().max() > 0.01


def test_a_module_moves_between_quantised_models_on_text(shelf, tmp_path) -> None:
    teacher = quantised(shelf, "teacher", "nf4", tmp_path / "teacher")
    student = quantised(shelf, "student", "nf4", tmp_path / "student")
    graft = tiny.transfer(
        shelf / "lora", teacher=teacher, student=student, text=shelf / "text.txt", max_tokens=1500, polish=4,
        out=tmp_path / "graft",
    )  # fmt: skip
    assert graft.report.verdict.measured is not None
    assert graft.report.polish.settings.steps == 4
    assert graft.report.verification.output_change > 0


def test_offloaded_models_give_the_same_graft(shelf, tmp_path) -> None:
    def placed(role: str):
        where = {"embed_tokens": "cpu", "layers": "disk", "norm": "cpu", "rotary_emb": "cpu"}
        return transformers.AutoModel.from_pretrained(
            shelf / role, device_map=where, offload_folder=tmp_path / f"{role}-offloaded"
        )

    def moved(models) -> peft_graft.Graft:
        tokenizer = transformers.AutoTokenizer.from_pretrained(shelf / "teacher")
        return tiny.transfer_live(shelf / "lora", *models, teacher_tokenizer=tokenizer, student_tokenizer=tokenizer,
            text=tiny.sentences(100), method="prune-align", max_tokens=1500,
        )  # fmt: skip

    models = [placed(role) for role in ("teacher", "student")]
    assert all(model.layers[0].mlp.up_proj.weight.is_meta for model in models)
    plain = wrap_model(transformers.AutoModel.from_pretrained(shelf / "student")).base_tensors()
    stored = wrap_model(models[1]).base_tensors()
    assert stored.keys() == plain.keys()
    assert all(torch.equal(stored[name], value) for name, value in plain.items())
    expected = moved([transformers.AutoModel.from_pretrained(shelf / role) for role in ("teacher", "student")])
    found = moved(models)
    assert found.report.teacher.fingerprint == expected.report.teacher.fingerprint
    for name, value in values(expected).items():
        torch.testing.assert_close(values(found)[name], value)
    assert all(model.layers[0].mlp.up_proj.weight.is_meta for model in models), "left as they were"
    assert found.save_pretrained(tmp_path / "graft").report.verification.output_change > 0


def test_accelerate_may_choose_the_devices(shelf) -> None:
    plain, placed = (load_model(str(shelf / "student"), Loading(device_map=where)) for where in (None, "auto"))
    expected, found = plain.base_tensors(), placed.base_tensors()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name].cpu(), value) for name, value in expected.items())
    assert placed.fingerprint == plain.fingerprint


def test_half_precision_is_shared_and_what_is_trained_is_not_in_it(shelf, tmp_path) -> None:
    student = load_model(str(shelf / "student"), Loading(dtype="bfloat16"), tokenizer=True)
    model = with_task_head(student.base, Task.CAUSAL_LM, padding=student.padding)
    own = {value.data_ptr() for value in student.base.parameters() if value.ndim > 1}
    assert own <= {value.data_ptr() for value in model.parameters()}
    graft = tiny.transfer(
        shelf / "norms", student=shelf / "student", text=tiny.sentences(100), method="prune-align", max_tokens=1500,
        polish=4, dtype="bfloat16", out=tmp_path / "graft",
    )  # fmt: skip
    assert graft.report.polish.settings.steps == 4
    assert graft.report.verification.output_change > 0


def test_whether_a_tensor_is_there_is_known_without_reading_it() -> None:
    class Unread(BaseTensors):
        def __getitem__(self, name: str) -> torch.Tensor:
            raise AssertionError(name)

    tensors = Unread(torch.nn.Linear(2, 2), frozenset({"bias"}), {"more": torch.zeros(1)})
    assert [name in tensors for name in ("weight", "bias", "more", "other")] == [True, False, True, False]
