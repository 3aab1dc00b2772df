"""One look for all commands: help, JSON, errors, quiet and verbose."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import peft_graft
from peft_graft.cli.late import with_options
from peft_graft.cli.results import ErrorResult
from peft_graft.cli.schemas import RESULTS, schema_of

VERBS = ("inspect", "transfer", "align", "compose", "evaluate", "export", "report", "study", "demo", "schema")


@pytest.mark.parametrize("verb", VERBS)
def test_help_fits_a_screen_and_names_everything(command, verb: str) -> None:
    short = command(verb, "--help", columns=80).out
    assert all(len(line) <= 80 for line in short.splitlines() if "peft-graft " not in line)
    assert len(short.splitlines()) <= 55
    assert "Example\n  peft-graft " in short
    assert "130 interrupted" in short
    whole = command(verb, "--help-all", columns=80).out
    for each in with_options(verb).entries:
        if each.name != "help_all" and each.default is not each.empty:
            name = (
                {"as_json": "json", "changes": "set", "ids": "list", "listed": "list"}.get(each.name, each.name)
                .rstrip("_")
                .replace("_", "-")
            )
            assert f"--{name}" in whole or name in ("file", "adapters")
            assert f"--{name}" in short or name in ("file", "adapters")


def test_choices_are_shown_whole(command) -> None:
    short = command("transfer", "-h", columns=80).out
    assert "auto, carry, fit, drop: " in short
    assert "float32, float16, bfloat16: " in short
    assert "-o, --out PATH" in short
    assert "--help-all" in short
    assert "[auto]" in command("transfer", "--help-all", columns=80).out


def test_exit_codes_stand_on_the_first_page(command) -> None:
    assert "143 ended by SIGTERM" in " ".join(command("--help", columns=80).out.split())


@pytest.mark.parametrize("verb", [*RESULTS])
def test_every_result_has_a_schema(command, verb: str) -> None:
    shown = json.loads(command("schema", verb).out)
    assert shown == schema_of(verb)
    assert shown["type"] == "object"
    if verb in ("transfer", "align", "compose", "evaluate", "export", "report", "study", "demo"):
        assert "out" in shown["required"]


@pytest.mark.parametrize(
    ("arguments", "code", "problem"),
    [
        (
            ["inspect", "nowhere"],
            1,
            {"kind": "CheckpointError", "message": "no such folder", "where": "nowhere"},
        ),
        (
            ["transfer", "m", "--student", "s", "--out", "o", "--method", "wish"],
            1,
            {"kind": "PlanError", "message": "unknown choice", "where": "--method", "found": "wish"},
        ),
        (["transfer", "m", "--student", "s"], 2, {"kind": "UsageError", "where": "--out"}),
        (["trasnfer"], 2, {"kind": "UsageError"}),
        (["schema", "graft"], 1, {"kind": "PlanError", "where": "schema graft"}),
    ],
)
def test_errors_are_json_too(command, monkeypatch, tmp_path, arguments, code: int, problem: dict[str, str]) -> None:
    monkeypatch.chdir(tmp_path)
    done = command(*arguments, "--json", code=code)
    found = ErrorResult.model_validate_json(done.out).error
    assert {name: getattr(found, name) for name in problem} == problem
    assert found.message
    assert done.err
    assert command(*arguments, code=code).out == ""


def test_an_interrupted_command_says_so_as_json(command, monkeypatch) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(peft_graft, "inspect", stopped)
    done = command("inspect", "m", "--json", code=130)
    assert json.loads(done.out)["error"]["kind"] == "Interrupted"


def test_quiet_shows_nothing_and_verbose_more(command, world) -> None:
    quiet = command("inspect", world / "lora", "--quiet")
    assert (quiet.out, quiet.err) == ("", "")
    assert command("inspect", world / "nowhere", "-q", code=1).err.startswith("error: ")
    problem = command("inspect", world / "lora", "--student", world / "nowhere", "-q", code=1)
    assert problem.out == ""
    assert "nowhere: the student" in problem.err


@pytest.fixture(scope="module")
def moved(world, tmp_path_factory):
    """A small graft that was written."""
    config = peft_graft.GraftConfig(polish=6, max_tokens=2000)
    out = tmp_path_factory.mktemp("moved") / "g"
    return peft_graft.transfer(world / "lora", world / "narrow", text=world / "text.txt", out=out, config=config), out


@pytest.mark.parametrize("columns", [80, 40])
def test_a_result_begins_with_the_verdict_and_fits(moved, capsys, monkeypatch, columns: int) -> None:
    from peft_graft.cli.output import look
    from peft_graft.cli.result import show_graft

    monkeypatch.setenv("COLUMNS", str(columns))
    graft, out = moved
    show_graft(graft.report, out)
    lines = capsys.readouterr().out.splitlines()
    assert "verdict: " in lines[0]
    assert all(len(line) <= columns for line in lines if str(out) not in line and "README" not in line)
    assert not [line for line in lines if "layer 1 attn.value" in line]
    assert f"written {out}" in lines
    assert f"load it graft = peft_graft.Graft.from_pretrained({str(out)!r}).model" in lines
    assert any('graft.pipeline()("text")' in line for line in lines)
    monkeypatch.setattr(look, "verbose", True)
    show_graft(graft.report, out)
    assert "agreement after steps 0:" in capsys.readouterr().out


def test_completion_knows_verbs_and_options() -> None:
    asked = {"_PEFT_GRAFT_COMPLETE": "complete_bash", "COMP_CWORD": "2", "COMP_WORDS": "peft-graft transfer --polis"}
    done = subprocess.run(
        [sys.executable, "-m", "peft_graft"], env={"PATH": "/usr/bin", "PYTHONPATH": ":".join(sys.path), **asked},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.split() == ["--polish"], done.stderr
