"""Task models of transformers: blank ones, and ones around a base model that is there already."""

from __future__ import annotations

import copy
import logging
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import transformers
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars  # type: ignore[attr-defined]
from torch import Tensor, nn

from peft_graft.errors import ModelError
from peft_graft.labels import declared_names
from peft_graft.models.devices import device_of, is_quantised, is_spread
from peft_graft.models.tasks import Task

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def blank_model(config: PretrainedConfig, task: Task, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """A model of this configuration without weights, on torch's meta device.

    Args:
        trust_remote_code: whether to run model code that the configuration names. A configuration whose own class is
            such code was only made because it is trusted.

    Raises:
        ModelError: there is no model of this kind for the task, or it cannot be built from its configuration alone.
    """
    auto = auto_class(task, config)
    trusted = trust_remote_code or is_remote(config)
    remote = trusted and auto.__name__ in (getattr(config, "auto_map", None) or {})
    if type(config) not in auto._model_mapping and not remote:
        what = "bare" if task in (Task.BASE, Task.PREDICTION_HEADS) else task
        raise ModelError(
            f"transformers {transformers.__version__} has no {what} model of this kind",
            where=str(config.name_or_path or config.model_type),
            expected=f"a model that {' or '.join(task.auto_classes)} can load",
            found=config.model_type,
            fix="choose a model of another family; where the module's task is another, correct task_type in its "
            "adapter_config.json",
        )
    # Transformers 5 fills no weights there; 4 goes through every one of them, which takes a third of a transfer between
    # small models.
    unfilled = getattr(transformers.modeling_utils, "no_init_weights", None)
    with warnings.catch_warnings(), unfilled() if unfilled else nullcontext():
        warnings.simplefilter("ignore")
        try:
            model = _built(auto, config, trust_remote_code=trusted)
        except Exception as error:  # anything at all may go wrong in a model's own code
            raise ModelError(
                f"the model cannot be built from its configuration ({(str(error).splitlines() or [repr(error)])[0]})",
                where=str(config.name_or_path or config.model_type),
                fix="see that AutoModel can load it in this environment; where it needs a library, install that",
            ) from error
    if unfilled:
        model.tie_weights()  # which 4 does after filling them
    return model


def _built(auto: Any, config: PretrainedConfig, *, trust_remote_code: bool) -> PreTrainedModel:
    try:
        with torch.device("meta"):
            model: PreTrainedModel = auto.from_config(config, trust_remote_code=trust_remote_code)
    except NotImplementedError:  # it looks at the values of its buffers as it is built (Apertus)
        from accelerate import init_empty_weights

        with init_empty_weights():
            model = auto.from_config(config, trust_remote_code=trust_remote_code)
    return model


def is_remote(thing: object) -> bool:
    """Whether a model or configuration is of a class that came with its repository, and so is trusted."""
    return type(thing).__module__.startswith("transformers_modules")


def with_task_head(
    base: PreTrainedModel,
    task: Task,
    labels: tuple[str, ...] = (),
    num_labels: int | None = None,
    *,
    padding: int,
) -> PreTrainedModel:
    """A task model around a copy of this base model, where that is, its head filled with zeros in float32.

    It is what a checkpoint is loaded into to see whether it loads, or to be trained; the model itself is not touched.
    The copy shares the values of the model's matrices, but for a float16 one, which becomes float32.

    Args:
        padding: the token that rows will be filled up with (``ModelHandle.padding``).
    """
    config = padded_by(base.config, padding)
    set_labels(config, labels, num_labels)
    device = device_of(base)
    base = shared_copy(base)
    if base.dtype == torch.float16 and not is_quantised(base) and not is_spread(base):
        base = base.float()
    model = blank_model(config, task, trust_remote_code=is_remote(base))
    if type(model) is type(base):
        return base
    prefix = prefix_of(model)
    inside = getattr(model, prefix, model)
    if getattr(inside, "pooler", None) is None and hasattr(base, "pooler"):
        base.pooler = None  # task classes that need no pooler are built without
    if isinstance(base, type(inside)):
        setattr(model, prefix, base)
    else:
        take_parts(inside, base, [name for name, _ in base.named_children()])
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            owner = model.get_submodule(name.rpartition(".")[0])
            setattr(owner, name.rpartition(".")[2], nn.Parameter(torch.zeros(parameter.shape, device=device)))
    for name, buffer in model.named_buffers():
        if buffer.is_meta:
            model.get_submodule(name.rpartition(".")[0]).register_buffer(
                name.rpartition(".")[2], torch.zeros(buffer.shape, device=device)
            )
    return model.eval()


def padded_by(config: PretrainedConfig, padding: int) -> PretrainedConfig:
    """A copy of a configuration that names the token of padding, by which decoders find the last one of a text."""
    config = copy.deepcopy(config)
    for part in (config, getattr(config, "text_config", None)):
        if isinstance(part, transformers.PretrainedConfig):
            part.pad_token_id = padding
    return config


def take_parts(target: PreTrainedModel, source: PreTrainedModel, names: Iterable[str]) -> None:
    """Put parts of one model, such as its stacks, in the place of another's of the same names.

    Raises:
        ModelError: one of the two lacks a part.
    """
    for name in names:
        for model in (target, source):
            if not hasattr(model, name):
                raise ModelError(
                    f"a {type(model).__name__} has no {name}, which belongs to the base model",
                    where=model.config.model_type,
                    fix="use a task model that holds the whole base model",
                )
        setattr(target, name, getattr(source, name))


_DICTS = (dict, OrderedDict)


def shared_copy(base: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model that shares the values of its matrices, which no module changes in place.

    What libraries train of a base model's own they copy first, but for vectors (biases, norms); those are copied here.
    """
    shared: dict[int, Any] = {id(value): _twin(value) for value in base.parameters() if value.ndim > 1}
    for module in base.modules():
        # Every module has ten of them, and copying them in the general way takes half of the time.
        shared |= {id(value): type(value)() for value in vars(module).values() if type(value) in _DICTS and not value}
        stored = getattr(getattr(module, "_hf_hook", None), "weights_map", None)  # what accelerate has offloaded
        shared |= {id(stored): stored} if stored is not None else {}
    return copy.deepcopy(base, shared)


def _twin(value: nn.Parameter) -> nn.Parameter:
    """Another parameter of the same values, with all else that one of bitsandbytes holds."""
    if type(value).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return value  # one of torchao is only a shell around its values, which nothing changes
    twin = torch.Tensor._make_subclass(type(value), value.data, value.requires_grad and not value.is_inference())
    twin.__dict__.update(value.__dict__)
    return twin


def complete(config: PretrainedConfig, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All inputs of a model that reads this text; an encoder-decoder's decoder reads the same text as its encoder.

    Not shifted by a start token, so that one pairing of tokens serves both stacks.
    """
    found = dict(inputs)
    if getattr(config, "is_encoder_decoder", False):
        found |= {f"decoder_{name}": found[name] for name in ("input_ids", "attention_mask") if name in found}
    return found


def set_labels(config: PretrainedConfig, labels: tuple[str, ...] = (), num_labels: int | None = None) -> None:
    """Write label names, or at least their number, into a configuration."""
    if labels:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: index for index, label in enumerate(labels)}
    elif num_labels is not None:
        config.num_labels = num_labels


def fresh_head(config: PretrainedConfig, task: Task, num_labels: int | None, seed: int = 0) -> dict[str, Tensor]:
    """An untrained head of the task model, by path: normal with the model's own deviation, zero biases."""
    config = copy.deepcopy(config)
    set_labels(config, (), num_labels)
    model = blank_model(config, task)
    generator = torch.Generator().manual_seed(seed)
    deviation = float(getattr(config, "initializer_range", 0.02))
    return {
        name: torch.zeros(parameter.shape)
        if parameter.ndim == 1
        else deviation * torch.randn(parameter.shape, generator=generator)
        for name, parameter in model.named_parameters()
        if not name.startswith(f"{prefix_of(model)}.")
    }


def own_labels(config: PretrainedConfig) -> tuple[str, ...]:
    """Label names that a configuration declares itself, empty where it has transformers' placeholders only."""
    return declared_names(config.id2label)


def prefix_of(model: PreTrainedModel) -> str:
    """The attribute under which task models of this kind keep their base model."""
    declared = str(model.base_model_prefix)
    # Gemma 3's text models declare another one, or none, for the sake of the model that also sees.
    return declared if declared and (hasattr(model, declared) or not hasattr(model, "model")) else "model"


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence what transformers and adapters say about heads that are random until a checkpoint fills them.

    Also transformers 5's bars for loading weights, which would end up in logs; our own progress says as much. Turning
    transformers' bars on again turns those of huggingface_hub on too, which a user may have turned off.
    Within each other, the outermost does it.
    """
    bars, of_hub = transformers.logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    transformers.logging.disable_progress_bar()
    silenced = [
        (logger, logger.level)
        for logger in map(logging.getLogger, ("transformers", "adapters"))
        if logger.level < logging.ERROR  # setting a level makes every logger of the process forget what it knew
    ]
    for logger, _ in silenced:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        if bars:
            transformers.logging.enable_progress_bar()
        if not of_hub:
            disable_progress_bars()
        for logger, level in silenced:
            logger.setLevel(level)


def auto_class(task: Task, config: PretrainedConfig) -> Any:
    """The auto class of transformers that makes a model of this configuration for the task; the first if none does."""
    classes = [getattr(transformers, name) for name in task.auto_classes]
    if getattr(config, "text_config", None) is not None:  # the class that reads all, before that of its text tower
        classes.reverse()
    return next((auto for auto in classes if type(config) in auto._model_mapping), classes[0])
