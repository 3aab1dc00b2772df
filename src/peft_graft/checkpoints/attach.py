"""Models with a module inside, loaded by the library that the module is for: to be run, verified or trained further."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peft_graft.checkpoints.formats.adapters.format import written_tensors
from peft_graft.checkpoints.formats.base import write_checkpoint
from peft_graft.checkpoints.formats.peft.format import weights_file
from peft_graft.checkpoints.raw import RawCheckpoint
from peft_graft.checkpoints.read import read_checkpoint
from peft_graft.checkpoints.student_names import StudentNames
from peft_graft.config import Library
from peft_graft.errors import DependencyError, VerificationError
from peft_graft.files import read_tensors
from peft_graft.models.devices import device_of, is_quantised, trainable_attention
from peft_graft.models.loading import ModelHandle
from peft_graft.models.task_models import prefix_of, quiet_libraries, with_task_head
from peft_graft.models.tasks import Task


def library_version(library: str) -> str | None:
    """Its version, None where it is not installed."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


@dataclass
class LiveModule:
    """A task model with a checkpoint loaded into it, a copy of its own.

    Attributes:
        model: takes what ``activations.pad`` gives, has ``logits`` where the checkpoint's task has a head.
        raw: what was loaded. name: the module's name in its library.
        written, loaded: the checkpoint's tensors by key, as in its file and as in the model.
        bf16: forward passes in mixed precision; what is trained is float32 in any case.
        own_biases: of layers whose bias the module replaces, by path, what it is without the module.
    """

    model: Any
    raw: RawCheckpoint
    name: str
    written: Mapping[str, Tensor]
    loaded: Mapping[str, Tensor]
    bf16: bool = False
    own_biases: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def base(self) -> Any:
        """The base model with the module inside."""
        inside = self._tuned if self.raw.library == Library.PEFT else self.model
        return getattr(inside, prefix_of(inside), inside)

    @property
    def is_active(self) -> bool:
        """Whether the checkpoint as it was loaded changes anything: LoRA's B, or an up projection, is not zero."""
        return self.raw.is_active

    @property
    def virtual_tokens(self) -> int:
        """How many vectors stand before the text in what the model gives back."""
        if not self.raw.virtual_tokens or self._tuned.config.is_encoder_decoder:  # whose decoder sees none of them
            return 0
        return self.raw.virtual_tokens

    @property
    def _tuned(self) -> Any:
        """The task model that the module is in."""
        return self.model.base_model if self.raw.is_virtual else self.model.base_model.model

    @cached_property
    def device(self) -> torch.device:
        """Where its inputs belong."""
        return device_of(self.model)

    @contextmanager
    def _without(self) -> Iterator[Any]:
        """The model with the module switched off."""
        if self.raw.library == Library.ADAPTERS:
            self.model.set_active_adapters(None)
            try:
                yield self.model
            finally:
                self.model.set_active_adapters(self.name)
        elif self.raw.is_virtual:  # peft cannot switch these off in models that do not generate
            yield self.model.base_model
        else:
            with _quiet(), self.model.disable_adapter(), self._with_own_biases():
                yield self.model

    @contextmanager
    def _with_own_biases(self) -> Iterator[None]:
        """Put back biases that belong to the layers themselves, which peft leaves as they were trained."""
        layers = {path: self._tuned.get_submodule(path).base_layer for path in self.own_biases}
        trained = {path: layer.bias.data for path, layer in layers.items()}
        for path, layer in layers.items():
            layer.bias.data = self.own_biases[path].to(layer.bias.device)
        try:
            yield
        finally:
            for path, layer in layers.items():
                layer.bias.data = trained[path]

    def forward(self, inputs: Mapping[str, Tensor], *, module: bool = True) -> tuple[Tensor | None, Tensor]:
        """Logits (None without a head) and last hidden state [batch, length, d] of one padded batch."""
        mixed = torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)
        attention = trainable_attention(self.device, bf16=self.bf16)
        with nullcontext(self.model) if module else self._without() as model, mixed, attention:
            output = model(**inputs, output_hidden_states=True)
        state, logits = _last_state(output), output.get("logits")
        before = self.virtual_tokens if module else 0
        return logits[:, before:] if before and logits is not None and logits.ndim == 3 else logits, state[:, before:]

    def module_at(self, path: str) -> nn.Module:
        """The part of the model that one of the checkpoint's modules acts in, or is; it reads the same input."""
        if self.raw.library == Library.PEFT:
            found = self._tuned.get_submodule(path)
        else:
            own = self.raw.parts[path].is_own_module
            found = self.model.get_submodule(f"{path}.{self.raw.name}" if own else path)
        assert isinstance(found, nn.Module)
        return found

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters of module and head, by name."""
        return {name: value for name, value in self.model.named_parameters() if value.requires_grad}

    def checkpoint(self) -> RawCheckpoint:
        """The checkpoint with the values that the model has now."""
        with tempfile.TemporaryDirectory() as folder, _quiet():
            if self.raw.library == Library.PEFT:
                self.model.save_pretrained(folder, save_embedding_layers=False)
            else:
                self.model.save_adapter(folder, self.name, with_head=bool(self.raw.head))
            found = read_checkpoint(Path(folder))
        parts = {
            path: part.with_tensors(
                {name: found.parts[path].tensors[name].to(value.dtype) for name, value in part.tensors.items()}
            )
            for path, part in self.raw.parts.items()
        }
        return replace(self.raw, parts=parts, head={key: found.head[key] for key in self.raw.head})


def attach(
    folder: Path,
    raw: RawCheckpoint,
    handle: ModelHandle,
    labels: tuple[str, ...] = (),
    *,
    trainable: bool = False,
    bf16: bool = False,
) -> LiveModule:
    """Load a written checkpoint into a copy of its model, where that is, with the checkpoint's own library.

    The copy shares the model's matrices unless those are float16, in which nothing can be trained: then it is float32.
    What is trained is float32 in any case.

    Args:
        folder: the checkpoint. raw: what is in it. handle: its base model, not touched. labels: names of its classes.
        trainable: whether module and head shall require gradients. bf16: compute in bfloat16 also where the weights
            are float32.

    Raises:
        VerificationError: the library cannot load it, or found keys missing or unexpected.
        DependencyError: the library is not installed.
    """
    if library_version(raw.library) is None:
        raise DependencyError(
            f"{raw.library} is not installed, so the module cannot be run",
            where=str(folder),
            fix="pip install 'peft-graft[adapters]'",
        )
    with _quiet():
        load = _attach_peft if raw.library == Library.PEFT else _attach_adapterhub
        live = load(folder, raw, handle, labels, trainable)
    live.model.eval()
    live.bf16 = bf16 or is_quantised(live.base) or live.base.dtype != torch.float32
    for value in live.trainable().values():
        value.data = value.data.float()
    return live


def attach_raw(
    raw: RawCheckpoint,
    names: StudentNames,
    handle: ModelHandle,
    labels: tuple[str, ...] = (),
    *,
    trainable: bool = False,
    bf16: bool = False,
) -> LiveModule:
    """The same for a checkpoint that has not been written yet; ``names`` is what a written one says of the model."""
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), raw, names)
        return attach(Path(folder), raw, handle, labels, trainable=trainable, bf16=bf16)


def _attach_peft(
    folder: Path, raw: RawCheckpoint, handle: ModelHandle, labels: tuple[str, ...], trainable: bool
) -> LiveModule:
    from peft import PeftModel, get_peft_model_state_dict

    model = with_task_head(handle.base, raw.task, labels, raw.num_labels)
    own = {
        path: model.get_submodule(path).bias.detach().clone() for path, part in raw.parts.items() if part.replaces_bias
    }
    needed = raw.vocabulary_size
    if needed and needed > model.get_input_embeddings().num_embeddings:  # trained after tokens were added
        model.resize_token_embeddings(needed, mean_resizing=False)
    try:
        prompts = raw.is_virtual  # peft loads these for inference only, and they train nevertheless
        adapted = PeftModel.from_pretrained(model, folder, is_trainable=trainable and not prompts)
        if trainable and prompts:
            for name, parameter in adapted.named_parameters():
                parameter.requires_grad = "prompt_encoder." in name or ".modules_to_save." in name
    except (RuntimeError, ValueError, TypeError) as error:
        raise VerificationError(f"peft cannot load it ({_first_line(error)})", where=str(folder)) from error
    return LiveModule(
        adapted,
        raw,
        "default",
        read_tensors(weights_file(folder)),
        get_peft_model_state_dict(adapted, save_embedding_layers=False),
        own_biases=own,
    )


def _attach_adapterhub(
    folder: Path, raw: RawCheckpoint, handle: ModelHandle, labels: tuple[str, ...], trainable: bool
) -> LiveModule:
    import adapters
    from transformers.modeling_utils import no_init_weights

    if raw.task is Task.PREDICTION_HEADS:
        try:
            with no_init_weights():  # all of them are replaced
                model: Any = adapters.AutoAdapterModel.from_config(handle.base.config)
        except ValueError as error:
            raise VerificationError(
                f"the library adapters has no model class for {handle.architecture.model_type}", where=handle.name
            ) from error
        base = getattr(model, prefix_of(model))
        own = base.state_dict()
        given = {key: value.float().cpu() for key, value in handle.base_tensors().items() if key in own}
        filled = {own[key].data_ptr() for key in given}
        for key in base.load_state_dict(given, strict=False).missing_keys:
            if own[key].data_ptr() not in filled:  # one tensor may have several names
                own[key].zero_()  # such as a pooler, which the checkpoint may lack
    else:
        model = with_task_head(handle.base, raw.task, labels, raw.num_labels)
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
    if trainable:
        model.train_adapter(name)
    written = written_tensors(folder, raw)
    state = model.state_dict()
    return LiveModule(model, raw, name, written, {key: value for key, value in state.items() if key in written})


def _last_state(output: Any) -> Tensor:
    """The last hidden state, a decoder's where there is an encoder too; of two towers what both say, [batch, d + d]."""
    if "last_hidden_state" in output:
        state = output.last_hidden_state
    elif "image_embeds" in output:
        state = torch.cat([output.text_embeds, output.image_embeds], -1)
    else:
        state = (output.get("decoder_hidden_states") or output.hidden_states)[-1]
    assert isinstance(state, Tensor)
    return state


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings(), quiet_libraries():
        warnings.simplefilter("ignore")
        yield


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
