"""The tokenizer beside a written module: there as it is, or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers

import peft_graft
import tiny
from peft_graft import Graft, GraftConfig
from peft_graft.checkpoints.beside import write_beside
from peft_graft.errors import ModelError
from peft_graft.models.loading import load_model

COPY = GraftConfig(method="copy")
TEXT = "Maria moved to Lisbon."
FILES = {"tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(scope="module")
def graft(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Graft:
    out = tmp_path_factory.mktemp("beside") / "graft"
    config = GraftConfig(method="copy", labels=tiny.LABELS)
    return peft_graft.transfer(world / "lora", world / "shallow", out=out, config=config)


def test_the_tokenizer_lies_beside_the_module(graft: Graft, world: Path) -> None:
    assert graft.folder is not None
    assert {path.name for path in graft.folder.iterdir()} >= FILES
    beside = transformers.AutoTokenizer.from_pretrained(graft.folder)
    assert beside(TEXT)["input_ids"] == transformers.AutoTokenizer.from_pretrained(world / "shallow")(TEXT)["input_ids"]
    assert Graft.from_pretrained(graft.folder).tokenizer(TEXT)["input_ids"] == beside(TEXT)["input_ids"]


def test_a_pipeline_has_the_head_and_its_names(graft: Graft) -> None:
    assert graft.folder is not None
    found = Graft.from_pretrained(graft.folder).pipeline(aggregation_strategy="none")(TEXT)
    assert {word["entity"] for word in found} <= set(tiny.LABELS)
    assert found == graft.pipeline(aggregation_strategy="none")(TEXT)


def test_a_tagger_gives_whole_entities_by_the_first_token_of_each_word(graft: Graft) -> None:
    tokenizer = graft.tokenizer
    logits = graft.model.eval()(**tokenizer(TEXT, return_tensors="pt")).logits[0]
    words = tokenizer(TEXT).word_ids()
    first = [words.index(number) for number in range(max(word for word in words if word is not None) + 1)]
    tags = [tiny.LABELS[logits[place].argmax()] for place in first]
    found = graft.pipeline()(TEXT)
    begun = [tag for tag, before in zip(tags, ["O", *tags], strict=False) if tag[:2] == "B-" or tag[2:] != before[2:]]
    assert [one["entity_group"] for one in found] == [tag[2:] for tag in begun if tag != "O"]
    assert found


def test_what_has_no_pipeline_says_so(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.peft_lora(tmp_path / "bare", world / "teacher", task="base", labels=())
    bare = peft_graft.transfer(tmp_path / "bare", world / "shallow", config=COPY)
    monkeypatch.setattr(transformers.pipelines, "get_supported_tasks", lambda: ["text-classification"])
    with pytest.raises(ModelError) as caught:
        bare.pipeline()
    assert str(caught.value) == (
        f"the graft: transformers {transformers.__version__} has no pipeline for this; found base. "
        "Fix: call graft.model itself"
    )


def written(world: Path, out: Path, tokenizer: object) -> tuple[list[str], set[str]]:
    """Remarks and files of a module beside this tokenizer."""
    student = load_model(str(world / "shallow"))
    student.tokenizer = tokenizer
    raw = peft_graft.transfer(world / "lora", world / "shallow", config=COPY).raw
    out.mkdir()
    return write_beside(out, raw, student, ()), {path.name for path in out.iterdir()}


def test_templates_and_side_go_along_and_the_last_batch_does_not(world: Path, tmp_path: Path) -> None:
    """What a run has set on the tokenizer it asked with, cutting and filling, is no part of it."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(world / "shallow", padding_side="left")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer([TEXT, TEXT * 9], truncation=True, max_length=5, padding="max_length")
    assert written(world, tmp_path / "out", tokenizer)[0] == []
    saved = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    assert saved["truncation"] is None
    assert saved["padding"] is None
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.chat_template == tokenizer.chat_template
    assert again.padding_side == "left"


def test_several_templates_keep_their_folder_open_to_all(world: Path, tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(world / "shallow")
    tokenizer.chat_template = {"default": "{{ messages[0]['content'] }}", "tool_use": "{{ tools }}"}
    student = transformers.AutoModel.from_pretrained(world / "shallow")
    graft = peft_graft.transfer(world / "lora", student, config=COPY, tokenizers=(None, tokenizer))
    graft.save_pretrained(tmp_path / "out")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.chat_template == tokenizer.chat_template


def test_a_copy_that_reads_otherwise_is_left_out_with_a_word(world: Path, tmp_path: Path) -> None:
    """One whose class takes texts apart by more than its files say."""
    own = transformers.PreTrainedTokenizerFast

    def call(self, text, *others, **options):
        return own.__call__(self, text.upper(), *others, **options)

    loaded = transformers.AutoTokenizer.from_pretrained(world / "narrow")
    forgetful = type(own.__name__, (own,), {"__call__": call})(tokenizer_object=loaded.backend_tokenizer)
    remarks, files = written(world, tmp_path / "out", forgetful)
    assert remarks == [
        "the student's tokenizer was not written beside the module, for its copy does not tokenize as it does"
    ]
    assert files == set()


def test_a_tokenizer_with_more_tokens_than_embeddings_stays_where_it_is(world: Path, tmp_path: Path) -> None:
    """``AutoPeftModel`` would resize the student for it."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(world / "shallow")
    tokenizer.add_tokens([f"<{number}>" for number in range(201 - len(tokenizer))])
    remarks, files = written(world, tmp_path / "out", tokenizer)
    assert remarks == [
        "the student's tokenizer was not written beside the module, for it has 201 tokens and the student 200 "
        "embeddings, which peft would resize"
    ]
    assert files == set()
