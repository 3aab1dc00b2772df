"""Prompts and answers of decoders: reading them, each model's own rendering, and which of their tokens correspond."""
