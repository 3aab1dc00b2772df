"""Trained modules in files and in models: read, tied to sites, converted, written, attached, verified."""
