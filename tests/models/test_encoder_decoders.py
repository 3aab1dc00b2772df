"""Encoder-decoders: two stacks of layers, one of which also attends to the other."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
import transformers
from peft import PeftModel

import tiny
from conftest import needs_adapters
from families import BART_TARGETS, ENCODER_DECODERS, llama, options, same_module, saved, targets_of, trained
from peft_graft._inspect import inspect
from peft_graft.alignment.activations import Capture
from peft_graft.checkpoints.read import read_checkpoint
from peft_graft.errors import PlanError
from peft_graft.files import read_json
from peft_graft.models.loading import describe_config, wrap_model
from peft_graft.models.spaces import Site, Space
from peft_graft.models.task_models import complete
from peft_graft.planning.spaces import spaces_of_roles


@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_an_encoder_decoders_spaces_are_the_tensors_they_claim_to_be(family: str) -> None:
    model = wrap_model(tiny.lively(transformers.AutoModel.from_config(ENCODER_DECODERS[family])))
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
    graft = tiny.transfer(tmp_path / "module", student=base, method="copy", out=tmp_path / "graft")
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
    graft = tiny.transfer(tmp_path / "module", student=other, out=tmp_path / "graft", **options(text))
    assert graft.report.verification.done
    assert graft.report.layers == {"encoder": [[0], [0], [1]], "decoder": [[0], [1]]}
    assert graft.report.teacher_layers == {"encoder": 2, "decoder": 3}
    sites = set(graft.checkpoint.modules)
    assert {Site(2, "encoder.attn.query"), Site(1, "decoder.cross.key"), Site(1, "decoder.ffn.down")} <= sites
    for module in graft.checkpoint.modules.values():
        spaces = {Space(module.site.layer, axis.space) for axis in module.axes}
        assert spaces <= graft.student.architecture.sizes.keys()
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
    base = saved(tmp_path / "base", "t5", num_layers=1, num_decoder_layers=2)
    other = saved(tmp_path / "other", "bart", 1, encoder_layers=1, decoder_layers=1)
    trained(tmp_path / "module", base, ["q", "v"])
    text.write_text("\n".join(tiny.sentences(250)))  # several batches, so that there are some to choose a penalty by
    graft = tiny.transfer(tmp_path / "module", student=other, text=text, out=tmp_path / "graft")
    assert {name.split(",")[0] for name in graft.report.tried} >= {"prune-align", "ridge", "functional"}
    assert graft.report.polish is not None
    assert graft.report.verdict.measured.answers > 100
    same = tiny.transfer(tmp_path / "module", student=base, out=tmp_path / "same", **options(text))
    assert same.report.verdict.level == "exact"
    same_module(tmp_path / "module", tmp_path / "same")


@pytest.mark.parametrize(("teacher", "student", "kind"), [
    ("t5", "t5-gated", peft.PromptTuningConfig), ("bart", "t5", peft.PromptTuningConfig),
    ("t5", "bart", peft.PromptEncoderConfig), ("bart", "t5", peft.PromptEncoderConfig),
])  # fmt: skip
def test_prompts_move_between_encoder_decoders(teacher: str, student: str, kind, tmp_path: Path, text: Path) -> None:
    base, other = saved(tmp_path / "base", teacher), saved(tmp_path / "other", student, 1, d_model=24)
    own = {"encoder_hidden_size": 16} if kind is peft.PromptEncoderConfig else {}
    config = kind(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3, **own)
    adapted = peft.get_peft_model(transformers.AutoModelForSeq2SeqLM.from_pretrained(base), config)
    tiny.randomise_trained(adapted, 1)
    adapted.save_pretrained(tmp_path / "module")
    same = tiny.transfer(tmp_path / "module", student=base, method="copy", out=tmp_path / "same")
    loaded = PeftModel.from_pretrained(transformers.AutoModelForSeq2SeqLM.from_pretrained(base), tmp_path / "same")
    ids = torch.randint(10, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = adapted.eval()(input_ids=ids, decoder_input_ids=ids).logits
        torch.testing.assert_close(loaded.eval()(input_ids=ids, decoder_input_ids=ids).logits, expected)
    assert same.report.verification.output_change > 0
    graft = tiny.transfer(tmp_path / "module", student=other, out=tmp_path / "graft", **options(text, polish=4))
    assert graft.report.polish is not None
    assert graft.report.verification.output_change > 0
    moved = PeftModel.from_pretrained(transformers.AutoModelForSeq2SeqLM.from_pretrained(other), tmp_path / "graft")
    with torch.inference_mode():
        assert moved.eval()(input_ids=ids, decoder_input_ids=ids).logits.shape[:2] == (2, 9)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_classifiers_without_their_heads(family: str, tmp_path: Path, short_text: Path) -> None:
    """The stacks of T5's classifiers lie in a base model, other than in its language models."""
    base, other = saved(tmp_path / "base", family), saved(tmp_path / "other", family, 1, d_model=24)
    trained(tmp_path / "module", base, ["q", "q_proj"], "SEQ_CLS", "AutoModelForSequenceClassification")
    graft = tiny.transfer(
        tmp_path / "module", student=other, head="drop", out=tmp_path / "graft", **options(short_text)
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
    graft = tiny.transfer_live(
        tmp_path / "module", model, model, teacher_tokenizer=tokenizer, student_tokenizer=tokenizer,
        text=tiny.sentences(100), method="prune-align", max_tokens=500,
    )  # fmt: skip
    assert graft.report.verdict.level == "exact"


def bert(folder: Path, **shape) -> Path:
    return tiny.base_model(folder, "bert", layers=2, **shape)


def test_modules_move_between_an_encoder_and_the_encoder_stack(tmp_path: Path, short_text: Path) -> None:
    base, bart = bert(tmp_path / "bert", hidden=24), saved(tmp_path / "bart", "bart")
    tiny.peft_lora(tmp_path / "module", base, task="base", targets=["query", "value", "intermediate.dense"])
    graft = tiny.transfer(tmp_path / "module", student=bart, out=tmp_path / "graft", **options(short_text))
    assert graft.report.verification.done
    assert {site.role for site in graft.checkpoint.modules} == {
        "encoder.attn.query", "encoder.attn.value", "encoder.ffn.up"
    }  # fmt: skip
    assert graft.report.layers == {"encoder": [[0], [1]]}
    trained(tmp_path / "of-bart", bart, r"encoder\.layers\.\d+\.self_attn\.[qv]_proj", None, "AutoModel")
    back = tiny.transfer(tmp_path / "of-bart", student=base, out=tmp_path / "back", **options(short_text))
    assert back.report.verification.done
    assert {site.role for site in back.checkpoint.modules} == {"attn.query", "attn.value"}


@pytest.mark.parametrize("family", ["bart", "mt5"])
def test_modules_move_between_a_decoder_and_the_decoder_stack(family: str, tmp_path: Path, short_text: Path) -> None:
    base, other = llama(tmp_path / "llama"), saved(tmp_path / "other", family)
    trained(tmp_path / "module", base, ["q_proj", "v_proj", "up_proj"], None, "AutoModel")
    graft = tiny.transfer(tmp_path / "module", student=other, out=tmp_path / "graft", **options(short_text))
    assert graft.report.verification.done
    assert {site.role for site in graft.checkpoint.modules} == {
        "decoder.attn.query", "decoder.attn.value", "decoder.ffn.up"
    }  # fmt: skip
    names = "self_attn.[qv]_proj" if family == "bart" else "layer.0.SelfAttention.[qv]"
    trained(tmp_path / "back-module", other, rf"decoder\..*{names}", None, "AutoModel")
    back = tiny.transfer(tmp_path / "back-module", student=base, out=tmp_path / "back", **options(short_text))
    assert back.report.verification.done
    assert len(back.checkpoint.modules) == 4


def test_what_has_no_counterpart_is_refused_with_the_reason(tmp_path: Path, short_text: Path) -> None:
    bart, base = saved(tmp_path / "bart", "bart"), bert(tmp_path / "bert")
    trained(tmp_path / "module", bart, ["q_proj", "v_proj"])
    with pytest.raises(PlanError, match=r"decoder\.attn\.query: the student has no counterpart.*has no decoder"):
        tiny.transfer(tmp_path / "module", student=base, **options(short_text))
    trained(tmp_path / "cross", bart, r".*encoder_attn\.[qv]_proj")
    with pytest.raises(PlanError, match=r"cross\.query: the student has no counterpart.*without the cross attention"):
        tiny.transfer(tmp_path / "cross", student=llama(tmp_path / "llama"), **options(short_text))
    gated = saved(tmp_path / "gated", "mt5")
    trained(tmp_path / "gate", gated, ["wi_0"])
    with pytest.raises(PlanError, match=r"coder\.ffn\.gate: the student has no counterpart"):
        tiny.transfer(tmp_path / "gate", student=bart, **options(short_text))


def test_an_alignment_of_encoder_decoders_serves_every_module(tmp_path: Path, short_text: Path) -> None:
    base, other = saved(tmp_path / "base", "t5"), saved(tmp_path / "other", "bart", 1)
    found = tiny.align(base, other, text=short_text, max_tokens=1500, out=tmp_path / "alignment")
    trained(tmp_path / "module", base, ["q", "v", "wo"])
    graft = tiny.transfer(tmp_path / "module", student=other, alignment=tmp_path / "alignment")
    assert graft.report.method == "prune-align"
    pair = Space(0, "decoder.cross.memory"), Space(0, "decoder.cross.memory")
    assert torch.equal(graft.alignment.map(pair).indices, found.map(pair).indices)
    shapes = [describe_config(transformers.AutoConfig.from_pretrained(name)) for name in (base, other)]
    few = spaces_of_roles(*shapes, roles=["decoder.cross.query"])
    assert {pair[0].name for pair in few} == {"decoder.cross.in", "decoder.cross.query.out", "tokens.out"}


def test_layer_maps_by_stack(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", "bart")
    trained(tmp_path / "module", base, BART_TARGETS)
    student = saved(tmp_path / "student", "bart", 1, encoder_layers=1, decoder_layers=2)
    how = {"student": student, "method": "copy"}
    graft = tiny.transfer(tmp_path / "module", layers="encoder=avg;decoder=0,2", **how)
    assert graft.report.layers == {"encoder": [[0, 1]], "decoder": [[0], [2]]}
    with pytest.raises(PlanError, match=r"decoder=0,1: .*expected encoder, decoder.*found decoder"):
        tiny.transfer(tmp_path / "module", layers="decoder=0,1", **how)
    with pytest.raises(PlanError, match="expected 1 numbers"):
        tiny.transfer(tmp_path / "module", layers="0,2", **how)


@needs_adapters
@pytest.mark.filterwarnings("ignore:.past_key_value. is deprecated:FutureWarning")
@pytest.mark.parametrize(("teacher", "student"), [("t5", "mt5"), ("bart", "mbart"), ("mbart", "t5")])
def test_adapterhub_modules_move_between_encoder_decoders(
    teacher: str, student: str, tmp_path: Path, short_text: Path
) -> None:
    """Adapters after every block, cross attention included; layers left out are counted through both stacks."""
    import adapters

    base = saved(tmp_path / "base", teacher)
    depths = {"num_layers": 3, "num_decoder_layers": 2} if "t5" in student else {
        "encoder_layers": 3, "decoder_layers": 2}  # fmt: skip
    other = saved(tmp_path / "other", student, 1, d_model=24, **depths)
    config = adapters.DoubleSeqBnConfig(cross_adapter=True, leave_out=[1, 2], reduction_factor=8)
    tiny.adapterhub_module(tmp_path / "module", base, config, head=None)
    same = tiny.transfer(tmp_path / "module", student=base, method="copy", out=tmp_path / "same")
    assert same.report.verification.output_change > 0
    same_module(tmp_path / "module", tmp_path / "same")
    graft = tiny.transfer(tmp_path / "module", student=other, out=tmp_path / "graft", **options(short_text))
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
    (tmp_path / "text.txt").write_text("\n".join(tiny.sentences(150)))
    graft = tiny.transfer(
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
