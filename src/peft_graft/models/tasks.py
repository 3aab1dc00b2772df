"""What a model is for: the tasks that modules are trained on, by every name that libraries have for them."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum


class Task(StrEnum):
    """A task, as transformers names its pipelines.

    ``BASE`` is the bare model, and ``PREDICTION_HEADS`` is the bare model under the heads of the library adapters.
    ``MASKED_LM`` also stands for an encoder inside a task model of which nothing is known.
    """

    BASE = "base"
    PREDICTION_HEADS = "prediction-heads"
    TOKEN_CLASSIFICATION = "token-classification"
    SEQUENCE_CLASSIFICATION = "sequence-classification"
    CAUSAL_LM = "causal-lm"
    MASKED_LM = "masked-lm"
    QUESTION_ANSWERING = "question-answering"
    SEQ2SEQ_LM = "seq2seq-lm"
    IMAGE_CLASSIFICATION = "image-classification"

    @property
    def auto_classes(self) -> tuple[str, ...]:
        """Names of transformers' auto classes, in the order in which they are tried."""
        return _AUTO_CLASSES[self]

    @property
    def peft_type(self) -> str | None:
        """The ``task_type`` of peft's configurations, None where peft has none."""
        return next((name for name, task in _PEFT_TYPES.items() if task is self), None)

    @property
    def pipeline_tag(self) -> str | None:
        """The hub's name for pipelines of this task, None for bare models."""
        if self in (Task.BASE, Task.PREDICTION_HEADS):
            return None
        return _PIPELINES.get(self, str(self))

    def auto_class_of(self, model_type: str) -> str:
        """The auto class that users load a model of this type with."""
        known = (name for name in self.auto_classes if name in _TABLES and model_type in _table(_TABLES[name]))
        return next(known, self.auto_classes[0])

    def prefix_in(self, model_type: str) -> str | None:
        """The attribute that holds the base model where this task's class has one of its own, None for all others."""
        if self is not Task.QUESTION_ANSWERING:
            return None
        import transformers

        named = getattr(transformers, _table(_ANSWER_QUESTIONS).get(model_type, ""), None)
        return getattr(named, "base_model_prefix", None) or None

    @staticmethod
    def of_peft(task_type: str | None) -> Task | None:
        """The task of a ``task_type`` of peft, None for one that says nothing about the model's class."""
        return _PEFT_TYPES.get(task_type or "")

    @staticmethod
    def of_class(name: str) -> Task:
        """The task that a model class of transformers or adapters is for, ``BASE`` for a bare model.

        Classes that read images beside text end in the same word as encoder-decoders, and are decoders.
        """
        if any(name in _table(table).values() for table in _READ_IMAGES):
            return Task.CAUSAL_LM
        return next((task for ending, task in _CLASS_ENDINGS.items() if name.endswith(ending)), Task.BASE)


_AUTO_CLASSES = {
    Task.BASE: ("AutoModel",),
    Task.PREDICTION_HEADS: ("AutoModel",),
    Task.TOKEN_CLASSIFICATION: ("AutoModelForTokenClassification",),
    Task.SEQUENCE_CLASSIFICATION: ("AutoModelForSequenceClassification",),
    Task.CAUSAL_LM: ("AutoModelForCausalLM", "AutoModelForImageTextToText"),
    Task.MASKED_LM: ("AutoModelForMaskedLM",),
    Task.QUESTION_ANSWERING: ("AutoModelForQuestionAnswering",),
    Task.SEQ2SEQ_LM: ("AutoModelForSeq2SeqLM", "AutoModelForSpeechSeq2Seq"),
    Task.IMAGE_CLASSIFICATION: ("AutoModelForImageClassification",),
}
_PIPELINES = {
    Task.SEQUENCE_CLASSIFICATION: "text-classification",
    Task.CAUSAL_LM: "text-generation",
    Task.SEQ2SEQ_LM: "text2text-generation",
    Task.MASKED_LM: "fill-mask",
}
#: Transformers' own tables of model types and classes, for auto classes among which the type decides.
_TABLES = {
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "AutoModelForSeq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForSpeechSeq2Seq": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
}
#: That of models whose classes call the base model otherwise than its other task classes, Llama's among them.
_ANSWER_QUESTIONS = "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES"
#: Those of models that read images beside text; the second is transformers 4's alone.
_READ_IMAGES = ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "MODEL_FOR_VISION_2_SEQ_MAPPING_NAMES")
_PEFT_TYPES = {
    "TOKEN_CLS": Task.TOKEN_CLASSIFICATION,
    "SEQ_CLS": Task.SEQUENCE_CLASSIFICATION,
    "CAUSAL_LM": Task.CAUSAL_LM,
    "QUESTION_ANS": Task.QUESTION_ANSWERING,
    "SEQ_2_SEQ_LM": Task.SEQ2SEQ_LM,
}
_CLASS_ENDINGS = {
    "ForTokenClassification": Task.TOKEN_CLASSIFICATION,
    "ForSequenceClassification": Task.SEQUENCE_CLASSIFICATION,
    "ForCausalLM": Task.CAUSAL_LM,
    "LMHeadModel": Task.CAUSAL_LM,
    "ForMaskedLM": Task.MASKED_LM,
    "ForQuestionAnswering": Task.QUESTION_ANSWERING,
    "ForConditionalGeneration": Task.SEQ2SEQ_LM,
    "ForImageClassification": Task.IMAGE_CLASSIFICATION,
    "AdapterModel": Task.PREDICTION_HEADS,
    "ModelWithHeads": Task.PREDICTION_HEADS,  # its name in adapter-transformers
}


def _table(name: str) -> Mapping[str, str]:
    """Model type -> class name of a table of transformers, empty where this version has none."""
    from transformers.models.auto import modeling_auto

    return getattr(modeling_auto, name, {})
