"""Layer maps, and what a plan checks before anything is computed."""

from __future__ import annotations

import copy

import peft
import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

import families
import tiny
from conftest import needs_adapters
from families import MORE_DECODERS
from peft_graft.alignment.methods import METHODS
from peft_graft.checkpoints.read import read_checkpoint
from peft_graft.checkpoints.resolve import resolve
from peft_graft.config import GraftConfig
from peft_graft.errors import ModelError, PlanError
from peft_graft.models.loading import describe_config, load_config
from peft_graft.models.spaces import Site
from peft_graft.planning.layers import layer_map
from peft_graft.planning.method_choice import choose_methods
from peft_graft.planning.sites import SitePlans, plan_sites
from peft_graft.planning.spaces import spaces_of_roles


def plan_transfer(checkpoint, teacher, student, *, method, layers="skip") -> SitePlans:
    return plan_sites(checkpoint, teacher, student, GraftConfig(layers=layers), method)


def test_skip_is_every_kth_layer() -> None:
    assert layer_map("skip", 12, 6) == ((0,), (2,), (4,), (6,), (8,), (10,))
    assert layer_map("skip", 12, 4) == ((0,), (3,), (6,), (9,))


def test_avg_is_every_window_whole() -> None:
    assert layer_map("avg", 12, 6) == tuple((2 * layer, 2 * layer + 1) for layer in range(6))


@given(st.integers(1, 48), st.integers(1, 48))
def test_windows_are_ordered_and_lose_no_layer(n: int, m: int) -> None:
    windows, starts = layer_map("avg", n, m), layer_map("skip", n, m)
    assert len(windows) == len(starts) == m
    assert all(window[0] == start[0] for window, start in zip(windows, starts, strict=True))
    flat = [layer for window in windows for layer in window]
    assert flat == sorted(flat)
    if n >= m:
        assert flat == list(range(n))
    else:
        assert set(flat) == set(range(n))


def test_an_explicit_map() -> None:
    assert layer_map("0,2,3", 4, 3) == ((0,), (2,), (3,))


@pytest.mark.parametrize(
    ("spec", "message"),
    [("0,1", "3 numbers"), ("0,1,9", "expected 0 to 3, found 9"), ("middle", "skip, avg, or numbers")],
)
def test_bad_maps_say_what_is_expected(spec: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        layer_map(spec, 4, 3)


@pytest.fixture
def parts(world):
    teacher = describe_config(load_config(str(world / "teacher")))
    return resolve(read_checkpoint(world / "lora"), teacher), teacher


def test_a_plan_names_sites_and_pairs_of_spaces(world, parts) -> None:
    checkpoint, teacher = parts
    student = describe_config(load_config(str(world / "narrow")))
    plan = plan_transfer(checkpoint, teacher, student, method=METHODS["prune-align"])
    assert [(site.student, site.teacher) for site in plan.sites] == [
        (Site(0, "attn.query"), (Site(0, "attn.query"),)),
        (Site(0, "attn.value"), (Site(0, "attn.value"),)),
        (Site(1, "attn.query"), (Site(2, "attn.query"),)),
        (Site(1, "attn.value"), (Site(2, "attn.value"),)),
    ]
    # query and value read one tensor, so three spaces a layer, and the head's
    assert len(plan.pairs) == 2 * 3 + 1
    assert set(plan.pairs.values()) == {(32, 24)}
    assert plan.head
    assert any("left out" in note for note in plan.notes)


def test_layers_without_modules_are_no_sites(world, parts, tmp_path) -> None:
    _, teacher = parts
    tiny.peft_lora(tmp_path / "m", world / "teacher", layers_to_transform=[1, 3])
    checkpoint = resolve(read_checkpoint(tmp_path / "m"), teacher)
    assert checkpoint.layers == (1, 3)
    shallow = describe_config(load_config(str(world / "shallow")))
    with pytest.raises(PlanError, match="no student layer would receive a module.*layers 1, 3"):
        plan_transfer(checkpoint, teacher, shallow, method=METHODS["copy"])
    plan = plan_transfer(checkpoint, teacher, shallow, layers="avg", method=METHODS["copy"])
    assert [site.teacher for site in plan.sites][::2] == [(Site(1, "attn.query"),), (Site(3, "attn.query"),)]


@needs_adapters
def test_modules_of_other_ranks_are_averaged_nowhere(world, tmp_path) -> None:
    model = transformers.AutoModelForTokenClassification.from_pretrained(world / "teacher")
    config = peft.LoraConfig(
        task_type="TOKEN_CLS", r=4, target_modules=["query"], rank_pattern={"layer.1.attention.self.query": 2}
    )
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "module")

    def refused(layers: str) -> str | None:
        return tiny.inspect(tmp_path / "module", world / "shallow", layers=layers).student.problem

    assert refused("skip") is None
    assert (
        "modules of different rank or bottleneck cannot be averaged; found layer 0 attn.query: 4, layer 1 attn.query: 2"
        in (refused("avg") or "")
    )


def test_a_site_without_counterpart_is_refused(world) -> None:
    teacher = describe_config(load_config(str(world / "teacher")))
    checkpoint = resolve(read_checkpoint(world / "pfeiffer"), teacher)
    mpnet = describe_config(tiny.config("mpnet"))
    with pytest.raises(PlanError, match=r"layer 0 ffn\.adapter: the student has no counterpart.*attn\.query"):
        plan_transfer(checkpoint, teacher, mpnet, method=METHODS["prune-align"])


def test_modules_for_which_the_students_layer_has_no_place_are_counted() -> None:
    """LFM2 attends in some layers alone."""
    first, second = (copy.deepcopy(MORE_DECODERS["lfm2"]) for _ in range(2))
    second.layer_types = ["full_attention", "conv", "full_attention"]
    models = [transformers.AutoModel.from_config(config) for config in (first, second)]
    adapted = peft.get_peft_model(models[0], peft.LoraConfig(target_modules=["q_proj", "v_proj", "w1"]))
    found = tiny.inspect(adapted, models[1], method="copy").student
    assert found.modules == 3
    assert found.notes == ["2 modules are left out, for the student's layers there have no attn.query, attn.value"]


def test_the_published_shortcut_needs_input_and_output_of_one_size(world, tmp_path) -> None:
    tiny.peft_lora(tmp_path / "m", world / "teacher", targets=["intermediate.dense"])
    teacher = describe_config(load_config(str(world / "teacher")))
    checkpoint = resolve(read_checkpoint(tmp_path / "m"), teacher)
    with pytest.raises(PlanError, match="input, which here differ"):
        plan_transfer(checkpoint, teacher, teacher, method=METHODS["prune-align-published"])


def test_a_module_of_another_base_is_refused_by_shape(world) -> None:
    other = describe_config(tiny.config("bert", hidden=40))
    with pytest.raises(ModelError, match=r"layer 0 attn\.query: the teacher is not the base.*expected 40.*found 32"):
        resolve(read_checkpoint(world / "lora"), other)
    shallow = describe_config(load_config(str(world / "shallow")))
    with pytest.raises(ModelError, match="layer 2 .*no such layer"):
        resolve(read_checkpoint(world / "lora"), shallow)


def test_the_default_method_depends_on_sizes_and_embeddings(world, parts) -> None:
    checkpoint, teacher = parts

    def chosen(plan, similarity, *, has_text=False):
        found = choose_methods(GraftConfig(), plan, None, has_text=has_text, similarity=similarity)
        return [method.name for method in found.methods], found.reason

    same = plan_transfer(checkpoint, teacher, teacher, method=METHODS["copy"])
    assert chosen(same, 0.97)[0] == ["copy"]
    assert chosen(same, 0.02)[0] == ["prune-align"]
    assert chosen(same, None)[0] == ["prune-align"]
    others = ["prune-align", "procrustes", "ridge", "functional"]
    assert chosen(same, 0.97, has_text=True)[0] == ["copy", *others]
    assert chosen(same, 0.02, has_text=True)[0] == others
    narrow = describe_config(load_config(str(world / "narrow")))
    methods, reason = chosen(plan_transfer(checkpoint, teacher, narrow, method=METHODS["copy"]), 1.0)
    assert methods == ["prune-align"]
    assert "32" in reason


def test_aligning_covers_what_any_module_may_need(world, parts) -> None:
    checkpoint, teacher = parts
    narrow = describe_config(load_config(str(world / "narrow")))
    for layers in ("skip", "avg"):
        every = spaces_of_roles(teacher, narrow, layers=layers)
        needed = plan_transfer(checkpoint, teacher, narrow, layers=layers, method=METHODS["prune-align"])
        assert needed.pairs.items() <= every.items()
    few = spaces_of_roles(teacher, narrow, roles=["attn.query"])
    assert {pair[0].name for pair in few} == {"attn.in", "attn.query.out", "tokens.out", "first.out"}
    with pytest.raises(PlanError, match=r"ffn\.gate: the models do not share this role"):
        spaces_of_roles(teacher, narrow, roles=["ffn.gate"])


def test_a_kind_that_is_converted_has_parameters_too(world, tmp_path) -> None:
    model = peft.get_peft_model(tiny.task_model(world / "teacher"), peft.LoHaConfig(r=2, target_modules=["query"]))
    model.save_pretrained(tmp_path / "loha")
    saved = peft.get_peft_model_state_dict(model)
    found = tiny.inspect(tmp_path / "loha")
    assert found.parameters == sum(value.numel() for value in saved.values())


def test_a_module_that_generates_is_not_planned_onto_an_encoder_without_a_word(world, tmp_path) -> None:
    base = families.llama(tmp_path / "base", hidden_size=32, intermediate_size=48)
    families.trained(tmp_path / "module", base, ["q_proj", "v_proj"], "CAUSAL_LM", "AutoModelForCausalLM")
    found = tiny.inspect(tmp_path / "module", world / "shallow").student
    assert found.problem is None
    assert found.notes[-1] == (
        "the module was trained to generate text, and a bert model is an encoder, which does not: what moves is what "
        "it does to the layers"
    )
    assert tiny.inspect(tmp_path / "module", base).student.notes == []
    refused = tiny.inspect(tmp_path / "module", world / "narrow").student.problem
    assert refused.startswith(f"{world / 'narrow'}: transformers {transformers.__version__} has no causal-lm model")
    with pytest.raises(ModelError) as error:
        tiny.transfer(tmp_path / "module", world / "narrow", method="copy")
    assert str(error.value).startswith(refused[:40])


@needs_adapters
def test_a_student_that_the_library_adapters_does_not_know_is_refused_in_the_plan(world, tmp_path) -> None:
    base = families.llama(tmp_path / "base", hidden_size=32, intermediate_size=48)
    stranger = tiny.saved(tmp_path / "stranger", families.DECODERS["olmo2"])
    families.trained(tmp_path / "module", base, ["q_proj", "v_proj"], "CAUSAL_LM", "AutoModelForCausalLM")
    found = tiny.inspect(tmp_path / "module", stranger, library="adapters", method="copy").student
    assert found.problem == (
        f"{stranger}: the library adapters has no model class for olmo2. Fix: choose a student of a family that it "
        "has, or write a LoRA for peft with --library peft"
    )
