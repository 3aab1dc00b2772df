"""Files that a stranger made: refused before they cost memory or time, and their words shown as words."""

from __future__ import annotations

import json
import os
import resource
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from peft_graft.alignment.alignment import Alignment
from peft_graft.alignment.maps import LinearMap, Selection
from peft_graft.checkpoints.read import locate, read_checkpoint
from peft_graft.errors import AlignmentError, CheckpointError, GraftError, ModelError, StudyError, plain, reason
from peft_graft.files import read_json, read_tensors
from peft_graft.labels import declared_names
from peft_graft.models.loading import load_config
from peft_graft.models.spaces import Space
from peft_graft.study.read_study import read_study

ESCAPES = "\x1b]0;owned\x07\x1b[31m[bold red]\n| `x` | <script>\u202e"


@pytest.fixture
def module(world: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(world / "lora", tmp_path / "module"))


def config_of(module: Path, **changes: object) -> None:
    path = module / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---- tensors ---------------------------------------------------------------------------------------------------------


def test_a_tensor_larger_than_its_file_takes_no_memory(tmp_path: Path) -> None:
    torch.save({"a": torch.as_strided(torch.ones(1), (16_000, 16_000), (0, 0))}, tmp_path / "a.bin")
    assert (tmp_path / "a.bin").stat().st_size < 2_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(
        CheckpointError, match=r"a\.bin: tensor a has fewer values in the file than its shape \[16000, "
    ):
        read_tensors(tmp_path / "a.bin")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


def test_an_archive_that_unpacks_to_more_than_it_is(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1000, 100)}, tmp_path / "plain.bin")
    with zipfile.ZipFile(tmp_path / "plain.bin") as plain_file, \
            zipfile.ZipFile(tmp_path / "bomb.bin", "w", zipfile.ZIP_DEFLATED) as bomb:  # fmt: skip
        for part in plain_file.infolist():
            bomb.writestr(part.filename, plain_file.read(part))
    assert read_tensors(tmp_path / "plain.bin")["a"].shape == (1000, 100)
    with pytest.raises(CheckpointError, match=r"it is compressed, or unpacks to more than there is"):
        read_tensors(tmp_path / "bomb.bin")


@pytest.mark.filterwarnings("ignore")  # torch's, of sparse and quantised tensors
@pytest.mark.parametrize(
    ("value", "found"),
    [
        (torch.ones(2, 2).to(torch.float8_e4m3fn), "float8_e4m3fn"),
        (torch.ones(2, 2, dtype=torch.complex64), "complex64"),
        (torch.empty(2, 2, device="meta"), "on the meta device, without values"),
        (torch.eye(2).to_sparse(), "torch.sparse_coo of float32"),
    ],
)
def test_tensors_in_which_nothing_is_computed(value: torch.Tensor, found: str, tmp_path: Path) -> None:
    torch.save({"a": value}, tmp_path / "a.bin")
    with pytest.raises(
        CheckpointError, match=f"tensor a is no ordinary tensor; expected values of .*, found {found}. Fix"
    ):
        read_tensors(tmp_path / "a.bin")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (
            {"model": {}, "optimizer": {}, "epoch": 3},
            r"model \(dict\), optimizer \(dict\), epoch \(int\)\. Fix: save the",
        ),
        ({1: torch.ones(1)}, r"1 \(Tensor\)"),
        ({None: torch.ones(1)}, r"None \(Tensor\)"),
        ([torch.ones(1)], "list"),
    ],
)
def test_files_that_hold_more_than_tensors_by_name(content: Any, found: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.bin")
    with pytest.raises(CheckpointError, match=f"the file holds no plain dictionary of tensors; found {found}"):
        read_tensors(tmp_path / "a.bin")


def test_whole_numbers_are_no_factors(module: Path) -> None:
    path = module / "adapter_model.safetensors"
    save_file({name: value.to(torch.int8) for name, value in load_file(path).items()}, path)
    with pytest.raises(CheckpointError, match=r"holds int8, which no module is trained in; expected float32, "):
        read_checkpoint(module)


def test_shapes_that_do_not_fit_each_other(module: Path) -> None:
    path = module / "adapter_model.safetensors"
    values = load_file(path)
    name = next(name for name in values if name.endswith("classifier.weight"))
    save_file(values | {name: torch.ones(3)}, path)
    with pytest.raises(
        GraftError, match=r"out.weight of the head has another shape.*expected \[labels, d\], found \[3\]"
    ):
        raise GraftError(str(tiny.inspect(module).teacher_problem))


def test_a_name_longer_than_any_path(module: Path) -> None:
    path = module / "adapter_model.safetensors"
    save_file(load_file(path) | {"a" * 5000: torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match="a tensor's name is longer than any path in a model; expected 1000"):
        read_checkpoint(module)


# ---- JSON ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000, "RecursionError"),
        ('{"a":' * 80 + "1" + "}" * 80, "nested more than 64 deep"),
        ('{"a": ' + "9" * 5000 + "}", "Exceeds the limit"),
        ('{"a": "' + "x" * (33 << 20) + '"}', "larger than 32 MiB"),
    ],
)
def test_json_that_no_library_writes(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(CheckpointError, match=f"the file is not readable JSON .*{message}"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"lora_alpha": "x"},
            "lora_alpha has a value that means nothing here; expected a valid number, found 'x'. Fix",
        ),
        ({"lora_alpha": None}, "lora_alpha has .*found None"),
        ({"alpha_pattern": {"query": [1]}}, r"alpha_pattern.query has .*expected a valid number, found \[1\]"),
        ({"modules_to_save": [1]}, "modules_to_save.0 has .*expected a valid string, found 1"),
        ({"peft_type": ["LORA"]}, r"peft_type has .*found \['LORA'\]"),
        ({"auto_mapping": "x"}, "auto_mapping has .*found 'x'"),
        ({"base_model_name_or_path": {"a": 1}}, "base_model_name_or_path has .*found {'a': 1}"),
    ],
)
def test_options_of_another_type(changes: dict[str, Any], message: str, module: Path) -> None:
    config_of(module, **changes)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(module)


@pytest.mark.parametrize("labels", [["a", "b"], {"a": "b"}, {"0": "a", "2": "b"}, "x", 3])
def test_label_names_of_another_form_are_none(labels: Any, module: Path) -> None:
    (module / "config.json").write_text(json.dumps({"id2label": labels}))
    assert read_checkpoint(module).labels is None


# ---- alignments and studies ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": 1}, r"its reading has shape \[5, 3\], expected \[4, 3\]"),
        ({"numbers": 1}, "expected 3 numbers of units below 4"),
        ({"pairs": {"0/attn.in -> 0/attn.in": {"teacher_size": "x"}}}, r"pairs\..*teacher_size has .*found 'x'"),
        ({"pairs": [1]}, r"pairs has a value that means nothing here.*found \[1\]"),
        ({"teacher": None}, "teacher has .*found None"),
        ({"method": ["ridge"]}, "method has .*"),
        ({"format_version": 9}, "the alignment was written by another version; found method 'ridge', format 9"),
    ],
)
def test_saved_alignments_that_do_not_fit(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    pair = Space(0, "attn.in"), Space(0, "attn.in")
    rows = 5 if change.pop("shape", None) else 4
    space_map = LinearMap(torch.rand(rows, 3), None, torch.rand(4))
    if change.pop("numbers", None):
        space_map = Selection(torch.tensor([0, 1, 7]), 4)
    Alignment("ridge", "a", "b", {pair: space_map}).save_pretrained(tmp_path / "a")
    path = tmp_path / "a" / "alignment.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises((AlignmentError, CheckpointError), match=message):
        Alignment.from_pretrained(tmp_path / "a")


@pytest.mark.parametrize(
    ("content", "changes", "message"),
    [
        ("a = " + "[" * 5000, [], "cannot be read"),
        ("name = 'x'\ndefaults = 3\ngrid = [{}]", [], "defaults are no table, but int"),
        ("name = 'x'\nmodels = {}\n[tasks.ner]\nkind = ['a']", [], r"tasks\.ner"),
        ("grid = [{}]", ["grid.7=1"], "names nothing in this list of the study; found 7"),
        ("grid = [{}]", ["grid.x=1"], "names nothing in this list of the study; found x"),
    ],
)
def test_study_files(content: str, changes: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(content)
    with pytest.raises(StudyError, match=message):
        read_study(tmp_path / "s.toml", changes)


# ---- words and links -------------------------------------------------------------------------------------------------


def test_a_message_is_one_line_without_codes() -> None:
    said = str(CheckpointError(ESCAPES, where=ESCAPES, expected=ESCAPES, found=[ESCAPES], fix=ESCAPES))
    assert said.isprintable()
    assert plain("a\nb\x1b[0m\u202e") == r"a\nb\x1b[0m\u202e"
    assert len(str(CheckpointError("a" * 10**6, found="b" * 10**6))) < 3000
    assert [reason(error) for error in (KeyError("x"), ValueError("one\ntwo"), OSError(), TypeError(""))] == [
        "KeyError: 'x'", "one", "OSError", "TypeError",
    ]  # fmt: skip


def test_words_of_a_module_reach_the_terminal_as_words(command, module: Path) -> None:
    config_of(module, base_model_name_or_path=ESCAPES)
    labels = {str(number): f"{ESCAPES}{number}" for number in range(5)}
    (module / "config.json").write_text(json.dumps({"id2label": labels}))
    shown = command("inspect", module, code=1).out
    assert not set("\x1b\x07\u202e") & set(shown)
    assert r"base model   \x1b]0;owned\x07\x1b[31m[bold red]\n| `x` | <script>\u202e" in shown
    as_json = command("inspect", module, "--json", code=1).out
    assert not set("\x1b\x07\u202e") & set(as_json)
    assert json.loads(as_json)["labels"] == list(labels.values())
    config_of(module, peft_type=f"{ESCAPES}:smile:")
    assert (
        r"\x1b[31m[bold red]\n| `x` | <script>\u202e:smile: cannot be moved" in command("inspect", module, code=1).err
    )


def test_words_of_a_module_reach_the_card_as_words(world: Path, tmp_path: Path) -> None:
    labels = [f"{ESCAPES}{number}" for number in range(5)]
    tiny.peft_lora(tmp_path / "module", world / "teacher", labels=labels)
    (tmp_path / "module" / "config.json").write_text(json.dumps({"id2label": dict(enumerate(labels))}))
    tiny.transfer(tmp_path / "module", student=world / "teacher", method="copy", out=tmp_path / "graft")
    card = (tmp_path / "graft" / "README.md").read_text()
    assert not set("\x1b\x07\u202e") & set(card)
    assert "<script>" not in card.partition("## Load it")[0]
    row = next(line for line in card.splitlines() if line.startswith("| head |"))
    assert row.replace(r"\|", "").count("|") == 3, "its cells are those of the table"


@pytest.mark.parametrize("target", ["/dev/zero", "/etc/passwd", "adapter_config.json", "..", "/nowhere"])
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "config.json"])
def test_links_in_a_folder_of_a_module(name: str, target: str, module: Path) -> None:
    (module / name).unlink(missing_ok=True)
    (module / name).symlink_to(target)
    if name == "config.json" and target != "/etc/passwd":  # a module need not have one
        assert read_checkpoint(module).labels is None
    else:
        with pytest.raises(CheckpointError) as refused:
            read_checkpoint(module)
        assert "root:" not in str(refused.value)


def test_what_a_folder_holds_beside_a_module_is_not_looked_into(module: Path) -> None:
    (module / "optimizer.pt").symlink_to("/etc/passwd")
    os.mkfifo(module / "pipe.json")
    assert read_checkpoint(module).files.keys() == {"adapter_config.json", "adapter_model.safetensors"}


def test_names_that_the_file_system_or_a_host_would_be_asked_for() -> None:
    with pytest.raises(CheckpointError, match="the folder cannot be opened .*File name too long"):
        locate("a" * 5000)
    with pytest.raises(ModelError, match="the teacher is named by an address; expected a folder or a hub id"):
        load_config("http://127.0.0.1:1/config.json", role="teacher")
    with pytest.raises(ModelError, match="the teacher cannot be loaded"):
        load_config("a" * 5000, role="teacher")


@pytest.mark.parametrize("numbers", [{"inf": "A"}, {float("inf"): "A"}, {"x": "A"}, {None: "A"}, {0: "A", 2: "B"}])
def test_numbers_of_labels_that_are_none_name_nothing(numbers: dict) -> None:
    assert declared_names(numbers) == ()
