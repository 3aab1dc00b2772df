"""Models with several stacks of layers: encoder and decoder, text and image towers; and mixtures of experts."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
import transformers
from peft import PeftModel

import peft_graft
import tiny
from conftest import needs_adapters, needs_transformers4
from peft_graft._inspect import inspect
from peft_graft.alignment.activations import Capture
from peft_graft.checkpoints.read import read_checkpoint
from peft_graft.errors import GraftError, PlanError
from peft_graft.files import read_json
from peft_graft.models.loading import describe_config, wrap_model
from peft_graft.models.spaces import Site, Space
from peft_graft.models.task_models import complete
from peft_graft.planning.plan import plan_alignment

SPECIAL = {"vocab_size": 200, "pad_token_id": 0, "decoder_start_token_id": 2, "eos_token_id": 3}
T5 = {**SPECIAL, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4,
      "dropout_rate": 0.0}  # fmt: skip
BART = {
    **SPECIAL, "bos_token_id": 2, "d_model": 32, "encoder_layers": 2, "decoder_layers": 3,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "max_position_embeddings": 72, "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0,
    "forced_eos_token_id": None, "is_encoder_decoder": True,
}  # fmt: skip
CONFIGS = {
    "t5": transformers.T5Config(**T5, feed_forward_proj="relu"),
    "t5-gated": transformers.T5Config(**T5, feed_forward_proj="gated-gelu"),
    "mt5": transformers.MT5Config(**T5),
    "umt5": transformers.UMT5Config(**T5),
    "bart": transformers.BartConfig(**BART),
    "mbart": transformers.MBartConfig(**BART),
    "marian": transformers.MarianConfig(**BART),
    "pegasus": transformers.PegasusConfig(**BART),
    "m2m_100": transformers.M2M100Config(**BART),
}  # fmt: skip
T5_TARGETS = ["q", "k", "v", "o", "wo"]
BART_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
ENCODER_DECODERS = list(CONFIGS)


def targets_of(family: str) -> list[str]:
    if "t5" in family:
        return [*T5_TARGETS, *(["wi"] if family == "t5" else ["wi_0", "wi_1"])]
    return BART_TARGETS


def saved(folder: Path, family: str, seed: int = 0, **changes) -> Path:
    return tiny.saved(folder, CONFIGS[family], seed=seed, **changes)


def trained(folder: Path, base: Path, targets, task: str | None = "SEQ_2_SEQ_LM", auto: str = "AutoModelForSeq2SeqLM"):
    model = getattr(transformers, auto).from_pretrained(base).eval()
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type=task, r=4, lora_alpha=8, target_modules=targets))
    tiny.randomise(adapted, 1, ("lora_",))
    adapted.save_pretrained(folder)
    return adapted.eval()


def same_module(first: Path, second: Path) -> None:
    before, after = read_checkpoint(first), read_checkpoint(second)
    assert before.parts == after.parts


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(tiny.sentences(200)))
    return path


def options(text: Path, **changes) -> dict:
    return {"text": text, "method": "prune-align", "max_tokens": 1500, "polish": 0, **changes}


# ---- encoder and decoder ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_an_encoder_decoders_spaces_are_the_tensors_they_claim_to_be(family: str) -> None:
    model = wrap_model(tiny.lively(transformers.AutoModel.from_config(CONFIGS[family])))
    architecture = model.architecture
    assert not architecture.inferred
    assert dict(architecture.depths) == {"encoder": 2, "decoder": 3}
    assert ("encoder.ffn.gate" in architecture.row.linears) == ("t5" in family and family != "t5")
    spaces = [space for space in architecture.sizes if space.layer in (-1, 1)]
    ids = torch.randint(10, 100, (2, 7), generator=torch.Generator().manual_seed(0))
    batch = complete(model.base.config, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    with torch.inference_mode(), Capture(model, spaces) as capture:
        held = capture.forward(batch)
        output = model.base(**batch)
    for space in spaces:
        assert held[space].shape == (2, 7, architecture.size(space)), space
    torch.testing.assert_close(held[Space(1, "decoder.cross.memory")], output.encoder_last_hidden_state)
    torch.testing.assert_close(held[Space(-1, "tokens.out")], output.last_hidden_state)
    layers = output.past_key_values
    cached = layers.cross_attention_cache.layers[1].values.transpose(1, 2).flatten(2)
    torch.testing.assert_close(held[Space(1, "decoder.cross.value.out")], cached)
    assert not torch.equal(held[Space(1, "decoder.attn.in")], held[Space(1, "decoder.cross.in")])


@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_a_seq2seq_module_returns_from_its_own_model_as_it_was(family: str, tmp_path: Path) -> None:
    base = saved(tmp_path / "base", family)
    trained(tmp_path / "module", base, targets_of(family))
    graft = peft_graft.transfer(tmp_path / "module", student=base, method="copy", out=tmp_path / "graft")
    assert graft.report.verification.done
    same_module(tmp_path / "module", tmp_path / "graft")
    assert graft.report.layers == {"encoder": [[0], [1]], "decoder": [[0], [1], [2]]}
    assert "seq2seq-lm" in inspect(tmp_path / "module", student=base).task
    assert "AutoModelForSeq2SeqLM" in (tmp_path / "graft" / "README.md").read_text()


@pytest.mark.parametrize(("teacher", "student"), [("t5", "bart"), ("bart", "t5"), ("mt5", "t5-gated")])
def test_modules_move_between_encoder_decoders(teacher: str, student: str, tmp_path: Path, text: Path) -> None:
    """To one of another width and other depths; what is written loads and acts (``transfer`` verifies both)."""
    base = saved(tmp_path / "base", teacher)
    shape = {"d_model": 24, "num_layers": 3, "num_decoder_layers": 2} if "t5" in student else {
        "d_model": 24, "encoder_layers": 3, "decoder_layers": 2}  # fmt: skip
    other = saved(tmp_path / "other", student, 1, **shape)
    targets = [name for name in targets_of(teacher) if name != "wi_0" or student == "t5-gated"]
    trained(tmp_path / "module", base, targets)
    graft = peft_graft.transfer(tmp_path / "module", student=other, out=tmp_path / "graft", **options(text))
    assert graft.report.verification.done
    assert graft.report.layers == {"encoder": [[0], [0], [1]], "decoder": [[0], [1]]}
    sites = set(graft.checkpoint.modules)
    assert {Site(2, "encoder.attn.query"), Site(1, "decoder.cross.key"), Site(1, "decoder.ffn.down")} <= sites
    for module in graft.checkpoint.modules.values():
        assert all(Space(module.site.layer, name) in graft.student.architecture.sizes for name in module.spaces)
    moved = PeftModel.from_pretrained(
        transformers.AutoModelForSeq2SeqLM.from_pretrained(other), tmp_path / "graft"
    ).eval()
    ids = torch.randint(10, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = moved(input_ids=ids, decoder_input_ids=ids).logits
        with moved.disable_adapter():
            assert not torch.allclose(logits, moved(input_ids=ids, decoder_input_ids=ids).logits)


def test_a_seq2seq_module_is_judged_and_polished(tmp_path: Path, text: Path) -> None:
    """The default, on hidden states of the decoder: candidates are compared, and the best is trained a little."""
    base, other = saved(tmp_path / "base", "t5"), saved(tmp_path / "other", "bart", 1)
    trained(tmp_path / "module", base, ["q", "v"])
    text.write_text("\n".join(tiny.sentences(600)))  # several batches, so that there are some to choose a penalty by
    graft = peft_graft.transfer(tmp_path / "module", student=other, text=text, out=tmp_path / "graft")
    assert {name.split(",")[0] for name in graft.report.tried} >= {"prune-align", "ridge", "functional"}
    assert graft.report.polish is not None
    assert graft.report.verdict.measured.answers > 100
    same = peft_graft.transfer(tmp_path / "module", student=base, out=tmp_path / "same", **options(text))
    assert same.report.verdict.level == "exact"
    same_module(tmp_path / "module", tmp_path / "same")


@pytest.mark.parametrize(("teacher", "student"), [("t5", "t5-gated"), ("bart", "t5"), ("t5", "bart")])
@pytest.mark.parametrize("kind", [peft.PromptTuningConfig, peft.PromptEncoderConfig])
def test_prompts_move_between_encoder_decoders(teacher: str, student: str, kind, tmp_path: Path, text: Path) -> None:
    base, other = saved(tmp_path / "base", teacher), saved(tmp_path / "other", student, 1, d_model=24)
    own = {"encoder_hidden_size": 16} if kind is peft.PromptEncoderConfig else {}
    config = kind(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3, **own)
    adapted = peft.get_peft_model(transformers.AutoModelForSeq2SeqLM.from_pretrained(base), config)
    tiny.randomise_trained(adapted, 1)
    adapted.save_pretrained(tmp_path / "module")
    same = peft_graft.transfer(tmp_path / "module", student=base, method="copy", out=tmp_path / "same")
    loaded = PeftModel.from_pretrained(transformers.AutoModelForSeq2SeqLM.from_pretrained(base), tmp_path / "same")
    ids = torch.randint(10, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = adapted.eval()(input_ids=ids, decoder_input_ids=ids).logits
        torch.testing.assert_close(loaded.eval()(input_ids=ids, decoder_input_ids=ids).logits, expected)
    assert same.report.verification.output_change > 0
    graft = peft_graft.transfer(tmp_path / "module", student=other, out=tmp_path / "graft", **options(text, polish=4))
    assert graft.report.polish is not None
    assert graft.report.verification.output_change > 0
    moved = PeftModel.from_pretrained(transformers.AutoModelForSeq2SeqLM.from_pretrained(other), tmp_path / "graft")
    with torch.inference_mode():
        assert moved.eval()(input_ids=ids, decoder_input_ids=ids).logits.shape[:2] == (2, 9)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_classifiers_without_their_heads(family: str, tmp_path: Path, text: Path) -> None:
    """The stacks of T5's classifiers lie in a base model, other than in its language models."""
    base, other = saved(tmp_path / "base", family), saved(tmp_path / "other", family, 1, d_model=24)
    trained(tmp_path / "module", base, ["q", "q_proj"], "SEQ_CLS", "AutoModelForSequenceClassification")
    graft = peft_graft.transfer(
        tmp_path / "module", student=other, head="drop", out=tmp_path / "graft", **options(text)
    )
    assert graft.report.verification.done
    prefix = "transformer" if family == "t5" else "model"
    assert all(path.startswith(f"{prefix}.") for path in read_checkpoint(tmp_path / "graft").parts)


def test_live_seq2seq_models(tmp_path: Path) -> None:
    """T5's task models hold the stacks themselves; given one, its stacks are described and used."""
    base = saved(tmp_path / "base", "t5")
    trained(tmp_path / "module", base, ["q", "v"])
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(base)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    graft = peft_graft.transfer_checkpoint(
        read_checkpoint(tmp_path / "module"), model, model, teacher_tokenizer=tokenizer, student_tokenizer=tokenizer,
        text=tiny.sentences(100), method="prune-align", max_tokens=500,
    )  # fmt: skip
    assert graft.report.verdict.level == "exact"


def bert(folder: Path, **shape) -> Path:
    return tiny.base_model(folder, "bert", layers=2, **shape)


def test_modules_move_between_an_encoder_and_the_encoder_stack(tmp_path: Path, text: Path) -> None:
    base, bart = bert(tmp_path / "bert", hidden=24), saved(tmp_path / "bart", "bart")
    tiny.peft_lora(tmp_path / "module", base, task="base", targets=["query", "value", "intermediate.dense"])
    graft = peft_graft.transfer(tmp_path / "module", student=bart, out=tmp_path / "graft", **options(text))
    assert graft.report.verification.done
    assert {site.role for site in graft.checkpoint.modules} == {
        "encoder.attn.query", "encoder.attn.value", "encoder.ffn.up"
    }  # fmt: skip
    assert graft.report.layers == {"encoder": [[0], [1]]}
    trained(tmp_path / "of-bart", bart, r"encoder\.layers\.\d+\.self_attn\.[qv]_proj", None, "AutoModel")
    back = peft_graft.transfer(tmp_path / "of-bart", student=base, out=tmp_path / "back", **options(text))
    assert back.report.verification.done
    assert {site.role for site in back.checkpoint.modules} == {"attn.query", "attn.value"}


def llama(folder: Path, **shape) -> Path:
    config = transformers.LlamaConfig(
        **{"vocab_size": 200, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
           "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, **shape}
    )  # fmt: skip
    tiny.lively(transformers.AutoModelForCausalLM.from_config(config), 2).save_pretrained(folder)
    tiny.tokenizer(folder)
    return folder


@pytest.mark.parametrize("family", ["bart", "mt5"])
def test_modules_move_between_a_decoder_and_the_decoder_stack(family: str, tmp_path: Path, text: Path) -> None:
    base, other = llama(tmp_path / "llama"), saved(tmp_path / "other", family)
    trained(tmp_path / "module", base, ["q_proj", "v_proj", "up_proj"], None, "AutoModel")
    graft = peft_graft.transfer(tmp_path / "module", student=other, out=tmp_path / "graft", **options(text))
    assert graft.report.verification.done
    assert {site.role for site in graft.checkpoint.modules} == {
        "decoder.attn.query", "decoder.attn.value", "decoder.ffn.up"
    }  # fmt: skip
    names = "self_attn.[qv]_proj" if family == "bart" else "layer.0.SelfAttention.[qv]"
    trained(tmp_path / "back-module", other, rf"decoder\..*{names}", None, "AutoModel")
    back = peft_graft.transfer(tmp_path / "back-module", student=base, out=tmp_path / "back", **options(text))
    assert back.report.verification.done
    assert len(back.checkpoint.modules) == 4


def test_what_has_no_counterpart_is_refused_with_the_reason(tmp_path: Path, text: Path) -> None:
    bart, base = saved(tmp_path / "bart", "bart"), bert(tmp_path / "bert")
    trained(tmp_path / "module", bart, ["q_proj", "v_proj"])
    with pytest.raises(PlanError, match=r"decoder\.attn\.query: the student has no counterpart.*has no decoder"):
        peft_graft.transfer(tmp_path / "module", student=base, **options(text))
    trained(tmp_path / "cross", bart, r".*encoder_attn\.[qv]_proj")
    with pytest.raises(PlanError, match=r"cross\.query: the student has no counterpart.*without the cross attention"):
        peft_graft.transfer(tmp_path / "cross", student=llama(tmp_path / "llama"), **options(text))
    gated = saved(tmp_path / "gated", "mt5")
    trained(tmp_path / "gate", gated, ["wi_0"])
    with pytest.raises(PlanError, match=r"coder\.ffn\.gate: the student has no counterpart"):
        peft_graft.transfer(tmp_path / "gate", student=bart, **options(text))


def test_an_alignment_of_encoder_decoders_serves_every_module(tmp_path: Path, text: Path) -> None:
    base, other = saved(tmp_path / "base", "t5"), saved(tmp_path / "other", "bart", 1)
    found = peft_graft.align(base, other, text=text, max_tokens=1500, out=tmp_path / "alignment")
    trained(tmp_path / "module", base, ["q", "v", "wo"])
    graft = peft_graft.transfer(tmp_path / "module", student=other, alignment=tmp_path / "alignment")
    assert graft.report.method == "prune-align"
    pair = Space(0, "decoder.cross.memory"), Space(0, "decoder.cross.memory")
    assert torch.equal(graft.alignment.map(pair).indices, found.map(pair).indices)
    shapes = [describe_config(transformers.AutoConfig.from_pretrained(name)) for name in (base, other)]
    few = plan_alignment(*shapes, roles=["decoder.cross.query"])
    assert {pair[0].name for pair in few} == {"decoder.cross.in", "decoder.cross.query.out", "tokens.out"}


def test_layer_maps_by_stack(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", "bart")
    trained(tmp_path / "module", base, BART_TARGETS)
    student = saved(tmp_path / "student", "bart", 1, encoder_layers=1, decoder_layers=2)
    how = {"student": student, "method": "copy"}
    graft = peft_graft.transfer(tmp_path / "module", layers="encoder=avg;decoder=0,2", **how)
    assert graft.report.layers == {"encoder": [[0, 1]], "decoder": [[0], [2]]}
    with pytest.raises(PlanError, match=r"decoder=0,1: .*expected encoder, decoder.*found decoder"):
        peft_graft.transfer(tmp_path / "module", layers="decoder=0,1", **how)
    with pytest.raises(PlanError, match="expected 1 numbers"):
        peft_graft.transfer(tmp_path / "module", layers="0,2", **how)


@needs_adapters
@pytest.mark.filterwarnings("ignore:.past_key_value. is deprecated:FutureWarning")
@pytest.mark.parametrize(("teacher", "student"), [("t5", "mt5"), ("bart", "mbart"), ("mbart", "t5")])
def test_adapterhub_modules_move_between_encoder_decoders(
    teacher: str, student: str, tmp_path: Path, text: Path
) -> None:
    """Adapters after every block, cross attention included; layers left out are counted through both stacks."""
    import adapters

    base = saved(tmp_path / "base", teacher)
    depths = {"num_layers": 3, "num_decoder_layers": 2} if "t5" in student else {
        "encoder_layers": 3, "decoder_layers": 2}  # fmt: skip
    other = saved(tmp_path / "other", student, 1, d_model=24, **depths)
    config = adapters.DoubleSeqBnConfig(cross_adapter=True, leave_out=[1, 2], reduction_factor=8)
    tiny.adapterhub_module(tmp_path / "module", base, config, head=None)
    same = peft_graft.transfer(tmp_path / "module", student=base, method="copy", out=tmp_path / "same")
    assert same.report.verification.output_change > 0
    same_module(tmp_path / "module", tmp_path / "same")
    graft = peft_graft.transfer(tmp_path / "module", student=other, out=tmp_path / "graft", **options(text))
    assert graft.report.verification.output_change > 0
    sites = {Site(0, "encoder.attn.adapter"), Site(1, "encoder.ffn.adapter"), Site(1, "decoder.cross.adapter")}
    assert sites <= set(graft.checkpoint.modules)
    assert Site(0, "decoder.attn.adapter") not in graft.checkpoint.modules, "the teacher's first has none"
    assert read_json(tmp_path / "graft" / "adapter_config.json")["config"]["leave_out"] == [2, 3]


def permuted_bart(model, seed: int = 3):
    """A copy that computes the same with hidden units, heads, units of heads and FFN units in another order."""
    generator = torch.Generator().manual_seed(seed)
    other = copy.deepcopy(model)
    stream = torch.randperm(32, generator=generator)

    def attention(block) -> None:
        order, inner = torch.randperm(4, generator=generator), torch.randperm(8, generator=generator)
        units = torch.cat([head * 8 + inner for head in order.tolist()])
        for linear in (block.q_proj, block.k_proj, block.v_proj):
            tiny._permute_linear(linear, stream, units)
        tiny._permute_linear(block.out_proj, units, stream)

    with torch.no_grad():
        other.shared.weight.copy_(other.shared.weight[:, stream])
        for stack in (other.encoder, other.decoder):
            stack.embed_positions.weight.copy_(stack.embed_positions.weight[:, stream])
            tiny._permute_norm(stack.layernorm_embedding, stream)
            for layer in stack.layers:
                attention(layer.self_attn)
                norms = [layer.self_attn_layer_norm, layer.final_layer_norm]
                if hasattr(layer, "encoder_attn"):
                    attention(layer.encoder_attn)
                    norms.append(layer.encoder_attn_layer_norm)
                units = torch.randperm(48, generator=generator)
                tiny._permute_linear(layer.fc1, stream, units)
                tiny._permute_linear(layer.fc2, units, stream)
                for norm in norms:
                    tiny._permute_norm(norm, stream)
    return other


def test_a_permuted_bart_computes_what_the_teacher_does(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", "bart")
    teacher = trained(tmp_path / "module", base, BART_TARGETS)
    student = permuted_bart(transformers.AutoModel.from_pretrained(base))
    student.save_pretrained(tmp_path / "student")
    tiny.tokenizer(tmp_path / "student")
    (tmp_path / "text.txt").write_text("\n".join(tiny.sentences(300)))
    graft = peft_graft.transfer(
        tmp_path / "module", student=tmp_path / "student", out=tmp_path / "graft",
        **options(tmp_path / "text.txt", max_tokens=50_000),
    )  # fmt: skip
    for site in graft.report.sites:
        for record in site.maps:
            assert record.diagnostics["mean_correlation"] > 0.999, (site.site, record)
    assert graft.report.verdict.level == "exact"
    moved = PeftModel.from_pretrained(
        transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "student"), tmp_path / "graft"
    ).eval()
    ids = torch.randint(10, 100, (4, 11), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = teacher(input_ids=ids, decoder_input_ids=ids.flip(0)).logits
        with teacher.disable_adapter():
            assert (expected - teacher(input_ids=ids, decoder_input_ids=ids.flip(0)).logits).abs().max() > 0.5
        given = moved(input_ids=ids, decoder_input_ids=ids.flip(0)).logits
    torch.testing.assert_close(given, expected, rtol=0, atol=1e-4)


# ---- images and sound ------------------------------------------------------------------------------------------------

TOWER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
EYE = {**TOWER, "image_size": 16, "patch_size": 8}
READER = {**TOWER, "vocab_size": 200, "max_position_embeddings": 72, "eos_token_id": 3, "pad_token_id": 0,
          "bos_token_id": 2}  # fmt: skip
TOWERS = {
    "vit": transformers.ViTConfig(**EYE),
    "deit": transformers.DeiTConfig(**EYE),
    "clip": transformers.CLIPConfig(text_config=READER, vision_config=EYE, projection_dim=16),
    "clip_text_model": transformers.CLIPTextConfig(**READER),
    "clip_vision_model": transformers.CLIPVisionConfig(**EYE),
    "siglip": transformers.SiglipConfig(text_config=READER, vision_config=EYE),
    "siglip_vision_model": transformers.SiglipVisionConfig(**EYE),
    "whisper": transformers.WhisperConfig(
        **{key: value for key, value in BART.items() if "position" not in key}, num_mel_bins=8,
        max_source_positions=20, max_target_positions=40, suppress_tokens=None, begin_suppress_tokens=None,
    ),
}  # fmt: skip
#: By their names in transformers 4 and 5.
VIT_TARGETS = ["query", "value", "intermediate.dense", "q_proj", "v_proj", "fc1"]


def tower(folder: Path, family: str, seed: int = 0, **changes) -> Path:
    config = TOWERS[family]
    config = type(config)(**{**config.to_dict(), **changes})
    tiny.lively(transformers.AutoModel.from_config(config), seed).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", TOWERS)
def test_modules_of_towers_return_and_are_recognised(family: str, tmp_path: Path) -> None:
    base = tower(tmp_path / "base", family)
    targets = VIT_TARGETS if family in ("vit", "deit") else ["q_proj", "v_proj"]
    trained(tmp_path / "module", base, targets, None, "AutoModel")
    graft = peft_graft.transfer(tmp_path / "module", student=base, method="copy", out=tmp_path / "graft")
    assert graft.report.verification.done
    same_module(tmp_path / "module", tmp_path / "graft")
    found = inspect(tmp_path / "module", student=base)
    assert found.teacher_problem is None
    assert found.student.problem is None
    stacks = {"clip": {"text", "vision"}, "siglip": {"text", "vision"}, "whisper": {"encoder", "decoder"}}
    assert {site.role.rpartition(".attn.")[0] for site in found.sites} - {""} == stacks.get(family, set())
    assert (found.student.method == "copy") == (family != "clip_text_model")


def test_a_vision_module_and_its_head_move_to_a_shallower_model(tmp_path: Path) -> None:
    base, other = tower(tmp_path / "base", "vit"), tower(tmp_path / "other", "vit", 1, num_hidden_layers=1)
    model = transformers.AutoModelForImageClassification.from_pretrained(base, num_labels=3)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=VIT_TARGETS, modules_to_save=["classifier"])
    )
    tiny.randomise(adapted, 1, ("lora_", "modules_to_save.default"))
    adapted.save_pretrained(tmp_path / "module")
    graft = peft_graft.transfer(tmp_path / "module", student=other, method="copy", layers="avg", out=tmp_path / "graft")
    assert graft.report.verification.done
    assert graft.report.head.task == "image-classification"
    assert graft.report.layers == [[0, 1]]
    fresh = transformers.AutoModelForImageClassification.from_pretrained(other, num_labels=3)
    moved = PeftModel.from_pretrained(fresh, tmp_path / "graft")
    key = "base_model.model.classifier.modules_to_save.default.weight"
    assert torch.equal(moved.state_dict()[key], adapted.state_dict()[key])


def test_one_tower_of_two_and_whisper_with_its_task(tmp_path: Path) -> None:
    both, eye = tower(tmp_path / "clip", "clip"), tower(tmp_path / "eye", "clip_vision_model", 1)
    trained(tmp_path / "module", eye, ["q_proj", "v_proj"], None, "AutoModel")
    graft = peft_graft.transfer(tmp_path / "module", student=both, method="copy", out=tmp_path / "graft")
    assert graft.report.verification.done
    assert {site.role for site in graft.checkpoint.modules} == {"vision.attn.query", "vision.attn.value"}
    base = tower(tmp_path / "whisper", "whisper")
    trained(tmp_path / "of-whisper", base, ["q_proj", "v_proj"], None, "AutoModelForSpeechSeq2Seq")
    small = tower(tmp_path / "small", "whisper", 1, encoder_layers=1, decoder_layers=1)
    graft = peft_graft.transfer(tmp_path / "of-whisper", student=small, method="copy", out=tmp_path / "speech")
    assert graft.report.verification.done
    assert read_checkpoint(tmp_path / "speech").task == "seq2seq-lm"
    assert "AutoModelForSpeechSeq2Seq" in (tmp_path / "speech" / "README.md").read_text()


def test_text_is_refused_for_what_reads_images_or_sound(tmp_path: Path, text: Path) -> None:
    base = tower(tmp_path / "vit", "vit")
    trained(tmp_path / "module", base, VIT_TARGETS, None, "AutoModel")
    reason = "a vit model reads images; aligning on those is not supported yet.*--method copy"
    for how in ({}, {"text": text}, {"method": "prune-align"}, {"method": "prune-align", "text": text},
                {"method": "copy", "polish": 5}):  # fmt: skip
        with pytest.raises(PlanError, match=reason):
            peft_graft.transfer(tmp_path / "module", student=base, **how)
    model = transformers.AutoModel.from_pretrained(base)
    with pytest.raises(PlanError, match=reason):
        peft_graft.transfer_checkpoint(read_checkpoint(tmp_path / "module"), model, model)
    speech = tower(tmp_path / "whisper", "whisper")
    with pytest.raises(PlanError, match="a whisper model reads sound"):
        peft_graft.align(speech, speech, text=text)
    narrow = tower(tmp_path / "narrow", "vit", hidden_size=24)
    with pytest.raises(PlanError, match="can only be aligned on text.*expected 32 units.*found 24"):
        peft_graft.transfer(tmp_path / "module", student=narrow, method="copy")
    assert "can only be aligned on text" in inspect(tmp_path / "module", student=narrow).student.problem
    with pytest.raises(PlanError, match="no counterpart"):
        peft_graft.transfer(tmp_path / "module", student=bert(tmp_path / "bert"), method="copy")


def test_clips_text_tower_alone_aligns_on_text(tmp_path: Path, text: Path) -> None:
    base, other = bert(tmp_path / "bert", hidden=24), tower(tmp_path / "clip", "clip_text_model")
    tiny.tokenizer(other)
    tiny.peft_lora(tmp_path / "module", base, task="base", targets=["query", "value", "output.dense"])
    graft = peft_graft.transfer(tmp_path / "module", student=other, out=tmp_path / "graft", **options(text))
    assert graft.report.verification.done


# ---- mixtures of experts ---------------------------------------------------------------------------------------------

MIXTURE = {"vocab_size": 200, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
           "num_key_value_heads": 2, "pad_token_id": 0, "intermediate_size": 48, "num_experts_per_tok": 2}  # fmt: skip
SMALL_EXPERTS = {"num_experts": 4, "moe_intermediate_size": 20, "norm_topk_prob": True, "decoder_sparse_step": 1}
MIXTURES = {
    "mixtral": transformers.MixtralConfig(**MIXTURE, num_local_experts=4),
    "qwen2_moe": transformers.Qwen2MoeConfig(
        **{**MIXTURE, "num_hidden_layers": 3}, **SMALL_EXPERTS, shared_expert_intermediate_size=24, mlp_only_layers=[1]
    ),
    "qwen3_moe": transformers.Qwen3MoeConfig(**MIXTURE, **SMALL_EXPERTS, head_dim=12),
    "olmoe": transformers.OlmoeConfig(**MIXTURE, num_experts=4),
}  # fmt: skip
MIXTURE_TARGETS = {
    "mixtral": ["q_proj", "v_proj", "gate", "w1", "w2", "w3"],
    "qwen2_moe": ["q_proj", "v_proj", "gate", "gate_proj", "up_proj", "down_proj", "shared_expert_gate"],
}
DEFAULT_MIXTURE_TARGETS = ["q_proj", "v_proj", "gate", "gate_proj", "up_proj", "down_proj"]


def mixture(folder: Path, family: str, seed: int = 0, **changes) -> Path:
    return tiny.saved(folder, MIXTURES[family], transformers.AutoModelForCausalLM, seed=seed, **changes)


def trained_mixture(folder: Path, base: Path, family: str, targets=None):
    targets = targets or MIXTURE_TARGETS.get(family, DEFAULT_MIXTURE_TARGETS)
    return trained(folder, base, targets, "CAUSAL_LM", "AutoModelForCausalLM")


@pytest.mark.parametrize("family", MIXTURES)
@needs_transformers4
def test_a_mixtures_module_returns_from_its_own_model_as_it_was(family: str, tmp_path: Path) -> None:
    base = mixture(tmp_path / "base", family)
    trained_mixture(tmp_path / "module", base, family)
    graft = peft_graft.transfer(tmp_path / "module", student=base, method="copy", out=tmp_path / "graft")
    assert graft.report.verification.done
    same_module(tmp_path / "module", tmp_path / "graft")
    architecture = graft.student.architecture
    assert not architecture.inferred
    assert architecture.size(Space(0, "ffn.router.out")) == 4
    if family == "qwen2_moe":
        assert Site(1, "ffn.up") in graft.checkpoint.modules
        assert Site(2, "shared.ffn.router") in graft.checkpoint.modules
        assert not architecture.has(Site(1, "expert.0.ffn.up"))
        assert architecture.tap(Space(1, "ffn.in")).path == "layers.1.mlp.up_proj"
        assert architecture.tap(Space(0, "ffn.in")).path == "layers.0.mlp.gate"


@needs_transformers4
def test_an_expert_is_seen_on_every_token() -> None:
    model = wrap_model(tiny.lively(transformers.AutoModel.from_config(MIXTURES["mixtral"])))
    names = ("ffn.in", "ffn.router.out", "expert.3.ffn.up.out", "expert.3.ffn.mid", "expert.3.ffn.down.out")
    ids = torch.randint(10, 100, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), Capture(model, [Space(1, name) for name in names]) as capture:
        held = capture.forward({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        expert = model.base.layers[1].block_sparse_moe.experts[3]
        torch.testing.assert_close(held[Space(1, "expert.3.ffn.up.out")], expert.w3(held[Space(1, "ffn.in")]))
        torch.testing.assert_close(held[Space(1, "expert.3.ffn.down.out")], expert(held[Space(1, "ffn.in")]))
    assert held[Space(1, "ffn.router.out")].shape == (2, 7, 4)
    assert held[Space(1, "expert.3.ffn.mid")].shape == (2, 7, 48)


def permuted_mixtral(model, seed: int = 3):
    """A copy that computes the same with experts, hidden units, key-value groups and units of experts in another order.

    Queries and keys keep the order of units in a head, which rotary embeddings fix.
    """
    generator = torch.Generator().manual_seed(seed)
    other = copy.deepcopy(model)
    stream = torch.randperm(32, generator=generator)
    orders = []
    with torch.no_grad():
        inner = other.model
        inner.embed_tokens.weight.copy_(inner.embed_tokens.weight[:, stream])
        other.lm_head.weight.copy_(other.lm_head.weight[:, stream])
        inner.norm.weight.copy_(inner.norm.weight[stream])
        for layer in inner.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight.copy_(norm.weight[stream])
            attention, within = layer.self_attn, torch.randperm(8, generator=generator)
            queries = torch.arange(32).view(2, 2, 8).flip(0)  # groups change places
            values = torch.arange(16).view(2, 8).flip(0)
            for linear, rows in (
                (attention.q_proj, queries.flatten()),
                (attention.k_proj, values.flatten()),
                (attention.v_proj, values[:, within].flatten()),
            ):
                linear.weight.copy_(linear.weight[rows][:, stream])
            attention.o_proj.weight.copy_(attention.o_proj.weight[stream][:, queries[..., within].flatten()])
            block, order = layer.block_sparse_moe, torch.randperm(4, generator=generator)
            orders.append(order.tolist())
            block.gate.weight.copy_(block.gate.weight[order][:, stream])
            experts = [copy.deepcopy(block.experts[index]) for index in order.tolist()]
            for expert, own in zip(block.experts, experts, strict=True):
                units = torch.randperm(48, generator=generator)
                expert.w1.weight.copy_(own.w1.weight[units][:, stream])
                expert.w3.weight.copy_(own.w3.weight[units][:, stream])
                expert.w2.weight.copy_(own.w2.weight[stream][:, units])
    return other, orders


@needs_transformers4
def test_a_permuted_mixture_computes_what_the_teacher_does(tmp_path: Path) -> None:
    base = mixture(tmp_path / "base", "mixtral")
    teacher = trained_mixture(tmp_path / "module", base, "mixtral")
    student, orders = permuted_mixtral(transformers.AutoModelForCausalLM.from_pretrained(base))
    assert orders[0] != [0, 1, 2, 3]
    student.save_pretrained(tmp_path / "student")
    tiny.tokenizer(tmp_path / "student")
    (tmp_path / "text.txt").write_text("\n".join(tiny.sentences(150)))
    how = options(tmp_path / "text.txt", max_tokens=50_000)
    graft = peft_graft.transfer(tmp_path / "module", student=tmp_path / "student", out=tmp_path / "graft", **how)
    taken = {site.site: site.teacher_sites for site in graft.report.sites}
    for layer, order in enumerate(orders):
        for own, theirs in enumerate(order):
            assert taken[f"layer {layer} expert.{own}.ffn.up"] == [f"layer {layer} expert.{theirs}.ffn.up"]
    for site in graft.report.sites:
        for record in site.maps:
            assert record.diagnostics["mean_correlation"] > 0.999, (site.site, record)
    assert graft.report.verdict.level == "exact"
    moved = PeftModel.from_pretrained(student, tmp_path / "graft").eval()
    ids = torch.randint(10, 100, (4, 11), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = teacher(input_ids=ids).logits
        with teacher.disable_adapter():
            assert (expected - teacher(input_ids=ids).logits).abs().max() > 0.5
        torch.testing.assert_close(moved(input_ids=ids).logits, expected, rtol=0, atol=1e-4)
    # A saved alignment knows which experts it matched.
    peft_graft.align(base, tmp_path / "student", text=tmp_path / "text.txt", out=tmp_path / "alignment")
    again = peft_graft.transfer(
        tmp_path / "module", student=tmp_path / "student", alignment=tmp_path / "alignment", out=tmp_path / "again"
    )
    assert {site.site: site.teacher_sites for site in again.report.sites} == taken
    same_module(tmp_path / "graft", tmp_path / "again")


@pytest.mark.parametrize("number", [3, 6])
@needs_transformers4
def test_mixtures_of_unequal_numbers_of_experts(number: int, tmp_path: Path, text: Path) -> None:
    """What has no counterpart gets no module, or is left out; between families of mixtures too."""
    base, other = mixture(tmp_path / "base", "mixtral"), mixture(tmp_path / "other", "qwen3_moe", 1, num_experts=number)
    trained_mixture(tmp_path / "module", base, "mixtral", ["q_proj", "w1", "w2", "w3"])
    graft = peft_graft.transfer(tmp_path / "module", student=other, out=tmp_path / "graft", **options(text))
    assert graft.report.verification.done
    ups = [site for site in graft.checkpoint.modules if site.role.endswith(".ffn.up")]
    assert len(ups) == 2 * min(number, 4)
    assert any("experts are left out" in note for note in graft.report.notes) == (number == 3)
    same = peft_graft.transfer(
        tmp_path / "module", student=mixture(tmp_path / "wide", "mixtral", 1, num_local_experts=number), method="copy"
    )
    experts = {site.role.split(".")[1] for site in same.checkpoint.modules if site.role.startswith("expert.")}
    assert experts == {str(expert) for expert in range(min(number, 4))}


def test_attention_of_mixtures_and_dense_models(tmp_path: Path, text: Path) -> None:
    base, other = mixture(tmp_path / "base", "mixtral"), llama(tmp_path / "llama")
    trained_mixture(tmp_path / "module", base, "mixtral", ["q_proj", "v_proj"])
    graft = peft_graft.transfer(tmp_path / "module", student=other, out=tmp_path / "graft", **options(text))
    assert graft.report.verification.done
    trained(tmp_path / "of-llama", other, ["q_proj", "o_proj"], "CAUSAL_LM", "AutoModelForCausalLM")
    back = peft_graft.transfer(tmp_path / "of-llama", student=base, out=tmp_path / "back", **options(text))
    assert back.report.verification.done
    trained_mixture(tmp_path / "experts", base, "mixtral", ["w2"])
    refused = r"expert\.0\.ffn\.down: the student has no counterpart.*without the experts|LoRA with target_parameters="
    with pytest.raises(GraftError, match=refused):  # the latter with transformers 5, whose experts are one tensor
        peft_graft.transfer(tmp_path / "experts", student=other, **options(text))


@needs_transformers4
def test_a_mixtures_module_is_judged_and_polished(tmp_path: Path, text: Path) -> None:
    base, other = mixture(tmp_path / "base", "mixtral"), mixture(tmp_path / "other", "mixtral", 1, hidden_size=24)
    text.write_text("\n".join(tiny.sentences(600)))
    trained_mixture(tmp_path / "module", base, "mixtral", ["q_proj", "gate", "w1"])
    graft = peft_graft.transfer(tmp_path / "module", student=other, text=text, out=tmp_path / "graft")
    assert graft.report.polish is not None
    assert graft.report.verification.done
    assert {name.split(",")[0] for name in graft.report.tried} >= {"prune-align", "ridge", "functional"}
