"""A model with a module inside: run, trained and read back."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from peft_graft.checkpoints.formats.adapters.format import AdaptersFormat
from peft_graft.checkpoints.formats.base import format_of
from peft_graft.checkpoints.formats.peft.prompts import KEY as PROMPT_KEY
from peft_graft.checkpoints.raw import RawCheckpoint
from peft_graft.checkpoints.read import read_checkpoint
from peft_graft.checkpoints.student_names import StudentNames
from peft_graft.config import Library
from peft_graft.errors import VerificationError
from peft_graft.models.devices import device_of, trainable_attention
from peft_graft.models.task_models import prefix_of, quiet_libraries
from peft_graft.models.tasks import Task
from peft_graft.outputs import temporary_folder

#: The adapter's name inside a ``PeftModel``.
NAME = "default"


@dataclass
class AttachedModel:
    """A task model with a module inside, a copy of its own.

    The copy shares the values of the base model's matrices, which nothing here changes, unless those are float16, in
    which nothing can be trained: then it is float32. What is trained is float32 in any case.

    Attributes:
        model: a ``PeftModel`` or a model of ``adapters``. It takes what ``activations.pad`` gives and has ``logits``
            where the checkpoint's task has a head.
        checkpoint: what was put in last; ``raw`` has the values of now.
        names: what a checkpoint for this model says of it. config: the configuration as its file has it.
        name: the module's name in its library.
        bf16: forward passes in mixed precision.
        own_biases: of layers whose bias the module replaces, by path, what it is without the module.
    """

    model: Any
    checkpoint: RawCheckpoint
    names: StudentNames
    config: Mapping[str, Any] = field(repr=False)
    name: str = NAME
    bf16: bool = False
    own_biases: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def base(self) -> Any:
        """The base model with the module inside."""
        inside = self._tuned if self._is_peft else self.model
        return getattr(inside, prefix_of(inside), inside)

    @property
    def is_active(self) -> bool:
        """Whether the checkpoint that was put in changes anything."""
        return self.checkpoint.is_active

    @property
    def virtual_tokens(self) -> int:
        """How many vectors stand before the text in what the model gives back."""
        # Of an encoder-decoder the decoder sees none of them.
        before = self.checkpoint.virtual_tokens
        return 0 if before and self._tuned.config.is_encoder_decoder else before

    @property
    def _is_peft(self) -> bool:
        return self.checkpoint.library == Library.PEFT

    @property
    def _tuned(self) -> Any:
        """The task model that the module is in."""
        return self.model.base_model if self.checkpoint.is_virtual else self.model.base_model.model

    @cached_property
    def device(self) -> torch.device:
        """Where its inputs belong."""
        return device_of(self.model)

    @contextmanager
    def without(self) -> Iterator[Any]:
        """The model with the module switched off."""
        if not self._is_peft:
            with quiet():  # adapters says at every call that there is one
                self.model.set_active_adapters(None)
                try:
                    yield self.model
                finally:
                    self.model.set_active_adapters(self.name)
        elif self.checkpoint.is_virtual:  # peft cannot switch these off in models that do not generate
            yield self.model.base_model
        else:
            with quiet(), self.model.disable_adapter(), self._with_own_biases():
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
        """Logits (None without a head, and of language models) and last hidden state [batch, length, d] of a batch.

        Where answers are marked the logits are [batch, length, 2]: of their first and of their last token. peft counts
        these from the first virtual token on, in training too, so the last of its places belong to no token.

        Args:
            module: whether the module is switched on.
        """
        mixed = torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)
        attention = trainable_attention(self.device, bf16=self.bf16)
        with nullcontext(self.model) if module else self.without() as model, mixed, attention:
            if self.checkpoint.task in (Task.CAUSAL_LM, Task.MASKED_LM) and not self.checkpoint.is_virtual:
                # The output layer's logits would be computed at every token of the text, and are not asked for.
                without = {"use_cache": False} if self.checkpoint.task is Task.CAUSAL_LM else {}
                return None, self.base(**inputs, **without).last_hidden_state
            if self._is_peft and "input_ids" not in inputs and not self.checkpoint.is_virtual:
                model = self._tuned  # for most tasks peft passes on what texts are read by, also where there is none
            output = model(**inputs, output_hidden_states=True)
        state, logits = last_state(output), output.get("logits")
        if "start_logits" in output:
            logits = torch.stack([output.start_logits, output.end_logits], -1)
        before = self.virtual_tokens if module else 0
        own = slice(0, state.shape[1] - before) if "start_logits" in output else slice(before, None)
        return logits[:, own] if before and logits is not None and logits.ndim == 3 else logits, state[:, own]

    def answer(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor | None, Tensor]:
        """``forward`` of a model with a head, whose decoder, where it has one, reads what its class gives it: the text
        after a token of its own, as in training."""
        if not self.checkpoint.is_virtual:  # where the class sees vectors it cannot tell
            inputs = {name: value for name, value in inputs.items() if not name.startswith("decoder_")}
        return self.forward(inputs)

    def module_at(self, path: str) -> nn.Module:
        """The part of the model that one of the checkpoint's modules acts in, or is; it reads the same input."""
        if self._is_peft:
            found = self._tuned.get_submodule(path)
        else:
            own = self.checkpoint.parts[path].is_own_module
            found = self.model.get_submodule(f"{path}.{self.checkpoint.name}" if own else path)
        assert isinstance(found, nn.Module)
        return found

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters of module and head, by name."""
        return {name: value for name, value in self.model.named_parameters() if value.requires_grad}

    def tensors(self) -> dict[str, Tensor]:
        """What the model holds of the checkpoint, by the keys of its file; views of the model's own values."""
        if self._is_peft:
            from peft import get_peft_model_state_dict

            found: dict[str, Tensor] = get_peft_model_state_dict(self.model, save_embedding_layers=False)
            return found
        keys = _adapters_format().tensors_in_model(self.checkpoint, self.names)
        return {key: value for key, value in self.model.state_dict().items() if key in keys}

    def takes(self, raw: RawCheckpoint) -> bool:
        """Whether ``load`` can put these values in: the same parts of the same shapes."""

        def shapes(of: RawCheckpoint) -> dict[Any, Any]:
            parts = {(path, name): value for path, part in of.parts.items() for name, value in part.tensors.items()}
            return {key: value.shape for key, value in (parts | dict(of.head)).items()}

        same = all(
            part.has_form_of(raw.parts[path]) for path, part in self.checkpoint.parts.items() if path in raw.parts
        )
        return same and shapes(raw) == shapes(self.checkpoint)

    def load(self, raw: RawCheckpoint) -> None:
        """Put other values into the model, in place and in memory.

        Args:
            raw: parts and shapes as those of ``checkpoint`` (``takes``).

        Raises:
            VerificationError: the library found keys missing or unexpected.
        """
        if self._is_peft:
            fill_peft(self.model, raw, format_of(raw.library).build(raw, self.names)[1])
        else:
            missing = self.model.load_state_dict(_adapters_format().tensors_in_model(raw, self.names), strict=False)
            check_keys([], missing.unexpected_keys, raw)
        self.checkpoint = raw

    def raw(self) -> RawCheckpoint:
        """The checkpoint with the values that the model has now, on the CPU."""
        if self._is_peft:
            with quiet():
                found = format_of(Library.PEFT).parse(self.config, self.tensors(), where="the model in memory")
        else:
            with temporary_folder() as folder, quiet():  # what it has no other way to say
                self.model.save_adapter(str(folder), self.name, with_head=bool(self.checkpoint.head))
                found = read_checkpoint(folder)
        parts = {
            path: part.with_tensors(
                {name: _own(found.parts[path].tensors[name], value.dtype) for name, value in part.tensors.items()}
            )
            for path, part in self.checkpoint.parts.items()
        }
        head = {key: _own(found.head[key], found.head[key].dtype) for key in self.checkpoint.head}
        return replace(self.checkpoint, parts=parts, head=head)


def fill_peft(adapted: Any, raw: RawCheckpoint, tensors: Mapping[str, Tensor]) -> None:
    """Set the values of a module in place; ``tensors`` by their keys in the file."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    found = set_peft_model_state_dict(adapted, dict(tensors), NAME)
    # peft calls all of the base model missing, and a prompt, which it sets after all, unexpected.
    held = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    check_keys(sorted(held.keys() - tensors.keys()), [key for key in found.unexpected_keys if key != PROMPT_KEY], raw)


def check_keys(missing: list[str], unexpected: list[str], raw: RawCheckpoint) -> None:
    """Refuse a module whose library found keys missing or unexpected.

    Raises:
        VerificationError: it did.
    """
    if missing or unexpected:
        raise VerificationError(
            "keys are missing or unexpected on loading",
            where=raw.name,
            found=f"missing {missing[:3]}, unexpected {unexpected[:3]}",
        )


def last_state(output: Any) -> Tensor:
    """The last hidden state, a decoder's where there is an encoder too; of two towers what both say, [batch, d + d]."""
    if "last_hidden_state" in output:
        state = output.last_hidden_state
    elif "image_embeds" in output:
        state = torch.cat([output.text_embeds, output.image_embeds], -1)
    else:
        state = (output.get("decoder_hidden_states") or output.hidden_states)[-1]
    assert isinstance(state, Tensor)
    return state


def _adapters_format() -> AdaptersFormat:
    found = format_of(Library.ADAPTERS)
    assert isinstance(found, AdaptersFormat)
    return found


def _own(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.detach().to("cpu", dtype, copy=True)


@contextmanager
def quiet() -> Iterator[None]:
    """Without what libraries say about modules while they are put in or read."""
    with warnings.catch_warnings(), quiet_libraries():
        warnings.simplefilter("ignore")
        yield
