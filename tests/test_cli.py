"""The command as a process: what a user types, sees and gets back."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest

from peft_graft.inspection import Inspection
from peft_graft.report import GraftReport

COMMAND = [sys.executable, "-m", "peft_graft"]
ENVIRONMENT = {**os.environ, "COLUMNS": "120"}


def run(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, env=ENVIRONMENT, check=False, timeout=120
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def test_transfer_writes_a_checkpoint_and_says_what_it_did(world, tmp_path) -> None:
    done = run("transfer", world / "lora", "--student", world / "narrow", "--text", world / "text.txt", "--polish", "6",
               "--out", tmp_path / "g")  # fmt: skip
    assert "its graft agrees best with the teacher on held-out text" in done.stdout
    assert "tried   prune-align, as moved: agreement" in done.stdout
    assert "agreement after steps 0:" in done.stdout
    assert "verdict" in done.stdout
    assert "layer 1 attn.value" in done.stdout
    assert "written" in done.stdout
    assert done.stderr == "", "no progress bars where there is no terminal"
    assert {"adapter_config.json", "adapter_model.safetensors", "graft.json", "README.md"} == {
        path.name for path in (tmp_path / "g").iterdir()
    }


def test_json_is_all_that_goes_to_standard_output(world, tmp_path) -> None:
    done = run("transfer", world / "lora", "--student", world / "shallow", "--method", "copy", "--layers", "avg",
               "--out", tmp_path / "g", "--head", "drop", "--json")  # fmt: skip
    report = GraftReport.model_validate_json(done.stdout)
    assert report.layers == [[0, 1], [2, 3]]
    assert report.head is None
    assert report == GraftReport.model_validate_json((tmp_path / "g" / "graft.json").read_text())


def test_inspect_a_module(world) -> None:
    done = run("inspect", world / "lora")
    assert "attn.query" in done.stdout
    assert "0-3" in done.stdout
    found = Inspection.model_validate_json(run("inspect", world / "lora", "--json").stdout)
    assert (found.format, found.kind, found.task) == ("peft", "lora", "token-classification")
    assert [site.widths for site in found.sites] == [[4], [4]]
    assert found.student is None


def test_inspect_plans_a_transfer_without_weights(world, tmp_path) -> None:
    student = tmp_path / "weightless"
    student.mkdir()
    (student / "config.json").write_text((world / "narrow" / "config.json").read_text())
    found = Inspection.model_validate_json(run("inspect", world / "lora", "--student", student, "--json").stdout)
    assert found.student is not None
    assert found.student.problem is None
    assert found.student.layers == [[0], [2]]
    assert found.student.needs_text is True
    assert 0.1 < found.student.weights_mib < 10
    # Four layers of 4 x 32 x 32 + 2 x 32 x 48 and two of 4 x 24 x 24 + 2 x 24 x 48, and the teacher's pooler.
    assert found.student.forwards_per_token == 4 * 7168 + 2 * 4608 + 32 * 32
    assert found.student.least_seconds > 0
    assert "prune-align" in run("inspect", world / "lora", "--student", student).stdout


def test_inspect_reports_problems_and_fails(world, tmp_path) -> None:
    done = run("inspect", world / "lora", "--student", tmp_path / "none", code=1)
    assert "cannot:" in done.stdout
    done = run("inspect", world / "lora", "--teacher", world / "wide")
    assert "not the base of this module" in done.stdout


def test_align_once_and_transfer_from_it(world, tmp_path) -> None:
    done = run("align", world / "teacher", world / "narrow", "--text", world / "text.txt", "--out", tmp_path / "a",
               "--sites", "attn.query,attn.value")  # fmt: skip
    assert "layer 2 attn.in" in done.stdout
    done = run("transfer", world / "lora", "--student", world / "narrow", "--alignment", tmp_path / "a",
               "--out", tmp_path / "g")  # fmt: skip
    assert "the method of the given alignment" in done.stdout
    done = run("align", world / "teacher", world / "narrow", "--text", world / "text.txt", "--out", tmp_path / "b",
               "--json")  # fmt: skip
    assert "0/attn.in -> 0/attn.in" in json.loads(done.stdout)["pairs"]


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
def test_mistakes_end_in_one_line_and_a_code(tmp_path, arguments: list[str], code: int, message: str) -> None:
    done = subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, env=ENVIRONMENT, cwd=tmp_path, check=False
    )
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_transfer_leaves_nothing(world, tmp_path) -> None:
    (tmp_path / "long.txt").write_text((world / "text.txt").read_text() * 60)
    (tmp_path / "outputs").mkdir()
    code, seen = _interrupt(
        b"pairing tokens", "transfer", world / "lora", "--student", world / "narrow", "--text", tmp_path / "long.txt",
        "--max-tokens", 100_000_000, "--out", tmp_path / "outputs" / "g",
    )  # fmt: skip
    assert code == 130
    assert b"interrupted; nothing was written" in seen
    assert list((tmp_path / "outputs").iterdir()) == []


def test_an_interrupted_polish_says_how_to_go_on(world, tmp_path) -> None:
    code, seen = _interrupt(
        b"/100000", "transfer", world / "lora", "--student", world / "shallow", "--method", "copy", "--text",
        world / "text.txt", "--polish", 100_000, "--out", tmp_path / "g",
    )  # fmt: skip
    assert code == 130
    assert b"the same command goes on from there" in seen
    assert [path.name for path in tmp_path.iterdir()] == ["g.unfinished"]


def _interrupt(when: bytes, *arguments: object) -> tuple[int, bytes]:
    """Send the command an interrupt once it shows a text on its terminal; its exit code and all that it showed."""
    terminal, theirs = pty.openpty()  # a terminal, so that progress shows when the long stage has begun
    process = subprocess.Popen(
        [*COMMAND, *map(str, arguments)], stdout=subprocess.DEVNULL, stderr=theirs,
        env={**ENVIRONMENT, "TERM": "xterm"},
        # A shell starts what it puts in the background with interrupts ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    os.close(theirs)
    try:
        seen = _read_until(terminal, when)
        assert process.poll() is None, "the command ended before it could be interrupted"
        process.send_signal(signal.SIGINT)
        seen += _read_until(terminal, b"nothing was written")
        return process.wait(timeout=60), seen
    finally:
        process.kill()
        os.close(terminal)


def _read_until(terminal: int, text: bytes, seconds: float = 60) -> bytes:
    seen, end = b"", time.monotonic() + seconds
    while text not in seen and time.monotonic() < end:
        if select.select([terminal], [], [], 1)[0]:
            try:
                seen += os.read(terminal, 4096)
            except OSError:  # the other side has closed
                break
    return seen


def test_help_names_every_option_of_the_documentation() -> None:
    text = " ".join(run("transfer", "--help").stdout.split())
    options = """--student --out --teacher --layers --method --text --max-tokens --alignment --head --polish --seed
        --device --dtype --force --json --columns"""
    for option in options.split():
        assert option in text
