"""The two models of a run, loaded as its config says."""

from __future__ import annotations

from peft_graft.config import PairConfig
from peft_graft.models.devices import placed
from peft_graft.models.loading import Loading, ModelPair, load_model


def loading_of(config: PairConfig, role: str) -> Loading:
    """How the teacher or the student of a run is loaded."""
    student = role == "student"
    return Loading(
        revision=config.student_revision if student else config.teacher_revision,
        token=config.token,
        trust_remote_code=config.trust_remote_code,
        quantization_config=config.quantization_config,
        device_map=config.device_map,
        device=(config.student_device if student else None) or placed(config).device,
        dtype=config.dtype,
    )


def load_pair(teacher: str, student: str, config: PairConfig, *, tokenizers: bool) -> ModelPair:
    """Load both models by folder or hub id.

    Args:
        tokenizers: whether to load their tokenizers too.

    Raises:
        ModelError, DeviceError, ArchitectureError: see ``load_model``.
    """
    first, second = (
        load_model(name, loading_of(config, role), role=role, tokenizer=tokenizers)
        for name, role in ((teacher, "teacher"), (student, "student"))
    )
    return ModelPair(first, second)
