"""Compacter (Karimi Mahabadi et al. 2021, arXiv 2106.04647): bottleneck adapters whose matrices are sums of products.

A layer's matrix is H = sum_i kron(A_i, W_i) [in, out], with A_i [n, n] often shared by all layers and W_i [in/n, out/n]
often of low rank. Written out, it is an ordinary bottleneck adapter that computes the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from peft_graft.errors import CheckpointError, reason

_FIX = "save it again with the library's save_adapter"
#: Values of a matrix that is written out at most.
_MOST = 1 << 27


def written_out(
    tensors: Mapping[str, Tensor], settings: Mapping[str, Any], adapter: str, where: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and settings of the ordinary bottleneck adapter that a compacter amounts to.

    Args:
        tensors: as the library's file has them. adapter: the module's name in it.

    Raises:
        CheckpointError: a layer lacks one of its factors.
    """
    shared = {
        match[1]: tensor
        for key, tensor in tensors.items()
        if (match := re.fullmatch(rf".*shared_parameters\.{re.escape(adapter)}\.(\w+)", key))
    }
    found: dict[str, Tensor] = {}
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if ".shared_parameters." in key:
            continue
        match = re.fullmatch(r"(.+\.adapter_(?:down\.\d+|up))\.(phm_rule\w*|W\w*|b)", key)
        if match:
            layers.setdefault(match[1], {})[match[2]] = tensor
        else:
            found[key] = tensor
    for path, parts in layers.items():
        position = "up" if path.endswith("_up") else "down"
        common = {name.replace(f"W_{position}", "W"): tensor for name, tensor in shared.items()}
        rule, inner = (_factor({**common, **parts}, name, f"{where} {path}") for name in ("phm_rule", "W"))
        if rule.ndim != 3 or inner.ndim != 3 or len(rule) != len(inner) or rule[0].numel() * inner[0].numel() > _MOST:
            raise CheckpointError(
                "the compacter's factors do not fit each other",
                where=f"{where} {path}",
                expected="phm_rule [n, n, n] and W [n, in/n, out/n]",
                found=f"{list(rule.shape)} and {list(inner.shape)}",
                fix=_FIX,
            )
        whole = torch.stack([torch.kron(a, w) for a, w in zip(rule, inner, strict=True)]).sum(0)
        found[f"{path}.weight"] = whole.T.contiguous()
        found[f"{path}.bias"] = parts.get("b", whole.new_zeros(whole.shape[1]))
    return found, {**settings, "phm_layer": False}


def _factor(parts: Mapping[str, Tensor], name: str, where: str) -> Tensor:
    """[n, ., .]: one of the two factors of every product, itself a product where it is kept so."""
    if name in parts:
        return parts[name]
    pair = parts.get(f"{name}_left"), parts.get(f"{name}_right")
    if pair[0] is None or pair[1] is None:
        raise CheckpointError(f"the compacter lacks its {name}", where=where, fix=_FIX)
    try:
        return torch.bmm(pair[0], pair[1])
    except RuntimeError as error:
        raise CheckpointError(
            f"the compacter's {name} does not fit ({reason(error)})", where=where, fix=_FIX
        ) from error
