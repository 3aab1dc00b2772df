"""The command: what a user types, sees and gets back. As a process where signals and exit codes are the point."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest

import peft_graft
import processes
from peft_graft._inspect import Inspection
from peft_graft.report import GraftReport

COMMAND = [sys.executable, "-m", "peft_graft"]
ENVIRONMENT = {**os.environ, "COLUMNS": "120"}


def test_transfer_writes_a_checkpoint_and_says_what_it_did(command, world, text, tmp_path) -> None:
    done = command("transfer", world / "lora", "--student", world / "narrow", "--text", text,
                   "--polish", "6", "--out", tmp_path / "g", "--verbose")  # fmt: skip
    assert "its graft agrees best with the teacher on held-out text" in done.out
    assert "tried   prune-align, as moved: agreement" in done.out
    assert "agreement after steps 0:" in done.out
    assert "verdict" in done.out
    assert "layer 1 attn.value" in done.out
    assert "written" in done.out
    assert done.err == "", "no progress bars where there is no terminal"
    assert {
        "adapter_config.json",
        "adapter_model.safetensors",
        "graft.json",
        "README.md",
        "report.html",
        "tokenizer.json",
        "tokenizer_config.json",
    } == {path.name for path in (tmp_path / "g").iterdir()} - {"special_tokens_map.json"}  # which transformers 4 adds


def test_json_is_all_that_goes_to_standard_output(command, world, tmp_path) -> None:
    done = command("transfer", world / "lora", "--student", world / "shallow", "--method", "copy", "--layers", "avg",
                   "--out", tmp_path / "g", "--head", "drop", "--json")  # fmt: skip
    found = json.loads(done.out)
    assert found.pop("out") == str(tmp_path / "g")
    assert found.pop("pushed") is None
    report = GraftReport.model_validate(found)
    assert report.layers == [[0, 1], [2, 3]]
    assert report.head is None
    assert report == GraftReport.model_validate_json((tmp_path / "g" / "graft.json").read_text())


def test_inspect_a_module(command, world) -> None:
    done = command("inspect", world / "lora")
    assert "attn.query" in done.out
    assert "0-3" in done.out
    found = Inspection.model_validate_json(command("inspect", world / "lora", "--json").out)
    assert (found.module_library, found.kind, found.task) == ("peft", "lora", "token-classification")
    assert [site.widths for site in found.sites] == [[4], [4]]
    assert found.student is None


def test_inspect_plans_a_transfer_without_weights(command, world, tmp_path) -> None:
    student = tmp_path / "weightless"
    student.mkdir()
    (student / "config.json").write_text((world / "narrow" / "config.json").read_text())
    found = Inspection.model_validate_json(command("inspect", world / "lora", "--student", student, "--json").out)
    assert found.student is not None
    assert found.student.problem is None
    assert found.student.layers == [[0], [2]]
    assert found.student.needs_text is True
    assert 0.1 < found.student.weights_mib < 10
    assert found.student.passes == 1
    # Four layers of 4 x 32 x 32 + 2 x 32 x 48 and two of 4 x 24 x 24 + 2 x 24 x 48, and the teacher's pooler.
    assert found.student.forwards_per_token == 4 * 7168 + 2 * 4608 + 32 * 32
    assert found.student.least_seconds > 0
    assert "prune-align" in command("inspect", world / "lora", "--student", student).out


def test_inspect_prices_the_text_and_the_polish_and_names_the_next_command(command, world) -> None:
    given = ["inspect", world / "lora", "--student", world / "narrow", "--text", world / "text.txt"]
    found = Inspection.model_validate_json(command(*given, "--json").out).student
    assert found is not None
    assert 100 < found.text_tokens < found.max_tokens
    assert found.polish_steps == 1000
    none = Inspection.model_validate_json(command(*given, "--polish", "0", "--json").out).student
    assert none is not None
    assert none.polish_steps == 0
    assert none.least_seconds < found.least_seconds
    shown = command(*given, columns=80).out
    assert f"{found.text_tokens:,} tokens and 1,000 steps of polish" in " ".join(shown.split())
    assert re.search(
        r"take at least [\d.]+ s on this processor: asking the teacher [\d.]+ s, aligning the models [\d.]+ s, "
        r"comparing methods [\d.]+ s, fitting layers [\d.]+ s, polishing [\d.]+ s "
        r"\([\d.e-]+ s a step\)",
        " ".join(shown.split()),
    )
    *_, last, look = shown.splitlines()
    assert re.fullmatch(r"first look   the same with --polish 100: at least [\d.]+ s", look)
    assert last == (
        f"next         peft-graft transfer {world / 'lora'} --student {world / 'narrow'} --text {world / 'text.txt'} "
        "--out out/graft"
    )
    options = ["--labels", "A,B,C,D,E", "--polish", "50", "--cache", "--token", "hf_secret"]
    named = command(*given, *options).out.splitlines()[-1]
    assert {"--labels A,B,C,D,E", "--polish 50", "--cache"} <= set(re.findall(r"--(?:cache|\S+ \S+)", named))
    assert named.endswith(" --out out/graft")
    assert "hf_secret" not in named
    long = [line for line in shown.splitlines() if str(world) not in line]
    assert all(len(line) <= 80 for line in long)


def test_inspect_reports_problems_and_fails(command, world, tmp_path) -> None:
    done = command("inspect", world / "lora", "--student", tmp_path / "none", code=1)
    assert "cannot:" in done.out
    done = command("inspect", world / "lora", "--teacher", world / "wide", code=1)
    assert "not the base of this module" in done.out
    gone = command("inspect", world / "lora", "--student", world / "narrow", "--teacher", "none/here", code=1)
    assert gone.out.count("none/here: the teacher cannot be loaded") == 1
    assert "cannot: not without the teacher, see above" in gone.out
    refused = command("transfer", world / "lora", "--student", world / "narrow", "--teacher", world / "wide",
                      "--method", "copy", "--out", tmp_path / "o", code=1)  # fmt: skip
    assert refused.err.removeprefix("error: ").strip() in done.out


def test_align_once_and_transfer_from_it(command, world, tmp_path) -> None:
    done = command("align", world / "teacher", world / "narrow", "--text", world / "text.txt", "--out", tmp_path / "a",
                   "--sites", "attn.query,attn.value", "--verbose")  # fmt: skip
    assert "layer 2 attn.in" in done.out
    done = command("transfer", world / "lora", "--student", world / "narrow", "--alignment", tmp_path / "a",
                   "--out", tmp_path / "g")  # fmt: skip
    assert "the method of the given alignment" in done.out
    done = command("align", world / "teacher", world / "narrow", "--text", world / "text.txt", "--out", tmp_path / "b",
                   "--json")  # fmt: skip
    assert "0/attn.in -> 0/attn.in" in json.loads(done.out)["pairs"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["transfer", "nowhere", "--student", "x", "--out", "o"], 1, "error: nowhere: no such folder"),
        (["transfer", "nowhere", "--student", "x"], 2, "--out"),
        (["graft"], 2, "No such command"),
        (["align", "a", "b", "--text", "t.txt", "--out", "o"], 1, "error: a: the teacher cannot be loaded"),
        (["align", "a", "b", "--text", "t.txt", "--out", "o", "--method", "wish"], 1, "expected copy, prune-align"),
    ],
)
def test_mistakes_end_in_one_line_and_a_code(
    command, tmp_path, monkeypatch, arguments, code: int, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = command(*arguments, code=code)
    assert message in done.err
    assert "Traceback" not in done.err
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_as_a_process(tmp_path, monkeypatch) -> None:
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    monkeypatch.chdir(outputs)
    process = processes.start(
        processes.command, "transfer", "nowhere", "--student", "x", "--out", "o", out=tmp_path / "out",
        err=tmp_path / "err",
    )  # fmt: skip
    process.join(60)
    assert (process.exitcode, (tmp_path / "out").read_text()) == (1, "")
    assert (tmp_path / "err").read_text().startswith("error: nowhere: no such folder")
    done = subprocess.run([*COMMAND, "trasnfer"], capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "No such command 'trasnfer'" in done.stderr
    assert list(outputs.iterdir()) == []


@pytest.fixture
def terminal(monkeypatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")


def test_an_interrupted_transfer_leaves_nothing(world, tmp_path, terminal) -> None:
    (tmp_path / "long.txt").write_text((world / "text.txt").read_text() * 60)
    (tmp_path / "outputs").mkdir()
    code, seen = _interrupt(
        b"aligning the models", "transfer", world / "lora", "--student", world / "narrow",
        "--text", tmp_path / "long.txt", "--max-tokens", 100_000_000, "--method", "prune-align", "--head", "drop",
        "--out", tmp_path / "outputs" / "g",
    )  # fmt: skip
    assert code == 130
    assert b"interrupted; nothing was written" in seen
    assert list((tmp_path / "outputs").iterdir()) == []


def test_an_interrupted_polish_says_how_to_go_on(world, tmp_path, terminal) -> None:
    code, seen = _interrupt(
        b"/100,000", "transfer", world / "lora", "--student", world / "shallow", "--method", "copy", "--text",
        world / "text.txt", "--polish", 100_000, "--out", tmp_path / "g",
    )  # fmt: skip
    assert code == 130
    assert b"the same command goes on from there" in seen
    assert [path.name for path in tmp_path.iterdir()] == ["g.unfinished"]


def test_sigterm_ends_a_run_as_an_interrupt_does(command, monkeypatch, tmp_path) -> None:
    def asked_to_end(*_: object, out: object, **__: object) -> None:
        for _ in range(2):  # the second does not disturb the cleaning
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(peft_graft, "transfer", asked_to_end)
    try:
        done = command("transfer", "module", "--student", "model", "--out", tmp_path / "g", code=143)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert done.err.split("\n")[-2:] == ["interrupted; nothing was written", ""]


@pytest.mark.parametrize("arguments", ["--help", "inspect {}", "inspect {} --json", "inspect {}-none --json"])
def test_output_that_nobody_reads_ends_without_a_word(world, arguments: str) -> None:
    """As ``peft-graft ... | head``."""
    reads, writes = os.pipe()
    os.close(reads)
    called = [*COMMAND, *arguments.format(world / "lora").split()]
    done = subprocess.run(called, stdout=writes, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, check=False)
    os.close(writes)
    assert done.returncode == 141
    assert [line for line in done.stderr.splitlines() if not line.startswith("error: ")] == []


@pytest.mark.parametrize("verb", [["study", "file.toml"], ["demo"]])
def test_what_goes_on_later_says_so(command, monkeypatch, tmp_path, verb) -> None:
    monkeypatch.chdir(tmp_path)  # where no other demo is under way

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("peft_graft.study.command.study", interrupted)
    monkeypatch.setattr("peft_graft.study.demo.run_demo", interrupted)
    kept = {"study": "finished cells are kept", "demo": "finished parts are in out/demo"}[verb[0]]
    done = command(*verb, code=130)
    assert done.err == f"interrupted; {kept}, and the same command continues there\n"


def test_an_error_of_the_system_is_one_line(command, monkeypatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(24, "Too many open files", "config.json")

    monkeypatch.setattr(peft_graft, "inspect", full)
    done = command("inspect", "module", code=1)
    assert done.err == "error: config.json: cannot be read or written (Too many open files)\n"


def _interrupt(when: bytes, *arguments: object) -> tuple[int | None, bytes]:
    """Send the command an interrupt once it shows a text on its terminal; its exit code and all that it showed."""
    terminal, theirs = pty.openpty()  # a terminal, so that progress shows when the long stage has begun
    process = processes.start(processes.command, *map(str, arguments), err=os.ttyname(theirs))
    try:
        seen = _read_until(terminal, when)
        assert process.is_alive(), "the command ended before it could be interrupted"
        os.kill(process.pid, signal.SIGINT)
        os.close(theirs)
        seen += _read_until(terminal, None)
        process.join(60)
        return process.exitcode, seen
    finally:
        process.kill()
        os.close(terminal)


def _read_until(terminal: int, text: bytes | None, seconds: float = 120) -> bytes:
    """What the terminal shows up to a text, or to the end of the process."""
    seen, end = b"", time.monotonic() + seconds
    while text is None or text not in seen:
        assert time.monotonic() < end, f"{text!r} did not come, but {seen[-500:]!r}"
        if select.select([terminal], [], [], 1)[0]:
            try:
                seen += os.read(terminal, 4096)
            except OSError:  # the other side has closed
                break
    return seen


def test_help_names_every_option_of_the_documentation(command) -> None:
    text = " ".join(command("transfer", "--help").out.split())
    options = """--student --out --teacher --layers --method --text --max-tokens --alignment --head --polish --seed
        --device --dtype --force --json --columns"""
    for option in options.split():
        assert option in text


def test_the_version_and_the_short_word_for_help(command) -> None:
    assert command("--version").out == f"peft-graft {peft_graft.__version__}\n"
    assert command("-h").out == command("--help").out
    assert command("transfer", "-h").out == command("transfer", "--help").out
