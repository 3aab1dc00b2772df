"""What ``export`` writes a graft as."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from peft_graft.config.base import AUTO, HOW, WHERE, Dtype, Option
from peft_graft.config.graft_place import GraftPlaceConfig


class Target(StrEnum):
    """What a graft can be exported to."""

    MERGED = "merged"
    GGUF = "gguf"
    VLLM = "vllm"
    OLLAMA = "ollama"
    PEFT = "peft"
    ADAPTERS = "adapters"


class ExportConfig(GraftPlaceConfig):
    """How ``export`` writes a graft for another program.

    Attributes:
        max_rank: ranks above it are truncated, by singular values; what that loses is said. The server's own limit
            where nothing is said.
        drop: leave out what the other program has no place for, which is refused otherwise.
        dtype: of the base model's weights, and so of a merged model; as they are saved where nothing is said.
        ollama_from: what a Modelfile begins with: a GGUF file of the base, or its name in Ollama's library. The base's
            folder where nothing is said.
    """

    max_rank: Annotated[int | None, Option(HOW, "Highest rank that the server takes; 512 unless told otherwise.")] = (
        Field(
            default=None,
            ge=1,
            description="Highest rank of a LoRA for a server (its --max-lora-rank for vLLM); more is truncated, and "
            "what that loses is measured. 512 by default, vLLM's own limit.",
        )
    )
    drop: Annotated[bool, Option(HOW, "Leave out what has no place there, which is refused otherwise.")] = Field(
        default=False,
        description="Leave out what the other program has no place for (trained embeddings, biases, heads), which is "
        "refused otherwise; what that loses is measured.",
    )
    dtype: Annotated[Dtype | None, Option(HOW, "of a merged model; the base's own by default.")] = Field(
        default=None, description="Of a merged model; the base's own by default."
    )
    ollama_from: Annotated[str | None, Option(HOW)] = Field(
        default=None,
        description="The base as Ollama knows it: a GGUF file, or a name such as llama3.2:1b; its folder by default.",
    )
    device: Annotated[str, Option(WHERE)] = Field(
        default=AUTO, description="cpu, cuda, cuda:1, ...; auto is the GPU where there is one."
    )
