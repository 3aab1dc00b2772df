"""The table of architectures against the real module trees, and inference for what is not in it."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

import tiny
from families import DECODERS
from peft_graft.alignment.activations import Capture
from peft_graft.errors import ArchitectureError
from peft_graft.models.architecture import describe
from peft_graft.models.families import all_rows
from peft_graft.models.inference import infer_row
from peft_graft.models.loading import describe_config, wrap_model
from peft_graft.models.spaces import Site, Space
from peft_graft.models.spec import LINEAR_ROLES


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_row_fits_its_models(family: str) -> None:
    architecture = describe_config(tiny.config(family, layers=3, hidden=32, ffn=48))
    assert not architecture.inferred
    assert architecture.num_layers == 3
    assert architecture.size(Space(2, "attn.in")) == 32
    assert architecture.size(Space(2, "ffn.mid")) == 48
    for role in ("attn.query", "attn.key", "attn.value", "attn.output", "ffn.up", "ffn.down"):
        path = architecture.path(Site(1, role))
        assert architecture.sites(f"{architecture.prefix}.{path}") == ([Site(1, role)], f"{architecture.prefix}.")
        assert architecture.sites(path) == ([Site(1, role)], "")


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_spaces_are_the_tensors_they_claim_to_be(family: str) -> None:
    """layer.out of one layer is attn.in and layer.in of the next, and the last one the last hidden state."""
    model = wrap_model(tiny.lively(transformers.AutoModel.from_config(tiny.config(family, layers=3))))
    spaces = [Space(layer, name) for layer in range(3) for name in
              ("attn.in", "layer.in", "layer.out", "ffn.in", "attn.stream", "ffn.mid")]  # fmt: skip
    ids = torch.randint(10, 100, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), Capture(model, [*spaces, Space(-1, "tokens.out"), Space(-1, "first.out")]) as capture:
        held = capture.forward({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    for layer in range(2):
        assert torch.equal(held[Space(layer, "layer.out")], held[Space(layer + 1, "attn.in")])
        assert torch.equal(held[Space(layer, "layer.out")], held[Space(layer + 1, "layer.in")])
        assert torch.equal(held[Space(layer, "ffn.in")], held[Space(layer, "attn.stream")])
    assert torch.equal(held[Space(2, "layer.out")], held[Space(-1, "tokens.out")])
    assert torch.equal(held[Space(-1, "first.out")], held[Space(-1, "tokens.out")][:, 0])
    assert not torch.equal(held[Space(0, "ffn.in")], held[Space(0, "attn.in")])
    for space, value in held.items():
        assert value.shape[-1] == model.architecture.size(space)


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_the_stream_of_layers_that_norm_what_they_read(family: str) -> None:
    model = wrap_model(tiny.lively(transformers.AutoModel.from_config(DECODERS[family])))
    names = ("layer.in", "attn.output.out", "attn.stream", "ffn.down.out", "layer.out")
    ids = torch.randint(10, 100, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), Capture(model, [Space(at, name) for at in range(2) for name in names]) as capture:
        held = capture.forward({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    for layer in range(2):
        begin, attended, middle, fed, end = (held[Space(layer, name)] for name in names)
        torch.testing.assert_close(middle, begin + attended)
        torch.testing.assert_close(end, middle + fed)
    assert torch.equal(held[Space(0, "layer.out")], held[Space(1, "layer.in")])


def test_hooks_are_removed_after_a_capture() -> None:
    model = wrap_model(transformers.AutoModel.from_config(tiny.config()))
    with Capture(model, [Space(0, "attn.in"), Space(1, "ffn.up.out")]):
        pass
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.base.modules())


def test_rows_use_known_roles_and_name_each_make_of_a_model_type_once() -> None:
    types = [(name, *(stack.layers for stack in row.stacks)) for row in all_rows() for name in row.model_types]
    assert len(types) == len(set(types))
    roles = {role.removeprefix("shared.") for row in all_rows() for stack in row.stacks for role in stack.linears}
    assert roles == set(LINEAR_ROLES)
    assert all(len({stack.name for stack in row.stacks}) == len(row.stacks) for row in all_rows())


def test_an_unknown_architecture_is_inferred_from_its_module_tree() -> None:
    config = transformers.HeliumConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    architecture = describe_config(config)
    assert architecture.inferred
    assert architecture.num_layers == 2
    assert architecture.path(Site(1, "ffn.gate")) == "layers.1.mlp.gate_proj"
    assert set(architecture.row.linears) == {
        "attn.query", "attn.key", "attn.value", "attn.output", "ffn.up", "ffn.gate", "ffn.down"
    }  # fmt: skip


class _Odd(nn.Module):
    def __init__(self, *names: str, stacks: int = 1) -> None:
        super().__init__()
        for stack in range(stacks):
            layers = [nn.ModuleDict({name: nn.Linear(4, 4) for name in names}) for _ in range(2)]
            setattr(self, f"stack{stack}", nn.ModuleList(layers))


def _layer(*names: str) -> nn.ModuleDict:
    found = nn.ModuleDict()
    for name in names:
        found[name.replace(".", "_")] = nn.Linear(4, 4)
    return found


class _Hybrid(nn.Module):
    """Layers that attend between layers that do not; a mixture of experts in one of them."""

    def __init__(self) -> None:
        super().__init__()
        attends = nn.ModuleDict({"attn": _layer("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": _layer("up_proj")})
        recurs = nn.ModuleDict({"ssm": _layer("in_proj", "o_proj"), "mlp": _layer("up_proj")})
        latent = nn.ModuleDict({"attn": _layer("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
                                "experts": nn.ModuleList([_layer("up_proj"), _layer("up_proj")])})  # fmt: skip
        self.layers = nn.ModuleList([recurs, attends, latent])


def test_layers_of_several_sorts_are_inferred_together() -> None:
    (stack,) = infer_row(_Hybrid(), "odd").stacks
    assert {role: linear.path for role, linear in stack.linears.items()} == {
        "attn.query": "attn.q_proj", "attn.key": "attn.k_proj", "attn.value": "attn.v_proj",
        "attn.output": "attn.o_proj", "ffn.up": "mlp.up_proj", "attn.query_down": "attn.q_a_proj",
        "attn.query_up": "attn.q_b_proj", "attn.kv_down": "attn.kv_a_proj_with_mqa", "attn.kv_up": "attn.kv_b_proj",
    }  # fmt: skip
    assert all(linear.optional for linear in stack.linears.values())
    found = describe(_Hybrid(), "odd", "model")
    assert [found.has(Site(layer, "attn.output")) for layer in range(3)] == [False, True, True]
    assert found.hidden_size == 4


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (_Odd("query", "value", stacks=2), "found 2 stacks of layers .stack0, stack1."),
        (nn.Linear(2, 2), "found 0 stacks"),
        (_Odd("alpha", "beta"), "no query and value projections in stack0.0, whose linear layers are alpha, beta"),
        (_Odd("query", "q", "value"), "which is taken"),
    ],
)
def test_what_cannot_be_inferred_is_refused_with_the_reason(model: nn.Module, reason: str) -> None:
    with pytest.raises(ArchitectureError, match=f"odd: .*{reason}.*register_architecture"):
        infer_row(model, "odd")


def test_a_model_that_does_not_fit_its_row_is_refused() -> None:
    with pytest.raises(ArchitectureError, match=r"bert encoder\.layer"):
        describe(_Odd("query", "value"), "bert", "bert")
