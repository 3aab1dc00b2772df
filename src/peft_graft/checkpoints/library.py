"""LoRA from one library to the other: PEFT's checkpoints as AdapterHub's and back, heads included."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from peft_graft.checkpoints.formats.adapters.heads import build_head
from peft_graft.checkpoints.formats.adapters.versions import VERSION
from peft_graft.checkpoints.formats.peft.format import config_dict
from peft_graft.checkpoints.raw import RawCheckpoint
from peft_graft.checkpoints.resolve import PeftCheckpoint
from peft_graft.config import Library
from peft_graft.errors import DependencyError, PlanError
from peft_graft.models.tasks import Task
from peft_graft.modules.lora import LoraModule

#: What AdapterHub calls the places of a LoRA.
_MATRICES = {"attn.query": "q", "attn.key": "k", "attn.value": "v"}
_SWITCHES = {"ffn.up": "intermediate_lora", "ffn.down": "output_lora"}


def in_library(checkpoint: PeftCheckpoint, library: Library | None, *, option: str = "--library") -> PeftCheckpoint:
    """The same LoRA as a checkpoint of the other library; unchanged where it is of this one already.

    Args:
        library: None for the module's own. option: that asks for it, for messages.

    Raises:
        PlanError: the module is no plain LoRA, or the library has no such sites or head.
        DependencyError: ``adapters`` is asked for and not installed.
    """
    if library is None or library == checkpoint.raw.library:
        return checkpoint
    for site, module in checkpoint.modules.items():
        if not isinstance(module, LoraModule) or not module.is_plain:
            raise PlanError(
                "only a plain LoRA means the same in both libraries",
                where=f"{option} {library}",
                found=f"{checkpoint.raw.kind} at {site}",
                fix=f"leave {option} out" if option == "--library" else "use the module with its own library",
            )
    return _as_peft(checkpoint) if library == Library.PEFT else _as_adapters(checkpoint, f"{option} {library}")


def _as_peft(checkpoint: PeftCheckpoint) -> PeftCheckpoint:
    import peft

    raw, head = checkpoint.raw, checkpoint.head
    task = head.task if head else (Task.BASE if raw.task is Task.PREDICTION_HEADS else raw.task)
    config = config_dict(peft.LoraConfig(task_type=task.peft_type))
    if task is Task.BASE:
        config["auto_mapping"] = {"base_model_class": "", "parent_library": "transformers"}
    settings = dict(raw.config["config"]) if isinstance(raw.config["config"], dict) else {}
    config["lora_dropout"] = settings.get("dropout", 0.0)
    return replace(checkpoint, raw=_converted(raw, Library.PEFT, task, config), wrapped=task is not Task.BASE)


def _as_adapters(checkpoint: PeftCheckpoint, asked: str) -> PeftCheckpoint:
    try:
        from adapters import LoRAConfig
    except ImportError as error:
        raise DependencyError(
            "the library adapters is not installed, and its configuration is its own",
            where=asked,
            fix="pip install 'peft-graft[adapters]'",
        ) from error
    raw, head = checkpoint.raw, checkpoint.head
    unknown = sorted(set(checkpoint.roles) - {*_MATRICES, *_SWITCHES})
    if unknown:
        raise PlanError(
            "AdapterHub has no LoRA at these sites",
            where=asked,
            expected=", ".join([*_MATRICES, *_SWITCHES]),
            found=", ".join(unknown),
            fix="choose some with transfer --sites, or keep it for peft",
        )
    settings = LoRAConfig(
        selfattn_lora=any(role in _MATRICES for role in checkpoint.roles),
        attn_matrices=[_MATRICES[role] for role in checkpoint.roles if role in _MATRICES],
        dropout=raw.config.get("lora_dropout", 0.0),
        **{switch: role in checkpoint.roles for role, switch in _SWITCHES.items()},
    ).to_dict()
    config: dict[str, Any] = {"config": settings, "name": raw.name, "version": VERSION}
    task = raw.task if raw.task is Task.CAUSAL_LM else Task.PREDICTION_HEADS  # whose output layer is the model's own
    written = _converted(raw, Library.ADAPTERS, task, config)
    if head is not None:
        head_config, tensors = build_head(head, raw.name)
        written = replace(written, head=tensors, head_config=head_config)
    return replace(checkpoint, raw=written, wrapped=True)


def _converted(raw: RawCheckpoint, to: Library, task: Task, config: dict[str, Any]) -> RawCheckpoint:
    suffix = ".safetensors" if to == Library.PEFT else ".bin"  # what each library's loader looks for by itself
    return replace(raw, library=to, task=task, config=config, head={}, head_config=None, weights_suffix=suffix)
