"""GGUF: a LoRA for llama.cpp and what is built on it.

llama.cpp keeps the rows of a head's queries and keys in the order in which it rotates them, for the architectures of
``_ROTATED``; what a LoRA writes there is put into the same order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from peft_graft.config import ExportConfig, Target
from peft_graft.errors import PlanError, VerificationError, not_installed, plain
from peft_graft.models.loading import ModelHandle
from peft_graft.models.sizes import head_counts
from peft_graft.models.spec import expert_of
from peft_graft.modules.base import Part
from peft_graft.modules.embeddings import OUTPUT_NAMES
from peft_graft.modules.lora import EmbeddingLoraPart, LoraPart
from peft_graft.serving.plain import PlainLora, check_plain, plain_lora
from peft_graft.serving.subject import Subject, compare
from peft_graft.serving.target import Form, Written, register_form

if TYPE_CHECKING:
    import gguf

#: ``model_type`` of transformers -> architecture of llama.cpp.
ARCHITECTURES: Mapping[str, str] = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
    "granite": "granite",
    "olmo2": "olmo2",
    "starcoder2": "starcoder2",
    "stablelm": "stablelm",
}
#: Architectures whose queries and keys are in the order of rotation.
_ROTATED = ("llama", "granite")
FILE = "adapter.gguf"
#: Of the module's effect: what is written is what is read back, and the rest is rounding.
LOST = 0.9


@register_form
class Gguf(Form):
    """A LoRA as one GGUF file."""

    target: ClassVar = Target.GGUF

    def check(self, subject: Subject, config: ExportConfig) -> None:
        """Refuse architectures that are not known here, and what is no plain LoRA."""
        try:
            import gguf  # noqa: F401
        except ImportError as error:
            raise not_installed("gguf", "export", f"--to {self.target}") from error
        where = f"--to {self.target}"
        check_architecture(subject.base, where)
        check_plain(subject, partial(without_tensor, subject.base), config, where)

    def write(self, folder: Path, subject: Subject, config: ExportConfig) -> Written:
        """Write the file, read it again, and compare outputs with those of the module as it was."""
        lora = plain_lora(subject, partial(without_tensor, subject.base), config)
        write_gguf(folder / FILE, lora, subject)
        again = replace(lora.raw, parts=read_gguf(folder / FILE, lora, subject.base))
        if again.parts != lora.raw.parts:
            raise VerificationError("the GGUF file was read back with other values", where=f"--to {self.target}")
        before, bare = subject.outputs(subject.raw)
        after, _ = subject.outputs(again)
        return Written(
            comparison=compare(before, after, bare, logits=True, most=LOST, where=f"--to {self.target}"),
            kept=lora.kept,
            notes=lora.notes,
            use="llama-server --model BASE.gguf --lora {out}/" + FILE,
        )


def check_architecture(base: ModelHandle, where: str) -> None:
    """Refuse a base whose architecture is not known here.

    Raises:
        PlanError: it is not.
    """
    known = base.text_config.model_type in ARCHITECTURES
    if not known or base.architecture.tower:
        raise PlanError(
            "LoRA for this architecture cannot be written for llama.cpp yet",
            where=f"{where}, {base.name}",
            expected=", ".join(ARCHITECTURES),
            found=base.architecture.model_type,
            fix="use --to merged, and convert the merged model with llama.cpp's convert_hf_to_gguf.py",
        )


def without_tensor(base: ModelHandle, path: str, part: LoraPart) -> str | None:
    """Why llama.cpp has no place for a LoRA at a path, None where it has."""
    tied = bool(getattr(base.text_config, "tie_word_embeddings", False))
    if isinstance(part, EmbeddingLoraPart) or path.rpartition(".")[2] in OUTPUT_NAMES:
        return "a LoRA of word embeddings that are the output layer too" if tied else None
    sites = base.architecture.sites(path)
    if sites and expert_of(sites[0][0].role) is not None:
        return "a LoRA of an expert"
    return None if _tensor_name(base, path) else "a LoRA of a layer that llama.cpp does not know"


def _tensor_name(base: ModelHandle, path: str) -> str | None:
    """What llama.cpp calls the weight at a path."""
    found = _tensor_names(ARCHITECTURES[base.text_config.model_type], base.architecture.num_layers).get_name(path)
    return f"{found}.weight" if found else None


@cache
def _tensor_names(architecture: str, layers: int) -> gguf.TensorNameMap:
    import gguf

    arch = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    return gguf.get_tensor_name_map(arch, layers)


def write_gguf(path: Path, lora: PlainLora, subject: Subject) -> None:
    """Write a LoRA: pairs ``NAME.lora_a`` [r, d_in] and ``NAME.lora_b`` [d_out, r], float32, and one alpha."""
    import gguf

    base, first = subject.base, next(iter(lora.parts.values()))
    writer = gguf.GGUFWriter(path, ARCHITECTURES[base.text_config.model_type])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, first.scaling * first.rank)
    writer.add_name(plain(Path(subject.name).name))
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, plain(base.name.rstrip("/").rpartition("/")[2]))
    for layer, part in lora.parts.items():
        name = _tensor_name(base, layer)
        a, b = part.A, _rotated(part.B, base, layer)
        if isinstance(part, EmbeddingLoraPart):  # which llama.cpp looks up by row
            a = a.T
        for letter, value in (("a", a), ("b", b)):
            writer.add_tensor(f"{name}.lora_{letter}", value.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_gguf(path: Path, lora: PlainLora, base: ModelHandle) -> dict[str, Part]:
    """What a file holds for the layers of a LoRA, in transformers' order.

    Raises:
        VerificationError: it lacks one of them, or has another tensor.
    """
    import gguf

    reader: Any = gguf.GGUFReader(path)
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    alpha = float(reader.fields[gguf.Keys.Adapter.LORA_ALPHA].contents())
    found: dict[str, Part] = {}
    for layer, part in lora.parts.items():
        name = _tensor_name(base, layer)
        try:
            a, b = (tensors.pop(f"{name}.lora_{letter}") for letter in "ab")
        except KeyError as error:
            raise VerificationError(f"the GGUF file has no {error}", where=layer) from error
        a = a.T.contiguous() if isinstance(part, EmbeddingLoraPart) else a
        found[layer] = type(part)(a, _rotated(b, base, layer, back=True), _close(alpha / len(part.A), part.scaling))
    if tensors:
        raise VerificationError("the GGUF file has tensors of no layer", where=str(path), found=min(tensors))
    return found


def _close(value: float, known: float) -> float:
    """A number that came back from float32 as it was."""
    return known if abs(value - known) <= 1e-6 * abs(known) else value


def _rotated(b: Tensor, base: ModelHandle, path: str, *, back: bool = False) -> Tensor:
    """Rows [d_out, r] of queries or keys with the two halves of every head interleaved, or back; others as they are."""
    name = path.rpartition(".")[2]
    if ARCHITECTURES[base.text_config.model_type] not in _ROTATED or name not in ("q_proj", "k_proj"):
        return b
    heads = head_counts(base.text_config)[name == "k_proj"]
    shape = (heads, -1, 2, b.shape[1]) if back else (heads, 2, -1, b.shape[1])
    return b.reshape(shape).transpose(1, 2).reshape(b.shape).contiguous()
