"""Files that people have reported in public: what is right for each, from the address of the report on.

Every row makes the file anew. Most kinds have tests of their own; here it is the whole way, by the public functions.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import peft_graft
import tiny
from families import COMMON, FFN
from peft_graft import GraftConfig
from peft_graft.errors import GraftError

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
CAUSAL = transformers.AutoModelForCausalLM


@dataclass(frozen=True)
class Report:
    """A report.

    Attributes:
        address: on GitHub. make: turns the folder of a good LoRA into the reported one. error: what is said of it, None
            if it moves like the good one. note: what is said of one that moves.
    """

    address: str
    make: Callable[[Path], object]
    error: str | None = None
    note: str = ""


def tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    return lambda folder: save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})


def keys(change: Callable[[str], str]) -> Callable[[Path], None]:
    return tensors(lambda found: {change(key): value for key, value in found.items()})


def settings(**changes: object) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        content = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**content, **changes}))

    return make


def in_place_of_all(*names: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        for path in folder.iterdir():
            path.unlink()
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            torch.save({}, folder / name)

    return make


def as_mlx(folder: Path) -> None:
    found = load_file(folder / WEIGHTS)
    renamed = {
        key.removeprefix("base_model.model.")
        .replace("lora_A.weight", "lora_a")
        .replace("lora_B.weight", "lora_b"): value
        for key, value in found.items()
    }
    save_file({key: value.T.contiguous() for key, value in renamed.items()}, folder / "adapters.safetensors")
    (folder / WEIGHTS).unlink()
    (folder / CONFIG).write_text(
        json.dumps({"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": 4}})
    )


def two_adapters(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        key.replace(".weight", f".{name}.weight"): value.clone()
        for key, value in found.items()
        for name in ("default", "ref")
    }


REPORTS = {
    "torch.compile's wrapper": Report(
        "MakazhanAlpamys/Soup/issues/335", keys(lambda key: f"_orig_mod.{key}")
    ),
    "wrappers of FSDP and of checkpointing": Report(
        "linkedin/Liger-Kernel/pull/674",
        keys(lambda key: key.replace("self_attn.", "_fsdp_wrapped_module.self_attn._checkpoint_wrapped_module.")),
    ),
    "named as in a model that reads images too": Report(
        "vllm-project/vllm/issues/48019", keys(lambda key: key.replace("model.layers", "model.language_model.layers"))
    ),
    "no task": Report("meta-pytorch/torchtune/pull/933", settings(task_type=None)),
    "a value head beside it": Report(
        "huggingface/trl/issues/2707",
        lambda folder: torch.save({"v_head.summary.weight": torch.ones(1, 8)}, folder / "pytorch_model.bin"),
        note="the value head that was trained beside the module is left out",
    ),
    "empty tensors": Report(
        "huggingface/peft/issues/1443",
        tensors(lambda found: {key: torch.empty(0) for key in found}),
        error="ZeRO-3",
    ),
    "a base that was changed first": Report(
        "huggingface/peft/pull/1626", settings(init_lora_weights="pissa"),
        error="save it with peft's path_initial_model_for_weight_conversion"
    ),
    "mlx-lm": Report("ml-explore/mlx-lm/issues/1119", as_mlx, error="mlx-lm"),
    "a training checkpoint without a module": Report(
        "huggingface/peft/issues/298",
        in_place_of_all("pytorch_model.bin", "rng_state_0.pth", "global_step12000/mp_rank_00_model_states.pt"),
        error="a checkpoint of DeepSpeed, whose weights are not gathered",
    ),
    "two adapters": Report("huggingface/trl/pull/1193", tensors(two_adapters), error="two adapters"),
    "X-LoRA": Report("huggingface/peft/issues/2132", settings(peft_type="XLORA"), error="type XLORA cannot be moved"),
    "an adapter of AdapterHub's first days": Report(
        "adapter-hub/adapters/issues/19",
        lambda folder: (folder / CONFIG).write_text(json.dumps({
            "model_type": "bert", "model_name": "bert-base-uncased", "config": {
                "MH_Adapter": False, "Output_Adapter": True, "reduction_factor": 16, "non_linearity": "relu"}})),
        error="lack mh_adapter, output_adapter",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.saved(tmp_path_factory.mktemp("base"), transformers.LlamaConfig(**COMMON, **FFN), CAUSAL)


@pytest.fixture(scope="module")
def good(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    options = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=4, lora_alpha=8)
    adapted = peft.get_peft_model(CAUSAL.from_pretrained(base), options)
    tiny.randomise(adapted, 1, ("lora_",))
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture
def reported(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "reported"))


def answers(base: Path, folder: Path) -> torch.Tensor:
    model = peft.PeftModel.from_pretrained(CAUSAL.from_pretrained(base), folder).eval()
    with torch.no_grad():
        return model(torch.arange(3, 19)[None]).logits


@pytest.mark.parametrize("name", [name for name, report in REPORTS.items() if report.error is None])
def test_what_moves_computes_what_it_did(base: Path, good: Path, reported: Path, tmp_path: Path, name: str) -> None:
    report = REPORTS[name]
    report.make(reported)
    graft = peft_graft.transfer(
        reported, base, teacher=base, out=tmp_path / "graft", config=GraftConfig(method="copy", polish=0)
    )
    torch.testing.assert_close(answers(base, tmp_path / "graft"), answers(base, good))
    assert any(report.note in note for note in graft.report.notes) or not report.note


@pytest.mark.parametrize("name", [name for name, report in REPORTS.items() if report.error is not None])
def test_what_does_not_move_is_refused_in_one_true_line(base: Path, reported: Path, name: str) -> None:
    report = REPORTS[name]
    report.make(reported)
    with pytest.raises(GraftError) as refused:
        peft_graft.inspect(reported, base, teacher=base, config=GraftConfig(method="copy"))
    assert report.error in str(refused.value)
    assert "\n" not in str(refused.value)


# ---- models and files in the wrong place -----------------------------------------------------------------------------


def refusal(*arguments: object, **options: object) -> str:
    with pytest.raises(GraftError) as refused:
        peft_graft.inspect(*arguments, **options, config=GraftConfig(method="copy"))
    return str(refused.value)


def test_a_file_in_place_of_a_folder(base: Path, good: Path) -> None:
    """PixArt-alpha/PixArt-sigma/issues/47"""
    assert "file" in refusal(good / WEIGHTS, base, teacher=base)


def test_a_module_in_place_of_a_model(base: Path, good: Path) -> None:
    """huggingface/peft/issues/523"""
    found = peft_graft.inspect(good, good, teacher=base, config=GraftConfig(method="copy"))
    assert "the student is a trained module, not a model" in found.student.problem


def test_a_model_with_a_module_beside_it(base: Path, good: Path, tmp_path: Path) -> None:
    """unslothai/unsloth/issues/1061"""
    both = shutil.copytree(base, tmp_path / "both")
    shutil.copy(good / CONFIG, both)
    shutil.copy(good / WEIGHTS, both)
    found = peft_graft.inspect(good, both, teacher=base, config=GraftConfig(method="copy"))
    assert "a trained module lies beside the student" in found.student.problem


@pytest.mark.skipif(bool(transformers.utils.is_bitsandbytes_available()), reason="bitsandbytes is installed")
def test_a_base_in_four_bits_without_the_library_for_it(base: Path, good: Path, tmp_path: Path) -> None:
    """unslothai/unsloth/pull/7502"""
    quantised = Path(shutil.copytree(base, tmp_path / "model-bnb-4bit"))
    content = json.loads((quantised / "config.json").read_text())
    content["quantization_config"] = {"load_in_4bit": True, "quant_method": "bitsandbytes"}
    (quantised / "config.json").write_text(json.dumps(content))
    found = peft_graft.inspect(good, base, teacher=quantised, config=GraftConfig(method="copy"))
    assert "the teacher's weights are quantised by bitsandbytes" in found.teacher_problem
