"""Options of peft's configurations: which of them say nothing about what the weights mean, and so pass.

Everything else is refused by name: an option that is not known here may come from a version of peft under which the
same tensors compute something else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft_graft.errors import CheckpointError

#: What an option may hold: one of these values, or anything (None).
Options = Mapping[str, tuple[Any, ...] | None]

#: Of all kinds: names, versions, where modules are, what was trained beside them.
SHARED: Options = dict.fromkeys(
    (
        "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
        "inference_mode", "runtime_config", "target_modules", "exclude_modules", "modules_to_save",
        "layers_to_transform", "layers_pattern",
        # ms-swift's, of training alone
        "lora_dtype", "lorap_lr_ratio", "lorap_emb_lr",
    )
)  # fmt: skip
#: Of modules that begin with tokens of their own.
PROMPTS: Options = {
    **SHARED,
    **dict.fromkeys(
        (
            "num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers",
            "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs",
            "encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout",
            "init_weights", "prefix_projection",
        )
    ),
}  # fmt: skip


def check_options(config: Mapping[str, Any], known: Options, where: str) -> None:
    """Refuse an option that is not known, or holds what is not known to be harmless; what is not set passes.

    Raises:
        CheckpointError: there is one.
    """
    for option, value in config.items():
        if value is None or value is False or value in ("", [], {}):
            continue
        good = known.get(option, ())
        if good is None or value in good:
            continue
        if option in known:
            message, expected = f"{option}={value!r} is not supported yet", ", ".join(map(str, good)) or "not set"
        else:
            message, expected = (
                f"the option {option}={value!r} is not known, and may change what the weights mean",
                None,
            )
        raise CheckpointError(
            message,
            where=where,
            expected=expected,
            fix="train or convert the module without it; where it does not matter to the weights, delete it from "
            "adapter_config.json",
        )
