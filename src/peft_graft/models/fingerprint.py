"""What tells models, configurations and tokenizers apart: hashes of all that decides what they compute."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import xxhash
from torch import Tensor, nn

from peft_graft.models.devices import BaseTensors

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

#: Values that are hashed at a time: few enough for a processor's cache, and no large tensor is held twice.
_CHUNK = 1 << 18
#: What a configuration says beside what its model computes.
_UNDECIDED = {"architectures", "dtype", "torch_dtype", "transformers_version", "id2label", "label2id", "problem_type"}


def hash_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """A hash of names, shapes and all values, as float32: the same for the same values in another dtype or place."""
    digest = xxhash.xxh3_128()
    for name, tensor in tensors:
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        values = tensor.detach().flatten()
        for start in range(0, len(values), _CHUNK):
            digest.update(values[start : start + _CHUNK].to("cpu", torch.float32).numpy().data)
    return digest.hexdigest()


def fingerprint(base: nn.Module) -> str:
    """A hash of every value of a model but those of its pooler, which task models may lack.

    It does not change with the file that the values came from.
    """
    return hash_tensors(_values(base, [name for name in _names(base) if not name.startswith("pooler.")]))


def pooler_fingerprint(base: nn.Module, missing: frozenset[str]) -> str:
    """A hash of the pooler's values, without those that were initialised at random."""
    return hash_tensors(
        _values(base, [name for name in _names(base) if name.startswith("pooler.") and name not in missing])
    )


def config_fingerprint(config: PretrainedConfig) -> str:
    """A hash of what a configuration says about what its model computes."""
    return _hash(_deciding(config.to_dict()))


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of all that decides the tokens of a text, and of its chat template; it does not change with use."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    for last in ("truncation", "padding"):  # of the last call
        backend.pop(last, None)
    return _hash(
        [
            backend,
            tokenizer.special_tokens_map,
            tokenizer.model_max_length,
            tokenizer.model_input_names,
            tokenizer.chat_template,
        ]
    )


def _names(base: nn.Module) -> list[str]:
    """Parameters, tied ones once, and the buffers with values that are saved, such as running means."""
    saved = base.state_dict().keys()
    buffers = [name for name, value in base.named_buffers() if name in saved and value.is_floating_point()]
    return sorted([*dict(base.named_parameters()), *buffers])


def _values(base: nn.Module, names: Iterable[str]) -> Iterable[tuple[str, Tensor]]:
    """One after another, as they act: fetched where they are offloaded, dequantised where they are packed."""
    stored, held = BaseTensors(base, frozenset(), {}), dict(base.named_parameters())
    return ((name, stored[name] if name in stored else held[name]) for name in names)


def _deciding(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    return {
        str(key): _deciding(part)
        for key, part in value.items()
        if key not in _UNDECIDED and not str(key).startswith("_")
    }


def _hash(value: Any) -> str:
    return xxhash.xxh3_128(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
