"""vLLM: a LoRA of peft that it loads, by its rules of version ``VERSION`` and its table of supported models.

The rules are those of its ``PEFTHelper``, ``LoRAConfig`` and ``LoRAModel``. vLLM reads one rank and one alpha for the
whole module: it passes over ``rank_pattern`` and ``alpha_pattern`` without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from peft_graft.checkpoints.formats.base import write_checkpoint
from peft_graft.checkpoints.student_names import written_names
from peft_graft.checkpoints.verify import verify
from peft_graft.config import ExportConfig, Target
from peft_graft.errors import PlanError, VerificationError
from peft_graft.files import read_json
from peft_graft.models.loading import ModelHandle
from peft_graft.models.spec import expert_of
from peft_graft.modules.embeddings import OUTPUT_NAMES
from peft_graft.modules.lora import EmbeddingLoraPart, LoraPart
from peft_graft.serving.gguf import LOST
from peft_graft.serving.plain import MAX_RANK, check_plain, plain_lora
from peft_graft.serving.subject import Subject, compare
from peft_graft.serving.target import Form, Written, register_form

#: The release whose rules these are.
VERSION = "0.11"
#: What a server may be started with as --max-lora-rank.
MAX_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, MAX_RANK)
#: ``model_type`` of models for which vLLM takes LoRA.
MODELS = (
    *("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text"),
    *("phi", "phi3", "glm", "glm4", "cohere", "cohere2", "granite", "olmo2", "starcoder2", "gpt_bigcode", "smollm3"),
)


@register_form
class Vllm(Form):
    """A checkpoint of peft that passes vLLM's checks."""

    target: ClassVar = Target.VLLM

    def check(self, subject: Subject, config: ExportConfig) -> None:
        """Refuse models for which vLLM takes no LoRA, and what is no plain LoRA."""
        where = f"--to {self.target}"
        if config.max_rank and config.max_rank > MAX_RANK:
            raise PlanError(
                "vLLM takes no LoRA of such a rank", where="--max-rank", expected=f"{MAX_RANK} at most",
                found=config.max_rank,
            )  # fmt: skip
        check_model(subject.base, where)
        check_plain(subject, without_layer(subject.base), config, where)

    def write(self, folder: Path, subject: Subject, config: ExportConfig) -> Written:
        """Write the checkpoint, check it by vLLM's rules, and compare outputs with those of the module as it was."""
        lora = plain_lora(subject, without_layer(subject.base), config)
        write_checkpoint(folder, lora.raw, written_names(subject.base, lora.raw.task))
        settings = read_json(folder / "adapter_config.json")
        check_settings(settings, config.max_rank or MAX_RANK)
        verify(folder, lora.raw, subject.base)
        before, bare = subject.outputs(subject.raw)
        after, _ = subject.outputs(lora.raw)
        rank = next(limit for limit in MAX_LORA_RANKS if limit >= settings["r"])
        return Written(
            comparison=compare(before, after, bare, logits=True, most=LOST, where=f"--to {self.target}"),
            kept=lora.kept,
            notes=[*lora.notes, f"checked by the rules of vLLM {VERSION}, which was not run"],
            use=f"vllm serve {{base}} --enable-lora --max-lora-rank {rank} --lora-modules graft={{out}}",
        )


def check_model(base: ModelHandle, where: str) -> None:
    """Refuse a base for which vLLM takes no LoRA.

    Raises:
        PlanError: it takes none.
    """
    if base.text_config.model_type not in MODELS or base.architecture.tower:
        raise PlanError(
            f"vLLM {VERSION} is not known to take LoRA for this model",
            where=f"{where}, {base.name}",
            expected=", ".join(MODELS),
            found=base.architecture.model_type,
            fix="use --to merged, and serve the merged model",
        )


def without_layer(base: ModelHandle) -> Any:
    """What says why vLLM has no place for a LoRA at a path, None where it has: it takes all linear layers."""

    def why(path: str, part: LoraPart) -> str | None:
        if isinstance(part, EmbeddingLoraPart) or path.rpartition(".")[2] in OUTPUT_NAMES:
            return "a LoRA of word embeddings or of the output layer, which vLLM takes for few models"
        sites = base.architecture.sites(path)
        return "a LoRA of an expert" if sites and expert_of(sites[0][0].role) is not None else None

    return why


def check_settings(settings: Mapping[str, Any], most: int) -> None:
    """What vLLM asks of an ``adapter_config.json``.

    Args:
        most: the server's --max-lora-rank.

    Raises:
        VerificationError: vLLM would refuse it, or read it otherwise than peft does.
    """
    wrong = {
        "modules_to_save": bool(settings.get("modules_to_save")),
        "use_dora": bool(settings.get("use_dora")),
        "bias": settings.get("bias", "none") != "none",
        "r": settings["r"] > most,
        "rank_pattern": bool(settings.get("rank_pattern")),
        "alpha_pattern": bool(settings.get("alpha_pattern")),
        "target_modules": not settings["target_modules"],
    }
    if names := [name for name, is_wrong in wrong.items() if is_wrong]:
        raise VerificationError(
            "vLLM would refuse the configuration, or read it otherwise",
            where="adapter_config.json",
            found=", ".join(f"{name}={settings.get(name)!r}" for name in names),
        )
