"""What benchmarks/scale counts on shapes is what blank models have, and what a real transfer does and holds."""

from __future__ import annotations

import importlib
from collections import Counter
from pathlib import Path
from types import ModuleType

import peft
import pytest
import torch
import transformers
from torch.optim.optimizer import register_optimizer_step_post_hook

import peft_graft
import speech
from peft_graft.distill import token_targets
from peft_graft.models.task_models import blank_model
from peft_graft.models.tasks import Task

FOLDER = Path(__file__).parent.parent / "benchmarks" / "scale"


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("shapes")


@pytest.fixture
def costs(shapes: ModuleType) -> ModuleType:
    return importlib.import_module("costs")


@pytest.fixture
def run(costs: ModuleType) -> ModuleType:
    return importlib.import_module("run")


@pytest.fixture
def small(shapes: ModuleType):
    """A Llama of five layers that its publisher counts right."""
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 5, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 300}  # fmt: skip
    return shapes.Shape("small", 135_168, transformers.LlamaConfig, tuple(sizes.items()))


def test_counted_values_are_the_published_ones(shapes: ModuleType) -> None:
    page = (FOLDER.parent.parent / "docs" / "scale.md").read_text(encoding="utf-8")
    how = "run benchmarks/scale/run.py --markdown docs/scale.md"
    for shape in shapes.SHAPES.values():
        assert sum(shapes.parameters_of(shape)) == shape.parameters, shape.name
        assert f"| {shape.name} | {shape.parameters:,} |" in page, how


def test_a_lora_counted_in_few_layers_is_that_of_the_whole_model(shapes: ModuleType) -> None:
    shape = shapes.SHAPES["Llama-3.1-70B"]
    model = blank_model(shape.config(), Task.CAUSAL_LM)
    with torch.device("meta"):
        targets = list(shapes.targets_of(shape, shapes.QUERY_VALUE))
        whole = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=16, target_modules=targets))
    counted = shapes.whole_step(shape, shapes.Batch(1, 8, 4), 16, shapes.QUERY_VALUE)
    assert counted.lora == whole.get_nb_trainable_parameters()[0]


def test_layers_add_up(shapes: ModuleType, small) -> None:
    batch = shapes.Batch(8, 24, 8)
    found = vars(shapes.whole_step(small, batch, 2, shapes.QUERY_VALUE))
    targets = shapes.targets_of(small, shapes.QUERY_VALUE)
    for name, value in vars(shapes.step(small.config(), batch, rank=2, targets=targets)).items():
        assert found[name] == pytest.approx(value, rel=1e-6), name


class Watching:
    """Counts texts that models read, write and learn from, and bytes that a forward pass keeps for the backward one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.texts: Counter[str] = Counter()
        self.held: list[tuple[int, int, int, int]] = []
        plain = transformers.LlamaModel.forward

        def forward(model, *args, **kwargs):
            ids, kept = kwargs["input_ids"], {}
            who = "teacher" if model.config.num_hidden_layers == 2 else "student"
            if not torch.is_grad_enabled():
                written = kwargs.get("past_key_values") is not None
                self.texts["token" if ids.shape[1] == 1 else f"{who} writes" if written else f"{who} reads"] += len(ids)
                return plain(model, *args, **kwargs)
            self.texts["learned"] += len(ids)
            known = {value.untyped_storage().data_ptr() for value in model.parameters()}

            def keep(value: torch.Tensor) -> torch.Tensor:
                storage = value.untyped_storage()
                if storage.data_ptr() not in known:
                    kept[storage.data_ptr()] = storage.nbytes()
                return value

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
                found = plain(model, *args, **kwargs)
            trained = sum(value.numel() for value in model.parameters() if value.requires_grad)
            self.held.append((*ids.shape, sum(kept.values()), trained))
            return found

        monkeypatch.setattr(transformers.LlamaModel, "forward", forward)


def test_a_transfer_reads_and_holds_what_is_counted(shapes, costs, speakers, monkeypatch) -> None:
    states: list[int] = []
    handle = register_optimizer_step_post_hook(
        lambda optimizer, *_: states.append(
            sum(part.nbytes for held in optimizer.state.values() for part in held.values() if part.ndim)
        )
    )
    config = peft_graft.GraftConfig(format=speech.FORMAT, max_new_tokens=8, polish=40)
    text = [{"prompt": word} for word in speech.words(80, seed=3)]
    with monkeypatch.context() as patched:
        watching = Watching(patched)
        graft = peft_graft.transfer(speakers / "module", speakers / "stranger", text=text, config=config)
    handle.remove()
    asked = graft.report.prompts
    counted = costs.from_prompts(config.model_copy(update={"max_prompts": asked.prompts}), held=asked.judging)
    assert (asked.held_out, watching.texts["teacher writes"]) == (2 * asked.judging, counted[0].written)
    assert watching.texts["student writes"] == 2 * asked.judging
    # A text or two beside, by which it is seen that logits are made as is known.
    for who in ("teacher", "student"):
        assert 0 <= watching.texts[f"{who} reads"] - sum(getattr(stage, who) for stage in counted) <= 2, who
    learned = sum(stage.learned + stage.started for stage in counted)
    assert watching.texts["learned"] == learned
    # Memory, of the largest step, by the shapes of the same model.
    rows, length, kept, trained = max(watching.held, key=lambda found: found[2])
    student = transformers.AutoConfig.from_pretrained(speakers / "stranger")
    found = shapes.step(student, shapes.Batch(rows, length, 4, bf16=False), rank=4, targets="all-linear")
    assert found.lora == trained
    assert found.state - 4 * trained == max(states)
    assert kept == pytest.approx(found.activations, rel=0.1)


def test_logits_are_held_in_chunks(shapes: ModuleType, small, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_targets, "CHUNK_BYTES", 1 << 16)
    targets = shapes.targets_of(small, ["attn.query"])
    counted = shapes.step(small.config(1), shapes.Batch(16, 64, 60, bf16=False), rank=2, targets=targets).logits
    rows, weight = torch.randn(960, 48, requires_grad=True), torch.randn(300, 48)
    top, log_p = torch.zeros(960, 16, dtype=torch.int64), torch.full((960, 16), -9.0)

    def divergence(some: torch.Tensor, part: slice) -> torch.Tensor:
        return token_targets.divergence(some @ weight.T, top[part], log_p[part])

    with shapes.Watch([rows, weight, top, log_p]) as real:
        token_targets.in_chunks(rows, 300, divergence, frozen=True)
    assert counted == pytest.approx(real.most, rel=0.1)
    assert real.most < 960 * 300 * 4, "never all of them"


def test_more_gpus_take_less_time_and_memory(run, costs, small) -> None:
    rates, text = run.parsed([]), costs.Text(24, 8)
    pair = costs.Pair(small, small, run.QUERY_VALUE, 2)
    assert pair.alike
    stages = costs.from_prompts(peft_graft.GraftConfig(), alike=True)
    found = pair.costs(text, ["prune-align"], rates)
    one, spread, cut, processes = (
        sum(costs.seconds_of(stage, found, pair, text, costs.Way(name, 8), rates) for stage in stages)
        for name in ("alone", "spread", "cut", "processes")
    )
    assert cut == pytest.approx(one, rel=0.01), "starting the layers takes all the time, and is not shared"
    assert processes < one
    assert spread == pytest.approx(one)
    alone, over = (costs.memory_of(pair, text, 8, costs.Way(name, 8), rates) for name in ("alone", "spread"))
    assert all(over[name] <= alone[name] for name in alone)
    assert over["weights of the student"] == alone["weights of the student"] / 8
    assert run.minutes_of("small", pair, {"one": (costs.Way(), 8)}, rates, text).count("\n") == len(stages) + 3
