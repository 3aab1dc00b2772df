"""PEFT's LoRA: factors of linear layers, with DoRA's magnitudes, biases, and ranks and alphas that differ by layer."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from torch import Tensor

from peft_graft.checkpoints.formats.peft import embeddings, norms
from peft_graft.checkpoints.formats.peft.codec import Codec, Found, register_codec
from peft_graft.checkpoints.formats.peft.options import SHARED, Options
from peft_graft.checkpoints.formats.peft.patterns import Patterns
from peft_graft.checkpoints.raw import RawCheckpoint
from peft_graft.checkpoints.student_names import StudentNames
from peft_graft.errors import CheckpointError
from peft_graft.modules.base import Part
from peft_graft.modules.embeddings import RowsPart, TokenRowsPart
from peft_graft.modules.lora import EmbeddingLoraPart, LoraPart, rank_stabilised_scaling
from peft_graft.modules.norms import NormPart

#: Initialisations that leave the base model as it is, and the ones that do not.
_INITIALISATIONS = (True, "true", "True", "gaussian", "eva", "orthogonal")
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
#: What matters to the weights is read from the file's tensors or by ``_scaling``.
_OPTIONS: Options = {
    **SHARED,
    **dict.fromkeys(
        (
            "r", "lora_alpha", "lora_dropout", "fan_in_fan_out", "use_rslora", "rank_pattern", "alpha_pattern",
            "trainable_token_indices", "use_dora", "lora_bias", "ensure_weight_tying", "merge_weights",
            "megatron_config", "megatron_core", "qalora_group_size",
            # of initialisations, which ``init_lora_weights`` names
            "loftq_config", "eva_config", "corda_config", "lora_ga_config",
        )
    ),
    "init_lora_weights": _INITIALISATIONS,
    "bias": ("none", "lora_only"),
    **dict.fromkeys(
        (
            "layer_replication", "target_parameters", "use_qalora", "use_bdlora", "alora_invocation_tokens",
            "arrow_config", "kasa_config", "velora_config", "monteclora_config", "enable_lora",
        ),
        (),
    ),
}  # fmt: skip
#: peft's own, of files that name none.
_DEFAULT_RANK, _DEFAULT_ALPHA = 8, 8
#: Names in the file, after the path of the layer -> fields of the part.
_LINEAR = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_B.bias": "bias",
    "lora_magnitude_vector": "magnitude",
    "base_layer.bias": "base_bias",
}
_EMBEDDING = {"lora_embedding_A": "A", "lora_embedding_B": "B"}
_KEY = re.compile(rf"(.+)\.({'|'.join(map(re.escape, (*_LINEAR, *_EMBEDDING, embeddings.TOKENS)))})")


@register_codec
class LoraCodec(Codec):
    """LoRA, and what peft saves beside it of a vocabulary and of norms."""

    kind: ClassVar = "lora"
    peft_types: ClassVar = ("LORA",)
    options: ClassVar = _OPTIONS

    def check(self, config: Mapping[str, Any], where: str) -> None:
        """Refuse initialisations that changed the base, and options under which the weights mean something else."""
        initialisation = str(config.get("init_lora_weights", True)).lower()
        if initialisation.startswith(_CHANGE_THE_BASE):
            raise CheckpointError(
                "the module belongs to a base model that its initialisation changed "
                f"(init_lora_weights={initialisation})",
                where=where,
                fix="save it with peft's path_initial_model_for_weight_conversion, which makes it an ordinary LoRA",
            )
        super().check(config, where)

    def is_copy(self, path: str) -> bool:
        """Whether it is one of the copies of embeddings that peft saves."""
        return embeddings.is_copy(path)

    def place(self, path: str) -> tuple[str, str] | None:
        """The module path and the name after it, in today's spelling."""
        # older versions of peft wrote the adapter's name, and DoRA's magnitudes as a weight
        plain = re.sub(r"(lora_[AB])\.[^.]+\.(weight|bias)$", r"\1.\2", path)
        plain = re.sub(r"(lora_magnitude_vector)(\.[^.]+)?(\.weight)?$", r"\1", plain)
        plain = re.sub(r"(lora_embedding_[AB])\.[^.]+$", r"\1", plain)
        match = _KEY.fullmatch(plain)
        return (match[1], match[2]) if match else embeddings.place(path) or norms.saved_place(path)

    def parts(self, found: Found, config: Mapping[str, Any], where: str) -> dict[str, Part]:
        """LoRA's factors, rows of a vocabulary and norms; there is no LoRA without factors."""
        parts: dict[str, Part] = {}
        found = embeddings.without_tied(found, config)
        whole = {embeddings.WHOLE, embeddings.TOKENS, *norms.SAVED}
        if not any(_factors(values) for values in found.values() if whole.isdisjoint(values)):
            raise CheckpointError(
                "the file holds no LoRA factors", where=where, expected="keys that end in lora_A.weight"
            )
        ranks = Patterns[int](config.get("rank_pattern") or {}, where)
        alphas = Patterns[float](config.get("alpha_pattern") or {}, where)
        for path, values in found.items():
            own = embeddings.part(path, values, config, where) or norms.saved_part(path, values, where)
            parts[path] = own or _lora(path, values, config, (ranks, alphas), where)
        return parts

    def tensors(self, parts: Mapping[str, Part]) -> dict[str, Tensor]:
        """The tensors as the file has them, by path."""
        tensors: dict[str, Tensor] = {}
        for path, part in parts.items():
            if isinstance(part, RowsPart):
                tensors |= embeddings.tensors(f"{self.prefix}{path}", part)
                continue
            if isinstance(part, NormPart):
                tensors |= {f"{self.prefix}{path}.{name}": value for name, value in part.tensors.items()}
                continue
            names = _EMBEDDING if isinstance(part, EmbeddingLoraPart) else _LINEAR
            tensors |= {
                f"{self.prefix}{path}.{theirs}": part.tensors[ours]
                for theirs, ours in names.items()
                if ours in part.tensors
            }
        return tensors

    def saved_whole(self, parts: Mapping[str, Part]) -> Collection[str]:
        """Embeddings and output layers that are saved whole, and norms."""
        rows = [path.rpartition(".")[2] for path, part in parts.items() if type(part) is RowsPart]
        return rows + [path for path, part in parts.items() if isinstance(part, NormPart)]

    def targets(self, parts: Mapping[str, Part]) -> Collection[str]:
        """The layers that have factors."""
        return [path for path, part in parts.items() if isinstance(part, LoraPart)]

    def config(self, raw: RawCheckpoint, config: dict[str, Any], names: StudentNames) -> dict[str, Any]:
        """Ranks and alphas by layer, the commonest as the module's own."""
        loras = {path: part for path, part in raw.parts.items() if isinstance(part, LoraPart)}
        ranks = {path: part.rank for path, part in loras.items()}
        rslora = bool(raw.config.get("use_rslora"))
        alphas = {
            path: _plain(part.scaling * (part.rank**0.5 if rslora else part.rank)) for path, part in loras.items()
        }
        rank, alpha = _commonest(ranks.values()), _commonest(alphas.values())
        own = {
            "init_lora_weights": True,
            "r": rank,
            "lora_alpha": alpha,
            # peft matches pattern keys as regular expressions against the module's path
            "rank_pattern": {re.escape(path): value for path, value in ranks.items() if value != rank},
            "alpha_pattern": {re.escape(path): value for path, value in alphas.items() if value != alpha},
            "exclude_modules": None,
            "layers_to_transform": None,
            "layers_pattern": None,
            "fan_in_fan_out": bool(set(ranks) & names.transposed),
            "trainable_token_indices": embeddings.token_indices(raw.parts),
        }
        if any(part.trains_output(path) for path, part in raw.parts.items() if isinstance(part, TokenRowsPart)):
            own["ensure_weight_tying"] = False  # the output layer has rows of its own
        return super().config(raw, {**config, **own}, names)


def _factors(values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
    """A and B of a layer or of embeddings, None where one is missing."""
    pairs = (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"))
    return next(((values[a], values[b]) for a, b in pairs if a in values and b in values), None)


def _lora(
    path: str,
    values: Mapping[str, Tensor],
    config: Mapping[str, Any],
    patterns: tuple[Patterns[int], Patterns[float]],
    where: str,
) -> LoraPart:
    """The factors of one layer; ``patterns`` are of ranks and of alphas."""
    names = _LINEAR | _EMBEDDING
    pair = _factors(values)
    if pair is None:
        raise CheckpointError(f"lora_{names[next(iter(values))]} of {path} lacks its twin", where=where)
    if {"lora_A.weight", "lora_B.weight"} & values.keys() and _EMBEDDING.keys() & values.keys():
        raise CheckpointError(
            f"{path} has factors of a linear layer and of embeddings", where=where, found=", ".join(sorted(values))
        )
    if config.get("use_dora") and "lora_magnitude_vector" not in values:
        raise CheckpointError(f"DoRA at {path} lacks its magnitudes", where=where)
    a, b = pair
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        raise CheckpointError(
            f"the factors of {path} do not fit each other",
            where=where,
            expected="A [r, in] and B [out, r]",
            found=f"A {list(a.shape)} and B {list(b.shape)}",
        )
    ranks, alphas = patterns
    expected = ranks.at(path, config.get("r", _DEFAULT_RANK))
    if expected != len(a):
        raise CheckpointError(
            f"the factors of {path} have another rank than the configuration says",
            where=where,
            expected=expected
            if "r" in config or config.get("rank_pattern")
            else f"{expected}, which peft takes where r is not said",
            found=len(a),
            fix="correct r, rank_pattern and lora_alpha in adapter_config.json",
        )
    part = EmbeddingLoraPart if "lora_embedding_A" in values else LoraPart
    alpha = alphas.at(path, config.get("lora_alpha", _DEFAULT_ALPHA))
    scaling = rank_stabilised_scaling(alpha, len(a), rslora=bool(config.get("use_rslora")))
    return part(**{names[name]: value for name, value in values.items()}, scaling=scaling)


def _plain(value: float) -> float | int:
    nearest = round(value)
    return nearest if abs(value - nearest) < 1e-9 * max(1, abs(value)) else value


def _commonest(values: Collection[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]
