"""Names that wrappers around a model leave in the paths of its layers: of torch.compile, DDP, FSDP, checkpointing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from peft_graft.files import renamed

#: A wrapper's name as one part of a path, which in an expression has a backslash before the dot.
_WRAPPER = re.compile(
    r"(?<![^.^])(?:_orig_mod|_fsdp_wrapped_module|_fpw_module|_checkpoint_wrapped_module|_forward_module|module)\\?\."
)
#: Options that name layers by their paths.
_PATTERNS = ("rank_pattern", "alpha_pattern")


def without_wrappers(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The tensors of a file by the names that they would have if no wrapper had been around the model.

    Raises:
        CheckpointError: two of them would have one name.
    """
    return renamed(
        tensors,
        lambda name: _WRAPPER.sub("", name),
        where,
        clash="the file holds one tensor twice, with a wrapper's name in its path and without",
        fix="keep one of the two",
    )


def without_wrapper_patterns(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration whose ranks and alphas by layer name the layers likewise."""
    found = {name: config[name] for name in _PATTERNS if isinstance(config.get(name), dict)}
    return {
        **config,
        **{name: {_WRAPPER.sub("", path): value for path, value in values.items()} for name, values in found.items()},
    }
