"""Study tasks of question answering: the ends of answers as a model is trained on them, and answers as it is scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from peft_graft.alignment.tokens import Span, trimmed_spans
from peft_graft.distill.answer_spans import LONGEST, NOWHERE, PASSAGE, Answered, Places
from peft_graft.labelled.examples import AnsweredQuestion
from peft_graft.labelled.scores import CLASS_METRICS
from peft_graft.study.tasks import Example, StudyTask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: What a row holds that is not for the model.
ABOUT = ("spans", "texts", "answers")


@dataclass(frozen=True)
class AnsweringTask(StudyTask):
    """A task whose answers are marked in a text; ``labels``: none."""

    def encode(self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
        """Model inputs with the first and last token of the first accepted answer, not padded.

        They are the token of no answer where there is none, or it is cut off.
        """
        rows = []
        for example, row in zip(examples, self.questions(examples, tokenizer), strict=True):
            assert isinstance(example, AnsweredQuestion)
            first, last = NOWHERE, NOWHERE
            if example.place:
                first, last = Places(row["spans"]).of(Span(PASSAGE, *example.place))
            kept = {key: value for key, value in row.items() if key not in ABOUT}
            rows.append({**kept, "start_positions": first, "end_positions": last})
        return rows

    def questions(self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
        """What a model is scored on: its inputs, with the texts, the characters of its tokens and the answers."""
        rows, longest = [], min(LONGEST, tokenizer.model_max_length)
        for example in examples:
            assert isinstance(example, AnsweredQuestion)
            encoding = tokenizer(*example.texts, truncation=True, max_length=longest, return_offsets_mapping=True)
            spans = trimmed_spans(example.texts, encoding.sequence_ids(0), encoding["offset_mapping"])
            inputs = {key: encoding[key] for key in encoding if key != "offset_mapping"}
            rows.append({**inputs, "spans": spans, "texts": example.texts, "answers": example.answers})
        return rows

    def score_answers(self, logits: Sequence[Tensor], rows: Sequence[dict[str, Any]]) -> float:
        """The score of logits [2, length] of the rows of ``questions``."""
        may_be_none = any(not row["answers"] for row in rows)
        answers = [
            Answered.of(own, row["texts"], row["spans"], may_be_none=may_be_none).text
            for own, row in zip(logits, rows, strict=True)
        ]
        metric = CLASS_METRICS[self.metric.lower().replace(" ", "-")]
        return metric.score([[answer] for answer in answers], [row["answers"] for row in rows], self.labels)

    def majority_score(self, test: Sequence[Example]) -> float:
        """Nothing is to be had for always giving the same answer."""
        return 0.0
