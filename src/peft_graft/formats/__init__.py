"""Checkpoint formats: one file each, reading to and writing from ``RawCheckpoint``."""
