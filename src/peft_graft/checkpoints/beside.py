"""What lies beside a written module, since no library stores it: what reads its model's inputs, names of classes."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_graft.checkpoints.raw import RawCheckpoint
from peft_graft.config import Library
from peft_graft.errors import GraftError
from peft_graft.models.checks import explained
from peft_graft.models.loading import ModelHandle
from peft_graft.models.places import hub_id_of, is_folder
from peft_graft.models.spaces import VOCABULARY, Space
from peft_graft.models.task_models import is_remote, set_labels
from peft_graft.models.tasks import Task
from peft_graft.outputs import temporary_folder

if TYPE_CHECKING:
    from transformers import FeatureExtractionMixin, ImageProcessingMixin, PreTrainedTokenizerBase

#: By which a folder of tokenizer files is known.
TOKENIZER = "tokenizer_config.json"
#: Texts that tokenizers of different makes, and copies that have lost something, take apart differently.
_TEXTS = (
    "Maria moved to Lisbon in winter, didn't she?",
    "  two  blanks,\ta tab\nand a line\r\n",
    "12345.678 + ÀÉÎ ß œ ﬁ = ½ €",
    "Привет, 你好, こんにちは, สวัสดี, שלום, 🙂👩‍💻",
    "def f(x):\n    return x ** 2  # {'a': [1]}",
    "e\u0301 \u00a0 \u200b end",
)


def write_beside(folder: Path, raw: RawCheckpoint, student: ModelHandle, labels: tuple[str, ...]) -> list[str]:
    """Write what a user of the module needs beside it.

    Args:
        labels: names of the head's classes, empty where they are not known.

    Returns:
        Remarks on what was not written.
    """
    write_labels(folder, raw, student, labels)
    rows = max(student.architecture.sizes.get(Space(-1, VOCABULARY), 0), raw.vocabulary_size or 0)
    remark = _write_tokenizer(folder, student, rows)
    if (processor := processor_of(student)) is not None:
        processor.save_pretrained(folder)
    return [remark] if remark else []


def write_labels(folder: Path, raw: RawCheckpoint, model: ModelHandle, labels: tuple[str, ...]) -> None:
    """Write the model's configuration with what the head's outputs are beside a checkpoint of peft, which has no place
    for it."""
    if (labels or raw.problem_type) and raw.library == Library.PEFT:
        named = copy.deepcopy(model.base.config)
        set_labels(named, labels, raw.num_labels)
        named.problem_type = raw.problem_type and raw.problem_type.value
        named.save_pretrained(folder)


def _write_tokenizer(folder: Path, student: ModelHandle, rows: int) -> str | None:
    """Write the student's tokenizer, its chat template with it, if what is read back tokenizes as it does.

    Args:
        rows: of the student's embeddings, 0 where that is not known.

    Returns:
        Why none was written, None where one was or where there is none.
    """
    tokenizer = tokenizer_of(student)
    if tokenizer is None or is_remote(tokenizer):  # whose code is not ours to copy
        return None
    if len(tokenizer) > rows > 0:
        return (
            f"the student's tokenizer was not written beside the module, for it has {len(tokenizer)} tokens and the "
            f"student {rows} embeddings, which peft would resize"
        )
    with temporary_folder() as place:
        try:
            _unbound(tokenizer).save_pretrained(place)
            same = _reads_alike(place, tokenizer)
        except (ValueError, TypeError, AttributeError, LookupError, NotImplementedError, ImportError):  # a slow one's
            same = False
        if same:
            shutil.copytree(place, folder, dirs_exist_ok=True)
            return None
    return "the student's tokenizer was not written beside the module, for its copy does not tokenize as it does"


def tokenizer_of(student: ModelHandle) -> PreTrainedTokenizerBase | None:
    """The tokenizer that came with a model, or lies where it comes from; None where there is none."""
    if student.tokenizer is not None or not student.architecture.row.reads_text or not _comes_from_its_place(student):
        return student.tokenizer
    from transformers import AutoTokenizer

    try:
        with explained(student.name, "student's tokenizer"):
            found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                student.place, **student.loading.source(student.place)
            )
            return found
    except GraftError:
        return None


def pipeline_options(task: Task, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, str]:
    """Arguments for a pipeline of transformers that make of what it says what was learned.

    Taggers give whole entities; with tokenizers that mark the inside of words each word by its first token, which is
    what has learned its tag. Of others transformers would only guess at words.
    """
    if task is not Task.TOKEN_CLASSIFICATION:
        return {}
    inner = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    return {"aggregation_strategy": "first" if getattr(inner, "continuing_subword_prefix", None) else "simple"}


def processor_of(student: ModelHandle) -> ImageProcessingMixin | FeatureExtractionMixin | None:
    """What prepares images or sound for a model, as it lies where the model comes from.

    None where there is none, where it needs a library that is not installed, or code that is not transformers' own.
    """
    if student.architecture.row.reads_text or not _comes_from_its_place(student):
        return None
    from transformers import AutoFeatureExtractor, AutoImageProcessor

    auto = AutoImageProcessor if student.base.main_input_name == "pixel_values" else AutoFeatureExtractor
    try:
        with explained(student.name, "student's preprocessor"):
            found: ImageProcessingMixin | FeatureExtractionMixin = auto.from_pretrained(
                student.place, **student.loading.source(student.place)
            )
    except GraftError:
        return None
    return None if is_remote(found) else found


def _comes_from_its_place(student: ModelHandle) -> bool:
    return bool(is_folder(student.place) or (hub_id_of(student.place) and student.name != type(student.base).__name__))


def _unbound(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy that does not cut or fill, as the last batch that it made for this run was cut and filled."""
    found = copy.deepcopy(tokenizer)
    if found.is_fast:
        found.backend_tokenizer.no_truncation()
        found.backend_tokenizer.no_padding()
    return found


def _reads_alike(folder: Path, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer in a folder takes texts apart as this one does, and has its template and its tokens."""
    from transformers import AutoTokenizer

    again = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return _seen(again) == _seen(tokenizer)


def _seen(tokenizer: PreTrainedTokenizerBase) -> Sequence[Any]:
    texts = [*_TEXTS, *(f"a{token}b {token}" for token in tokenizer.all_special_tokens)]
    pair = tokenizer(_TEXTS[0], _TEXTS[3])
    return [
        [tokenizer(text)["input_ids"] for text in texts],
        dict(pair),
        tokenizer.decode(pair["input_ids"]),
        tokenizer.chat_template,
        tokenizer.special_tokens_map,
        tokenizer.padding_side,
        tokenizer.model_max_length,
    ]
