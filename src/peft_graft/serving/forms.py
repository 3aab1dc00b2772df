"""All forms of export: importing this makes them known."""

from peft_graft.serving import gguf, library, merged, ollama, vllm

__all__ = ["gguf", "library", "merged", "ollama", "vllm"]
