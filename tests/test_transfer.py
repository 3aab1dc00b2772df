"""Transfers between tiny models of all families: what is written loads, acts, and says what it is."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from peft import AutoPeftModelForTokenClassification, PeftModel
from safetensors.torch import load_file

import tiny
from conftest import needs_adapters
from families import DECODERS, ENCODERS
from peft_graft.alignment.text import read_text
from peft_graft.checkpoints.read import read_checkpoint
from peft_graft.checkpoints.resolve import resolve
from peft_graft.errors import CheckpointError
from peft_graft.models.loading import describe_config, load_config
from peft_graft.models.spaces import Site
from peft_graft.modules.lora import LoraModule
from peft_graft.report import GraftReport


@pytest.fixture(scope="module")
def asked_text(tmp_path_factory) -> Path:
    """As little text as the teacher is asked by."""
    path = tmp_path_factory.mktemp("asked-text") / "text.txt"
    path.write_text("\n".join(tiny.sentences(70)))
    return path


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("shape", [{"layers": 2, "hidden": 24}, {"layers": 5, "hidden": 48}])
def test_a_bert_lora_moves_to_every_family(world, short_text, tmp_path, family: str, shape) -> None:
    student = tiny.base_model(tmp_path / "student", family, seed=8, tokens="unigram", **shape)
    graft = tiny.transfer(
        world / "lora", student=student, out=tmp_path / "graft", text=short_text, method="prune-align", head="carry"
    )
    assert graft.report.verification is not None
    assert graft.report.verification.output_change > 0
    assert len(graft.checkpoint.modules) == 2 * shape["layers"]
    bare = tiny.task_model(student)
    model = PeftModel.from_pretrained(copy.deepcopy(bare), tmp_path / "graft")
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == 2 * shape["layers"]
    assert model.peft_config["default"].r == 4
    # native: trains on from here
    model = PeftModel.from_pretrained(bare, tmp_path / "graft", is_trainable=True)
    assert any(parameter.requires_grad for parameter in model.parameters())


@needs_adapters
@pytest.mark.parametrize("family", ["roberta", "xlm-roberta", "distilbert", "electra"])
@pytest.mark.parametrize("settings", ["seq_bn", "double_seq_bn", "par_bn", "lora", "ia3", "prefix_tuning"])
def test_adapterhub_modules_move_to_every_family_of_the_library(
    world, short_text, asked_text, tmp_path, family: str, settings: str
) -> None:
    from adapters import AutoAdapterModel

    tiny.adapterhub_module(tmp_path / "module", world / "teacher", settings)
    student = tiny.base_model(tmp_path / "student", family, seed=8, layers=3, hidden=24, tokens="unigram")
    # Which the library is does not change with the method, nor with the head's values.
    by_default = {"text": asked_text, "polish": 3}
    options = by_default if family == "roberta" else {"text": short_text, "method": "prune-align", "head": "carry"}
    graft = tiny.transfer(tmp_path / "module", student=student, out=tmp_path / "graft", **options)
    assert graft.report.verification.done
    model = AutoAdapterModel.from_pretrained(student)
    info: dict = {}
    model.load_adapter(str(tmp_path / "graft"), loading_info=info, set_active=True)
    assert info["missing_keys"] == info["unexpected_keys"] == []
    assert model.heads["skill"].config["label2id"] == {label: i for i, label in enumerate(tiny.LABELS)}
    width = graft.checkpoint.modules[min(graft.checkpoint.modules)].width
    assert width == {"lora": 8, "ia3": 1, "par_bn": 16, "prefix_tuning": 30}.get(settings, 2)


def test_the_published_shortcut_differs_only_in_the_output_rows(world, short_text, tmp_path) -> None:
    def graft(method: str):
        return tiny.transfer(world / "lora", student=world / "narrow", text=short_text, method=method)

    own, shared = graft("prune-align"), graft("prune-align-published")
    for site, module in own.checkpoint.modules.items():
        other = shared.checkpoint.modules[site]
        assert torch.equal(module.tensors["A"].values, other.tensors["A"].values)
        assert not torch.equal(module.tensors["B"].values, other.tensors["B"].values)
    teacher = tiny.transfer(world / "lora", student=world / "teacher").checkpoint.modules[Site(0, "attn.value")]
    space_map = next(m for pair, m in shared.alignment.maps.items() if pair[1].key == "0/attn.in")
    expected = space_map.apply(teacher.tensors["B"].values, 0, "write")
    assert torch.equal(shared.checkpoint.modules[Site(0, "attn.value")].tensors["B"].values, expected)


def test_avg_is_the_true_mean_of_every_window(world) -> None:
    graft = tiny.transfer(world / "lora", student=world / "shallow", layers="avg", method="copy")
    source = resolve(read_checkpoint(world / "lora"), describe_config(load_config(str(world / "teacher"))))
    for layer in range(2):
        for role in ("attn.query", "attn.value"):
            pair = [source.modules[Site(2 * layer + offset, role)] for offset in range(2)]
            for name in ("A", "B"):
                mean = (pair[0].tensors[name].values + pair[1].tensors[name].values) / 2
                torch.testing.assert_close(graft.checkpoint.modules[Site(layer, role)].tensors[name].values, mean)


def test_avg_of_modules_with_other_scaling_expresses_them_alike(world, tmp_path) -> None:
    tiny.peft_lora(tmp_path / "m", world / "teacher", alpha_pattern={"layer.1.attention.self.query": 2})
    graft = tiny.transfer(tmp_path / "m", student=world / "shallow", layers="avg", method="copy")
    source = resolve(read_checkpoint(tmp_path / "m"), describe_config(load_config(str(world / "teacher"))))
    first, second = (source.modules[Site(layer, "attn.query")] for layer in (0, 1))
    assert isinstance(first, LoraModule)
    assert isinstance(second, LoraModule)
    assert (first.scaling, second.scaling) == (2.0, 0.5)
    module = graft.checkpoint.modules[Site(0, "attn.query")]
    assert isinstance(module, LoraModule)
    assert module.scaling == 2.0
    torch.testing.assert_close(
        module.tensors["B"].values, (first.tensors["B"].values + second.tensors["B"].values / 4) / 2
    )


@pytest.mark.parametrize(
    "options",
    [
        {"rank_pattern": {"layer.0.attention.self.query": 2}, "alpha_pattern": {"value": 16}},
        {"use_rslora": True, "r": 6, "lora_alpha": 7},
        {"layers_to_transform": [0, 2]},
        {"targets": r".*layer\.[02]\.attention\.(self\.query|output\.dense)"},
    ],
    ids=["patterns", "rslora", "layers_to_transform", "regex"],
)
def test_peft_options_survive(world, tmp_path, options) -> None:
    """Ranks, scaling and targets as the teacher had them: the update of every site is the teacher's."""
    teacher = tiny.peft_lora(tmp_path / "module", world / "teacher", **options)
    tiny.transfer(tmp_path / "module", student=world / "teacher", out=tmp_path / "graft")
    moved = PeftModel.from_pretrained(tiny.task_model(world / "teacher"), tmp_path / "graft").eval()

    def deltas(model):
        return {
            name: module.get_delta_weight("default")
            for name, module in model.named_modules()
            if isinstance(module, peft.tuners.lora.Linear)
        }

    expected, found = deltas(teacher), deltas(moved)
    assert expected.keys() == found.keys()
    for name, delta in expected.items():
        torch.testing.assert_close(found[name], delta)


@pytest.fixture(scope="module")
def narrowed(world, tmp_path_factory):
    """A graft by the default, written."""
    place = tmp_path_factory.mktemp("narrowed")
    (place / "text.txt").write_text("\n".join(tiny.sentences(100)))
    return tiny.transfer(world / "lora", student=world / "narrow", out=place / "g", text=place / "text.txt")


def test_target_modules_are_written_as_a_person_would(world, narrowed) -> None:
    config = json.loads((narrowed.folder / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_lin", "v_lin"]
    assert config["base_model_name_or_path"] == str(world / "narrow")
    assert config["modules_to_save"] == ["classifier"]


def test_label_names_come_along(world, tmp_path) -> None:
    """peft stores no label names: they come from the teacher's configuration, or from config.json beside the module."""
    tiny.task_model(world / "teacher").save_pretrained(tmp_path / "named")
    graft = tiny.transfer(
        world / "lora", teacher=tmp_path / "named", student=world / "shallow", method="copy", out=tmp_path / "g"
    )
    assert graft.checkpoint.head.labels == tiny.LABELS
    again = tiny.transfer(tmp_path / "g", student=world / "shallow")
    assert again.checkpoint.head.labels == tiny.LABELS
    card = (tmp_path / "g" / "README.md").read_text()
    assert "B-PER" in card
    model = AutoPeftModelForTokenClassification.from_pretrained(tmp_path / "g", num_labels=len(tiny.LABELS))
    assert model.base_model.model.classifier.modules_to_save["default"].weight.shape == (5, 32)


def test_a_dropped_head_leaves_an_untrained_one_that_peft_can_load(world, tmp_path) -> None:
    graft = tiny.transfer(world / "lora", student=world / "shallow", method="copy", head="drop", out=tmp_path / "g")
    assert graft.report.head is None
    assert any("untrained head stands in" in note for note in graft.report.notes)
    written = load_file(tmp_path / "g" / "adapter_model.safetensors")
    assert written["base_model.model.classifier.weight"].shape == (5, 32)
    trained = load_file(world / "lora" / "adapter_model.safetensors")
    assert not torch.equal(written["base_model.model.classifier.weight"], trained["base_model.model.classifier.weight"])
    PeftModel.from_pretrained(tiny.task_model(world / "shallow"), tmp_path / "g")


@needs_adapters
def test_an_adapterhub_head_can_be_dropped(world, tmp_path) -> None:
    tiny.transfer(world / "pfeiffer", student=world / "shallow", method="copy", head="drop", out=tmp_path / "g")
    assert not (tmp_path / "g" / "head_config.json").exists()


def test_a_module_on_a_bare_model(world, short_text, tmp_path) -> None:
    tiny.peft_lora(tmp_path / "m", world / "teacher", task="base")
    options = {"text": short_text, "method": "prune-align"}
    tiny.transfer(tmp_path / "m", student=world / "narrow", out=tmp_path / "g", **options)
    keys = load_file(tmp_path / "g" / "adapter_model.safetensors")
    assert all(key.startswith("base_model.model.transformer.layer.") for key in keys)
    PeftModel.from_pretrained(transformers.AutoModel.from_pretrained(world / "narrow"), tmp_path / "g")


def test_a_question_answerer_without_its_head(world, asked_text, tmp_path) -> None:
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(world / "teacher")
    config = peft.LoraConfig(task_type="QUESTION_ANS", r=4, target_modules=["query", "value"])
    adapted = peft.get_peft_model(model, config)
    tiny.randomise(adapted, 1, ("lora_",))
    adapted.save_pretrained(tmp_path / "m")
    graft = tiny.transfer(
        tmp_path / "m", student=world / "narrow", text=asked_text, out=tmp_path / "g", head="drop", polish=4,
    )  # fmt: skip
    assert graft.report.verification.done


def test_a_wider_head_of_two_layers_computes_the_same_logits(world, asked_text, tmp_path) -> None:
    """A RoBERTa sentence head has an inner layer of hidden size; a wider student pads it with units that do nothing."""
    base = tiny.base_model(tmp_path / "base", "roberta", layers=2, hidden=24)
    tiny.peft_lora(tmp_path / "m", base, task="sequence-classification", labels=("a", "b", "c"))
    options = {"text": asked_text, "method": "prune-align"}
    wide = tiny.transfer(tmp_path / "m", student=world / "wide", out=tmp_path / "g", **options)
    head = wide.checkpoint.head
    assert head.tensors["dense.weight"].values.shape == (48, 48)
    assert not head.tensors["dense.weight"].values[24:].any()
    assert wide.report.head.dropped_inner_units == 0
    narrow = tiny.base_model(tmp_path / "narrow", "roberta", layers=2, hidden=16)
    small = tiny.transfer(tmp_path / "m", student=narrow, out=tmp_path / "s", **options)
    assert small.report.head.dropped_inner_units == 8


def test_a_bert_sentence_head_becomes_a_roberta_one(world, asked_text, tmp_path) -> None:
    tiny.peft_lora(tmp_path / "m", world / "teacher", task="sequence-classification", labels=("a", "b", "c"))
    graft = tiny.transfer(
        tmp_path / "m", student=world / "wide", text=asked_text, method="prune-align", out=tmp_path / "g"
    )
    assert graft.checkpoint.head.activation == "tanh"
    keys = load_file(tmp_path / "g" / "adapter_model.safetensors")
    assert keys["base_model.model.classifier.dense.weight"].shape == (48, 48)


@needs_adapters
def test_an_alignment_serves_every_module_of_its_pair(world, short_text, tmp_path) -> None:
    alignment = tiny.align(
        world / "teacher", world / "narrow", text=short_text, out=tmp_path / "alignment", layers="avg"
    )
    for module in ("lora", "pfeiffer"):
        reused = tiny.transfer(world / module, student=world / "narrow", alignment=tmp_path / "alignment")
        live = tiny.transfer(world / module, student=world / "narrow", alignment=alignment)
        assert reused.report.method_reason == "the method of the given alignment"
        for site, found in live.checkpoint.modules.items():
            for name, tensor in found.tensors.items():
                assert torch.equal(tensor.values, reused.checkpoint.modules[site].tensors[name].values)


def test_live_objects_give_the_same_graft(world, short_text) -> None:
    by_name = tiny.transfer(
        world / "lora", student=world / "narrow", text=short_text, method="prune-align", head="carry"
    )
    models = [transformers.AutoModel.from_pretrained(world / name) for name in ("teacher", "narrow")]
    tokenizers = [transformers.AutoTokenizer.from_pretrained(world / name) for name in ("teacher", "narrow")]
    live = tiny.transfer_live(
        world / "lora",
        *models,
        teacher_tokenizer=tokenizers[0],
        student_tokenizer=tokenizers[1],
        text=list(read_text(short_text)),  # in the same order
        method="prune-align",
        head="carry",
    )
    for site, module in by_name.checkpoint.modules.items():
        assert torch.equal(module.tensors["A"].values, live.checkpoint.modules[site].tensors["A"].values)


def test_a_live_graft_can_be_saved_later(world, tmp_path) -> None:
    models = [transformers.AutoModel.from_pretrained(world / name) for name in ("teacher", "shallow")]
    graft = tiny.transfer_live(world / "lora", *models, method="copy")
    assert graft.folder is None
    saved = graft.save_pretrained(tmp_path / "g")
    assert saved.folder == tmp_path / "g"
    assert saved.report.verification.done


def test_the_report_round_trips_and_names_its_inputs(world, narrowed) -> None:
    report = GraftReport.model_validate_json((narrowed.folder / "graft.json").read_text())
    assert report == narrowed.report
    assert report.module_files["adapter_model.safetensors"] == _sha256(world / "lora" / "adapter_model.safetensors")
    assert report.pairing.samples == 80  # a fifth judges
    assert report.pairing.one_to_one > 0
    assert report.layers == [[0], [2]]
    assert report.versions["torch"] == torch.__version__


def test_sampling_depends_on_the_seed_only(world, tmp_path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(tiny.sentences(150)))

    def maps(seed: int):
        graft = tiny.transfer(
            world / "lora",
            student=world / "narrow",
            text=text,
            max_tokens=500,
            seed=seed,
            method="prune-align",
            head="carry",
        )
        return [m.indices.tolist() for m in graft.alignment.maps.values()]

    assert maps(1) == maps(1)
    assert maps(1) != maps(2)


@needs_adapters
def test_legacy_bin_files_and_safetensors_of_both_libraries(world, tmp_path) -> None:
    raw = read_checkpoint(world / "lora")
    legacy = tmp_path / "legacy"
    legacy.mkdir()
    (legacy / "adapter_config.json").write_text((world / "lora" / "adapter_config.json").read_text())
    torch.save(load_file(world / "lora" / "adapter_model.safetensors"), legacy / "adapter_model.bin")
    again = read_checkpoint(legacy)
    assert again.parts == raw.parts
    model = tiny.adapterhub_module(tmp_path / "bin", world / "teacher")
    model.save_adapter(str(tmp_path / "safe"), "skill", use_safetensors=True)
    assert (tmp_path / "safe" / "adapter.safetensors").exists()
    graft = tiny.transfer(tmp_path / "safe", student=world / "shallow", method="copy", out=tmp_path / "g")
    assert (tmp_path / "g" / "adapter.safetensors").exists()
    assert (tmp_path / "g" / "model_head.safetensors").exists()
    assert graft.report.verification.done


@needs_adapters
def test_static_heads_and_bare_models_of_adapterhub(world, short_text, tmp_path) -> None:
    import adapters

    for task in ("base", "token-classification"):
        model = tiny.task_model(world / "teacher", task)
        adapters.init(model)
        model.add_adapter("x", config="seq_bn")
        tiny.randomise(model, 3, ["adapters.x", "classifier"])
        model.save_adapter(str(tmp_path / task), "x")
        graft = tiny.transfer(
            tmp_path / task,
            student=world / "narrow",
            text=short_text,
            method="prune-align",
            out=tmp_path / f"{task}-graft",
        )
        assert graft.report.verification.done
        assert (graft.checkpoint.head is not None) == (task != "base")


@needs_adapters
def test_bottleneck_parts_beside_the_projections(world, short_text, tmp_path) -> None:
    """Norms, gates and learned scaling of an adapter move along their axes; bottlenecks may differ by layer."""
    import adapters

    settings = adapters.SeqBnConfig(
        ln_before=True, ln_after=True, use_gating=True, scaling="channel", reduction_factor={"1": 4, "default": 8}
    )
    tiny.adapterhub_module(tmp_path / "m", world / "teacher", settings)
    graft = tiny.transfer(
        tmp_path / "m", student=world / "narrow", text=short_text, method="prune-align", out=tmp_path / "g"
    )
    module = graft.checkpoint.modules[Site(0, "ffn.adapter")]
    assert module.tensors["scaling"].values.shape == (24,)
    assert module.tensors["gate.weight"].values.shape == (1, 24)
    assert graft.report.verification.done
    tiny.transfer(tmp_path / "m", student=world / "shallow", layers="0,1", method="copy", out=tmp_path / "c")
    config = json.loads((tmp_path / "c" / "adapter_config.json").read_text())
    assert sorted(config["config"]["reduction_factor"].values()) == [4, 8]


@needs_adapters
@pytest.mark.parametrize("settings", ["double_seq_bn", "par_bn"])
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("family", ["llama", "gpt2", "albert", "deberta-v2"])
def test_bottleneck_adapters_move_to_layers_of_another_make(
    world, short_text, tmp_path, family: str, settings: str
) -> None:
    """What a BERT's adapter reads after a norm, one of a Llama reads before it: each in its own space."""
    tiny.adapterhub_module(tmp_path / "m", world / "teacher", settings, head=None)
    config = (DECODERS | ENCODERS)[family]
    student = tiny.saved(tmp_path / "student", config)
    graft = tiny.transfer(tmp_path / "m", student=student, method="prune-align", text=short_text, out=tmp_path / "g")
    assert graft.report.verification.done
    spaces = {record.space for site in graft.report.sites for record in site.maps}
    assert "layer 0 attn.stream" in spaces if settings == "par_bn" else "layer 0 ffn.down.out" in spaces


@needs_adapters
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"shared_phm_rule": False, "factorized_phm_rule": True, "phm_rank": 2},
        {"shared_W_phm": True, "factorized_phm_rule": True},
        {"factorized_phm_W": False, "phm_bias": False, "mh_adapter": False},
    ],
)
def test_a_compacter_becomes_the_bottleneck_that_computes_the_same(world, tmp_path, changes) -> None:
    import adapters

    settings = adapters.CompacterConfig(phm_dim=2, reduction_factor=8, **changes)
    teacher = tiny.adapterhub_module(tmp_path / "m", world / "teacher", settings)
    graft = tiny.transfer(tmp_path / "m", student=world / "teacher", method="copy", out=tmp_path / "g")
    assert graft.report.verification.done
    assert_same_logits(teacher, world / "teacher", tmp_path / "g")


def assert_same_logits(teacher, base: Path, folder: Path):
    """An AdapterHub module on ``base`` computes what ``teacher`` does; the model with it, a batch and its logits."""
    from adapters import AutoAdapterModel

    student = AutoAdapterModel.from_pretrained(base)
    student.set_active_adapters(student.load_adapter(str(folder)))
    batch = transformers.AutoTokenizer.from_pretrained(base)(tiny.sentences(4), return_tensors="pt", padding=True)
    with torch.inference_mode():
        expected = teacher(**batch).logits
        torch.testing.assert_close(student.eval()(**batch).logits, expected, rtol=0, atol=1e-5)
    return student, batch, expected


@needs_adapters
@pytest.mark.parametrize("flat", [True, False])
def test_a_prefix_that_some_layers_lack(world, tmp_path, flat: bool) -> None:
    """On its own model the same, as vectors instead of a network; on a shallower one in the layers that it comes to."""
    import adapters

    settings = adapters.PrefixTuningConfig(prefix_length=4, bottleneck_size=8, flat=flat, leave_out=[1])
    teacher = tiny.adapterhub_module(tmp_path / "m", world / "teacher", settings)
    graft = tiny.transfer(tmp_path / "m", student=world / "teacher", method="copy", out=tmp_path / "g")
    assert [site.layer for site in graft.checkpoint.modules] == [0, 2, 3]
    student, batch, expected = assert_same_logits(teacher, world / "teacher", tmp_path / "g")
    student.set_active_adapters(None)
    with torch.inference_mode():
        assert (student(**batch, head="skill").logits - expected).abs().max() > 0.01
    written, original = ((tmp_path / name / "pytorch_adapter.bin").stat().st_size for name in ("g", "m"))
    assert written < 1.5 * original, "one tensor, whatever the number of its names"
    graft = tiny.transfer(tmp_path / "m", student=world / "shallow", layers="1,2", out=tmp_path / "s")
    assert [site.layer for site in graft.checkpoint.modules] == [1]
    config = json.loads((tmp_path / "s" / "adapter_config.json").read_text())["config"]
    assert (config["flat"], config["prefix_length"], config["leave_out"]) == (True, 4, [0])


@needs_adapters
def test_a_prefix_that_cannot_be_read_says_why(world, tmp_path) -> None:
    import adapters

    folder = tmp_path / "m"
    settings = adapters.PrefixTuningConfig(prefix_length=4, flat=True)
    tiny.adapterhub_module(folder, world / "teacher", settings, head=None)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["config"]["prefix_length"] = 5
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="another size.*expected 5 keys and values for each of 4 layers"):
        read_checkpoint(folder)
    del config["config"]["prefix_length"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="another size.*expected 0 keys"):
        read_checkpoint(folder)
    tensors = torch.load(folder / "pytorch_adapter.bin", weights_only=True)
    torch.save({f"{key}.part": value for key, value in tensors.items()}, folder / "pytorch_adapter.bin")
    with pytest.raises(CheckpointError, match="the prefix lacks control_trans"):
        read_checkpoint(folder)
    tiny.adapterhub_module(
        tmp_path / "n", world / "teacher", adapters.PrefixTuningConfig(prefix_length=4, bottleneck_size=8), head=None
    )
    path = tmp_path / "n" / "adapter_config.json"
    path.write_text(path.read_text().replace('"tanh"', '"wave"'))
    with pytest.raises(CheckpointError, match="activation is unknown.*found wave"):
        read_checkpoint(tmp_path / "n")


def test_a_decoder_without_a_row_by_inference(asked_text, tmp_path) -> None:
    """Grouped-query Helium, roles inferred from the module tree: identity exactly, and onto another size."""
    for name, hidden, layers in (("teacher", 32, 4), ("student", 24, 2)):
        config = transformers.HeliumConfig(
            vocab_size=200, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
            num_attention_heads=4, num_key_value_heads=2, head_dim=hidden // 4, pad_token_id=0,
        )  # fmt: skip
        tiny.lively(transformers.HeliumForCausalLM(config)).save_pretrained(tmp_path / name)
        tiny.tokenizer(tmp_path / name)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "teacher")
    targets = ["q_proj", "v_proj", "gate_proj", "down_proj"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets))
    tiny.randomise(adapted, 3, ["lora_"])
    adapted.save_pretrained(tmp_path / "module")
    tiny.transfer(tmp_path / "module", student=tmp_path / "teacher", out=tmp_path / "same")
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("module", "same"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    graft = tiny.transfer(tmp_path / "module", student=tmp_path / "student", text=asked_text, out=tmp_path / "small")
    assert graft.report.student.inferred_architecture
    assert graft.report.verification.output_change > 0


def _sha256(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("kind", ["lora", pytest.param("pfeiffer", marks=needs_adapters)])
def test_a_polish_in_a_copy_leaves_the_student_as_it_was(world, kind: str) -> None:
    """The copy that a module is put into shares the student's matrices; nothing may train them."""
    student = transformers.AutoModel.from_pretrained(world / "shallow")
    teacher = transformers.AutoModel.from_pretrained(world / "teacher")
    before = {name: value.clone() for name, value in student.state_dict().items()}
    paths = [path for path, _ in student.named_modules()]
    tokenizer = transformers.AutoTokenizer.from_pretrained(world / "teacher")
    graft = tiny.transfer_live(world / kind, teacher, student, teacher_tokenizer=tokenizer, student_tokenizer=tokenizer,
        text=tiny.sentences(120), method="copy", head="fit", polish=3,
    )  # fmt: skip
    assert graft.report.polish is not None
    assert [path for path, _ in student.named_modules()] == paths
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert all(value.requires_grad for value in student.parameters())
