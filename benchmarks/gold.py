"""TRL's GOLD beside the grafts of a study: the same teacher, prompts, answers, student, steps and scores.

    pip install trl==1.16.0        # needs transformers 5
    python benchmarks/gold.py benchmarks/decoders.toml --out out/decoders \\
        --teacher SmolLM2 --student Gemma-3 --task snips

takes the teacher that the study has trained in ``--out``, has it answer the prompts, trains a fresh LoRA by GOLDTrainer
and adds the student's record to ``--export``. Byte offsets need byte-level tokenizers; where one is not, positions are
compared in order, as TRL's documentation asks (``use_extended_uld=False``). Settings other than TRL's: the merge that
reads logits where they predict a token ("bayesian"; "observed", its default, reads them one token late), the hybrid
loss, ends of answers learnt, and the learning rate of a LoRA.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset

from peft_graft.config import Library
from peft_graft.distill.generate import Sampling, generate_answers
from peft_graft.environment import hardware, versions
from peft_graft.prompts.template import Template
from peft_graft.study.cells import GraftCell
from peft_graft.study.data import read_unlabelled
from peft_graft.study.folder import StudyFolder
from peft_graft.study.grids import cells_of
from peft_graft.study.modules import load_module, new_module
from peft_graft.study.read_study import read_study
from peft_graft.study.results import export
from peft_graft.study.spec import Study
from peft_graft.study.training import score


def main() -> None:
    """Find the teacher, let it answer, train, score, note."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="the study's folder, with the teacher trained in it")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as for studies")
    for name in ("teacher", "student", "task"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--on-policy", type=float, default=0.5, help="share of steps on the student's own answers")
    parser.add_argument("--crossentropy", type=float, default=0.0, help="weight of the text of the answers beside them")
    parser.add_argument("--prompts", type=int, help="at most so many")
    parser.add_argument("--export", type=Path, help="a .jsonl file of results")
    args = parser.parse_args()

    study = read_study(args.study, args.set)
    cell = _graft_cell(study, args.teacher, args.student, args.task)
    folder = StudyFolder(args.out)
    result, tokens = _run(cell, folder, args)
    start = f"TRL GOLD, {args.steps} steps, on-policy {args.on_policy:g}"
    if args.crossentropy:
        start += f", cross-entropy {args.crossentropy:g}"
    names = cell.names.model_dump(exclude_none=True, include={"teacher", "student", "module", "task", "language"})
    record = {
        "id": f"student-{'-'.join(names.values())}-gold-{args.steps}-{args.on_policy:g}-{args.crossentropy:g}",
        "kind": "student",
        "names": {**names, "start": start, "budget": 0, "seed": 0},
        "config": {
            "training": {
                "learning_rate": args.rate,
                "lmbda": args.on_policy,
                "steps": args.steps,
                "uld_crossentropy_weight": args.crossentropy,
            }
        },
        "needs": {"teacher": cell.needs.teacher},
        "result": result,
        "hardware": hardware(study.device),
        "versions": versions(),
        "finished": time.time(),
    }
    print(f"{result['metric']} {result['score']:.3f}, {result['seconds']['all']:.0f} s, {tokens} tokens of answers")
    if args.export:
        export([record], args.export, study=study.name)


def _graft_cell(study: Study, teacher: str, student: str, task: str) -> GraftCell:
    wanted = (teacher, student, task)
    for cell in cells_of(study).values():
        if isinstance(cell, GraftCell) and (cell.names.teacher, cell.names.student, cell.names.task) == wanted:
            return cell
    raise SystemExit(f"the study has no graft of {task} from {teacher} to {student}")


def _run(cell: GraftCell, folder: StudyFolder, args: argparse.Namespace) -> tuple[dict[str, Any], int]:
    config, needs = cell.config, cell.needs
    if not needs.teacher or not folder.is_done(needs.teacher):
        raise SystemExit(f"{folder.path} has no {needs.teacher}: run the study first, with --only '{needs.teacher}'")
    task, _, _, test = config.examples.read()
    prompts = read_unlabelled(config.examples.spec, config.examples.language)[: args.prompts]
    teachers, students = (transformers.AutoTokenizer.from_pretrained(name) for name in (config.teacher, config.student))
    teacher = load_module(config.teacher, folder.artifact(needs.teacher), Library.PEFT, task).to(config.device)
    start = time.perf_counter()
    sampling = Sampling(max_new_tokens=task.max_new_tokens)
    answers = generate_answers(teacher, task.template(teachers), prompts, sampling)
    answering = time.perf_counter() - start

    template = task.template(students)
    pairs = [(prompt, answer.text) for prompt, answer in zip(prompts, answers, strict=True) if answer.ended]
    rows = [row for prompt, answer in pairs if (row := _row(template, prompt, answer))]
    model = new_module(config.student, Library.PEFT, task, 0, {"r": 8, "lora_alpha": 16})
    trainer = _trainer((model, students), (teacher, teachers), rows, args, task.max_new_tokens)
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    model = trainer.model.eval()
    result = {
        "metric": task.metric,
        "score": score(model, task.questions(test, students), students, task),
        "seconds": {
            "asking the teacher": round(answering, 1),
            "training": round(seconds, 1),
            "all": round(answering + seconds, 1),
        },
        "extended": trainer.args.use_extended_uld,
        "examples": 0,
        "prompts": len(rows),
        "test_examples": len(test),
        "loss": [round(entry["loss"], 4) for entry in trainer.state.log_history if "loss" in entry],
    }
    return result, sum(sum(row["completion_mask"]) for row in rows)


def _row(template: Template, prompt: Any, answer: str) -> dict[str, Any] | None:
    """A prompt and its answer as GOLD's own preparation writes them, but tokenized apart, as they are generated.

    Together, a blank or a brace at the seam would make a token that no prompt ends with.
    """
    completion = template.encode(prompt, answer)
    if not answer or completion.spans is None:
        return None
    before = completion.ids[: completion.start]
    end = len(answer.encode())
    offsets = [(0, 0)] * len(before) + completion.spans + [(end, end)]
    return {
        "input_ids": completion.ids,
        "attention_mask": [1] * len(completion.ids),
        "byte_offsets": offsets,
        "completion_mask": [0] * len(before) + [1] * (len(completion.ids) - len(before)),
        "original_prompt_text": template.text(prompt),
        "original_completion_text": answer,
    }


def _trainer(student: Any, teacher: Any, rows: list[dict[str, Any]], args: argparse.Namespace, longest: int) -> Any:
    from trl.experimental.gold import GOLDConfig, GOLDTrainer
    from trl.experimental.utils import is_byte_level_tokenizer

    class Prepared(GOLDTrainer):  # type: ignore[misc]
        """Takes rows that are tokenized."""

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

    (model, students), (teaching, teachers) = student, teacher
    for tokenizer in (students, teachers):
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    extended = all(is_byte_level_tokenizer(one.backend_tokenizer) for one in (students, teachers))
    config = GOLDConfig(
        output_dir=str(args.out / "work" / "gold"),
        max_steps=args.steps,
        per_device_train_batch_size=16,
        learning_rate=args.rate,
        warmup_steps=args.steps // 20,
        lmbda=args.on_policy,
        max_completion_length=longest,
        max_length=1024,
        use_uld_loss=True,
        use_extended_uld=extended,
        uld_token_merge_strategy="bayesian",
        uld_use_hybrid_loss=True,
        uld_crossentropy_weight=args.crossentropy,
        uld_skip_student_eos=False,
        uld_skip_teacher_eos=False,
        teacher_tokenizer_name_or_path=teachers.name_or_path,
        logging_steps=25,
        save_strategy="no",
        report_to=[],
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        remove_unused_columns=False,
    )
    return Prepared(
        model=model,
        teacher_model=teaching,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=students,
    )


if __name__ == "__main__":
    main()
