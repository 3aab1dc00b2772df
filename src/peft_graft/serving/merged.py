"""A graft merged into its base: an ordinary model of transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from peft_graft.checkpoints.attach import give_tokens
from peft_graft.checkpoints.attached import quiet
from peft_graft.checkpoints.formats.base import write_checkpoint
from peft_graft.checkpoints.raw import RawCheckpoint
from peft_graft.checkpoints.student_names import written_names
from peft_graft.config import ExportConfig, Library, Target
from peft_graft.errors import ModelError, PlanError, VerificationError, reason
from peft_graft.files import downloaded
from peft_graft.models.checks import explained
from peft_graft.models.devices import check_range, is_quantised
from peft_graft.models.loading import DTYPES
from peft_graft.models.places import is_folder
from peft_graft.models.task_models import auto_class, prefix_of
from peft_graft.models.tasks import Task
from peft_graft.modules.embeddings import TokenRowsPart
from peft_graft.outputs import temporary_folder
from peft_graft.serving.subject import Subject, compare, outputs
from peft_graft.serving.target import Form, Written, register_form

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: What lies beside a model's weights and is needed to use it.
TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "*.tiktoken"),
    *("chat_template*", "preprocessor_config.json", "processor_config.json"),
)
#: What sentence-transformers makes of a model's states, as its own folders say it.
SENTENCE_FILES = ("modules.json", "config_sentence_transformers.json", "sentence_*_config.json", "[0-9]*_*/*")
#: The most of the module's effect that may be lost by rounding: beyond, the merged model is hardly the graft.
_LOST = 0.25


@register_form
class Merged(Form):
    """The base with the module's change in its weights."""

    target: ClassVar = Target.MERGED

    def check(self, subject: Subject, config: ExportConfig) -> None:
        """Refuse what changes no weights, and quantised bases."""
        if subject.raw.is_virtual:
            raise PlanError(
                "virtual tokens are not in the weights, so they cannot be merged",
                where="--to merged",
                found=subject.raw.kind,
                fix="load the graft with its own library",
            )
        if getattr(subject.base.base.config, "quantization_config", None) is not None:
            raise PlanError(
                "the base's weights are quantised, and merging would round the module away",
                where="--to merged",
                found=subject.base.name,
                fix="name the same base in full precision with --base",
            )
        subject.check_library(Library.PEFT)

    def needs_base(self, subject: Subject) -> bool:
        """Only to say a module of adapters in peft's words: the whole model is loaded in any case."""
        return subject.raw.library != Library.PEFT

    def write(self, folder: Path, subject: Subject, config: ExportConfig) -> Written:
        """Merge, write, load and compare with the unmerged model."""
        raw = subject.in_library(Library.PEFT)
        dtype = subject.base.loading.dtype
        with quiet():
            model, is_bare = _whole(subject, raw)
            with _around(model, subject, raw) as adapted:
                batch = subject.probe(adapted.device)
                before = outputs(adapted, batch, logits=not is_bare)
                with adapted.disable_adapter():
                    without = outputs(adapted, batch, logits=not is_bare)
                merged = adapted.merge_and_unload(safe_merge=True)
            merged = getattr(merged, prefix_of(merged)) if is_bare and raw.task is not Task.BASE else merged
            merged = merged.to(DTYPES[dtype])
            check_range(merged, subject.name)
            merged.save_pretrained(folder)
            notes = _copy_files(subject, folder)
            again = _loaded(type(merged), folder, dtype, trust=config.trust_remote_code).to(batch_device(batch))
            after = outputs(again, batch, logits=not is_bare)
        found = compare(before, after, without, logits=not is_bare, most=_LOST, where=f"--dtype {dtype}")
        auto = "AutoModel" if is_bare else raw.task.auto_class_of(model.config.model_type)
        return Written(comparison=found, notes=notes, use=f"transformers.{auto}.from_pretrained({{out!r}})")


def batch_device(batch: dict[str, torch.Tensor]) -> torch.device:
    """Where a batch is."""
    return next(iter(batch.values())).device


def _whole(subject: Subject, raw: RawCheckpoint) -> tuple[PreTrainedModel, bool]:
    """The base as its file has it, with its own output layer, and whether it has none of its own for this task.

    Raises:
        ModelError: it is not where it can be loaded from, or cannot be.
    """
    base = subject.base
    auto = auto_class(raw.task, base.base.config)
    labels: dict[str, Any] = {}
    if subject.labels:
        labels = {"id2label": dict(enumerate(subject.labels)),
                  "label2id": {label: index for index, label in enumerate(subject.labels)}}  # fmt: skip
    elif raw.num_labels and raw.task is not Task.CAUSAL_LM:
        labels = {"num_labels": raw.num_labels}
    with explained(base.name, "base"):
        model, info = auto.from_pretrained(
            base.place,
            **base.loading.source(base.place),
            **base.loading.weights,
            **labels,
            output_loading_info=True,
            ignore_mismatched_sizes=bool(raw.head),  # the base's own head of that name, which the module's replaces
        )
    # Names alone, or with both shapes, as the version of transformers has it.
    mismatched = [name if isinstance(name, str) else name[0] for name in info["mismatched_keys"]]
    if other := [name for name in mismatched if name not in raw.head]:
        raise ModelError(
            "the weights of the base have other shapes than its configuration says",
            where=base.name,
            found=", ".join(other),
            fix="save it with save_pretrained of its model class",
        )
    assert not is_quantised(model)
    model = model.to(base.loading.device).eval()
    give_tokens(model, raw)
    _untie(model, raw)
    is_bare = not raw.head and (raw.task is Task.BASE or bool(info["missing_keys"]))
    return model, is_bare


@contextmanager
def _around(model: PreTrainedModel, subject: Subject, raw: RawCheckpoint) -> Iterator[Any]:
    """The model with the module inside, put there by peft from files."""
    from peft import PeftModel

    with temporary_folder() as place:
        write_checkpoint(place, raw, written_names(subject.base, raw.task))
        try:
            yield PeftModel.from_pretrained(model, place).eval()
        except (AttributeError, NotImplementedError, RuntimeError, ValueError) as error:
            raise VerificationError(f"peft cannot merge it ({reason(error)})", where=subject.name) from error


def _untie(model: PreTrainedModel, raw: RawCheckpoint) -> None:
    """Give the output layer values of its own, where a module changes it or the word embeddings alone.

    Merging would change both: they are one tensor.
    """
    words, output = model.get_input_embeddings(), model.get_output_embeddings()
    if words is None or output is None or words.weight is not output.weight or raw.config.get("ensure_weight_tying"):
        return
    # Of tokens that are trained one by one peft changes both itself.
    if any(part.trains_tokens(path) and not isinstance(part, TokenRowsPart) for path, part in raw.parts.items()):
        output.weight = nn.Parameter(output.weight.detach().clone(), requires_grad=False)
        for config in (model.config, getattr(model.config, "text_config", None)):
            if config is not None:
                config.tie_word_embeddings = False


def _copy_files(subject: Subject, folder: Path) -> list[str]:
    """Put beside the model, as they are, its tokenizer, the module's own where it came with one, and what makes it a
    model of sentence-transformers; what could not be."""
    base, own = subject.base, subject.folder
    place = (
        Path(base.place)
        if is_folder(base.place)
        else downloaded(
            base.place, (*TOKENIZER_FILES, *SENTENCE_FILES), ModelError,
            revision=base.loading.revision, subfolder=None, token=base.loading.token,
        )
    )  # fmt: skip
    tokenizer = own if own is not None and (own / "tokenizer_config.json").is_file() else place
    files = _matching(tokenizer, TOKENIZER_FILES)
    for path in files:
        shutil.copyfile(path, folder / path.name)
    notes = [] if files else ["the base has no tokenizer, so the merged model has none"]
    if not (place / "modules.json").is_file():
        return notes
    if any(module.get("idx") == 0 and module.get("path") for module in _modules(place)):
        return [*notes, "the base is a model of sentence-transformers in folders of its own, and the merged one is not"]
    for path in _matching(place, SENTENCE_FILES):
        (folder / path.relative_to(place)).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, folder / path.relative_to(place))
    return notes


def _modules(place: Path) -> list[dict[str, Any]]:
    """What sentence-transformers puts a model together of; nothing where its file is damaged."""
    try:
        found = json.loads((place / "modules.json").read_text(encoding="utf-8"))
    except ValueError:
        return []
    return [module for module in found if isinstance(module, dict)] if isinstance(found, list) else []


def _matching(place: Path, patterns: Sequence[str]) -> list[Path]:
    return sorted({path for pattern in patterns for path in place.glob(pattern) if path.is_file()})


def _loaded(cls: type[PreTrainedModel], folder: Path, dtype: str, *, trust: bool) -> PreTrainedModel:
    try:
        return cls.from_pretrained(folder, dtype=DTYPES[dtype], trust_remote_code=trust).eval()
    except Exception as error:  # every model has code of its own
        raise VerificationError(f"the merged model does not load ({reason(error)})", where=str(folder)) from error
