"""Models with a module inside, put there by the library that the module is for: to be run, trained and read back."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peft_graft.checkpoints.attached import NAME, AttachedModel, fill_peft, quiet
from peft_graft.checkpoints.formats.base import format_of, write_checkpoint
from peft_graft.checkpoints.formats.peft.format import CONFIG
from peft_graft.checkpoints.raw import RawCheckpoint
from peft_graft.checkpoints.student_names import StudentNames, written_names
from peft_graft.config import Library
from peft_graft.environment import version_of
from peft_graft.errors import GraftError, ModelError, VerificationError, not_installed, reason
from peft_graft.files import read_json
from peft_graft.models.devices import is_quantised
from peft_graft.models.loading import ModelHandle
from peft_graft.models.output import fill_output
from peft_graft.models.task_models import blank_model, padded_by, prefix_of, with_task_head
from peft_graft.models.tasks import Task
from peft_graft.outputs import temporary_folder


def check_library(library: str, task: Task, handle: ModelHandle) -> None:
    """Refuse a model that the library adapters cannot put a module into.

    Raises:
        ModelError: it has no class for such models, or none for the task.
    """
    if library != Library.ADAPTERS or version_of(library) is None:
        return
    import adapters

    config = handle.base.config
    known = type(config) in adapters.AutoAdapterModel._model_mapping
    if not known and task is not Task.PREDICTION_HEADS:
        try:
            with quiet():
                adapters.init(blank_model(copy.deepcopy(config), task))
            known = True
        except (ValueError, AttributeError, KeyError, ImportError):
            known = False
    if not known:
        raise ModelError(
            f"the library adapters has no model class for {handle.architecture.model_type}",
            where=handle.name,
            fix="choose a student of a family that it has, or write a LoRA for peft with --library peft",
        )


def attach(
    raw: RawCheckpoint,
    handle: ModelHandle,
    labels: tuple[str, ...] = (),
    *,
    trainable: bool = False,
    bf16: bool = False,
    speaks: bool = False,
) -> AttachedModel:
    """Put a checkpoint into a copy of its model, where that is, with the checkpoint's own library.

    For peft all of it happens in memory: no file is read or written.

    Args:
        raw: the checkpoint. handle: its base model, not touched. labels: names of its classes.
        trainable: whether module and head shall require gradients. bf16: compute in bfloat16 also where the weights
            are float32.
        speaks: whether a language model shall have its own output layer, which is blank where only its hidden states
            are asked for.

    Raises:
        VerificationError: the library does not take it, or found keys missing or unexpected.
        DependencyError: the library is not installed.
    """
    _check_installed(raw, handle.name)
    names = written_names(handle, raw.task)
    with quiet():
        if raw.library == Library.PEFT:
            attached = _attach_peft(raw, names, handle, labels, trainable=trainable, speaks=speaks)
        else:
            with temporary_folder() as folder:  # it loads from folders only
                write_checkpoint(folder, raw, names)
                attached = _load_adapters(folder, raw, names, handle, labels, trainable=trainable, speaks=speaks)
    return _ready(attached, bf16=bf16)


def attach_written(
    folder: Path, raw: RawCheckpoint, handle: ModelHandle, labels: tuple[str, ...] = (), *, speaks: bool = False
) -> AttachedModel:
    """The same from a written checkpoint, loaded by its library as its users will load it.

    Args:
        folder: the checkpoint. raw: what is in it. handle, labels, speaks: see ``attach``.

    Raises:
        VerificationError: the library cannot load it, or found keys missing or unexpected.
        DependencyError: the library is not installed.
    """
    _check_installed(raw, handle.name)
    load = _load_peft if raw.library == Library.PEFT else _load_adapters
    with quiet():
        names = written_names(handle, raw.task)
        return _ready(load(folder, raw, names, handle, labels, speaks=speaks), bf16=False)


def _check_installed(raw: RawCheckpoint, where: str) -> None:
    if version_of(raw.library) is None:
        raise not_installed(raw.library, "adapters", where, so="so the module cannot be run")


def _ready(attached: AttachedModel, *, bf16: bool) -> AttachedModel:
    attached.model.eval()
    attached.bf16 = bf16 or is_quantised(attached.base) or attached.base.dtype != torch.float32
    for value in attached.trainable().values():
        value.data = value.data.float()
    return attached


def _task_model(
    raw: RawCheckpoint, handle: ModelHandle, labels: tuple[str, ...], *, speaks: bool = False
) -> tuple[Any, dict[str, Tensor]]:
    """The model that a peft checkpoint is put into, as large as its vocabulary, and biases that it replaces."""
    model = _with_head(raw, handle, labels, speaks=speaks)
    own = {
        path: model.get_submodule(path).bias.detach().clone() for path, part in raw.parts.items() if part.replaces_bias
    }
    give_tokens(model, raw)
    return model, own


def give_tokens(model: Any, raw: RawCheckpoint) -> None:
    """Make a model as large as the vocabulary of a module that was trained after tokens were added."""
    needed = raw.vocabulary_size
    if needed and needed > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(needed, mean_resizing=False)


def _with_head(raw: RawCheckpoint, handle: ModelHandle, labels: tuple[str, ...], *, speaks: bool) -> Any:
    model = with_task_head(handle.base, raw.task, labels, raw.num_labels, padding=handle.padding)
    model.config.problem_type = raw.problem_type and raw.problem_type.value  # which pipelines and losses go by
    if speaks:
        fill_output(model, handle)
    return model


def _attach_peft(
    raw: RawCheckpoint,
    names: StudentNames,
    handle: ModelHandle,
    labels: tuple[str, ...],
    *,
    trainable: bool,
    speaks: bool,
) -> AttachedModel:
    """What ``PeftModel.from_pretrained`` does, without files."""
    import peft

    model, own = _task_model(raw, handle, labels, speaks=speaks)
    settings, tensors = format_of(raw.library).build(raw, names)
    known = list(model.parameters())
    prompts = raw.is_virtual  # peft takes these for inference only, and they train nevertheless
    try:
        config = peft.PeftConfig.from_peft_type(**copy.deepcopy(settings))
        config.inference_mode = not trainable or prompts
        wrapper = peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, peft.PeftModel)
        adapted = wrapper(model, config, NAME)
        _give_memory(adapted, known, handle.device)
        fill_peft(adapted, raw, tensors)
    except GraftError:
        raise
    except Exception as error:  # every kind has code of its own in peft, and fails in its own way
        raise VerificationError(f"peft cannot load it ({reason(error)})", where=handle.name) from error
    if trainable and prompts:
        for name, parameter in adapted.named_parameters():
            parameter.requires_grad = "prompt_encoder." in name or ".modules_to_save." in name
    return AttachedModel(adapted, raw, names, settings, own_biases=own)


def _give_memory(adapted: Any, known: list[nn.Parameter], device: torch.device) -> None:
    """Give memory to what peft put beside weights that are offloaded, and so, like them, has none."""
    before = {id(value) for value in known}
    for module in adapted.modules():
        new = {
            leaf: value
            for leaf, value in module.named_parameters(recurse=False)
            if value.is_meta and id(value) not in before
        }
        if new and hasattr(module, "_hf_hook"):  # a trained copy of an offloaded layer is not fetched
            from accelerate.hooks import remove_hook_from_module

            remove_hook_from_module(module)
        for leaf, value in new.items():
            filled = torch.empty(value.shape, dtype=value.dtype, device=device)
            module.register_parameter(leaf, nn.Parameter(filled, requires_grad=value.requires_grad))


def _load_peft(
    folder: Path,
    raw: RawCheckpoint,
    names: StudentNames,
    handle: ModelHandle,
    labels: tuple[str, ...],
    *,
    speaks: bool = False,
) -> AttachedModel:
    from peft import PeftModel

    model, own = _task_model(raw, handle, labels, speaks=speaks)
    try:
        adapted = PeftModel.from_pretrained(model, folder)
    except Exception as error:  # as above
        raise VerificationError(f"peft cannot load it ({_said(error, folder)})", where=handle.name) from error
    return AttachedModel(adapted, raw, names, read_json(folder / CONFIG), own_biases=own)


def _load_adapters(
    folder: Path,
    raw: RawCheckpoint,
    names: StudentNames,
    handle: ModelHandle,
    labels: tuple[str, ...],
    *,
    trainable: bool = False,
    speaks: bool = False,
) -> AttachedModel:
    import adapters
    from transformers.modeling_utils import no_init_weights

    check_library(raw.library, raw.task, handle)
    if raw.task is Task.PREDICTION_HEADS:
        with no_init_weights():  # all of them are replaced
            config = padded_by(handle.base.config, handle.padding)
            model: Any = adapters.AutoAdapterModel.from_config(config, trust_remote_code=False)
        base = getattr(model, prefix_of(model))
        own = base.state_dict()
        given = {key: value.float().cpu() for key, value in handle.base_tensors().items() if key in own}
        filled = {own[key].data_ptr() for key in given}
        for key in base.load_state_dict(given, strict=False).missing_keys:
            if own[key].data_ptr() not in filled:  # one tensor may have several names
                own[key].zero_()  # such as a pooler, which the checkpoint may lack
    else:
        model = _with_head(raw, handle, labels, speaks=speaks)
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
    except Exception as error:  # as for peft
        raise VerificationError(f"adapters cannot load it ({_said(error, folder)})", where=handle.name) from error
    if info.get("missing_keys") or info.get("unexpected_keys"):
        raise VerificationError(
            "keys are missing or unexpected on loading",
            where=handle.name,
            found=f"missing {info.get('missing_keys')}, unexpected {info.get('unexpected_keys')}",
        )
    if trainable:
        model.train_adapter(name)
    return AttachedModel(model, raw, names, raw.config, name)


def _said(error: BaseException, folder: Path) -> str:
    """What a library says first, without the temporary folder that the checkpoint lies in."""
    return reason(error).replace(f"{folder}{os.sep}", "").replace(str(folder), "the checkpoint")
