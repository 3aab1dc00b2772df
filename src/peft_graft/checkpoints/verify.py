"""Loading what was written back into the student, with the library that its users will load it with."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peft_graft.checkpoints.attach import attach_written
from peft_graft.checkpoints.formats.adapters.format import written_tensors
from peft_graft.checkpoints.formats.peft.format import weights_file
from peft_graft.checkpoints.raw import RawCheckpoint
from peft_graft.config import Library
from peft_graft.environment import version_of
from peft_graft.errors import CheckpointError, VerificationError, reason
from peft_graft.files import read_tensors
from peft_graft.models.loading import ModelHandle
from peft_graft.models.task_models import complete
from peft_graft.models.tasks import Task
from peft_graft.record import Record


class Verification(Record):
    """What loading the written checkpoint showed.

    ``output_change`` is the largest change of the student's last hidden state on a probe batch, relative to the
    largest value of that state; None when the library is not installed and nothing could be checked.
    """

    library: str
    version: str | None
    tensors_loaded: int | None = None
    output_change: float | None = None

    @property
    def done(self) -> bool:
        """Whether the checkpoint was loaded at all."""
        return self.output_change is not None


def verify(folder: Path, raw: RawCheckpoint, student: ModelHandle, labels: tuple[str, ...] = ()) -> Verification:
    """Load a written checkpoint into the student and see that it is complete and acts.

    Errors name the student: the folder is a temporary one until all is well.

    Args:
        folder: the written checkpoint. raw: what was written. student: its weights are copied, not touched.
        labels: label names of the head.

    Raises:
        VerificationError: a key is missing or unexpected, a value arrived changed, the output is not finite, or it is
            the same as without the module.
    """
    library = raw.library
    version = version_of(library)
    if version is None:
        return Verification(library=library, version=None)
    try:
        written = read_tensors(weights_file(folder)) if library == Library.PEFT else written_tensors(folder, raw)
    except CheckpointError as error:
        said = error.message.replace(f"{folder}{os.sep}", "")
        raise VerificationError(f"what was written cannot be read ({said})", where=student.name) from error
    path = student.architecture.row.lm_head
    output = raw.task is Task.CAUSAL_LM and any(part == path or part.endswith(f".{path}") for part in raw.parts)
    attached = attach_written(folder, raw, student, labels, speaks=output)
    _compare(written, attached.tensors(), student.name)
    batch = {name: value.to(attached.device) for name, value in probe(student).items()}
    with torch.inference_mode():
        try:
            with_module = attached.forward(batch)[1].clone()
        except Exception as error:  # such as virtual tokens in a model that takes none
            raise VerificationError(
                f"{library} loads the module, but the student cannot be run with it ({reason(error)})",
                where=student.name,
                fix="move another kind of module",
            ) from error
        without = attached.forward(batch, module=False)[1].clone()
    if not bool(torch.isfinite(with_module).all()):
        raise VerificationError("the student's output with the module is not finite", where=student.name)
    change = _change(with_module, without)
    if change == 0 and output:
        change = _change(*_logits(attached.model.get_output_embeddings(), without))
    if change == 0:
        raise VerificationError(
            "the module loads but changes nothing in the student's output",
            where=student.name,
            fix="check that the teacher's module was trained at all (peft-graft inspect shows which sites act)",
        )
    return Verification(library=library, version=version, tensors_loaded=len(written), output_change=change)


def _change(with_module: Tensor, without: Tensor) -> float:
    return float((with_module - without).abs().max() / without.abs().max().clamp_min(1e-12))


def _logits(layer: Any, states: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs of an output layer with a module inside, and of what it was before."""
    inside = (getattr(layer, name, None) for name in ("base_layer", "original_module"))
    before = next((found for found in inside if found is not None), layer)
    with torch.inference_mode():
        return layer(states), before(states)


def _compare(written: Mapping[str, Tensor], loaded: Mapping[str, Tensor], where: str) -> None:
    missing, unexpected = sorted(written.keys() - loaded.keys()), sorted(loaded.keys() - written.keys())
    if missing or unexpected:
        raise VerificationError(
            "keys are missing or unexpected on loading",
            where=where,
            found=f"not loaded {missing[:3]}, not written {unexpected[:3]}",
        )
    for key, value in written.items():
        arrived = loaded[key].cpu()
        # In the coarser of the two: a model in half precision holds vectors of its own no better.
        if not torch.equal(arrived.to(value.dtype), value) and not torch.equal(arrived, value.to(arrived.dtype)):
            raise VerificationError(f"tensor {key} arrived with other values", where=where)


def probe(student: ModelHandle) -> dict[str, Tensor]:
    """A batch of four random inputs of every sort that the model reads."""
    config, generator = student.base.config, torch.Generator().manual_seed(0)
    kinds = {stack.kind for stack in student.architecture.row.stacks}
    batch: dict[str, Tensor] = {}
    if kinds & {"encoder", "decoder"}:
        vocabulary = int(getattr(config, "text_config", config).vocab_size)
        ids = torch.randint(min(10, vocabulary // 2), vocabulary, (4, 16), generator=generator)
        if config.is_encoder_decoder and config.eos_token_id is not None:
            ids[:, -1] = config.eos_token_id  # which their classes for whole texts read
        batch = complete(config, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    if "vision" in kinds:
        vision = getattr(config, "vision_config", config)
        size = vision.image_size if isinstance(vision.image_size, list | tuple) else [vision.image_size] * 2
        batch["pixel_values"] = torch.randn(4, vision.num_channels, *size, generator=generator)
    if "audio" in kinds:  # Whisper's encoder halves the number of frames, and takes its full length only
        sound = torch.randn(4, config.num_mel_bins, 2 * config.max_source_positions, generator=generator)
        batch = {"input_features": sound, "decoder_input_ids": batch["decoder_input_ids"]}
    return batch
