"""A language model's module moves by plain text: the teacher's distributions at the tokens of documents."""

from __future__ import annotations

import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers

import peft_graft
import speech
import tiny
from peft_graft import GraftConfig
from peft_graft.alignment.text import Sample
from peft_graft.checkpoints.read import read_checkpoint
from peft_graft.checkpoints.resolve import resolve
from peft_graft.cli.display import planned
from peft_graft.cli.result import show_graft
from peft_graft.distill import token_targets
from peft_graft.distill.ask_documents import DocumentAsking
from peft_graft.distill.completions import Templates
from peft_graft.distill.teacher import sample_parts
from peft_graft.errors import GraftError, PlanError, TextError
from peft_graft.models.loading import ModelPair, load_model
from peft_graft.page.graft import graft_page
from peft_graft.prompts.template import Template
from peft_graft.run import Run


def documents(count: int = 240, seed: int = 0) -> list[str]:
    """What the module was trained on, as text: a word and its answer."""
    return [f"{word} ={speech.answer(word)}" for word in speech.words(count, seed)]


def ask(root: Path, student: str = "stranger", texts: list[str] | None = None, **options):
    """The teacher's module, and what the student learns from it, without a transfer around it."""
    models = ModelPair(*(load_model(str(root / name), tokenizer=True) for name in ("teacher", student)))
    checkpoint = resolve(read_checkpoint(root / "module"), models.teacher.architecture, models.teacher.base_tensors())
    both = (Template.of(model.tokenizer, format="{prompt}") for model in (models.teacher, models.student))
    parts = sample_parts(map(Sample, texts or documents(80)))
    return checkpoint, DocumentAsking(Templates(*both), **options).ask(checkpoint, models, parts, Run(), train=100)


@pytest.fixture(scope="module")
def moved(speakers, tmp_path_factory) -> peft_graft.Graft:
    out = tmp_path_factory.mktemp("moved") / "graft"
    config = GraftConfig(polish=100)
    return peft_graft.transfer(speakers / "module", speakers / "stranger", text=documents(), config=config, out=out)


def test_a_module_moves_to_a_stranger_by_plain_text(moved):
    """On text that was held out it is nearer to the teacher than a fresh module, which says what the student does."""
    report = moved.report
    measured, read = report.verdict.measured, report.documents
    assert measured.agreement > 0.5
    assert measured.agreement_interval[0] < measured.agreement < measured.agreement_interval[1]
    assert measured.divergence < 0.5 * read.bare_divergence
    assert report.tried.keys() == {"fresh, as moved"}
    assert report.tried["fresh, as moved"].agreement == pytest.approx(0, abs=1e-4)
    assert (read.documents, read.held_out, read.judging) == (192, 48, 24)
    assert (read.cut, read.too_short) == (0, 0)
    assert 0.5 < read.strict_share < 1  # two letters that one of them has one token for
    assert read.module_effect > 1
    nats = read.nats_a_byte
    assert nats["teacher"] < nats["teacher base"]
    assert nats["graft"] < nats["student"]
    assert report.pairing is None, "nothing was aligned"
    assert report.polish.settings.batch_size == 16


def test_figures_are_those_of_the_written_graft(moved, speakers):
    """By transformers' own logits, of all that was held out to judge."""
    template = Template.of(transformers.AutoTokenizer.from_pretrained(speakers / "stranger"), format="{prompt}")
    base = transformers.AutoModelForCausalLM.from_pretrained(speakers / "stranger", dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, moved.folder).eval()
    judging = sample_parts(map(Sample, documents())).judging
    nats = size = 0.0
    for sample in judging:
        ids = torch.tensor([template.tokenizer(sample.first)["input_ids"]])
        with torch.inference_mode():
            nats += float(torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum"))
        size += len(sample.first.encode()) - len(template.tokenizer.decode(ids[0, :1]))
    assert moved.report.documents.nats_a_byte["graft"] == pytest.approx(nats / size, rel=1e-3)


def test_what_is_said_of_it(moved, capsys):
    show_graft(moved.report, moved.folder)
    said = " ".join(capsys.readouterr().out.split())
    assert "documents 192 to learn from, 48 held out" in said
    page = graft_page(moved.report, "graft")
    for sentence in moved.report.documents.verdict(moved.report.verdict.measured):
        assert sentence in page
    assert "nats from the teacher; the student without it" in page
    assert "documents learned from" in page


def test_the_same_model_and_module_are_at_one_everywhere(speakers):
    checkpoint, asked = ask(speakers, student="teacher")
    assert asked.record.strict_share == 1
    assert asked.columns.student.is_whole
    assert asked.train.sizes == [len(row) - 1 for row in asked.train.inputs], "of the first nothing foretells anything"
    attached = asked.attach(checkpoint)
    assert asked.measure(attached).divergence < 1e-6
    graft = peft_graft.transfer(speakers / "module", speakers / "teacher", text=documents(60))
    assert graft.report.verdict.level == "exact"
    assert graft.report.method == "copy"
    assert graft.report.polish is None


def test_live_models_speak_as_those_on_disk_do(speakers):
    tokenizer = transformers.AutoTokenizer.from_pretrained(speakers / "teacher")
    base, student = (transformers.AutoModelForCausalLM.from_pretrained(speakers / "teacher") for _ in range(2))
    adapted = peft.PeftModel.from_pretrained(base, speakers / "module")
    graft = tiny.transfer_live(
        adapted, None, student, teacher_tokenizer=tokenizer, student_tokenizer=tokenizer, text=documents(60)
    )
    assert graft.report.documents.strict_share == 1
    assert graft.report.verdict.level == "exact"


def test_a_copy_in_another_order_is_exact(speakers, tmp_path):
    speech.in_another_order(speakers / "teacher", tmp_path / "copy")
    graft = peft_graft.transfer(speakers / "module", tmp_path / "copy", text=documents(120))
    assert graft.report.method == "prune-align"
    assert graft.report.verdict.level == "exact"
    assert graft.report.verdict.measured.divergence < 1e-4


def test_only_distributions_are_learned_and_no_text(speakers):
    _, asked = ask(speakers)
    assert not any(map(len, asked.train.text))
    assert asked.columns.shared < len(asked.columns.student.ids)
    attached = asked.attach(untrained(asked))
    with torch.no_grad():
        bare = sum(asked.bare) / asked.held_out.positions
        assert float(asked.loss(attached, list(range(len(asked.train))))) == pytest.approx(bare, rel=0.3)


def untrained(asked):
    """A module of the student that changes nothing."""
    folder = Path(asked.models.student.name)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"])
    peft.get_peft_model(model, config).save_pretrained(folder.parent / "neutral-of-documents")
    raw = read_checkpoint(folder.parent / "neutral-of-documents")
    return resolve(raw, asked.models.student.architecture, asked.models.student.base_tensors())


def test_logits_in_small_chunks_say_the_same(speakers, monkeypatch):
    whole = ask(speakers)[1]
    monkeypatch.setattr(token_targets, "CHUNK_BYTES", 4 * 300 * 2)  # two positions
    parts = ask(speakers)[1]
    assert parts.record.module_effect == pytest.approx(whole.record.module_effect, rel=1e-5)
    assert parts.bare == pytest.approx(whole.bare, rel=1e-5)
    for one, other in zip(whole.train.log_p, parts.train.log_p, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_long_documents_are_cut_at_a_word_and_short_ones_left_out(speakers):
    long = [" ".join(documents(12, seed)) for seed in range(30)]
    texts = [*documents(60), *long, "a"]
    _, asked = ask(speakers, texts=texts, longest=40)
    assert (asked.record.cut, asked.record.too_short, asked.record.longest) == (30, 1, 40)
    assert max(asked.train.lengths) <= 40
    tokenizer = asked.templates.student.tokenizer
    cut = [row for row in asked.train.inputs if row[-1] != tokenizer.eos_token_id]
    assert cut
    for row in cut:  # without an end, after a whole word
        text = tokenizer.decode(row)
        assert any(one.startswith(f"{text} ") for one in long)


def test_a_document_that_is_one_word_and_longer_than_is_read_is_cut_within_it(speakers):
    _, asked = ask(speakers, texts=["ab" * 20 + word for word in speech.words(60)], longest=10)
    assert asked.record.cut == 60
    assert max(asked.train.lengths) <= 10


# ---- what is said before any weights ---------------------------------------------------------------------------------


def test_inspect_says_what_would_be_learned(speakers, capsys):
    texts = [*documents(100), " ".join(documents(80)), "b"]
    found = peft_graft.inspect(
        speakers / "module", speakers / "stranger", text=texts, config=GraftConfig(max_length=30)
    ).student
    read = found.documents
    assert (read.documents, read.held_out, read.looked_at) == (82, 20, 102)
    assert (read.cut, read.too_short, read.longest) == (1, 1, 30)
    assert 8 < read.tokens < 16
    assert 0.5 < read.strict_share < 1
    assert found.prompts is None
    assert found.polish_steps == 21  # four passes in batches of 16
    assert found.training_mib > 0
    assert found.method == "the best of fresh to begin with, then what the teacher says next is learned"
    facts = {str(name): str(text) for name, text in zip(*(c.cells for c in planned(found).columns), strict=True)}
    assert (
        "82 documents to learn from, 20 held out; of the first 102, 1 cut after 30 tokens, 1 too short" in facts["text"]
    )
    assert "alignment" not in facts


def test_without_a_polish_moved_weights_are_what_there_is(speakers):
    found = peft_graft.inspect(
        speakers / "module", speakers / "stranger", text=documents(60), config=GraftConfig(polish=0)
    ).student
    assert "prune-align, procrustes, ridge, functional" in found.method


# ---- what is left to hidden states, and what is refused --------------------------------------------------------------


def test_models_without_an_output_layer_are_compared_by_hidden_states(speakers, tmp_path):
    """An embedding model's checkpoint says that it is a bare model; and inspect says so too."""
    base = transformers.AutoModel.from_pretrained(speakers / "teacher", dtype=torch.float32)
    base.save_pretrained(tmp_path / "bare")
    for file in (speakers / "teacher").glob("*token*"):
        shutil.copy(file, tmp_path / "bare")
    options = {"text": documents(60), "method": "copy", "polish": 0}
    graft = tiny.transfer(speakers / "module", tmp_path / "bare", **options)
    why = (
        "the last hidden states are compared, and not what the models say next: "
        f"{tmp_path / 'bare'}: the model has no output layer"
    )
    assert why in graft.report.notes
    assert graft.report.documents is None
    assert graft.report.verdict.measured.carried is not None
    assert why in tiny.inspect(speakers / "module", tmp_path / "bare", **options).student.notes


def test_output_layers_that_are_missing_in_the_file_are_noticed(speakers, tmp_path):
    """Whatever the configuration says."""
    shutil.copytree(speakers / "teacher", tmp_path / "named")
    base = transformers.AutoModel.from_pretrained(speakers / "teacher", dtype=torch.float32)
    base.config.architectures = ["LlamaForCausalLM"]
    (tmp_path / "named" / "model.safetensors").unlink()
    base.save_pretrained(tmp_path / "named")
    config = (tmp_path / "named" / "config.json").read_text().replace('"LlamaModel"', '"LlamaForCausalLM"')
    (tmp_path / "named" / "config.json").write_text(config)
    graft = tiny.transfer(speakers / "module", tmp_path / "named", text=documents(60), method="copy", polish=0)
    assert any("has no output layer" in note for note in graft.report.notes)
    assert graft.report.documents is None


def test_tokenizers_that_have_nothing_in_common_leave_hidden_states(speakers, tmp_path):
    """One of words, and one of bytes."""
    shutil.copytree(speakers / "stranger", tmp_path / "words")
    for file in (tmp_path / "words").glob("*token*"):
        file.unlink()
    tiny.tokenizer(tmp_path / "words", kind="words")
    texts = tiny.sentences(80)
    found = tiny.inspect(speakers / "module", tmp_path / "words", text=texts)
    assert any("the last hidden states are compared" in note for note in found.student.notes), found.student
    assert found.student.documents is None


def test_a_module_for_features_is_compared_by_hidden_states(speakers, tmp_path):
    shutil.copytree(speakers / "module", tmp_path / "features")
    path = tmp_path / "features" / "adapter_config.json"
    path.write_text(path.read_text().replace('"CAUSAL_LM"', '"FEATURE_EXTRACTION"'))
    found = tiny.inspect(tmp_path / "features", speakers / "stranger", text=documents(60)).student
    assert found.documents is None
    assert any("the module is for features" in note for note in found.notes)


def refused(kind: type[GraftError], match: str, root: Path, **options) -> None:
    module, text = options.pop("module", root / "module"), options.pop("text", documents(60))
    with pytest.raises(kind, match=match):
        tiny.transfer(module, root / "stranger", text=text, **{"polish": 5, **options})


def test_choices_about_answers_are_refused(speakers):
    refused(PlanError, "--learn text: this is about answers to prompts, and the text is plain", speakers, learn="text")
    refused(PlanError, "--on-policy: this is about answers to prompts", speakers, on_policy=0.5)


def test_documents_of_single_tokens_are_refused(speakers, tmp_path):
    """Between tokenizers that have these words whole, and write nothing before a text."""
    for name in ("teacher", "stranger"):
        shutil.copytree(speakers / name, tmp_path / name)
        words = [f"{one}{other}" for one in tiny.WORDS[:8] for other in tiny.WORDS[8:16]]
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / name)
        tokenizer.add_tokens(words)
        tokenizer.save_pretrained(tmp_path / name)
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
        model.resize_token_embeddings(len(tokenizer))
        model.save_pretrained(tmp_path / name)
    refused(TextError, "--text: the documents are too short: of a single token.*found 64 of one token", tmp_path,
            module=speakers / "module", teacher=tmp_path / "teacher", text=words)  # fmt: skip


def test_text_on_which_the_module_changes_nothing_is_refused(speakers, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(speakers / "teacher", dtype=torch.float32)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
    adapted = peft.get_peft_model(model, config)
    for name, value in adapted.named_parameters():
        if "lora_B" in name:
            value.data += 1e-7
    adapted.save_pretrained(tmp_path / "idle")
    refused(TextError, "--text: the module changes nothing on this text.*at least 0.001 nats", speakers,
            module=tmp_path / "idle")  # fmt: skip
