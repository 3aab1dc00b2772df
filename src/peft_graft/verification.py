"""Loading what was written back into the student, with the library that its users will load it with."""

from __future__ import annotations

import importlib.metadata
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from peft_graft.errors import VerificationError
from peft_graft.formats import adapterhub, peft_lora
from peft_graft.formats.raw import RawCheckpoint
from peft_graft.models import ModelHandle, quiet_libraries, with_task_head
from peft_graft.weights import read_tensors


class Verification(BaseModel):
    """What loading the written checkpoint showed.

    ``output_change`` is the largest change of the student's last hidden state on a probe batch, relative to the
    largest value of that state; None when the library is not installed and nothing could be checked.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
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

    Args:
        folder: the written checkpoint. raw: what was written. student: its weights are copied, not touched.
        labels: label names of the head.

    Raises:
        VerificationError: a key is missing or unexpected, a value arrived changed, the output is not finite, or it is
            the same as without the module.
    """
    library = "peft" if raw.format == "peft" else "adapters"
    try:
        version = importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return Verification(library=library, version=None)
    check = _verify_peft if raw.format == "peft" else _verify_adapterhub
    with warnings.catch_warnings(), quiet_libraries():
        warnings.simplefilter("ignore")
        loaded, with_module, without = check(folder, raw, student, labels)
    if not bool(torch.isfinite(with_module).all()):
        raise VerificationError("the student's output with the module is not finite", where=str(folder))
    change = float((with_module - without).abs().max() / without.abs().max().clamp_min(1e-12))
    if change == 0:
        raise VerificationError(
            "the module loads but changes nothing in the student's output",
            where=str(folder),
            fix="check that the teacher's module was trained at all (peft-graft inspect shows which sites act)",
        )
    return Verification(
        library=library,
        version=version,
        tensors_loaded=loaded,
        output_change=change,
    )


def _verify_peft(
    folder: Path, raw: RawCheckpoint, student: ModelHandle, labels: tuple[str, ...]
) -> tuple[int, Tensor, Tensor]:
    from peft import PeftModel, get_peft_model_state_dict

    model = with_task_head(student, raw.task, labels, raw.num_labels)
    try:
        adapted = PeftModel.from_pretrained(model, folder)
    except (RuntimeError, ValueError, TypeError) as error:
        raise VerificationError(f"peft cannot load it ({_first_line(error)})", where=str(folder)) from error
    _compare(read_tensors(folder / peft_lora.WEIGHTS[0]), get_peft_model_state_dict(adapted), folder)
    adapted.eval()
    probe = _probe(student)
    with torch.inference_mode():
        with_module = _last_hidden_state(model, probe)
        with adapted.disable_adapter():
            without = _last_hidden_state(model, probe)
    return len(raw.entries) * 2 + len(raw.head), with_module, without


def _verify_adapterhub(
    folder: Path, raw: RawCheckpoint, student: ModelHandle, labels: tuple[str, ...]
) -> tuple[int, Tensor, Tensor]:
    import adapters

    if raw.task == "prediction-heads":
        try:
            model: Any = adapters.AutoAdapterModel.from_config(student.base.config)
        except ValueError as error:
            raise VerificationError(
                f"the library adapters has no model class for {student.architecture.model_type}", where=student.name
            ) from error
        base = getattr(model, model.base_model_prefix)
        own = base.state_dict().keys()
        base.load_state_dict(
            {k: v.float().cpu() for k, v in student.base.state_dict().items() if k in own}, strict=False
        )
    else:
        model = with_task_head(student, raw.task, labels, raw.num_labels)
        adapters.init(model)
    info: dict[str, Any] = {}
    try:
        name = model.load_adapter(
            str(folder),
            with_head=bool(raw.head),
            set_active=True,
            loading_info=info,
            use_safetensors=raw.weights_suffix == ".safetensors",
        )
    except (RuntimeError, ValueError, OSError, KeyError) as error:
        raise VerificationError(f"adapters cannot load it ({_first_line(error)})", where=str(folder)) from error
    if info.get("missing_keys") or info.get("unexpected_keys"):
        raise VerificationError(
            "keys are missing or unexpected on loading",
            where=str(folder),
            found=f"missing {info.get('missing_keys')}, unexpected {info.get('unexpected_keys')}",
        )
    loaded = adapterhub.written_tensors(folder, raw)
    state = model.state_dict()
    _compare(loaded, {key: value for key, value in state.items() if key in loaded}, folder)
    model.eval()
    probe = _probe(student)
    with torch.inference_mode():
        with_module = _last_hidden_state(model, probe)
        model.set_active_adapters(None)
        without = _last_hidden_state(model, probe)
    model.delete_adapter(name)
    return len(loaded), with_module, without


def _compare(written: Mapping[str, Tensor], loaded: Mapping[str, Tensor], folder: Path) -> None:
    missing, unexpected = sorted(written.keys() - loaded.keys()), sorted(loaded.keys() - written.keys())
    if missing or unexpected:
        raise VerificationError(
            "keys are missing or unexpected on loading",
            where=str(folder),
            found=f"not loaded {missing[:3]}, not written {unexpected[:3]}",
        )
    for key, value in written.items():
        if not torch.equal(loaded[key].cpu().to(value.dtype), value):
            raise VerificationError(f"tensor {key} arrived with other values", where=str(folder))


def _probe(student: ModelHandle) -> dict[str, Tensor]:
    vocabulary = student.base.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(min(10, vocabulary // 2), vocabulary, (4, 16), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _last_hidden_state(model: nn.Module, probe: Mapping[str, Tensor]) -> Tensor:
    output = model(**probe, output_hidden_states=True)
    state = output.last_hidden_state if "last_hidden_state" in output else output.hidden_states[-1]
    assert isinstance(state, Tensor)
    return state.clone()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
