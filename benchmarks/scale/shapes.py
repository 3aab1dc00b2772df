"""Shapes of real models, and what a step of the polish computes and holds, counted on tensors that have shapes only."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import astuple, dataclass
from functools import cache

import peft
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from peft_graft.distill.token_targets import TOP, divergence, in_chunks
from peft_graft.models.loading import ModelHandle, blank_handle
from peft_graft.models.task_models import blank_model
from peft_graft.models.tasks import Task


@dataclass(frozen=True)
class Shape:
    """A model by its published sizes; ``parameters``: how many its publisher counts."""

    name: str
    parameters: int
    kind: type
    sizes: tuple[tuple[str, int | bool], ...]

    def config(self, layers: int | None = None) -> transformers.PretrainedConfig:
        """Its configuration, with another number of layers if one is given."""
        sizes = dict(self.sizes) | ({} if layers is None else {"num_hidden_layers": layers})
        return self.kind(**sizes)

    @property
    def layers(self) -> int:
        return dict(self.sizes)["num_hidden_layers"]

    @property
    def linear(self) -> tuple[str, ...]:
        """The roles of all its linear layers."""
        return ALL_LINEAR if self.speaks else tuple(role for role in ALL_LINEAR if role != "ffn.gate")

    @property
    def speaks(self) -> bool:
        """Whether it is a language model."""
        return self.kind is not transformers.BertConfig


def _shape(name, parameters, kind, hidden, inner, layers, heads, shared, vocabulary, **more):
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
             "num_attention_heads": heads, "vocab_size": vocabulary, **more}  # fmt: skip
    if shared:
        sizes |= {"num_key_value_heads": shared}
    return Shape(name, parameters, kind, tuple(sizes.items()))


_BERT, _LLAMA, _QWEN2, _QWEN3 = (
    transformers.BertConfig, transformers.LlamaConfig, transformers.Qwen2Config, transformers.Qwen3Config
)  # fmt: skip
SHAPES = {
    shape.name: shape
    for shape in (
        _shape("MiniLM-L6", 22_713_216, _BERT, 384, 1536, 6, 12, 0, 30_522),
        _shape("BERT-base", 109_482_240, _BERT, 768, 3072, 12, 12, 0, 30_522),
        _shape("Qwen2.5-0.5B", 494_032_768, _QWEN2, 896, 4864, 24, 14, 2, 151_936, tie_word_embeddings=True),
        _shape("Qwen2.5-1.5B", 1_543_714_304, _QWEN2, 1536, 8960, 28, 12, 2, 151_936, tie_word_embeddings=True),
        _shape("Qwen2.5-3B", 3_085_938_688, _QWEN2, 2048, 11_008, 36, 16, 2, 151_936, tie_word_embeddings=True),
        _shape("Llama-3.1-8B", 8_030_261_248, _LLAMA, 4096, 14_336, 32, 32, 8, 128_256),
        _shape("Qwen3-8B", 8_190_735_360, _QWEN3, 4096, 12_288, 36, 32, 8, 151_936, head_dim=128,
               tie_word_embeddings=False),
        _shape("Llama-3.1-70B", 70_553_706_496, _LLAMA, 8192, 28_672, 80, 64, 8, 128_256),
        _shape("Qwen2.5-72B", 72_706_203_648, _QWEN2, 8192, 29_568, 80, 64, 8, 152_064, tie_word_embeddings=False),
    )
}  # fmt: skip
GROWTH = ("MiniLM-L6", "BERT-base", "Qwen2.5-0.5B", "Qwen2.5-1.5B", "Qwen2.5-3B", "Llama-3.1-8B")
LARGE, MIDDLE = ("Llama-3.1-70B", "Qwen2.5-72B"), ("Llama-3.1-8B", "Qwen3-8B")
QUERY_VALUE = ("attn.query", "attn.value")
ALL_LINEAR = ("attn.query", "attn.key", "attn.value", "attn.output", "ffn.gate", "ffn.up", "ffn.down")


@cache
def described(shape: Shape) -> ModelHandle:
    """The model without values, in bfloat16, as ``inspect`` plans with it."""
    found = blank_handle(shape.config())
    found.base.to(torch.bfloat16)
    return found


def parameters_of(shape: Shape) -> tuple[int, int]:
    """Values of the base model, and of an output layer of its own, counted in models on the meta device."""
    base = sum(value.numel() for value in described(shape).base.parameters())
    whole = blank_model(shape.config(), Task.CAUSAL_LM if shape.speaks else Task.BASE)
    return base, sum(value.numel() for value in whole.parameters()) - base


# ---- one step, on shapes ---------------------------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """Floating-point operations of all that runs, and bytes of the memory that is held, now and at most."""

    def __init__(self, known: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.operations, self.now, self.most = 0, 0, 0
        self._known = [value.untyped_storage() for value in known]  # held, so that no other takes their place
        self._sizes = {storage._cdata: 0 for storage in self._known}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        found = operation(*args, **(kwargs or {}))
        name = str(operation)
        if "scaled_dot_product" in name:  # whole squares, though a causal one is half of them
            query, key = (args[1], args[2]) if "backward" in name else args[:2]
            self.operations += (10 if "backward" in name else 4) * query.numel() * key.shape[-2]
        elif count := flop_registry.get(operation._overloadpacket):
            self.operations += count(*args, **(kwargs or {}), out_val=found)
        for value in tree_leaves(found):
            if isinstance(value, torch.Tensor):
                self._hold(value.untyped_storage())
        return found

    def _hold(self, storage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.now += self._sizes[key]
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._let_go, key)

    def _let_go(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


@dataclass(frozen=True)
class Step:
    """One step of the polish: operations, and bytes.

    Attributes:
        lora, adapted: values of the LoRA, and of the matrices that it acts on.
        forward, loss, backward: operations, those of the loss with its gradient.
        activations: held for the backward pass. working: held beside them at the most.
        logits: held at the most for the loss, beside its output layer. state: gradients and moments of AdamW.
    """

    lora: float
    adapted: float
    forward: float
    loss: float
    backward: float
    activations: float
    working: float
    logits: float
    state: float


@dataclass(frozen=True)
class Batch:
    """What a step learns from: rows, tokens in each, how many of these are answers, and how it is computed."""

    rows: int
    length: int
    answer: int
    bf16: bool = True
    checkpointing: bool = False


def step(config, batch: Batch, *, rank: int, targets: str | Sequence[str]) -> Step:
    """What one step takes, on tensors without values; encoders look at theirs, and are small enough to have some."""
    speaks = not isinstance(config, transformers.BertConfig)
    auto = transformers.AutoModelForCausalLM if speaks else transformers.AutoModel
    with torch.device("meta"):
        model = auto.from_config(config, dtype=torch.bfloat16 if batch.bf16 else torch.float32)
        names = targets if isinstance(targets, str) else list(targets)
        task = "CAUSAL_LM" if speaks else "FEATURE_EXTRACTION"
        adapted = peft.get_peft_model(model, peft.LoraConfig(task_type=task, r=rank, target_modules=names))
    if batch.checkpointing:
        # There is no generator whose state could be kept for dropout.
        model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    with FakeTensorMode() if speaks else nullcontext():
        _give_values(adapted)
        return _run(adapted, model, batch, speaks=speaks)


def _give_values(model: torch.nn.Module) -> None:
    """Memory in place of every meta tensor, small random values in it."""
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        owner, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        filled = torch.zeros(value.shape, dtype=value.dtype)
        if isinstance(value, torch.nn.Parameter):
            filled = filled.normal_(0, 0.02).requires_grad_(value.requires_grad)
            setattr(owner, leaf, torch.nn.Parameter(filled, requires_grad=value.requires_grad))
        else:
            owner.register_buffer(leaf, filled, persistent=False)
    model.tie_weights()


def _run(adapted, model, batch: Batch, *, speaks: bool) -> Step:
    trained = [value for value in adapted.parameters() if value.requires_grad]
    matrices = [part.base_layer.weight.numel() for part in adapted.modules() if hasattr(part, "base_layer")]
    optimizer = torch.optim.AdamW(trained, foreach=False)
    base = model.model if speaks else model
    adapted.train()
    ids = torch.zeros(batch.rows, batch.length, dtype=torch.int64)
    mixed = torch.autocast("cpu", torch.bfloat16, enabled=batch.bf16)
    with Watch([*adapted.parameters(), *adapted.buffers(), ids]) as watch:
        with mixed:
            states = base(input_ids=ids, **({"use_cache": False} if speaks else {})).last_hidden_state
        forward, activations = watch.operations, watch.now
        loss, logits = (_loss if speaks else _sum)(model, states, batch, watch)
        watch.most = watch.now
        before = watch.operations
        loss.backward()
        backward, most = watch.operations - before, watch.most
        del states, loss
        optimizer.step()
        state = sum(value.grad.nbytes for value in trained)
        state += sum(part.nbytes for held in optimizer.state.values() for part in held.values() if part.ndim)
    return Step(
        lora=sum(value.numel() for value in trained),
        adapted=sum(matrices),
        forward=forward,
        loss=before - forward,
        backward=backward,
        activations=activations,
        working=max(0, most - activations),
        logits=logits,
        state=state,
    )


def _sum(model, states, batch: Batch, watch: Watch):
    return states.float().sum(), 0


def _loss(model, states, batch: Batch, watch: Watch):
    """The package's own divergence from a teacher at the places of answers, in its own chunks."""
    rows = states[:, -batch.answer :].flatten(0, 1)
    top, log_p = torch.zeros(len(rows), TOP, dtype=torch.int64), torch.full((len(rows), TOP), -9.0)
    output = model.get_output_embeddings().weight.detach()

    def of(some, part):
        return divergence(torch.nn.functional.linear(some.to(output.dtype), output).float(), top[part], log_p[part])

    watch.most = before = watch.now
    loss = in_chunks(rows, len(output), of, frozen=True)
    return loss, watch.most - before


@cache
def whole_step(shape: Shape, batch: Batch, rank: int, roles: tuple[str, ...]) -> Step:
    """A step of the whole model, from models of two and of three layers: a first layer has no gradient to pass on."""
    two, three = (step(shape.config(n), batch, rank=rank, targets=targets_of(shape, roles)) for n in (2, 3))
    return Step(*(a + (shape.layers - 2) * (b - a) for a, b in zip(astuple(two), astuple(three), strict=True)))


def targets_of(shape: Shape, roles: Sequence[str]) -> tuple[str, ...]:
    """What the layers of these roles are called, for peft."""
    linears = described(shape).architecture.row.linears
    return tuple(linears[role].path.rpartition(".")[2] if shape.speaks else linears[role].path for role in roles)
