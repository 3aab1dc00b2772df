"""Files that people have reported in public, each by its address on GitHub: what is right for it, the whole way."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

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
from peft_graft.models.tasks import Task

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
WORDS, TEXTS = transformers.AutoModelForCausalLM, transformers.AutoModelForSequenceClassification
OPTIONS = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 8}


@dataclass(frozen=True)
class Report:
    """A report.

    Attributes:
        address: on GitHub. make: turns the folder of a good LoRA into the reported one, given the folder of its base.
        error: what is said of it, None if it moves. note: what is said of one that moves.
        computes: what the moved one does: what the good one does, or what peft makes of the reported one.
        of: whether of a language model (``words``) or of a classifier (``texts``).
    """

    address: str
    make: Callable[[Path, Path], object]
    error: str | None = None
    note: str = ""
    computes: Literal["the good one", "as in peft"] = "the good one"
    of: Literal["words", "texts"] = "words"


def tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path, Path], None]:
    return lambda folder, _: save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})


def keys(change: Callable[[str], str]) -> Callable[[Path, Path], None]:
    return tensors(lambda found: {change(key): value for key, value in found.items()})


def settings(**changes: object) -> Callable[[Path, Path], None]:
    def make(folder: Path, _: Path) -> None:
        content = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**content, **changes}))

    return make


def in_place_of_all(*names: str) -> Callable[[Path, Path], None]:
    def make(folder: Path, _: Path) -> None:
        for path in folder.iterdir():
            path.unlink()
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            torch.save({}, folder / name)

    return make


def trained(**options: object) -> Callable[[Path, Path], None]:
    """A module of other options."""

    def make(folder: Path, base: Path) -> None:
        classifies = options.get("task_type") == "SEQ_CLS"
        model = (TEXTS if classifies else WORDS).from_pretrained(base)
        adapted = peft.get_peft_model(model, peft.LoraConfig(**{**OPTIONS, **options}))
        tiny.randomise_trained(adapted, 1)
        adapted.save_pretrained(folder)

    return make


def as_mlx(folder: Path, _: Path) -> None:
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


def as_kohya(key: str) -> str:
    path, _, factor = key.removeprefix("base_model.model.").partition(".lora_")
    return f"lora_te_{path.replace('.', '_')}.lora_{'down' if factor.startswith('A') else 'up'}.weight"


def two_adapters(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        key.replace(".weight", f".{name}.weight"): value.clone()
        for key, value in found.items()
        for name in ("default", "ref")
    }


def one_folder_a_checkpoint(folder: Path, _: Path) -> None:
    for name in ("checkpoint-100", "checkpoint-200"):
        (folder / name).mkdir()
        for file in (WEIGHTS, CONFIG):
            shutil.copy(folder / file, folder / name)
    (folder / WEIGHTS).unlink()
    (folder / CONFIG).unlink()


#: peft says what it does with vocabularies, and that it reads the base for some ways to begin.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")
PEFT = {"computes": "as in peft"}
INIT = "save it with peft's path_initial_model_for_weight_conversion"
REPORTS = {
    # -- names of tensors
    "torch.compile's wrapper": Report("MakazhanAlpamys/Soup/issues/335", keys(lambda key: f"_orig_mod.{key}")),
    "wrappers of FSDP and of checkpointing": Report(
        "linkedin/Liger-Kernel/pull/674",
        keys(lambda key: key.replace("self_attn.", "_fsdp_wrapped_module.self_attn._checkpoint_wrapped_module.")),
    ),
    "named as in a model that reads images too": Report(
        "vllm-project/vllm/issues/48019", keys(lambda key: key.replace("model.layers", "model.language_model.layers"))
    ),
    "named as in such a model before transformers 4.52": Report(
        "huggingface/transformers/pull/38627",
        keys(lambda key: key.replace("model.layers", "language_model.model.layers")),
    ),
    "named as in the text tower of such a model": Report(
        "illuin-tech/colpali/issues/424",
        keys(lambda key: key.replace("base_model.model.model.", "base_model.model.language_model.")),
    ),
    "without the name of the model inside": Report(
        "vllm-project/vllm/issues/34186", keys(lambda key: key.replace("base_model.model.model.", "base_model.model."))
    ),
    "two adapters": Report("huggingface/trl/pull/1193", tensors(two_adapters), error="two adapters"),
    # -- options
    "no task": Report("meta-pytorch/torchtune/pull/933", settings(task_type=None)),
    "the task of an embedding model": Report(
        "huggingface/sentence-transformers/pull/3046", settings(task_type="FEATURE_EXTRACTION")
    ),
    "options of a later peft that are not set": Report(
        "oobabooga/textgen/issues/6819",
        settings(corda_config=None, eva_config=None, exclude_modules=None, trainable_token_indices=None),
    ),
    "options of the first peft that are not set": Report(
        "InternLM/lmdeploy/issues/1151", settings(enable_lora=None, merge_weights=False)
    ),
    "the first peft's LoRA of fused layers": Report(
        "huggingface/peft/issues/1337", settings(enable_lora=[True, False, True]),
        error="enable_lora=[True, False, True] is not supported yet",
    ),
    "layers left out of all": Report(
        "huggingface/peft/issues/2208", trained(target_modules="all-linear", exclude_modules=["o_proj"]), **PEFT
    ),
    "ranks that are not the configuration's": Report(
        "oobabooga/textgen/issues/3944", settings(r=128), error="have another rank than the configuration says"
    ),
    "rank-stabilised": Report("NVIDIA/TensorRT-LLM/issues/1668", settings(use_rslora=True), **PEFT),
    "ranks and scales by layer": Report(
        "axolotl-ai-cloud/axolotl/pull/3673",
        trained(rank_pattern={r".*\.layers\.1\..*(q_proj|v_proj)$": 2},
                alpha_pattern={r".*\.layers\.1\..*(q_proj|v_proj)$": 32}), **PEFT,
    ),
    "DoRA": Report("hiyouga/LlamaFactory/issues/2696", trained(use_dora=True), **PEFT),
    "DoRA without its magnitudes": Report(
        "meta-pytorch/torchtune/pull/1884", settings(use_dora=True), error="lacks its magnitudes"
    ),
    "EVA, which leaves the base as it is": Report(
        "huggingface/peft/issues/2275", settings(init_lora_weights="eva", eva_config={"rho": 2.0}), **PEFT
    ),
    "PiSSA": Report("huggingface/peft/pull/1626", settings(init_lora_weights="pissa"), error=INIT),
    "OLoRA": Report("huggingface/peft/pull/1828", settings(init_lora_weights="olora"), error=INIT),
    "CorDA": Report("huggingface/peft/pull/2231", settings(init_lora_weights="corda"), error=INIT),
    "LoRA-GA": Report("huggingface/peft/pull/2926", settings(init_lora_weights="lora_ga"), error=INIT),
    "X-LoRA": Report("huggingface/peft/issues/2132", settings(peft_type="XLORA"), error="type XLORA cannot be moved"),
    # -- vocabularies
    "embeddings and output layer trained whole": Report(
        "huggingface/peft/issues/1750", trained(modules_to_save=["embed_tokens", "lm_head"]), **PEFT
    ),
    "the output layer trained whole": Report(
        "ggml-org/llama.cpp/issues/11554", trained(modules_to_save=["lm_head"]), **PEFT
    ),
    "embeddings that are to be tied": Report(
        "huggingface/peft/pull/2803", trained(modules_to_save=["embed_tokens"], ensure_weight_tying=True), **PEFT
    ),
    "some tokens": Report("huggingface/peft/issues/2898", trained(trainable_token_indices=[5, 9]), **PEFT),
    "LoRA on embeddings": Report(
        "huggingface/peft/pull/2879", trained(target_modules=["embed_tokens", "q_proj"]), **PEFT
    ),
    # -- heads
    "a value head beside it": Report(
        "huggingface/trl/issues/2707",
        lambda folder, _: torch.save({"v_head.summary.weight": torch.ones(1, 8)}, folder / "pytorch_model.bin"),
        note="the value head that was trained beside the module is left out",
    ),
    "a head that the configuration does not name": Report(
        "huggingface/peft/issues/577", settings(modules_to_save=None), of="texts"
    ),
    "all linear layers of a classifier": Report(
        "huggingface/peft/pull/2033", trained(task_type="SEQ_CLS", target_modules="all-linear"), of="texts", **PEFT
    ),
    "layers called dense, the pooler's among them": Report(
        "huggingface/peft/issues/735", trained(task_type="SEQ_CLS", target_modules=["query", "dense"]), of="texts",
        **PEFT,
    ),
    "a head that it does name": Report(
        "huggingface/sentence-transformers/issues/3980",
        trained(task_type="SEQ_CLS", target_modules=["query"], modules_to_save=["classifier"]), of="texts", **PEFT,
    ),
    # -- files of other programs, and what is left of training
    "empty tensors": Report(
        "huggingface/peft/issues/1443",
        tensors(lambda found: {key: torch.empty(0) for key in found}),
        error="ZeRO-3",
    ),
    "a file without tensors": Report(
        "h2oai/h2ogpt/issues/217", tensors(lambda found: {}), error="the file holds no tensors at all"
    ),
    "a pointer in place of the weights": Report(
        "microsoft/OmniParser/issues/34",
        lambda folder, _: (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\n"),
        error="it is a pointer of git-lfs, not the file. Fix: run `git lfs pull`",
    ),
    "mlx-lm": Report("ml-explore/mlx-lm/issues/1119", as_mlx, error="mlx-lm"),
    "mlx-lm's first files": Report("ml-explore/mlx-examples/issues/812", in_place_of_all("adapters.npz"), "mlx-lm"),
    "Kohya's scripts": Report("kohya-ss/sd-scripts/issues/1483", keys(as_kohya), error="a LoRA of Kohya's scripts"),
    "diffusers": Report(
        "Comfy-Org/ComfyUI/issues/4347", in_place_of_all("pytorch_lora_weights.safetensors"),
        error="this is a LoRA of diffusers",
    ),
    "llama.cpp": Report("unslothai/unsloth/issues/1546", in_place_of_all("lora-f16.gguf"), error="llama.cpp (GGUF)"),
    "llama.cpp's names": Report(
        "MediaBrain-SJTU/MING/issues/20",
        keys(lambda key: key.replace("self_attn.q_proj.lora_A.weight", "attn_q.weight.loraA")),
        error="llama.cpp (GGUF)",
    ),
    "NeMo": Report("NVIDIA-NeMo/Speech/issues/8786", in_place_of_all("model.nemo"), error="a checkpoint of NeMo"),
    "NeMo's names": Report(
        "NVIDIA-NeMo/RL/issues/2190",
        keys(lambda key: key.replace("lora_A", "adapter.linear_in").replace("lora_B", "adapter.linear_out")),
        error="a checkpoint of NeMo",
    ),
    "torchtune": Report(
        "meta-pytorch/torchtune/issues/832", in_place_of_all("adapter_0.pt", "recipe_state.pt"),
        error="torchtune wrote the weights as .pt",
    ),
    "a training checkpoint without a module": Report(
        "huggingface/peft/issues/298",
        in_place_of_all("pytorch_model.bin", "rng_state_0.pth", "global_step12000/mp_rank_00_model_states.pt"),
        error="a checkpoint of DeepSpeed, whose weights are not gathered",
    ),
    "a training checkpoint of the whole model": Report(
        "tloen/alpaca-lora/issues/515", in_place_of_all("pytorch_model.bin", "optimizer.pt", "trainer_state.json"),
        error="a checkpoint of a training run, whose weights are those of the whole model",
    ),
    "a folder of checkpoints": Report(
        "hiyouga/LlamaFactory/issues/6979", one_folder_a_checkpoint,
        error="give one of its sub-folders: checkpoint-100, checkpoint-200",
    ),
    "weights alone": Report(
        "huggingface/peft/issues/420", in_place_of_all("adapter_model.bin"),
        error="a module's weights without adapter_config.json",
    ),
    "an adapter of AdapterHub's first days": Report(
        "adapter-hub/adapters/issues/19",
        lambda folder, _: (folder / CONFIG).write_text(json.dumps({
            "model_type": "bert", "model_name": "bert-base-uncased", "config": {
                "MH_Adapter": False, "Output_Adapter": True, "reduction_factor": 16, "non_linearity": "relu"}})),
        error="lack mh_adapter, output_adapter",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {
        "words": tiny.saved(root / "words", transformers.LlamaConfig(**COMMON, **FFN), WORDS),
        "texts": tiny.base_model(root / "texts", layers=2, hidden=16, heads=2, ffn=24),
    }


@pytest.fixture(scope="module")
def goods(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("goods")
    trained()(root / "words", bases["words"])
    trained(task_type="SEQ_CLS", target_modules=["query", "value"])(root / "texts", bases["texts"])
    return {of: root / of for of in bases}


@pytest.fixture
def base(bases: dict[str, Path]) -> Path:
    return bases["words"]


@pytest.fixture
def good(goods: dict[str, Path]) -> Path:
    return goods["words"]


def answers(of: str, base: Path, folder: Path) -> torch.Tensor:
    auto = WORDS if of == "words" else TEXTS
    model = peft.PeftModel.from_pretrained(auto.from_pretrained(base), folder).eval()
    with torch.no_grad():
        return model(torch.arange(3, 19)[None]).logits


def named(*, refused: bool) -> list[str]:
    return [name for name, report in REPORTS.items() if (report.error is not None) == refused]


@pytest.mark.parametrize("name", named(refused=False))
def test_what_moves_computes_what_it_did(
    bases: dict[str, Path], goods: dict[str, Path], tmp_path: Path, name: str
) -> None:
    report = REPORTS[name]
    base, reported = bases[report.of], Path(shutil.copytree(goods[report.of], tmp_path / "reported"))
    report.make(reported, base)
    right = reported if report.computes == "as in peft" else goods[report.of]
    graft = peft_graft.transfer(
        reported, base, teacher=base, out=tmp_path / "graft", config=GraftConfig(method="copy", polish=0)
    )
    torch.testing.assert_close(answers(report.of, base, tmp_path / "graft"), answers(report.of, base, right))
    assert any(report.note in note for note in graft.report.notes) or not report.note


@pytest.mark.parametrize("name", named(refused=True))
def test_what_does_not_move_is_refused_in_one_true_line(base: Path, good: Path, tmp_path: Path, name: str) -> None:
    report, reported = REPORTS[name], Path(shutil.copytree(good, tmp_path / "reported"))
    report.make(reported, base)
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


def test_the_base_in_place_of_the_module(base: Path) -> None:
    """hiyouga/LlamaFactory/issues/6764"""
    assert "a whole model, with no module in it" in refusal(base, base, teacher=base)


def test_a_module_that_is_not_there(base: Path, tmp_path: Path) -> None:
    """eosphoros-ai/DB-GPT-Hub/issues/71"""
    assert "no such folder" in refusal(tmp_path / "adapter_model", base, teacher=base)


def test_no_base_on_record(base: Path, good: Path, tmp_path: Path) -> None:
    """huggingface/transformers/issues/25222"""
    reported = Path(shutil.copytree(good, tmp_path / "reported"))
    settings(base_model_name_or_path=None)(reported, base)
    found = peft_graft.inspect(reported, base, config=GraftConfig(method="copy"))
    assert found.teacher_problem.endswith("names no base model. Fix: name it with --teacher")


def test_a_base_at_a_path_of_the_machine_that_trained(base: Path, good: Path, tmp_path: Path) -> None:
    """OpenBMB/MiniCPM/pull/362"""
    reported = Path(shutil.copytree(good, tmp_path / "reported"))
    settings(base_model_name_or_path="/data/models/llama")(reported, base)
    found = peft_graft.inspect(reported, base, config=GraftConfig(method="copy"))
    assert "/data/models/llama" in found.teacher_problem
    assert "--teacher" in found.teacher_problem


def test_a_module_of_a_base_of_another_size(good: Path, tmp_path: Path) -> None:
    """huggingface/autotrain-advanced/issues/487"""
    other = {**COMMON, **FFN, "hidden_size": 2 * COMMON["hidden_size"]}
    wide = tiny.saved(tmp_path / "wide", transformers.LlamaConfig(**other), WORDS)
    found = peft_graft.inspect(good, wide, teacher=wide, config=GraftConfig(method="copy"))
    assert "the teacher is not the base of this module" in found.teacher_problem


def test_a_module_of_a_base_without_its_added_tokens(base: Path, good: Path, tmp_path: Path) -> None:
    """ziwang-com/zero-lora/issues/43"""
    model = WORDS.from_pretrained(base)
    model.resize_token_embeddings(COMMON["vocab_size"] + 7, mean_resizing=False)
    options = peft.LoraConfig(**OPTIONS, modules_to_save=["embed_tokens", "lm_head"])
    adapted = peft.get_peft_model(model, options)
    tiny.randomise_trained(adapted, 1)
    adapted.save_pretrained(tmp_path / "reported")
    graft = peft_graft.transfer(tmp_path / "reported", base, teacher=base, config=GraftConfig(method="copy", polish=0))
    lost = "7 rows that were added to the teacher's vocabulary are left out, for no tokenizer lies beside the module"
    assert [lost in note for note in graft.report.notes] == [True, True]


def test_a_head_of_labels_that_hold_or_not(bases: dict[str, Path], goods: dict[str, Path], tmp_path: Path) -> None:
    """vllm-project/vllm/issues/23164"""
    reported = Path(shutil.copytree(goods["texts"], tmp_path / "reported"))
    (reported / "config.json").write_text('{"problem_type": "multi_label_classification"}')
    graft = peft_graft.transfer(reported, bases["texts"], config=GraftConfig(method="copy", polish=0))
    assert graft.model.config.problem_type == "multi_label_classification"


def test_whisper_is_loaded_by_its_own_class() -> None:
    """huggingface/huggingface.js/issues/1903"""
    assert Task.SEQ2SEQ_LM.auto_class_of("whisper") == "AutoModelForSpeechSeq2Seq"
