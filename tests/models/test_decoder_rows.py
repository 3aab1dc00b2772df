"""The laws of a row, for decoders that no transfer is tried on: what it says of every layer is what the model does."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import transformers

import tiny
from families import MORE_DECODERS
from peft_graft.checkpoints.live import read_live
from peft_graft.checkpoints.resolve import resolve, to_raw
from peft_graft.models.loading import wrap_model
from peft_graft.models.sizes import linear_shape
from permutation import permuted

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # GPT-BigCode scripts its attention


def bare(family: str) -> transformers.PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return tiny.lively(transformers.AutoModel.from_config(copy.deepcopy(MORE_DECODERS[family])))


def state(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.randint(10, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return model(input_ids=ids).last_hidden_state


@pytest.mark.parametrize("family", MORE_DECODERS)
def test_units_in_another_order_compute_the_same(family: str) -> None:
    """Which holds only if the row is right about what every layer reads and writes."""
    model = bare(family)
    assert not wrap_model(model).architecture.inferred
    other, stream = permuted(model)
    expected = state(model)[..., stream]
    assert not torch.equal(state(model), expected)
    torch.testing.assert_close(state(other), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", MORE_DECODERS)
def test_a_lora_on_every_layer_with_a_role_returns_as_it_was(family: str) -> None:
    model = bare(family)
    targets = [path for path, module in model.named_modules() if linear_shape(module)]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets))
    tiny.randomise(adapted, 1, ("lora_",))
    raw, base = read_live(adapted)
    architecture = wrap_model(base).architecture
    found = resolve(raw, architecture)
    assert {path.split(".", 2)[2] for path in found.left_out} <= {"conv.in_proj", "conv.out_proj"}
    parts = to_raw(found, architecture).parts
    assert parts == {path: part for path, part in raw.parts.items() if path not in found.left_out}
