"""``--sites``: roles, layers and heads of a module, and what is refused."""

from __future__ import annotations

import peft
import pytest
import torch
import transformers

import tiny
from peft_graft.errors import PlanError
from peft_graft.models.spaces import Site


def moved(folder, student, *sites: str) -> dict[Site, dict[str, torch.Tensor]]:
    graft = tiny.transfer(folder, student=student, method="copy", sites=sites or None)
    found = graft.checkpoint.modules.items()
    return {site: {name: tensor.values for name, tensor in module.tensors.items()} for site, module in found}


def test_heads_of_a_role_are_moved_and_the_others_left(world, tmp_path) -> None:
    tiny.peft_lora(tmp_path / "m", world / "teacher", targets=["query", "value", "attention.output.dense"])
    whole = moved(tmp_path / "m", world / "teacher")
    found = moved(tmp_path / "m", world / "teacher", "attn.value@0+3", "attn.output@1", "2/attn.query")
    assert {site.role for site in found} == {"attn.value", "attn.output", "attn.query"}
    assert [site.layer for site in found if site.role == "attn.query"] == [2]
    for site, values in found.items():
        given = whole[site]
        if site.role == "attn.value":  # four heads of eight units
            rows = values["B"].view(4, 8, -1)
            assert torch.equal(rows[[0, 3]], given["B"].view(4, 8, -1)[[0, 3]])
            assert not rows[[1, 2]].any()
            assert torch.equal(values["A"], given["A"])
        elif site.role == "attn.output":  # which reads them
            columns = values["A"].view(-1, 4, 8)
            assert torch.equal(columns[:, 1], given["A"].view(-1, 4, 8)[:, 1])
            assert not columns[:, [0, 2, 3]].any()
            assert torch.equal(values["B"], given["B"])
        else:
            assert all(torch.equal(value, given[name]) for name, value in values.items())


@pytest.mark.parametrize(
    ("sites", "kept"),
    [
        (("attn.value@0", "attn.value@3"), [True, False, False, True]),
        (("attn.value@3", "attn.value@0", "attn.*@0"), [True, False, False, True]),
        (("attn.value@3", "attn.value"), [True] * 4),
        (("attn.value", "attn.value@3"), [True] * 4),
    ],
)
def test_heads_of_one_role_named_in_several_patterns_are_all_moved(world, tmp_path, sites, kept) -> None:
    tiny.peft_lora(tmp_path / "m", world / "teacher", targets=["value"])
    for values in moved(tmp_path / "m", world / "teacher", *sites).values():
        assert [bool(head.any()) for head in values["B"].view(4, 8, -1)] == kept


def test_keys_and_values_have_heads_of_their_own(tmp_path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=150, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    base = tiny.saved(tmp_path / "base", config, transformers.AutoModelForCausalLM)
    for name, made in {
        "lora": peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["v_proj"], r=2),
        "ia3": peft.IA3Config(task_type="CAUSAL_LM", target_modules=["v_proj"], feedforward_modules=[]),
    }.items():
        adapted = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), made)
        tiny.randomise_trained(adapted, 1)
        adapted.save_pretrained(tmp_path / name)
    whole, found = (moved(tmp_path / "lora", base, *sites) for sites in ((), ("attn.value@1",)))
    for site, values in found.items():
        assert not values["B"][:8].any()
        assert torch.equal(values["B"][8:], whole[site]["B"][8:])
    whole, found = (moved(tmp_path / "ia3", base, *sites) for sites in ((), ("attn.value@1",)))
    for site, values in found.items():
        assert bool((values["output"][:8] == 1).all())
        assert torch.equal(values["output"][8:], whole[site]["output"][8:])
    with pytest.raises(PlanError, match="no such head; expected 0 to 1, found 2"):
        moved(tmp_path / "lora", base, "attn.value@2")


def test_no_head_can_be_chosen_of_factors_of_what_all_heads_write_together(world, tmp_path) -> None:
    options = {"target_modules": ["attention.output.dense"], "feedforward_modules": []}
    adapted = peft.get_peft_model(
        transformers.AutoModel.from_pretrained(world / "teacher"),
        peft.IA3Config(**options, task_type="FEATURE_EXTRACTION"),
    )
    tiny.randomise_trained(adapted, 1)
    adapted.save_pretrained(tmp_path / "ia3")
    with pytest.raises(PlanError, match="heads can be chosen of .*IA3's factors.*whole sites"):
        moved(tmp_path / "ia3", world / "teacher", "attn.output@0")


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        ("attn.key", "the module has no such site"),
        ("attn.value@first", "heads are numbers.*such as attn.value@0"),
        ("attn.value@", "heads are numbers.*such as attn.value@0"),
        ("attn.value@4", "no such head; expected 0 to 3, found 4"),
        ("ffn.up@0", "heads can be chosen of a plain LoRA.*whole sites"),
    ],
)
def test_what_is_refused(world, tmp_path, sites: str, message: str) -> None:
    tiny.peft_lora(tmp_path / "m", world / "teacher", targets=["value", "intermediate.dense"])
    with pytest.raises(PlanError, match=message):
        moved(tmp_path / "m", world / "teacher", sites)
