"""A shelf of modules: each graft is what it would be alone, and an interruption or a failure costs no other."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from safetensors.torch import load_file

import peft_graft
import tiny
from peft_graft import Callback, GraftConfig, ShelfModule, ShelfReport, transfer_all
from peft_graft.errors import PlanError
from peft_graft.shelf import SHELF, read_list

CONFIG = GraftConfig(method="ridge", polish=0, max_tokens=1500, head="carry")


class Stages(Callback):
    """Counts stages, by module and name."""

    def __init__(self) -> None:
        self.begun: Counter[str] = Counter()

    def on_stage_begin(self, stage: str) -> None:
        self.begun[stage] += 1


@pytest.fixture(scope="module")
def modules(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Modules at other sites of one teacher, one of another teacher, and a folder without any."""
    root = tmp_path_factory.mktemp("modules")
    shutil.copytree(world / "lora", root / "first")
    tiny.peft_lora(root / "second", world / "teacher", targets=["key", "dense"], seed=7)
    tiny.peft_lora(root / "other", world / "wide", targets=["value"], seed=8)
    (root / "broken").mkdir()
    return root


def shelf(modules: Path, world: Path, out: Path, *names: str, **options) -> tuple[ShelfReport, Counter[str]]:
    stages = Stages()
    chosen = [modules / name for name in names]
    arguments = {"text": world / "text.txt", "config": CONFIG, "callbacks": [stages]} | options
    return transfer_all(chosen, world / "narrow", out=out, **arguments), stages.begun


@pytest.fixture(scope="module")
def whole(modules: Path, world: Path, tmp_path_factory: pytest.TempPathFactory):
    """A shelf on which one module fails."""
    out = tmp_path_factory.mktemp("whole") / "shelf"
    return *shelf(modules, world, out, "first", "other", "broken", "second"), out


def test_a_graft_of_a_shelf_is_the_one_of_the_module_alone(whole, modules, world, tmp_path) -> None:
    _, begun, out = whole
    for name in ("first", "second"):
        alone = peft_graft.transfer(modules / name, world / "narrow", text=world / "text.txt", config=CONFIG)
        alone.save_pretrained(tmp_path / name)
        files = [load_file(folder / name / "adapter_model.safetensors") for folder in (out, tmp_path)]
        assert files[0].keys() == files[1].keys()
        assert all(files[0][key].equal(files[1][key]) for key in files[0])
        reports = [json.loads((folder / name / "graft.json").read_text()) for folder in (out, tmp_path)]
        for report in reports:
            del report["seconds"]
            for model in ("teacher", "student"):
                del report["cost"][model]["seconds"]
        assert reports[0] == reports[1]
    # The second needs other spaces than the first, and no pass of its own; the other teacher's module does.
    assert {stage for stage in begun if "aligning the models" in stage} == {
        "first: aligning the models",
        "other: aligning the models",
    }


def test_a_module_that_fails_costs_no_other_and_says_why(whole, modules) -> None:
    report, _, out = whole
    assert [(one.name, one.state) for one in report.modules] == [
        ("first", "written"),
        ("other", "written"),
        ("broken", "failed"),
        ("second", "written"),
    ]
    assert str(modules / "broken") in report.failed[0].error
    assert ShelfReport.model_validate_json((out / SHELF).read_text()) == report
    assert {path.name for path in out.iterdir()} == {"first", "second", "other", SHELF, "report.html"}
    # What is paid once for each teacher, and what for each module.
    assert [one.first for one in report.modules] == [True, True, False, False]
    assert report.first_seconds > 0
    assert report.next_seconds == report.modules[3].seconds


def test_finished_grafts_are_kept_and_known_by_what_they_are(whole, modules, world, tmp_path) -> None:
    report, _, out = whole
    shutil.copytree(out, tmp_path / "again")
    shutil.copytree(modules / "second", tmp_path / "modules" / "first")  # another module of the same name
    written = (tmp_path / "again" / "second" / "graft.json").stat().st_mtime_ns
    again, begun = shelf(modules, world, tmp_path / "again", "second", "first")
    assert [(one.state, one.seconds) for one in again.modules] == [
        ("kept", report.modules[3].seconds),
        ("kept", report.modules[0].seconds),
    ]
    assert {stage.split(": ")[1] for stage in begun} == {"loading models"}
    assert (tmp_path / "again" / "second" / "graft.json").stat().st_mtime_ns == written
    other, _ = shelf(tmp_path / "modules", world, tmp_path / "again", "first")
    assert other.failed[0].error.startswith(
        f"{tmp_path / 'again' / 'first'}: something else is there, and no graft of this module with these models"
    )
    forced, _ = shelf(
        tmp_path / "modules", world, tmp_path / "again", "first", config=CONFIG.model_copy(update={"force": True})
    )
    assert forced.modules[0].state == "written"


def test_an_interruption_leaves_what_is_finished(modules, world, tmp_path) -> None:
    class Impatient(Callback):
        def on_stage_begin(self, stage: str) -> None:
            if stage == "second: solving alignments" or stage == "second: writing and verifying":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shelf(modules, world, tmp_path / "out", "first", "second", callbacks=[Impatient()])
    assert [one["name"] for one in json.loads((tmp_path / "out" / SHELF).read_text())["modules"]] == ["first"]
    report, _ = shelf(modules, world, tmp_path / "out", "first", "second")
    assert [one.state for one in report.modules] == ["kept", "written"]


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ([], "there is no module to move. Fix: name some, or a --list of them"),
        (
            ["a/lora", "b/LoRA"],
            "LoRA: two modules would be written to the same folder; found a/lora and b/LoRA. "
            'Fix: name them in a list: {"adapter": "...", "name": "..."}',
        ),
        (
            [ShelfModule(adapter="a", name="../b")],
            'a: not the name of a folder; found ../b. Fix: name them in a list: {"adapter": "...", "name": "..."}',
        ),
        (
            [ShelfModule(adapter="a", name="shelf.json")],
            "a: not the name of a folder; found shelf.json. "
            'Fix: name them in a list: {"adapter": "...", "name": "..."}',
        ),
    ],
)
def test_names_that_clash_are_refused_before_anything_is_read(listed, message, tmp_path) -> None:
    with pytest.raises(PlanError) as caught:
        transfer_all(listed, "no-such-student", out=tmp_path / "out")
    assert str(caught.value) == message
    assert not (tmp_path / "out").exists()


def test_a_module_in_the_folder_of_nobody_has_a_name_all_the_same() -> None:
    assert ShelfModule(adapter="~nobody-of-this-name/tags").folder == "tags"
    assert ShelfModule(adapter="~/tags").folder == "tags"


def test_a_list_names_modules_and_what_is_theirs_alone(tmp_path) -> None:
    path = tmp_path / "list"
    path.write_text('# mine\nme/one\n\n{"adapter": "two", "name": "b", "text": "b.jsonl", "teacher": "T"}\n')
    assert read_list(path) == [
        ShelfModule(adapter="me/one"),
        ShelfModule(adapter="two", name="b", text="b.jsonl", teacher="T"),
    ]
    path.write_text('me/one\n{"adaptor": "two"}')
    with pytest.raises(PlanError) as caught:
        read_list(path)
    assert str(caught.value) == (
        f"--list {path}, line 2: not a module (adapter: Field required); expected a folder, a hub id, or JSON with "
        'adapter, name, teacher, text, seeds, found {"adaptor": "two"}'
    )
    with pytest.raises(PlanError, match=r"--list .*missing: the list cannot be read \(.*No such file"):
        read_list(tmp_path / "missing")


def test_the_command_moves_several_and_ends_with_1_where_one_failed(command, modules, world, tmp_path) -> None:
    (tmp_path / "list").write_text(f'{{"adapter": "{modules / "broken"}", "name": "bad"}}\n')
    options = ["--student", world / "shallow", "--method", "copy", "--out", tmp_path / "out"]
    done = command("transfer", modules / "first", "--list", tmp_path / "list", *options, code=1)
    assert "first" in done.out
    assert "failed  bad:" in done.out
    silent = command("transfer", modules / "first", "--list", tmp_path / "list", *options, "--quiet", code=1)
    assert silent.out == ""
    assert silent.err.startswith("error: bad: ")
    found = json.loads(command("transfer", modules / "first", modules / "second", *options, "--json").out)
    assert [(one["name"], one["state"]) for one in found["modules"]] == [("first", "kept"), ("second", "written")]
    assert "there is no module to move" in command("transfer", *options, code=1).err
