"""Families unlike BERT: fused and transposed projections, grouped heads, shared layers, the last token's class."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file

import tiny
from families import DECODERS, ENCODERS, same_module
from peft_graft.alignment.activations import Capture
from peft_graft.alignment.activations import pad as pad_rows
from peft_graft.checkpoints.attach import attach
from peft_graft.checkpoints.read import read_checkpoint
from peft_graft.checkpoints.resolve import resolve, to_raw
from peft_graft.errors import ModelError
from peft_graft.models.loading import describe_config, load_model, wrap_model
from peft_graft.models.spaces import Site, Space

#: Modules that peft users name, where a family has names of its own.
TARGETS = {
    "gpt2": ["c_attn", "c_fc", "mlp.c_proj"], "gpt_neox": ["query_key_value", "dense_h_to_4h", "dense_4h_to_h"],
    "falcon": ["query_key_value", "dense_h_to_4h"], "falcon-new": ["query_key_value", "dense_h_to_4h"],
    "bloom": ["query_key_value", "dense_4h_to_h"], "phi3": ["qkv_proj", "gate_up_proj", "down_proj"],
    "opt": ["q_proj", "v_proj", "fc1"],
}  # fmt: skip
DEFAULT_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"]


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # DeBERTa scripts its attention
@pytest.mark.parametrize("family", ENCODERS)
def test_encoders_unlike_bert(family: str, tmp_path: Path, short_text: Path) -> None:
    """A module returns from its own model as it was, and moves to BERT and back."""
    base = tmp_path / "base"
    tiny.lively(transformers.AutoModel.from_config(ENCODERS[family])).save_pretrained(base)
    tiny.tokenizer(base)
    bert = tiny.base_model(tmp_path / "bert", hidden=24)
    targets = {"modernbert": ["Wqkv", "Wi", "Wo"], "deberta-v2": ["query_proj", "value_proj"],
               "albert": ["query", "value", "ffn"]}[family]  # fmt: skip
    tiny.peft_lora(tmp_path / "module", base, task="base", targets=targets)
    tiny.peft_lora(tmp_path / "of-bert", bert, task="base")
    assert not describe_config(ENCODERS[family]).inferred
    same = tiny.transfer(tmp_path / "module", student=base, method="copy", out=tmp_path / "same")
    assert same.report.verification.done
    same_module(tmp_path / "module", tmp_path / "same")
    options = {"text": short_text, "method": "prune-align", "max_tokens": 1000, "polish": 0}
    if family != "modernbert":  # BERT has no gate
        there = tiny.transfer(tmp_path / "module", student=bert, out=tmp_path / "there", **options)
        assert there.report.verification.done
    back = tiny.transfer(tmp_path / "of-bert", student=base, out=tmp_path / "back", **options)
    assert back.report.verification.done


def saved(folder: Path, family: str, seed: int = 0, **changes) -> Path:
    return tiny.saved(folder, DECODERS[family], transformers.AutoModelForCausalLM, seed=seed, **changes)


def trained(
    folder: Path, base: Path, family: str, task: str = "CAUSAL_LM", targets: list[str] | None = None
) -> torch.nn.Module:
    auto = {"CAUSAL_LM": transformers.AutoModelForCausalLM, "SEQ_CLS": transformers.AutoModelForSequenceClassification}
    model = auto[task].from_pretrained(base, **({"num_labels": 3} if task == "SEQ_CLS" else {})).eval()
    config = peft.LoraConfig(
        task_type=task, r=4, lora_alpha=8, target_modules=targets or TARGETS.get(family, DEFAULT_TARGETS),
        fan_in_fan_out=family == "gpt2",
    )  # fmt: skip
    adapted = peft.get_peft_model(model, config)
    tiny.randomise(adapted, 1, ("lora_", "modules_to_save.default"))
    adapted.save_pretrained(folder)
    return adapted.eval()


def batch(rows: int = 2) -> dict[str, torch.Tensor]:
    ids = torch.randint(10, 100, (rows, 9), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("family", DECODERS)
def test_parts_of_projections_are_the_tensors_that_attention_uses(family: str) -> None:
    """Keys and values as they end up in the cache, before rotary embedding where there is one: values are exact."""
    model = wrap_model(tiny.lively(transformers.AutoModel.from_config(DECODERS[family])))
    assert not model.architecture.inferred
    spaces = [Space(0, f"attn.{part}.out") for part in ("query", "key", "value")] + [Space(1, "ffn.mid")]
    with torch.inference_mode(), Capture(model, spaces) as capture:
        held = capture.forward(batch())
        cached = model.base(**batch(), use_cache=True).past_key_values
    values = (cached.layers[0].values if hasattr(cached, "layers") else cached[0][1]).transpose(1, 2).flatten(2)
    if family == "falcon-new":  # keeps a copy of every value for each query head of its group
        values = values.unflatten(-1, (2, 2, 8))[..., 0, :].flatten(-2)
    torch.testing.assert_close(held[Space(0, "attn.value.out")], values)
    for space, value in held.items():
        assert value.shape[-1] == model.architecture.size(space), space


@pytest.fixture(scope="module")
def grown(tmp_path_factory) -> Callable[[str], tuple[Path, Path]]:
    """A family's model and a module of it."""
    root = tmp_path_factory.mktemp("families")

    def made(family: str) -> tuple[Path, Path]:
        base, module = root / family, root / f"{family}-module"
        if not module.exists():
            saved(base, family)
            trained(module, base, family)
        return base, module

    return made


@pytest.fixture(scope="module")
def narrow(tmp_path_factory) -> Path:
    """A narrower, deeper Llama, and two modules of it: a gate has no counterpart in most of the older families."""
    root = tmp_path_factory.mktemp("narrow")
    base = saved(root / "llama", "llama", 1, hidden_size=24, head_dim=6, num_hidden_layers=3)
    trained(root / "with-gate", base, "llama")
    trained(root / "without-gate", base, "llama", targets=["q_proj", "v_proj", "up_proj"])
    return root


@pytest.mark.parametrize("family", DECODERS)
def test_a_module_returns_from_its_own_model_as_it_was(family: str, tmp_path: Path, grown) -> None:
    base, module = grown(family)
    graft = tiny.transfer(module, student=base, method="copy", out=tmp_path / "graft")
    assert graft.report.verification.done
    same_module(module, tmp_path / "graft")


@pytest.mark.parametrize("family", DECODERS)
def test_modules_move_between_llama_and_every_family(
    family: str, tmp_path: Path, text: Path, short_text: Path, grown, narrow: Path
) -> None:
    """To a narrower, deeper Llama and from it; what is written loads in peft and acts (``transfer`` verifies both)."""
    base, module = grown(family)
    roles = set(describe_config(DECODERS[family]).row.linears)
    options = {"text": text, "method": "prune-align", "max_tokens": 500}
    graft = tiny.transfer(module, student=narrow / "llama", out=tmp_path / "there", **options)
    assert graft.report.verification.done
    assert {site.role for site in graft.checkpoint.modules} <= roles
    module = narrow / ("with-gate" if "ffn.gate" in roles else "without-gate")
    options["text"] = short_text  # it is judged on the way there
    back = tiny.transfer(module, student=base, out=tmp_path / "back", **options)
    assert back.report.verification.done


def test_a_fused_update_is_the_sum_of_its_parts(tmp_path: Path) -> None:
    """LoRAs of one A come back as they were; others are joined at a higher rank that computes the same."""
    base = saved(tmp_path / "base", "gpt_neox")
    trained(tmp_path / "module", base, "gpt_neox")
    architecture = describe_config(transformers.AutoConfig.from_pretrained(base))
    checkpoint = resolve(read_checkpoint(tmp_path / "module"), architecture)
    path = "gpt_neox.layers.0.attention.query_key_value"
    assert to_raw(checkpoint, architecture).parts[path].A.shape == (4, 32)
    query = checkpoint.modules[Site(0, "attn.query")]
    changed = query.with_values({"A": query.tensors["A"].values.flip(0), "B": query.tensors["B"].values.flip(1)})
    joined = to_raw(
        type(checkpoint)(checkpoint.raw, {**checkpoint.modules, Site(0, "attn.query"): changed}), architecture
    ).parts[path]  # fmt: skip
    assert joined.A.shape == (8, 32)
    before = checkpoint.raw.parts[path]
    torch.testing.assert_close(joined.B @ joined.A, before.B @ before.A, atol=1e-5, rtol=1e-5)


def test_query_and_value_of_llama_become_one_projection_of_gpt2(tmp_path: Path, short_text: Path) -> None:
    llama, gpt2 = saved(tmp_path / "llama", "llama"), saved(tmp_path / "gpt2", "gpt2", 1)
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
    )
    tiny.randomise(adapted, 1, ("lora_",))
    adapted.save_pretrained(tmp_path / "module")
    tiny.transfer(
        tmp_path / "module",
        student=gpt2,
        text=short_text,
        method="prune-align",
        max_tokens=1000,
        out=tmp_path / "graft",
    )
    raw = read_checkpoint(tmp_path / "graft")
    factors = raw.parts["transformer.h.0.attn.c_attn"]
    assert factors.A.shape == (8, 32)
    assert not factors.B[32:64].any(), "nothing was trained on the keys"
    assert raw.config["fan_in_fan_out"] is True
    assert raw.config["r"] == 8


@pytest.mark.parametrize("kind", ["dora", "bias"])
@pytest.mark.parametrize("family", ["gpt2", "phi3"])
def test_projections_without_a_module_stay_as_they_are_in_a_fused_layer(
    family: str, kind: str, tmp_path: Path, text: Path
) -> None:
    """What replaces values of the layer, DoRA's magnitudes and trained biases, is of the whole layer in a file."""
    if (family, kind) == ("phi3", "bias"):
        pytest.skip("it has no biases")
    teacher, student = saved(tmp_path / "teacher", "opt"), saved(tmp_path / "student", family, 3)
    options = {"use_dora": True} if kind == "dora" else {"bias": "lora_only"}
    model = transformers.AutoModelForCausalLM.from_pretrained(teacher)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options)
    adapted = peft.get_peft_model(model, config)
    tiny.randomise(adapted, 1, ("lora_", ".bias"))
    adapted.save_pretrained(tmp_path / "module")
    tiny.transfer(
        tmp_path / "module", student, text=text, method="prune-align", out=tmp_path / "graft", max_tokens=1000, polish=0
    )
    bare = transformers.AutoModelForCausalLM.from_pretrained(student)
    grafted = PeftModel.from_pretrained(copy.deepcopy(bare), tmp_path / "graft").merge_and_unload()
    name = {"gpt2": "transformer.h.0.attn.c_attn", "phi3": "model.layers.0.self_attn.qkv_proj"}[family]
    before, after = (model.get_submodule(name) for model in (bare, grafted))
    rows = [layer.weight.T if family == "gpt2" else layer.weight for layer in (before, after)]
    units = load_model(str(student)).architecture.units
    keys, queries = units["attn.key"], units["attn.query"]
    torch.testing.assert_close(rows[1][keys], rows[0][keys], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(rows[1][queries], rows[0][queries], atol=1e-3)
    if before.bias is not None:
        torch.testing.assert_close(after.bias[keys], before.bias[keys])


@pytest.mark.parametrize("family", ["gpt2", "llama", "phi3"])
def test_a_classifier_reads_the_last_token(family: str, tmp_path: Path, text: Path) -> None:
    """A decoder's classification head moves, is fitted and polished; on its own model it is exact."""
    base = saved(tmp_path / "base", family)
    adapted = trained(tmp_path / "module", base, family, "SEQ_CLS")
    same = tiny.transfer(tmp_path / "module", student=base, text=text, out=tmp_path / "same", max_tokens=1000)
    assert same.report.verdict.level == "exact"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=3).eval()
    moved = PeftModel.from_pretrained(model, tmp_path / "same").eval()
    with torch.inference_mode():
        torch.testing.assert_close(moved(**batch()).logits, adapted(**batch()).logits, atol=1e-4, rtol=1e-4)
    other = saved(tmp_path / "other", "qwen2", 3, hidden_size=24)
    text.write_text("\n".join(tiny.sentences(400)))  # of fewer, the fit learns what is not so
    graft = tiny.transfer(
        tmp_path / "module", student=other, text=text, method="prune-align", head="fit", polish=0, max_tokens=1000
    )
    assert graft.report.head.reads == "last.out"
    assert graft.report.head.how == "fitted"
    # How much better depends on what a random model's last token shows; that it was learned at all does not.
    assert graft.report.verdict.measured.divergence < 1.5 * graft.report.verdict.moved.divergence
    assert {"penalty", "divergence"} == graft.report.head.fit.keys()


@pytest.mark.parametrize("pad", [0, 4, None])
@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_a_classifier_reads_the_last_token_whatever_fills_rows(family: str, pad: int | None, tmp_path: Path) -> None:
    """The configuration names no token of padding, as those of Qwen do not: the tokenizer does, or nothing."""
    base = saved(tmp_path / "base", family, pad_token_id=None)
    trained(tmp_path / "module", base, family, "SEQ_CLS")
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad) if pad is not None else None
    handle = replace(load_model(str(base)), tokenizer=tokenizer)
    attached = attach(read_checkpoint(tmp_path / "module"), handle, ("a", "b", "c"))
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in ([7, 9, 11, 13, 15], [8, 10], [12, 0, 14])]
    rows += [{"input_ids": [6, 5, 0], "attention_mask": [1, 1, 1]}] if pad != 0 else []  # a word like others
    weight = attached.model.base_model.model.score.modules_to_save["default"].weight
    with torch.inference_mode():
        together, states = attached.forward(pad_rows(handle, rows, handle.device))
        for row, ids in enumerate(rows):
            (alone,), _ = attached.forward(pad_rows(handle, [ids], handle.device))
            last = states[row, len(ids["input_ids"]) - 1]
            torch.testing.assert_close(together[row], alone, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(together[row], weight @ last, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", DECODERS)
def test_bare_models_come_whole_from_the_files_of_language_models(family: str, tmp_path: Path) -> None:
    base = load_model(str(saved(tmp_path / "base", family)))
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    inside = getattr(whole, base.architecture.prefix)
    assert not base.missing
    for name, value in inside.state_dict().items():
        assert torch.equal(value, base.base.state_dict()[name]), name


def test_a_file_without_the_models_weights_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "base", "llama")
    file = folder / "model.safetensors"
    save_file({f"other.{name}": value for name, value in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(ModelError, match="most of the model's weights"):
        load_model(str(folder))
