"""Output layers of language models: hidden states to logits, at chosen places only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peft_graft.errors import ModelError
from peft_graft.models.devices import device_of, is_quantised
from peft_graft.models.loading import ModelHandle
from peft_graft.models.task_models import prefix_of, with_task_head
from peft_graft.models.tasks import Task

#: Largest difference of our logits from the model's own, relative to the largest of these.
_TOLERANCE = 1e-2


def fill_output(model: Any, handle: ModelHandle) -> None:
    """Give a language model made around a base model (``with_task_head``) that model's own output layer.

    Args:
        model: of transformers, without a module. handle: the model that it was made from.

    Raises:
        ModelError: it has no output layer.
    """
    output = model.get_output_embeddings()
    if output is None:
        raise ModelError("the model has no output layer, so it cannot speak", where=handle.name)
    weights = handle.base_tensors(output=True)
    path = handle.architecture.row.lm_head
    kept = handle.base.dtype if output.weight.dtype == torch.float32 else output.weight.dtype
    dtype = torch.float32 if kept == torch.float16 else kept
    weight = weights[f"{path}.weight"]
    output.weight = nn.Parameter(weight.to(output.weight.device, dtype), requires_grad=False)
    if getattr(output, "bias", None) is not None and handle.output_bias is not None:
        output.bias = nn.Parameter(handle.output_bias.to(output.weight.device, dtype), requires_grad=False)


@dataclass
class LanguageModel:
    """A language model without a module, to be run as one with a module is (``checkpoints.attach.AttachedModel``).

    Attributes:
        model: of transformers; it shares the values of the base model's matrices.
        bf16: forward passes in mixed precision.
    """

    model: Any
    bf16: bool = False

    @property
    def device(self) -> torch.device:
        """Where its inputs belong."""
        return device_of(self.model)

    def forward(self, inputs: Mapping[str, Tensor], *, module: bool = True) -> tuple[None, Tensor]:
        """Last hidden state [batch, length, d] of a padded batch, and no logits."""
        base = getattr(self.model, prefix_of(self.model))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return None, base(**inputs, use_cache=False).last_hidden_state


def language_model(handle: ModelHandle, *, bf16: bool = False) -> LanguageModel:
    """The language model that a base model belongs to, in evaluation mode.

    Raises:
        ModelError: it has no output layer.
    """
    model = with_task_head(handle.base, Task.CAUSAL_LM, padding=handle.padding)
    fill_output(model, handle)
    mixed = bf16 or is_quantised(handle.base) or handle.base.dtype == torch.bfloat16
    return LanguageModel(model.eval(), mixed)


@dataclass(frozen=True)
class OutputLayer:
    """How a language model makes logits of its last hidden states.

    Attributes:
        layer: the linear layer, with a module inside where one acts there.
        scale: what its outputs are multiplied with (Cohere, Granite).
        softcap: c of c * tanh(logits / c) (Gemma 2), None for none.
    """

    layer: nn.Module
    scale: float = 1.0
    softcap: float | None = None

    @staticmethod
    def of(model: Any) -> OutputLayer:
        """The output layer of a language model of transformers, with or without a module inside."""
        config = getattr(model.config, "text_config", model.config)
        scale = float(getattr(config, "logit_scale", None) or 1.0)
        scale /= float(getattr(config, "logits_scaling", None) or 1.0)
        return OutputLayer(model.get_output_embeddings(), scale, getattr(config, "final_logit_softcapping", None))

    @property
    def frozen(self) -> tuple[Tensor, Tensor | None] | None:
        """Weight [V, d] and bias [V] of a plain layer that is not trained, of which rows may be taken; else None."""
        if not isinstance(self.layer, nn.Linear) or type(self.layer).forward is not nn.Linear.forward:
            return None
        if self.layer.weight.requires_grad or self.layer.weight.is_meta:
            return None
        return self.layer.weight.detach(), None if self.layer.bias is None else self.layer.bias.detach()

    @property
    def width(self) -> int:
        """How many logits it gives."""
        return int(next(self.layer.parameters()).shape[0])

    def finish(self, values: Tensor) -> Tensor:
        """Outputs of the layer as logits, float32."""
        values = values.float()
        if self.scale != 1.0:
            values = values * self.scale
        return values if self.softcap is None else self.softcap * torch.tanh(values / self.softcap)

    def logits(self, states: Tensor) -> Tensor:
        """[..., d] hidden states -> [..., V] logits, float32."""
        weight = next(self.layer.parameters())
        return self.finish(self.layer(states.to(weight.dtype)))

    def check(self, model: Any, state: Tensor, inputs: dict[str, Tensor]) -> None:
        """Refuse a model whose logits are made in another way.

        Args:
            model: the language model. state: [1, length, d], its last hidden states for ``inputs``.

        Raises:
            ModelError: its own logits differ.
        """
        own = model(**inputs).logits[0, -1].float()
        ours = self.logits(state[0, -1])
        if float((own - ours).abs().max()) > _TOLERANCE * float(own.abs().max().clamp_min(1.0)):
            raise ModelError(
                "the model makes its logits in a way that is not known here",
                where=type(model).__name__,
                expected="a linear output layer, scaled or capped as the configuration says",
                fix="report the model's name",
            )
