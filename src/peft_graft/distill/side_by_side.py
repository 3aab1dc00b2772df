"""Language models asked side by side: the same prompts put to each, and their answers scored against known ones."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from peft_graft.checkpoints.attached import AttachedModel
from peft_graft.config import EvaluateConfig
from peft_graft.distill.ask_prompts import longest_text
from peft_graft.distill.generate import Answer, AnswerStore, Sampling, generate_answers
from peft_graft.distill.likelihood import answer_losses
from peft_graft.distill.sides import EvaluatedPrompt, Row, Score, SpeakingSide, score_of
from peft_graft.errors import TextError
from peft_graft.metrics import METRICS, score_answers
from peft_graft.models.fingerprint import tokenizer_fingerprint
from peft_graft.models.output import LanguageModel, language_model
from peft_graft.prompts.conversation import Prompt
from peft_graft.prompts.read import PromptLike, PromptSource
from peft_graft.run import Run

#: The metric that scores no answers of its own, and what it is called by bytes in place of tokens.
NLL, NLL_BYTE = "nll", "nll/byte"


# ---- what is asked ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """Prompts with references. ``too_long``: how many were left out for their length."""

    source: PromptSource
    prompts: Sequence[Prompt]
    too_long: int

    @staticmethod
    def of(text: PromptLike, sides: Sequence[SpeakingSide], metrics: Sequence[str], config: EvaluateConfig) -> Asked:
        """The prompts that every model can read, with an answer.

        Raises:
            TextError: there are none, or some have no reference.
            GraftError: a metric cannot score these references, or its library is not installed.
        """
        source = PromptSource.of(text, config.columns, config.seed)
        if source is None:
            raise TextError(
                "the text holds no prompts",
                where=str(text) if isinstance(text, str | Path) else "given in memory",
                expected="rows with a prompt and its answer, in a file, a hub data set or a list",
                fix="name the columns with --columns prompt,answer",
            )
        found, too_long = list[Prompt](), 0
        for prompt in source.prompts():
            if len(found) == config.limit:
                break
            if all(_fits(prompt, side, metrics, config) for side in sides):
                found.append(prompt)
            else:
                too_long += 1
        if not found:
            raise TextError(
                "all prompts are longer than the models read, with an answer",
                where=source.name,
                found=too_long,
                fix="give shorter prompts, or lower --max-new-tokens",
            )
        without = sum(not prompt.references for prompt in found)
        if without:
            raise TextError(
                "prompts without an answer to score by",
                where=source.name,
                found=f"{without} of {len(found)}",
                expected="completion, response, answer or references in every row",
                fix="leave those rows out, or name the columns with --columns prompt,answer",
            )
        asked = Asked(source, found, too_long)
        for name in set(metrics) - {NLL}:  # what it cannot score it says now
            score_answers(name, asked.known, asked.references)
        return asked

    @property
    def references(self) -> list[tuple[str, ...]]:
        """The answers that are accepted."""
        return [prompt.references for prompt in self.prompts]

    @property
    def known(self) -> list[str]:
        """The answer to every prompt, the first of several."""
        return [known_answer(prompt) for prompt in self.prompts]

    @property
    def digest(self) -> str:
        """What tells these prompts and their order from any other's."""
        return hashlib.sha256(json.dumps([prompt.key for prompt in self.prompts]).encode()).hexdigest()

    def said(self, rows: Sequence[Row]) -> list[EvaluatedPrompt]:
        """Every prompt with all answers."""
        return [
            EvaluatedPrompt(
                prompt=prompt.text,
                references=list(prompt.references),
                answers={row.record.name: row.answers[number].text for row in rows if row.answers},
            )
            for number, prompt in enumerate(self.prompts)
        ]


def known_answer(prompt: Prompt) -> str:
    """The answer that came with a prompt, or the first of several; empty where there is none."""
    return prompt.answer if prompt.answer is not None else next(iter(prompt.references), "")


def _fits(prompt: Prompt, side: SpeakingSide, metrics: Sequence[str], config: EvaluateConfig) -> bool:
    """Whether a model can read a prompt with the longest answer that is asked for."""
    longest = (config.max_new_tokens or 0) if set(metrics) - {NLL} else 0
    if NLL in metrics:
        longest = max(longest, len(side.template.answer_ids(known_answer(prompt))) + 1)
    return side.raw.virtual_tokens + len(side.template.ids(prompt)) + longest <= longest_text(side.handle)


# ---- what comes of it ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measuring:
    """Asks models and scores their answers."""

    asked: Asked
    metrics: Sequence[str]
    config: EvaluateConfig
    run: Run

    def rows(self, side: SpeakingSide) -> list[Row]:
        """A model without and with its module, as far as wanted; its weights are let go of afterwards."""
        with self.run.stage(f"loading the {side.role}"):
            handle, bf16 = side.loaded(), self.config.dtype == "bfloat16"
        found = []
        key = [handle.speaking_key, tokenizer_fingerprint(side.template.tokenizer)]
        if side.bare:
            found.append(self._row(side, side.bare, language_model(handle, bf16=bf16), key))
        attached = side.attached(handle, bf16=bf16)
        return [*found, self._row(side, side.whole, attached, [*key, attached.checkpoint.digest])]

    def _row(self, side: SpeakingSide, name: str, model: AttachedModel | LanguageModel, key: Sequence[str]) -> Row:
        answers, scores = list[Answer](), dict[str, Score]()
        if set(self.metrics) - {NLL}:
            answers = self._answers(side, name, model, key)
        for metric in self.metrics:
            if metric == NLL:
                scores |= self._likelihood(side, name, model)
            else:
                scores[metric] = self._score(metric, [answer.text for answer in answers])
        return Row(side.record(name, scores, answers), answers)

    def _answers(
        self, side: SpeakingSide, name: str, model: AttachedModel | LanguageModel, key: Sequence[str]
    ) -> list[Answer]:
        stage, template, config = f"asking the {name}", side.template, self.config
        sampling = Sampling(
            max_new_tokens=side.settings.max_new_tokens, temperature=config.temperature, seed=config.seed
        )
        store = None
        if self.run.work:
            whole = [
                *key,
                self.asked.digest,
                sampling.model_dump(),
                template.format,
                template.system,
                template.args,
                config.dtype,
                config.quantization_config,
            ]
            store = AnswerStore(self.run.work, name.replace(" ", "-"), json.dumps(whole, default=str))
        with self.run.stage(stage):
            return generate_answers(
                model.model,
                template,
                self.asked.prompts,
                sampling,
                bf16=model.bf16,
                store=store,
                progress=lambda done, total: self.run.progress(stage, done, total),
            )

    def _likelihood(self, side: SpeakingSide, name: str, model: AttachedModel | LanguageModel) -> dict[str, Score]:
        stage = f"reading the answers by the {name}"
        with self.run.stage(stage):
            losses = answer_losses(
                model,
                side.template,
                self.asked.prompts,
                self.asked.known,
                lambda done, total: self.run.progress(stage, done, total),
            )
        counts = [(loss.nats, loss.tokens, loss.size) for loss in losses]
        scores = {NLL: score_of(counts, lambda sums, count: sums[0] / sums[1], self.config.seed)}
        if any(loss.size for loss in losses):
            scores[NLL_BYTE] = score_of(counts, lambda sums, count: sums[0] / max(1.0, sums[2]), self.config.seed)
        return scores

    def _score(self, name: str, answers: Sequence[str]) -> Score:
        metric, references = METRICS[name], self.asked.references
        if metric.counts is None or metric.of_sums is None:
            return Score(value=score_answers(name, answers, references))
        return score_of(metric.counts(answers, references), metric.of_sums, self.config.seed)
